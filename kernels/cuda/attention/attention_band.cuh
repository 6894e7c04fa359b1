/* What the kernels of the backend's own attention share: who sees whom, where a head's rows lie, and how a
 * tile of them comes into shared memory and results go back.
 *
 * The visible pairs form a band: the keys of a query are one interval, both of whose ends grow with the query
 * (attention_keys() in kernels/kernels.h), and so are the queries of a key. Hence the tiles that a run of
 * rows needs are one run as well, and the first and the last row tell whether a tile is wholly visible. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BAND_CUH
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BAND_CUH

#include "kernels/cuda/attention/attention_bf16.h"
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/mma.cuh"

/* ---- who sees whom ---- */

struct band {
    int length, pseudo, window /* 0: none */;
    bool causal, token_mask;
};

struct interval {
    int begin, end;
};

static inline struct band band_of(const struct attention_spec *s) {
    bool windowed = s->window > 0 && s->window < s->length; /* a wider one hides nothing */
    return {(int)s->length, (int)s->pseudo, windowed ? (int)s->window : 0, s->causal,
            s->token_mask && s->pseudo > 1};
}

static __device__ __forceinline__ interval keys_of(const struct band &b, int query) {
    int end = !b.causal ? b.length : b.token_mask ? (query / b.pseudo + 1) * b.pseudo : query + 1;
    return {b.window > 0 ? max(query - b.window + 1, 0) : 0, min(end, b.length)};
}

static __device__ __forceinline__ interval queries_of(const struct band &b, int key) {
    int begin = !b.causal ? 0 : b.token_mask ? key - key % b.pseudo : key;
    return {begin, b.window > 0 ? min(key + b.window, b.length) : b.length};
}

/* What a run of rows sees: at least one of them everything in `any`, all of them everything in `all`. Empty
 * for rows beyond the last. */
struct sight {
    interval any, all;
};

template <interval (*SEEN)(const struct band &, int)>
static __device__ __forceinline__ sight sight_of(const struct band &b, int first, int rows) {
    if (first >= b.length)
        return {{0, 0}, {0, 0}};
    interval low = SEEN(b, first), high = SEEN(b, min(first + rows, b.length) - 1);
    return {{low.begin, high.end}, {high.begin, low.end}};
}

static __device__ __forceinline__ bool overlaps(interval a, int begin, int count) {
    return a.begin < begin + count && begin < a.end;
}

static __device__ __forceinline__ bool contains(interval a, int begin, int count) {
    return a.begin <= begin && begin + count <= a.end;
}

#ifdef CUDA_EMULATOR
/* Tiles visited since the program began, counted where kernels run on a CPU. */
extern "C" int64_t cuda_attention_tiles;
#endif

static __device__ __forceinline__ void count_tile() {
#ifdef CUDA_EMULATOR
    cuda_attention_tiles += threadIdx.x == 0;
#endif
}

/* ---- where rows lie ---- */

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

/* May rows of these tensors be accessed 16 bytes at a time? */
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

/* Elements from one row of a tile to the next: 16 bytes more than D, so that rows start at different banks.
 */
template <typename T, int D> constexpr int PITCH = D + VECTOR<T>;

/* Begin to copy ROWS rows of a head, from `first`, into a tile; zeros beyond the last row and beyond d. The
 * caller commits, waits, and has a barrier. Unaligned rows are copied at once, an element at a time. */
template <int ROWS, int D, int THREADS, typename T>
static __device__ __forceinline__ void load_tile(T *tile, const T *head, int64_t stride, int first,
                                                 int length, int d, bool aligned) {
    constexpr int V = VECTOR<T>, CHUNKS = D / V, STEP = THREADS / CHUNKS /* rows at once */;
    static_assert(THREADS % CHUNKS == 0, "a thread copies one column of vectors");
    static_assert(ROWS % STEP == 0 || ROWS < STEP, "whole steps");
    int row = (int)threadIdx.x / CHUNKS, column = (int)threadIdx.x % CHUNKS * V;
    const T *from = head + (int64_t)(first + row) * stride + column;
    T *to = tile + row * PITCH<T, D> + column;
    if (ROWS < STEP && row >= ROWS)
        return;
    if (!aligned) {
#pragma unroll 1
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
