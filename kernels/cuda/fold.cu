/* fold: mixes the heads of the rows of a qkv weight. It runs once a pass, on as many elements as the weight has, which
 * is little beside the products with it, so the kernels are plain: one thread an output, and for the gradients of the
 * alphas one block for each pair of heads. */
#include "kernels/cuda/cuda.cuh"

enum { THREADS = 256 };

/* Of q, k and v. */
struct fold_alphas {
    const void *values[3];
};
struct fold_gradients {
    float *values[3];
};

/* out[h,c] (+)= sum_m M[h,m] in[m,c], where M is the alpha of part z, or its transpose. Threads run along the columns,
 * so that loads coalesce; `in` is read H times, but for the first time from the L2. */
template <typename T, typename IN>
static __global__ void __launch_bounds__(THREADS)
    fold_heads(struct fold_alphas alphas, bool transposed, const IN *in, IN *out, int heads, int64_t columns,
               bool accumulate) {
    wait_for_previous();
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int h = (int)blockIdx.y, part = (int)blockIdx.z;
    if (c >= columns)
        return;
    const T *alpha = (const T *)alphas.values[part] + (transposed ? h : h * heads);
    int step = transposed ? heads : 1;
    in += (int64_t)part * heads * columns + c;
    out += ((int64_t)part * heads + h) * columns + c;
    float sum = accumulate ? to_float(*out) : 0;
    for (int m = 0; m < heads; m++)
        sum += to_float(alpha[m * step]) * to_float(in[m * columns]);
    *out = from_float<IN>(sum);
}

/* dalpha[h,m] (+)= <dfolded[h,:], w[m,:]>, a block each. The order of the sum is fixed. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    fold_alpha_gradients(const float *dfolded, const T *w, struct fold_gradients dalphas, int heads,
                         int64_t columns, bool accumulate) {
    wait_for_previous();
    int m = (int)blockIdx.x, h = (int)blockIdx.y, part = (int)blockIdx.z;
    const float *a = dfolded + ((int64_t)part * heads + h) * columns;
    const T *b = w + ((int64_t)part * heads + m) * columns;
    float sum = 0;
    for (int64_t c = threadIdx.x; c < columns; c += THREADS)
        sum += a[c] * to_float(b[c]);
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) {
        float *out = dalphas.values[part] + h * heads + m;
        *out = accumulate ? *out + sum : sum;
    }
}

static void check_fold(const char *op, const struct fold_spec *s, enum dtype weights, tensor w,
                       enum dtype mixing, const tensor alpha[3]) {
    check_shape(op, "w", w, weights, 3, s->heads, s->columns);
    check_contiguous(op, "w", w);
    for (int part = 0; part < 3; part++)
        check_shape(op, "alpha", alpha[part], mixing, s->heads, s->heads);
}

void cuda_fold(struct device *dev, const struct fold_spec *s, tensor w, tensor alpha_q, tensor alpha_k,
               tensor alpha_v, tensor folded) {
    const tensor alpha[3] = {alpha_q, alpha_k, alpha_v};
    check_fold("fold", s, cuda_compute(dev), w, cuda_compute(dev), alpha);
    check_fold("fold", s, cuda_compute(dev), folded, cuda_compute(dev), alpha);
    dim3 grid((unsigned)ceil_div(s->columns, THREADS), (unsigned)s->heads, 3);
    struct fold_alphas alphas = {{alpha_q.data, alpha_k.data, alpha_v.data}};
    by_dtype(w.dtype, [&](auto number) {
        using T = decltype(number);
        launch<fold_heads<T, T>>(dev, grid, THREADS, 0, alphas, false, (const T *)w.data, (T *)folded.data,
                                 (int)s->heads, s->columns, false);
    });
}

void cuda_fold_backward(struct device *dev, const struct fold_spec *s, tensor dfolded, tensor w,
                        tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor dw, tensor dalpha_q,
                        tensor dalpha_k, tensor dalpha_v, bool accumulate, bool accumulate_alpha) {
    const tensor alpha[3] = {alpha_q, alpha_k, alpha_v}, dalpha[3] = {dalpha_q, dalpha_k, dalpha_v};
    check_fold("fold_backward", s, cuda_compute(dev), w, cuda_compute(dev), alpha);
    check_fold("fold_backward", s, DTYPE_F32, dfolded, DTYPE_F32, dalpha);
    check_fold("fold_backward", s, DTYPE_F32, dw, DTYPE_F32, dalpha);
    int heads = (int)s->heads;
    dim3 grid((unsigned)ceil_div(s->columns, THREADS), (unsigned)heads, 3);
    struct fold_alphas alphas = {{alpha_q.data, alpha_k.data, alpha_v.data}};
    struct fold_gradients dalphas = {
        {(float *)dalpha_q.data, (float *)dalpha_k.data, (float *)dalpha_v.data}};
    by_dtype(w.dtype, [&](auto number) {
        using T = decltype(number);
        launch<fold_heads<T, float>>(dev, grid, THREADS, 0, alphas, true, (const float *)dfolded.data,
                                     (float *)dw.data, heads, s->columns, accumulate);
        launch<fold_alpha_gradients<T>>(dev, dim3((unsigned)heads, (unsigned)heads, 3), THREADS, 0,
                                        (const float *)dfolded.data, (const T *)w.data, dalphas, heads,
                                        s->columns, accumulate_alpha);
    });
}
