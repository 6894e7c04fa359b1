#include "model/checkpoint/weights.h"

#include <stdlib.h>
#include <string.h>

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
    if (s->dtype != ST_F32)
        return fail_user(e, "%s: tensor %s is not fp32; convert the file", path, p->name);
    return 0;
}

int weights_read(const char *path, struct model *m, int64_t updates, struct error *e) {
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
        model_set_param(m, i, safetensors_find(&file, m->params.list[i].name)->data, updates);
    safetensors_close(&file);
    return status;
}
