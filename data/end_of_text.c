#include "data/end_of_text.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/tokenizer_internal.h"

/* In the order they are looked for. The same list as END_OF_TEXT in prepare_tokenizers.py, which a test
 * compares. */
const char *const end_of_text_names[] = {
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "<EOT>",
};
const int end_of_text_name_count = sizeof end_of_text_names / sizeof *end_of_text_names;

bool end_ids_has(const struct end_ids *ends, int32_t id) {
    for (int i = 0; i < ends->count; i++)
        if (ends->ids[i] == id)
            return true;
    return false;
}

void end_ids_add(struct end_ids *ends, int32_t id) {
    if (ends->count < MAX_END_IDS && !end_ids_has(ends, id))
        ends->ids[ends->count++] = id;
}

/* ---- files beside a tokenizer ---- */

/* The JSON of folder/name: *root stays NULL when there is no such file. `folder` is length bytes long. */
static int read_beside(const char *folder, size_t length, const char *name, cJSON **root, char **path,
                       struct error *e) {
    size_t size = length + strlen(name) + 2;
    *root = NULL;
    *path = malloc(size);
    if (!*path)
        return fail_run(e, "out of memory for a file name");
    snprintf(*path, size, "%.*s%s", (int)length, folder, name);
    if (access(*path, F_OK) && (errno == ENOENT || errno == ENOTDIR))
        return 0;
    *root = json_read(*path, "remove it if it is not wanted", e);
    return *root ? 0 : -1;
}

static size_t folder_length(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash + 1 - path) : 0;
}

int read_tokenizer_config(const char *path, cJSON **root, struct error *e) {
    char *config;
    int rc = read_beside(path, folder_length(path), "tokenizer_config.json", root, &config, e);
    free(config);
    return rc;
}

int read_eos_token(const char *path, char **name, struct error *e) {
    char *config;
    cJSON *root;
    *name = NULL;
    int rc = read_beside(path, folder_length(path), "tokenizer_config.json", &root, &config, e);
    const cJSON *token = rc == 0 && root ? json_member(root, "eos_token") : NULL;
    if (cJSON_IsObject(token)) /* an added token, spelled out */
        token = json_member(token, "content");
    if (token && !cJSON_IsString(token))
        rc = fail_user(e, "%s: its eos_token is neither text nor an added token; correct it or remove it",
                       config);
    else if (token && !(*name = strdup(token->valuestring)))
        rc = fail_run(e, "%s: out of memory", config);
    cJSON_Delete(root);
    free(config);
    return rc;
}

static int add_end_id(const cJSON *item, const char *path, int64_t vocab_size, struct end_ids *ends,
                      struct error *e) {
    double id = cJSON_IsNumber(item) ? item->valuedouble : -1;
    if (!(id >= 0 && id < (double)vocab_size && id == (double)(int32_t)id))
        return fail_user(
            e, "%s: its eos_token_id must be a token id below the model's vocab_size, %lld, or a list", path,
            (long long)vocab_size);
    end_ids_add(ends, (int32_t)id);
    return 0;
}

static int read_end_ids(const char *folder, size_t length, int64_t vocab_size, struct end_ids *ends,
                        struct error *e) {
    char *config;
    cJSON *root;
    int rc = read_beside(folder, length, "generation_config.json", &root, &config, e);
    const cJSON *ids = rc == 0 && root ? json_member(root, "eos_token_id") : NULL;
    if (cJSON_IsArray(ids)) {
        for (const cJSON *item = ids->child; item && rc == 0; item = item->next)
            rc = add_end_id(item, config, vocab_size, ends, e);
    } else if (ids) {
        rc = add_end_id(ids, config, vocab_size, ends, e);
    }
    cJSON_Delete(root);
    free(config);
    return rc;
}

int read_generation_config_beside(const char *path, int64_t vocab_size, struct end_ids *ends,
                                  struct error *e) {
    return read_end_ids(path, folder_length(path), vocab_size, ends, e);
}

int read_generation_config(const char *folder, int64_t vocab_size, struct end_ids *ends, struct error *e) {
    size_t length = strlen(folder) + 1;
    char *with_slash = malloc(length + 1);
    if (!with_slash)
        return fail_run(e, "out of memory for a file name");
    snprintf(with_slash, length + 1, "%s/", folder);
    int rc = read_end_ids(with_slash, length, vocab_size, ends, e);
    free(with_slash);
    return rc;
}

char *end_ids_json(const struct end_ids *ends) {
    cJSON *root = cJSON_CreateObject(), *ids = root ? cJSON_AddArrayToObject(root, "eos_token_id") : NULL;
    bool made = ids != NULL;
    for (int i = 0; i < ends->count && made; i++)
        made = cJSON_AddItemToArray(ids, cJSON_CreateNumber(ends->ids[i]));
    if (made && ends->count > 0)
        made = cJSON_AddNumberToObject(root, "bos_token_id", ends->ids[0]) &&
               cJSON_AddNumberToObject(root, "pad_token_id", ends->ids[0]);
    char *text = made ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    return text;
}
