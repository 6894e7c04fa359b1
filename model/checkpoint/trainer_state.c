#include "model/checkpoint/trainer_state.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/json_object.h"

enum { MAX_JSON = 16 << 20 }; /* bytes */

/* The key of best_value, by enum best_by. */
static const char *const best_keys[] = {[BEST_BY_LOSS] = "best_val_loss",
                                        [BEST_BY_ACCURACY] = "best_val_accuracy",
                                        [BEST_BY_EXACT] = "best_val_exact"};

/* ---- writing ---- */

/* Only where there is one: most runs have none. */
static void add_position(struct json_object *o, const struct trainer_state *p) {
    char text[32];
    if (p->data_position_count == 0)
        return;
    cJSON *array = cJSON_AddArrayToObject(o->object, "data_position");
    for (int i = 0; i < p->data_position_count; i++) {
        snprintf(text, sizeof text, "%" PRId64, p->data_position[i]);
        json_add_item(o, array, cJSON_CreateRaw(text));
    }
}

int trainer_state_write(const char *path, const struct trainer_state *p, const struct config *c,
                        struct error *e) {
    struct json_object root = {cJSON_CreateObject(), true};
    json_add_number(&root, "format_version", "%d", 1);
    json_add_number(&root, "step", "%" PRId64, p->step);
    json_add_number(&root, "tokens", "%" PRId64, p->tokens);
    json_add_number(&root, "sequences", "%" PRId64, p->sequences);
    add_position(&root, p);
    json_add_number(&root, "updates", "%" PRId64, p->history.updates);
    json_add_number(&root, "skips_run", "%d", p->history.skips_run);
    json_add_number(&root, "norm_count", "%" PRId64, p->history.norm_count);
    json_add_number(&root, "norm_mean", "%.17g", p->history.norm_mean);
    json_add_number(&root, "norm_variance", "%.17g", p->history.norm_variance);
    json_add_number(&root, "seconds", "%.17g", p->seconds);
    json_add_number(&root, "best_step", "%" PRId64, p->best_step);
    if (isfinite(p->best_value))
        json_add_number(&root, best_keys[p->best_by], "%.17g", p->best_value);
    else
        json_add_number(&root, best_keys[p->best_by], "null");
    json_add_number(&root, "evals_since_best", "%" PRId64, p->evals_since_best);
    json_add_text(&root, "train_fingerprint", p->train_fingerprint);
    json_add_text(&root, "val_fingerprint", p->val_fingerprint);
    struct json_object settings = {cJSON_AddObjectToObject(root.object, "config"), true};
    config_visit(c, json_add_setting, &settings);
    char *text = root.complete && settings.complete ? cJSON_Print(root.object) : NULL;
    cJSON_Delete(root.object);
    if (!text)
        return fail_run(e, "out of memory saving %s", path);
    int status = files_write_synced(path, text, strlen(text), e);
    free(text);
    return status;
}

/* ---- reading ---- */

static cJSON *parse(const char *path, struct error *e) {
    char *text;
    size_t length;
    if (files_read_all(path, MAX_JSON, &text, &length, e) != 0)
        return NULL;
    cJSON *root = cJSON_ParseWithLengthOpts(text, length + 1, NULL,
                                            true); /* the NUL included: nothing may follow the object */
    free(text);
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        fail_user(e, "%s: not a JSON object: the file is damaged", path);
        return NULL;
    }
    return root;
}

/* A whole number that a double holds exactly, or -1. */
static int64_t count_in(const cJSON *item) {
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < 9007199254740992.0) ||
        item->valuedouble != floor(item->valuedouble))
        return -1;
    return (int64_t)item->valuedouble;
}

static int64_t count_of(const cJSON *root, const char *key) {
    return count_in(cJSON_GetObjectItemCaseSensitive(root, key));
}

/* JSON allows 1e999, which is infinite as a double. */
static bool is_finite(const cJSON *item) {
    return cJSON_IsNumber(item) && isfinite(item->valuedouble);
}

/* 0 if it is missing, not positive or not finite. */
static double number_of(const cJSON *root, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, key);
    return is_finite(item) && item->valuedouble > 0 ? item->valuedouble : 0;
}

static void text_of(const cJSON *root, const char *key, char *out, size_t bytes) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(root, key));
    snprintf(out, bytes, "%s", text ? text : "");
}

/* 0, or -1: not a list of counts. A missing one is empty. */
static int read_position(const cJSON *root, struct trainer_state *p) {
    const cJSON *item, *array = cJSON_GetObjectItemCaseSensitive(root, "data_position");
    cJSON_ArrayForEach(item, array) {
        if (p->data_position_count == MAX_DATA_POSITION || count_in(item) < 0)
            return -1;
        p->data_position[p->data_position_count++] = count_in(item);
    }
    return 0;
}

static void read_best(const cJSON *root, struct trainer_state *p) {
    p->best_by = BEST_BY_LOSS;
    p->best_value = (double)NAN;
    for (int by = BEST_BY_EXACT; by >= BEST_BY_LOSS; by--) {
        const cJSON *best = cJSON_GetObjectItemCaseSensitive(root, best_keys[by]);
        if (!best)
            continue;
        p->best_by = (enum best_by)by;
        p->best_value = is_finite(best) ? best->valuedouble : (double)NAN;
    }
    p->best_step = count_of(root, "best_step");
    int64_t evals = count_of(root, "evals_since_best");
    p->evals_since_best = evals > 0 ? evals : 0;
}

int trainer_state_read(const char *path, struct trainer_state *p, struct error *e) {
    cJSON *root = parse(path, e);
    if (!root)
        return -1;
    int64_t skips_run = count_of(root, "skips_run");
    *p = (struct trainer_state){
        .step = count_of(root, "step"),
        .tokens = count_of(root, "tokens"),
        .sequences = count_of(root, "sequences"),
        .history = {.updates = count_of(root, "updates"),
                    .skips_run = skips_run > INT32_MAX ? -1 : (int32_t)skips_run,
                    .norm_count = count_of(root, "norm_count"),
                    .norm_mean = number_of(root, "norm_mean"),
                    .norm_variance = number_of(root, "norm_variance")},
        .seconds = number_of(root, "seconds"),
    };
    read_best(root, p);
    int position_status = read_position(root, p);
    text_of(root, "train_fingerprint", p->train_fingerprint, sizeof p->train_fingerprint);
    text_of(root, "val_fingerprint", p->val_fingerprint, sizeof p->val_fingerprint);
    int64_t version = count_of(root, "format_version");
    cJSON_Delete(root);
    if (version != 1)
        return fail_user(e, "%s: format version %lld; this program reads version 1 only", path,
                         (long long)version);
    if (position_status != 0)
        return fail_user(e, "%s: data_position is not a list of at most %d counts", path, MAX_DATA_POSITION);
    if (p->step < 0 || p->tokens < 0 || p->sequences < 0 || p->history.updates < 0 ||
        p->history.skips_run < 0 || p->history.norm_count < 0)
        return fail_user(
            e, "%s: step, tokens, sequences, updates, skips_run or norm_count is missing or not a count",
            path);
    return 0;
}

int settings_visit(const char *path, setting_visitor *visit, void *context, struct error *e) {
    cJSON *root = parse(path, e);
    if (!root)
        return -1;
    const cJSON *item, *settings = cJSON_GetObjectItemCaseSensitive(root, "config");
    cJSON_ArrayForEach(item, settings) {
        if (item->string && cJSON_IsString(item))
            visit(context, item->string, item->valuestring);
    }
    cJSON_Delete(root);
    return 0;
}
