/* qk_norm: RMSNorm of every head of q and k of a row of qkv, each with one weight for all heads. v is copied. The
 * backward computes the root mean squares again, so nothing is saved. */
#include <math.h>

#include "kernels/cpu/cpu.h"

static int64_t row_heads(const struct qk_norm_spec *s) {
    return s->heads + 2 * s->kv_heads;
}

struct op_cost CPU(qk_norm_plan)(const struct device *dev, const struct qk_norm_spec *s) {
    return (struct op_cost){.workspace =
                                (size_t)(dev->threads * round_up(2 * s->head_dim, 16)) * sizeof(real)};
}

static void check_qk_norm(const char *op, const struct qk_norm_spec *s, tensor x, tensor y, tensor w_q,
                          tensor w_k) {
    const char *names[] = {"qkv", "the result"};
    const tensor rows[] = {x, y};
    for (int i = 0; i < 2; i++) {
        check_elem(op, names[i], rows[i], s->rows, row_heads(s), s->head_dim, 0, 0);
        check_contiguous(op, names[i], rows[i]);
    }
    check_elem(op, "the weight of q", w_q, s->head_dim, 0, 0, 0, 0);
    check_elem(op, "the weight of k", w_k, s->head_dim, 0, 0, 0, 0);
}

static real inverse_rms(const struct qk_norm_spec *s, const elem *x) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < s->head_dim; c++)
        sum += from_elem(x[c]) * from_elem(x[c]);
    return (real)(1 / sqrt((double)sum / (double)s->head_dim + s->eps));
}

static void copy_values(const struct qk_norm_spec *s, const elem *from, elem *to) {
    if (from != to)
        memcpy(to, from, (size_t)(s->kv_heads * s->head_dim) * sizeof(elem));
}

void CPU(qk_norm)(struct device *dev, const struct qk_norm_spec *s, tensor x, tensor w_q, tensor w_k,
                  tensor y) {
    (void)dev; /* in a build without OpenMP */
    check_qk_norm("qk_norm", s, x, y, w_q, w_k);
    int64_t d = s->head_dim, row = row_heads(s), normed = s->heads + s->kv_heads;
#pragma omp parallel for num_threads(dev->threads)
    for (int64_t n = 0; n < s->rows; n++) {
        const elem *from = (elem *)x.data + n * row * d;
        elem *to = (elem *)y.data + n * row * d;
        for (int64_t h = 0; h < normed; h++) {
            const elem *in = from + h * d, *w = h < s->heads ? w_q.data : w_k.data;
            elem *out = to + h * d;
            real factor = inverse_rms(s, in);
#pragma omp simd
            for (int64_t c = 0; c < d; c++)
                out[c] = to_elem(from_elem(in[c]) * factor * from_elem(w[c]));
        }
        copy_values(s, from + normed * d, to + normed * d);
    }
}

/* With xhat = x / rms and g = dy w: dx = (g - xhat mean(g xhat)) / rms; dw += dy xhat. dx may be dy. */
static void head_backward(const struct qk_norm_spec *s, const elem *dy, const elem *x, const elem *w,
                          elem *dx, real *dw) {
    int64_t d = s->head_dim;
    real factor = inverse_rms(s, x), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < d; c++) {
        real xhat = from_elem(x[c]) * factor;
        sum += from_elem(dy[c]) * from_elem(w[c]) * xhat;
        dw[c] += from_elem(dy[c]) * xhat;
    }
    real mean = sum / (real)d;
#pragma omp simd
    for (int64_t c = 0; c < d; c++)
        dx[c] = to_elem(factor * (from_elem(dy[c]) * from_elem(w[c]) - from_elem(x[c]) * factor * mean));
}

void CPU(qk_norm_backward)(struct device *dev, const struct qk_norm_spec *s, tensor dy, tensor x, tensor w_q,
                           tensor w_k, tensor dx, tensor dw_q, tensor dw_k, bool accumulate) {
    check_qk_norm("qk_norm_backward", s, x, dx, w_q, w_k);
    check_qk_norm("qk_norm_backward", s, dy, dx, w_q, w_k);
    check_real("qk_norm_backward", "dw_q", dw_q, s->head_dim, 0, 0, 0, 0);
    check_real("qk_norm_backward", "dw_k", dw_k, s->head_dim, 0, 0, 0, 0);
    int64_t d = s->head_dim, row = row_heads(s), normed = s->heads + s->kv_heads,
            stride = round_up(2 * d, 16);
    real *partial = cpu_workspace(dev, CPU(qk_norm_plan)(dev, s).workspace, "qk_norm_backward");
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = partial + omp_get_thread_num() * stride;
        memset(mine, 0, (size_t)(2 * d) * sizeof(real));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s->rows; n++) {
            const elem *g = (elem *)dy.data + n * row * d, *in = (elem *)x.data + n * row * d;
            elem *to = (elem *)dx.data + n * row * d;
            for (int64_t h = 0; h < normed; h++)
                head_backward(s, g + h * d, in + h * d, h < s->heads ? w_q.data : w_k.data, to + h * d,
                              h < s->heads ? mine : mine + d);
            copy_values(s, g + normed * d, to + normed * d);
        }
    }
    sum_partials(partial, dev->threads, stride, d, dw_q.data, accumulate);
    sum_partials(partial + d, dev->threads, stride, d, dw_k.data, accumulate);
}
