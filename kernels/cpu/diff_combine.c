/* diff_combine: the two attentions of a differential layer's pairs of heads become one, normalized. */
#include "kernels/cpu/cpu.h"

/* A thread's partial gradients of w. */
static int64_t thread_reals(const struct diff_combine_spec *s) {
    return round_up(2 * s->head_dim, 16);
}

struct op_cost CPU(diff_combine_plan)(const struct device *dev, const struct diff_combine_spec *s) {
    return (struct op_cost){.workspace = (size_t)dev->threads *
                                         (sizeof(double) + (size_t)thread_reals(s) * sizeof(real))};
}

/* The exponentials that lambda is made of. */
struct lambda {
    real e1, e2, value;
};

static struct lambda lambda_of(const char *op, const struct diff_combine_spec *s, const tensor vectors[4]) {
    int64_t d = s->head_dim;
    for (int i = 0; i < 4; i++)
        check_elem(op, "lambda", vectors[i], d, 0, 0, 0, 0);
    real e1 = (real)exp((double)dot_elems(vectors[0].data, vectors[1].data, d)),
         e2 = (real)exp((double)dot_elems(vectors[2].data, vectors[3].data, d));
    return (struct lambda){e1, e2, e1 - e2 + (real)s->lambda_init};
}

static void check_arrays(const char *op, const struct diff_combine_spec *s, tensor o, tensor w, tensor out) {
    check_elem(op, "o", o, s->rows, 2, s->pairs, 2 * s->head_dim, 0);
    check_contiguous(op, "o", o);
    check_elem(op, "w", w, 2 * s->head_dim, 0, 0, 0, 0);
    check_elem(op, "out", out, s->rows, s->pairs, 2 * s->head_dim, 0, 0);
    check_contiguous(op, "out", out);
}

/* 1 / sqrt(mean(x^2) + eps) of x = a - lambda b. */
static real inverse_norm(const struct diff_combine_spec *s, const elem *a, const elem *b, real lambda) {
    int64_t n = 2 * s->head_dim;
    real squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < n; c++) {
        real x = from_elem(a[c]) - lambda * from_elem(b[c]);
        squares += x * x;
    }
    return 1 / REAL_SQRT(squares / (real)n + (real)s->eps);
}

void CPU(diff_combine)(struct device *dev, const struct diff_combine_spec *s, tensor o, tensor lambda_q1,
                       tensor lambda_k1, tensor lambda_q2, tensor lambda_k2, tensor w, tensor out) {
    (void)dev; /* in a build without OpenMP */
    const int64_t n = 2 * s->head_dim, half = s->pairs * n;
    const struct lambda l =
        lambda_of("diff_combine", s, (tensor[]){lambda_q1, lambda_k1, lambda_q2, lambda_k2});
    const real scale = (real)(1 - s->lambda_init), lambda = l.value;
    const elem *weight = w.data;
    check_arrays("diff_combine", s, o, w, out);
#pragma omp parallel for schedule(static) num_threads(dev->threads)
    for (int64_t pair = 0; pair < s->rows * s->pairs; pair++) {
        const elem *a = (elem *)o.data + pair / s->pairs * 2 * half + pair % s->pairs * n, *b = a + half;
        elem *to = (elem *)out.data + pair * n;
        real factor = scale * inverse_norm(s, a, b, lambda);
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            to[c] = to_elem(factor * from_elem(weight[c]) * (from_elem(a[c]) - lambda * from_elem(b[c])));
    }
}

/* With g = (1 - lambda_init) w dout and xhat = x / norm:  dx = (g - xhat mean(g xhat)) / norm, d_o = dx and
 * -lambda dx; dw += (1 - lambda_init) dout xhat, dlambda -= dx . b: one number out of everything, so that floats would
 * lose digits. */
static void pair_backward(const struct diff_combine_spec *s, real lambda, const elem *dout, const elem *a,
                          const elem *b, const elem *w, elem *da, elem *db, real *dw, double *dlambda) {
    const int64_t n = 2 * s->head_dim;
    const real scale = (real)(1 - s->lambda_init), rstd = inverse_norm(s, a, b, lambda);
    real sum = 0;
    double along = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < n; c++) {
        real xhat = (from_elem(a[c]) - lambda * from_elem(b[c])) * rstd, g = scale * from_elem(dout[c]);
        sum += g * from_elem(w[c]) * xhat;
        dw[c] += g * xhat;
    }
    const real mean = sum / (real)n;
#pragma omp simd reduction(+ : along)
    for (int64_t c = 0; c < n; c++) {
        real xhat = (from_elem(a[c]) - lambda * from_elem(b[c])) * rstd,
             g = scale * from_elem(w[c]) * from_elem(dout[c]);
        real dx = rstd * (g - xhat * mean);
        along += (double)dx * (double)from_elem(b[c]);
        da[c] = to_elem(dx);
        db[c] = to_elem(-lambda * dx);
    }
    *dlambda -= along;
}

/* d(lambda)/d(q) = e k, and d(lambda)/d(k) = e q. */
static void lambda_gradient(const struct diff_combine_spec *s, real d, tensor other, tensor gradient,
                            bool accumulate) {
    const elem *from = other.data;
    real *to = gradient.data;
    for (int64_t i = 0; i < s->head_dim; i++)
        to[i] = (accumulate ? to[i] : 0) + d * from_elem(from[i]);
}

void CPU(diff_combine_backward)(struct device *dev, const struct diff_combine_spec *s, tensor dout, tensor o,
                                tensor lambda_q1, tensor lambda_k1, tensor lambda_q2, tensor lambda_k2,
                                tensor w, tensor d_o, tensor dlambda_q1, tensor dlambda_k1, tensor dlambda_q2,
                                tensor dlambda_k2, tensor dw, bool accumulate) {
    const int64_t n = 2 * s->head_dim, half = s->pairs * n, stride = thread_reals(s);
    const struct lambda l =
        lambda_of("diff_combine_backward", s, (tensor[]){lambda_q1, lambda_k1, lambda_q2, lambda_k2});
    check_arrays("diff_combine_backward", s, o, w, dout);
    check_arrays("diff_combine_backward", s, d_o, w, dout);
    check_real("diff_combine_backward", "dw", dw, n, 0, 0, 0, 0);
    double *dlambdas = cpu_workspace(dev, CPU(diff_combine_plan)(dev, s).workspace, "diff_combine_backward");
    double sum = 0;
    real *partial = (real *)(dlambdas + dev->threads);
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = partial + omp_get_thread_num() * stride;
        double *dlambda = dlambdas + omp_get_thread_num();
        memset(mine, 0, (size_t)stride * sizeof(real));
        *dlambda = 0;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < s->rows * s->pairs; pair++) {
            int64_t at = pair / s->pairs * 2 * half + pair % s->pairs * n;
            const elem *a = (elem *)o.data + at;
            elem *da = (elem *)d_o.data + at;
            pair_backward(s, l.value, (elem *)dout.data + pair * n, a, a + half, w.data, da, da + half, mine,
                          dlambda);
        }
    }
    sum_partials(partial, dev->threads, stride, n, dw.data, accumulate);
    for (int thread = 0; thread < dev->threads; thread++)
        sum += dlambdas[thread];
    const real dlambda = (real)sum;
    lambda_gradient(s, dlambda * l.e1, lambda_k1, dlambda_q1, accumulate);
    lambda_gradient(s, dlambda * l.e1, lambda_q1, dlambda_k1, accumulate);
    lambda_gradient(s, -dlambda * l.e2, lambda_k2, dlambda_q2, accumulate);
    lambda_gradient(s, -dlambda * l.e2, lambda_q2, dlambda_k2, accumulate);
}

void CPU(add)(struct device *dev, tensor x, tensor y) {
    (void)dev; /* in a build without OpenMP */
    const int64_t B = x.shape[0], S = x.shape[1], H = x.shape[2], d = x.shape[3];
    check_elem("add", "x", x, B, S, H, d, 0);
    check_elem("add", "y", y, B, S, H, d, 0);
#pragma omp parallel for schedule(static) num_threads(dev->threads)
    for (int64_t row = 0; row < B * S; row++)
        for (int64_t h = 0; h < H; h++) {
            elem *to = (elem *)x.data + row / S * x.stride[0] + row % S * x.stride[1] + h * x.stride[2];
            const elem *from =
                (elem *)y.data + row / S * y.stride[0] + row % S * y.stride[1] + h * y.stride[2];
#pragma omp simd
            for (int64_t c = 0; c < d; c++)
                to[c] = to_elem(from_elem(to[c]) + from_elem(from[c]));
        }
}
