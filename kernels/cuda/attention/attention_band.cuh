/* What the built-in attention kernels share: the mask, the layout of a head's rows in global memory, and
 * loading tiles of rows into shared memory.
 *
 * The visible pairs form a band: the keys that a query sees are one interval, both of whose ends grow with
 * the query (attention_segment_keys() in kernels/kernels.h), and so are the queries that see a key. So the
 * tiles that a range of rows needs are one range as well, and the first and the last row decide whether a
 * tile is wholly visible and needs no mask.
 *
 * Segments are data on the device and may differ in every call, in number too, so that a graph of the call
 * can be replayed. Kernels have a template parameter SEGMENTED: without segments they do not pay for them. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BAND_CUH
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BAND_CUH

#include "kernels/cuda/attention/attention_bf16.h"
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/mma.cuh"

/* ---- the mask ---- */

struct band {
    int length, pseudo /* P, for token masks and segments */, window /* 0: none */;
    bool causal, token_mask;
    /* SEGMENTED: the first token of each token's segment, and one past its last. [B,T]; [T] of one sequence
     * after select_sequence(). */
    const int32_t *segment_begin, *segment_end;
    int tokens; /* T */
};

struct interval {
    int begin, end;
};

/* segments i32 [2,B,T], read where spec.segmented. */
static inline struct band band_of(const struct attention_spec *s, tensor segments) {
    bool windowed = s->window > 0 && s->window < s->length; /* a wider one masks nothing */
    const int32_t *begin = (const int32_t *)segments.data;
    int64_t T = s->length / s->pseudo;
    return {(int)s->length,
            (int)s->pseudo,
            windowed ? (int)s->window : 0,
            s->causal,
            s->token_mask && s->pseudo > 1,
            begin,
            s->segmented ? begin + s->batch * T : NULL,
            (int)T};
}

/* On the host: call f with whether there are segments as a constant. */
template <typename F> void by_segmented(const struct attention_spec *s, F f) {
    if (s->segmented)
        f(std::true_type());
    else
        f(std::false_type());
}

/* Make the segments those of sequence b. */
template <bool SEGMENTED> static __device__ __forceinline__ void select_sequence(struct band &band, int b) {
    if constexpr (SEGMENTED) {
        band.segment_begin += (int64_t)b * band.tokens;
        band.segment_end += (int64_t)b * band.tokens;
    }
}

/* The part of x in the segment of this row. Rows beyond the last count as the last. */
template <bool SEGMENTED>
static __device__ __forceinline__ interval in_segment(const struct band &b, int row, interval x) {
    if constexpr (SEGMENTED) {
        int at = min(row, b.length - 1), token = b.pseudo == 1 ? at : at / b.pseudo;
        x.begin = max(x.begin, b.segment_begin[token] * b.pseudo);
        x.end = min(x.end, b.segment_end[token] * b.pseudo);
    }
    return x;
}

template <bool SEGMENTED>
static __device__ __forceinline__ interval keys_of(const struct band &b, int query) {
    int end = !b.causal ? b.length : b.token_mask ? (query / b.pseudo + 1) * b.pseudo : query + 1;
    return in_segment<SEGMENTED>(b, query,
                                 {b.window > 0 ? max(query - b.window + 1, 0) : 0, min(end, b.length)});
}

template <bool SEGMENTED>
static __device__ __forceinline__ interval queries_of(const struct band &b, int key) {
    int begin = !b.causal ? 0 : b.token_mask ? key - key % b.pseudo : key;
    return in_segment<SEGMENTED>(b, key, {begin, b.window > 0 ? min(key + b.window, b.length) : b.length});
}

/* What a range of rows sees: `any` is the union of their intervals, `all` the intersection (empty when
 * begin >= end). Both are empty for rows beyond the last. */
struct visibility {
    interval any, all;
};

template <interval (*VISIBLE)(const struct band &, int)>
static __device__ __forceinline__ visibility visibility_of(const struct band &b, int first, int rows) {
    if (first >= b.length)
        return {{0, 0}, {0, 0}};
    interval low = VISIBLE(b, first), high = VISIBLE(b, min(first + rows, b.length) - 1);
    return {{low.begin, high.end}, {high.begin, low.end}};
}

static __device__ __forceinline__ bool overlaps(interval a, int begin, int count) {
    return a.begin < begin + count && begin < a.end;
}

static __device__ __forceinline__ bool contains(interval a, int begin, int count) {
    return a.begin <= begin && begin + count <= a.end;
}

#ifdef CUDA_EMULATOR
/* Tiles visited since the program began: tests check that those without a visible pair are skipped. */
extern "C" int64_t cuda_attention_tiles;
#endif

static __device__ __forceinline__ void count_tile() {
#ifdef CUDA_EMULATOR
    cuda_attention_tiles += threadIdx.x == 0;
#endif
}

/* 2^(score - top), a weight before it is divided by the sum of all. With a maximum of -inf (no keys yet) nothing is subtracted: -inf minus -inf would be NaN. */
static __device__ __forceinline__ float weight_of(float score, float top) {
    return exp2f(score - (top == -INFINITY ? 0 : top));
}

/* ---- rows in global memory ---- */

/* A [B,S,H,d] tensor; strides in elements. */
template <typename T> struct rows {
    T *data;
    int64_t batch, row, head;

    __device__ __forceinline__ T *of(int b, int h) const {
        return data + b * batch + h * head;
    }
};

template <typename T> static inline struct rows<T> rows_of(tensor t) {
    return {(T *)t.data, t.stride[0], t.stride[1], t.stride[2]};
}

/* Whether rows of these tensors can be accessed 16 bytes at a time. */
static inline bool
rows_aligned(std::initializer_list<tensor> tensors) {
    for (const tensor &t : tensors) {
        int64_t each = 16 / (int64_t)dtype_bytes(t.dtype);
        bool ok = aligned16({t.data}) && t.shape[3] % each == 0;
        for (int i = 0; i < 3; i++)
            ok = ok && (t.shape[i] == 1 || t.stride[i] % each == 0);
        if (!ok)
            return false;
    }
    return true;
}

/* ---- tiles in shared memory ---- */

/* Elements from one row of a tile to the next. The 16 bytes of padding keep rows aligned for 16-byte accesses
 * and let any 8 consecutive rows start at different banks: ldmatrix reads them without bank conflicts. */
template <typename T, int D> constexpr int PITCH = D + VECTOR<T>;

/* Start an asynchronous copy of ROWS rows of a head, from row `first`, into a tile; zeros beyond the last row
 * and beyond d. The caller commits the group, waits for it and has a barrier before the tile is read.
 * Unaligned rows are copied synchronously, an element at a time. */
template <int ROWS, int D, int THREADS, typename T>
static __device__ __forceinline__ void load_tile(T *tile, const T *head, int64_t stride, int first,
                                                 int length, int d, bool aligned) {
    /* Neighbouring threads copy neighbouring vectors of a row (coalesced), each thread always the same
     * column, so that only the row's address changes from step to step. */
    constexpr int V = VECTOR<T>, CHUNKS = D / V, STEP = THREADS / CHUNKS /* rows at once */;
    static_assert(THREADS % CHUNKS == 0, "a thread copies one column of vectors");
    static_assert(ROWS % STEP == 0 || ROWS < STEP, "whole steps");
    int row = (int)threadIdx.x / CHUNKS, column = (int)threadIdx.x % CHUNKS * V;
    const T *from = head + (int64_t)(first + row) * stride + column;
    T *to = tile + row * PITCH<T, D> + column;
    if (ROWS < STEP && row >= ROWS)
        return;
    if (!aligned) {
#pragma unroll 1 /* the rare case: short code rather than fast */
        for (; row < ROWS; row += STEP, from += STEP * stride, to += STEP * PITCH<T, D>)
#pragma unroll 1
            for (int j = 0; j < V; j++)
                to[j] = first + row < length && column + j < d ? from[j] : from_float<T>(0);
        return;
    }
    const int rows = column < d ? length - first : 0;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP, from += STEP * stride)
        cp_async<16>(to + i * PITCH<T, D>, row + i < rows ? from : head, row + i < rows);
}

#endif
