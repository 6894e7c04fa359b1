/* Backward of talking heads: three kernels with four passes over the tiles, each of which computes the scores again. By queries
 * for D = sum_j W_j dW_j, and for dq and the gradients of the mixing matrices; by keys for dk, and for dv.
 *
 * With the p parts of d and H' heads of talking.cu a visible pair takes 7 p + 3 products and 12 p mixings. */
#include "kernels/cuda/attention/talking.cuh"

/* Of query q: the weights W and their gradients dW. */
template <bool TENSOR, typename T>
static __device__ __forceinline__ void
weights_and_gradients(const struct talking_args<T> &a, const struct shared_memory<T> &s, const float *scores,
                      const float *du, int q, int h0, int k0, float (&w)[2][4], float (&dw)[2][4]) {
    mixed_scores<TENSOR>(a, s, scores, q, h0, k0, w);
    weigh(s, q, h0, w);
    mix<TENSOR>(a, s.weights, true, du, q, h0, dw);
}

/* dW becomes the gradient of the mixed scores, W (dW - D). */
template <typename T>
static __device__ __forceinline__ void through_softmax(const struct shared_memory<T> &s, int q, int h0,
                                                       const float (&w)[2][4], float (&dw)[2][4]) {
    each_element<2>(
        [&](int h, int, int n, int r) { dw[n][r] = w[n][r] * (dw[n][r] - s.dot[(h0 + h) * QUERIES + q]); });
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
 * Grid: (blocks, 1, parts of d); a block takes tiles of queries in turn, every gridDim.x-th. */
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
            row_products<TENSOR>(a, a.q, a.k, b, q0, k0, scores);
            row_products<TENSOR>(a, a.d_o, a.v, b, q0, k0, du);
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
                through_softmax(s, q, h0, weights, dw);
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
        row_products<TENSOR>(a, a.q, a.k, b, q0, k0, scores);
        if (!VALUES)
            row_products<TENSOR>(a, a.d_o, a.v, b, q0, k0, du);
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
            through_softmax(s, q, h0, weights, dw);
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
