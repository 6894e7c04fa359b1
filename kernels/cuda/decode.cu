/* attention_decode: a few new virtual tokens attend to a ring buffer of cached keys and values.
 *
 * One kernel appends the new keys and values to the cache, one computes attention. A block has one query and
 * head. LANES lanes of a warp share a key, each with 8 elements of its row, so that a warp reads whole rows.
 * Every group of LANES lanes keeps an online softmax of its share of the keys (Milakov & Gimelshein 2018),
 * and takes UNROLL keys at a time so that their loads are in flight together; the groups' results are merged
 * in a fixed order at the end. Scores are in base 2.
 *
 * Bytes moved: the visible rows of both caches once per query. That bounds it: 2 d elements are read for 4 d
 * FLOPs. */
#include "kernels/cuda/attention/attention_band.cuh"

enum { WARPS = 8, THREADS = 32 * WARPS, UNROLL = 4 };
enum { EACH = 8 /* elements of a row that a lane holds: 16 bytes of bf16, the widest load */ };

template <typename T> struct decode_args {
    struct band band; /* length: all keys so far, those of this pass included */
    int d, group /* query heads of a head of k and v */, first, capacity;
    bool aligned;
    float scale; /* times log2 e */
    struct rows<const T> q, cache_k, cache_v;
    struct rows<T> o;
};

/* New rows of k and v, and the ring buffers that they go to. */
template <typename T> struct appended {
    int d, first, capacity;
    bool aligned;
    struct rows<const T> k, v;
    struct rows<T> cache_k, cache_v;
};

/* Elements [column, column + 8) of a row, zeros beyond d. */
template <typename T>
static __device__ __forceinline__ void load_part(const T *row, int column, int d, bool aligned,
                                                 float (&x)[EACH]) {
    if (aligned && column + EACH <= d) {
        load(row + column, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
        x[i] = column + i < d ? to_float(row[column + i]) : 0;
}

/* cache[b,(first + i) mod capacity,h,:] = x[b,i,h,:] for k and v; a warp a row. Grid: (n G / WARPS, 2 for k
 * and v, B). */
template <typename T>
static __global__ void __launch_bounds__(THREADS) append_to_cache(struct appended<T> a, int n, int heads) {
    wait_for_previous();
    int row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32, i = row / heads, h = row % heads;
    int b = (int)blockIdx.z, slot = (a.first + i) % a.capacity;
    if (i >= n)
        return;
    const rows<const T> &x = blockIdx.y ? a.v : a.k;
    const rows<T> &cache = blockIdx.y ? a.cache_v : a.cache_k;
    const T *from = x.of(b, h) + i * x.row;
    T *to = cache.of(b, h) + slot * cache.row;
    constexpr int V = VECTOR<T>;
    if (a.aligned) {
        for (int c = (int)threadIdx.x % 32 * V; c < a.d; c += 32 * V)
            *(uint4 *)(to + c) = *(const uint4 *)(from + c);
    } else {
        for (int c = (int)threadIdx.x % 32; c < a.d; c += 32)
            to[c] = from[c];
    }
}

/* The online softmax over some of the keys: their maximum score, the sum of their weights relative to 2^top,
 * and of their weighted values. */
struct softmax_state {
    float top, sum, acc[EACH];
};

/* Merge with the lane whose number differs in bit `offset`; both get the same result. */
static __device__ __forceinline__ void merge(softmax_state &p, int offset) {
    float top = fmaxf(p.top, __shfl_xor_sync(0xffffffff, p.top, offset)), factor = weight_of(p.top, top);
    p.top = top;
    p.sum *= factor;
    p.sum += __shfl_xor_sync(0xffffffff, p.sum, offset);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        p.acc[i] *= factor;
        p.acc[i] += __shfl_xor_sync(0xffffffff, p.acc[i], offset);
    }
}

/* Grid: (n, H, B). */
template <typename T, int LANES>
static __global__ void __launch_bounds__(THREADS) attend_to_cache(struct decode_args<T> a) {
    wait_for_previous();
    constexpr int GROUPS = 32 / LANES, STEP = GROUPS * UNROLL;
    __shared__ float tops[WARPS], sums[WARPS], accs[WARPS][LANES * EACH];
    const int b = (int)blockIdx.z, h = (int)blockIdx.y, i = (int)blockIdx.x;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int column = lane % LANES * EACH, group = lane / LANES;
    const interval keys = keys_of<false>(a.band, a.first + i);
    const T *cache_k = a.cache_k.of(b, h / a.group), *cache_v = a.cache_v.of(b, h / a.group);
    float q[EACH];
    load_part(a.q.of(b, h) + i * a.q.row, column, a.d, a.aligned, q);
    softmax_state p = {-INFINITY, 0, {}};
#pragma unroll
    for (int e = 0; e < EACH; e++)
        q[e] *= a.scale; /* once, instead of every score */

    for (int key0 = keys.begin + warp * STEP; key0 < keys.end; key0 += WARPS * STEP) {
        float scores[UNROLL], values[UNROLL][EACH], top = p.top;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int key = key0 + u * GROUPS + group;
            float k[EACH], dot = 0;
#pragma unroll
            for (int e = 0; e < EACH; e++)
                values[u][e] = k[e] = 0;
            if (key < keys.end) {
                int slot = key % a.capacity;
                load_part(cache_k + slot * a.cache_k.row, column, a.d, a.aligned, k);
                load_part(cache_v + slot * a.cache_v.row, column, a.d, a.aligned, values[u]);
            }
#pragma unroll
            for (int e = 0; e < EACH; e++)
                dot += q[e] * k[e];
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2)
                dot += __shfl_xor_sync(0xffffffff, dot, offset);
            scores[u] = key < keys.end ? dot : -INFINITY;
            top = fmaxf(top, scores[u]);
        }
        float factor = weight_of(p.top, top);
        p.top = top;
        p.sum *= factor;
#pragma unroll
        for (int e = 0; e < EACH; e++)
            p.acc[e] *= factor;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float weight = weight_of(scores[u], top);
            p.sum += weight;
#pragma unroll
            for (int e = 0; e < EACH; e++)
                p.acc[e] += weight * values[u][e];
        }
    }

    /* First over the warp's groups, by shuffles, then over the warps, through shared memory. */
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2)
        merge(p, offset);
    if (lane < LANES) {
#pragma unroll
        for (int e = 0; e < EACH; e++)
            accs[warp][column + e] = p.acc[e];
        tops[warp] = p.top;
        sums[warp] = p.sum;
    }
    __syncthreads();
    T *o = a.o.of(b, h) + i * a.o.row;
    float top = tops[0], sum = 0;
    for (int w = 1; w < WARPS; w++)
        top = fmaxf(top, tops[w]);
    for (int w = 0; w < WARPS; w++)
        sum += sums[w] * weight_of(tops[w], top);
    for (int c = (int)threadIdx.x; c < a.d; c += THREADS) {
        float x = 0;
        for (int w = 0; w < WARPS; w++)
            x += accs[w][c] * weight_of(tops[w], top);
        o[c] = from_float<T>(x / sum);
    }
}

void cuda_append_to_cache(struct device *dev, const struct attention_spec *s, tensor k, tensor v,
                          tensor cache_k, tensor cache_v, int64_t first) {
    const int64_t B = s->batch, n = s->length, G = attention_kv_heads(s);
    for (const tensor &t : {cache_k, cache_v})
        check_shape("append_to_cache", "cache", t, cuda_compute(dev), B, cache_k.shape[1], G, s->head_dim);
    by_dtype(k.dtype, [&](auto number) {
        using T = decltype(number);
        struct appended<T> a = {
            (int)s->head_dim, (int)first, (int)cache_k.shape[1], rows_aligned({k, v, cache_k, cache_v}),
                rows_of<const T>(k), rows_of<const T>(v), rows_of<T>(cache_k), rows_of<T>(cache_v)
        };
        launch<append_to_cache<T>>(dev, dim3((unsigned)ceil_div(n * G, WARPS), 2, (unsigned)B), THREADS, 0, a,
                                   (int)n, (int)G);
    });
}

int cuda_decode_plan(struct device *dev, const struct attention_spec *s, struct op_cost *cost,
                     struct error *e) {
    int status = attention_builtin_plan(dev, s, cost, e); /* checks head_dim: the limit is the same */
    *cost = {0, 0};
    return status;
}

void cuda_attention_decode(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                           tensor cache_k, tensor cache_v, int64_t first, tensor o) {
    int64_t B = s->batch, n = s->length, H = s->heads, d = s->head_dim, capacity = cache_k.shape[1];
    int64_t G = attention_kv_heads(s);
    check_attention_shapes("attention_decode", cuda_compute(dev), s, {q, o}, {k, v});
    cuda_append_to_cache(dev, s, k, v, cache_k, cache_v, first);
    struct attention_spec all = *s;
    all.length = first + n;
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        struct decode_args<T> a = {
            band_of(&all, tensor_none()), (int)d, (int)(H / G), (int)first, (int)capacity,
                rows_aligned({q, o, cache_k, cache_v}), (float)(s->scale *LOG2_E), rows_of<const T>(q),
                rows_of<const T>(cache_k), rows_of<const T>(cache_v), rows_of<T>(o)
        };
        dim3 grid((unsigned)n, (unsigned)H, (unsigned)B);
        if (d <= 32)
            launch<attend_to_cache<T, 4>>(dev, grid, THREADS, 0, a);
        else if (d <= 64)
            launch<attend_to_cache<T, 8>>(dev, grid, THREADS, 0, a);
        else if (d <= 128)
            launch<attend_to_cache<T, 16>>(dev, grid, THREADS, 0, a);
        else
            launch<attend_to_cache<T, 32>>(dev, grid, THREADS, 0, a);
    });
}
