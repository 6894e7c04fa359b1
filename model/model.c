/* Creating a model: parameters, optimizer state, groups, and the memory plan. The passes themselves are in
 * forward.c and backward.c. */
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

#include "model/buffers.h"

tensor model_param(const struct model *m, int index) {
    if (index < 0)
        return tensor_none();
    const struct param *p = &m->params.list[index];
    char *at = (char *)m->values + (size_t)p->offset * dtype_bytes(m->dtypes.compute);
    return tensor_of(at, m->dtypes.compute, p->shape[0], p->shape[1], p->shape[2], 0, 0);
}

tensor model_gradient(const struct model *m, int index) {
    if (index < 0)
        return tensor_none();
    const struct param *p = &m->params.list[index];
    char *at = (char *)m->gradients + (size_t)p->offset * dtype_bytes(m->dtypes.gradient);
    return tensor_of(at, m->dtypes.gradient, p->shape[0], p->shape[1], p->shape[2], 0, 0);
}

/* Neighbours in the flat buffer that share a class become one group. */
static int build_groups(struct model *m, const struct model_options *o, struct error *e) {
    m->groups = calloc((size_t)m->params.count, sizeof *m->groups);
    if (!m->groups)
        return fail_run(e, "out of memory for the optimizer's groups");
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        int64_t end = i + 1 < m->params.count ? m->params.list[i + 1].offset : m->params.elements;
        if (i > 0 && p->class == m->params.list[i - 1].class) {
            m->groups[m->group_count - 1].end = end;
            continue;
        }
        m->groups[m->group_count++] = (struct param_group){
            .begin = p->offset,
            .end = end,
            .lr_scale = p->class == PARAM_MIX ? (float)o->mix_lr_scale : 1,
            .weight_decay = p->class == PARAM_MATRIX ? (float)o->weight_decay : 0,
        };
    }
    return 0;
}

/* Everything but device memory. */
static int describe(struct model *m, const struct model_config *config, const struct kernels *k,
                    struct device *dev, const struct pass_shape *shape, struct error *e) {
    *m = (struct model){.config = *config, .k = k, .dev = dev, .dtypes = k->dtypes(dev), .shape = *shape};
    if (params_create(&m->params, config, e) != 0)
        return -1;
    m->layers = calloc((size_t)config->num_hidden_layers, sizeof *m->layers);
    m->specs = calloc((size_t)config->num_hidden_layers, sizeof *m->specs);
    if (!m->layers || !m->specs)
        return fail_run(e, "out of memory describing %lld layers", (long long)config->num_hidden_layers);
    return 0;
}

static int measure(struct model *m, struct memory_plan *plan, struct error *e) {
    size_t n = (size_t)m->params.elements, master = dtype_bytes(m->dtypes.master);
    *plan = (struct memory_plan){.parameters = n * dtype_bytes(m->dtypes.compute)};
    if (m->shape.training) {
        plan->gradients = n * dtype_bytes(m->dtypes.gradient);
        plan->optimizer = n * master * (m->dtypes.master == m->dtypes.compute ? 2 : 3);
    }
    if (buffers_measure(m, &plan->activations, e) != 0)
        return -1;
    plan->workspace = m->workspace_bytes;
    return 0;
}

int model_memory(const struct model_config *config, const struct kernels *k, struct device *dev,
                 const struct pass_shape *shape, struct memory_plan *plan, struct error *e) {
    struct model m;
    int status = describe(&m, config, k, dev, shape, e);
    if (status == 0)
        status = measure(&m, plan, e);
    model_free(&m);
    return status;
}

static int check_memory(struct model *m, const struct memory_plan *p, struct error *e) {
    size_t need = p->parameters + p->gradients + p->optimizer + p->activations + p->workspace;
    size_t have = m->k->memory_available(m->dev);
    if (have == 0 || need <= have)
        return 0;
    return fail_user(
        e,
        "not enough memory: the run needs %.2f GB (parameters %.2f, gradients %.2f, optimizer %.2f, "
        "activations %.2f, workspace %.2f) and %.2f GB is free; lower train.micro_batch (now %lld)%s",
        need / 1e9, p->parameters / 1e9, p->gradients / 1e9, p->optimizer / 1e9, p->activations / 1e9,
        p->workspace / 1e9, have / 1e9, (long long)m->shape.batch,
        m->shape.training && m->shape.recompute != RECOMPUTE_FULL ? " or set system.recompute = full" : "");
}

static int allocate(struct model *m, const struct memory_plan *p, struct error *e) {
    const struct kernels *k = m->k;
    bool separate = m->dtypes.master != m->dtypes.compute;
    size_t n = (size_t)m->params.elements, master = dtype_bytes(m->dtypes.master);
    if (!(m->values = k->alloc(m->dev, p->parameters, e)) ||
        !(m->state = k->alloc(m->dev, sizeof *m->state, e)) ||
        !(m->activations = k->alloc(m->dev, p->activations, e)) ||
        !(m->workspace = k->alloc(m->dev, p->workspace, e)))
        return -1;
    m->masters = m->values;
    if (m->shape.training) {
        if (!(m->gradients = k->alloc(m->dev, p->gradients, e)) ||
            !(m->moments = k->alloc(m->dev, p->optimizer, e)))
            return -1;
        if (separate)
            m->masters = (char *)m->moments + 2 * n * master;
    }
    return 0;
}

int model_create(struct model *m, const struct model_config *config, const struct kernels *k,
                 struct device *dev, const struct model_options *options, struct error *e) {
    struct memory_plan plan;
    if (describe(m, config, k, dev, &options->shape, e) != 0 || build_groups(m, options, e) != 0 ||
        measure(m, &plan, e) != 0 || check_memory(m, &plan, e) != 0 || allocate(m, &plan, e) != 0) {
        model_free(m);
        return -1;
    }
    buffers_place(m, m->activations);
    k->set_workspace(dev, m->workspace, m->workspace_bytes);
    if (m->rope.data)
        k->rope_table(dev, m->rope, config->rope_theta);
    return 0;
}

void model_free(struct model *m) {
    if (!m->k)
        return;
    void *blocks[] = {m->values, m->gradients, m->moments, m->state, m->activations, m->workspace};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        m->k->release(m->dev, blocks[i]);
    params_free(&m->params);
    free(m->groups);
    free(m->layers);
    free(m->specs);
    *m = (struct model){0};
}

int model_initialize(struct model *m, uint64_t seed, struct error *e) {
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        float *values = malloc((size_t)p->count * sizeof *values);
        if (!values)
            return fail_run(e, "out of memory initialising %s", p->name);
        params_initial(p, &m->config, seed, values);
        model_set_param(m, i, values);
        free(values);
    }
    return 0;
}

static tensor master_of(const struct model *m, int index) {
    const struct param *p = &m->params.list[index];
    char *at = (char *)m->masters + (size_t)p->offset * dtype_bytes(m->dtypes.master);
    return tensor_of(at, m->dtypes.master, p->count, 0, 0, 0, 0);
}

void model_set_param(struct model *m, int index, const float *values) {
    m->k->upload(m->dev, model_param(m, index), values, DTYPE_F32);
    if (m->masters != m->values)
        m->k->upload(m->dev, master_of(m, index), values, DTYPE_F32);
}

void model_get_param(const struct model *m, int index, float *values) {
    if (m->masters != m->values)
        m->k->download(m->dev, master_of(m, index), values, DTYPE_F32);
    else
        m->k->download(m->dev, model_param(m, index), values, DTYPE_F32);
}

void model_update(struct model *m, double beta1, double beta2, double eps, double grad_clip) {
    const struct kernels *k = m->k;
    int64_t n = m->params.elements;
    size_t master = dtype_bytes(m->dtypes.master);
    bool separate = m->masters != m->values;
    tensor g = tensor_of(m->gradients, m->dtypes.gradient, n, 0, 0, 0, 0);
    tensor masters = tensor_of(m->masters, m->dtypes.master, n, 0, 0, 0, 0);
    tensor values = separate ? tensor_of(m->values, m->dtypes.compute, n, 0, 0, 0, 0) : tensor_none();
    tensor first = tensor_of(m->moments, m->dtypes.master, n, 0, 0, 0, 0);
    tensor second = tensor_of((char *)m->moments + (size_t)n * master, m->dtypes.master, n, 0, 0, 0, 0);
    struct adamw_hyper hyper = {beta1, beta2, eps};
    k->sumsq(m->dev, g, m->state);
    k->step_decide(m->dev, m->state, grad_clip);
    k->adamw(m->dev, &hyper, m->groups, m->group_count, masters, values, g, first, second, m->state);
}
