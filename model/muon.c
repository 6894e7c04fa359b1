#include "model/muon.h"

#include <math.h>
#include <stdlib.h>

#include "model/model.h"

/* ---- which matrices, and whose ---- */

bool muon_updates(const struct param *p) {
    return p->layer >= 0 && p->class == PARAM_MATRIX;
}

/* Multiplications of one Newton-Schulz iteration. */
static double work(const struct muon_matrix *x) {
    double side = (double)(x->rows < x->cols ? x->rows : x->cols);
    return side * (2 * (double)x->rows * (double)x->cols + side * side);
}

/* Each matrix goes to the rank that has the least work so far. */
static int assign_owners(struct muon_matrices *m, int ranks) {
    double *load = calloc((size_t)ranks, sizeof *load);
    if (!load)
        return -1;
    for (int i = 0; i < m->count; i++) {
        int least = 0;
        for (int r = 1; r < ranks; r++)
            if (load[r] < load[least])
                least = r;
        m->list[i].owner = least;
        load[least] += work(&m->list[i]);
    }
    free(load);
    return 0;
}

enum { MOST_PARTS = 5 };

/* How many matrices a parameter is: qkv is q, k and v, in simplicial layers also k' and v'. rows: of each. */
static int parts_of(const struct params *p, int param, int64_t rows[MOST_PARTS]) {
    const struct param *t = &p->list[param];
    if (!muon_updates(t))
        return 0;
    rows[0] = t->shape[0];
    if (param != p->layers[t->layer].qkv)
        return 1;
    rows[0] = p->list[p->layers[t->layer].out].shape[1]; /* H d */
    int parts = t->shape[0] == 5 * rows[0] ? 5 : 3;
    for (int part = 1; part < parts; part++)
        rows[part] = (t->shape[0] - rows[0]) / (parts - 1);
    return parts;
}

int muon_list(struct muon_matrices *m, const struct params *p, int ranks, struct error *e) {
    m->list = calloc((size_t)p->count * MOST_PARTS, sizeof *m->list);
    if (!m->list)
        return fail_run(e, "out of memory listing the matrices of Muon");
    for (int i = 0; i < p->count; i++) {
        const struct param *t = &p->list[i];
        int64_t rows[MOST_PARTS] = {0}, offset = t->offset;
        int parts = parts_of(p, i, rows);
        for (int part = 0; part < parts; part++) {
            m->list[m->count++] = (struct muon_matrix){i, offset, rows[part], t->shape[1], t->unit, 0};
            offset += rows[part] * t->shape[1];
        }
    }
    return assign_owners(m, ranks) == 0 ? 0 : fail_run(e, "out of memory listing the matrices of Muon");
}

int64_t muon_elements(const struct muon_matrices *m) {
    int64_t elements = 0;
    for (int i = 0; i < m->count; i++)
        elements += m->list[i].rows * m->list[i].cols;
    return elements;
}

float muon_scale(const struct muon_matrix *x) {
    return (float)(0.2 * sqrt((double)(x->rows > x->cols ? x->rows : x->cols)));
}

/* ---- the update ---- */

static bool has_matrices(const struct model *m, int unit) {
    for (int i = 0; i < m->muon.count; i++)
        if (m->muon.list[i].unit == unit)
            return true;
    return false;
}

static void await_buckets(struct model *m, comm_event *events, int unit) {
    const struct partition *p = &m->partition;
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++)
        model_await(m, &events[b]);
}

/* AdamW, then the direction of Muon in place of the gradient, on one of partition.updates. */
static void begin_shard(struct model *m, const struct shard *s, tensor g, const struct update_hyper *h) {
    model_update_shard(m, s, g, h);
    if (s->muon_count > 0)
        m->k->muon_momentum(m->dev, h->muon_momentum, s->muon_groups, s->muon_count, g,
                            flat_range(m->moments, m->dtypes.master, s->local_offset, s->end - s->begin),
                            m->state);
}

static void finish_shard(struct model *m, const struct shard *s, tensor directions) {
    struct shard_weights w = model_shard_weights(m, s);
    if (s->muon_count > 0)
        m->k->muon_update(m->dev, s->muon_groups, s->muon_count, w.master, w.rounded, directions, m->state);
}

/* Start to gather a unit's directions in the memory of its unsharded gradients. */
static void gather_directions(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    model_group_begin(m);
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++) {
        tensor whole = model_gradient_bucket(m, b), shard = model_gradient_shard(m, b);
        tensor own = tensor_rows(whole, p->shards[b].begin - p->buckets[b].begin, tensor_count(shard));
        if (own.data != shard.data)
            m->k->copy(m->dev, own.data, shard.data, (size_t)tensor_count(shard) * dtype_bytes(shard.dtype));
        m->reduce_events[b] = m->comm->ops->all_gather(m->comm, whole);
    }
    model_group_end(m);
}

static void clear(struct model *m, int unit, int64_t begin, int64_t end) {
    if (begin < end)
        m->k->zero(m->dev, model_gradient_range(m, unit, begin, end).data,
                   (size_t)(end - begin) * dtype_bytes(m->dtypes.gradient));
}

/* Orthogonalize this rank's matrices of a unit. On several ranks, clear what others own; what is no matrix is rank
 * 0's, so that the sum over ranks leaves it as it was. */
static void orthogonalize_unit(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    int64_t at = p->unit_offset[unit];
    for (int i = 0; i < m->muon.count; i++) {
        const struct muon_matrix *x = &m->muon.list[i];
        int64_t end = x->offset + x->rows * x->cols;
        if (x->unit != unit)
            continue;
        if (p->rank > 0)
            clear(m, unit, at, x->offset);
        if (x->owner == p->rank) {
            struct orthogonalize_spec spec = {x->rows, x->cols};
            tensor flat = model_gradient_range(m, unit, x->offset, end);
            m->k->orthogonalize(m->dev, &spec, tensor_of(flat.data, flat.dtype, x->rows, x->cols, 0, 0, 0),
                                m->state);
        } else {
            clear(m, unit, x->offset, end);
        }
        at = end;
    }
    if (p->rank > 0)
        clear(m, unit, at, p->unit_offset[unit + 1]);
}

static void scatter_directions(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++)
        m->reduce_events[b] = m->comm->ops->reduce_scatter(m->comm, model_gradient_bucket(m, b),
                                                           model_gradient_shard(m, b), false);
}

/* Stage 0, and a single rank: every rank has all gradients and updates everything. */
static void update_replicas(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    tensor all = flat_range(m->gradients, m->dtypes.gradient, 0, m->params.elements);
    bool several = p->ranks > 1;
    model_group_begin(m);
    for (int b = 0; b < p->bucket_count && several; b++)
        m->reduce_events[b] = m->comm->ops->all_gather(m->comm, model_gradient_bucket(m, b));
    model_group_end(m);
    for (int u = 0; u < p->unit_count; u++)
        await_buckets(m, m->reduce_events, u);
    begin_shard(m, p->updates, all, h);
    for (int u = 0; u < p->unit_count; u++) {
        if (!has_matrices(m, u))
            continue;
        orthogonalize_unit(m, u);
        if (several)
            scatter_directions(m, u);
    }
    for (int u = 0; u < p->unit_count && several; u++) {
        if (!has_matrices(m, u))
            continue;
        await_buckets(m, m->reduce_events, u);
        for (int b = p->first_bucket[u]; b < p->first_bucket[u + 1]; b++)
            m->reduce_events[b] = m->comm->ops->all_gather(m->comm, model_gradient_bucket(m, b));
    }
    for (int u = 0; u < p->unit_count; u++)
        await_buckets(m, m->reduce_events, u);
    finish_shard(m, p->updates, all);
}

static void gather_weights(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    model_group_begin(m);
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++) {
        const struct bucket *bucket = &p->buckets[b];
        m->gather_events[b] = m->comm->ops->all_gather(
            m->comm, flat_range(m->values, m->dtypes.compute, bucket->begin, bucket->end - bucket->begin));
    }
    model_group_end(m);
}

static void finish_unit(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    await_buckets(m, m->reduce_events, unit);
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1]; b++)
        finish_shard(m, &p->shards[b], model_gradient_shard(m, b));
    gather_weights(m, unit);
}

/* Stages 1 and 2. Directions are gathered ahead of the unit that is orthogonalized: in stage 1 all, in stage 2 those
 * of the next unit, once the unit before, whose memory that takes, is finished. */
static void update_shards(struct model *m, const struct update_hyper *h) {
    const struct partition *p = &m->partition;
    bool two_slots = p->zero_stage == 2;
    int started = 0, finished = 0;
    for (int b = 0; b < p->bucket_count; b++)
        begin_shard(m, &p->shards[b], model_gradient_shard(m, b), h);
    for (int u = 0; u < p->unit_count; u++) {
        if (!has_matrices(m, u)) {
            gather_weights(m, u);
            continue;
        }
        for (; two_slots && finished < u; finished++)
            if (has_matrices(m, finished))
                finish_unit(m, finished);
        for (; started < p->unit_count && (!two_slots || started <= u + 1); started++)
            if (has_matrices(m, started))
                gather_directions(m, started);
        await_buckets(m, m->reduce_events, u);
        orthogonalize_unit(m, u);
        scatter_directions(m, u);
    }
    for (; finished < p->unit_count; finished++)
        if (has_matrices(m, finished))
            finish_unit(m, finished);
    m->gather_pending = true;
}

void muon_update_model(struct model *m, const struct update_hyper *h) {
    if (m->partition.zero_stage == 0)
        update_replicas(m, h);
    else
        update_shards(m, h);
}
