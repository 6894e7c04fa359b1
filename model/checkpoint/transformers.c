#include "model/checkpoint/transformers.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint/checkpoint_dirs.h"
#include "model/checkpoint/files.h"

/* The text of a file at compile time, NUL-terminated. Paths are from the root of the repository, where make runs. */
#define FILE_TEXT(name, path)                                                                                \
    __asm__(".pushsection .rodata\n" #name ":\n.incbin \"" path "\"\n.byte 0\n.popsection");                 \
    extern const char name[] __attribute__((visibility("hidden")))

FILE_TEXT(configuration_iha_py, "model/checkpoint/hf/configuration_iha.py");
FILE_TEXT(modeling_iha_py, "model/checkpoint/hf/modeling_iha.py");

static bool add_strings(cJSON *object, const char *const (*pairs)[2], int count) {
    bool ok = object != NULL;
    for (int i = 0; i < count && ok; i++)
        ok = cJSON_AddStringToObject(object, pairs[i][0], pairs[i][1]);
    return ok;
}

static bool add_token_ids(cJSON *object, const char *generation_config) {
    static const char *const names[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    cJSON *ids = cJSON_Parse(generation_config);
    bool ok = ids != NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names && ok; i++) {
        cJSON *id = cJSON_DetachItemFromObjectCaseSensitive(ids, names[i]);
        ok = !id || cJSON_AddItemToObject(object, names[i], id);
    }
    cJSON_Delete(ids);
    return ok;
}

/* {"architectures": ..., ...} */
static char *keys_of_transformers(const char *generation_config) {
    static const char *const auto_map[][2] = {{"AutoConfig", "configuration_iha.IhaConfig"},
                                              {"AutoModelForCausalLM", "modeling_iha.IhaForCausalLM"}};
    static const char *const architecture = "IhaForCausalLM", *const dtype[][2] = {{"dtype", "float32"}};
    cJSON *root = cJSON_CreateObject();
    cJSON *list = cJSON_CreateStringArray(&architecture, 1);
    bool ok = cJSON_AddItemToObject(root, "architectures", list);
    if (!ok)
        cJSON_Delete(list);
    ok = ok && add_strings(cJSON_AddObjectToObject(root, "auto_map"), auto_map, 2) &&
         add_strings(root, dtype, 1) && (!generation_config || add_token_ids(root, generation_config));
    char *text = ok ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    return text;
}

/* The two objects are joined as text, since numbers would lose digits in cJSON. */
char *transformers_config_json(const struct model_config *m, const char *generation_config) {
    char *model = config_model_to_json(m), *more = keys_of_transformers(generation_config), *text = NULL;
    size_t kept = model ? strlen(model) - strlen("\n}\n") : 0, added = more ? strlen(more) : 0;
    if (model && more && (text = malloc(kept + added + 2))) {
        memcpy(text, model, kept);
        text[kept] = ',';
        memcpy(text + kept + 1, more + 1, added - 1); /* without its brace */
        memcpy(text + kept + added, "\n", 2);
    }
    free(model);
    free(more);
    return text;
}

int transformers_write_code(const char *dir, struct error *e) {
    const struct {
        const char *name, *text;
    } files[] = {{"configuration_iha.py", configuration_iha_py}, {"modeling_iha.py", modeling_iha_py}};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[PATH_BYTES];
        path_join(path, dir, files[i].name);
        if (files_write_synced(path, files[i].text, strlen(files[i].text), e) != 0)
            return -1;
    }
    return 0;
}
