/* linear: y = x W^T + bias, and its three gradients; and with an activation after it, or in front of it, one
 * after the other. */
#include "kernels/cpu/cpu.h"

/* out (+)= column sums of x [rows, cols]. Each thread sums a strip of columns over all rows, so the order of
 * additions does not depend on the number of threads. A strip's sums fit in a few vector registers. */
static void column_sums(const struct device *dev, const elem *x, int64_t rows, int64_t cols, int64_t stride,
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
                sum[j] += from_elem(x[i * stride + begin + j]);
        for (int64_t j = 0; j < count; j++)
            out[begin + j] = sum[j] + (accumulate ? out[begin + j] : 0);
    }
}

/* The products of a layer. */
static struct gemm forward_product(const struct linear_spec *s, int64_t ldx, int64_t ldw, int64_t ldy,
                                   bool bias) {
    return (struct gemm){false, true, s->rows, s->out, s->in, ldx, ldw, ldy, false, bias};
}

static struct gemm dx_product(const struct linear_spec *s, int64_t ldy, int64_t ldw, int64_t ldx, bool add) {
    return (struct gemm){false, false, s->rows, s->in, s->out, ldy, ldw, ldx, add, false};
}

static struct gemm dw_product(const struct linear_spec *s, int64_t ldy, int64_t ldx, int64_t ldw, bool add) {
    return (struct gemm){true, false, s->out, s->in, s->rows, ldy, ldx, ldw, add, false};
}

int CPU(linear_plan)(struct device *dev, const struct linear_spec *s, struct op_cost *cost, struct error *e) {
    size_t most = 0;
    CPU(plan_product)(dev, s->rows, s->in, s->out);
    for (int on = 0; on < 2; on++) {
        struct gemm y = forward_product(s, s->in, s->in, s->out, on),
                    dx = dx_product(s, s->out, s->in, s->in, on),
                    dw = dw_product(s, s->out, s->in, s->in, on);
        if (CPU(gemm_plan)(dev, &y, false, &most, e) != 0 || CPU(gemm_plan)(dev, &dx, false, &most, e) != 0 ||
            CPU(gemm_plan)(dev, &dw, true, &most, e) != 0)
            return -1;
    }
    *cost = (struct op_cost){.workspace = most};
    return 0;
}

void CPU(linear)(struct device *dev, const struct linear_spec *s, tensor x, tensor w, tensor bias, tensor y) {
    call_progress_callback(dev);
    check_elem("linear", "x", x, s->rows, s->in, 0, 0, 0);
    check_elem("linear", "W", w, s->out, s->in, 0, 0, 0);
    check_elem("linear", "y", y, s->rows, s->out, 0, 0, 0);
    if (bias.data)
        check_elem("linear", "bias", bias, s->out, 0, 0, 0, 0);
    struct gemm g = forward_product(s, x.stride[0], w.stride[0], y.stride[0], bias.data != NULL);
    CPU(gemm)(dev, &g, x.data, w.data, bias.data, y.data, 0);
}

void CPU(linear_backward)(struct device *dev, const struct linear_spec *s, tensor dy, tensor dy_sums,
                          tensor x, tensor w, tensor dx, bool add_dx, tensor dw, tensor dbias,
                          bool accumulate) {
    call_progress_callback(dev);
    check_elem("linear_backward", "dy", dy, s->rows, s->out, 0, 0, 0);
    check_elem("linear_backward", "x", x, s->rows, s->in, 0, 0, 0);
    check_real("linear_backward", "dW", dw, s->out, s->in, 0, 0, 0);
    if (dy_sums.data)
        check_real("linear_backward", "dy_sums", dy_sums, s->out, 0, 0, 0, 0);
    struct gemm g = dw_product(s, dy.stride[0], x.stride[0], dw.stride[0], accumulate);
    CPU(gemm_real)(dev, &g, dy.data, x.data, dw.data, 0);
    if (dbias.data && dy_sums.data)
        sum_partials(dy_sums.data, 1, s->out, s->out, dbias.data, accumulate);
    else if (dbias.data)
        column_sums(dev, dy.data, s->rows, s->out, dy.stride[0], dbias.data, accumulate);
    call_progress_callback(dev);
    if (dx.data) {
        check_elem("linear_backward", "W", w, s->out, s->in, 0, 0, 0);
        check_elem("linear_backward", "dx", dx, s->rows, s->in, 0, 0, 0);
        g = dx_product(s, dy.stride[0], w.stride[0], dx.stride[0], add_dx);
        CPU(gemm)(dev, &g, dy.data, w.data, NULL, dx.data, 0);
    }
}

/* ---- with an activation ---- */

void CPU(linear_act)(struct device *dev, const struct linear_spec *s, enum act_type type, tensor x, tensor w,
                     tensor bias, tensor u, tensor act) {
    struct act_spec spec = {type, s->rows, s->out};
    CPU(linear)(dev, s, x, w, bias, u);
    CPU(mlp_act)(dev, &spec, u, tensor_none(), act);
}

void CPU(act_linear_backward)(struct device *dev, const struct linear_spec *s, enum act_type type, tensor dy,
                              tensor dy_sums, tensor act, tensor w, tensor u, tensor du, tensor dw,
                              tensor dbias, bool accumulate) {
    struct act_spec spec = {type, s->rows, s->in};
    CPU(linear_backward)(dev, s, dy, dy_sums, act, w, du, false, dw, dbias, accumulate);
    CPU(mlp_act_backward)(dev, &spec, du, u, tensor_none(), du, tensor_none());
}
