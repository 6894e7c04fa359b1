/* What forward and backward of talking heads share: see talking.cu.
 *
 * A block holds all heads of a tile of 16 x 16 scores in shared memory, [query][key][head]. Products with rows of q, k, v and do
 * are a warp's for each head; mixing is a warp's for the keys of each query.
 * Tiles are fp32, and are multiplied as tile_products.cuh says. Scores are in base 2. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_TALKING_CUH
#define IHA_KERNELS_CUDA_ATTENTION_TALKING_CUH

#include "kernels/cuda/attention/tile_products.cuh"
#include "kernels/talking_shape.h"

enum { QUERIES = 16, KEYS = 16 };

/* A tile [QUERIES][KEYS][heads]: floats from one key to the next, and from one query to the next. Heads are padded to 16 for
 * the products; the rest lets the rows of an operand begin at different banks. */
struct layout {
    int padded, key, query;
};

static inline struct layout layout_of(const struct attention_spec *s) {
    const int padded = (int)talking_padded_heads(s->heads), key = padded + 4;
    return {padded, key, KEYS * key + 1};
}

static __host__ __device__ inline int tile_floats(struct layout l) {
    return QUERIES * l.query;
}

template <typename T> struct talking_args : attention_params {
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

static inline size_t shared_bytes(struct layout l, size_t element, int tiles) {
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

/* tile = <rows of queries x from q0, rows of keys y from k0>, for each head by its warp. */
template <bool TENSOR, typename T>
static __device__ __forceinline__ void row_products(const struct talking_args<T> &a, const rows<const T> &x,
                                                    const rows<const T> &y, int b, int q0, int k0,
                                                    float *tile) {
    const int h = (int)threadIdx.x / 32;
    if (h >= a.heads)
        return;
    struct head_rows<T> from = queries_from(a, x, b, h, q0), to = keys_from(a, y, b, h, k0);
    float d[2][4];
    clear(d);
    for (; from.d > 0; from.d -= 16, from.data += 16, to.d -= 16, to.data += 16)
        multiply<TENSOR>(d, from, transposed_rows<head_rows<T>>{to});
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

/* ---- launches ---- */

/* A warp a head, and enough for the parts, of 16 by 8, of both matrices' gradients. */
static inline int threads_of(const struct attention_spec *s) {
    const int padded = layout_of(s).padded, parts = 2 * (padded / 16) * (padded / 8);
    return 32 * (s->heads > parts ? (int)s->heads : parts);
}

static inline size_t shared_of(const struct attention_spec *s, size_t element, int tiles) {
    return shared_bytes(layout_of(s), element, tiles);
}

static inline int64_t backward_blocks(const struct device *dev, const struct attention_spec *s) {
    return min64(s->batch * ceil_div(s->length, QUERIES), 2 * dev->sm_count);
}

static inline int64_t rows_in_all(const struct attention_spec *s) {
    return s->batch * s->heads * s->length;
}

/* D of every row, then the partial sums. */
static inline size_t workspace_bytes(const struct device *dev, const struct attention_spec *s) {
    return (size_t)(round_up(rows_in_all(s), 64) + 2 * backward_blocks(dev, s) * s->heads * s->heads) *
           sizeof(float);
}

static inline void check_talking(struct device *dev, const char *op, const struct attention_spec *s,
                                 tensor segments, tensor logits, tensor weights) {
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
    static_cast<struct attention_params &>(a) = attention_params_of(s, segments, first, ring, {q, k, v});
    a.layout = layout_of(s);
    a.q = rows_of<const T>(q);
    a.k = rows_of<const T>(k);
    a.v = rows_of<const T>(v);
    a.logits = (const T *)logits.data;
    a.weights = (const T *)weights.data;
    return a;
}

/* Call f with the columns of d that a block computes, and its most threads, as constants: the fewer threads, the more
 * registers they have. In fp32, which is there to check, 640 threads are not worth the code. */
template <typename T, typename F>
static inline void by_shape(const struct attention_spec *s, F f) {
    constexpr bool BF16 = sizeof(T) == 2;
    typedef std::integral_constant<int, 64> narrow;
    typedef std::integral_constant<int, BF16 ? 128 : 64> wide;
    typedef std::integral_constant<int, BF16 ? 640 : 1024> middle;
    const int threads = threads_of(s);
    if (talking_columns(s->heads, s->head_dim, BF16) > 64)
        f(wide(), std::integral_constant<int, 512>());
    else if (threads <= 512)
        f(narrow(), std::integral_constant<int, 512>());
    else if (threads <= middle::value)
        f(narrow(), middle());
    else
        f(narrow(), std::integral_constant<int, 1024>());
}

#endif
