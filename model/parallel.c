/* Where gradients meet: a training pass whose gradients travel to their owners while backward still runs, and
 * the update of what this rank owns.
 *
 * With accumulation, stages 0 and 1 sum over ranks once a step, in the last pass. Stage 2 has room for two
 * units' whole gradients only, so it sums in every pass, into this rank's shard: `passes` times the traffic
 * for 1/W of the memory. */
#include <math.h>
#include <stdlib.h>

#include "model/model.h"

/* ---- a pass ---- */

struct pass {
    struct model *m;
    double scale;
    bool first;  /* of the step: gradients are written, not added to */
    bool reduce; /* this pass's gradients are summed over ranks */
};

static tensor gradient_of(const struct model *m, int64_t offset, int64_t count) {
    return flat_range(m->gradients, m->dtypes.gradient, offset, count);
}

/* A rank's share of a bucket, reduced: in the whole buffer, or in stage 2's shard. */
static tensor reduced_share(const struct model *m, int bucket) {
    const struct partition *p = &m->partition;
    const struct share *s = &p->own[bucket];
    int64_t at = p->zero_stage == 2 ? p->gradient_shard_at + s->shard : s->begin;
    return gradient_of(m, at, s->end - s->begin);
}

static void reduce_unit(struct pass *pass, int unit) {
    struct model *m = pass->m;
    const struct partition *p = &m->partition;
    bool accumulate = p->zero_stage == 2 && !pass->first; /* the shard holds the passes before */
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++) {
        const struct bucket *bucket = &p->buckets[b];
        tensor whole = gradient_of(m, gradient_offset(p, unit, bucket->begin), bucket->end - bucket->begin);
        m->reduced[b] = m->comm->ops->reduce_scatter(m->comm, whole, reduced_share(m, b), accumulate);
    }
}

static void await_reduced(struct model *m, int unit) {
    for (int b = m->partition.first_bucket[unit]; b < m->partition.first_bucket[unit + 1]; b++)
        model_await(m, &m->reduced[b]);
}

/* What a unit of another layout left in the gaps between tensors would be summed with the rest. */
static void clear_unit(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    int64_t count = p->unit_offset[unit + 1] - p->unit_offset[unit];
    m->k->zero(m->dev, gradient_of(m, p->unit_gradient_offset[unit], count).data,
               (size_t)count * dtype_bytes(m->dtypes.gradient));
}

/* Called as backward finishes a unit. In stage 2 the unit before this one used the memory that the next will
 * use. With the last unit the pass has ended: its sums belong to it, since it may be kept as a graph. */
static void unit_ready(void *context, int unit) {
    struct pass *pass = context;
    struct model *m = pass->m;
    const struct partition *p = &m->partition;
    if (pass->reduce)
        reduce_unit(pass, unit);
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

/* As a graph, if it may be one: all that it waits for is queued, and by itself. */
static void queue(struct pass *pass, void (*operations)(struct pass *), int graph, bool kept) {
    const struct kernels *k = pass->m->k;
    struct device *dev = pass->m->dev;
    if (!kept) {
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

void model_train_pass(struct model *m, const int32_t *tokens, const int32_t *targets, double scale, int pass,
                      int passes) {
    const struct partition *p = &m->partition;
    bool reduce = p->ranks > 1 && (p->zero_stage == 2 || pass + 1 == passes);
    struct pass context = {.m = m, .scale = scale, .first = pass == 0, .reduce = reduce};
    model_upload(m, tokens, targets);
    queue(&context, forward, GRAPH_FORWARD, !m->gathering);
    queue(&context, backward, GRAPH_BACKWARD + (pass > 0) + 2 * reduce, !reduce || m->comm->ops->queued);
}

/* ---- the update ---- */

/* The squares of this rank's shares, then of all, with the loss: every rank decides alike. */
static void decide(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count && p->ranks > 1; b++)
        m->k->sumsq(m->dev, reduced_share(m, b), m->state);
    if (p->ranks == 1)
        m->k->sumsq(m->dev, gradient_of(m, 0, m->params.elements), m->state);
    m->comm->ops->all_reduce(m->comm, &m->state->loss, 2); /* and sumsq, its neighbour */
    m->k->step_decide(m->dev, m->state, h->grad_clip, h->skip_zscore);
}

static tensor master_range(const struct model *m, void *base, int64_t offset, int64_t count) {
    return flat_range(base, m->dtypes.master, offset, count);
}

static void update_share(struct model *m, const struct share *s, tensor g, const struct update_hyper *h) {
    int64_t n = s->end - s->begin;
    tensor values = flat_range(m->values, m->dtypes.compute, s->begin, n);
    bool apart = m->master_weights != m->values;
    struct adamw_hyper hyper = {h->beta1, h->beta2, h->eps};
    m->k->adamw(m->dev, &hyper, s->groups, s->group_count, s->begin,
                apart ? master_range(m, m->master_weights, s->shard, n) : values,
                apart ? values : tensor_none(), g, master_range(m, m->moments, s->shard, n),
                master_range(m, m->moments, m->partition.moment_elements + s->shard, n), m->state);
}

static tensor bucket_values(const struct model *m, int bucket) {
    const struct bucket *b = &m->partition.buckets[bucket];
    return flat_range(m->values, m->dtypes.compute, b->begin, b->end - b->begin);
}

/* Stage 0: everyone gets all gradients and updates everything. */
static void update_replicas(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count && p->ranks > 1; b++)
        m->reduced[b] = m->comm->ops->all_gather(
            m->comm, gradient_of(m, p->buckets[b].begin, p->buckets[b].end - p->buckets[b].begin));
    for (int b = 0; b < p->bucket_count; b++)
        model_await(m, &m->reduced[b]);
    update_share(m, p->updated, gradient_of(m, 0, m->params.elements), h);
}

/* Stages 1 and 2: each bucket's new parameters travel while the next is updated, and until the next forward
 * pass comes to them, in this order. */
static void update_shards(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count; b++) {
        update_share(m, &p->own[b], reduced_share(m, b), h);
        m->gathered[b] = m->comm->ops->all_gather(m->comm, bucket_values(m, b));
    }
    m->gathering = p->ranks > 1;
}

void model_update(struct model *m, const struct update_hyper *h) {
    m->k->range_begin(m->dev, "update", -1);
    decide(m, h);
    if (m->partition.zero_stage == 0)
        update_replicas(m, h);
    else
        update_shards(m, h);
    m->k->range_end(m->dev);
}

/* ---- what went wrong ---- */

/* Sum of squares of one tensor's gradient, over the ranks that own parts of it. */
static double tensor_sumsq(struct model *m, const struct param *t) {
    const struct partition *p = &m->partition;
    struct step_state before, state = {0};
    m->k->step_read(m->dev, m->state, &before);
    m->k->step_write(m->dev, m->state, &state);
    for (int b = 0; b < p->bucket_count; b++) {
        tensor share = reduced_share(m, b);
        int64_t begin = p->own[b].begin > t->offset ? p->own[b].begin : t->offset;
        int64_t end = p->own[b].end < t->offset + t->count ? p->own[b].end : t->offset + t->count;
        if (begin < end)
            m->k->sumsq(m->dev, tensor_rows(share, begin - p->own[b].begin, end - begin), m->state);
    }
    m->comm->ops->all_reduce(m->comm, &m->state->sumsq, 1);
    m->k->step_read(m->dev, m->state, &state);
    m->k->step_write(m->dev, m->state, &before);
    return state.sumsq;
}

int model_worst_gradient(struct model *m, bool *finite) {
    int worst = 0;
    double most = -1;
    *finite = false;
    for (int i = m->params.count - 1; i >= 0; i--) {
        double sum = tensor_sumsq(m, &m->params.list[i]);
        if (!isfinite(sum))
            return i; /* nearest to the loss, where backward met it first */
        if (sum > most) {
            most = sum;
            worst = i;
        }
    }
    *finite = true;
    return worst;
}
