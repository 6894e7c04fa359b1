#include "model/state_dict.h"

#include <stdlib.h>

#include "kernels/rounding.h"

/* offset: elements of the whole flat buffer, or of this rank's shards where master weights are sharded. */
static tensor master_weights(const struct model *m, int64_t offset, int64_t count) {
    enum dtype dtype = m->master_weights == m->values ? m->dtypes.compute : m->dtypes.master;
    return flat_range(m->master_weights, dtype, offset, count);
}

/* ---- in ---- */

int model_initialize(struct model *m, uint64_t seed, struct error *e) {
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        float *values = malloc((size_t)p->count * sizeof *values);
        if (!values)
            return fail_run(e, "out of memory initialising %s", p->name);
        params_initial(p, &m->config, seed, values);
        model_set_param(m, i, values, 0);
        free(values);
    }
    return 0;
}

/* The part of a parameter's master weights that this rank holds. */
static void upload_master_weights(struct model *m, int index, const float *values) {
    const struct param *p = &m->params.list[index];
    for (int i = 0; i < m->partition.update_count; i++) {
        const struct shard *s = &m->partition.updates[i];
        struct element_range in = param_overlap(p, s->begin, s->end);
        if (in.begin < in.end)
            m->k->upload(m->dev, master_weights(m, s->local_offset + in.begin - s->begin, in.end - in.begin),
                         values + (in.begin - p->offset), DTYPE_F32);
    }
}

/* The same bits as the optimizer's rounding after so many updates. */
static void upload_rounded(struct model *m, int index, const float *values, int64_t updates) {
    enum { PIECE = 1 << 17 };
    static uint16_t bits[PIECE];
    const struct param *p = &m->params.list[index];
    for (int64_t begin = 0; begin < p->count; begin += PIECE) {
        int64_t count = p->count - begin < PIECE ? p->count - begin : PIECE;
#pragma omp parallel for
        for (int64_t i = 0; i < count; i++)
            bits[i] = round_stochastic(values[begin + i], (uint32_t)updates,
                                       (uint64_t)(p->rounding_index + begin + i));
        m->k->upload(m->dev, flat_range(m->values, DTYPE_BF16, p->offset + begin, count), bits, DTYPE_BF16);
    }
}

void model_set_param(struct model *m, int index, const float *values, int64_t updates) {
    if (m->dtypes.compute == DTYPE_BF16 && updates > 0)
        upload_rounded(m, index, values, updates);
    else
        m->k->upload(m->dev, model_param(m, index), values, DTYPE_F32);
    if (m->master_weights != m->values)
        upload_master_weights(m, index, values);
}

/* ---- out ---- */

bool model_master_weights_sharded(const struct model *m) {
    return m->master_weights != m->values && m->partition.zero_stage > 0;
}

void model_get_param(const struct model *m, int index, float *values) {
    const struct param *p = &m->params.list[index];
    if (model_master_weights_sharded(m))
        abort(); /* this rank does not have all of it: model_get_params */
    m->k->download(m->dev, master_weights(m, p->offset, p->count), values, DTYPE_F32);
}

/* Elements [begin, end) of the flat buffer, in `range`, into values [params.num_params], without padding. */
static void download_packed(struct model *m, tensor range, int64_t begin, int64_t end, float *values) {
    for (int i = 0; i < m->params.count; i++) {
        const struct param *t = &m->params.list[i];
        struct element_range in = param_overlap(t, begin, end);
        if (in.begin < in.end)
            m->k->download(m->dev, tensor_rows(range, in.begin - begin, in.end - in.begin),
                           values + t->packed_offset + in.begin - t->offset, DTYPE_F32);
    }
}

/* Bucket by bucket, in the memory that holds the bucket's gradients during a step. */
static void gather_master_weights(struct model *m, float *values) {
    const struct partition *p = &m->partition;
    if (m->dtypes.gradient != m->dtypes.master)
        abort();
    for (int b = 0; b < p->bucket_count; b++) {
        const struct bucket *bucket = &p->buckets[b];
        const struct shard *s = &p->shards[b];
        int64_t offset = gradient_offset(p, bucket->unit, bucket->begin), count = s->end - s->begin;
        tensor whole = flat_range(m->gradients, m->dtypes.gradient, offset, bucket->end - bucket->begin);
        tensor own = tensor_rows(whole, s->begin - bucket->begin, count);
        m->k->copy(m->dev, own.data, master_weights(m, s->local_offset, count).data,
                   (size_t)count * dtype_bytes(m->dtypes.master));
        comm_event gathered = m->comm->ops->all_gather(m->comm, whole);
        model_await(m, &gathered);
        if (values)
            download_packed(m, whole, bucket->begin, bucket->end, values);
    }
}

void model_get_params(struct model *m, float *values) {
    model_await_params(m);
    if (model_master_weights_sharded(m))
        gather_master_weights(m, values);
    else
        for (int i = 0; values && i < m->params.count; i++)
            model_get_param(m, i, values + m->params.list[i].packed_offset);
}
