/* qk_norm: RMSNorm of every head of q and k of qkv [N,H+2G,d], each with one weight [d] for all heads; v is copied.
 *
 *   forward   y = x / rms(x) w
 *   backward  with xhat = x / rms(x) and g = dy w:  dx = (g - xhat mean(g xhat)) / rms(x);  dw (+)= sum dy xhat
 *
 * A warp has one head of a token. Nothing is saved: backward reads x again. Bytes: forward 2, backward 3 elements for
 * each one of q and k, and those of v where they are copied. */
#include "kernels/cuda/cuda.cuh"

enum { WARPS = 8, THREADS = 32 * WARPS, EACH = 8 /* columns of a lane */, MAX_DIM = 32 * EACH };

struct qk_rows {
    int64_t rows;
    int heads, kv_heads, d;
    float eps;
};

/* 1 / rms of a row; x: the lane's columns, zeros beyond d. */
template <typename T>
static __device__ __forceinline__ float load_row(const T *row, int d, float eps, float (&x)[EACH]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = (int)threadIdx.x % 32 + 32 * i;
        x[i] = c < d ? to_float(row[c]) : 0;
        sum += x[i] * x[i];
    }
    return 1 / sqrtf(warp_sum(sum) / (float)d + eps);
}

/* Grid: (heads of all rows / WARPS). */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    qk_forward(struct qk_rows s, const T *x, const T *w_q, const T *w_k, T *y) {
    wait_for_previous();
    const int row_heads = s.heads + 2 * s.kv_heads, lane = (int)threadIdx.x % 32;
    int64_t at = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (at >= s.rows * row_heads)
        return;
    int h = (int)(at % row_heads);
    if (h >= s.heads + s.kv_heads) {
        for (int c = lane; c < s.d && x != y; c += 32)
            y[at * s.d + c] = x[at * s.d + c];
        return;
    }
    const T *w = h < s.heads ? w_q : w_k;
    float values[EACH], factor = load_row(x + at * s.d, s.d, s.eps, values);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = lane + 32 * i;
        if (c < s.d)
            y[at * s.d + c] = from_float<T>(values[i] * factor * to_float(w[c]));
    }
}

/* Grid: (blocks, 3: q, k and v). A warp takes every (WARPS * blocks)-th head. partial [2 for q and k][blocks][d]. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    qk_backward(struct qk_rows s, const T *dy, const T *x, const T *w_q, const T *w_k, T *dx,
                float *partial) {
    wait_for_previous();
    __shared__ float sums[WARPS][MAX_DIM];
    const int which = (int)blockIdx.y, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int heads = which == 0 ? s.heads : s.kv_heads, row_heads = s.heads + 2 * s.kv_heads;
    const int first = which == 0 ? 0 : s.heads + (which - 1) * s.kv_heads;
    const T *w = which == 0 ? w_q : w_k;
    float dw[EACH] = {}, weight[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        weight[i] = lane + 32 * i < s.d ? to_float(w[lane + 32 * i]) : 0;
    for (int64_t e = (int64_t)blockIdx.x * WARPS + warp; e < s.rows * heads;
         e += (int64_t)gridDim.x * WARPS) {
        int64_t at = (e / heads * row_heads + first + e % heads) * s.d;
        float values[EACH], g[EACH], sum = 0;
        if (which == 2) {
            for (int c = lane; c < s.d && dx != dy; c += 32)
                dx[at + c] = dy[at + c];
            continue;
        }
        float factor = load_row(x + at, s.d, s.eps, values);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = lane + 32 * i;
            float d = c < s.d ? to_float(dy[at + c]) : 0, xhat = values[i] * factor;
            g[i] = d * weight[i];
            sum += g[i] * xhat;
            dw[i] += d * xhat;
        }
        float mean = warp_sum(sum) / (float)s.d;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = lane + 32 * i;
            if (c < s.d)
                dx[at + c] = from_float<T>(factor * (g[i] - values[i] * factor * mean));
        }
    }
    if (which == 2)
        return;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        sums[warp][lane + 32 * i] = dw[i];
    __syncthreads();
    for (int c = (int)threadIdx.x; c < s.d; c += THREADS) {
        float sum = 0;
        for (int i = 0; i < WARPS; i++)
            sum += sums[i][c];
        partial[((int64_t)which * gridDim.x + blockIdx.x) * s.d + c] = sum;
    }
}

static int64_t backward_blocks(const struct device *dev, const struct qk_norm_spec *s) {
    int64_t most = (int64_t)dev->sm_count * 2, blocks = ceil_div(s->rows * s->heads, WARPS);
    return blocks < most ? blocks : most;
}

int cuda_qk_norm_plan(struct device *dev, const struct qk_norm_spec *s, struct op_cost *cost,
                      struct error *e) {
    if (s->head_dim > MAX_DIM)
        return fail_user(e, "head_dim = %lld: qk_norm on a GPU supports at most %d; use system.device = cpu",
                         (long long)s->head_dim, MAX_DIM);
    *cost = {0, (size_t)(2 * backward_blocks(dev, s) * s->head_dim) * sizeof(float)};
    return 0;
}

static struct qk_rows rows_of(const struct qk_norm_spec *s) {
    return {s->rows, (int)s->heads, (int)s->kv_heads, (int)s->head_dim, (float)s->eps};
}

static void check_rows(struct device *dev, const char *op, const struct qk_norm_spec *s, const char *what,
                       tensor t) {
    check_shape(op, what, t, cuda_compute(dev), s->rows, s->heads + 2 * s->kv_heads, s->head_dim);
    check_contiguous(op, what, t);
}

void cuda_qk_norm(struct device *dev, const struct qk_norm_spec *s, tensor x, tensor w_q, tensor w_k,
                  tensor y) {
    check_rows(dev, "qk_norm", s, "x", x);
    check_rows(dev, "qk_norm", s, "y", y);
    for (const tensor &t : {w_q, w_k})
        check_shape("qk_norm", "a weight", t, cuda_compute(dev), s->head_dim);
    by_dtype(x.dtype, [&](auto number) {
        using T = decltype(number);
        launch<qk_forward<T>>(dev, (unsigned)ceil_div(s->rows * (s->heads + 2 * s->kv_heads), WARPS), THREADS,
                              0, rows_of(s), (const T *)x.data, (const T *)w_q.data, (const T *)w_k.data,
                              (T *)y.data);
    });
}

void cuda_qk_norm_backward(struct device *dev, const struct qk_norm_spec *s, tensor dy, tensor x, tensor w_q,
                           tensor w_k, tensor dx, tensor dw_q, tensor dw_k, bool accumulate) {
    check_rows(dev, "qk_norm_backward", s, "dy", dy);
    check_rows(dev, "qk_norm_backward", s, "x", x);
    check_rows(dev, "qk_norm_backward", s, "dx", dx);
    for (const tensor &t : {dw_q, dw_k})
        check_shape("qk_norm_backward", "a weight's gradient", t, DTYPE_F32, s->head_dim);
    int64_t blocks = backward_blocks(dev, s);
    size_t bytes = (size_t)(2 * blocks * s->head_dim) * sizeof(float);
    float *partial = (float *)cuda_workspace(dev, bytes, "qk_norm_backward");
    by_dtype(x.dtype, [&](auto number) {
        using T = decltype(number);
        launch<qk_backward<T>>(dev, dim3((unsigned)blocks, 3), THREADS, 0, rows_of(s), (const T *)dy.data,
                               (const T *)x.data, (const T *)w_q.data, (const T *)w_k.data, (T *)dx.data,
                               partial);
    });
    sum_partials(dev, partial, (int)blocks, s->head_dim,
                 {{(float *)dw_q.data, accumulate}, {(float *)dw_k.data, accumulate}});
}
