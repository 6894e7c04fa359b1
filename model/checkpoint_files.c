/* The checkpoint's files one by one: weights, optimizer state, trainer.json. */
#include "model/checkpoint_files.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/files.h"
#include "model/safetensors.h"

enum { MAX_JSON = 16 << 20, PIECE = 1 << 20 /* elements moved at a time */ };

/* ---- weights -------------------------------------------------------------------------------------- */

static void describe_param(struct safetensors_entry *s, struct param *p) {
    *s = (struct safetensors_entry){.name = p->name, .dtype = ST_F32, .ndim = p->ndim};
    memcpy(s->shape, p->shape, sizeof p->shape);
}

int weights_write(const char *path, struct model *m, struct error *e) {
    size_t largest = 0;
    struct safetensors_entry *entries = calloc((size_t)m->params.count, sizeof *entries);
    for (int i = 0; entries && i < m->params.count; i++) {
        size_t bytes = (size_t)m->params.list[i].count * sizeof(float);
        largest = bytes > largest ? bytes : largest;
        describe_param(&entries[i], &m->params.list[i]);
    }
    float *values = malloc(largest); /* before the file: once it is open, only the writer may fail */
    struct safetensors_writer *w =
        entries && values ? safetensors_create(path, entries, m->params.count, e) : NULL;
    int status = w ? 0 : -1;
    if (!entries || !values)
        fail_run(e, "out of memory saving %s", path);
    for (int i = 0; i < m->params.count && status == 0; i++) {
        model_get_param(m, i, values);
        status = safetensors_append(w, values, (size_t)m->params.list[i].count * sizeof(float), e);
    }
    free(values);
    free(entries);
    return status == 0 ? safetensors_finish(w, e) : -1;
}

static int check_weight(const struct safetensors_entry *s, const struct param *p, const char *path,
                        struct error *e) {
    char want[64];
    param_shape_text(p, want, sizeof want);
    if (!s)
        return fail_user(e, "%s: tensor %s is missing: this checkpoint is of another model", path, p->name);
    bool same = s->ndim == p->ndim;
    for (int i = 0; same && i < p->ndim; i++)
        same = s->shape[i] == p->shape[i];
    if (!same)
        return fail_user(
            e, "%s: tensor %s has another shape than the model's %s: this checkpoint is of another model",
            path, p->name, want);
    if (s->dtype != ST_F32)
        return fail_user(e, "%s: tensor %s is not fp32; convert the file", path, p->name);
    return 0;
}

int weights_read(const char *path, struct model *m, struct error *e) {
    struct safetensors file;
    if (safetensors_open(&file, path, e) != 0)
        return -1;
    int status = 0;
    if (file.count > m->params.count)
        status = fail_user(e, "%s: %d tensors where the model has %d: this checkpoint is of another model",
                           path, file.count, m->params.count);
    for (int i = 0; status == 0 && i < m->params.count; i++)
        status = check_weight(safetensors_find(&file, m->params.list[i].name), &m->params.list[i], path, e);
    for (int i = 0; status == 0 && i < m->params.count; i++)
        model_set_param(m, i, safetensors_find(&file, m->params.list[i].name)->data);
    safetensors_close(&file);
    return status;
}

/* ---- optimizer ------------------------------------------------------------------------------------ */

/* Moments in the order of the flat buffer, padding included, as fp32. */
static tensor moments_piece(struct model *m, int64_t begin, int64_t count) {
    char *at = (char *)m->moments + (size_t)begin * dtype_bytes(m->dtypes.master);
    return tensor_of(at, m->dtypes.master, count, 0, 0, 0, 0);
}

int optimizer_write(const char *path, struct model *m, struct error *e) {
    int64_t n = m->params.elements, range[2] = {0, n};
    struct safetensors_entry entries[] = {{.name = "range", .dtype = ST_I64, .ndim = 1, .shape = {2}},
                                          {.name = "exp_avg", .dtype = ST_F32, .ndim = 1, .shape = {n}},
                                          {.name = "exp_avg_sq", .dtype = ST_F32, .ndim = 1, .shape = {n}}};
    float *piece = malloc(PIECE * sizeof *piece);
    struct safetensors_writer *w = piece ? safetensors_create(path, entries, 3, e) : NULL;
    if (!w || safetensors_append(w, range, sizeof range, e) != 0) {
        free(piece);
        return piece ? -1 : fail_run(e, "out of memory saving %s", path);
    }
    for (int64_t begin = 0; begin < 2 * n; begin += PIECE) {
        int64_t count = begin + PIECE < 2 * n ? PIECE : 2 * n - begin;
        m->k->download(m->dev, moments_piece(m, begin, count), piece, DTYPE_F32);
        if (safetensors_append(w, piece, (size_t)count * sizeof *piece, e) != 0) {
            free(piece);
            return -1;
        }
    }
    free(piece);
    return safetensors_finish(w, e);
}

static int load_moments(struct model *m, const struct safetensors *file, const char *path, struct error *e) {
    int64_t n = m->params.elements;
    const struct safetensors_entry *range = safetensors_find(file, "range");
    const struct safetensors_entry *parts[2] = {safetensors_find(file, "exp_avg"),
                                                safetensors_find(file, "exp_avg_sq")};
    if (!range || range->dtype != ST_I64 || range->bytes != 16)
        return fail_user(e, "%s: no usable tensor 'range': not an optimizer file of this program", path);
    int64_t begin_end[2];
    memcpy(begin_end, range->data, sizeof begin_end);
    for (int i = 0; i < 2; i++)
        if (!parts[i] || parts[i]->dtype != ST_F32 || parts[i]->bytes != (size_t)n * 4 || begin_end[0] != 0 ||
            begin_end[1] != n)
            return fail_user(e, "%s: does not hold the %lld moments of this model", path, (long long)n);
    for (int i = 0; i < 2; i++)
        m->k->upload(m->dev, moments_piece(m, i * n, n), parts[i]->data, DTYPE_F32);
    return 0;
}

int optimizer_read(const char *path, struct model *m, struct error *e) {
    struct safetensors file;
    if (safetensors_open(&file, path, e) != 0)
        return -1;
    int status = load_moments(m, &file, path, e);
    safetensors_close(&file);
    return status;
}

/* ---- trainer.json --------------------------------------------------------------------------------- */

/* An object being written; whole only if every member found memory. */
struct draft_object {
    cJSON *object;
    bool whole;
};

static void add_setting(void *context, const char *key, const char *value) {
    struct draft_object *o = context;
    o->whole &= cJSON_AddStringToObject(o->object, key, value) != NULL;
}

/* 64-bit counts and exact doubles go through text: cJSON prints numbers with 15 digits first. */
static void add_text(struct draft_object *o, const char *key, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void add_text(struct draft_object *o, const char *key, const char *format, ...) {
    char text[64];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    o->whole &= cJSON_AddRawToObject(o->object, key, text) != NULL;
}

int progress_write(const char *path, const struct progress *p, const struct config *c, struct error *e) {
    struct draft_object root = {cJSON_CreateObject(), true};
    add_text(&root, "format_version", "%d", 1);
    add_text(&root, "step", "%" PRId64, p->step);
    add_text(&root, "tokens", "%" PRId64, p->tokens);
    add_text(&root, "sequences", "%" PRId64, p->sequences);
    add_text(&root, "updates", "%" PRId64, p->updates);
    add_text(&root, "skips_run", "%d", p->skips_run);
    add_text(&root, "seconds", "%.17g", p->seconds);
    add_text(&root, "best_step", "%" PRId64, p->best_step);
    if (isfinite(p->best_val_loss))
        add_text(&root, "best_val_loss", "%.17g", p->best_val_loss);
    else
        add_text(&root, "best_val_loss", "null");
    add_setting(&root, "train_fingerprint", p->train_fingerprint);
    add_setting(&root, "val_fingerprint", p->val_fingerprint);
    struct draft_object settings = {cJSON_AddObjectToObject(root.object, "config"), true};
    config_visit(c, add_setting, &settings);
    char *text = root.whole && settings.whole ? cJSON_Print(root.object) : NULL;
    cJSON_Delete(root.object);
    if (!text)
        return fail_run(e, "out of memory saving %s", path);
    int status = files_write_synced(path, text, strlen(text), e);
    free(text);
    return status;
}

static cJSON *parse(const char *path, struct error *e) {
    char *text;
    if (files_read_all(path, MAX_JSON, &text, NULL, e) != 0)
        return NULL;
    cJSON *root = cJSON_Parse(text);
    free(text);
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        fail_user(e, "%s: not a JSON object: the file is damaged", path);
        return NULL;
    }
    return root;
}

/* A whole number that a double holds exactly, or -1. */
static int64_t count_of(const cJSON *root, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, key);
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < 9007199254740992.0) ||
        item->valuedouble != floor(item->valuedouble))
        return -1;
    return (int64_t)item->valuedouble;
}

static void text_of(const cJSON *root, const char *key, char *out, size_t bytes) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(root, key));
    snprintf(out, bytes, "%s", text ? text : "");
}

int progress_read(const char *path, struct progress *p, struct error *e) {
    cJSON *root = parse(path, e);
    if (!root)
        return -1;
    const cJSON *best = cJSON_GetObjectItemCaseSensitive(root, "best_val_loss");
    const cJSON *seconds = cJSON_GetObjectItemCaseSensitive(root, "seconds");
    int64_t skips_run = count_of(root, "skips_run");
    *p = (struct progress){
        .step = count_of(root, "step"),
        .tokens = count_of(root, "tokens"),
        .sequences = count_of(root, "sequences"),
        .updates = count_of(root, "updates"),
        .skips_run = skips_run > INT32_MAX ? -1 : (int32_t)skips_run,
        .best_step = count_of(root, "best_step"),
        .best_val_loss = cJSON_IsNumber(best) ? best->valuedouble : (double)NAN,
        .seconds = cJSON_IsNumber(seconds) && isfinite(seconds->valuedouble) ? seconds->valuedouble : 0,
    };
    text_of(root, "train_fingerprint", p->train_fingerprint, sizeof p->train_fingerprint);
    text_of(root, "val_fingerprint", p->val_fingerprint, sizeof p->val_fingerprint);
    int64_t version = count_of(root, "format_version");
    cJSON_Delete(root);
    if (version != 1)
        return fail_user(e, "%s: format version %lld, and this program reads version 1", path,
                         (long long)version);
    if (p->step < 0 || p->tokens < 0 || p->sequences < 0 || p->updates < 0 || p->skips_run < 0)
        return fail_user(e, "%s: step, tokens, sequences, updates or skips_run is missing or not a count",
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
