/* classifier: the vocabulary projection, softmax, loss and all gradients, in chunks of rows, so that the
 * logits of a whole batch never exist at once. */
#include "kernels/cpu/cpu.h"

/* Most memory for the logits of a chunk, unless that is fewer than MIN_ROWS rows: the matrix products are
 * slow for few rows, as each reads all of W. */
enum { CHUNK_BYTES = 128 << 20, MIN_ROWS = 256 };

static int64_t chunk_rows(const struct classifier_spec *s) {
    int64_t rows = CHUNK_BYTES / (s->vocab * (int64_t)sizeof(real));
    return min64(s->rows, max64(rows, MIN_ROWS));
}

struct op_cost classifier_plan(const struct device *dev, const struct classifier_spec *s) {
    (void)dev;
    size_t rows = (size_t)chunk_rows(s);
    return (struct op_cost){.workspace = rows * (size_t)s->vocab * sizeof(real) + rows * sizeof(double) + 64};
}

static real row_max(const real *x, int64_t n) {
    real m = x[0];
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; i++)
        m = x[i] > m ? x[i] : m;
    return m;
}

/* x = exp(x - max); returns the sum. */
static double exp_in_place(real *x, int64_t n, real max) {
    vreal total = {0};
    double sum = 0;
    int64_t i = 0;
    while (i + VL <= n) {
        /* Sums of 1024 vectors are kept in float and added in double: a vocabulary has 10^5 terms. */
        int64_t end = min64(n, i + 1024 * VL);
        total = (vreal){0};
        for (; i + VL <= end; i += VL) {
            vreal e = vexp(vload(x + i) - max);
            vstore(x + i, e);
            total += e;
        }
        sum += (double)vsum(total);
    }
    for (; i < n; i++) {
        x[i] = (real)exp((double)(x[i] - max));
        sum += (double)x[i];
    }
    return sum;
}

/* Whether the target is the first of the largest logits. */
static bool is_correct(const real *x, int32_t target, real max) {
    if (x[target] != max)
        return false;
    for (int32_t i = 0; i < target; i++)
        if (x[i] == max)
            return false;
    return true;
}

/* Logits of one row become their gradient (if wanted); returns the loss in nats. correct: NULL, or where to
 * write 1 or 0. */
static double row_loss(real *x, int64_t vocab, int32_t target, double scale, bool want_gradient,
                       int32_t *correct) {
    if (correct)
        *correct = 0;
    if (target < 0) {
        if (want_gradient)
            memset(x, 0, (size_t)vocab * sizeof(real));
        return 0;
    }
    real max = row_max(x, vocab), picked = x[target];
    if (correct)
        *correct = is_correct(x, target, max);
    double sum = exp_in_place(x, vocab, max);
    if (want_gradient) {
        real factor = (real)(scale / sum);
#pragma omp simd
        for (int64_t i = 0; i < vocab; i++)
            x[i] *= factor;
        x[target] -= (real)scale;
    }
    return log(sum) + (double)max - (double)picked;
}

void cpu_classifier(struct device *dev, const struct classifier_spec *s, tensor h, tensor w, tensor targets,
                    double scale, struct step_state *state, tensor correct, tensor dh, tensor dw,
                    bool accumulate) {
    int64_t V = s->vocab, C = s->hidden, chunk = chunk_rows(s);
    check_real("classifier", "h", h, s->rows, C, 0, 0, 0);
    check_real("classifier", "W", w, V, C, 0, 0, 0);
    check_i32("classifier", "targets", targets, s->rows, 0);
    if (correct.data)
        check_i32("classifier", "correct", correct, s->rows, 0);
    bool want_gradient = dh.data != NULL;
    if (want_gradient) {
        check_real("classifier", "dh", dh, s->rows, C, 0, 0, 0);
        check_real("classifier", "dW", dw, V, C, 0, 0, 0);
    }
    double *losses = cpu_workspace(dev, classifier_plan(dev, s).workspace, "classifier");
    real *logits = (real *)((char *)losses + round_up(chunk * (int64_t)sizeof(double), 64));
    const int32_t *target = targets.data;
    int32_t *hits = correct.data;
    for (int64_t begin = 0; begin < s->rows; begin += chunk) {
        int64_t rows = min64(chunk, s->rows - begin);
        const real *x = (real *)h.data + begin * h.stride[0];
        gemm(false, true, rows, V, C, x, h.stride[0], w.data, C, 0, logits, V);
#pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < rows; n++)
            losses[n] = row_loss(logits + n * V, V, target[begin + n], scale, want_gradient,
                                 hits ? hits + begin + n : NULL);
        /* In the order of rows: the loss does not depend on the number of threads. */
        for (int64_t n = 0; n < rows; n++)
            state->loss += scale * losses[n];
        for (int64_t n = 0; n < rows; n++)
            state->targets += target[begin + n] >= 0;
        if (!want_gradient)
            continue;
        gemm(false, false, rows, C, V, logits, V, w.data, C, 0, (real *)dh.data + begin * dh.stride[0],
             dh.stride[0]);
        gemm(true, false, V, C, rows, logits, V, x, h.stride[0], accumulate || begin > 0, dw.data, C);
    }
}
