/* Fused attention for fp32, forward and backward: the algorithms of attention_bf16.cu and
 * attention_bf16_backward.cu, with FMAs on smaller tiles and without overlapping copies. It is there for fp32
 * runs and for checking; it is not tuned for speed.
 *
 * A block is 8 x 8 threads and a tile 8 R x 8 R scores, where R is 4, or 2 for wide heads: thread (x, y) has
 * the scores of rows y + 8 i and columns x + 8 j, and of an output row's d elements those from 4 (x + 8 j) to
 * + 3, for the same rows. A row's threads are lanes of one warp, so passing probabilities from one product to
 * the next through shared memory only needs a warp barrier. */
#include "kernels/cuda/attention/attention_fp32.h"

#include "kernels/cuda/attention/attention_band.cuh"

enum { SIDE = 8, THREADS = SIDE * SIDE };

template <int D> struct fp32_shape {
    static constexpr int R = D <= 128 ? 4 : 2;
    static constexpr int TILE = SIDE * R;
    static constexpr int LD = PITCH<float, D>;
    static constexpr int LP = TILE + 4;    /* row length of a tile of scores, padded against bank conflicts */
    static constexpr int SIZE = TILE * LD; /* floats of a tile of rows */
    static constexpr int FORWARD = (3 * SIZE + TILE * LP) * (int)sizeof(float);
    static constexpr int BACKWARD = (4 * SIZE + TILE * LP) * (int)sizeof(float);
    static_assert(FORWARD <= 99 << 10 && BACKWARD <= 99 << 10, "what every GPU since sm_80 gives a block");
};

struct fp32_args {
    struct band band;
    int d;
    int group; /* query heads of a head of k and v */
    bool aligned;
    float scale, scale_log2e;
    struct rows<const float> q, k, v, d_o;
    struct rows<float> o, dq, dk, dv;
    float *lse_out;
    const float *lse, *delta;
};

/* x[i][j] = <row y + 8 i of a, row x + 8 j of b> */
template <int D, int R>
static __device__ __forceinline__ void multiply_rows(float (&out)[R][R], const float *a, const float *b) {
    constexpr int LD = PITCH<float, D>;
    const int x = (int)threadIdx.x % SIDE, y = (int)threadIdx.x / SIDE;
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < R; j++)
            out[i][j] = 0;
#pragma unroll 4
    for (int c = 0; c < D; c += 4) {
        float fa[R][4], fb[R][4];
#pragma unroll
        for (int i = 0; i < R; i++) {
            load(a + (y + SIDE * i) * LD + c, fa[i]);
            load(b + (x + SIDE * i) * LD + c, fb[i]);
        }
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < R; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    out[i][j] += fa[i][e] * fb[j][e];
    }
}

/* acc [rows y + 8 i][4 (x + 8 j) + e] += p b. p goes through tile_p, since each thread needs whole rows of
 * it. */
template <int D, int R, int N>
static __device__ __forceinline__ void multiply_columns(float (&acc)[R][N][4], const float (&p)[R][R],
                                                        float *tile_p, const float *b) {
    constexpr int LD = PITCH<float, D>, LP = fp32_shape<D>::LP;
    const int x = (int)threadIdx.x % SIDE, y = (int)threadIdx.x / SIDE;
    __syncwarp(); /* the warp is done reading the last product's tile_p; other warps use other rows of it */
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < R; j++)
            tile_p[(y + SIDE * i) * LP + x + SIDE * j] = p[i][j];
    __syncwarp();
#pragma unroll 2
    for (int k = 0; k < SIDE * R; k++) {
        float weight[R];
#pragma unroll
        for (int i = 0; i < R; i++)
            weight[i] = tile_p[(y + SIDE * i) * LP + k];
#pragma unroll
        for (int j = 0; j < N; j++) {
            float row[4];
            load(b + k * LD + 4 * (x + SIDE * j), row);
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][j][e] += weight[i] * row[e];
        }
    }
}

template <interval (*VISIBLE)(const struct band &, int), int R>
static __device__ __forceinline__ void apply_mask(float (&s)[R][R], const struct band &band, int row0,
                                                  int column0, float masked) {
    const int x = (int)threadIdx.x % SIDE, y = (int)threadIdx.x / SIDE;
#pragma unroll
    for (int i = 0; i < R; i++) {
        interval visible = VISIBLE(band, row0 + y + SIDE * i);
#pragma unroll
        for (int j = 0; j < R; j++) {
            int column = column0 + x + SIDE * j;
            if (column < visible.begin || column >= visible.end)
                s[i][j] = masked;
        }
    }
}

template <int D, int R, int N>
static __device__ __forceinline__ void store_rows(const float (&x)[R][N][4], const float (&factor)[R],
                                                  float *head, int64_t stride, int first, int length, int d,
                                                  bool aligned) {
    const int x0 = (int)threadIdx.x % SIDE, y = (int)threadIdx.x / SIDE;
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = first + y + SIDE * i;
#pragma unroll
        for (int j = 0; j < N; j++) {
            int c = 4 * (x0 + SIDE * j);
            if (row >= length || c >= d)
                continue;
            float *to = head + row * stride + c, out[4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[e] = x[i][j][e] * factor[i];
            if (aligned) {
                store(to, out);
            } else {
                for (int e = 0; e < 4 && c + e < d; e++)
                    to[e] = out[e];
            }
        }
    }
}

template <int R, int N> static __device__ __forceinline__ void clear(float (&x)[R][N][4]) {
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                x[i][j][e] = 0;
}

template <int D>
static __device__ __forceinline__ void load_tile_and_wait(float *tile, const float *head, int64_t stride,
                                                          int first, const fp32_args &a) {
    load_tile<fp32_shape<D>::TILE, D, THREADS>(tile, head, stride, first, a.band.length, a.d, a.aligned);
    cp_async_commit();
    cp_async_wait<0>();
}

/* Over the 8 threads of a row. */
static __device__ __forceinline__ float row_max_of(float x) {
#pragma unroll
    for (int offset = SIDE / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

static __device__ __forceinline__ float row_sum_of(float x) {
#pragma unroll
    for (int offset = SIDE / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

/* Grid: (tiles of queries, H, B). The last tiles, which have the most keys, are started first. */
template <int D, bool SEGMENTED>
static __global__ void __launch_bounds__(THREADS) fp32_forward(struct fp32_args a) {
    wait_for_previous();
    typedef fp32_shape<D> shape;
    constexpr int R = shape::R, TILE = shape::TILE;
    float *tile_q = dynamic_shared<float>(), *tile_k = tile_q + shape::SIZE, *tile_v = tile_k + shape::SIZE;
    float *tile_p = tile_v + shape::SIZE;
    const int b = (int)blockIdx.z, h = (int)blockIdx.y, kv = h / a.group, length = a.band.length;
    select_sequence<SEGMENTED>(a.band, b);
    const int q0 = (int)(gridDim.x - 1 - blockIdx.x) * TILE;
    const visibility keys = visibility_of<keys_of<SEGMENTED>>(a.band, q0, TILE);
    float acc[R][D / 32][4], row_max[R], row_sum[R];
    clear(acc);
    for (int i = 0; i < R; i++)
        row_max[i] = -INFINITY, row_sum[i] = 0;
    load_tile_and_wait<D>(tile_q, a.q.of(b, h), a.q.row, q0, a);
    for (int k0 = keys.any.begin / TILE * TILE; k0 < keys.any.end; k0 += TILE) {
        float s[R][R];
        count_tile();
        __syncthreads(); /* all warps are done with the last tiles */
        load_tile_and_wait<D>(tile_k, a.k.of(b, kv), a.k.row, k0, a);
        load_tile_and_wait<D>(tile_v, a.v.of(b, kv), a.v.row, k0, a);
        __syncthreads();
        multiply_rows<D>(s, tile_q, tile_k);
        if (!contains(keys.all, k0, TILE))
            apply_mask<keys_of<SEGMENTED>>(s, a.band, q0, k0, -INFINITY);
#pragma unroll
        for (int i = 0; i < R; i++) {
            float top = row_max[i], sum = 0;
#pragma unroll
            for (int j = 0; j < R; j++)
                top = fmaxf(top, s[i][j]);
            top = row_max_of(top);
            float shift = top == -INFINITY ? 0 : top; /* no visible key yet: -inf minus -inf would be NaN */
            float factor = exp2f((row_max[i] - shift) * a.scale_log2e);
            row_max[i] = top;
#pragma unroll
            for (int j = 0; j < R; j++) {
                s[i][j] = exp2f((s[i][j] - shift) * a.scale_log2e);
                sum += s[i][j];
            }
            row_sum[i] = row_sum[i] * factor + sum;
#pragma unroll
            for (int j = 0; j < D / 32; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][j][e] *= factor;
        }
        multiply_columns<D>(acc, s, tile_p, tile_v);
    }
    float inverse[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = q0 + (int)threadIdx.x / SIDE + SIDE * i;
        float sum = row_sum_of(row_sum[i]);
        inverse[i] = 1 / sum;
        if (threadIdx.x % SIDE == 0 && row < length)
            a.lse_out[((int64_t)b * gridDim.y + h) * length + row] = row_max[i] * a.scale_log2e + log2f(sum);
    }
    store_rows<D>(acc, inverse, a.o.of(b, h), a.o.row, q0, length, a.d, a.aligned);
}

/* dK and dV. Grid: (tiles of keys, G, B). A block goes over the query heads of its head of keys one after the other.
 * Scores are transposed: rows are keys. */
template <int D, bool SEGMENTED>
static __global__ void __launch_bounds__(THREADS) fp32_backward_dkdv(struct fp32_args a) {
    wait_for_previous();
    typedef fp32_shape<D> shape;
    constexpr int R = shape::R, TILE = shape::TILE;
    float *tile_k = dynamic_shared<float>(), *tile_v = tile_k + shape::SIZE, *tile_q = tile_v + shape::SIZE;
    float *tile_do = tile_q + shape::SIZE, *tile_p = tile_do + shape::SIZE;
    const int b = (int)blockIdx.z, h = (int)blockIdx.y, length = a.band.length, k0 = (int)blockIdx.x * TILE;
    select_sequence<SEGMENTED>(a.band, b);
    const visibility queries = visibility_of<queries_of<SEGMENTED>>(a.band, k0, TILE);
    float dk[R][D / 32][4], dv[R][D / 32][4];
    clear(dk);
    clear(dv);
    load_tile_and_wait<D>(tile_k, a.k.of(b, h), a.k.row, k0, a);
    load_tile_and_wait<D>(tile_v, a.v.of(b, h), a.v.row, k0, a);
    const int first = queries.any.begin / TILE * TILE;
    const int tiles = queries.any.end > first ? (queries.any.end - first + TILE - 1) / TILE : 0;
    for (int i = 0; i < tiles * a.group; i++) {
        const int q0 = first + i % tiles * TILE, query_head = h * a.group + i / tiles;
        const int64_t head = ((int64_t)b * gridDim.y * a.group + query_head) * length;
        float p[R][R], ds[R][R];
        count_tile();
        __syncthreads();
        load_tile_and_wait<D>(tile_q, a.q.of(b, query_head), a.q.row, q0, a);
        load_tile_and_wait<D>(tile_do, a.d_o.of(b, query_head), a.d_o.row, q0, a);
        __syncthreads();
        multiply_rows<D>(p, tile_k, tile_q);
        multiply_rows<D>(ds, tile_v, tile_do);
#pragma unroll
        for (int j = 0; j < R; j++) {
            int query = q0 + (int)threadIdx.x % SIDE + SIDE * j;
            float lse = query < length ? a.lse[head + query] : 0;
            float delta = query < length ? a.delta[head + query] : 0;
#pragma unroll
            for (int i = 0; i < R; i++) {
                p[i][j] = exp2f(p[i][j] * a.scale_log2e - lse);
                ds[i][j] = p[i][j] * (ds[i][j] - delta);
            }
        }
        if (!contains(queries.all, q0, TILE)) {
            apply_mask<queries_of<SEGMENTED>>(p, a.band, k0, q0, 0);
            apply_mask<queries_of<SEGMENTED>>(ds, a.band, k0, q0, 0);
        }
        multiply_columns<D>(dv, p, tile_p, tile_do);
        multiply_columns<D>(dk, ds, tile_p, tile_q);
    }
    float scale[R], one[R];
    for (int i = 0; i < R; i++)
        scale[i] = a.scale, one[i] = 1;
    store_rows<D>(dk, scale, a.dk.of(b, h), a.dk.row, k0, length, a.d, a.aligned);
    store_rows<D>(dv, one, a.dv.of(b, h), a.dv.row, k0, length, a.d, a.aligned);
}

/* dQ. Grid: (tiles of queries, H, B). */
template <int D, bool SEGMENTED>
static __global__ void __launch_bounds__(THREADS) fp32_backward_dq(struct fp32_args a) {
    wait_for_previous();
    typedef fp32_shape<D> shape;
    constexpr int R = shape::R, TILE = shape::TILE;
    float *tile_q = dynamic_shared<float>(), *tile_do = tile_q + shape::SIZE;
    float *tile_k = tile_do + shape::SIZE, *tile_v = tile_k + shape::SIZE, *tile_p = tile_v + shape::SIZE;
    const int b = (int)blockIdx.z, h = (int)blockIdx.y, kv = h / a.group, length = a.band.length;
    select_sequence<SEGMENTED>(a.band, b);
    const int q0 = (int)(gridDim.x - 1 - blockIdx.x) * TILE;
    const int64_t head = ((int64_t)b * gridDim.y + h) * length;
    const visibility keys = visibility_of<keys_of<SEGMENTED>>(a.band, q0, TILE);
    float dq[R][D / 32][4], lse[R], delta[R], scale[R];
    clear(dq);
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = q0 + (int)threadIdx.x / SIDE + SIDE * i;
        lse[i] = row < length ? a.lse[head + row] : 0;
        delta[i] = row < length ? a.delta[head + row] : 0;
        scale[i] = a.scale;
    }
    load_tile_and_wait<D>(tile_q, a.q.of(b, h), a.q.row, q0, a);
    load_tile_and_wait<D>(tile_do, a.d_o.of(b, h), a.d_o.row, q0, a);
    for (int k0 = keys.any.begin / TILE * TILE; k0 < keys.any.end; k0 += TILE) {
        float p[R][R], ds[R][R];
        count_tile();
        __syncthreads();
        load_tile_and_wait<D>(tile_k, a.k.of(b, kv), a.k.row, k0, a);
        load_tile_and_wait<D>(tile_v, a.v.of(b, kv), a.v.row, k0, a);
        __syncthreads();
        multiply_rows<D>(p, tile_q, tile_k);
        multiply_rows<D>(ds, tile_do, tile_v);
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < R; j++)
                ds[i][j] = exp2f(p[i][j] * a.scale_log2e - lse[i]) * (ds[i][j] - delta[i]);
        if (!contains(keys.all, k0, TILE))
            apply_mask<keys_of<SEGMENTED>>(ds, a.band, q0, k0, 0);
        multiply_columns<D>(dq, ds, tile_p, tile_k);
    }
    store_rows<D>(dq, scale, a.dq.of(b, h), a.dq.row, q0, length, a.d, a.aligned);
}

/* Call f with the padded head dim as a constant. */
template <typename F> static void by_dim(int d, F f) {
    if (d <= 32)
        f(std::integral_constant<int, 32>());
    else if (d <= 64)
        f(std::integral_constant<int, 64>());
    else if (d <= 128)
        f(std::integral_constant<int, 128>());
    else
        f(std::integral_constant<int, 256>());
}

static struct fp32_args args_of(const struct attention_spec *s, tensor q, tensor k, tensor v,
                                tensor segments) {
    struct fp32_args a = {};
    a.band = band_of(s, segments);
    a.d = (int)s->head_dim;
    a.group = (int)attention_group(s);
    a.scale = (float)s->scale;
    a.scale_log2e = (float)(s->scale * LOG2_E);
    a.q = rows_of<const float>(q);
    a.k = rows_of<const float>(k);
    a.v = rows_of<const float>(v);
    return a;
}

template <int D> static dim3 grid_of(const struct attention_spec *s, int64_t heads) {
    return dim3((unsigned)ceil_div(s->length, fp32_shape<D>::TILE), (unsigned)heads, (unsigned)s->batch);
}

void attention_fp32(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                    tensor segments, tensor o, float *lse) {
    struct fp32_args a = args_of(s, q, k, v, segments);
    a.aligned = rows_aligned({q, k, v, o});
    a.o = rows_of<float>(o);
    a.lse_out = lse;
    by_dim(a.d, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        by_segmented(s, [&](auto segmented) {
            launch<fp32_forward<D, decltype(segmented)::value>>(dev, grid_of<D>(s, s->heads), THREADS,
                                                                fp32_shape<D>::FORWARD, a);
        });
    });
}

void attention_fp32_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                             tensor segments, tensor d_o, const float *lse, const float *delta, tensor dq,
                             tensor dk, tensor dv) {
    struct fp32_args a = args_of(s, q, k, v, segments);
    a.aligned = rows_aligned({q, k, v, d_o, dq, dk, dv});
    a.d_o = rows_of<const float>(d_o);
    a.dq = rows_of<float>(dq);
    a.dk = rows_of<float>(dk);
    a.dv = rows_of<float>(dv);
    a.lse = lse;
    a.delta = delta;
    by_dim(a.d, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        by_segmented(s, [&](auto segmented) {
            constexpr bool SEGMENTED = decltype(segmented)::value;
            launch<fp32_backward_dkdv<D, SEGMENTED>>(dev, grid_of<D>(s, attention_kv_heads(s)), THREADS,
                                                     fp32_shape<D>::BACKWARD, a);
            launch<fp32_backward_dq<D, SEGMENTED>>(dev, grid_of<D>(s, s->heads), THREADS,
                                                   fp32_shape<D>::BACKWARD, a);
        });
    });
}
