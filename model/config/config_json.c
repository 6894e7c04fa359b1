/* A checkpoint's config.json, read and written. What is read has to pass every check that an INI file has to
 * pass. */
#include "model/config/config_internal.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- writing ---- */

/* config.json leaves out how the model was initialised, and the size that its keys were derived from. */
static bool is_in_json(const struct config_row *row) {
    return !strcmp(row->section, "model") && strncmp(row->name, "init_", 5) != 0 &&
           strcmp(row->name, "size") != 0;
}

static cJSON *layer_types_to_json(const struct model_config *m) {
    cJSON *list = cJSON_CreateArray();
    for (int64_t layer = 0; list && layer < m->num_hidden_layers; layer++)
        if (!cJSON_AddItemToArray(list, cJSON_CreateString(layer_type_name(m->layer_types[layer])))) {
            cJSON_Delete(list);
            return NULL;
        }
    return list;
}

static cJSON *row_to_json(const struct config *c, const struct config_row *row) {
    char text[MAX_TEXT];
    if (row->kind == KIND_PATTERN)
        return layer_types_to_json(&c->model);
    value_text(c, row, text);
    /* Numbers go in as text: cJSON rounds doubles to 15 digits when that is nearly the same. */
    return row->kind == KIND_ENUM ? cJSON_CreateString(text) : cJSON_CreateRaw(text);
}

static const char *json_name(const struct config_row *row) {
    return row->kind == KIND_PATTERN ? "layer_types" : row->name;
}

char *config_model_to_json(const struct model_config *m) {
    struct config *c = calloc(1, sizeof *c);
    cJSON *root = cJSON_CreateObject();
    bool ok = c && root && cJSON_AddStringToObject(root, "model_type", "iha");
    if (ok)
        c->model = *m;
    for (int i = 0; i < config_row_count && ok; i++) {
        if (!is_in_json(&config_rows[i]))
            continue;
        cJSON *item = row_to_json(c, &config_rows[i]);
        ok = cJSON_AddItemToObject(root, json_name(&config_rows[i]), item);
        if (!ok)
            cJSON_Delete(item);
    }
    char *printed = ok ? cJSON_Print(root) : NULL;
    size_t length = printed ? strlen(printed) : 0;
    char *text = printed ? malloc(length + 2) : NULL;
    if (text) {
        memcpy(text, printed, length);
        memcpy(text + length, "\n", 2);
    }
    cJSON_free(printed);
    cJSON_Delete(root);
    free(c);
    return text;
}

/* ---- reading ---- */

static int wrong_type(const struct draft *d, const char *name, const char *wanted) {
    return fail_at(d, NULL, "\"%s\" is not %s", name, wanted);
}

static int layer_types_from_json(struct draft *d, const cJSON *list) {
    if (!cJSON_IsArray(list))
        return wrong_type(d, "layer_types", "a list of names");
    d->pattern_count = 0;
    for (const cJSON *item = list->child; item; item = item->next) {
        int type = 0;
        if (!cJSON_IsString(item))
            return wrong_type(d, "layer_types", "a list of names");
        while (config_layer_type_names[type] && strcmp(config_layer_type_names[type], item->valuestring))
            type++;
        if (!config_layer_type_names[type]) {
            char quote[MAX_QUOTE], hint[96];
            did_you_mean(item->valuestring, config_layer_type_names, hint);
            return fail_at(d, NULL, "layer_types[%d]: unknown value '%s'%s", d->pattern_count,
                           quotable(item->valuestring, quote),
                           *hint ? hint : "; docs/configuration.md lists the types at layer_pattern");
        }
        if (d->pattern_count == MAX_LAYERS)
            return fail_at(d, NULL, "layer_types names more than %d layers", MAX_LAYERS);
        d->pattern[d->pattern_count++] = (enum layer_type)type;
    }
    return 0;
}

static int number_from_json(struct draft *d, const struct config_row *row, const cJSON *item) {
    char why[MAX_WHY], text[32];
    if (!cJSON_IsNumber(item))
        return wrong_type(d, row->name, "a number");
    double x = item->valuedouble;
    if (check_range(row, x, why))
        return fail_at(d, NULL, "\"%s\": %s", row->name, why);
    if (row->kind == KIND_REAL) {
        memcpy(row_address(d->config, row), &x, sizeof x);
        return 0;
    }
    if ((double)(int64_t)x != x) { /* within the row's bounds, so the cast is defined */
        real_text(x, text);
        return fail_at(d, NULL, "\"%s\": %s is not a whole number", row->name, text);
    }
    memcpy(row_address(d->config, row), &(int64_t){(int64_t)x}, sizeof(int64_t));
    return 0;
}

static int value_from_json(struct draft *d, const struct config_row *row, const cJSON *item) {
    char why[MAX_WHY];
    switch (row->kind) {
    case KIND_PATTERN:
        return layer_types_from_json(d, item);
    case KIND_INTEGER:
    case KIND_REAL:
        return number_from_json(d, row, item);
    case KIND_BOOL:
        if (!cJSON_IsBool(item))
            return wrong_type(d, row->name, "true or false");
        *(bool *)row_address(d->config, row) = cJSON_IsTrue(item);
        return 0;
    case KIND_ENUM:
    case KIND_TEXT:
        break;
    }
    if (!cJSON_IsString(item))
        return wrong_type(d, row->name, "a string");
    if (set_value(d, row, item->valuestring, why))
        return fail_at(d, NULL, "\"%s\": %s", row->name, why);
    return 0;
}

/* Read every [model] key by its JSON name; other names are ignored. */
static int keys_from_json(struct draft *d, const cJSON *root) {
    for (int i = 0; i < config_row_count; i++) {
        const struct config_row *row = &config_rows[i];
        if (!is_in_json(row))
            continue;
        for (const cJSON *item = root->child; item; item = item->next) {
            if (strcmp(item->string, json_name(row)) || cJSON_IsNull(item))
                continue;
            if (d->origin[i])
                return fail_at(d, NULL, "\"%s\" is given twice", item->string);
            d->origin[i] = WITHOUT_LINE;
            if (value_from_json(d, row, item))
                return -1;
        }
        /* max_position_embeddings defaults to seq_len, which a model alone does not have. */
        if (!d->origin[i] &&
            (row_is_required(row) || row->offset == offsetof(struct config, model.max_position_embeddings)))
            if (row->kind != KIND_PATTERN)
                return fail_at(d, NULL, "missing key \"%s\"", row->name);
    }
    return 0;
}

static int model_from_json(struct draft *d, const cJSON *root) {
    const struct model_config *m = &d->config->model;
    char quote[MAX_QUOTE];
    if (!cJSON_IsObject(root))
        return fail_at(d, NULL, "not a JSON object; the file is damaged, or not a config.json");
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(root, "model_type");
    if (!cJSON_IsString(type))
        return fail_at(d, NULL, "no \"model_type\"; a model of this program has \"iha\"");
    if (strcmp(type->valuestring, "iha"))
        return fail_at(d, NULL, "model_type is '%s'; only 'iha' can be read",
                       quotable(type->valuestring, quote));
    if (keys_from_json(d, root))
        return -1;
    if (d->origin[find_row("model", "layer_pattern") - config_rows] &&
        d->pattern_count != m->num_hidden_layers)
        return fail_at(d, NULL,
                       "layer_types names %d layers, num_hidden_layers is %" PRId64 "; make them equal",
                       d->pattern_count, m->num_hidden_layers);
    return finish_model(d, m->max_position_embeddings);
}

int config_model_from_json(struct model_config *m, const char *json, const char *where, struct error *e) {
    struct config *c = malloc(sizeof *c);
    if (!c)
        return fail_run(e, "%s: out of memory", where);
    config_defaults(c);
    struct draft d = {.config = c, .error = e, .file = where};
    const char *end = NULL;
    cJSON *root = cJSON_ParseWithOpts(json, &end, true);
    int status = -1;
    if (root) {
        status = model_from_json(&d, root);
    } else {
        int line = 1;
        for (const char *p = json; end && p < end; p++)
            line += *p == '\n';
        fail_user(e, "%s:%d: not valid JSON: the file is damaged", where, line);
    }
    if (!status)
        *m = c->model;
    cJSON_Delete(root);
    free(c);
    return status;
}
