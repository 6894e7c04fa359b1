/* A check of the library's matrix products, once, before the first step.
 *
 * On some machines a product may be wrong: a part that no thread computed, or a kernel that an emulated or
 * new processor runs incorrectly. Training would go wrong without an error. So each planned shape is computed
 * once on small integers, whose sums are exact in any order. All of the result is checked for elements that
 * were not written, and samples in every thread's part are compared with plain dot products. */
#include "kernels/cpu/cpu.h"

#include <stdlib.h>
#include <sys/mman.h>

#ifndef KERNELS_DOUBLE

enum {
    MAX_ROWS = 256,      /* fewer may not be split over threads */
    MAX_FLOPS = 1 << 30, /* of one product: larger ones take fewer rows, but MIN_ROWS */
    MIN_ROWS = 32,
    SAMPLES = 16, /* rows, and columns for each thread */
};

void plan_product(struct device *dev, int64_t rows, int64_t in, int64_t out) {
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
static void fill(float *x, int64_t count, uint32_t seed) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) {
        uint32_t h = ((uint32_t)i + seed) * 2654435761u;
        h = (h ^ h >> 15) * 2246822519u;
        x[i] = (float)((h >> 16) % 5) - 2;
    }
}

struct operand {
    float *data;
    bool transposed; /* stored [k,m] or [n,k] */
};

static double dot(struct operand a, struct operand b, int64_t m, int64_t n, int64_t k, int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t l = 0; l < k; l++)
        sum += (double)a.data[a.transposed ? l * m + i : i * k + l] *
               (double)b.data[b.transposed ? j * k + l : l * n + j];
    return sum;
}

static int check_product(struct device *dev, struct operand a, struct operand b, float *c, int64_t m,
                         int64_t n, int64_t k, struct error *e) {
    int64_t rows = min64(m, SAMPLES * (int64_t)dev->threads),
            columns = min64(n, SAMPLES * (int64_t)dev->threads);
    int64_t row = -1, column = -1;
    memset(c, 0xff, (size_t)(m * n) * sizeof *c); /* NaN */
    gemm(a.transposed, b.transposed, m, n, k, a.data, a.transposed ? m : k, b.data, b.transposed ? k : n, 0,
         c, n);
#pragma omp parallel for
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            if (c[i * n + j] != c[i * n + j]) {
#pragma omp critical
                row = i, column = j;
            }
#pragma omp parallel for collapse(2)
    for (int64_t y = 0; y < SAMPLES; y++)
        for (int64_t x = 0; x < columns; x++) {
            int64_t i = rows > 1 ? (x + y * rows / SAMPLES) % rows * (m - 1) / (rows - 1) : 0;
            int64_t j = columns > 1 ? x * (n - 1) / (columns - 1) : 0;
            if ((double)c[i * n + j] != dot(a, b, m, n, k, i, j)) {
#pragma omp critical
                row = i, column = j;
            }
        }
    if (row < 0)
        return 0;
    return fail_run(
        e,
        "oneDNN computes wrong matrix products on this machine: %lld x %lld x %lld with %d threads, "
        "element [%lld,%lld] is %g instead of %g; install another oneDNN, or try "
        "DNNL_MAX_CPU_ISA=AVX2 or system.threads = 1",
        (long long)m, (long long)n, (long long)k, dev->threads, (long long)row, (long long)column,
        (double)c[row * n + column], dot(a, b, m, n, k, row, column));
}

/* y = x W^T, dx = dy W, dW = dy^T x. */
static int check_linear(struct device *dev, const struct product *p, struct error *e) {
    int64_t rows = min64(p->rows, max64(MAX_FLOPS / (2 * p->in * p->out), MIN_ROWS));
    int64_t x = rows * p->in, y = rows * p->out, w = p->in * p->out;
    /* Mapped, so that all of it is given back: a freed block of this size would stay in malloc's heap. */
    size_t bytes = (size_t)(2 * x + 2 * y + 2 * w) * sizeof(float);
    float *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
        return fail_user(e, "out of memory checking a matrix product of %lld x %lld", (long long)p->out,
                         (long long)p->in);
    float *result = data + x + y + w; /* as large as the largest of the three */
    fill(data, x + y + w, 1);
    struct operand X = {data, false}, Y = {data + x, false}, W = {data + x + y, false};
    struct operand transposed_W = {W.data, true}, transposed_Y = {Y.data, true};
    int status = check_product(dev, X, transposed_W, result, rows, p->out, p->in, e) != 0 ||
                         check_product(dev, Y, W, result, rows, p->in, p->out, e) != 0 ||
                         check_product(dev, transposed_Y, X, result, p->out, p->in, rows, e) != 0
                     ? -1
                     : 0;
    munmap(data, bytes);
    return status;
}

int cpu_check_libraries(struct device *dev, struct error *e) {
    int status = 0;
    for (; dev->products_checked < dev->product_count && status == 0; dev->products_checked++)
        status = check_linear(dev, &dev->products[dev->products_checked], e);
    return status;
}

#else /* the double build has plain loops */

void plan_product(struct device *dev, int64_t rows, int64_t in, int64_t out) {
    (void)dev, (void)rows, (void)in, (void)out;
}

int cpu_check_libraries(struct device *dev, struct error *e) {
    (void)dev, (void)e;
    return 0;
}

#endif
