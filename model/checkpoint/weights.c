#include "model/checkpoint/weights.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/rounding.h"
#include "model/checkpoint/safetensors.h"
#include "model/state_dict.h"

static void describe_param(struct safetensors_entry *s, struct param *p) {
    *s = (struct safetensors_entry){.name = p->name, .dtype = ST_F32, .ndim = p->ndim};
    memcpy(s->shape, p->shape, sizeof p->shape);
}

/* One parameter, from the model. */
static int append_param(struct safetensors_writer *w, struct model *m, int i, struct error *e) {
    const struct param *p = &m->params.list[i];
    size_t bytes = (size_t)p->count * sizeof(float);
    float *values = malloc(bytes);
    if (!values) {
        safetensors_abandon(w);
        return fail_run(e, "out of memory saving %s (%zu bytes)", p->name, bytes);
    }
    model_get_param(m, i, values);
    int status = safetensors_append(w, values, bytes, e);
    free(values);
    return status;
}

static int append_weights(struct safetensors_writer *w, struct model *m, const float *weights,
                          struct error *e) {
    int status = 0;
    for (int i = 0; status == 0 && i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        status = weights
                     ? safetensors_append(w, weights + p->packed_offset, (size_t)p->count * sizeof(float), e)
                     : append_param(w, m, i, e);
    }
    return status;
}

int weights_write(const char *path, struct model *m, const float *weights, struct error *e) {
    struct safetensors_entry *entries = calloc((size_t)m->params.count, sizeof *entries);
    if (!entries)
        return fail_run(e, "out of memory saving %s", path);
    for (int i = 0; i < m->params.count; i++)
        describe_param(&entries[i], &m->params.list[i]);
    struct safetensors_writer *w = safetensors_create(path, entries, m->params.count, e);
    free(entries);
    if (!w || append_weights(w, m, weights, e) != 0)
        return -1;
    return safetensors_finish(w, e);
}

static int check_weight(const struct safetensors_entry *s, const struct param *p, const char *path,
                        struct error *e) {
    char expected[64];
    param_shape_text(p, expected, sizeof expected);
    if (!s)
        return fail_user(e, "%s: tensor %s is missing: this checkpoint is of another model", path, p->name);
    bool same = s->ndim == p->ndim;
    for (int i = 0; same && i < p->ndim; i++)
        same = s->shape[i] == p->shape[i];
    if (!same)
        return fail_user(
            e, "%s: the shape of tensor %s is not the model's %s: this checkpoint is of another model", path,
            p->name, expected);
    if (s->dtype != ST_F32 && s->dtype != ST_BF16)
        return fail_user(e, "%s: tensor %s is neither fp32 nor bf16; convert the file", path, p->name);
    return 0;
}

/* Values [rows, columns] of a parameter of a token each from those of `old_rows` tokens. */
static void resize_rows(float *values, const float *old, int64_t rows, int64_t old_rows, int64_t columns) {
    int64_t kept = rows < old_rows ? rows : old_rows;
    memcpy(values, old, (size_t)(kept * columns) * sizeof *values);
    for (int64_t c = 0; c < columns && rows > kept; c++) {
        double sum = 0;
        for (int64_t row = 0; row < old_rows; row++)
            sum += (double)old[row * columns + c];
        for (int64_t row = kept; row < rows; row++)
            values[row * columns + c] = (float)(sum / (double)old_rows);
    }
}

/* Set parameter i from the values that `old` describes. */
static int set_param(struct model *m, int i, const struct param *old, const float *values, int64_t updates,
                     struct error *e) {
    const struct param *p = &m->params.list[i];
    if (p->count == old->count) {
        model_set_param(m, i, values, updates);
        return 0;
    }
    float *resized = malloc((size_t)p->count * sizeof *resized);
    if (!resized)
        return fail_run(e, "out of memory resizing %s", p->name);
    resize_rows(resized, values, p->shape[0], old->shape[0], p->shape[1]);
    model_set_param(m, i, resized, updates);
    free(resized);
    return 0;
}

/* The parameter `name` of the model, at or after index i, where it is if the model has the same parameters. */
static int find_param(const struct model *m, const char *name, int i) {
    while (i < m->params.count && strcmp(m->params.list[i].name, name) != 0)
        i++;
    return i < m->params.count ? i : -1;
}

/* The same from a tensor of the file, which is fp32, or bf16 if another program has saved it. */
static int set_from_file(struct model *m, int i, const struct param *old, const struct safetensors_entry *s,
                         int64_t updates, struct error *e) {
    if (s->dtype == ST_F32)
        return set_param(m, i, old, s->data, updates, e);
    float *values = malloc((size_t)old->count * sizeof *values);
    if (!values)
        return fail_run(e, "out of memory reading %s", old->name);
    for (int64_t j = 0; j < old->count; j++)
        values[j] = from_bf16(((const uint16_t *)s->data)[j]);
    int status = set_param(m, i, old, values, updates, e);
    free(values);
    return status;
}

/* layout: the parameters of the file, in the order of the model's, which may have others between them. */
static int read_weights(const char *path, struct model *m, const struct params *layout, int64_t updates,
                        struct error *e) {
    struct safetensors file;
    if (safetensors_open(&file, path, e) != 0)
        return -1;
    int status = 0;
    if (file.count > layout->count)
        status = fail_user(e, "%s: %d tensors where the model has %d: this checkpoint is of another model",
                           path, file.count, layout->count);
    for (int i = 0; status == 0 && i < layout->count; i++)
        status = check_weight(safetensors_find(&file, layout->list[i].name), &layout->list[i], path, e);
    for (int i = 0, at = 0; status == 0 && i < layout->count; i++) {
        const struct param *p = &layout->list[i];
        int found = find_param(m, p->name, at);
        if (found < 0) {
            status = fail_user(e, "%s: this model has no tensor %s: the checkpoint is of another model", path,
                               p->name);
        } else {
            status = set_from_file(m, found, p, safetensors_find(&file, p->name), updates, e);
            at = found;
        }
    }
    safetensors_close(&file);
    return status;
}

int weights_read(const char *path, struct model *m, int64_t updates, struct error *e) {
    return read_weights(path, m, &m->params, updates, e);
}

int weights_read_from(const char *path, struct model *m, const struct model_config *then, struct error *e) {
    struct params old;
    if (params_create(&old, then, 1, e) != 0)
        return -1;
    int status = read_weights(path, m, &old, 0, e);
    params_free(&old);
    return status;
}
