/* simplicial: attention to pairs of keys (2-simplicial attention, arXiv 2507.02754), of which no array of all exists:
 *
 *   A_ijk = scale sum_l q_il k_jl k'_kl over visible j and k,  P = softmax of A_i over pairs,
 *   o_i = sum_jk P_ijk v_j * v'_k
 *
 * For one query, q_i * k'_k are as many vectors as it sees keys; their products with the keys are the scores, 16 of these
 * vectors and 16 keys at a time. A block takes a query of a head, its warps the second keys in turn: a first pass finds the
 * log-sum-exp, a second one o; for dq another kernel of the same shape. With dS = P (dP - D), D = <o, do>, the gradients of
 * 16 second keys are sums over their queries and all first keys, by one warp; those of the first keys are the same with
 * the two kinds of keys exchanged. Scores are in base 2.
 *
 * FLOPs per query and visible pair of keys: 6 d forward, 22 d backward, with d up to 16, or a multiple of 64, for which o and the
 * gradients are computed 64 columns at a time. Saved: the log-sum-exp of each row in base 2, [B,H,S]. It serves the synthetic tasks, whose
 * sequences are short; it is not tuned. */
#include "kernels/cuda/attention/tile_products.cuh"

enum { TILE = 16, PITCH_OF_TILE = TILE + 1, WARPS = 4 };

template <typename T> struct simplicial_args : attention_params {
    struct rows<const T> q, k, v, k2, v2, o, d_o;
    struct rows<T> out;      /* o, or dq */
    struct rows<T> dk2, dv2; /* of the second keys, where the gradients of keys are computed */
    float *lse, *dot;        /* [B,H,S]; lse: forward writes it, unless NULL; dot: D */
};

/* Row i of a head as floats in shared memory, by all threads. */
template <typename T>
static __device__ __forceinline__ void read_row(const struct simplicial_args<T> &a, const rows<const T> &x,
                                                int b, int h, int i, float *out) {
    const T *row = x.of(b, h) + i * x.row;
    for (int c = (int)threadIdx.x; c < a.d; c += (int)blockDim.x)
        out[c] = to_float(row[c]);
}

/* d = <vector * rows of x, rows of y>, 16 of each. */
template <typename T>
static __device__ __forceinline__ void pair_products(const struct simplicial_args<T> &a, const float *vector,
                                                     const struct head_rows<T> &x, struct head_rows<T> y,
                                                     float (&d)[2][4]) {
    clear(d);
    for (int c0 = 0; c0 < a.d; c0 += 16) {
        y.d = a.d - c0;
        multiply<sizeof(T) == 2>(d, left([&](int i, int c) {
                                     return c0 + c < a.d ? vector[c0 + c] * to_float(x(i, c0 + c)) : 0.0f;
                                 }),
                                 transposed_rows<head_rows<T>>{y});
        y.data += 16;
    }
}

/* The scores of 16 second keys and 16 first ones in base 2, -inf where the query does not see both. */
template <typename T>
static __device__ __forceinline__ void scores_of(const struct simplicial_args<T> &a, const float *q,
                                                 interval keys, const struct head_rows<T> &second,
                                                 const struct head_rows<T> &first, float (&d)[2][4]) {
    pair_products(a, q, second, first, d);
    each_element<2>([&](int i, int j, int n, int r) {
        bool seen =
            second.first + i >= keys.begin && second.first + i < keys.end && first.first + j < keys.end;
        d[n][r] = seen ? d[n][r] * a.scale_log2e : -INFINITY;
    });
}

/* x += what the lanes hold of a 16 x 16 tile, times 16 rows, from `column` on. tile: shared memory of this warp. */
template <int N, typename T>
static __device__ __forceinline__ void add_product(const float (&values)[2][4], float *tile,
                                                   const struct head_rows<T> &rows, int column,
                                                   float (&x)[N][4]) {
    __syncwarp(); /* the lanes are done with what the tile held */
    each_element<2>([&](int i, int j, int n, int r) { tile[i * PITCH_OF_TILE + j] = values[n][r]; });
    __syncwarp();
    multiply<sizeof(T) == 2>(x, left([&](int i, int j) { return tile[i * PITCH_OF_TILE + j]; }),
                             right([&](int j, int c) { return rows(j, column + c); }));
}

/* The online softmax of some scores: the largest, and the sum of exponentials relative to it. */
struct softmax {
    float top, sum;
};

static __device__ __forceinline__ struct softmax merged(struct softmax x, struct softmax y) {
    float top = fmaxf(x.top, y.top);
    return {top, x.sum * weight_of(x.top, top) + y.sum * weight_of(y.top, top)};
}

/* The log-sum-exp of all pairs of a query, by the whole block. */
template <typename T>
static __device__ float log_sum_exp(const struct simplicial_args<T> &a, const float *q, interval keys, int b,
                                    int h) {
    __shared__ struct softmax parts[WARPS];
    struct softmax all = {-INFINITY, 0};
    const int warp = (int)threadIdx.x / 32;
    for (int k0 = keys.begin + warp * TILE; k0 < keys.end; k0 += WARPS * TILE)
        for (int j0 = keys.begin; j0 < keys.end; j0 += TILE) {
            float d[2][4], top = -INFINITY, sum = 0;
            scores_of(a, q, keys, keys_from(a, a.k2, b, h, k0), keys_from(a, a.k, b, h, j0), d);
            each_element<2>([&](int, int, int n, int r) { top = fmaxf(top, d[n][r]); });
            each_element<2>([&](int, int, int n, int r) { sum += weight_of(d[n][r], top); });
            all = merged(all, {top, sum});
        }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        all = merged(all, {__shfl_xor_sync(0xffffffff, all.top, offset),
                           __shfl_xor_sync(0xffffffff, all.sum, offset)});
    if (threadIdx.x % 32 == 0)
        parts[warp] = all;
    __syncthreads();
    all = parts[0];
    for (int w = 1; w < WARPS; w++)
        all = merged(all, parts[w]);
    return all.top + log2f(all.sum);
}

/* o, or with GRADIENT dq and D, of a query and head. Grid: (queries, H, B). Dynamic shared memory: 2 d floats. */
template <typename T, bool GRADIENT, int COLUMNS>
static __global__ void __launch_bounds__(32 * WARPS) simplicial_queries(const struct simplicial_args<T> a) {
    wait_for_previous();
    constexpr int COLUMN_TILES = COLUMNS / 8;
    __shared__ float tiles[WARPS][TILE * PITCH_OF_TILE], parts[WARPS][COLUMNS];
    const int i = (int)blockIdx.x, h = (int)blockIdx.y, b = (int)blockIdx.z, warp = (int)threadIdx.x / 32;
    const interval keys = visible_keys(band_of_sequence(a.band, b), a.first + i);
    const int64_t at = ((int64_t)b * a.heads + h) * a.queries + i;
    float *q = dynamic_shared<float>(), *d_o = q + a.d, lse, dot = 0;
    read_row(a, a.q, b, h, i, q);
    if (GRADIENT) {
        read_row(a, a.d_o, b, h, i, d_o);
        const T *o = a.o.of(b, h) + i * a.o.row;
        __syncthreads();
        for (int c = (int)threadIdx.x % 32; c < a.d; c += 32)
            dot += to_float(o[c]) * d_o[c];
        dot = warp_sum(dot);
        lse = a.lse[at];
        if (threadIdx.x == 0)
            a.dot[at] = dot;
    } else {
        __syncthreads();
        lse = log_sum_exp(a, q, keys, b, h);
        if (a.lse && threadIdx.x == 0)
            a.lse[at] = lse;
    }
    for (int column = 0; column < a.d; column += COLUMNS) {
        float out[COLUMN_TILES][2] = {};
        for (int k0 = keys.begin + warp * TILE; k0 < keys.end; k0 += WARPS * TILE) {
            const struct head_rows<T> k2 = keys_from(a, a.k2, b, h, k0), v2 = keys_from(a, a.v2, b, h, k0);
            float sums[COLUMN_TILES][4];
            clear(sums);
            for (int j0 = keys.begin; j0 < keys.end; j0 += TILE) {
                const struct head_rows<T> k = keys_from(a, a.k, b, h, j0), v = keys_from(a, a.v, b, h, j0);
                float p[2][4], dp[2][4];
                scores_of(a, q, keys, k2, k, p);
                if (GRADIENT)
                    pair_products(a, d_o, v2, v, dp);
                each_element<2>([&](int, int, int n, int r) {
                    p[n][r] = exp2f(p[n][r] - lse);
                    if (GRADIENT)
                        p[n][r] *= dp[n][r] - dot;
                });
                add_product(p, tiles[warp], GRADIENT ? k : v, column, sums);
            }
            each_element<COLUMN_TILES>([&](int r0, int c, int n, int r) {
                if (k0 + r0 < keys.end && column + c < a.d)
                    out[n][r % 2] += sums[n][r] * to_float((GRADIENT ? k2 : v2)(r0, column + c));
            });
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float x = out[n][e];
                for (int offset = 4; offset < 32; offset *= 2)
                    x += __shfl_xor_sync(0xffffffff, x, offset);
                if (threadIdx.x % 32 < 4)
                    parts[warp][8 * n + (int)threadIdx.x % 32 * 2 + e] = x;
            }
        __syncthreads();
        T *to = a.out.of(b, h) + i * a.out.row;
        for (int c = (int)threadIdx.x; c < COLUMNS && column + c < a.d; c += (int)blockDim.x) {
            float x = 0;
            for (int w = 0; w < WARPS; w++)
                x += parts[w][c];
            to[column + c] = from_float<T>(GRADIENT ? a.scale * x : x);
        }
        __syncthreads();
    }
}

/* The gradients of 16 second keys and their values. A block is one warp. Grid: (tiles of keys, H, B). Dynamic shared
 * memory: 2 d floats. */
template <typename T, int COLUMNS>
static __global__ void __launch_bounds__(32) simplicial_keys(const struct simplicial_args<T> a) {
    wait_for_previous();
    constexpr int COLUMN_TILES = COLUMNS / 8;
    __shared__ float tile[TILE * PITCH_OF_TILE];
    const int k0 = (int)blockIdx.x * TILE, h = (int)blockIdx.y, b = (int)blockIdx.z;
    const struct band band = band_of_sequence(a.band, b);
    const int begin = visible_queries(band, k0).begin,
              end = visible_queries(band, min(k0 + TILE, band.length) - 1).end;
    const struct head_rows<T> k2 = keys_from(a, a.k2, b, h, k0), v2 = keys_from(a, a.v2, b, h, k0);
    float *q = dynamic_shared<float>(), *d_o = q + a.d;
    for (int column = 0; column < a.d; column += COLUMNS) {
        float dk2[COLUMN_TILES][4], dv2[COLUMN_TILES][4];
        clear(dk2);
        clear(dv2);
        for (int i = begin; i < end; i++) {
            const interval keys = visible_keys(band, i);
            const int64_t at = ((int64_t)b * a.heads + h) * a.queries + i;
            const float lse = a.lse[at], dot = a.dot[at];
            __syncwarp();
            read_row(a, a.q, b, h, i, q);
            read_row(a, a.d_o, b, h, i, d_o);
            __syncwarp();
            float by_keys[COLUMN_TILES][4], by_values[COLUMN_TILES][4];
            clear(by_keys);
            clear(by_values);
            for (int j0 = keys.begin; j0 < keys.end; j0 += TILE) {
                const struct head_rows<T> k = keys_from(a, a.k, b, h, j0), v = keys_from(a, a.v, b, h, j0);
                float p[2][4], dp[2][4];
                scores_of(a, q, keys, k2, k, p);
                pair_products(a, d_o, v2, v, dp);
                each_element<2>([&](int, int, int n, int r) {
                    p[n][r] = exp2f(p[n][r] - lse);
                    dp[n][r] = p[n][r] * (dp[n][r] - dot);
                });
                add_product(p, tile, v, column, by_values);
                add_product(dp, tile, k, column, by_keys);
            }
            each_element<COLUMN_TILES>([&](int, int c, int n, int r) {
                if (column + c < a.d) {
                    dk2[n][r] += q[column + c] * by_keys[n][r];
                    dv2[n][r] += d_o[column + c] * by_values[n][r];
                }
            });
        }
        T *to_k = a.dk2.of(b, h), *to_v = a.dv2.of(b, h);
        each_element<COLUMN_TILES>([&](int r0, int c, int n, int r) {
            if (k0 + r0 < band.length && column + c < a.d) {
                to_k[(k0 + r0) * a.dk2.row + column + c] = from_float<T>(a.scale * dk2[n][r]);
                to_v[(k0 + r0) * a.dv2.row + column + c] = from_float<T>(dv2[n][r]);
            }
        });
    }
}

/* ---- launches ---- */

static size_t rows_bytes(const struct attention_spec *s) {
    return (size_t)(s->batch * s->heads * s->length) * sizeof(float);
}

int cuda_simplicial_plan(struct device *dev, const struct attention_spec *s, struct op_cost *cost,
                         struct error *e) {
    (void)dev, (void)e;
    *cost = {rows_bytes(s), rows_bytes(s)};
    return 0;
}

static void check_simplicial(struct device *dev, const char *op, const struct attention_spec *s,
                             std::initializer_list<tensor> tensors, tensor segments) {
    check_attention_shapes(op, cuda_compute(dev), s, tensors, {});
    check_segments(op, s, segments);
}

template <typename T>
static struct simplicial_args<T> args_of(const struct attention_spec *s, tensor q, tensor k, tensor v,
                                         tensor k2, tensor v2, tensor segments, int64_t first, int64_t ring) {
    struct simplicial_args<T> a = {};
    static_cast<struct attention_params &>(a) = attention_params_of(s, segments, first, ring, {k, v, k2, v2});
    a.q = rows_of<const T>(q);
    a.k = rows_of<const T>(k);
    a.v = rows_of<const T>(v);
    a.k2 = rows_of<const T>(k2);
    a.v2 = rows_of<const T>(v2);
    return a;
}

/* Call f with the columns that are computed at once, as a constant. */
template <typename F>
static void by_columns(const struct attention_spec *s, F f) {
    if (s->head_dim <= 16)
        f(std::integral_constant<int, 16>());
    else
        f(std::integral_constant<int, 64>());
}

template <typename T, bool GRADIENT>
static void run_queries(struct device *dev, const struct attention_spec *s,
                        const struct simplicial_args<T> &a) {
    const dim3 grid((unsigned)s->length, (unsigned)s->heads, (unsigned)s->batch);
    by_columns(s, [&](auto columns) {
        launch<simplicial_queries<T, GRADIENT, decltype(columns)::value>>(
            dev, grid, 32 * WARPS, (size_t)(2 * s->head_dim) * sizeof(float), a);
    });
}

void cuda_simplicial(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                     tensor k2, tensor v2, tensor segments, tensor o, void *saved) {
    check_simplicial(dev, "simplicial", s, {q, k, v, k2, v2, o}, segments);
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        struct simplicial_args<T> a = args_of<T>(s, q, k, v, k2, v2, segments, 0, s->length);
        a.out = rows_of<T>(o);
        a.lse = (float *)saved;
        run_queries<T, false>(dev, s, a);
    });
}

void cuda_simplicial_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                              tensor v, tensor k2, tensor v2, tensor segments, tensor o, tensor d_o,
                              const void *saved, tensor dq, tensor dk, tensor dv, tensor dk2, tensor dv2) {
    check_simplicial(dev, "simplicial_backward", s, {q, k, v, k2, v2, o, d_o, dq, dk, dv, dk2, dv2},
                     segments);
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        const dim3 grid((unsigned)ceil_div(s->length, TILE), (unsigned)s->heads, (unsigned)s->batch);
        const size_t shared = (size_t)(2 * s->head_dim) * sizeof(float);
        struct simplicial_args<T> a = args_of<T>(s, q, k, v, k2, v2, segments, 0, s->length);
        a.o = rows_of<const T>(o);
        a.d_o = rows_of<const T>(d_o);
        a.lse = (float *)saved;
        a.dot = (float *)cuda_workspace(dev, rows_bytes(s), "simplicial_backward");
        a.out = rows_of<T>(dq);
        run_queries<T, true>(dev, s, a);
        a.dk2 = rows_of<T>(dk2);
        a.dv2 = rows_of<T>(dv2);
        struct simplicial_args<T> exchanged = a;
        exchanged.k = a.k2;
        exchanged.v = a.v2;
        exchanged.k2 = a.k;
        exchanged.v2 = a.v;
        exchanged.dk2 = rows_of<T>(dk);
        exchanged.dv2 = rows_of<T>(dv);
        by_columns(s, [&](auto columns) {
            launch<simplicial_keys<T, decltype(columns)::value>>(dev, grid, 32, shared, a);
            launch<simplicial_keys<T, decltype(columns)::value>>(dev, grid, 32, shared, exchanged);
        });
    });
}

void cuda_simplicial_decode(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                            tensor k2, tensor v2, tensor cache_k, tensor cache_v, tensor cache_k2,
                            tensor cache_v2, int64_t first, tensor o) {
    check_simplicial(dev, "simplicial_decode", s, {q, k, v, k2, v2, o}, tensor_none());
    cuda_append_to_cache(dev, s, k, v, cache_k, cache_v, first);
    cuda_append_to_cache(dev, s, k2, v2, cache_k2, cache_v2, first);
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        struct simplicial_args<T> a =
            args_of<T>(s, q, cache_k, cache_v, cache_k2, cache_v2, tensor_none(), first, cache_k.shape[1]);
        a.out = rows_of<T>(o);
        run_queries<T, false>(dev, s, a);
    });
}
