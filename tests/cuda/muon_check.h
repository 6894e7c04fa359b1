/* Muon's operations on the three backends of fixture.h. In bf16 the measure of orthogonalize's error is that of the
 * iterations as they are published, with every matrix rounded to bf16. */
#ifndef IHA_TESTS_CUDA_MUON_CHECK_H
#define IHA_TESTS_CUDA_MUON_CHECK_H

#include "kernels/rounding.h"
#include "tests/cuda/fixture.h"

/* A step state on each backend, as step_decide leaves it. */
static inline struct operand muon_state(struct backends *k, int skip) {
    struct operand s = {.dtype = DTYPE_I32};
    EACH(k, b) {
        struct step_state *state = b->k->alloc(b->dev, sizeof *state, NULL);
        struct step_state value = {.lr = 0.01, .factor = 0.75, .skip = skip, .history = {.updates = 7}};
        k->memory[k->operands][b->which] = state;
        s.on[b->which].data = state;
        b->k->step_write(b->dev, state, &value);
    }
    k->operands++;
    return s;
}

/* ---- orthogonalize ---- */

/* C = A B, in float; the result is rounded. */
static inline void muon_multiply(const double *a, const double *b, double *c, int64_t m, int64_t n,
                                 int64_t k) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += (float)a[i * k + l] * (float)b[l * n + j];
            c[i * n + j] = round_to(DTYPE_BF16, (double)sum);
        }
}

/* In place: X is wide, [rows,cols]. */
static inline void muon_plain_bf16(double *x, int64_t rows, int64_t cols) {
    int64_t n = rows * cols, squared = rows * rows;
    double *t = calloc((size_t)n, sizeof *t), *bx = calloc((size_t)n, sizeof *t);
    double *gram = calloc((size_t)squared, sizeof *t), *poly = calloc((size_t)squared, sizeof *t), norm = 0;
    for (int64_t i = 0; i < n; i++)
        norm += x[i] * x[i];
    for (int64_t i = 0; i < n; i++)
        x[i] = round_to(DTYPE_BF16, x[i] / sqrt(norm));
    for (int step = 0; step < 5; step++) {
        for (int64_t i = 0; i < n; i++)
            t[i % cols * rows + i / cols] = x[i];
        muon_multiply(x, t, gram, rows, rows, cols);
        muon_multiply(gram, gram, poly, rows, rows, rows);
        for (int64_t i = 0; i < squared; i++)
            poly[i] = round_to(DTYPE_BF16, -4.7750 * gram[i] + 2.0315 * poly[i]);
        muon_multiply(poly, x, bx, rows, cols, rows);
        for (int64_t i = 0; i < n; i++)
            x[i] = round_to(DTYPE_BF16, round_to(DTYPE_BF16, 3.4445 * x[i]) + bx[i]);
    }
    free(t), free(bx), free(gram), free(poly);
}

static inline void muon_transpose(double *x, int64_t rows, int64_t cols) {
    double *copy = malloc((size_t)(rows * cols) * sizeof *copy);
    memcpy(copy, x, (size_t)(rows * cols) * sizeof *copy);
    for (int64_t i = 0; i < rows * cols; i++)
        x[i % cols * rows + i / cols] = copy[i];
    free(copy);
}

/* Replace the plain backend's result by that of the iterations in bf16. */
static inline void muon_plain_in_bf16(struct backends *k, struct operand x, double *values, int64_t rows,
                                      int64_t cols) {
    if (rows > cols)
        muon_transpose(values, rows, cols);
    muon_plain_bf16(values, rows < cols ? rows : cols, rows < cols ? cols : rows);
    if (rows > cols)
        muon_transpose(values, cols, rows);
    k->each[PLAIN].k->upload(k->each[PLAIN].dev, on(x, &k->each[PLAIN]), values, DTYPE_F64);
}

static inline void check_orthogonalize(enum device_precision precision, int64_t rows, int64_t cols,
                                       double scale) {
    struct backends *k = backends(precision);
    struct orthogonalize_spec spec = {rows, cols};
    struct operand state = muon_state(k, 0), x = scaled_input(k, DTYPE_F32, scale, 0, rows, cols, 0, 0, 0);
    double *values = values_on(&k->each[EXACT], x);
    plan(k, (struct op_spec){.kind = OP_ORTHOGONALIZE, .orthogonalize = spec});
    EACH(k, b)
    b->k->orthogonalize(b->dev, &spec, on(x, b), on(state, b).data);
    if (precision == DEVICE_BF16) {
        muon_plain_in_bf16(k, x, values, rows, cols);
        x.dtype = DTYPE_BF16;
    }
    expect_close("orthogonalize", "x", k, x);
    free(values);
    done(k);
}

/* ---- momentum and update ---- */

enum { MUON_INDEX = 12345 /* of the first group in rounding, and half of the second's */ };

static inline void check_muon(enum device_precision precision, int64_t start, int64_t each, int64_t gap,
                              int skip) {
    struct backends *k = backends(precision);
    int64_t n = start + 2 * (each + gap);
    struct operand state = muon_state(k, skip), g = input(k, DTYPE_F32, n, 0, 0, 0, 0);
    struct operand m = input(k, DTYPE_F32, n, 0, 0, 0, 0), master = input(k, DTYPE_F32, n, 0, 0, 0, 0);
    struct operand p = precision == DEVICE_BF16 ? input(k, DTYPE_BF16, n, 0, 0, 0, 0) : absent();
    const struct param_group groups[] = {
        {start, start + each, 2, 0.1f, 1.5f, MUON_INDEX},
        {start + each + gap, start + 2 * each + gap, 0.5f, 0, 3, 2 * MUON_INDEX}};
    struct backend *cuda = &k->each[CUDA];
    double *before = p.dtype == DTYPE_BF16 && p.on[CUDA].data ? values_on(cuda, p) : NULL;
    EACH(k, b) {
        b->k->muon_momentum(b->dev, 0.9, groups, 2, on(g, b), on(m, b), on(state, b).data);
        b->k->muon_update(b->dev, groups, 2, on(master, b), b->which == CUDA ? on(p, b) : tensor_none(),
                          on(g, b), on(state, b).data);
    }
    expect_close("muon", "g", k, g);
    expect_close("muon", "m", k, m);
    expect_close("muon", "master", k, master);
    double *weights = values_on(cuda, master), *values = before ? values_on(cuda, p) : NULL;
    for (int64_t i = 0; i < n && before; i++) {
        bool inside = !skip && ((i >= groups[0].begin && i < groups[0].end) ||
                                (i >= groups[1].begin && i < groups[1].end));
        const struct param_group *g = &groups[i >= groups[1].begin];
        uint32_t bits =
            (uint32_t)round_stochastic((float)weights[i], 7, (uint64_t)(g->rounding_index + i - g->begin))
            << 16;
        float rounded;
        memcpy(&rounded, &bits, sizeof rounded);
        assert_true(values[i] == (inside ? (double)rounded : before[i]));
    }
    free(before), free(weights), free(values);
    done(k);
}

#endif
