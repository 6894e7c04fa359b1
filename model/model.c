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
    tensor flat = flat_range(m->values, m->dtypes.compute, p->offset, p->count);
    return tensor_of(flat.data, flat.dtype, p->shape[0], p->shape[1], p->shape[2], 0, 0);
}

tensor model_gradient(const struct model *m, int index) {
    if (index < 0)
        return tensor_none();
    const struct param *p = &m->params.list[index];
    int64_t offset = gradient_offset(&m->partition, p->unit, p->offset);
    tensor flat = flat_range(m->gradients, m->dtypes.gradient, offset, p->count);
    return tensor_of(flat.data, flat.dtype, p->shape[0], p->shape[1], p->shape[2], 0, 0);
}

/* A view of the classifier's table and of the padded rows that follow it. */
static tensor with_padded_rows(const struct model *m, tensor table) {
    return tensor_of(table.data, table.dtype, m->params.list[m->params.lm_head].padded_rows, table.shape[1],
                     0, 0, 0);
}

tensor model_classifier(const struct model *m) {
    return with_padded_rows(m, model_param(m, m->params.lm_head));
}

tensor model_classifier_gradient(const struct model *m) {
    return with_padded_rows(m, model_gradient(m, m->params.lm_head));
}

struct classifier_spec model_classifier_spec(const struct model *m, int64_t rows) {
    return (struct classifier_spec){rows, m->config.hidden_size, m->config.vocab_size,
                                    m->params.list[m->params.lm_head].padded_rows};
}

/* up [F,C], of which gate is the continuation. */
static tensor with_gate(tensor up) {
    return tensor_of(up.data, up.dtype, 2 * up.shape[0], up.shape[1], 0, 0, 0);
}

tensor model_up_and_gate(const struct model *m, int layer) {
    return with_gate(model_param(m, m->params.layers[layer].up));
}

tensor model_up_and_gate_gradient(const struct model *m, int layer) {
    return with_gate(model_gradient(m, m->params.layers[layer].up));
}

/* Append a group, or extend the last one if it differs in nothing but its range. */
static void add_group(struct model *m, struct param_group g) {
    struct param_group *last = m->group_count > 0 ? &m->groups[m->group_count - 1] : NULL;
    if (last && last->lr_scale == g.lr_scale && last->weight_decay == g.weight_decay &&
        last->muon_scale == g.muon_scale && last->rounding_index - last->begin == g.rounding_index - g.begin)
        last->end = g.end;
    else
        m->groups[m->group_count++] = g;
}

/* A group for each of a parameter's matrices, as far as their factors differ; g: of the whole parameter. */
static void add_matrix_groups(struct model *m, int param, struct param_group g) {
    const struct muon_matrices *all = &m->muon;
    const int64_t end = g.end, to_index = g.rounding_index - g.begin;
    for (int i = 0; i < all->count; i++) {
        if (all->list[i].param != param)
            continue;
        bool last = i + 1 == all->count || all->list[i + 1].param != param;
        g.begin = all->list[i].offset;
        g.rounding_index = g.begin + to_index;
        g.end = last ? end : all->list[i + 1].offset;
        g.muon_scale = muon_scale(&all->list[i]);
        add_group(m, g);
    }
}

/* Groups cover the flat buffer: the gap after a tensor is of its group. */
static int build_groups(struct model *m, const struct model_options *o, struct error *e) {
    m->groups = calloc((size_t)(m->params.count + m->muon.count), sizeof *m->groups);
    if (!m->groups)
        return fail_run(e, "out of memory for the optimizer's groups");
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        struct param_group g = {
            .begin = p->offset,
            .end = i + 1 < m->params.count ? m->params.list[i + 1].offset : m->params.elements,
            .rounding_index = p->rounding_index,
            .lr_scale = p->class == PARAM_MIX ? (float)o->mix_lr_scale : 1,
            .weight_decay = p->class == PARAM_MATRIX ? (float)o->weight_decay : 0,
        };
        if (m->shape.muon && muon_updates(p)) {
            g.lr_scale = (float)o->muon_lr_scale;
            add_matrix_groups(m, i, g);
        } else {
            add_group(m, g);
        }
    }
    return 0;
}

/* All of *m that takes no device memory. */
static int create_host_side(struct model *m, const struct model_config *config, const struct kernels *k,
                            struct device *dev, const struct model_options *o, int rank, int ranks,
                            struct error *e) {
    *m = (struct model){.config = *config, .k = k, .dev = dev, .dtypes = k->dtypes(dev), .shape = o->shape};
    m->scores = o->scores;
    m->comm = o->comm ? o->comm : comm_single();
    m->reduce_dtype = o->reduce_dtype == DTYPE_BF16 ? DTYPE_BF16 : m->dtypes.gradient;
    if (params_create(&m->params, config, ranks, e) != 0 ||
        (m->shape.muon && muon_list(&m->muon, &m->params, ranks, e) != 0) || build_groups(m, o, e) != 0 ||
        partition_create(&m->partition, &m->params, m->groups, m->group_count, rank, ranks, o->zero_stage,
                         k->message_elements, e) != 0)
        return -1;
    m->layers = calloc((size_t)config->num_hidden_layers, sizeof *m->layers);
    m->specs = calloc((size_t)config->num_hidden_layers, sizeof *m->specs);
    m->reduce_events = calloc((size_t)m->partition.bucket_count, sizeof *m->reduce_events);
    m->gather_events = calloc((size_t)m->partition.bucket_count, sizeof *m->gather_events);
    if (m->shape.segments)
        m->host_segments = calloc((size_t)(3 * m->shape.batch * m->shape.tokens), sizeof *m->host_segments);
    if (m->shape.segments && !m->host_segments)
        return fail_run(e, "out of memory for the segments of a batch");
    if (!m->layers || !m->specs || !m->reduce_events || !m->gather_events)
        return fail_run(e, "out of memory for the descriptions of %lld layers",
                        (long long)config->num_hidden_layers);
    return 0;
}

struct pass_shape pass_shape_of(const struct config *c, bool training) {
    return (struct pass_shape){.batch = c->train.micro_batch,
                               .tokens = c->train.seq_len,
                               .recompute = c->system.recompute,
                               .training = training,
                               .segments = c->data.segments == SEGMENTS_DOCUMENTS,
                               .restart_positions = c->data.segment_positions == POSITIONS_RESTART,
                               .muon = training && c->train.optimizer == OPTIMIZER_MUON};
}

static int plan_memory(struct model *m, struct memory_plan *plan, struct error *e) {
    size_t master = dtype_bytes(m->dtypes.master);
    *plan = (struct memory_plan){.parameters = (size_t)m->params.elements * dtype_bytes(m->dtypes.compute)};
    if (m->shape.training) {
        plan->gradients = (size_t)m->partition.gradient_elements * dtype_bytes(m->dtypes.gradient);
        int64_t first = m->partition.moment_elements,
                masters = m->dtypes.master == m->dtypes.compute ? 0 : first;
        plan->optimizer = (size_t)(first + m->partition.second_elements + masters) * master;
    }
    if (buffers_plan(m, &plan->activations, e) != 0)
        return -1;
    plan->workspace = m->workspace_bytes;
    if (m->shape.training && m->partition.ranks > 1)
        plan->messages = m->k->staging_bytes(m->dev, m->partition.bucket_elements, m->partition.ranks,
                                             m->dtypes.gradient, m->reduce_dtype);
    int64_t moments = 2 * m->params.num_params - muon_elements(&m->muon);
    plan->snapshot = (size_t)(m->params.num_params + moments / m->partition.ranks) * sizeof(float);
    return 0;
}

size_t memory_total(const struct memory_plan *p) {
    return p->parameters + p->gradients + p->optimizer + p->activations + p->workspace + p->messages;
}

int model_memory(const struct model_config *config, const struct kernels *k, struct device *dev,
                 const struct pass_shape *shape, int ranks, int zero_stage, enum dtype reduce,
                 struct memory_plan *plan, struct error *e) {
    struct model m;
    struct model_options options = {.shape = *shape, .zero_stage = zero_stage, .reduce_dtype = reduce};
    int status = create_host_side(&m, config, k, dev, &options, 0, ranks, e);
    if (status == 0)
        status = plan_memory(&m, plan, e);
    model_free(&m);
    return status;
}

/* What to change when it does not fit. A smaller micro_batch helps only where the model itself fits. */
static const char *memory_advice(const struct model *m, const struct memory_plan *p, size_t have) {
    if (p->parameters + p->gradients + p->optimizer + p->workspace > have)
        return m->shape.training
                   ? "the model alone does not fit: use more ranks with system.zero_stage = 2, or "
                     "make it smaller"
                   : "the model alone does not fit: make it smaller";
    return m->shape.training && m->shape.recompute != RECOMPUTE_FULL
               ? "lower train.micro_batch or set system.recompute = full"
               : "lower train.micro_batch";
}

static int check_memory(struct model *m, const struct memory_plan *p, struct error *e) {
    size_t need = memory_total(p), have = m->k->memory_available(m->dev);
    if (have == 0 || need <= have) /* 0: not known */
        return 0;
    return fail_user(
        e,
        "not enough memory: the run needs %.2f GB%s (parameters %.2f, gradients %.2f, optimizer %.2f, "
        "activations %.2f for train.micro_batch = %lld, workspace %.2f, messages %.2f) and %.2f GB is free; "
        "%s",
        (double)need / 1e9, m->comm->ranks > 1 ? " per rank" : "", (double)p->parameters / 1e9,
        (double)p->gradients / 1e9, (double)p->optimizer / 1e9, (double)p->activations / 1e9,
        (long long)m->shape.batch, (double)p->workspace / 1e9, (double)p->messages / 1e9, (double)have / 1e9,
        memory_advice(m, p, have));
}

static int allocate(struct model *m, const struct memory_plan *p, struct error *e) {
    const struct kernels *k = m->k;
    size_t moments =
        (size_t)(m->partition.moment_elements + m->partition.second_elements) * dtype_bytes(m->dtypes.master);
    if (!(m->values = k->alloc(m->dev, p->parameters, e)) ||
        !(m->state = k->alloc(m->dev, sizeof *m->state, e)) ||
        !(m->activations = k->alloc(m->dev, p->activations, e)) ||
        !(m->workspace = k->alloc(m->dev, p->workspace, e)))
        return -1;
    m->master_weights = m->values;
    if (!m->shape.training)
        return 0;
    if (!(m->gradients = k->alloc(m->dev, p->gradients, e)) ||
        !(m->moments = k->alloc(m->dev, p->optimizer, e)))
        return -1;
    if (m->dtypes.master != m->dtypes.compute)
        m->master_weights = (char *)m->moments + moments;
    if (m->comm->ranks > 1 && m->comm->ops->reserve(m->comm, m->partition.bucket_elements, m->dtypes.gradient,
                                                    m->reduce_dtype, e) != 0)
        return -1;
    return 0;
}

/* In the largest of the blocks of memory, which are not used yet; the check leaves zeros. */
static int check_libraries(struct model *m, struct error *e) {
    const struct {
        void *data;
        size_t bytes;
    } blocks[] = {{m->workspace, m->plan.workspace},
                  {m->activations, m->plan.activations},
                  {m->values, m->plan.parameters},
                  {m->gradients, m->plan.gradients},
                  {m->moments, m->plan.optimizer}};
    size_t largest = 0;
    for (size_t i = 1; i < sizeof blocks / sizeof *blocks; i++)
        if (blocks[i].bytes > blocks[largest].bytes)
            largest = i;
    m->k->set_workspace(m->dev, blocks[largest].data, blocks[largest].bytes);
    int status = m->k->check_libraries ? m->k->check_libraries(m->dev, e) : 0;
    m->k->set_workspace(m->dev, m->workspace, m->workspace_bytes);
    return status;
}

static int upload_identity(struct model *m, struct error *e) {
    int64_t count = tensor_count(m->identity_alpha), H = m->config.num_attention_heads;
    float *values = calloc((size_t)count, sizeof *values);
    if (!values)
        return fail_run(e, "out of memory for the identity of alphas");
    for (int64_t i = 0; i < count; i++)
        values[i] = i / H % H == i % H;
    m->k->upload(m->dev, m->identity_alpha, values, DTYPE_F32);
    free(values);
    return 0;
}

/* t's matrices of the layer: [P,H,H], in folded layers [H,H]; absent in layers without alphas. */
static tensor alpha_view(const struct model *m, int layer, tensor t) {
    int64_t H = m->config.num_attention_heads;
    if (m->specs[layer].folded)
        return tensor_of(t.data, t.dtype, H, H, 0, 0, 0);
    return m->specs[layer].iha ? t : tensor_none();
}

tensor model_alpha(const struct model *m, int layer, int index) {
    return index >= 0 ? model_param(m, index) : alpha_view(m, layer, m->identity_alpha);
}

tensor model_alpha_gradient(const struct model *m, int layer, int index) {
    return index >= 0 ? model_gradient(m, index) : alpha_view(m, layer, m->grad.dalpha_unused);
}

struct rope_spec model_rope(const struct model_config *c) {
    return (struct rope_spec){.theta = c->rope_theta,
                              .llama3 = c->rope_scaling == ROPE_SCALING_LLAMA3,
                              .factor = c->rope_factor,
                              .low_factor = c->rope_low_freq_factor,
                              .high_factor = c->rope_high_freq_factor,
                              .original = (double)c->rope_original_positions};
}

int model_create(struct model *m, const struct model_config *config, const struct kernels *k,
                 struct device *dev, const struct model_options *options, struct error *e) {
    struct comm *comm = options->comm ? options->comm : comm_single();
    if (create_host_side(m, config, k, dev, options, comm->rank, comm->ranks, e) != 0 ||
        plan_memory(m, &m->plan, e) != 0 || check_memory(m, &m->plan, e) != 0 ||
        allocate(m, &m->plan, e) != 0) {
        model_free(m);
        return -1;
    }
    buffers_assign(m, m->activations);
    if (check_libraries(m, e) != 0) {
        model_free(m);
        return -1;
    }
    struct rope_spec rope = model_rope(config);
    if (m->rope.data)
        k->rope_table(dev, &rope, m->rope);
    if (m->identity_alpha.data && upload_identity(m, e) != 0) {
        model_free(m);
        return -1;
    }
    return 0;
}

void model_free(struct model *m) {
    if (!m->k)
        return;
    if (m->gather_events)
        model_await_params(m);
    void *blocks[] = {m->values, m->gradients, m->moments, m->state, m->activations, m->workspace};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        m->k->release(m->dev, blocks[i]);
    params_free(&m->params);
    partition_free(&m->partition);
    free(m->muon.list);
    free(m->reduce_events);
    free(m->gather_events);
    free(m->groups);
    free(m->layers);
    free(m->specs);
    free(m->host_segments);
    *m = (struct model){0};
}
