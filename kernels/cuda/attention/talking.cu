/* talking: attention whose heads are mixed before the softmax and after it (Shazeer et al. 2020, arXiv 2003.02436),
 * without an array of all scores. The algorithm is that of kernels/cpu/talking.c:
 *
 *   M_h = sum_k logits[h,k] scale q_k k_k^T over visible keys,  W = softmax(M),  U_h = sum_k weights[h,k] W_k,
 *   o_h = U_h v_h
 *
 * A weight needs its head's whole row before it is mixed: one pass over the keys finds the log-sum-exp of each row, a second one
 * the outputs. Tiles and their products are in talking.cuh, backward is in talking_backward.cu.
 *
 * With d in p parts (p = 1 up to d = 64, for bf16 and 16 heads up to 128) whose blocks compute the scores again, and H' heads in a
 * tile (a multiple of 16), a visible pair takes 2 p + 1 products of 2 H d FLOPs and 3 p mixings of 2 H' H'; on tensor cores, where
 * a tile's numbers are two, most of them twice or three times. Saved: the log-sum-exp of each row in base 2, [B,H,S]. */
#include "kernels/cuda/attention/talking.cuh"

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
        row_products<TENSOR>(a, a.q, a.k, b, q0, k0, scores);
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
            }
            each_element<2>([&](int, int, int n, int r) { sum[r / 2] += weight_of(m[n][r], now[r / 2]); });
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float total = row_total(sum[i]);
                if (threadIdx.x % 4 == 0) {
                    int at = (h0 + g + 8 * i) * QUERIES + q;
                    s.sum[at] = s.sum[at] * weight_of(before[i], now[i]) + total;
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
        row_products<TENSOR>(a, a.q, a.k, b, q0, k0, scores);
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

/* ---- plan and calls ---- */

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
