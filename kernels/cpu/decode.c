/* attention_decode: attention of a few new virtual tokens over a ring buffer of cached keys and values. */
#include "kernels/cpu/cpu.h"

/* Of one query's sums, in whole cache lines. */
static int64_t thread_reals(const struct attention_spec *s) {
    return round_up(s->head_dim, 16);
}

/* Where elements are reals, the sums are in o itself. */
struct op_cost CPU(decode_plan)(const struct device *dev, const struct attention_spec *s) {
    size_t bytes = (size_t)dev->threads * (size_t)thread_reals(s) * sizeof(real);
    return (struct op_cost){.workspace = sizeof(elem) < sizeof(real) ? bytes : 0};
}

/* Attention of one query over keys [begin, end), of which key s is at index s mod capacity. The softmax is
 * computed online, so that no row of scores is stored. */
static void attend_query(const struct attention_spec *s, const elem *q, tensor cache_k, tensor cache_v,
                         int64_t b, int64_t h, int64_t begin, int64_t end, real *o) {
    int64_t capacity = cache_k.shape[1], d = s->head_dim;
    real max = -INFINITY, total = 0;
    memset(o, 0, (size_t)d * sizeof(real));
    for (int64_t key = begin; key < end; key++) {
        int64_t slot = key % capacity;
        const elem *k =
            (elem *)cache_k.data + b * cache_k.stride[0] + slot * cache_k.stride[1] + h * cache_k.stride[2];
        const elem *v =
            (elem *)cache_v.data + b * cache_v.stride[0] + slot * cache_v.stride[1] + h * cache_v.stride[2];
        real score = (real)s->scale * dot_elems(q, k, d);
        if (score > max) {
            real factor = (real)exp((double)(max - score));
            max = score;
            total *= factor;
            for (int64_t c = 0; c < d; c++)
                o[c] *= factor;
        }
        real weight = (real)exp((double)(score - max));
        total += weight;
#pragma omp simd
        for (int64_t c = 0; c < d; c++)
            o[c] += weight * from_elem(v[c]);
    }
    for (int64_t c = 0; c < d; c++)
        o[c] /= total;
}

void CPU(append_to_cache)(const struct attention_spec *s, tensor x, tensor cache, int64_t first) {
    int64_t capacity = cache.shape[1];
    for (int64_t b = 0; b < s->batch; b++)
        for (int64_t i = 0; i < s->length; i++)
            for (int64_t h = 0; h < attention_kv_heads(s); h++)
                memcpy((elem *)cache.data + b * cache.stride[0] + (first + i) % capacity * cache.stride[1] +
                           h * cache.stride[2],
                       (elem *)x.data + b * x.stride[0] + i * x.stride[1] + h * x.stride[2],
                       (size_t)s->head_dim * sizeof(elem));
}

void CPU(attention_decode)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                           tensor cache_k, tensor cache_v, int64_t first, tensor o) {
    int64_t B = s->batch, n = s->length, H = s->heads, d = s->head_dim;
    check_elem("attention_decode", "q", q, B, n, H, d, 0);
    check_elem("attention_decode", "o", o, B, n, H, d, 0);
    check_elem("attention_decode", "cache", cache_k, B, cache_k.shape[1], attention_kv_heads(s), d, 0);
    real *scratch = cpu_workspace(dev, CPU(decode_plan)(dev, s).workspace, "attention_decode");
    CPU(append_to_cache)(s, k, cache_k, first);
    CPU(append_to_cache)(s, v, cache_v, first);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(dev->threads)
    for (int64_t bh = 0; bh < B * H; bh++)
        for (int64_t i = 0; i < n; i++) {
            int64_t b = bh / H, h = bh % H, begin, end;
            attention_keys(s, first + i, first + n, &begin, &end);
            elem *to = (elem *)o.data + b * o.stride[0] + i * o.stride[1] + h * o.stride[2];
            real *sums = elems_buffer(to, scratch + omp_get_thread_num() * thread_reals(s));
            attend_query(s, (elem *)q.data + b * q.stride[0] + i * q.stride[1] + h * q.stride[2], cache_k,
                         cache_v, b, h / attention_group(s), begin, end, sums);
            write_elems(to, d, sums);
        }
}
