/* Muon: momentum, the orthogonalized direction by Newton-Schulz iterations, and the update. */
#include "kernels/cpu/cpu.h"

/* Over the ranges of the groups: body sees the index j. */
#define FOR_GROUPS(groups, count, i, j)                                                                      \
    for (int i = 0; i < (count); i++)                                                                        \
    _Pragma("omp parallel for simd schedule(static)") for (int64_t j = (groups)[i].begin;                    \
                                                           j < (groups)[i].end; j++)

void CPU(muon_momentum)(struct device *dev, double momentum, const struct param_group *groups, int count,
                        tensor g, tensor m, const struct step_state *state) {
    (void)dev;
    check_contiguous("muon_momentum", "g", g);
    check_contiguous("muon_momentum", "m", m);
    if (state->skip)
        return;
    real mu = (real)momentum, factor = (real)state->factor, *grad = g.data, *moment = m.data;
    FOR_GROUPS(groups, count, i, j) {
        real gj = factor * grad[j], mj = mu * moment[j] + gj;
        moment[j] = mj;
        grad[j] = gj + mu * mj;
    }
}

void CPU(muon_update)(struct device *dev, const struct param_group *groups, int count, int64_t first,
                      tensor master, tensor p, tensor o, const struct step_state *state) {
    (void)dev;
    if (state->skip)
        return;
    real *param = master.data;
    elem *rounded = p.data;
    const real *direction = o.data;
    uint32_t updates = (uint32_t)state->history.updates;
    for (int i = 0; i < count; i++) {
        real lr = (real)(state->lr * (double)groups[i].lr_scale), decay = lr * (real)groups[i].weight_decay;
        real scale = lr * (real)groups[i].muon_scale;
#pragma omp parallel for simd schedule(static)
        for (int64_t j = groups[i].begin; j < groups[i].end; j++) {
            param[j] -= scale * direction[j] + decay * param[j];
            store_rounded(rounded, param[j], updates, first, j);
        }
    }
}

/* ---- Newton-Schulz ---- */

static const real A1 = (real)3.4445, A3 = (real)-4.7750, A5 = (real)2.0315;
enum { ITERATIONS = 5, BLOCK = 192 /* rows of a symmetric product that are computed at once */ };

/* Scratch of one call; X is tall (rows > cols) or wide as x is, and its Gram matrix is of the smaller side. */
struct iteration {
    int64_t rows, cols, side;
    bool tall;
    real *x, *next;    /* [rows,cols] */
    real *gram, *poly; /* [side,side] */
    double *row_sums;  /* [rows] */
};

static size_t iteration_bytes(const struct orthogonalize_spec *s) {
    int64_t side = min64(s->rows, s->cols);
    return (size_t)round_up(2 * s->rows * s->cols + 2 * side * side, 16) * sizeof(real) +
           (size_t)s->rows * sizeof(double);
}

struct op_cost CPU(orthogonalize_plan)(const struct orthogonalize_spec *s) {
    return (struct op_cost){0, iteration_bytes(s)};
}

static struct iteration make_iteration(struct device *dev, const struct orthogonalize_spec *s) {
    int64_t n = s->rows * s->cols, side = min64(s->rows, s->cols);
    real *at = cpu_workspace(dev, iteration_bytes(s), "orthogonalize");
    return (struct iteration){.rows = s->rows,
                              .cols = s->cols,
                              .side = side,
                              .tall = s->rows > s->cols,
                              .x = at,
                              .next = at + n,
                              .gram = at + 2 * n,
                              .poly = at + 2 * n + side * side,
                              .row_sums = (double *)(at + round_up(2 * n + 2 * side * side, 16))};
}

/* X = x / |x|_F, zero if x is. Rows are summed in double, and then added in order, so that the bits do not depend on
 * the number of threads, and no gradient is too small to be scaled. */
static void normalize(struct iteration *t, const real *x) {
    double sum = 0;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < t->rows; i++) {
        double row = 0;
#pragma omp simd reduction(+ : row)
        for (int64_t j = 0; j < t->cols; j++)
            row += (double)x[i * t->cols + j] * (double)x[i * t->cols + j];
        t->row_sums[i] = row;
    }
    for (int64_t i = 0; i < t->rows; i++)
        sum += t->row_sums[i];
    double scale = sum > 0 ? 1 / sqrt(sum) : 0;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < t->rows * t->cols; i++)
        t->x[i] = (real)(scale * (double)x[i]);
}

/* The lower triangle of X X^T, or of X^T X where X is tall, by blocks of rows. */
static void gram_lower(struct device *dev, const struct iteration *t) {
    for (int64_t row = 0; row < t->side; row += BLOCK) {
        int64_t count = min64(BLOCK, t->side - row), n = row + count;
        call_progress_callback(dev);
        if (t->tall)
            gemm(true, false, count, n, t->rows, t->x + row, t->cols, t->x, t->cols, 0,
                 t->gram + row * t->side, t->side);
        else
            gemm(false, true, count, n, t->cols, t->x + row * t->cols, t->cols, t->x, t->cols, 0,
                 t->gram + row * t->side, t->side);
    }
}

/* The lower triangle of A^2 for the symmetric A. */
static void square_lower(struct device *dev, const struct iteration *t) {
    for (int64_t row = 0; row < t->side; row += BLOCK) {
        int64_t count = min64(BLOCK, t->side - row);
        call_progress_callback(dev);
        gemm(false, false, count, row + count, t->side, t->gram + row * t->side, t->side, t->gram, t->side, 0,
             t->poly + row * t->side, t->side);
    }
}

/* The upper triangle from the lower one, in tiles that stay in the first-level cache. */
static void mirror(real *a, int64_t side) {
    enum { TILE = 32 };
#pragma omp parallel for schedule(dynamic)
    for (int64_t i0 = 0; i0 < side; i0 += TILE)
        for (int64_t j0 = i0; j0 < side; j0 += TILE)
            for (int64_t i = i0; i < min64(i0 + TILE, side); i++)
                for (int64_t j = max64(j0, i + 1); j < min64(j0 + TILE, side); j++)
                    a[i * side + j] = a[j * side + i];
}

/* poly = b A + c A^2, from A^2 in its lower triangle. */
static void polynomial(const struct iteration *t) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t i = 0; i < t->side; i++)
#pragma omp simd
        for (int64_t j = 0; j <= i; j++)
            t->poly[i * t->side + j] = A3 * t->gram[i * t->side + j] + A5 * t->poly[i * t->side + j];
    mirror(t->poly, t->side);
}

static void iterate(struct device *dev, struct iteration *t) {
    gram_lower(dev, t);
    mirror(t->gram, t->side);
    square_lower(dev, t);
    polynomial(t);
    call_progress_callback(dev);
    memcpy(t->next, t->x, (size_t)(t->rows * t->cols) * sizeof(real));
    if (t->tall)
        gemm(false, false, t->rows, t->cols, t->cols, t->x, t->cols, t->poly, t->side, A1, t->next, t->cols);
    else
        gemm(false, false, t->rows, t->cols, t->rows, t->poly, t->side, t->x, t->cols, A1, t->next, t->cols);
    real *done = t->next;
    t->next = t->x;
    t->x = done;
}

void CPU(orthogonalize)(struct device *dev, const struct orthogonalize_spec *s, tensor x,
                        const struct step_state *state) {
    check_real("orthogonalize", "x", x, s->rows, s->cols, 0, 0, 0);
    check_contiguous("orthogonalize", "x", x);
    if (state->skip)
        return;
    struct iteration t = make_iteration(dev, s);
    normalize(&t, x.data);
    for (int i = 0; i < ITERATIONS; i++)
        iterate(dev, &t);
    memcpy(x.data, t.x, (size_t)(s->rows * s->cols) * sizeof(real));
}
