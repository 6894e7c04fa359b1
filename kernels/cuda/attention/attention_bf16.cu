/* Fused attention without an S x S array, forward, for bf16 (Dao 2023, FlashAttention-2); and the entry
 * points of the built-in forward.
 *
 * A block of 4 warps computes a tile of queries and loops over the tiles of keys that any of them sees. Each
 * warp keeps its rows' running maximum, sum and output in registers (online softmax, Milakov & Gimelshein
 * 2018). Probabilities are computed in base 2 in registers, where they are operand A of the second product. K
 * and V have one buffer each: while one is used, the other is copied. Saved for backward: the log-sum-exp in
 * base 2, fp32 [B,H,S].
 *
 * Bytes moved: q and o once; k and v once for every tile of queries that sees them, mostly from the L2.
 * FLOPs: 4 d for every pair of a visited tile. */
#include "kernels/cuda/attention/attention_mma.cuh"

#include "kernels/cuda/attention/attention_fp32.h"

#ifdef CUDA_EMULATOR
int64_t cuda_attention_tiles;
#endif

enum { THREADS = 128, WARPS = THREADS / 32 };

template <int D> struct forward_shape {
    /* Tiles of 16 queries a warp. Registers a thread: the output takes M D / 2, the scores M KEYS / 2. */
    static constexpr int M = D <= 128 ? 2 : 1;
    static constexpr int WARP_QUERIES = 16 * M;
    static constexpr int QUERIES = WARPS * WARP_QUERIES;
    static constexpr int KEYS = 64;
    static constexpr int BLOCKS = D <= 32 ? 3 : D <= 128 ? 2 : 1; /* per SM; limits registers a thread */
    static constexpr int SHARED = (QUERIES + 2 * KEYS) * PITCH<bf16, D> * (int)sizeof(bf16);
    static_assert(SHARED <= 99 << 10, "what every GPU since sm_80 gives a block");
};

struct forward_args {
    struct band band;
    int d;
    int group; /* query heads of a head of k and v */
    bool aligned;
    float scale; /* times log2 e */
    struct rows<const bf16> q, k, v;
    struct rows<bf16> o;
    float *lse;
};

/* Online softmax: replace a tile of scores s by probabilities relative to the row's new maximum, and rescale
 * the row's sum and output so far. Maxima are unscaled scores, so that scaling by log2 e and subtracting the
 * maximum are one FMA. row_sum holds the sum over the lane's own columns only; the four lanes of a row are
 * added after the last tile. A row with no visible key yet has the maximum -inf, and then subtracts 0: -inf
 * minus -inf would be NaN. */
template <int M, int N, int DN>
static __device__ __forceinline__ void softmax(float (&s)[M][N][4], float (&acc)[M][DN][4],
                                               float (&row_max)[M][2], float (&row_sum)[M][2], float scale) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = row_max[m][half];
#pragma unroll
            for (int n = 0; n < N; n++)
                top = fmaxf(top, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1)); /* over the four lanes of the row */
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
            float shift = top == -INFINITY ? 0 : top * scale;
            float factor = exp2_fast(row_max[m][half] * scale - shift), sum = 0;
            row_max[m][half] = top;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int r = half * 2; r < half * 2 + 2; r++) {
                    s[m][n][r] = exp2_fast(s[m][n][r] * scale - shift);
                    sum += s[m][n][r];
                }
            row_sum[m][half] = row_sum[m][half] * factor + sum;
#pragma unroll
            for (int n = 0; n < DN; n++) {
                acc[m][n][half * 2] *= factor;
                acc[m][n][half * 2 + 1] *= factor;
            }
        }
}

/* Grid: (tiles of queries, H, B). The last tiles, which have the most keys under a causal mask, are started
 * first, so that the longest blocks are not the last to finish. */
template <int D, bool SEGMENTED>
static __global__ void __launch_bounds__(THREADS, forward_shape<D>::BLOCKS)
    attention_forward(struct forward_args a) {
    wait_for_previous();
    typedef forward_shape<D> shape;
    constexpr int M = shape::M, KEYS = shape::KEYS, LD = PITCH<bf16, D>;
    bf16 *tile_q = dynamic_shared<bf16>(), *tile_k = tile_q + shape::QUERIES * LD,
         *tile_v = tile_k + KEYS * LD;
    const int b = (int)blockIdx.z, h = (int)blockIdx.y, length = a.band.length;
    const int q0 = (int)(gridDim.x - 1 - blockIdx.x) * shape::QUERIES;
    const int first = q0 + warp_of() * shape::WARP_QUERIES; /* the warp's first query */
    const bf16 *k = a.k.of(b, h / a.group), *v = a.v.of(b, h / a.group);
    select_sequence<SEGMENTED>(a.band, b);
    bf16 *warp_q = tile_q + warp_of() * shape::WARP_QUERIES * LD;
    const interval keys = visibility_of<keys_of<SEGMENTED>>(a.band, q0, shape::QUERIES).any;
    const visibility warp_keys = visibility_of<keys_of<SEGMENTED>>(a.band, first, shape::WARP_QUERIES);

    float acc[M][D / 8][4], row_max[M][2], row_sum[M][2];
    clear(acc);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row_max[m][half] = -INFINITY;
            row_sum[m][half] = 0;
        }

    int k0 = keys.begin / KEYS * KEYS; /* tiles start at multiples of KEYS, whatever the window */
    load_tile<shape::QUERIES, D, THREADS>(tile_q, a.q.of(b, h), a.q.row, q0, length, a.d, a.aligned);
    load_tile<KEYS, D, THREADS>(tile_k, k, a.k.row, k0, length, a.d, a.aligned);
    cp_async_commit();
    for (; k0 < keys.end; k0 += KEYS) {
        const bool visible = overlaps(warp_keys.any, k0, KEYS); /* to this warp */
        uint32_t p[M][KEYS / 16][4];
        count_tile();
        cp_async_wait<0>();
        __syncthreads(); /* every thread's part of k has arrived, and all warps are done with the last v */
        load_tile<KEYS, D, THREADS>(tile_v, v, a.v.row, k0, length, a.d, a.aligned);
        cp_async_commit();
        if (visible) {
            float s[M][KEYS / 8][4];
            clear(s);
            multiply_rows<D>(s, warp_q, tile_k);
            if (!contains(warp_keys.all, k0, KEYS))
                apply_mask<keys_of<SEGMENTED>>(s, a.band, first, k0, -INFINITY);
            softmax(s, acc, row_max, row_sum, a.scale);
            round_fragments(p, s);
        }
        cp_async_wait<0>();
        __syncthreads(); /* every thread's part of v has arrived, and all warps are done with k */
        if (k0 + KEYS < keys.end)
            load_tile<KEYS, D, THREADS>(tile_k, k, a.k.row, k0 + KEYS, length, a.d, a.aligned);
        cp_async_commit();
        if (visible)
            multiply_columns<LD>(acc, p, tile_v);
    }

    float inverse[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = row_sum[m][half];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            inverse[m][half] = 1 / sum;
            int row = first + m * 16 + half * 8 + lane_of() / 4;
            if (lane_of() % 4 == 0 && row < length)
                a.lse[((int64_t)b * gridDim.y + h) * length + row] = row_max[m][half] * a.scale + log2f(sum);
        }
    store_rows<LD>(warp_q, acc, inverse, a.o.of(b, h), a.o.row, first, length, 0, a.d, a.aligned);
}

template <int D>
static void launch_forward(struct device *dev, const struct attention_spec *s, forward_args a) {
    typedef forward_shape<D> shape;
    dim3 grid((unsigned)ceil_div(s->length, shape::QUERIES), (unsigned)s->heads, (unsigned)s->batch);
    by_segmented(s, [&](auto segmented) {
        launch<attention_forward<D, decltype(segmented)::value>>(dev, grid, THREADS, shape::SHARED, a);
    });
}

int attention_builtin_plan(struct device *dev, const struct attention_spec *s, struct op_cost *cost,
                           struct error *e) {
    (void)dev;
    if (s->head_dim > ATTENTION_MAX_DIM)
        return fail_user(e,
                         "head_dim = %lld: attention on a GPU supports at most %d; use system.device = cpu",
                         (long long)s->head_dim, ATTENTION_MAX_DIM);
    size_t row_statistic = (size_t)(s->batch * s->heads * s->length) * sizeof(float);
    *cost = {.saved = row_statistic /* log-sum-exp */, .workspace = row_statistic /* <dO, O> */};
    return 0;
}

void attention_builtin(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                       tensor segments, tensor o, void *saved) {
    check_attention_shapes("attention", cuda_compute(dev), s, {q, o}, {k, v});
    if (q.dtype == DTYPE_F32)
        return attention_fp32(dev, s, q, k, v, segments, o, (float *)saved);
    struct forward_args a = {band_of(s, segments),       (int)s->head_dim,
                             (int)attention_group(s),    rows_aligned({q, k, v, o}),
                             (float)(s->scale * LOG2_E), rows_of<const bf16>(q),
                             rows_of<const bf16>(k),     rows_of<const bf16>(v),
                             rows_of<bf16>(o),           (float *)saved};
    if (a.d <= 32)
        launch_forward<32>(dev, s, a);
    else if (a.d <= 64)
        launch_forward<64>(dev, s, a);
    else if (a.d <= 128)
        launch_forward<128>(dev, s, a);
    else
        launch_forward<256>(dev, s, a);
}
