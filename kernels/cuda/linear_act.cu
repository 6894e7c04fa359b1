/* linear_act and act_linear_backward: a linear layer with GELU after it, and one with GELU in front of it
 * backward.
 *
 * cuBLASLt can apply GELU, or its derivative, to a product before that is written. This saves a read of [N,F] forward,
 * and a write and a read of it backward. The product and mlp_act run one after the other
 *   - in fp32, since the library approximates GELU,
 *   - where u's rows are not a multiple of 8 elements,
 *   - with system.deterministic, where nothing is timed,
 *   - where timing says that it is faster,
 *   - where the library has no such product, or a wrong one (check_matmul.cu).
 * IHA_GELU=fused or IHA_GELU=apart in the environment chooses without timing, to compare them. */
#include <stdio.h>

#include "kernels/cuda/linear.h"
#include "kernels/cuda/timing.h"

enum { FUSED, APART };

/* act [N,out] = gelu(x W^T + bias), u beside it. */
static struct matmul product_with_gelu(const struct linear_spec *s, int64_t ldx, int64_t ldw, int64_t ldact,
                                       bool bias, int64_t ldu) {
    struct matmul product = linear_product(s, DTYPE_BF16, ldx, ldw, ldact, bias);
    product.epilogue = MATMUL_GELU;
    product.ldaux = ldu;
    return product;
}

/* du [N,in] = dy W * gelu'(u) */
static struct matmul product_with_derivative(const struct linear_spec *s, int64_t ldy, int64_t ldw,
                                             int64_t lddu, int64_t ldu) {
    struct matmul product = linear_dx_product(s, DTYPE_BF16, ldy, ldw, lddu);
    product.epilogue = MATMUL_GELU_BACKWARD;
    product.ldaux = ldu;
    return product;
}

static int serving(struct device *dev, struct matmul fused, enum act_type type, tensor u) {
    return type == ACT_GELU_TANH && aligned16({u.data}) && matmul_is_planned(dev, fused) ? FUSED : APART;
}

static void forward_by(int which, struct device *dev, const struct linear_spec *s, enum act_type type,
                       tensor x, tensor w, tensor bias, tensor u, tensor act) {
    struct act_spec spec = {type, s->rows, s->out};
    if (which == FUSED) {
        run_matmul(
            dev,
            product_with_gelu(s, x.stride[0], w.stride[0], act.stride[0], bias.data != NULL, u.stride[0]),
            x.data, w.data, bias.data, false, act.data, u.data);
        return;
    }
    cuda_linear(dev, s, x, w, bias, u);
    cuda_mlp_act(dev, &spec, u, tensor_none(), act);
}

/* du alone: the other gradients do not depend on it. */
static void backward_by(int which, struct device *dev, const struct linear_spec *s, enum act_type type,
                        tensor dy, tensor w, tensor u, tensor du) {
    struct act_spec spec = {type, s->rows, s->in};
    if (which == FUSED) {
        run_matmul(dev, product_with_derivative(s, dy.stride[0], w.stride[0], du.stride[0], u.stride[0]),
                   dy.data, w.data, NULL, false, du.data, u.data);
        return;
    }
    run_matmul(dev, linear_dx_product(s, cuda_compute(dev), dy.stride[0], w.stride[0], du.stride[0]), dy.data,
               w.data, NULL, false, du.data);
    cuda_mlp_act_backward(dev, &spec, du, u, tensor_none(), du, tensor_none());
}

/* ---- plan ---- */

static tensor matrix(char *memory, int64_t rows, int64_t cols) {
    return tensor_of(memory, DTYPE_BF16, rows, cols, 0, 0, 0);
}

/* Bytes of a matrix, and of what follows it. */
static int64_t bytes_of(int64_t rows, int64_t cols) {
    return round_up(rows * cols * (int64_t)dtype_bytes(DTYPE_BF16), 256);
}

/* The faster one, as time_fastest(). In memory: x, W, bias, u, act. */
static int faster_forward(struct device *dev, const struct linear_spec *s, bool bias) {
    int64_t x = bytes_of(s->rows, s->in), w = bytes_of(s->out, s->in), b = bytes_of(1, s->out),
            u = bytes_of(s->rows, s->out);
    return time_fastest(dev, 2, (size_t)(x + w + b + 2 * u), MATMUL_WORKSPACE, [&](int i, char *at) {
        tensor add = bias ? tensor_of(at + x + w, DTYPE_BF16, s->out, 0, 0, 0, 0) : tensor_none();
        forward_by(i, dev, s, ACT_GELU_TANH, matrix(at, s->rows, s->in), matrix(at + x, s->out, s->in), add,
                   matrix(at + x + w + b, s->rows, s->out), matrix(at + x + w + b + u, s->rows, s->out));
        return true;
    });
}

/* In memory: dy, W, u, du. */
static int faster_backward(struct device *dev, const struct linear_spec *s) {
    int64_t dy = bytes_of(s->rows, s->out), w = bytes_of(s->out, s->in), u = bytes_of(s->rows, s->in);
    return time_fastest(dev, 2, (size_t)(dy + w + 2 * u), MATMUL_WORKSPACE, [&](int i, char *at) {
        backward_by(i, dev, s, ACT_GELU_TANH, matrix(at, s->rows, s->out), matrix(at + dy, s->out, s->in),
                    matrix(at + dy + w, s->rows, s->in), matrix(at + dy + w + u, s->rows, s->in));
        return true;
    });
}

/* Choose, once for a shape; a product that is not used is rejected. */
static void choose(struct device *dev, const struct linear_spec *s, const char *what, int which,
                   struct matmul fused, const std::function<int()> &time) {
    char name[160];
    if (fused.ldaux % 8 != 0 || matmul_is_planned(dev, fused) || matmul_is_rejected(dev, fused) ||
        !plan_matmul_if_supported(dev, fused, false))
        return;
    snprintf(name, sizeof name, "%s, %lld rows of %lld to %lld, bf16", what, (long long)s->rows,
             (long long)s->in, (long long)s->out);
    if (which < 0)
        which = choose_once(dev, name, {"fused", "apart"}, [&] {
            int timed = time();
            return timed < 0 ? APART : timed;
        });
    if (which != FUSED)
        reject_matmul(dev, fused);
}

int cuda_linear_act_plan(struct device *dev, const struct op_spec *spec, struct error *e) {
    const struct linear_spec *s = &spec->linear;
    bool bias = !spec->no_bias;
    int which;
    if (choice_of_environment("IHA_GELU", {"fused", "apart"}, &which, e) != 0)
        return -1;
    if (dev->deterministic || cuda_compute(dev) != DTYPE_BF16)
        return 0;
    if (spec->gelu_after)
        choose(dev, s, bias ? "linear, bias and gelu" : "linear and gelu", which,
               product_with_gelu(s, s->in, s->in, s->out, bias, s->out),
               [&] { return faster_forward(dev, s, bias); });
    if (spec->gelu_before && !spec->no_backward)
        choose(dev, s, "dx and the derivative of gelu", which,
               product_with_derivative(s, s->out, s->in, s->in, s->in),
               [&] { return faster_backward(dev, s); });
    return 0;
}

/* ---- the operations ---- */

void cuda_linear_act(struct device *dev, const struct linear_spec *s, enum act_type type, tensor x, tensor w,
                     tensor bias, tensor u, tensor act) {
    enum dtype t = cuda_compute(dev);
    check_shape("linear_act", "x", x, t, s->rows, s->in);
    check_shape("linear_act", "W", w, t, s->out, s->in);
    check_shape("linear_act", "u", u, t, s->rows, s->out);
    check_shape("linear_act", "act", act, t, s->rows, s->out);
    if (bias.data)
        check_shape("linear_act", "bias", bias, t, s->out);
    struct matmul fused =
        product_with_gelu(s, x.stride[0], w.stride[0], act.stride[0], bias.data != NULL, u.stride[0]);
    forward_by(serving(dev, fused, type, u), dev, s, type, x, w, bias, u, act);
}

void cuda_act_linear_backward(struct device *dev, const struct linear_spec *s, enum act_type type, tensor dy,
                              tensor dy_sums, tensor act, tensor w, tensor u, tensor du, tensor dw,
                              tensor dbias, bool accumulate) {
    enum dtype t = cuda_compute(dev);
    check_shape("act_linear_backward", "W", w, t, s->out, s->in);
    check_shape("act_linear_backward", "u", u, t, s->rows, s->in);
    check_shape("act_linear_backward", "du", du, t, s->rows, s->in);
    struct matmul fused = product_with_derivative(s, dy.stride[0], w.stride[0], du.stride[0], u.stride[0]);
    cuda_linear_backward(dev, s, dy, dy_sums, act, w, tensor_none(), false, dw, dbias, accumulate);
    backward_by(serving(dev, fused, type, u), dev, s, type, dy, w, u, du);
}
