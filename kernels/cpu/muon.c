/* Muon: momentum, the orthogonalized direction by Newton-Schulz iterations, and the update. The matrices of an
 * iteration are of elements, so in bf16 products are oneDNN's of bf16. */
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

void CPU(muon_update)(struct device *dev, const struct param_group *groups, int count, tensor master,
                      tensor p, tensor o, const struct step_state *state) {
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
        int64_t first = groups[i].rounding_index - groups[i].begin;
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
    double *row_sums;  /* [rows] */
    elem *x, *next;    /* [rows,cols] */
    elem *gram, *poly; /* [side,side] */
    size_t bytes;
};

/* base: NULL to learn the bytes. */
static struct iteration make_iteration(const struct orthogonalize_spec *s, char *base) {
    int64_t n = s->rows * s->cols, side = min64(s->rows, s->cols), sums = round_up(s->rows, 8);
    struct iteration t = {.rows = s->rows, .cols = s->cols, .side = side, .tall = s->rows > s->cols};
    t.bytes =
        (size_t)round_up(sums * (int64_t)sizeof(double) + 2 * (n + side * side) * (int64_t)sizeof(elem), 64);
    if (!base)
        return t;
    t.row_sums = (double *)base;
    t.x = (elem *)(t.row_sums + sums);
    t.next = t.x + n;
    t.gram = t.next + n;
    t.poly = t.gram + side * side;
    return t;
}

/* The products of an iteration. Of the two symmetric ones: `count` rows of the lower triangle, from `row` on. */
static struct gemm gram_product(const struct iteration *t, int64_t row, int64_t count) {
    return (struct gemm){.transpose_a = t->tall,
                         .transpose_b = !t->tall,
                         .m = count,
                         .n = row + count,
                         .k = t->tall ? t->rows : t->cols,
                         .lda = t->cols,
                         .ldb = t->cols,
                         .ldc = t->side};
}

static struct gemm square_product(const struct iteration *t, int64_t row, int64_t count) {
    return (struct gemm){
        .m = count, .n = row + count, .k = t->side, .lda = t->side, .ldb = t->side, .ldc = t->side};
}

static struct gemm step_product(const struct iteration *t) {
    return (struct gemm){.m = t->rows,
                         .n = t->cols,
                         .k = t->side,
                         .lda = t->tall ? t->cols : t->side,
                         .ldb = t->tall ? t->side : t->cols,
                         .ldc = t->cols,
                         .accumulate = true};
}

int CPU(orthogonalize_plan)(struct device *dev, const struct orthogonalize_spec *s, struct op_cost *cost,
                            struct error *e) {
    struct iteration t = make_iteration(s, NULL);
    struct gemm step = step_product(&t);
    size_t most = 0;
    for (int64_t row = 0; row < t.side; row += BLOCK) {
        int64_t count = min64(BLOCK, t.side - row);
        struct gemm gram = gram_product(&t, row, count), square = square_product(&t, row, count);
        if (CPU(gemm_plan)(dev, &gram, false, &most, e) != 0 ||
            CPU(gemm_plan)(dev, &square, false, &most, e) != 0)
            return -1;
    }
    if (CPU(gemm_plan)(dev, &step, false, &most, e) != 0)
        return -1;
    *cost = (struct op_cost){.workspace = t.bytes + most};
    return 0;
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
        t->x[i] = to_elem((real)(scale * (double)x[i]));
}

/* The lower triangle of X X^T, or of X^T X where X is tall, by blocks of rows. */
static void gram_lower(struct device *dev, const struct iteration *t) {
    for (int64_t row = 0; row < t->side; row += BLOCK) {
        struct gemm g = gram_product(t, row, min64(BLOCK, t->side - row));
        call_progress_callback(dev);
        CPU(gemm)
        (dev, &g, t->x + (t->tall ? row : row * t->cols), t->x, NULL, t->gram + row * t->side, t->bytes);
    }
}

/* The lower triangle of A^2 for the symmetric A. */
static void square_lower(struct device *dev, const struct iteration *t) {
    for (int64_t row = 0; row < t->side; row += BLOCK) {
        struct gemm g = square_product(t, row, min64(BLOCK, t->side - row));
        call_progress_callback(dev);
        CPU(gemm)(dev, &g, t->gram + row * t->side, t->gram, NULL, t->poly + row * t->side, t->bytes);
    }
}

/* The upper triangle from the lower one, in tiles that stay in the first-level cache. */
static void mirror(elem *a, int64_t side) {
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
            t->poly[i * t->side + j] =
                to_elem(A3 * from_elem(t->gram[i * t->side + j]) + A5 * from_elem(t->poly[i * t->side + j]));
    mirror(t->poly, t->side);
}

/* X = A1 X + poly X, or with X poly where X is tall. */
static void iterate(struct device *dev, struct iteration *t) {
    struct gemm g = step_product(t);
    gram_lower(dev, t);
    mirror(t->gram, t->side);
    square_lower(dev, t);
    polynomial(t);
    call_progress_callback(dev);
    const elem *a = t->tall ? t->x : t->poly, *b = t->tall ? t->poly : t->x;
#ifdef KERNELS_BF16 /* oneDNN adds C as it is */
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < t->rows * t->cols; i++)
        t->next[i] = to_elem(A1 * from_elem(t->x[i]));
    CPU(gemm)(dev, &g, a, b, NULL, t->next, t->bytes);
#else
    memcpy(t->next, t->x, (size_t)(t->rows * t->cols) * sizeof(elem));
    gemm(false, false, g.m, g.n, g.k, a, g.lda, b, g.ldb, A1, t->next, g.ldc);
#endif
    elem *done = t->next;
    t->next = t->x;
    t->x = done;
}

void CPU(orthogonalize)(struct device *dev, const struct orthogonalize_spec *s, tensor x,
                        const struct step_state *state) {
    check_real("orthogonalize", "x", x, s->rows, s->cols, 0, 0, 0);
    check_contiguous("orthogonalize", "x", x);
    if (state->skip)
        return;
    struct iteration t =
        make_iteration(s, cpu_workspace(dev, make_iteration(s, NULL).bytes, "orthogonalize"));
    real *out = x.data;
    normalize(&t, out);
    for (int i = 0; i < ITERATIONS; i++)
        iterate(dev, &t);
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < s->rows * s->cols; i++)
        out[i] = from_elem(t.x[i]);
}
