/* A check of the library's matrix products, once, before the first step.
 *
 * On some machines a product may be wrong: a part that no thread computed, or a kernel that an emulated or
 * new processor runs incorrectly. Training would go wrong without an error. So each planned shape is computed
 * once on small integers, whose sums are exact in any order. All of the result is checked for elements that
 * were not written, and samples in every thread's part are compared with plain dot products. */
#include "kernels/cpu/cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "kernels/limits.h"

#ifndef KERNELS_DOUBLE

enum {
    MAX_ROWS = 256,      /* fewer may not be split over threads */
    MAX_FLOPS = 1 << 30, /* of one product: larger ones take fewer rows, but MIN_ROWS */
    MIN_ROWS = 32,
    SAMPLES = 16,            /* rows, and columns for each thread */
    ONEDNN_BYTES = 32 << 20, /* more than it allocates itself; it does not check that it gets them */
};

void CPU(plan_product)(struct device *dev, int64_t rows, int64_t in, int64_t out) {
    rows = min64(rows, MAX_ROWS);
    for (int i = 0; i < dev->product_count; i++)
        if (dev->products[i].in == in && dev->products[i].out == out && dev->products[i].rows == rows)
            return;
    struct product *list = realloc(dev->products, (size_t)(dev->product_count + 1) * sizeof *list);
    if (!list)
        return; /* it is not checked */
    dev->products = list;
    list[dev->product_count++] = (struct product){rows, in, out};
}

/* -2 .. 2, without a pattern that a wrong stride would repeat. */
static void fill(elem *x, int64_t count, uint32_t seed) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) {
        uint32_t h = ((uint32_t)i + seed) * 2654435761u;
        h = (h ^ h >> 15) * 2246822519u;
        x[i] = to_elem((real)((h >> 16) % 5) - 2);
    }
}

struct operand {
    const elem *data;
    bool transposed; /* stored [k,m] or [n,k] */
};

/* Sampled outputs: for each of `columns` places, SAMPLES neighbours in the row, each of another row. Neighbours,
 * so that one cache line of b serves all of them. */
struct sampling {
    int64_t columns, rows;
    int run; /* neighbours */
};

static int64_t sampled_row(const struct sampling *s, int64_t m, int64_t x, int y) {
    return s->rows > 1 ? (x + y * s->rows / SAMPLES) % s->rows * (m - 1) / (s->rows - 1) : 0;
}

static int64_t sampled_column(const struct sampling *s, int64_t n, int64_t x) {
    return s->columns > 1 ? x * (n - s->run) / (s->columns - 1) : 0;
}

/* The plain dot products of the sampled outputs: expected [columns, SAMPLES]. */
static void compute_expected(const struct sampling *s, struct operand a, struct operand b, int64_t m,
                             int64_t n, int64_t k, double *expected) {
#pragma omp parallel for
    for (int64_t x = 0; x < s->columns; x++) {
        double sum[SAMPLES] = {0};
        int64_t row[SAMPLES], column = sampled_column(s, n, x);
        for (int y = 0; y < s->run; y++)
            row[y] = sampled_row(s, m, x, y);
        for (int64_t l = 0; l < k; l++)
            for (int y = 0; y < s->run; y++)
                sum[y] += (double)from_elem(a.data[a.transposed ? l * m + row[y] : row[y] * k + l]) *
                          (double)from_elem(b.data[b.transposed ? (column + y) * k + l : l * n + column + y]);
        memcpy(expected + x * SAMPLES, sum, sizeof sum);
    }
}

/* The product: of reals, or of elements. */
struct result {
    void *data;
    bool reals;
};

static double result_value(struct result c, int64_t i) {
    return c.reals ? (double)((real *)c.data)[i] : (double)from_elem(((elem *)c.data)[i]);
}

/* x as the product stores it. Sums of small integers are exact, and rounded once. */
static double as_stored(struct result c, double x) {
    return c.reals ? x : (double)from_elem(to_elem((real)x));
}

struct wrong {
    int64_t row, column; /* -1: nothing is wrong */
    double expected;     /* NAN: it was not written */
};

static struct wrong find_unwritten(struct result c, int64_t m, int64_t n) {
    struct wrong wrong = {-1, -1, (double)NAN};
#pragma omp parallel for
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            if (isnan(result_value(c, i * n + j))) {
#pragma omp critical
                wrong.row = i, wrong.column = j;
            }
    return wrong;
}

/* added: the product was added to what it had stored itself. */
static struct wrong find_wrong(const struct sampling *s, struct result c, int64_t m, int64_t n, bool added,
                               const double *expected) {
    for (int64_t x = 0; x < s->columns; x++)
        for (int y = 0; y < s->run; y++) {
            int64_t i = sampled_row(s, m, x, y), j = sampled_column(s, n, x) + y;
            double sum = expected[x * SAMPLES + y], right = as_stored(c, sum);
            if (added)
                right = as_stored(c, right + sum);
            if (result_value(c, i * n + j) != right)
                return (struct wrong){i, j, right};
        }
    return (struct wrong){-1, -1, 0};
}

/* C = A B, and then C += A B, which training uses to accumulate gradients. */
static int check_product(struct device *dev, struct operand a, struct operand b, struct result c, int64_t m,
                         int64_t n, int64_t k, struct error *e) {
    int64_t most = SAMPLES * (int64_t)dev->threads;
    struct sampling s = {min64(n, most), min64(m, most), (int)min64(n, SAMPLES)};
    double *expected = malloc((size_t)(s.columns * SAMPLES) * sizeof *expected);
    if (!expected)
        return fail_user(e, "out of memory checking a matrix product");
    compute_expected(&s, a, b, m, n, k, expected);
    memset(c.data, 0xff, (size_t)(m * n) * (c.reals ? sizeof(real) : sizeof(elem))); /* NaN */
    struct wrong wrong = {-1, -1, 0};
    for (int add = 0; add < 2 && wrong.row < 0; add++) {
        struct gemm g = {a.transposed,         b.transposed,         m, n,   k,
                         a.transposed ? m : k, b.transposed ? k : n, n, add, false};
        if (CPU(gemm_build)(dev, &g, c.reals, e) != 0) {
            free(expected);
            return -1;
        }
        if (c.reals)
            CPU(gemm_real)(dev, &g, a.data, b.data, c.data, 0);
        else
            CPU(gemm)(dev, &g, a.data, b.data, NULL, c.data, 0);
        wrong = find_unwritten(c, m, n);
        if (wrong.row < 0)
            wrong = find_wrong(&s, c, m, n, add, expected);
    }
    free(expected);
    if (wrong.row < 0)
        return 0;
    char instead[48] = "was not written";
    if (!isnan(wrong.expected))
        snprintf(instead, sizeof instead, "is %g instead of %g",
                 result_value(c, wrong.row * n + wrong.column), wrong.expected);
    return fail_run(
        e,
        "oneDNN computes wrong matrix products on this machine: %lld x %lld x %lld with %d threads, "
        "element [%lld,%lld] %s; install another oneDNN, or try DNNL_MAX_CPU_ISA=AVX2 or "
        "system.threads = 1",
        (long long)m, (long long)n, (long long)k, dev->threads, (long long)wrong.row, (long long)wrong.column,
        instead);
}

/* y = x W^T, dx = dy W, dW = dy^T x. */
static int check_linear(struct device *dev, const struct product *p, struct error *e) {
    int64_t rows = min64(p->rows, max64(MAX_FLOPS / (2 * p->in * p->out), MIN_ROWS));
    int64_t x = rows * p->in, y = rows * p->out, w = p->in * p->out;
    /* Mapped, so that all of it is given back: a freed block of this size would stay in malloc's heap. */
    size_t bytes = (size_t)(x + y + w + 1) * (sizeof(elem) + sizeof(real));
    elem *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
        return fail_user(e, "out of memory checking a matrix product of %lld x %lld", (long long)p->out,
                         (long long)p->in);
    /* As large as the largest of the three. */
    struct result elems = {data + round_up(x + y + w, sizeof(real) / sizeof(elem)), false},
                  reals = {elems.data, true};
    fill(data, x + y + w, 1);
    struct operand X = {data, false}, Y = {data + x, false}, W = {data + x + y, false};
    struct operand transposed_W = {W.data, true}, transposed_Y = {Y.data, true};
    int status = check_product(dev, X, transposed_W, elems, rows, p->out, p->in, e) != 0 ||
                         check_product(dev, Y, W, elems, rows, p->in, p->out, e) != 0 ||
                         check_product(dev, transposed_Y, X, reals, p->out, p->in, rows, e) != 0
                     ? -1
                     : 0;
    munmap(data, bytes);
    return status;
}

int CPU(check_libraries)(struct device *dev, struct error *e) {
    int status = limits_check_address_space(ONEDNN_BYTES, "oneDNN", e);
    for (; dev->products_checked < dev->product_count && status == 0; dev->products_checked++)
        status = check_linear(dev, &dev->products[dev->products_checked], e);
    CPU(gemm_end_check)(dev);
    return status;
}

#else /* the double build has plain loops */

void CPU(plan_product)(struct device *dev, int64_t rows, int64_t in, int64_t out) {
    (void)dev, (void)rows, (void)in, (void)out;
}

int CPU(check_libraries)(struct device *dev, struct error *e) {
    (void)dev, (void)e;
    return 0;
}

#endif
