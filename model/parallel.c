/* Where gradients meet: a training pass whose gradients travel to their owners while backward still runs, and
 * the update of what this rank owns.
 *
 * With accumulation, stages 0 and 1 sum over ranks once a step, in the last pass. Stage 2 has room for two
 * units' whole gradients only, so it sums in every pass, into this rank's shard: `passes` times the traffic
 * for 1/W of the memory. */
#include <math.h>

#include "model/model.h"

/* ---- a pass ------------------------------------------------------------------------------------------- */

struct pass {
    struct model *m;
    bool reduce;     /* this pass's gradients are summed over ranks */
    bool accumulate; /* into a shard that holds something already (stage 2) */
    int unit;        /* whose gradients are ready next, from last to first */
};

static char *gradient_at(const struct model *m, int64_t element) {
    return (char *)m->gradients + (size_t)element * dtype_bytes(m->dtypes.gradient);
}

static tensor gradient_of(const struct model *m, int64_t at, int64_t count) {
    return tensor_of(gradient_at(m, at), m->dtypes.gradient, count, 0, 0, 0, 0);
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
    for (int b = 0; b < p->bucket_count; b++) {
        if (p->buckets[b].unit != unit)
            continue;
        int64_t at = p->gradient_at[unit] + p->buckets[b].begin - p->unit_at[unit];
        tensor whole = gradient_of(m, at, p->buckets[b].end - p->buckets[b].begin);
        m->reduced[b] = m->comm->ops->reduce_scatter(m->comm, whole, reduced_share(m, b), pass->accumulate);
    }
}

static void wait_for_unit(struct model *m, int unit) {
    for (int b = 0; b < m->partition.bucket_count; b++)
        if (m->partition.buckets[b].unit == unit)
            m->comm->ops->wait(m->comm, m->reduced[b]);
}

/* What a unit of another layout left in the gaps between tensors would be summed with the rest. */
static void clear_unit(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    size_t bytes = (size_t)(p->unit_at[unit + 1] - p->unit_at[unit]) * dtype_bytes(m->dtypes.gradient);
    m->k->zero(m->dev, gradient_at(m, p->gradient_at[unit]), bytes);
}

/* Called as backward finishes a unit. In stage 2 the unit before this one used the memory that the next will
 * use. */
static void unit_ready(void *context, int64_t begin, int64_t end) {
    struct pass *pass = context;
    struct model *m = pass->m;
    const struct partition *p = &m->partition;
    int unit = pass->unit--;
    (void)begin, (void)end;
    if (pass->reduce)
        reduce_unit(pass, unit);
    if (p->zero_stage == 2 && unit > 1) {
        if (unit + 1 < p->units)
            wait_for_unit(m, unit + 1);
        clear_unit(m, unit - 1);
    }
}

void model_train_pass(struct model *m, const int32_t *tokens, const int32_t *targets, double scale, int pass,
                      int passes) {
    const struct partition *p = &m->partition;
    bool sharded = p->zero_stage == 2, last = pass + 1 == passes;
    struct pass context = {m, p->ranks > 1 && (sharded || last), sharded && pass > 0, p->units - 1};
    if (sharded)
        clear_unit(m, p->units - 1);
    model_forward_backward(m, tokens, targets, scale, pass > 0 && !sharded, unit_ready, &context);
    for (int b = 0; b < p->bucket_count && sharded && !last; b++)
        m->comm->ops->wait(m->comm, m->reduced[b]);
}

/* ---- the update --------------------------------------------------------------------------------------- */

/* The squares of this rank's shares, then of all, with the loss: every rank decides alike. */
static void decide(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count && p->ranks > 1; b++) {
        m->comm->ops->wait(m->comm, m->reduced[b]);
        m->k->sumsq(m->dev, reduced_share(m, b), m->state);
    }
    if (p->ranks == 1)
        m->k->sumsq(m->dev, gradient_of(m, 0, m->params.elements), m->state);
    m->comm->ops->all_reduce(m->comm, &m->state->loss, 2); /* and sumsq, its neighbour */
    m->k->step_decide(m->dev, m->state, h->grad_clip, h->skip_zscore);
}

static tensor master_range(const struct model *m, void *base, int64_t at, int64_t count) {
    return tensor_of((char *)base + (size_t)at * dtype_bytes(m->dtypes.master), m->dtypes.master, count, 0, 0,
                     0, 0);
}

static void update_share(struct model *m, const struct share *s, tensor g, const struct update_hyper *h) {
    int64_t n = s->end - s->begin;
    char *value = (char *)m->values + (size_t)s->begin * dtype_bytes(m->dtypes.compute);
    tensor values = tensor_of(value, m->dtypes.compute, n, 0, 0, 0, 0);
    bool apart = m->masters != m->values;
    struct adamw_hyper hyper = {h->beta1, h->beta2, h->eps};
    m->k->adamw(m->dev, &hyper, s->groups, s->group_count, s->begin,
                apart ? master_range(m, m->masters, s->shard, n) : values, apart ? values : tensor_none(), g,
                master_range(m, m->moments, s->shard, n),
                master_range(m, m->moments, m->partition.moment_elements + s->shard, n), m->state);
}

static tensor bucket_values(const struct model *m, int bucket) {
    const struct bucket *b = &m->partition.buckets[bucket];
    char *at = (char *)m->values + (size_t)b->begin * dtype_bytes(m->dtypes.compute);
    return tensor_of(at, m->dtypes.compute, b->end - b->begin, 0, 0, 0, 0);
}

/* Stage 0: everyone gets all gradients and updates everything. */
static void update_replicas(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count && p->ranks > 1; b++)
        m->reduced[b] = m->comm->ops->all_gather(
            m->comm, gradient_of(m, p->buckets[b].begin, p->buckets[b].end - p->buckets[b].begin));
    for (int b = 0; b < p->bucket_count; b++)
        m->comm->ops->wait(m->comm, m->reduced[b]);
    update_share(m, p->updated, gradient_of(m, 0, m->params.elements), h);
}

/* Stages 1 and 2: each bucket's new parameters travel while the next is updated. */
static void update_shards(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    for (int b = 0; b < p->bucket_count; b++) {
        update_share(m, &p->own[b], reduced_share(m, b), h);
        m->reduced[b] = m->comm->ops->all_gather(m->comm, bucket_values(m, b));
    }
    for (int b = 0; b < p->bucket_count; b++)
        m->comm->ops->wait(m->comm, m->reduced[b]);
}

void model_update(struct model *m, const struct update_hyper *h) {
    decide(m, h);
    if (m->partition.zero_stage == 0)
        update_replicas(m, h);
    else
        update_shards(m, h);
}

/* ---- what went wrong ------------------------------------------------------------------------------------
 */

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
