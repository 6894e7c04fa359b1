/* Data-parallel training: a pass whose gradients are reduced bucket by bucket while backward still runs, and
 * the update of what this rank owns.
 *
 * With gradient accumulation, stages 0 and 1 reduce once a step, in the last pass. Stage 2 has memory for the
 * unsharded gradients of two units only, so it reduces in every pass and accumulates in this rank's shards:
 * `passes` times the traffic for 1/W of the memory. */
#include <math.h>

#include "model/model.h"

static tensor gradients(const struct model *m, int64_t offset, int64_t count) {
    return flat_range(m->gradients, m->dtypes.gradient, offset, count);
}

tensor model_gradient_shard(const struct model *m, int bucket) {
    const struct partition *p = &m->partition;
    const struct shard *s = &p->shards[bucket];
    int64_t offset = p->zero_stage == 2 ? p->gradient_shard_offset + s->local_offset : s->begin;
    return gradients(m, offset, s->end - s->begin);
}

tensor model_gradient_range(const struct model *m, int unit, int64_t begin, int64_t end) {
    return gradients(m, gradient_offset(&m->partition, unit, begin), end - begin);
}

tensor model_gradient_bucket(const struct model *m, int bucket) {
    const struct bucket *b = &m->partition.buckets[bucket];
    return model_gradient_range(m, b->unit, b->begin, b->end);
}

/* ---- a pass ---- */

struct pass {
    struct model *m;
    double scale;
    bool first;  /* of the step: gradients are written, not added to */
    bool reduce; /* this pass's gradients are reduced over ranks */
};

static void reduce_scatter_unit(const struct pass *pass, int unit) {
    struct model *m = pass->m;
    const struct partition *p = &m->partition;
    bool accumulate = p->zero_stage == 2 && !pass->first; /* onto the passes before */
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++) {
        m->reduce_events[b] = m->comm->ops->reduce_scatter(m->comm, model_gradient_bucket(m, b),
                                                           model_gradient_shard(m, b), accumulate);
    }
}

static void await_reduced(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++)
        model_await(m, &m->reduce_events[b]);
}

/* The gaps between tensors are reduced too, and hold what a unit of another layout has left there. */
static void clear_unit(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    int64_t count = p->unit_offset[unit + 1] - p->unit_offset[unit];
    tensor g = gradients(m, p->unit_gradient_offset[unit], count);
    m->k->zero(m->dev, g.data, (size_t)count * dtype_bytes(g.dtype));
}

/* Called when backward has finished a unit: start reducing it. In stage 2, unit + 1 is in the memory that
 * unit - 1, the next, is about to use. The pass ends with unit 0 and waits for all that it reduces, since a
 * pass may be kept as a graph. */
static void unit_ready(void *context, int unit) {
    const struct pass *pass = context;
    struct model *m = pass->m;
    const struct partition *p = &m->partition;
    if (pass->reduce)
        reduce_scatter_unit(pass, unit);
    if (p->zero_stage == 2 && unit > 1) {
        if (unit + 1 < p->unit_count)
            await_reduced(m, unit + 1);
        clear_unit(m, unit - 1);
    }
    for (int u = 0; u < p->unit_count && unit == 0; u++)
        await_reduced(m, u);
}

static void forward(struct pass *pass) {
    pass->m->k->range_begin(pass->m->dev, "forward", -1);
    model_forward(pass->m);
    pass->m->k->range_end(pass->m->dev);
}

static void backward(struct pass *pass) {
    const struct partition *p = &pass->m->partition;
    bool sharded = p->zero_stage == 2;
    if (sharded)
        clear_unit(pass->m, p->unit_count - 1);
    pass->m->k->range_begin(pass->m->dev, "backward", -1);
    model_backward(pass->m, pass->scale, !pass->first && !sharded, unit_ready, pass);
    pass->m->k->range_end(pass->m->dev);
}

enum { GRAPH_FORWARD, GRAPH_BACKWARD /* and three more: not the first pass, reducing, both */ };

/* Queue the operations, as a graph where they can be one: then they wait for nothing but the queue. */
static void queue(struct pass *pass, void (*operations)(struct pass *), int graph, bool can_be_graph) {
    const struct kernels *k = pass->m->k;
    struct device *dev = pass->m->dev;
    if (!can_be_graph) {
        operations(pass);
        return;
    }
    if (k->graph_replay(dev, graph))
        return;
    do {
        k->graph_begin(dev, graph);
        operations(pass);
    } while (!k->graph_end(dev, graph));
}

void model_train_pass(struct model *m, struct batch batch, double scale, int pass, int passes) {
    const struct partition *p = &m->partition;
    bool reduce = p->ranks > 1 && (p->zero_stage == 2 || pass + 1 == passes);
    struct pass context = {.m = m, .scale = scale, .first = pass == 0, .reduce = reduce};
    model_upload(m, batch);
    queue(&context, forward, GRAPH_FORWARD, !m->gather_pending);
    queue(&context, backward, GRAPH_BACKWARD + (pass > 0) + 2 * reduce, !reduce || m->comm->ops->queued);
}

/* ---- the update ---- */

/* Squares of this rank's gradients, summed over ranks together with the loss, so that every rank comes to the
 * same norm, clip factor and decision to skip. */
static void reduce_norm_and_loss(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count && p->ranks > 1; b++)
        m->k->sumsq(m->dev, model_gradient_shard(m, b), m->state);
    if (p->ranks == 1)
        m->k->sumsq(m->dev, gradients(m, 0, m->params.elements), m->state);
    m->comm->ops->all_reduce(m->comm, &m->state->loss, 3); /* and targets and sumsq, the next fields */
    m->k->step_decide(m->dev, m->state, h->tokens, h->grad_clip, h->skip_zscore);
}

struct shard_weights model_shard_weights(const struct model *m, const struct shard *s) {
    int64_t n = s->end - s->begin;
    tensor weights = flat_range(m->values, m->dtypes.compute, s->begin, n);
    if (m->master_weights == m->values)
        return (struct shard_weights){weights, tensor_none()};
    return (struct shard_weights){flat_range(m->master_weights, m->dtypes.master, s->local_offset, n),
                                  weights};
}

/* AdamW on part of a shard, [begin, end) relative to it, which is whole groups; second: where its second moments are. */
static void update_part(struct model *m, const struct shard *s, tensor g, const struct param_group *groups,
                        int count, int64_t begin, int64_t end, int64_t second, const struct update_hyper *h) {
    struct adamw_hyper hyper = {h->beta1, h->beta2, h->eps};
    struct shard_weights w = model_shard_weights(m, s);
    enum dtype master = m->dtypes.master;
    int64_t n = end - begin, first_moments = m->partition.moment_elements;
    m->k->adamw(m->dev, &hyper, groups, count, tensor_rows(w.master, begin, n),
                w.rounded.data ? tensor_rows(w.rounded, begin, n) : tensor_none(), tensor_rows(g, begin, n),
                flat_range(m->moments, master, s->local_offset + begin, n),
                flat_range(m->moments, master, first_moments + second, n), m->state);
}

/* Where groups of Muon lie between those of AdamW, second moments have no gaps for them: one call a group. */
void model_update_shard(struct model *m, const struct shard *s, tensor g, const struct update_hyper *h) {
    int64_t second = s->second_offset;
    if (s->muon_count == 0 && s->group_count > 0)
        update_part(m, s, g, s->groups, s->group_count, 0, s->end - s->begin, second, h);
    for (int i = 0; i < s->group_count && s->muon_count > 0; i++) {
        struct param_group group = s->groups[i];
        int64_t begin = group.begin, end = group.end;
        group.begin = 0;
        group.end = end - begin;
        update_part(m, s, g, &group, 1, begin, end, second, h);
        second += end - begin;
    }
}

/* Stage 0: every rank gathers all gradients and updates everything. */
static void update_replicas(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    model_group_begin(m);
    for (int b = 0; b < p->bucket_count && p->ranks > 1; b++)
        m->reduce_events[b] = m->comm->ops->all_gather(
            m->comm, gradients(m, p->buckets[b].begin, p->buckets[b].end - p->buckets[b].begin));
    model_group_end(m);
    for (int b = 0; b < p->bucket_count; b++)
        model_await(m, &m->reduce_events[b]);
    model_update_shard(m, p->updates, gradients(m, 0, m->params.elements), h);
}

static void update_unit(struct model *m, int unit, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++) {
        const struct bucket *bucket = &p->buckets[b];
        model_update_shard(m, &p->shards[b], model_gradient_shard(m, b), h);
        m->gather_events[b] = m->comm->ops->all_gather(
            m->comm, flat_range(m->values, m->dtypes.compute, bucket->begin, bucket->end - bucket->begin));
    }
}

/* Stages 1 and 2: new parameters are gathered while the next ones are updated, and further until the next
 * forward pass needs them, which is in the order of the units. */
static void update_shards(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int u = 0; u < p->unit_count; u++) {
        model_group_begin(m);
        update_unit(m, u, h);
        model_group_end(m);
    }
    m->gather_pending = p->ranks > 1;
}

/* ---- norms by part, and which gradient was bad ---- */

/* Add one tensor's squares, as far as this rank owns it, to the step state. */
static void add_sumsq(struct model *m, const struct param *t, bool weights) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count; b++) {
        const struct shard *s = &p->shards[b];
        struct element_range in = param_overlap(t, s->begin, s->end);
        tensor owned = weights ? model_shard_weights(m, s).master : model_gradient_shard(m, b);
        if (in.begin < in.end)
            m->k->sumsq(m->dev, tensor_rows(owned, in.begin - s->begin, in.end - in.begin), m->state);
    }
}

/* Sum of squares over all ranks, of the gradients or weights of the tensors that are of a part, or of one tensor.
 * Leaves the step state as it was. */
static double sumsq_over_ranks(struct model *m, int part, const struct param *only, bool weights) {
    struct step_state before, state = {0};
    m->k->step_read(m->dev, m->state, &before);
    m->k->step_write(m->dev, m->state, &state);
    for (int i = 0; i < m->params.count; i++) {
        const struct param *t = &m->params.list[i];
        if (only ? t == only : (int)param_part_of(t) == part)
            add_sumsq(m, t, weights);
    }
    m->comm->ops->all_reduce(m->comm, &m->state->sumsq, 1);
    m->k->step_read(m->dev, m->state, &state);
    m->k->step_write(m->dev, m->state, &before);
    return state.sumsq;
}

static bool has_part(const struct model *m, int part) {
    for (int i = 0; i < m->params.count; i++)
        if ((int)param_part_of(&m->params.list[i]) == part)
            return true;
    return false;
}

/* After step_decide, whose loss and targets are those of all ranks. */
static void measure_parts(struct model *m, double tokens) {
    struct step_state state;
    m->k->step_read(m->dev, m->state, &state);
    double mean = state.targets > 0 ? tokens / state.targets : 0;
    for (int part = 0; part < PARAM_PARTS; part++) {
        bool has = has_part(m, part);
        m->norms->gradient[part] = has ? mean * sqrt(sumsq_over_ranks(m, part, NULL, false)) : -1;
        m->norms->weight[part] = has ? sqrt(sumsq_over_ranks(m, part, NULL, true)) : -1;
    }
}

void model_update(struct model *m, const struct update_hyper *h) {
    m->k->range_begin(m->dev, "update", -1);
    reduce_norm_and_loss(m, h);
    if (m->norms)
        measure_parts(m, h->tokens);
    if (m->shape.muon)
        muon_update_model(m, h);
    else if (m->partition.zero_stage == 0)
        update_replicas(m, h);
    else
        update_shards(m, h);
    m->k->range_end(m->dev);
}

int model_worst_gradient(struct model *m, bool *finite) {
    int worst = 0;
    double largest = -1;
    *finite = false;
    for (int i = m->params.count - 1; i >= 0; i--) {
        double sum = sumsq_over_ranks(m, 0, &m->params.list[i], false);
        if (!isfinite(sum))
            return i; /* the nearest to the loss, so the first in backward */
        if (sum > largest) {
            largest = sum;
            worst = i;
        }
    }
    *finite = true;
    return worst;
}
