/* linear: y = x W^T + bias, and its three gradients. */
#include "kernels/cpu/cpu.h"

static void add_bias(real *y, int64_t rows, int64_t cols, int64_t stride, const real *bias) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++)
#pragma omp simd
        for (int64_t j = 0; j < cols; j++)
            y[i * stride + j] += bias[j];
}

/* out (+)= column sums of x [rows, cols]. Each thread sums a strip of columns over all rows, so the order of
 * additions does not depend on the number of threads. A strip's sums fit in a few vector registers. */
static void column_sums(const struct device *dev, const real *x, int64_t rows, int64_t cols, int64_t stride,
                        real *out, bool accumulate) {
    enum { STRIP = 64 };
    int64_t strip = columns_per_thread(dev, cols, STRIP);
#pragma omp parallel for
    for (int64_t begin = 0; begin < cols; begin += strip) {
        int64_t count = min64(strip, cols - begin);
        real sum[STRIP] = {0};
        for (int64_t i = 0; i < rows; i++)
#pragma omp simd
            for (int64_t j = 0; j < count; j++)
                sum[j] += x[i * stride + begin + j];
        for (int64_t j = 0; j < count; j++)
            out[begin + j] = sum[j] + (accumulate ? out[begin + j] : 0);
    }
}

void cpu_linear(struct device *dev, const struct linear_spec *s, tensor x, tensor w, tensor bias, tensor y) {
    call_progress_callback(dev);
    check_real("linear", "x", x, s->rows, s->in, 0, 0, 0);
    check_real("linear", "W", w, s->out, s->in, 0, 0, 0);
    check_real("linear", "y", y, s->rows, s->out, 0, 0, 0);
    gemm(false, true, s->rows, s->out, s->in, x.data, x.stride[0], w.data, w.stride[0], 0, y.data,
         y.stride[0]);
    if (bias.data) {
        check_real("linear", "bias", bias, s->out, 0, 0, 0, 0);
        add_bias(y.data, s->rows, s->out, y.stride[0], bias.data);
    }
}

void cpu_linear_backward(struct device *dev, const struct linear_spec *s, tensor dy, tensor x, tensor w,
                         tensor dx, bool add_dx, tensor dw, tensor dbias, bool accumulate) {
    call_progress_callback(dev);
    check_real("linear_backward", "dy", dy, s->rows, s->out, 0, 0, 0);
    check_real("linear_backward", "x", x, s->rows, s->in, 0, 0, 0);
    check_real("linear_backward", "dW", dw, s->out, s->in, 0, 0, 0);
    gemm(true, false, s->out, s->in, s->rows, dy.data, dy.stride[0], x.data, x.stride[0], accumulate, dw.data,
         dw.stride[0]);
    if (dbias.data)
        column_sums(dev, dy.data, s->rows, s->out, dy.stride[0], dbias.data, accumulate);
    call_progress_callback(dev);
    if (dx.data) {
        check_real("linear_backward", "W", w, s->out, s->in, 0, 0, 0);
        check_real("linear_backward", "dx", dx, s->rows, s->in, 0, 0, 0);
        gemm(false, false, s->rows, s->in, s->out, dy.data, dy.stride[0], w.data, w.stride[0], add_dx,
             dx.data, dx.stride[0]);
    }
}
