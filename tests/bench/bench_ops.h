/* The benchmark's single operations: attention, attention in a window, and the mixing of heads. */
#ifndef IHA_TESTS_BENCH_BENCH_OPS_H
#define IHA_TESTS_BENCH_BENCH_OPS_H

#include "kernels/cpu/cpu.h" /* cpu_attention_tiles_visited */
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
    int64_t before = cpu_attention_tiles_visited;
    case_both(&w);
    double tokens = (double)(s->length / s->pseudo), tiles = (double)(cpu_attention_tiles_visited - before);
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

/* ---- attention of one head, on one thread and on all ---- */

struct threads_case {
    struct bench_case w;
    int threads;
};

static inline void case_on_threads(void *context) {
    struct threads_case *c = context;
    struct device *dev = c->w.b->dev;
    int all = dev->threads;
    dev->threads = c->threads;
    c->w.b->k->set_workspace(dev, c->w.workspace, c->w.workspace_bytes);
    case_both(&c->w);
    dev->threads = all;
}

/* Forward and backward of two cases in turn, so that both meet the same machine. */
static inline void time_in_turn(void (*call)(void *), void *first, void *second, int rounds,
                                struct summary *one, struct summary *other) {
    static struct samples seconds[2];
    int calls = warm_up(call, second);
    seconds[0].count = seconds[1].count = 0;
    for (int i = 0; i < rounds; i++) {
        samples_add(&seconds[0], time_calls(call, first, calls));
        samples_add(&seconds[1], time_calls(call, second, calls));
    }
    *one = samples_summary(&seconds[0], 0);
    *other = samples_summary(&seconds[1], 0);
}

static inline void threads_row(const struct op_case *c, struct bench *b, struct table *t) {
    int all = b->dev->threads;
    struct threads_case one = {.threads = 1}, many = {.threads = all};
    struct summary s1, s;
    char sizes[OP_TEXT];
    b->dev->threads = 1;
    case_open(&one.w, b, c);
    b->dev->threads = all;
    case_open(&many.w, b, c);
    time_in_turn(case_on_threads, &one, &many, 4 * b->repeats, &s1, &s);
    struct row *row =
        table_row(t, "attention of one head, forward + backward, %d threads: %s", all, op_sizes(c, sizes));
    cell_seconds(row->took, s);
    cell(row->rate, "%.1f GFLOP/s", 3 * attention_flops(c) / s.median / 1e9);
    cell(row->compared, "1 thread %.2f ms (%.2f–%.2f)", s1.median * 1e3, s1.min * 1e3, s1.max * 1e3);
    cell(row->ratio, "%.2f times faster", s1.median / s.median);
    row_progress(row);
    case_close(&many.w);
    case_close(&one.w);
}

static inline void attention_without_window(const struct op_case *c, void *context) {
    struct bench_context *x = context;
    const struct attention_spec *s = &c->spec.attention;
    if (s->batch * s->heads == 1)
        threads_row(c, x->b, x->t);
    else if (s->window == 0)
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

/* Compared with what takes longer: its bytes at the speed of a copy, or its arithmetic at that of sgemm. */
static inline void mixing_rows(const struct op_case *c, void *context) {
    struct bench_context *x = context;
    struct bench_case w;
    char sizes[OP_TEXT];
    case_open(&w, x->b, c);
    for (int backward = 0; backward < 2; backward++) {
        struct finding f = measure(x->b, backward ? case_backward : case_forward, &w);
        struct row *row =
            table_row(x->t, "%s %s: %s", op_name(c), backward ? "backward" : "forward", op_sizes(c, sizes));
        double bytes = case_bytes(&w, backward), flops = mixing_flops(c, backward);
        double copying = bytes / f.copy, computing = flops / f.sgemm;
        cell_seconds(row->took, f.seconds);
        cell(row->rate, "%.2f GB/s; %.1f GFLOP/s", bytes / f.seconds.median / 1e9,
             flops / f.seconds.median / 1e9);
        cell(row->compared, "bytes %.2f ms at copy's %.2f GB/s; arithmetic %.2f ms at sgemm's %.0f GFLOP/s",
             copying * 1e3, f.copy / 1e9, computing * 1e3, f.sgemm / 1e9);
        cell(row->ratio, "%.2f", (copying > computing ? copying : computing) / f.seconds.median);
        row_progress(row);
    }
    case_close(&w);
}

static inline void bench_mixing(struct bench *b, struct table *t) {
    op_cases_of(OP_QKV_MIX, OP_COLLAPSE, BENCH_CPU, mixing_rows, &(struct bench_context){b, t});
}

/* ---- the same in bf16 ---- */

struct bf16_context {
    struct bench *fp32, *bf16;
    struct table *t;
};

/* Forward and backward in bf16, and in fp32 in turn with it. */
static inline void bf16_row(const struct op_case *c, void *context) {
    struct bf16_context *x = context;
    struct bench_case fp32, bf16;
    struct summary slow, fast;
    char sizes[OP_TEXT];
    if (c->spec.kind == OP_ATTENTION && c->spec.attention.length > 1 << 14)
        return; /* its rate is that of shorter ones */
    case_open(&fp32, x->fp32, c);
    case_open(&bf16, x->bf16, c);
    time_in_turn(case_both, &fp32, &bf16, 2 * x->fp32->repeats, &slow, &fast);
    struct row *row = table_row(x->t, "%s in bf16, forward + backward: %s", op_name(c), op_sizes(c, sizes));
    cell_seconds(row->took, fast);
    cell(row->compared, "fp32 %.2f ms (%.2f–%.2f)", slow.median * 1e3, slow.min * 1e3, slow.max * 1e3);
    cell(row->ratio, "%.2f times faster", slow.median / fast.median);
    row_progress(row);
    case_close(&bf16);
    case_close(&fp32);
}

static inline void bench_bf16(struct bench *b, struct table *t) {
    struct bench bf16 = *b;
    struct device_options options = {.threads = b->dev->threads, .precision = DEVICE_BF16};
    struct error e = {0};
    if (!cpu_multiplies_bf16()) {
        fprintf(
            stderr,
            "bench: this processor has no bf16 products: attention and mixing are not measured in bf16\n");
        return;
    }
    bf16.k = kernels_cpu_bf16();
    if (!(bf16.dev = bf16.k->open(&options, &e)))
        bench_fail(&e);
    struct bf16_context context = {b, &bf16, t};
    op_cases_run(OP_ATTENTION, BENCH_CPU, bf16_row, &context);
    op_cases_of(OP_QKV_MIX, OP_COLLAPSE, BENCH_CPU, bf16_row, &context);
    bf16.k->close(bf16.dev);
}

/* ---- work that divides ---- */

static inline void set_threads(struct bench *b, int threads) {
    b->dev->threads = threads;
    omp_set_num_threads(threads);
}

/* Backward on one thread and on all, in turn. */
static inline void divide_row(const struct op_case *c, void *context) {
    static struct samples one, all;
    struct bench_context *x = context;
    struct bench_case w;
    char sizes[OP_TEXT];
    int threads = x->b->dev->threads;
    case_open(&w, x->b, c);
    int calls = warm_up(case_backward, &w);
    one.count = all.count = 0;
    for (int i = 0; i < x->b->repeats; i++) {
        set_threads(x->b, 1);
        samples_add(&one, time_calls(case_backward, &w, calls));
        set_threads(x->b, threads);
        samples_add(&all, time_calls(case_backward, &w, calls));
    }
    case_close(&w);
    struct summary single = samples_summary(&one, 0), together = samples_summary(&all, 0);
    struct row *row =
        table_row(x->t, "%s backward on %d threads: %s", op_name(c), threads, op_sizes(c, sizes));
    cell_seconds(row->took, together);
    cell_seconds(row->compared, single);
    cell(row->ratio, "%.2f times one thread", single.median / together.median);
    row_progress(row);
}

static inline void bench_divide(struct bench *b, struct table *t) {
    static const enum op_kind kinds[] = {OP_EMBED, OP_NORM, OP_LINEAR, OP_QKV_MIX, OP_COLLAPSE};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        op_cases_run(kinds[i], BENCH_DIVIDE, divide_row, &(struct bench_context){b, t});
}

#endif
