/* How the benchmark measures. Machines are shared and clock rates vary, so two ceilings, the speeds of a
 * matrix product and of a copy, are measured right before and right after every piece of work: a ratio
 * compares numbers of the same few seconds. Medians throughout. */
#ifndef IHA_TESTS_BENCH_BENCH_MEASURE_H
#define IHA_TESTS_BENCH_BENCH_MEASURE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/clock.h"
#include "kernels/kernels.h"

enum { MAX_REPEATS = 50, MAX_SAMPLES = 4096 };
enum { SGEMM_SIZE = 2048 };

static const size_t COPY_BYTES = (size_t)256 << 20;

/* Seconds of one thing, in the order they were measured. */
struct samples {
    int count;
    double seconds[MAX_SAMPLES];
};

struct summary {
    double median, min, max;
};

/* The device, and what the ceilings work on. */
struct bench {
    const struct kernels *k;
    struct device *dev;
    int repeats;
    const char *quickstart; /* path of its configuration */
    struct torch *torch;    /* bench_steps.h */
    tensor x, w, y;         /* [SGEMM_SIZE, SGEMM_SIZE] */
    char *copy_from, *copy_to;
    struct samples sgemm, copy; /* over the whole run */
};

/* What was found about one piece of work, and the ceilings around it. */
struct finding {
    struct summary seconds;
    double sgemm; /* FLOP/s */
    double copy;  /* bytes/s, read and written */
};

/* Print the error and end with its exit code. */
static inline void bench_fail(const struct error *e) {
    fprintf(stderr, "bench: %s\n", e->text);
    exit(e->exit_code ? e->exit_code : EXIT_RUN);
}

static inline void samples_add(struct samples *s, double seconds) {
    if (s->count < MAX_SAMPLES)
        s->seconds[s->count++] = seconds;
}

static inline int compare_seconds(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Of the samples from `first` on, of which there is at least one. */
static inline struct summary samples_summary(const struct samples *s, int first) {
    double sorted[MAX_SAMPLES];
    int n = s->count - first;
    memcpy(sorted, s->seconds + first, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, compare_seconds);
    return (struct summary){(sorted[(n - 1) / 2] + sorted[n / 2]) / 2, sorted[0], sorted[n - 1]};
}

/* Device memory, or the end of the program. */
static inline void *bench_alloc(const struct bench *b, size_t bytes) {
    struct error e = {0};
    void *data = b->k->alloc(b->dev, bytes, &e);
    if (!data)
        bench_fail(&e);
    return data;
}

/* A tensor [s0, ...] (0 ends the shape) of this type, of reproducible noise in [-1, 1); free with
 * k->release(data). The noise repeats: a GPU's benchmark makes ten billion numbers of it, and the GPU
 * would wait for the host to draw them. */
enum { NOISE = 1 << 20 };
static inline tensor bench_noise(const struct bench *b, enum dtype type, int64_t s0, int64_t s1, int64_t s2,
                                 int64_t s3, int64_t s4) {
    tensor t = tensor_of(NULL, type, s0, s1, s2, s3, s4);
    int64_t n = tensor_count(t);
    static float host[NOISE];
    uint64_t state = (uint64_t)n;
    for (int64_t i = 0; i < n && i < NOISE; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        host[i] = (float)((double)(state >> 33) / 1073741824.0 - 1);
    }
    t.data = bench_alloc(b, (size_t)n * dtype_bytes(type));
    for (int64_t at = 0; at < n; at += NOISE) {
        char *to = (char *)t.data + (size_t)at * dtype_bytes(type);
        b->k->upload(b->dev, tensor_of(to, type, n - at < NOISE ? n - at : NOISE, 0, 0, 0, 0), host,
                     DTYPE_F32);
    }
    return t;
}

static inline void ceilings_open(struct bench *b) {
    const int64_t n = SGEMM_SIZE;
    struct op_spec spec = {.kind = OP_LINEAR, .linear = {n, n, n}};
    struct op_cost cost;
    struct error e = {0};
    if (b->k->plan(b->dev, &spec, &cost, &e) != 0)
        bench_fail(&e);
    b->x = bench_noise(b, DTYPE_F32, n, n, 0, 0, 0);
    b->w = bench_noise(b, DTYPE_F32, n, n, 0, 0, 0);
    b->y = bench_noise(b, DTYPE_F32, n, n, 0, 0, 0);
    b->copy_from = bench_alloc(b, COPY_BYTES);
    b->copy_to = bench_alloc(b, COPY_BYTES);
    memset(b->copy_from, 1, COPY_BYTES); /* else all its pages are one page of zeros */
}

static inline void ceilings_close(struct bench *b) {
    void *blocks[] = {b->x.data, b->w.data, b->y.data, b->copy_from, b->copy_to};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        b->k->release(b->dev, blocks[i]);
}

static inline void run_sgemm(struct bench *b) {
    struct linear_spec spec = {SGEMM_SIZE, SGEMM_SIZE, SGEMM_SIZE};
    b->k->linear(b->dev, &spec, b->x, b->w, tensor_none(), b->y);
}

/* All threads, a piece each. */
static inline void run_copy(struct bench *b) {
    const size_t piece = (size_t)4 << 20;
#pragma omp parallel for schedule(static)
    for (size_t at = 0; at < COPY_BYTES; at += piece)
        memcpy(b->copy_to + at, b->copy_from + at, piece);
}

/* One sample of both ceilings. */
static inline void ceilings_sample(struct bench *b) {
    double start = clock_seconds();
    run_sgemm(b);
    double middle = clock_seconds();
    run_copy(b);
    samples_add(&b->sgemm, middle - start);
    samples_add(&b->copy, clock_seconds() - middle);
}

/* Rates of the ceilings from sample `first` on, in FLOP/s and bytes/s. */
static inline double sgemm_rate(const struct bench *b, int first) {
    const double n = SGEMM_SIZE;
    return 2 * n * n * n / samples_summary(&b->sgemm, first).median;
}

static inline double copy_rate(const struct bench *b, int first) {
    return 2 * (double)COPY_BYTES / samples_summary(&b->copy, first).median;
}

/* Seconds of `calls` calls, per call. */
static inline double time_calls(void (*work)(void *), void *context, int calls) {
    double start = clock_seconds();
    for (int i = 0; i < calls; i++)
        work(context);
    return (clock_seconds() - start) / calls;
}

/* How often to call short work for one sample: once the caches and pages are warm, so that a sample lasts. */
static inline int warm_up(void (*work)(void *), void *context) {
    const double lasting = 0.03, slow = 0.5;
    double seconds = time_calls(work, context, 1);
    if (seconds < slow)
        seconds = time_calls(work, context, 1);
    return seconds < lasting ? (int)(lasting / seconds) + 1 : 1;
}

/* Ceilings, work, ceilings, work, ..., ceilings. */
static inline struct finding measure(struct bench *b, void (*work)(void *), void *context) {
    int calls = warm_up(work, context), first = b->sgemm.count;
    struct samples *s = calloc(1, sizeof *s);
    struct error e = {.exit_code = EXIT_RUN, .text = "out of memory for samples"};
    if (!s)
        bench_fail(&e);
    ceilings_sample(b);
    for (int i = 0; i < b->repeats; i++) {
        samples_add(s, time_calls(work, context, calls));
        ceilings_sample(b);
    }
    struct finding f = {samples_summary(s, 0), sgemm_rate(b, first), copy_rate(b, first)};
    free(s);
    return f;
}

#endif
