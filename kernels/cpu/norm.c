/* residual_norm: the residual addition and the norm that follows it. A row is read from memory once and stays
 * in cache for the statistics and the normalization. */
#include "kernels/cpu/cpu.h"

struct row_stats {
    real mean; /* 0 for rmsnorm */
    real rstd;
};

struct op_cost CPU(norm_plan)(const struct device *dev, const struct norm_spec *s) {
    return (struct op_cost){.saved = (size_t)s->rows * sizeof(struct row_stats),
                            .workspace = (size_t)dev->threads * 3 * (size_t)s->hidden * sizeof(real)};
}

static struct row_stats row_statistics(const struct norm_spec *s, const elem *x) {
    int64_t C = s->hidden;
    real sum = 0, squares = 0;
    if (s->type == NORM_TYPE_LAYER) {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; c++)
            sum += from_elem(x[c]);
    }
    real mean = sum / (real)C;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++)
        squares += (from_elem(x[c]) - mean) * (from_elem(x[c]) - mean);
    return (struct row_stats){mean, 1 / REAL_SQRT(squares / (real)C + (real)s->eps)};
}

static void normalize(const elem *x, struct row_stats st, const elem *w, const elem *b, int64_t C, elem *y) {
    if (b) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
            y[c] = to_elem((from_elem(x[c]) - st.mean) * st.rstd * from_elem(w[c]) + from_elem(b[c]));
    } else {
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
            y[c] = to_elem((from_elem(x[c]) - st.mean) * st.rstd * from_elem(w[c]));
    }
}

void CPU(residual_norm)(struct device *dev, const struct norm_spec *s, tensor x, tensor delta, tensor w,
                        tensor b, tensor sum, tensor y, void *saved) {
    (void)dev;
    int64_t C = s->hidden;
    check_elem("residual_norm", "x", x, s->rows, C, 0, 0, 0);
    check_elem("residual_norm", "y", y, s->rows, C, 0, 0, 0);
    check_elem("residual_norm", "w", w, C, 0, 0, 0, 0);
    if (delta.data)
        check_elem("residual_norm", "sum", sum, s->rows, C, 0, 0, 0);
    struct row_stats *stats = saved;
#pragma omp parallel for
    for (int64_t n = 0; n < s->rows; n++) {
        const elem *in = (elem *)x.data + n * C;
        if (delta.data) {
            const elem *d = (elem *)delta.data + n * C;
            elem *out = (elem *)sum.data + n * C;
#pragma omp simd
            for (int64_t c = 0; c < C; c++)
                out[c] = to_elem(from_elem(in[c]) + from_elem(d[c]));
            in = out;
        }
        stats[n] = row_statistics(s, in);
        normalize(in, stats[n], w.data, b.data, C, (elem *)y.data + n * C);
    }
}

void CPU(residual_norm_recompute)(struct device *dev, const struct norm_spec *s, tensor sum, tensor w,
                                  tensor b, tensor y, const void *saved) {
    (void)dev;
    int64_t C = s->hidden;
    check_elem("residual_norm_recompute", "sum", sum, s->rows, C, 0, 0, 0);
    check_elem("residual_norm_recompute", "y", y, s->rows, C, 0, 0, 0);
    const struct row_stats *stats = saved;
#pragma omp parallel for
    for (int64_t n = 0; n < s->rows; n++)
        normalize((elem *)sum.data + n * C, stats[n], w.data, b.data, C, (elem *)y.data + n * C);
}

/* With g = dy * w and xhat = (x - mean) rstd:  dx (+)= rstd (g - mean(g) - xhat mean(g xhat)), where rmsnorm
 * has no mean(g); dw = sum_n dy xhat, db = sum_n dy; dx_sums: sum_n dx. */
static void norm_row_backward(const struct norm_spec *s, const elem *dy, const elem *x, const elem *w,
                              struct row_stats st, elem *dx, bool add_dx, real *dw, real *db, real *dx_sums) {
    int64_t C = s->hidden;
    real sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (int64_t c = 0; c < C; c++) {
        real g = from_elem(dy[c]) * from_elem(w[c]), xhat = (from_elem(x[c]) - st.mean) * st.rstd;
        sum_g += g;
        sum_gx += g * xhat;
        dw[c] += from_elem(dy[c]) * xhat;
    }
    real mean_g = s->type == NORM_TYPE_LAYER ? sum_g / (real)C : 0, mean_gx = sum_gx / (real)C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
        real g = from_elem(dy[c]) * from_elem(w[c]), xhat = (from_elem(x[c]) - st.mean) * st.rstd;
        real value = (add_dx ? from_elem(dx[c]) : 0) + st.rstd * (g - mean_g - xhat * mean_gx);
        dx[c] = to_elem(value);
        if (dx_sums)
            dx_sums[c] += value;
    }
    if (db) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
            db[c] += from_elem(dy[c]);
    }
}

void CPU(residual_norm_backward)(struct device *dev, const struct norm_spec *s, tensor dy, tensor sum,
                                 tensor w, const void *saved, tensor dx, bool add_dx, tensor dw, tensor db,
                                 tensor dx_sums, bool accumulate) {
    int64_t C = s->hidden;
    check_elem("residual_norm_backward", "dy", dy, s->rows, C, 0, 0, 0);
    check_elem("residual_norm_backward", "sum", sum, s->rows, C, 0, 0, 0);
    check_elem("residual_norm_backward", "dx", dx, s->rows, C, 0, 0, 0);
    check_real("residual_norm_backward", "dw", dw, C, 0, 0, 0, 0);
    if (dx_sums.data)
        check_real("residual_norm_backward", "dx_sums", dx_sums, C, 0, 0, 0, 0);
    const struct row_stats *stats = saved;
    size_t bytes = (size_t)dev->threads * 3 * (size_t)C * sizeof(real);
    real *partial = cpu_workspace(dev, bytes, "residual_norm_backward");
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = partial + omp_get_thread_num() * 3 * C;
        memset(mine, 0, (size_t)(3 * C) * sizeof(real));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s->rows; n++)
            norm_row_backward(s, (elem *)dy.data + n * C, (elem *)sum.data + n * C, w.data, stats[n],
                              (elem *)dx.data + n * C, add_dx, mine, db.data ? mine + C : NULL,
                              dx_sums.data ? mine + 2 * C : NULL);
    }
    sum_partials(partial, dev->threads, 3 * C, C, dw.data, accumulate);
    if (db.data)
        sum_partials(partial + C, dev->threads, 3 * C, C, db.data, accumulate);
    if (dx_sums.data)
        sum_partials(partial + 2 * C, dev->threads, 3 * C, C, dx_sums.data, false);
}
