/* Products of 16 x 16 and 16 x 8 N tiles by one warp, and the rows and masks they work on: for talking heads and 2-simplicial
 * attention.
 *
 * An operand is a function of row and column: A(row, k) and B(k, column) give an element, bf16 or float, and A.pair(row, k)
 * and B.pair(k, column) it and the next in k. In bf16 tensor cores multiply: a float is the sum of two bf16, so that it keeps
 * 16 bits; elements in memory are exact. In fp32 the products are FMAs. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_TILE_PRODUCTS_CUH
#define IHA_KERNELS_CUDA_ATTENTION_TILE_PRODUCTS_CUH

#include "kernels/cuda/attention/attention_band.cuh"

/* ---- the mask ---- */

/* The mask of sequence b. Whether there are segments is decided at run time: that is cheap beside a tile's products. */
static __device__ __forceinline__ struct band band_of_sequence(struct band band, int b) {
    if (band.segment_end)
        select_sequence<true>(band, b);
    return band;
}

static __device__ __forceinline__ interval visible_keys(const struct band &band, int query) {
    return band.segment_end ? keys_of<true>(band, query) : keys_of<false>(band, query);
}

static __device__ __forceinline__ interval visible_queries(const struct band &band, int key) {
    return band.segment_end ? queries_of<true>(band, key) : queries_of<false>(band, key);
}

/* ---- queries and keys ---- */

/* Queries of a sequence, from position `first` on, and the keys they attend to: the sequence's, or a ring buffer's, in which
 * key k is row k mod ring. */
struct attention_params {
    struct band band; /* length: all keys */
    int queries, first, ring, heads, d;
    bool words; /* rows can be read two elements at a time */
    float scale, scale_log2e;
};

/* rows: the tensors whose rows are operands. */
static inline struct attention_params attention_params_of(const struct attention_spec *s, tensor segments,
                                                          int64_t first, int64_t ring,
                                                          std::initializer_list<tensor> rows) {
    struct attention_spec all = *s;
    all.length = first + s->length;
    return {band_of(&all, segments),
            (int)s->length,
            (int)first,
            (int)ring,
            (int)s->heads,
            (int)s->head_dim,
            rows_aligned(rows),
            (float)s->scale,
            (float)(s->scale * LOG2_E)};
}

/* ---- operands ---- */

static __device__ __forceinline__ uint32_t packed(bf16 low, bf16 high) {
    return (uint32_t)__bfloat16_as_ushort(low) | (uint32_t)__bfloat16_as_ushort(high) << 16;
}

/* Two numbers as the sum of two bf16 each; what is bf16 has no second part. */
struct split {
    uint32_t high, low;
};

static __device__ __forceinline__ struct split split_of(bf16 x, bf16 y) {
    return {packed(x, y), 0};
}

static __device__ __forceinline__ struct split split_of(float x, float y) {
    bf16 a = __float2bfloat16_rn(x), b = __float2bfloat16_rn(y);
    return {packed(a, b), packed(__float2bfloat16_rn(x - __bfloat162float(a)),
                                 __float2bfloat16_rn(y - __bfloat162float(b)))};
}

/* Rows of a head in memory, from `first` on. From `rows` on the last one is repeated, which the caller masks; columns from d
 * on are zero. */
template <typename T> struct head_rows {
    const T *data;
    int64_t stride;
    int first, rows, ring, d;
    bool words;

    __device__ __forceinline__ const T *row(int i) const {
        int at = first + i < rows ? first + i : rows - 1;
        return data + (int64_t)(at % ring) * stride;
    }
    __device__ __forceinline__ T operator()(int i, int c) const {
        return c < d ? row(i)[c] : from_float<T>(0);
    }
    __device__ __forceinline__ struct split pair(int i, int c) const {
        if (words && sizeof(T) == 2)
            return {c < d ? (uint32_t)load_word<2>((const bf16 *)row(i) + c) : 0, 0};
        return split_of((*this)(i, c), (*this)(i, c + 1));
    }
};

template <typename T>
static __device__ __forceinline__ struct head_rows<T>
queries_from(const struct attention_params &a, const rows<const T> &x, int b, int h, int first) {
    return {x.of(b, h), x.row, first, a.queries, a.queries, a.d, a.words};
}

template <typename T>
static __device__ __forceinline__ struct head_rows<T>
keys_from(const struct attention_params &a, const rows<const T> &x, int b, int h, int first) {
    return {x.of(b, h), x.row, first, a.band.length, a.ring, a.d, a.words};
}

/* B(k, column) = f(column, k): pairs of B are pairs of a row of f. */
template <typename F>
struct transposed_rows {
    F f;
    __device__ __forceinline__ auto operator()(int k, int column) const {
        return f(column, k);
    }
    __device__ __forceinline__ struct split pair(int k, int column) const {
        return f.pair(column, k);
    }
};

/* Any function, as A and as B. */
template <typename F> struct left_operand {
    F f;
    __device__ __forceinline__ auto operator()(int row, int k) const {
        return f(row, k);
    }
    __device__ __forceinline__ struct split pair(int row, int k) const {
        return split_of(f(row, k), f(row, k + 1));
    }
};

template <typename F> struct right_operand {
    F f;
    __device__ __forceinline__ auto operator()(int k, int column) const {
        return f(k, column);
    }
    __device__ __forceinline__ struct split pair(int k, int column) const {
        return split_of(f(k, column), f(k + 1, column));
    }
};

template <typename F> static __device__ __forceinline__ left_operand<F> left(F f) {
    return {f};
}

template <typename F> static __device__ __forceinline__ right_operand<F> right(F f) {
    return {f};
}

/* d += A B, in the layout of mma_m16n8k16's D for each of N tiles. TENSOR: on tensor cores, leaving out the products of
 * two second parts. */
template <bool TENSOR, int N, typename A, typename B>
static __device__ __forceinline__ void multiply(float (&d)[N][4], A a, B b) {
    const int g = (int)threadIdx.x % 32 / 4, c = (int)threadIdx.x % 4 * 2;
    if constexpr (TENSOR) {
        constexpr bool A_EXACT = std::is_same<decltype(a(0, 0)), bf16>::value,
                       B_EXACT = std::is_same<decltype(b(0, 0)), bf16>::value;
        const struct split s[4] = {a.pair(g, c), a.pair(g + 8, c), a.pair(g, c + 8), a.pair(g + 8, c + 8)};
        const uint32_t high[4] = {s[0].high, s[1].high, s[2].high, s[3].high},
                       low[4] = {s[0].low, s[1].low, s[2].low, s[3].low};
#pragma unroll
        for (int n = 0; n < N; n++) {
            const struct split x = b.pair(c, 8 * n + g), y = b.pair(c + 8, 8 * n + g);
            const uint32_t b_high[2] = {x.high, y.high}, b_low[2] = {x.low, y.low};
            if constexpr (!A_EXACT)
                mma_m16n8k16(d[n], low, b_high);
            if constexpr (!B_EXACT)
                mma_m16n8k16(d[n], high, b_low);
            mma_m16n8k16(d[n], high, b_high);
        }
    } else {
#pragma unroll 4
        for (int k = 0; k < 16; k++) {
            const float a0 = to_float(a(g, k)), a1 = to_float(a(g + 8, k));
#pragma unroll
            for (int n = 0; n < N; n++) {
                const float b0 = to_float(b(k, 8 * n + c)), b1 = to_float(b(k, 8 * n + c + 1));
                d[n][0] += a0 * b0;
                d[n][1] += a0 * b1;
                d[n][2] += a1 * b0;
                d[n][3] += a1 * b1;
            }
        }
    }
}

template <int N> static __device__ __forceinline__ void clear(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            d[n][r] = 0;
}

/* Calls f(i, j, n, r) for each element (row i, column j) that this lane holds in d[n][r]. */
template <int N, typename F> static __device__ __forceinline__ void each_element(F f) {
    const int g = (int)threadIdx.x % 32 / 4, c = (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            f(g + r / 2 * 8, 8 * n + c + r % 2, n, r);
}

#endif
