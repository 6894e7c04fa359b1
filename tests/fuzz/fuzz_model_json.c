/* config.json: a model that is read is valid and the same when written and read again; sizes beyond the limits are
 * refused before they overflow. */
#include "tests/fuzz/config_checks.h"

#include <cjson/cJSON.h>

static void check_layers(const struct model_config *m, const cJSON *list) {
    CHECK(cJSON_IsArray(list) && cJSON_GetArraySize(list) == m->num_hidden_layers);
    for (int i = 0; i < m->num_hidden_layers; i++) {
        const char *name = cJSON_GetStringValue(cJSON_GetArrayItem(list, i));
        CHECK(name && strcmp(name, layer_type_name(m->layer_types[i])) == 0);
    }
}

/* Every key of the file has the value that the file gives it. */
static void check_values(const struct model_config *m, const char *text) {
    static struct config c;
    char value[MAX_TEXT];
    cJSON *root = cJSON_Parse(text);
    CHECK(cJSON_IsObject(root));
    c.model = *m;
    for (int i = 0; i < config_row_count; i++) {
        const struct config_row *row = &config_rows[i];
        bool pattern = row->kind == KIND_PATTERN;
        bool is_absent = strncmp(row->name, "init_", 5) == 0 || strcmp(row->name, "size") == 0;
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, pattern ? "layer_types" : row->name);
        if (strcmp(row->section, "model") != 0 || is_absent || !item || cJSON_IsNull(item))
            continue;
        if (!pattern)
            value_text(&c, row, value);
        if (pattern)
            check_layers(m, item);
        else if (row->kind == KIND_INTEGER || row->kind == KIND_REAL)
            CHECK(cJSON_IsNumber(item) && item->valuedouble == strtod(value, NULL));
        else if (row->kind == KIND_BOOL)
            CHECK(cJSON_IsBool(item) && strcmp(value, cJSON_IsTrue(item) ? "true" : "false") == 0);
        else
            CHECK(cJSON_IsString(item) && strcmp(value, item->valuestring) == 0);
    }
    cJSON_Delete(root);
}

/* As the commands on a checkpoint do it: overrides, here none, and all checks that follow. */
static void check_use(const struct model_config *m) {
    static struct config c;
    struct error e = {0};
    config_defaults(&c);
    c.model = *m;
    c.train.seq_len = m->max_position_embeddings;
    c.train.micro_batch = 1;
    if (config_override(&c, 0, NULL, &e) == 0)
        check_costs(m, 1, m->max_position_embeddings);
    else
        check_user_error(&e);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct model_config m;
    struct error e = {0};
    char *text = fuzz_text(data, size);
    if (config_model_from_json(&m, text, "config.json", &e) == 0) {
        check_model(&m);
        check_values(&m, text);
        check_json(&m);
        check_use(&m);
    } else {
        check_user_error(&e);
    }
    free(text);
    return 0;
}
