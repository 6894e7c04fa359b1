/* The benchmark's single operations: attention, attention in a window, and the mixing of heads. */
#ifndef IHA_TESTS_BENCH_BENCH_OPS_H
#define IHA_TESTS_BENCH_BENCH_OPS_H

#include "kernels/cpu/cpu.h" /* attention_tiles_visited */
#include "tests/bench/bench_case.h"

struct bench_context {
    struct bench *b;
    struct table *t;
};

/* ---- attention ---- */

/* Forward and backward of one case. */
static inline void attention_row(const struct op_case *c, struct bench *b, struct table *t) {
    const struct attention_spec *s = &c->spec.attention;
    struct bench_case w;
    char sizes[OP_TEXT];
    case_open(&w, b, c);
    int64_t before = attention_tiles_visited;
    case_both(&w);
    double tokens = (double)(s->length / s->pseudo), tiles = (double)(attention_tiles_visited - before);
    struct finding f = measure(b, case_both, &w);
    case_close(&w);
    double rate = 3 * attention_flops(c) / f.seconds.median;
    struct row *row = table_row(t, "attention, forward + backward: %s", op_sizes(c, sizes));
    cell_seconds(row->took, f.seconds);
    cell(row->rate, "%.1f GFLOP/s", rate / 1e9);
    if (s->window > 0)
        cell(row->rate, "%.2f ms and %.0f tiles per 1k tokens; %.1f GFLOP/s",
             f.seconds.median * 1e3 * 1024 / tokens, 1024 * tiles / tokens, rate / 1e9);
    cell(row->compared, "sgemm %.0f GFLOP/s", f.sgemm / 1e9);
    cell(row->ratio, "%.2f", rate / f.sgemm);
    row_progress(row);
}

static inline void attention_without_window(const struct op_case *c, void *context) {
    struct bench_context *x = context;
    if (c->spec.attention.window == 0)
        attention_row(c, x->b, x->t);
}

static inline void attention_with_window(const struct op_case *c, void *context) {
    struct bench_context *x = context;
    if (c->spec.attention.window > 0)
        attention_row(c, x->b, x->t);
}

static inline void bench_attention(struct bench *b, struct table *t) {
    op_cases_run(OP_ATTENTION, BENCH_CPU, attention_without_window, &(struct bench_context){b, t});
}

static inline void bench_window(struct bench *b, struct table *t) {
    op_cases_run(OP_ATTENTION, BENCH_CPU, attention_with_window, &(struct bench_context){b, t});
}

/* ---- head mixing ---- */

/* Little arithmetic on much memory: compared with the speed of a copy. */
static inline void bandwidth_rows(const struct op_case *c, void *context) {
    struct bench_context *x = context;
    struct bench_case w;
    char sizes[OP_TEXT];
    case_open(&w, x->b, c);
    for (int backward = 0; backward < 2; backward++) {
        struct finding f = measure(x->b, backward ? case_backward : case_forward, &w);
        struct row *row =
            table_row(x->t, "%s %s: %s", op_name(c), backward ? "backward" : "forward", op_sizes(c, sizes));
        double rate = case_bytes(&w, backward) / f.seconds.median;
        cell_seconds(row->took, f.seconds);
        cell(row->rate, "%.2f GB/s", rate / 1e9);
        cell(row->compared, "copy %.2f GB/s", f.copy / 1e9);
        cell(row->ratio, "%.2f", rate / f.copy);
        row_progress(row);
    }
    case_close(&w);
}

static inline void bench_mixing(struct bench *b, struct table *t) {
    op_cases_of(OP_QKV_MIX, OP_COLLAPSE, BENCH_CPU, bandwidth_rows, &(struct bench_context){b, t});
}

#endif
