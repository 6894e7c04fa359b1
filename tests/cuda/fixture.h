/* Operations of the CUDA backend, on an emulated GPU (or a real one), against the CPU backend.
 *
 * A test fills inputs, calls an operation on three backends, and compares outputs by one rule. Every tensor
 * is made three times from the same numbers:
 *
 *     cuda   the type under test (fp32 or bf16), what kernels_cuda() computes
 *     plain  float, what kernels_cpu() computes
 *     exact  double, what the CPU backend built in double computes
 *
 * Inputs are rounded to the type under test first. The rule (flash-attention's): the error of cuda against
 * exact is at most FACTOR times that of plain, whose outputs are rounded to the output's type as well; or a
 * few roundings of the largest value where the plain error happens to be smaller still. By norm and by the
 * largest element.
 *
 *     struct backends *k = backends(DEVICE_BF16);
 *     struct operand x = input(k, DTYPE_BF16, rows, cols, 0, 0, 0);
 *     struct operand y = output(k, DTYPE_BF16, rows, cols, 0, 0, 0);
 *     plan(k, (struct op_spec){.kind = OP_ACT, .act = spec});
 *     EACH(k, b)
 *         b->k->mlp_act(b->dev, &spec, on(x, b), tensor_none(), on(y, b));
 *     expect_close("mlp_act", "out", k, y);
 *     done(k);
 *
 * tests/cuda/op_run.h does this for any operation. */
#ifndef IHA_TESTS_CUDA_FIXTURE_H
#define IHA_TESTS_CUDA_FIXTURE_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "tests/cuda/emulator/control.h"

/* The CPU backend built in double; the Makefile renames it. */
const struct kernels *kernels_cpu_double(void);

/* The backend under test; tests/unit/test_bf16.c puts the CPU's bf16 here. */
#ifndef TESTED_KERNELS
#define TESTED_KERNELS kernels_cuda
#endif

static const double FACTOR = 3;

enum which { CUDA, PLAIN, EXACT, BACKENDS };

struct backend {
    enum which which;
    const struct kernels *k;
    struct device *dev;
    void *workspace;
    size_t workspace_bytes;
    void *saved; /* of the operation under test */
};

enum { MAX_OPERANDS = 1024 };

struct backends {
    struct backend each[BACKENDS];
    enum dtype compute;
    void *memory[MAX_OPERANDS][BACKENDS];
    int operands;
};

/* A tensor on the three backends. */
struct operand {
    tensor on[BACKENDS];
    enum dtype dtype; /* under test */
};

#define EACH(k, b) for (struct backend *b = (k)->each; b < (k)->each + BACKENDS; b++)

static inline tensor on(struct operand x, const struct backend *b) {
    return x.on[b->which];
}

static uint64_t fixture_seed = 1;

/* In [-1, 1). */
static inline double fixture_noise(void) {
    fixture_seed = fixture_seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(fixture_seed >> 33) / 1073741824.0 - 1;
}

static inline double round_to(enum dtype t, double x) {
    if (t == DTYPE_F64)
        return x;
    float f = (float)x;
    if (t == DTYPE_F32 || t == DTYPE_I32 || !isfinite(f))
        return (double)f;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&f, &bits, sizeof f);
    return (double)f;
}

static inline struct backends *backends(enum device_precision precision) {
    struct backends *k = (struct backends *)calloc(1, sizeof *k);
    const struct kernels *kernels[BACKENDS] = {TESTED_KERNELS(), kernels_cpu(), kernels_cpu_double()};
    EACH(k, b) {
        b->which = (enum which)(b - k->each);
        struct error e = {0};
        struct device_options options = {
            .threads = 1, .precision = b->which == CUDA ? precision : DEVICE_FP32, .deterministic = true};
        b->k = kernels[b->which];
        b->dev = b->k->open(&options, &e);
        if (!b->dev)
            fail_msg("%s", e.text);
    }
    k->compute = k->each[CUDA].k->dtypes(k->each[CUDA].dev).compute;
    return k;
}

/* Free everything; nothing may be left on the device. */
static inline void done(struct backends *k) {
    EACH(k, b) {
        for (int i = 0; i < k->operands; i++)
            b->k->release(b->dev, k->memory[i][b->which]);
        b->k->release(b->dev, b->workspace);
        b->k->release(b->dev, b->saved);
        b->k->close(b->dev);
    }
    assert_int_equal(emulator_allocations(), 0);
    free(k);
}

static inline enum dtype type_on(enum dtype t, enum which which) {
    return t == DTYPE_I32 || which == CUDA ? t : which == PLAIN ? DTYPE_F32 : DTYPE_F64;
}

/* A tensor with these values, [count], after rounding to `t`. */
static inline struct operand operand_of(struct backends *k, enum dtype t, const double *values, int64_t s0,
                                        int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    struct operand x = {.dtype = t};
    assert_true(k->operands < MAX_OPERANDS);
    EACH(k, b) {
        struct error e = {0};
        tensor shape = tensor_of(NULL, type_on(t, b->which), s0, s1, s2, s3, s4);
        int64_t n = tensor_count(shape);
        double *rounded = (double *)malloc((size_t)n * sizeof *rounded);
        for (int64_t i = 0; i < n; i++)
            rounded[i] = round_to(t, values[i]);
        shape.data = b->k->alloc(b->dev, (size_t)n * dtype_bytes(shape.dtype), &e);
        if (!shape.data)
            fail_msg("%s", e.text);
        b->k->upload(b->dev, shape, rounded, DTYPE_F64);
        free(rounded);
        k->memory[k->operands][b->which] = shape.data;
        x.on[b->which] = shape;
    }
    k->operands++;
    return x;
}

static inline struct operand scaled_input(struct backends *k, enum dtype t, double scale, double offset,
                                          int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    int64_t n = tensor_count(tensor_of(NULL, t, s0, s1, s2, s3, s4));
    double *values = (double *)malloc((size_t)n * sizeof *values);
    for (int64_t i = 0; i < n; i++)
        values[i] = offset + scale * fixture_noise();
    struct operand x = operand_of(k, t, values, s0, s1, s2, s3, s4);
    free(values);
    return x;
}

/* Noise in [-1, 1). */
static inline struct operand input(struct backends *k, enum dtype t, int64_t s0, int64_t s1, int64_t s2,
                                   int64_t s3, int64_t s4) {
    return scaled_input(k, t, 1, 0, s0, s1, s2, s3, s4);
}

/* Filled with NaN, so that an element that is not written, or read before, shows. */
static inline struct operand output(struct backends *k, enum dtype t, int64_t s0, int64_t s1, int64_t s2,
                                    int64_t s3, int64_t s4) {
    return scaled_input(k, t, 0, (double)NAN, s0, s1, s2, s3, s4);
}

static inline struct operand absent(void) {
    return (struct operand){0};
}

/* Token ids or targets. */
static inline struct operand ids(struct backends *k, const int32_t *values, int64_t s0, int64_t s1) {
    int64_t n = s0 * (s1 > 0 ? s1 : 1);
    double *copy = (double *)malloc((size_t)n * sizeof *copy);
    for (int64_t i = 0; i < n; i++)
        copy[i] = values[i];
    struct operand x = operand_of(k, DTYPE_I32, copy, s0, s1, 0, 0, 0);
    free(copy);
    return x;
}

/* The operation's plan on every backend, with the workspace and the saved buffer it asks for. */
static inline void plan(struct backends *k, struct op_spec spec) {
    EACH(k, b) {
        struct error e = {0};
        struct op_cost cost;
        if (b->k->plan(b->dev, &spec, &cost, &e) != 0)
            fail_msg("%s", e.text);
        b->k->release(b->dev, b->workspace);
        b->k->release(b->dev, b->saved);
        b->workspace = b->k->alloc(b->dev, cost.workspace, &e);
        b->saved = b->k->alloc(b->dev, cost.saved, &e);
        b->k->set_workspace(b->dev, b->workspace, cost.workspace);
    }
}

/* What a backend left in x, as doubles; free() it. */
static inline double *values_on(const struct backend *b, struct operand x) {
    double *values = (double *)malloc((size_t)(tensor_count(on(x, b)) + 1) * sizeof *values);
    b->k->download(b->dev, on(x, b), values, DTYPE_F64);
    return values;
}

/* What two results are compared by. */
struct deviation {
    double norm, largest;
};

static inline struct deviation deviation(const double *x, const double *exact, int64_t n) {
    struct deviation d = {0, 0};
    for (int64_t i = 0; i < n; i++) {
        double error = x[i] - exact[i];
        d.norm += error * error;
        d.largest = error == error && fabs(error) <= d.largest ? d.largest : fabs(error); /* NaN stays */
    }
    d.norm = sqrt(d.norm);
    return d;
}

/* The rule, on arrays: cuda's n results against plain ones and exact ones. */
static inline void expect_close_values(const char *op, const char *what, enum dtype t, const double *cuda,
                                       const double *plain, const double *exact, int64_t n) {
    double *rounded = (double *)malloc((size_t)n * sizeof *rounded), *zero = (double *)calloc((size_t)n, 8);
    for (int64_t i = 0; i < n; i++)
        rounded[i] = round_to(t, plain[i]);
    struct deviation error = deviation(cuda, exact, n), allowed = deviation(rounded, exact, n);
    struct deviation size = deviation(exact, zero, n);
    double ulp = t == DTYPE_BF16 ? 0x1p-9 : 0x1p-24, few = (n < 16 ? 32 : 4) * ulp;
    free(rounded);
    free(zero);
    if (!(error.norm <= FACTOR * allowed.norm + few * size.norm) ||
        !(error.largest <= FACTOR * allowed.largest + few * size.largest))
        fail_msg("%s: %s [%lld]: error %.3g (largest %.3g), of the plain computation %.3g (%.3g), norm %.3g",
                 op, what, (long long)n, error.norm, error.largest, allowed.norm, allowed.largest, size.norm);
}

static inline void expect_close(const char *op, const char *what, struct backends *k, struct operand x) {
    double *values[BACKENDS] = {NULL};
    EACH(k, b)
    values[b->which] = values_on(b, x);
    expect_close_values(op, what, x.dtype, values[CUDA], values[PLAIN], values[EXACT],
                        tensor_count(x.on[EXACT]));
    for (int i = 0; i < BACKENDS; i++)
        free(values[i]);
}

/* What the cuda backend left in x is `before`, bit for bit; frees `before`. */
static inline void expect_same(const char *op, const char *what, struct backends *k, struct operand x,
                               double *before) {
    double *now = values_on(&k->each[CUDA], x);
    if (memcmp(now, before, (size_t)tensor_count(x.on[CUDA]) * sizeof *now) != 0)
        fail_msg("%s: %s depends on the order of threads or blocks", op, what);
    free(now);
    free(before);
}

/* Make plain what a computation that keeps an intermediate result in the type under test would have: round
 * the plain backend's copy of x. */
static inline void round_plain(struct backends *k, struct operand x) {
    struct backend *b = &k->each[PLAIN];
    double *values = values_on(b, x);
    for (int64_t i = 0; i < tensor_count(on(x, b)); i++)
        values[i] = round_to(x.dtype, values[i]);
    b->k->upload(b->dev, on(x, b), values, DTYPE_F64);
    free(values);
}

#endif
