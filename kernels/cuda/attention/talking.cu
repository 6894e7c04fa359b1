/* talking: attention whose heads are mixed before the softmax and after it (Shazeer et al. 2020, arXiv 2003.02436),
 * without an array of all scores. The algorithm is that of kernels/cpu/talking.c:
 *
 *   M_h = sum_k logits[h,k] scale q_k k_k^T over visible keys,  W = softmax(M),  U_h = sum_k weights[h,k] W_k,
 *   o_h = U_h v_h
 *
 * A block holds all heads of a tile of 16 x 16 scores in shared memory, [query][key][head]. Products with rows of q, k, v and do
 * are a warp's for each head; mixing is a warp's for the keys of each query. A weight needs its head's whole
 * row before it is mixed: one pass over the keys finds the log-sum-exp of each row, a second one the outputs.
 * Backward is three kernels with four passes over the tiles: by queries for D = sum_j W_j dW_j, and for dq and the gradients of
 * the mixing matrices; by keys for dk, and for dv. Each computes the scores again.
 *
 * Tiles are fp32. In bf16 tensor cores multiply: a number from a tile is the sum of two bf16, so that it keeps 16 bits;
 * those from memory are exact. In fp32 the products are FMAs. Scores are in base 2.
 *
 * With d in p parts (p = 1 up to d = 64, for bf16 and 16 heads up to 128) whose blocks compute the scores again, and H' heads in a
 * tile (a multiple of 16), a visible pair takes 2 p + 1 products of 2 H d FLOPs and 3 p mixings of 2 H' H' forward, 7 p + 3
 * products and 12 p mixings backward; on tensor cores, where a tile's numbers are two, most of them twice or three times.
 * Saved: the log-sum-exp of each row in base 2, [B,H,S]. */
#include "kernels/cuda/attention/tile_products.cuh"
#include "kernels/talking_limit.h"

enum { QUERIES = 16, KEYS = 16 };

/* A tile [QUERIES][KEYS][heads]: floats from one key to the next, and from one query to the next. Heads are padded to 16 for
 * the products; the rest lets the rows of an operand begin at different banks. */
struct layout {
    int padded, key, query;
};

static struct layout layout_of(const struct attention_spec *s) {
    const int padded = (int)round_up(s->heads, 16), key = padded + 4;
    return {padded, key, KEYS * key + 1};
}

static __host__ __device__ inline int tile_floats(struct layout l) {
    return QUERIES * l.query;
}

template <typename T> struct talking_args : attended {
    struct layout layout;
    struct rows<const T> q, k, v, d_o;
    struct rows<T> o, dq, dk, dv;
    const T *logits, *weights; /* [H,H] */
    float *lse, *dot;          /* [B,H,S]; lse: forward writes it, unless NULL */
    float *partials;           /* [2][blocks][H,H] */
};

/* ---- a block ---- */

/* Its shared memory: tiles, statistics, the mixing matrices, zero beyond the heads. */
template <typename T> struct shared_memory {
    float *tiles[4];
    float *lse, *sum, *dot; /* [padded][QUERIES] */
    int *begins, *ends;     /* [QUERIES] the keys that each query sees */
    T *logits, *weights;    /* [padded,padded] */
};

static size_t shared_bytes(struct layout l, size_t element, int tiles) {
    return (size_t)(tiles * tile_floats(l) + 3 * l.padded * QUERIES + 2 * QUERIES) * sizeof(float) +
           (size_t)(2 * l.padded * l.padded) * element;
}

/* Divides the shared memory, fills the matrices, and clears the tiles, whose entries for padding stay zero. */
template <typename T>
static __device__ struct shared_memory<T> prepare(const struct talking_args<T> &a, int tiles) {
    float *memory = dynamic_shared<float>();
    struct shared_memory<T> s;
    for (int i = 0; i < 4; i++)
        s.tiles[i] = memory + i * tile_floats(a.layout);
    memory += tiles * tile_floats(a.layout);
    s.lse = memory;
    s.sum = s.lse + a.layout.padded * QUERIES;
    s.dot = s.sum + a.layout.padded * QUERIES;
    s.begins = (int *)(s.dot + a.layout.padded * QUERIES);
    s.ends = s.begins + QUERIES;
    s.logits = (T *)(s.ends + QUERIES);
    s.weights = s.logits + a.layout.padded * a.layout.padded;
    for (int i = (int)threadIdx.x; i < tiles * tile_floats(a.layout); i += (int)blockDim.x)
        s.tiles[0][i] = 0;
    for (int i = (int)threadIdx.x; i < a.layout.padded * a.layout.padded; i += (int)blockDim.x) {
        int row = i / a.layout.padded, column = i % a.layout.padded;
        bool there = row < a.heads && column < a.heads;
        s.logits[i] = there ? a.logits[row * a.heads + column] : from_float<T>(0);
        s.weights[i] = there ? a.weights[row * a.heads + column] : from_float<T>(0);
    }
    return s;
}

/* The keys that queries see, and what was saved of them: lse, and with `dot` D. */
template <typename T>
static __device__ __forceinline__ void read_queries(const struct talking_args<T> &a, const struct band &band,
                                                    const struct shared_memory<T> &s, int b, int q0, bool lse,
                                                    bool dot) {
    for (int q = (int)threadIdx.x; q < QUERIES; q += (int)blockDim.x) {
        interval keys = {0, 0};
        if (q0 + q < a.queries)
            keys = visible_keys(band, a.first + q0 + q);
        s.begins[q] = keys.begin;
        s.ends[q] = keys.end;
    }
    for (int i = (int)threadIdx.x; lse && i < a.heads * QUERIES; i += (int)blockDim.x) {
        int h = i / QUERIES, q = q0 + i % QUERIES;
        int64_t at = ((int64_t)b * a.heads + h) * a.queries + q;
        s.lse[i] = q < a.queries ? a.lse[at] : 0;
        if (dot)
            s.dot[i] = q < a.queries ? a.dot[at] : 0;
    }
}

/* tile = <rows of x, rows of y> of this warp's head: scores, or gradients of the mixed weights. */
template <bool TENSOR, typename T>
static __device__ __forceinline__ void row_products(const struct talking_args<T> &a,
                                                    const struct head_rows<T> &x,
                                                    const struct head_rows<T> &y, int h, float *tile) {
    float d[2][4];
    clear(d);
    for (int c = 0; c < a.d; c += 16) {
        struct head_rows<T> from = x, to = y;
        from.data += c;
        to.data += c;
        from.d = to.d = a.d - c;
        multiply<TENSOR>(d, from, transposed_rows<head_rows<T>>{to});
    }
    each_element<2>(
        [&](int q, int key, int n, int r) { tile[q * a.layout.query + key * a.layout.key + h] = d[n][r]; });
}

/* d = rows [h0, h0 + 16) of `matrix` [padded,padded], or of its transpose, times the heads of the tile, for the keys of
 * query q. */
template <bool TENSOR, typename T>
static __device__ __forceinline__ void mix(const struct talking_args<T> &a, const T *matrix, bool transposed,
                                           const float *tile, int q, int h0, float (&d)[2][4]) {
    clear(d);
    const int padded = a.layout.padded, row = transposed ? 1 : padded, column = transposed ? padded : 1;
    const float *keys = tile + q * a.layout.query;
    for (int k0 = 0; k0 < padded; k0 += 16)
        multiply<TENSOR>(d, left([&](int i, int k) { return matrix[(h0 + i) * row + (k0 + k) * column]; }),
                         right([&](int k, int key) { return keys[key * a.layout.key + k0 + k]; }));
}

/* Call f(q, h0) for each query and 16 heads, one warp each. */
template <typename T, typename F>
static __device__ __forceinline__ void each_mixed(const struct talking_args<T> &a, F f) {
    const int warps = (int)blockDim.x / 32, sixteens = a.layout.padded / 16;
    for (int job = (int)threadIdx.x / 32; job < QUERIES * sixteens; job += warps)
        f(job % QUERIES, job / QUERIES * 16);
}

/* The sum or the maximum over a row of mix()'s d: the four lanes that hold it get it. */
static __device__ __forceinline__ float row_total(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

static __device__ __forceinline__ float row_largest(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

/* The mixed scores of query q in base 2, -inf where it does not see the key. */
template <bool TENSOR, typename T>
static __device__ __forceinline__ void mixed_scores(const struct talking_args<T> &a,
                                                    const struct shared_memory<T> &s, const float *scores,
                                                    int q, int h0, int k0, float (&m)[2][4]) {
    mix<TENSOR>(a, s.logits, false, scores, q, h0, m);
    const int begin = s.begins[q] - k0, end = s.ends[q] - k0;
    each_element<2>([&](int, int key, int n, int r) {
        m[n][r] = key >= begin && key < end ? m[n][r] * a.scale_log2e : -INFINITY;
    });
}

/* m becomes the weights. */
template <typename T>
static __device__ __forceinline__ void weigh(const struct shared_memory<T> &s, int q, int h0,
                                             float (&m)[2][4]) {
    each_element<2>(
        [&](int h, int, int n, int r) { m[n][r] = exp2f(m[n][r] - s.lse[(h0 + h) * QUERIES + q]); });
}

/* To a tile, whose entries of padding heads stay zero. */
template <typename T>
static __device__ __forceinline__ void store_mixed(const struct talking_args<T> &a, const float (&d)[2][4],
                                                   int q, int h0, float *tile) {
    each_element<2>([&](int h, int key, int n, int r) {
        if (h0 + h < a.heads)
            tile[q * a.layout.query + key * a.layout.key + h0 + h] = d[n][r];
    });
}

/* x [16 rows][8 N columns from `column`] of this warp's head, times `factor`, to memory. */
template <int N, typename T>
static __device__ __forceinline__ void store_head(const struct talking_args<T> &a, const float (&x)[N][4],
                                                  const struct rows<T> &to, int b, int h, int first, int rows,
                                                  int column, float factor) {
    T *head = to.of(b, h);
    each_element<N>([&](int i, int j, int n, int r) {
        if (first + i < rows && column + j < a.d)
            head[(first + i) * to.row + column + j] = from_float<T>(factor * x[n][r]);
    });
}

/* x += the tile of head h, by queries or (BY_KEYS) by keys, times columns of rows. */
template <bool TENSOR, bool BY_KEYS, int N, typename T>
static __device__ __forceinline__ void add_rows(const struct talking_args<T> &a, const float *tile, int h,
                                                struct head_rows<T> rows, int column, float (&x)[N][4]) {
    const int row = BY_KEYS ? a.layout.key : a.layout.query, k = BY_KEYS ? a.layout.query : a.layout.key;
    multiply<TENSOR>(x, left([&](int i, int j) { return tile[i * row + j * k + h]; }),
                     right([&](int j, int c) { return rows(j, column + c); }));
}

/* The keys that queries [q0, q0 + QUERIES) see. */
template <typename T>
static __device__ __forceinline__ interval keys_of_block(const struct talking_args<T> &a,
                                                         const struct band &band, int q0) {
    interval first = visible_keys(band, a.first + q0),
             last = visible_keys(band, a.first + min(q0 + QUERIES, a.queries) - 1);
    return {first.begin, last.end};
}

/* ---- forward ---- */

/* COLUMNS: of o that a block computes; THREADS: at most. Grid: (tiles of queries, B, parts of d). */
template <typename T, int COLUMNS, int THREADS>
static __global__ void __launch_bounds__(THREADS) talking_forward(const struct talking_args<T> a) {
    wait_for_previous();
    constexpr bool TENSOR = sizeof(T) == 2;
    const int h = (int)threadIdx.x / 32, b = (int)blockIdx.y, column = (int)blockIdx.z * COLUMNS;
    const int q0 = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES; /* the longest first */
    const struct shared_memory<T> s = prepare(a, 2);
    float *scores = s.tiles[0], *w = s.tiles[1];
    const struct band band = band_of_sequence(a.band, b);
    read_queries(a, band, s, b, q0, false, false);
    for (int i = (int)threadIdx.x; i < a.layout.padded * QUERIES; i += (int)blockDim.x) {
        s.lse[i] = -INFINITY; /* the largest score so far */
        s.sum[i] = 0;
    }
    const interval keys = keys_of_block(a, band, q0);
    __syncthreads();
    for (int k0 = keys.begin; k0 < keys.end; k0 += KEYS) {
        if (h < a.heads)
            row_products<TENSOR>(a, queries_from(a, a.q, b, h, q0), keys_from(a, a.k, b, h, k0), h, scores);
        __syncthreads();
        each_mixed(a, [&](int q, int h0) {
            float m[2][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
            mixed_scores<TENSOR>(a, s, scores, q, h0, k0, m);
            each_element<2>([&](int, int, int n, int r) { top[r / 2] = fmaxf(top[r / 2], m[n][r]); });
            const int g = (int)threadIdx.x % 32 / 4;
            float before[2], now[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                before[i] = s.lse[(h0 + g + 8 * i) * QUERIES + q];
                now[i] = fmaxf(before[i], row_largest(top[i]));
                top[i] = now[i] == -INFINITY ? 0 : now[i];
            }
            each_element<2>([&](int, int, int n, int r) { sum[r / 2] += exp2f(m[n][r] - top[r / 2]); });
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float total = row_total(sum[i]);
                if (threadIdx.x % 4 == 0) {
                    int at = (h0 + g + 8 * i) * QUERIES + q;
                    s.sum[at] = s.sum[at] * exp2f(before[i] - top[i]) + total;
                    s.lse[at] = now[i];
                }
            }
            __syncwarp();
        });
        __syncthreads();
    }
    for (int i = (int)threadIdx.x; i < a.layout.padded * QUERIES; i += (int)blockDim.x) {
        int head = i / QUERIES, q = q0 + i % QUERIES;
        s.lse[i] = s.sum[i] > 0 ? s.lse[i] + log2f(s.sum[i]) : s.sum[i] == s.sum[i] ? 0 : s.sum[i];
        if (a.lse && blockIdx.z == 0 && head < a.heads && q < a.queries)
            a.lse[((int64_t)b * a.heads + head) * a.queries + q] = s.lse[i];
    }
    float o[COLUMNS / 8][4];
    clear(o);
    __syncthreads();
    for (int k0 = keys.begin; k0 < keys.end; k0 += KEYS) {
        if (h < a.heads)
            row_products<TENSOR>(a, queries_from(a, a.q, b, h, q0), keys_from(a, a.k, b, h, k0), h, scores);
        __syncthreads();
        each_mixed(a, [&](int q, int h0) {
            float m[2][4];
            mixed_scores<TENSOR>(a, s, scores, q, h0, k0, m);
            weigh(s, q, h0, m);
            store_mixed(a, m, q, h0, w);
        });
        __syncthreads();
        each_mixed(a, [&](int q, int h0) {
            float u[2][4];
            mix<TENSOR>(a, s.weights, false, w, q, h0, u);
            store_mixed(a, u, q, h0, scores);
        });
        __syncthreads();
        if (h < a.heads)
            add_rows<TENSOR, false>(a, scores, h, keys_from(a, a.v, b, h, k0), column, o);
        __syncthreads();
    }
    if (h < a.heads)
        store_head(a, o, a.o, b, h, q0, a.queries, column, 1);
}

/* ---- backward ---- */

/* Of query q: the weights W and their gradients dW. */
template <bool TENSOR, typename T>
static __device__ __forceinline__ void
weights_and_gradients(const struct talking_args<T> &a, const struct shared_memory<T> &s, const float *scores,
                      const float *du, int q, int h0, int k0, float (&w)[2][4], float (&dw)[2][4]) {
    mixed_scores<TENSOR>(a, s, scores, q, h0, k0, w);
    weigh(s, q, h0, w);
    mix<TENSOR>(a, s.weights, true, du, q, h0, dw);
}

/* out += <head h0 + row of x, head k0 + column of y> over the tile's pairs, which are added up first: a sum over all pairs
 * in one chain would lose more to rounding. */
template <bool TENSOR, typename T>
static __device__ __forceinline__ void add_outer(const struct talking_args<T> &a, const float *x,
                                                 const float *y, int h0, int k0, float (&out)[4]) {
    float sum[1][4];
    clear(sum);
    for (int q = 0; q < QUERIES; q++, x += a.layout.query, y += a.layout.query)
        multiply<TENSOR>(sum, left([&](int i, int key) { return x[key * a.layout.key + h0 + i]; }),
                         right([&](int key, int k) { return y[key * a.layout.key + k0 + k]; }));
#pragma unroll
    for (int r = 0; r < 4; r++)
        out[r] += sum[0][r];
}

/* D, dq, and the block's share of the gradients of the mixing matrices, of which a warp has at most one part: see threads_of().
 * Grid: (blocks, 1,
 * parts of d); a block takes tiles of queries in turn, every gridDim.x-th. */
template <typename T, int COLUMNS, int THREADS>
static __global__ void __launch_bounds__(THREADS)
    talking_backward_queries(const struct talking_args<T> a, int batch) {
    wait_for_previous();
    constexpr bool TENSOR = sizeof(T) == 2;
    const int h = (int)threadIdx.x / 32, column = (int)blockIdx.z * COLUMNS;
    const int tiles = (a.queries + QUERIES - 1) / QUERIES;
    const struct shared_memory<T> s = prepare(a, 4);
    float *scores = s.tiles[0], *w = s.tiles[1], *du = s.tiles[2], *dm = s.tiles[3];
    /* A warp's part of a matrix: 16 rows and 8 columns of dlogits, then of dweights. */
    const int across = a.layout.padded / 8, parts = a.layout.padded / 16 * across;
    const int part = h % parts, row = part / across * 16, to = part % across * 8;
    float outer[4] = {};
    for (int unit = (int)blockIdx.x; unit < batch * tiles; unit += (int)gridDim.x) {
        const int b = unit % batch, q0 = (tiles - 1 - unit / batch) * QUERIES; /* the longest first */
        const struct band band = band_of_sequence(a.band, b);
        __syncthreads(); /* the tile before is done with the statistics */
        read_queries(a, band, s, b, q0, true, false);
        for (int i = (int)threadIdx.x; i < a.layout.padded * QUERIES; i += (int)blockDim.x)
            s.dot[i] = 0;
        const interval keys = keys_of_block(a, band, q0);
        auto products = [&](int k0) {
            if (h < a.heads) {
                row_products<TENSOR>(a, queries_from(a, a.q, b, h, q0), keys_from(a, a.k, b, h, k0), h,
                                     scores);
                row_products<TENSOR>(a, queries_from(a, a.d_o, b, h, q0), keys_from(a, a.v, b, h, k0), h, du);
            }
        };
        __syncthreads();
        for (int k0 = keys.begin; k0 < keys.end; k0 += KEYS) {
            products(k0);
            __syncthreads();
            each_mixed(a, [&](int q, int h0) {
                float weights[2][4], dw[2][4], sum[2] = {0, 0};
                weights_and_gradients<TENSOR>(a, s, scores, du, q, h0, k0, weights, dw);
                each_element<2>([&](int, int, int n, int r) { sum[r / 2] += weights[n][r] * dw[n][r]; });
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float total = row_total(sum[i]);
                    if (threadIdx.x % 4 == 0)
                        s.dot[(h0 + (int)threadIdx.x % 32 / 4 + 8 * i) * QUERIES + q] += total;
                }
                __syncwarp();
            });
            __syncthreads();
        }
        for (int i = (int)threadIdx.x; blockIdx.z == 0 && i < a.heads * QUERIES; i += (int)blockDim.x)
            if (q0 + i % QUERIES < a.queries)
                a.dot[((int64_t)b * a.heads + i / QUERIES) * a.queries + q0 + i % QUERIES] = s.dot[i];
        float dq[COLUMNS / 8][4];
        clear(dq);
        for (int k0 = keys.begin; k0 < keys.end; k0 += KEYS) {
            products(k0);
            __syncthreads();
            each_mixed(a, [&](int q, int h0) {
                float weights[2][4], dw[2][4];
                weights_and_gradients<TENSOR>(a, s, scores, du, q, h0, k0, weights, dw);
                each_element<2>([&](int head, int, int n, int r) {
                    dw[n][r] = weights[n][r] * (dw[n][r] - s.dot[(h0 + head) * QUERIES + q]);
                });
                store_mixed(a, weights, q, h0, w);
                store_mixed(a, dw, q, h0, dm);
            });
            __syncthreads();
            if (h < parts)
                add_outer<TENSOR>(a, dm, scores, row, to, outer);
            else if (h < 2 * parts)
                add_outer<TENSOR>(a, du, w, row, to, outer);
            __syncthreads();
            each_mixed(a, [&](int q, int h0) {
                float ds[2][4];
                mix<TENSOR>(a, s.logits, true, dm, q, h0, ds);
                store_mixed(a, ds, q, h0, w);
            });
            __syncthreads();
            if (h < a.heads)
                add_rows<TENSOR, false>(a, w, h, keys_from(a, a.k, b, h, k0), column, dq);
            __syncthreads();
        }
        if (h < a.heads)
            store_head(a, dq, a.dq, b, h, q0, a.queries, column, a.scale);
    }
    if (blockIdx.z > 0 || h >= 2 * parts)
        return;
    const int H = a.heads, g = (int)threadIdx.x % 32 / 4, c = (int)threadIdx.x % 4 * 2;
    float *partial = a.partials + ((int64_t)(h / parts) * gridDim.x + blockIdx.x) * H * H;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int i = row + g + r / 2 * 8, j = to + c + r % 2;
        if (i < H && j < H)
            partial[i * H + j] = (h < parts ? a.scale : 1) * outer[r];
    }
}

/* dk, or with VALUES dv, of a tile of keys. Grid: (tiles of keys, B, parts of d). */
template <typename T, bool VALUES, int COLUMNS, int THREADS>
static __global__ void __launch_bounds__(THREADS) talking_backward_keys(const struct talking_args<T> a) {
    wait_for_previous();
    constexpr bool TENSOR = sizeof(T) == 2;
    const int h = (int)threadIdx.x / 32, b = (int)blockIdx.y, column = (int)blockIdx.z * COLUMNS;
    const int k0 = (int)blockIdx.x * KEYS;
    const struct shared_memory<T> s = prepare(a, 3);
    float *scores = s.tiles[0], *w = s.tiles[1], *du = s.tiles[2];
    const struct band band = band_of_sequence(a.band, b);
    const int begin = visible_queries(band, k0).begin,
              end = visible_queries(band, min(k0 + KEYS, band.length) - 1).end;
    float gradient[COLUMNS / 8][4];
    clear(gradient);
    for (int q0 = begin; q0 < end; q0 += QUERIES) {
        __syncthreads();
        read_queries(a, band, s, b, q0, true, !VALUES);
        if (h < a.heads) {
            row_products<TENSOR>(a, queries_from(a, a.q, b, h, q0), keys_from(a, a.k, b, h, k0), h, scores);
            if (!VALUES)
                row_products<TENSOR>(a, queries_from(a, a.d_o, b, h, q0), keys_from(a, a.v, b, h, k0), h, du);
        }
        __syncthreads();
        each_mixed(a, [&](int q, int h0) {
            float weights[2][4], dw[2][4];
            if (VALUES) {
                mixed_scores<TENSOR>(a, s, scores, q, h0, k0, weights);
                weigh(s, q, h0, weights);
                store_mixed(a, weights, q, h0, w);
                return;
            }
            weights_and_gradients<TENSOR>(a, s, scores, du, q, h0, k0, weights, dw);
            each_element<2>([&](int head, int, int n, int r) {
                dw[n][r] = weights[n][r] * (dw[n][r] - s.dot[(h0 + head) * QUERIES + q]);
            });
            store_mixed(a, dw, q, h0, w);
        });
        __syncthreads();
        each_mixed(a, [&](int q, int h0) {
            float u[2][4];
            mix<TENSOR>(a, VALUES ? s.weights : s.logits, !VALUES, w, q, h0, u);
            store_mixed(a, u, q, h0, scores);
        });
        __syncthreads();
        if (h < a.heads)
            add_rows<TENSOR, true>(a, scores, h, queries_from(a, VALUES ? a.d_o : a.q, b, h, q0), column,
                                   gradient);
    }
    if (h < a.heads)
        store_head(a, gradient, VALUES ? a.dv : a.dk, b, h, k0, band.length, column, VALUES ? 1 : a.scale);
}

/* ---- launches ---- */

/* A warp a head, and enough for the parts, of 16 by 8, of both matrices' gradients. */
static int threads_of(const struct attention_spec *s) {
    const int padded = layout_of(s).padded, parts = 2 * (padded / 16) * (padded / 8);
    return 32 * (s->heads > parts ? (int)s->heads : parts);
}

static size_t shared_of(const struct attention_spec *s, size_t element, int tiles) {
    return shared_bytes(layout_of(s), element, tiles);
}

static int64_t backward_blocks(const struct device *dev, const struct attention_spec *s) {
    return min64(s->batch * ceil_div(s->length, QUERIES), 2 * dev->sm_count);
}

static int64_t rows_in_all(const struct attention_spec *s) {
    return s->batch * s->heads * s->length;
}

/* D of every row, then the partial sums. */
static size_t workspace_bytes(const struct device *dev, const struct attention_spec *s) {
    return (size_t)(round_up(rows_in_all(s), 64) + 2 * backward_blocks(dev, s) * s->heads * s->heads) *
           sizeof(float);
}

int cuda_talking_plan(struct device *dev, const struct attention_spec *s, struct op_cost *cost,
                      struct error *e) {
    if (s->heads > TALKING_MAX_HEADS)
        return fail_user(e, TALKING_TOO_MANY_HEADS, (long long)s->heads, TALKING_MAX_HEADS);
    const size_t needed = shared_of(s, dtype_bytes(cuda_compute(dev)), 4);
    if (needed > dev->shared_limit)
        return fail_user(e,
                         "talking layers of %lld heads need %zu KiB of shared memory, this GPU has %zu; use "
                         "fewer heads or "
                         "system.device = cpu",
                         (long long)s->heads, (needed + 1023) >> 10, dev->shared_limit >> 10);
    *cost = {(size_t)rows_in_all(s) * sizeof(float), workspace_bytes(dev, s)};
    return 0;
}

static void check_talking(struct device *dev, const char *op, const struct attention_spec *s, tensor segments,
                          tensor logits, tensor weights) {
    check_segments(op, s, segments);
    check_shape(op, "logits", logits, cuda_compute(dev), s->heads, s->heads);
    check_shape(op, "weights", weights, cuda_compute(dev), s->heads, s->heads);
}

/* What forward, backward and decoding have in common. */
template <typename T>
static struct talking_args<T> args_of(const struct attention_spec *s, tensor q, tensor k, tensor v,
                                      tensor segments, tensor logits, tensor weights, int64_t first,
                                      int64_t ring) {
    struct talking_args<T> a = {};
    static_cast<struct attended &>(a) = attended_of(s, segments, first, ring, {q, k, v});
    a.layout = layout_of(s);
    a.q = rows_of<const T>(q);
    a.k = rows_of<const T>(k);
    a.v = rows_of<const T>(v);
    a.logits = (const T *)logits.data;
    a.weights = (const T *)weights.data;
    return a;
}

/* Call f with the columns of d that a block computes, and its most threads, as constants: the fewer threads, the more
 * registers they have. Not every case is worth its code in fp32. */
template <typename T, typename F>
static void by_shape(const struct attention_spec *s, F f) {
    constexpr bool BF16 = sizeof(T) == 2;
    const int threads = threads_of(s);
    typedef std::integral_constant<int, 64> narrow;
    typedef std::integral_constant<int, BF16 ? 128 : 64> wide;
    if (threads > 640 || (!BF16 && threads > 512))
        f(narrow(), std::integral_constant<int, 1024>());
    else if (threads > 512)
        f(narrow(), std::integral_constant < int, BF16 ? 640 : 1024 > ());
    else if (s->head_dim <= 64)
        f(narrow(), std::integral_constant<int, 512>());
    else
        f(wide(), std::integral_constant<int, 512>());
}

template <typename T>
static void run_forward(struct device *dev, const struct attention_spec *s, const struct talking_args<T> &a) {
    by_shape<T>(s, [&](auto columns, auto threads) {
        constexpr int COLUMNS = decltype(columns)::value, THREADS = decltype(threads)::value;
        dim3 grid((unsigned)ceil_div(s->length, QUERIES), (unsigned)s->batch,
                  (unsigned)ceil_div(s->head_dim, COLUMNS));
        launch<talking_forward<T, COLUMNS, THREADS>>(dev, grid, threads_of(s), shared_of(s, sizeof(T), 2), a);
    });
}

void cuda_talking(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                  tensor segments, tensor logits, tensor weights, tensor o, void *saved) {
    check_attention_shapes("talking", cuda_compute(dev), s, {q, o}, {k, v});
    check_talking(dev, "talking", s, segments, logits, weights);
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        struct talking_args<T> a = args_of<T>(s, q, k, v, segments, logits, weights, 0, s->length);
        a.o = rows_of<T>(o);
        a.lse = (float *)saved;
        run_forward(dev, s, a);
    });
}

void cuda_talking_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                           tensor segments, tensor logits, tensor weights, tensor d_o, const void *saved,
                           tensor dq, tensor dk, tensor dv, tensor dlogits, tensor dweights,
                           bool accumulate) {
    const int64_t H = s->heads, blocks = backward_blocks(dev, s);
    check_attention_shapes("talking_backward", cuda_compute(dev), s, {q, d_o, dq}, {k, v, dk, dv});
    check_talking(dev, "talking_backward", s, segments, logits, weights);
    check_shape("talking_backward", "dlogits", dlogits, DTYPE_F32, H, H);
    check_shape("talking_backward", "dweights", dweights, DTYPE_F32, H, H);
    float *dot = (float *)cuda_workspace(dev, workspace_bytes(dev, s), "talking_backward"),
          *partials = dot + round_up(rows_in_all(s), 64);
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        struct talking_args<T> a = args_of<T>(s, q, k, v, segments, logits, weights, 0, s->length);
        a.words = a.words && rows_aligned({d_o});
        a.d_o = rows_of<const T>(d_o);
        a.dq = rows_of<T>(dq);
        a.dk = rows_of<T>(dk);
        a.dv = rows_of<T>(dv);
        a.lse = (float *)saved;
        a.dot = dot;
        a.partials = partials;
        by_shape<T>(s, [&](auto columns, auto threads) {
            constexpr int COLUMNS = decltype(columns)::value, THREADS = decltype(threads)::value;
            const unsigned parts = (unsigned)ceil_div(s->head_dim, COLUMNS);
            const dim3 keys((unsigned)ceil_div(s->length, KEYS), (unsigned)s->batch, parts);
            launch<talking_backward_queries<T, COLUMNS, THREADS>>(dev, dim3((unsigned)blocks, 1, parts),
                                                                  threads_of(s), shared_of(s, sizeof(T), 4),
                                                                  a, (int)s->batch);
            launch<talking_backward_keys<T, false, COLUMNS, THREADS>>(dev, keys, threads_of(s),
                                                                      shared_of(s, sizeof(T), 3), a);
            launch<talking_backward_keys<T, true, COLUMNS, THREADS>>(dev, keys, threads_of(s),
                                                                     shared_of(s, sizeof(T), 3), a);
        });
    });
    sum_partials(dev, partials, (int)blocks, H * H,
                 {{(float *)dlogits.data, accumulate}, {(float *)dweights.data, accumulate}});
}

void cuda_talking_decode(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                         tensor logits, tensor weights, tensor cache_k, tensor cache_v, int64_t first,
                         tensor o) {
    check_attention_shapes("talking_decode", cuda_compute(dev), s, {q, o}, {k, v});
    check_talking(dev, "talking_decode", s, tensor_none(), logits, weights);
    cuda_append_to_cache(dev, s, k, v, cache_k, cache_v, first);
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        struct talking_args<T> a =
            args_of<T>(s, q, cache_k, cache_v, tensor_none(), logits, weights, first, cache_k.shape[1]);
        a.o = rows_of<T>(o);
        run_forward(dev, s, a);
    });
}
