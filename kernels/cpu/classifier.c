/* classifier: the vocabulary projection, softmax, loss and all gradients, in chunks of rows, so that the
 * logits of a whole batch never exist at once. Products are over the vocabulary alone: rows of W and dW that pad it are
 * left as they are. */
#include "kernels/cpu/cpu.h"

/* Most memory for the logits of a chunk, unless that is fewer than MIN_ROWS rows: the matrix products are
 * slow for few rows, as each reads all of W. */
enum { CHUNK_BYTES = 128 << 20, MIN_ROWS = 256 };

static int64_t chunk_rows(const struct classifier_spec *s) {
    int64_t rows = CHUNK_BYTES / (s->vocab * (int64_t)sizeof(real));
    return min64(s->rows, max64(rows, MIN_ROWS));
}

/* The products of a chunk. The gradient of a row of logits, whose elements may be smaller than its reals,
 * overwrites the row, so the strides differ. */
static struct gemm logits_product(const struct classifier_spec *s, int64_t rows, int64_t ldh) {
    return (struct gemm){false, true, rows, s->vocab, s->hidden, ldh, s->hidden, s->vocab, false, false};
}

static int64_t gradient_stride(const struct classifier_spec *s) {
    return s->vocab * (int64_t)(sizeof(real) / sizeof(elem));
}

static struct gemm dh_product(const struct classifier_spec *s, int64_t rows, int64_t ldh) {
    return (struct gemm){false,     false, rows,  s->hidden, s->vocab, gradient_stride(s),
                         s->hidden, ldh,   false, false};
}

static struct gemm dw_product(const struct classifier_spec *s, int64_t rows, int64_t ldh, bool add) {
    return (struct gemm){true, false,     s->vocab, s->hidden, rows, gradient_stride(s),
                         ldh,  s->hidden, add,      false};
}

/* The workspace: losses, logits, and what the products need. */
static size_t logits_offset(const struct classifier_spec *s) {
    return (size_t)round_up(chunk_rows(s) * (int64_t)sizeof(double), 64);
}

static size_t products_offset(const struct classifier_spec *s) {
    return logits_offset(s) + (size_t)round_up(chunk_rows(s) * s->vocab * (int64_t)sizeof(real), 64);
}

int CPU(classifier_plan)(struct device *dev, const struct classifier_spec *s, struct op_cost *cost,
                         struct error *e) {
    int64_t chunk = chunk_rows(s);
    const int64_t sizes[] = {chunk, s->rows % chunk};
    size_t most = 0;
    CPU(plan_product)(dev, s->rows, s->hidden, s->vocab);
    for (int i = 0; i < 2 && sizes[i] > 0; i++) {
        struct gemm products[] = {logits_product(s, sizes[i], s->hidden), dh_product(s, sizes[i], s->hidden),
                                  dw_product(s, sizes[i], s->hidden, false),
                                  dw_product(s, sizes[i], s->hidden, true)};
        for (int j = 0; j < 4; j++)
            if (CPU(gemm_plan)(dev, &products[j], j != 1, &most, e) != 0)
                return -1;
    }
    *cost = (struct op_cost){.workspace = products_offset(s) + most};
    return 0;
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

/* Logits of one row become their gradient (if wanted), as elements at the row's beginning; returns the loss in
 * nats. correct: NULL, or where to write 1 or 0. */
static double row_loss(real *x, int64_t vocab, int32_t target, double scale, bool want_gradient,
                       int32_t *correct) {
    if (correct)
        *correct = 0;
    if (target < 0) {
        if (want_gradient)
            memset(x, 0, (size_t)vocab * sizeof(elem));
        return 0;
    }
    real max = row_max(x, vocab), picked = x[target];
    if (correct)
        *correct = is_correct(x, target, max);
    double sum = exp_in_place(x, vocab, max);
    if (want_gradient) {
        real factor = (real)(scale / sum);
        real at_target = x[target] * factor - (real)scale;
        elem *gradient = (elem *)x;
        int64_t i = 0;
        for (; i + VL <= vocab; i += VL)
            vstore_elem(gradient + i, vload(x + i) * factor);
        for (; i < vocab; i++)
            gradient[i] = to_elem(x[i] * factor);
        gradient[target] = to_elem(at_target);
    }
    return log(sum) + (double)max - (double)picked;
}

void CPU(classifier)(struct device *dev, const struct classifier_spec *s, tensor h, tensor w, tensor targets,
                     double scale, struct step_state *state, tensor correct, tensor dh, tensor dw,
                     bool accumulate) {
    int64_t V = s->vocab, C = s->hidden, chunk = chunk_rows(s);
    check_elem("classifier", "h", h, s->rows, C, 0, 0, 0);
    check_elem("classifier", "W", w, classifier_padded(s), C, 0, 0, 0);
    check_i32("classifier", "targets", targets, s->rows, 0);
    if (correct.data)
        check_i32("classifier", "correct", correct, s->rows, 0);
    bool want_gradient = dh.data != NULL;
    if (want_gradient) {
        check_elem("classifier", "dh", dh, s->rows, C, 0, 0, 0);
        check_real("classifier", "dW", dw, classifier_padded(s), C, 0, 0, 0);
    }
    double *losses = cpu_workspace(dev, products_offset(s), "classifier");
    real *logits = (real *)((char *)losses + logits_offset(s));
    const int32_t *target = targets.data;
    int32_t *hits = correct.data;
    for (int64_t begin = 0; begin < s->rows; begin += chunk) {
        int64_t rows = min64(chunk, s->rows - begin);
        const elem *x = (elem *)h.data + begin * h.stride[0];
        struct gemm g = logits_product(s, rows, h.stride[0]);
        CPU(gemm_real)(dev, &g, x, w.data, logits, products_offset(s));
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
        g = dh_product(s, rows, dh.stride[0]);
        CPU(gemm)
        (dev, &g, (elem *)logits, w.data, NULL, (elem *)dh.data + begin * dh.stride[0], products_offset(s));
        g = dw_product(s, rows, h.stride[0], accumulate || begin > 0);
        CPU(gemm_real)(dev, &g, (elem *)logits, x, dw.data, products_offset(s));
    }
}
