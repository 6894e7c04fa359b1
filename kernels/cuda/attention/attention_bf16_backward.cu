/* Fused attention, backward, for bf16: with P = exp2(scale log2(e) q k^T - lse) and delta = rowsum(dO * O),
 *
 *     dV = P^T dO       dS = P (dO V^T - delta)       dK = scale dS^T Q       dQ = scale dS K
 *
 * Two kernels, so that every sum is computed by one warp in a fixed order and is bit-identical from run to
 * run: a block of attention_backward_dkdv has a tile of keys and loops over the queries that see it; a block
 * of attention_backward_dq has a tile of queries and loops over its keys. Both compute the scores and dO V^T,
 * so there are 7 products where a single kernel that adds to dQ atomically has 5: determinism costs 1.4 times
 * the work, but no memory that grows with the square of S.
 *
 * Both have the same form: two tiles stay in shared memory (K and V, or Q and dO), two are streamed (Q and
 * dO, or K and V) through two buffers each, one being copied while the other is used. A warp's rows are rows
 * of the tiles that stay, so P and dS, rounded to bf16, are in registers in the layout of the next product's
 * A.
 *
 * Saved from forward: lse, fp32 [B,H,S]. Workspace: delta, fp32 [B,H,S]. */
#include "kernels/cuda/attention/attention_mma.cuh"

#include "kernels/cuda/attention/attention_fp32.h"

enum { THREADS = 128, WARPS = THREADS / 32 };

template <int D> struct backward_shape {
    static constexpr int M = D <= 64 ? 2 : 1; /* tiles of 16 rows a warp; dK and dV take M OUT registers */
    static constexpr int WARP_ROWS = 16 * M;
    static constexpr int ROWS = WARPS * WARP_ROWS;
    static constexpr int COLUMNS = D <= 128 ? 32 : 16; /* rows of the streamed tiles; SHARED sets the limit */
    static constexpr int OUT = D <= 128 ? D : 128;     /* columns of dK and dV that a block computes */
    static constexpr int UNROLL = D == 64 ? 2 : D / 16; /* of the dK, dV kernel; more would spill registers */
    static constexpr bool REGISTERS = D == 128;         /* the dQ kernel has enough to hold Q and dO */
    static constexpr int BLOCKS = D <= 128 ? 2 : 1;     /* per SM; limits registers a thread */
    static constexpr int SHARED = (2 * ROWS + 4 * COLUMNS) * PITCH<bf16, D> * (int)sizeof(bf16);
    static_assert(SHARED <= 99 << 10, "what every GPU since sm_80 gives a block");
};

struct backward_args {
    struct band band;
    int d;
    int group; /* query heads of a head of k and v */
    bool aligned;
    float scale, scale_log2e;
    struct rows<const bf16> q, k, v, d_o;
    struct rows<bf16> dq, dk, dv;
    const float *lse, *delta;
};

/* The two streamed tiles, double-buffered, and the rows in global memory they are loaded from. */
template <int D> struct streamed_tiles {
    const bf16 *x, *y;
    int64_t x_stride, y_stride;
    bf16 *tiles;

    static constexpr int SIZE = backward_shape<D>::COLUMNS * PITCH<bf16, D>;

    __device__ __forceinline__ bf16 *tile_x(int iteration) const {
        return tiles + iteration % 2 * 2 * SIZE;
    }

    __device__ __forceinline__ bf16 *tile_y(int iteration) const {
        return tile_x(iteration) + SIZE;
    }

    __device__ __forceinline__ void load(const backward_args &a, int iteration, int first) const {
        constexpr int COLUMNS = backward_shape<D>::COLUMNS;
        load_tile<COLUMNS, D, THREADS>(tile_x(iteration), x, x_stride, first, a.band.length, a.d, a.aligned);
        load_tile<COLUMNS, D, THREADS>(tile_y(iteration), y, y_stride, first, a.band.length, a.d, a.aligned);
    }
};

/* A query's lse and delta, kept in the padding of its row of the tile (8 of 16 bytes). */
template <int D> static __device__ __forceinline__ float *statistics(bf16 *tile, int row) {
    return (float *)(tile + row * PITCH<bf16, D> + D);
}

template <int D>
static __device__ __forceinline__ void load_statistics(bf16 *tile, const backward_args &a, int64_t head,
                                                       int first) {
    int row = (int)threadIdx.x / 2, which = (int)threadIdx.x % 2;
    if (row >= backward_shape<D>::COLUMNS)
        return;
    bool valid = first + row < a.band.length;
    const float *from = which ? a.delta : a.lse;
    cp_async<4>(statistics<D>(tile, row) + which, valid ? from + head + first + row : from, valid);
}

/* dK and dV. Grid: (tiles of keys * D / OUT, G, B). A block goes over the query heads of its head of keys one after
 * the other. Where d is too large for the registers, several blocks compute the same P and dS for different columns
 * of the outputs. */
template <int D, bool SEGMENTED>
static __global__ void __launch_bounds__(THREADS, backward_shape<D>::BLOCKS)
    attention_backward_dkdv(struct backward_args a) {
    wait_for_previous();
    typedef backward_shape<D> shape;
    constexpr int M = shape::M, COLUMNS = shape::COLUMNS, LD = PITCH<bf16, D>, OUT = shape::OUT;
    bf16 *tile_k = dynamic_shared<bf16>(), *tile_v = tile_k + shape::ROWS * LD;
    const int b = (int)blockIdx.z, h = (int)blockIdx.y, length = a.band.length;
    const int k0 = (int)blockIdx.x / (D / OUT) * shape::ROWS, out0 = (int)blockIdx.x % (D / OUT) * OUT;
    const int first = k0 + warp_of() * shape::WARP_ROWS; /* the warp's first key */
    select_sequence<SEGMENTED>(a.band, b);
    streamed_tiles<D> in = {a.q.of(b, h * a.group), a.d_o.of(b, h * a.group), a.q.row, a.d_o.row,
                            tile_v + shape::ROWS * LD};
    int64_t head = ((int64_t)b * gridDim.y + h) * a.group * length; /* where its statistics begin */
    bf16 *warp_k = tile_k + warp_of() * shape::WARP_ROWS * LD;
    bf16 *warp_v = tile_v + warp_of() * shape::WARP_ROWS * LD;
    const interval queries = visibility_of<queries_of<SEGMENTED>>(a.band, k0, shape::ROWS).any;
    const visibility warp_queries = visibility_of<queries_of<SEGMENTED>>(a.band, first, shape::WARP_ROWS);

    float dk[M][OUT / 8][4], dv[M][OUT / 8][4];
    clear(dk);
    clear(dv);
    const int q_first = queries.begin / COLUMNS * COLUMNS;
    int q0 = q_first, heads_left = a.group;
    load_tile<shape::ROWS, D, THREADS>(tile_k, a.k.of(b, h), a.k.row, k0, length, a.d, a.aligned);
    load_tile<shape::ROWS, D, THREADS>(tile_v, a.v.of(b, h), a.v.row, k0, length, a.d, a.aligned);
    in.load(a, 0, q0);
    load_statistics<D>(in.tile_x(0), a, head, q0);
    cp_async_commit();
    for (int iteration = 0, next; heads_left > 0; iteration++, q0 = next) {
        count_tile();
        cp_async_wait<0>();
        __syncthreads(); /* this iteration's tiles have arrived, and all warps are done with the last ones */
        next = q0 + COLUMNS;
        if (next >= queries.end) { /* the next query head */
            next = q_first;
            heads_left--;
            in.x += a.q.head;
            in.y += a.d_o.head;
            head += length;
        }
        if (heads_left > 0) {
            in.load(a, iteration + 1, next);
            load_statistics<D>(in.tile_x(iteration + 1), a, head, next);
        }
        cp_async_commit();
        if (!overlaps(warp_queries.any, q0, COLUMNS))
            continue;
        bf16 *tile_q = in.tile_x(iteration), *tile_do = in.tile_y(iteration);
        float p[M][COLUMNS / 8][4], ds[M][COLUMNS / 8][4]; /* transposed: rows are keys */
        uint32_t fragments[M][COLUMNS / 16][4];
        clear(p);
        multiply_rows<D, shape::UNROLL>(p, warp_k, tile_q);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float lse_of_query = statistics<D>(tile_q, n * 8 + lane_of() % 4 * 2 + r)[0];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = r; i < 4; i += 2)
                        p[m][n][i] = exp2_fast(p[m][n][i] * a.scale_log2e - lse_of_query);
            }
        if (!contains(warp_queries.all, q0, COLUMNS))
            apply_mask<queries_of<SEGMENTED>>(p, a.band, first, q0, 0);
        round_fragments(fragments, p);
        multiply_columns<LD>(dv, fragments, tile_do + out0);
        clear(ds);
        multiply_rows<D, shape::UNROLL>(ds, warp_v, tile_do);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float delta_of_query = statistics<D>(tile_q, n * 8 + lane_of() % 4 * 2 + r)[1];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = r; i < 4; i += 2)
                        ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - delta_of_query);
            }
        round_fragments(fragments, ds);
        multiply_columns<LD>(dk, fragments, tile_q + out0);
    }
    cp_async_wait<0>();
    float scale[M][2], one[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
        scale[m][0] = scale[m][1] = a.scale, one[m][0] = one[m][1] = 1;
    store_rows<LD>(warp_k, dk, scale, a.dk.of(b, h), a.dk.row, first, length, out0, a.d, a.aligned);
    store_rows<LD>(warp_v, dv, one, a.dv.of(b, h), a.dv.row, first, length, out0, a.d, a.aligned);
}

/* dQ. Grid: (tiles of queries, H, B). The last tiles, which have the most keys under a causal mask, are
 * started first, so that the longest blocks are not the last to finish. */
template <int D, bool SEGMENTED>
static __global__ void __launch_bounds__(THREADS, backward_shape<D>::BLOCKS)
    attention_backward_dq(struct backward_args a) {
    wait_for_previous();
    typedef backward_shape<D> shape;
    constexpr int M = shape::M, COLUMNS = shape::COLUMNS, LD = PITCH<bf16, D>;
    bf16 *tile_q = dynamic_shared<bf16>(), *tile_do = tile_q + shape::ROWS * LD;
    const int b = (int)blockIdx.z, h = (int)blockIdx.y, length = a.band.length;
    const int q0 = (int)(gridDim.x - 1 - blockIdx.x) * shape::ROWS;
    const int first = q0 + warp_of() * shape::WARP_ROWS; /* the warp's first query */
    select_sequence<SEGMENTED>(a.band, b);
    const streamed_tiles<D> in = {a.k.of(b, h / a.group), a.v.of(b, h / a.group), a.k.row, a.v.row,
                                  tile_do + shape::ROWS * LD};
    const int64_t head = ((int64_t)b * gridDim.y + h) * length; /* where its statistics begin */
    bf16 *warp_q = tile_q + warp_of() * shape::WARP_ROWS * LD;
    const bf16 *warp_do = tile_do + warp_of() * shape::WARP_ROWS * LD;
    const interval keys = visibility_of<keys_of<SEGMENTED>>(a.band, q0, shape::ROWS).any;
    const visibility warp_keys = visibility_of<keys_of<SEGMENTED>>(a.band, first, shape::WARP_ROWS);

    float dq[M][D / 8][4], lse[M][2], delta[M][2], scale[M][2];
    clear(dq);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + m * 16 + half * 8 + lane_of() / 4;
            lse[m][half] = row < length ? a.lse[head + row] : 0;
            delta[m][half] = row < length ? a.delta[head + row] : 0;
            scale[m][half] = a.scale;
        }
    left_operand<D, M, shape::REGISTERS> left_q = {warp_q, {}}, left_do = {warp_do, {}};
    int k0 = keys.begin / COLUMNS * COLUMNS;
    load_tile<shape::ROWS, D, THREADS>(tile_q, a.q.of(b, h), a.q.row, q0, length, a.d, a.aligned);
    load_tile<shape::ROWS, D, THREADS>(tile_do, a.d_o.of(b, h), a.d_o.row, q0, length, a.d, a.aligned);
    in.load(a, 0, k0);
    cp_async_commit();
    for (int iteration = 0; k0 < keys.end; iteration++, k0 += COLUMNS) {
        count_tile();
        cp_async_wait<0>();
        __syncthreads(); /* this iteration's tiles have arrived, and all warps are done with the last ones */
        if (k0 + COLUMNS < keys.end)
            in.load(a, iteration + 1, k0 + COLUMNS);
        cp_async_commit();
        if (iteration == 0) {
            left_q.load();
            left_do.load();
        }
        if (!overlaps(warp_keys.any, k0, COLUMNS))
            continue;
        const bf16 *tile_k = in.tile_x(iteration), *tile_v = in.tile_y(iteration);
        float p[M][COLUMNS / 8][4], ds[M][COLUMNS / 8][4];
        uint32_t fragments[M][COLUMNS / 16][4];
        clear(p);
        clear(ds);
        left_q.multiply(p, tile_k);
        left_do.multiply(ds, tile_v);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                for (int r = 0; r < 4; r++)
                    ds[m][n][r] = exp2_fast(p[m][n][r] * a.scale_log2e - lse[m][r / 2]) *
                                  (ds[m][n][r] - delta[m][r / 2]);
        if (!contains(warp_keys.all, k0, COLUMNS))
            apply_mask<keys_of<SEGMENTED>>(ds, a.band, first, k0, 0);
        round_fragments(fragments, ds);
        multiply_columns<LD>(dq, fragments, tile_k);
    }
    cp_async_wait<0>();
    store_rows<LD>(warp_q, dq, scale, a.dq.of(b, h), a.dq.row, first, length, 0, a.d, a.aligned);
}

/* delta[b,h,s] = sum_c dO[b,s,h,c] O[b,s,h,c]. A warp a row, in the order of [B,S,H]. Bytes: dO, O once. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    row_deltas(struct rows<const T> o, struct rows<const T> d_o, float *delta, int batch, int length,
               int heads, int d, bool aligned) {
    wait_for_previous();
    int64_t row = (int64_t)blockIdx.x * WARPS + warp_of();
    if (row >= (int64_t)batch * length * heads)
        return;
    int h = (int)(row % heads), s = (int)(row / heads % length), b = (int)(row / heads / length);
    const T *x = o.of(b, h) + s * o.row, *y = d_o.of(b, h) + s * d_o.row;
    float sum = 0;
    if (aligned) {
        for (int c = lane_of() * VECTOR<T>; c < d; c += 32 * VECTOR<T>) {
            float one[VECTOR<T>], other[VECTOR<T>];
            load(x + c, one);
            load(y + c, other);
#pragma unroll
            for (int i = 0; i < VECTOR<T>; i++)
                sum += one[i] * other[i];
        }
    } else {
        for (int c = lane_of(); c < d; c += 32)
            sum += to_float(x[c]) * to_float(y[c]);
    }
    sum = warp_sum(sum);
    if (lane_of() == 0)
        delta[((int64_t)b * heads + h) * length + s] = sum;
}

template <int D>
static void launch_backward(struct device *dev, const struct attention_spec *s, struct backward_args a) {
    typedef backward_shape<D> shape;
    unsigned tiles = (unsigned)ceil_div(s->length, shape::ROWS), H = (unsigned)s->heads,
             G = (unsigned)attention_kv_heads(s), B = (unsigned)s->batch;
    by_segmented(s, [&](auto segmented) {
        constexpr bool SEGMENTED = decltype(segmented)::value;
        launch<attention_backward_dkdv<D, SEGMENTED>>(dev, dim3(tiles * (D / shape::OUT), G, B), THREADS,
                                                      shape::SHARED, a);
        launch<attention_backward_dq<D, SEGMENTED>>(dev, dim3(tiles, H, B), THREADS, shape::SHARED, a);
    });
}

void attention_builtin_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                                tensor v, tensor segments, tensor o, tensor d_o, const void *saved, tensor dq,
                                tensor dk, tensor dv) {
    check_attention_shapes("attention_backward", cuda_compute(dev), s, {q, o, d_o, dq}, {k, v, dk, dv});
    struct op_cost cost;
    attention_builtin_plan(dev, s, &cost, NULL);
    float *delta = (float *)cuda_workspace(dev, cost.workspace, "attention_backward");
    bool aligned = rows_aligned({q, k, v, o, d_o, dq, dk, dv});
    int d = (int)s->head_dim;
    by_dtype(q.dtype, [&](auto number) {
        using T = decltype(number);
        launch<row_deltas<T>>(dev, (unsigned)ceil_div(s->batch * s->length * s->heads, WARPS), THREADS, 0,
                              rows_of<const T>(o), rows_of<const T>(d_o), delta, (int)s->batch,
                              (int)s->length, (int)s->heads, d, aligned);
    });
    if (q.dtype == DTYPE_F32)
        return attention_fp32_backward(dev, s, q, k, v, segments, d_o, (const float *)saved, delta, dq, dk,
                                       dv);
    struct backward_args a = {band_of(s, segments),
                              d,
                              (int)attention_group(s),
                              aligned,
                              (float)s->scale,
                              (float)(s->scale * LOG2_E),
                              rows_of<const bf16>(q),
                              rows_of<const bf16>(k),
                              rows_of<const bf16>(v),
                              rows_of<const bf16>(d_o),
                              rows_of<bf16>(dq),
                              rows_of<bf16>(dk),
                              rows_of<bf16>(dv),
                              (const float *)saved,
                              delta};
    if (d <= 32)
        launch_backward<32>(dev, s, a);
    else if (d <= 64)
        launch_backward<64>(dev, s, a);
    else if (d <= 128)
        launch_backward<128>(dev, s, a);
    else
        launch_backward<256>(dev, s, a);
}
