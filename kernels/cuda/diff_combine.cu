/* diff_combine: the two attentions of a differential layer's pairs of heads become one, normalized; and add. A warp
 * takes a pair of heads of one token. Bytes moved: o twice, out once; they bound the time. */
#include "kernels/cuda/cuda.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS, MAX_BLOCKS = 256 };

/* The vectors of lambda: q1, k1, q2, k2. */
template <typename T> struct lambda_vectors { const T *values[4]; };
struct lambda_gradients {
    float *values[4];
};

/* exp(q1 . k1), exp(q2 . k2), computed by every warp for itself, in the same order. */
template <typename T>
static __device__ __forceinline__ void exponentials(const lambda_vectors<T> &v, int d, float &e1, float &e2) {
    float first = 0, second = 0;
    for (int c = (int)threadIdx.x % 32; c < d; c += 32) {
        first += to_float(v.values[0][c]) * to_float(v.values[1][c]);
        second += to_float(v.values[2][c]) * to_float(v.values[3][c]);
    }
    e1 = expf(warp_sum(first));
    e2 = expf(warp_sum(second));
}

/* 1 / sqrt(mean(x^2) + eps) of x = a - lambda b, of n elements. */
template <typename T>
static __device__ __forceinline__ float inverse_norm(const T *a, const T *b, int n, float lambda, float eps) {
    float squares = 0;
    for (int c = (int)threadIdx.x % 32; c < n; c += 32) {
        float x = to_float(a[c]) - lambda * to_float(b[c]);
        squares += x * x;
    }
    return 1 / sqrtf(warp_sum(squares) / (float)n + eps);
}

/* o [rows,2,pairs,2d], out [rows,pairs,2d]. Grid: any; warps share out the pairs. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    combine(const T *o, lambda_vectors<T> vectors, const T *w, T *out, int64_t rows, int pairs, int d,
            float lambda_init, float eps) {
    wait_for_previous();
    const int n = 2 * d;
    const int64_t half = (int64_t)pairs * n;
    float e1, e2;
    exponentials(vectors, d, e1, e2);
    const float lambda = e1 - e2 + lambda_init;
    for (int64_t pair = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; pair < rows * pairs;
         pair += (int64_t)gridDim.x * WARPS) {
        const T *a = o + pair / pairs * 2 * half + pair % pairs * n, *b = a + half;
        const float factor = (1 - lambda_init) * inverse_norm(a, b, n, lambda, eps);
        for (int c = (int)threadIdx.x % 32; c < n; c += 32)
            out[pair * n + c] =
                from_float<T>(factor * to_float(w[c]) * (to_float(a[c]) - lambda * to_float(b[c])));
    }
}

/* d_o, and each block's sums for dw and, last, for dlambda: partials [gridDim.x, 2d + 1]. A warp adds up its own
 * in shared memory, [WARPS][2d + 1]. The equations are in kernels/cpu/diff_combine.c. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    combine_backward(const T *dout, const T *o, lambda_vectors<T> vectors, const T *w, T *d_o,
                     float *partials, int64_t rows, int pairs, int d, float lambda_init, float eps) {
    wait_for_previous();
    const int n = 2 * d, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int64_t half = (int64_t)pairs * n;
    float *sums = dynamic_shared<float>(), *mine = sums + warp * (n + 1);
    float e1, e2;
    double dlambda = 0; /* one number out of everything: floats would lose digits */
    exponentials(vectors, d, e1, e2);
    const float lambda = e1 - e2 + lambda_init, scale = 1 - lambda_init;
    for (int c = lane; c < n; c += 32)
        mine[c] = 0;
    for (int64_t pair = (int64_t)blockIdx.x * WARPS + warp; pair < rows * pairs;
         pair += (int64_t)gridDim.x * WARPS) {
        const int64_t at = pair / pairs * 2 * half + pair % pairs * n;
        const T *a = o + at, *b = a + half, *g = dout + pair * n;
        T *da = d_o + at, *db = da + half;
        const float rstd = inverse_norm(a, b, n, lambda, eps);
        float sum = 0;
        for (int c = lane; c < n; c += 32) {
            float xhat = (to_float(a[c]) - lambda * to_float(b[c])) * rstd, each = scale * to_float(g[c]);
            sum += each * to_float(w[c]) * xhat;
            mine[c] += each * xhat;
        }
        const float mean = warp_sum(sum) / (float)n;
        for (int c = lane; c < n; c += 32) {
            float xhat = (to_float(a[c]) - lambda * to_float(b[c])) * rstd;
            float dx = rstd * (scale * to_float(w[c]) * to_float(g[c]) - xhat * mean);
            dlambda -= (double)dx * (double)to_float(b[c]);
            da[c] = from_float<T>(dx);
            db[c] = from_float<T>(-lambda * dx);
        }
    }
    dlambda = warp_sum(dlambda);
    if (lane == 0)
        mine[n] = (float)dlambda;
    __syncthreads();
    for (int c = (int)threadIdx.x; c < n + 1; c += THREADS) {
        float total = sums[c];
        for (int other = 1; other < WARPS; other++)
            total += sums[other * (n + 1) + c];
        partials[(int64_t)blockIdx.x * (n + 1) + c] = total;
    }
}

/* The gradients of the four vectors and of w, from total [2d + 1]: dw, then dlambda. One block. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    lambda_backward(const float *total, lambda_vectors<T> vectors, lambda_gradients gradients, float *dw,
                    int d, bool accumulate) {
    wait_for_previous();
    float e1, e2;
    exponentials(vectors, d, e1, e2);
    for (int c = (int)threadIdx.x; c < 2 * d; c += THREADS)
        dw[c] = accumulate ? dw[c] + total[c] : total[c];
    for (int c = (int)threadIdx.x; c < 4 * d; c += THREADS) {
        int which = c / d, other = which ^ 1, i = c % d;
        float g = total[2 * d] * (which < 2 ? e1 : -e2) * to_float(vectors.values[other][i]);
        float *to = gradients.values[which] + i;
        *to = accumulate ? *to + g : g;
    }
}

/* x += y, a warp a row of d. */
template <typename T> struct added {
    T *x;
    const T *y;
    int64_t x_stride[3], y_stride[3];
};

template <typename T>
static __global__ void __launch_bounds__(THREADS) add_rows(added<T> a, int64_t rows, int S, int H, int d) {
    wait_for_previous();
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows)
        return;
    int64_t b = row / H / S, s = row / H % S, h = row % H;
    T *x = a.x + b * a.x_stride[0] + s * a.x_stride[1] + h * a.x_stride[2];
    const T *y = a.y + b * a.y_stride[0] + s * a.y_stride[1] + h * a.y_stride[2];
    for (int c = (int)threadIdx.x % 32; c < d; c += 32)
        x[c] = from_float<T>(to_float(x[c]) + to_float(y[c]));
}

static unsigned blocks_for(const struct diff_combine_spec *s) {
    return (unsigned)min64(MAX_BLOCKS, ceil_div(s->rows * s->pairs, WARPS));
}

int cuda_diff_combine_plan(struct device *dev, const struct diff_combine_spec *s, struct op_cost *cost,
                           struct error *e) {
    size_t shared = (size_t)WARPS * (size_t)(2 * s->head_dim + 1) * sizeof(float);
    if (shared > dev->shared_limit)
        return fail_user(e, "model.head_dim = %lld is too large for differential layers on this GPU",
                         (long long)s->head_dim);
    cost->workspace = (size_t)(blocks_for(s) + 1) * (size_t)(2 * s->head_dim + 1) * sizeof(float);
    return 0;
}

static void check_combine(const char *op, struct device *dev, const struct diff_combine_spec *s, tensor o,
                          std::initializer_list<tensor> lambdas, tensor w, tensor out) {
    enum dtype type = cuda_compute(dev);
    check_shape(op, "o", o, type, s->rows, 2, s->pairs, 2 * s->head_dim);
    check_contiguous(op, "o", o);
    for (const tensor &t : lambdas)
        check_shape(op, "lambda", t, type, s->head_dim);
    check_shape(op, "w", w, type, 2 * s->head_dim);
    check_shape(op, "out", out, type, s->rows, s->pairs, 2 * s->head_dim);
    check_contiguous(op, "out", out);
}

void cuda_diff_combine(struct device *dev, const struct diff_combine_spec *s, tensor o, tensor lambda_q1,
                       tensor lambda_k1, tensor lambda_q2, tensor lambda_k2, tensor w, tensor out) {
    check_combine("diff_combine", dev, s, o, {lambda_q1, lambda_k1, lambda_q2, lambda_k2}, w, out);
    by_dtype(o.dtype, [&](auto number) {
        using T = decltype(number);
        lambda_vectors<T> vectors = {{(const T *)lambda_q1.data, (const T *)lambda_k1.data,
                                      (const T *)lambda_q2.data, (const T *)lambda_k2.data}};
        launch<combine<T>>(dev, (unsigned)ceil_div(s->rows * s->pairs, WARPS), THREADS, 0, (const T *)o.data,
                           vectors, (const T *)w.data, (T *)out.data, s->rows, (int)s->pairs,
                           (int)s->head_dim, (float)s->lambda_init, (float)s->eps);
    });
}

void cuda_diff_combine_backward(struct device *dev, const struct diff_combine_spec *s, tensor dout, tensor o,
                                tensor lambda_q1, tensor lambda_k1, tensor lambda_q2, tensor lambda_k2,
                                tensor w, tensor d_o, tensor dlambda_q1, tensor dlambda_k1, tensor dlambda_q2,
                                tensor dlambda_k2, tensor dw, bool accumulate) {
    const std::initializer_list<tensor> lambdas = {lambda_q1, lambda_k1, lambda_q2, lambda_k2};
    check_combine("diff_combine_backward", dev, s, o, lambdas, w, dout);
    check_combine("diff_combine_backward", dev, s, d_o, lambdas, w, dout);
    for (const tensor &t : {dlambda_q1, dlambda_k1, dlambda_q2, dlambda_k2})
        check_shape("diff_combine_backward", "dlambda", t, DTYPE_F32, s->head_dim);
    check_shape("diff_combine_backward", "dw", dw, DTYPE_F32, 2 * s->head_dim);
    const int64_t each = 2 * s->head_dim + 1;
    const unsigned blocks = blocks_for(s);
    float *partials = (float *)cuda_workspace(dev, (size_t)(blocks + 1) * (size_t)each * sizeof(float),
                                              "diff_combine_backward"),
          *total = partials + blocks * each;
    lambda_gradients gradients = {{(float *)dlambda_q1.data, (float *)dlambda_k1.data,
                                   (float *)dlambda_q2.data, (float *)dlambda_k2.data}};
    by_dtype(o.dtype, [&](auto number) {
        using T = decltype(number);
        lambda_vectors<T> vectors = {{(const T *)lambda_q1.data, (const T *)lambda_k1.data,
                                      (const T *)lambda_q2.data, (const T *)lambda_k2.data}};
        launch<combine_backward<T>>(dev, blocks, THREADS, (size_t)(WARPS * each) * sizeof(float),
                                    (const T *)dout.data, (const T *)o.data, vectors, (const T *)w.data,
                                    (T *)d_o.data, partials, s->rows, (int)s->pairs, (int)s->head_dim,
                                    (float)s->lambda_init, (float)s->eps);
        sum_partials(dev, partials, (int)blocks, each, {{total, false}});
        launch<lambda_backward<T>>(dev, 1, THREADS, 0, (const float *)total, vectors, gradients,
                                   (float *)dw.data, (int)s->head_dim, accumulate);
    });
}

void cuda_add(struct device *dev, tensor x, tensor y) {
    int64_t B = x.shape[0], S = x.shape[1], H = x.shape[2], d = x.shape[3];
    check_shape("add", "x", x, cuda_compute(dev), B, S, H, d);
    check_shape("add", "y", y, cuda_compute(dev), B, S, H, d);
    by_dtype(x.dtype, [&](auto number) {
        using T = decltype(number);
        added<T> a = {(T *)x.data,
                      (const T *)y.data,
                      {x.stride[0], x.stride[1], x.stride[2]},
                      {y.stride[0], y.stride[1], y.stride[2]}};
        launch<add_rows<T>>(dev, (unsigned)ceil_div(B * S * H, WARPS), THREADS, 0, a, B * S * H, (int)S,
                            (int)H, (int)d);
    });
}
