/* The benchmark's single operations: attention, attention in a window, and the mixing of heads. */
#ifndef IHA_TESTS_BENCH_BENCH_OPS_H
#define IHA_TESTS_BENCH_BENCH_OPS_H

#include <math.h>

#include "kernels/cpu/cpu.h" /* attention_tiles_visited */
#include "tests/bench/bench_table.h"

/* What an operation is run on: its spec, and tensors whose meaning is the operation's own. */
enum { MAX_OPERANDS = 16 };
struct op_run {
    struct bench *b;
    struct op_spec spec;
    tensor t[MAX_OPERANDS];
    int count;
    void *saved, *workspace;
};

/* Plan the operation and give the device its workspace. */
static inline void op_open(struct op_run *r, struct bench *b, struct op_spec spec) {
    struct op_cost cost;
    struct error e = {0};
    *r = (struct op_run){.b = b, .spec = spec};
    if (b->k->plan(b->dev, &spec, &cost, &e) != 0)
        bench_fail(&e);
    r->saved = bench_alloc(b, cost.saved);
    r->workspace = bench_alloc(b, cost.workspace);
    b->k->set_workspace(b->dev, r->workspace, cost.workspace);
}

static inline void op_close(struct op_run *r) {
    const struct kernels *k = r->b->k;
    k->set_workspace(r->b->dev, NULL, 0);
    for (int i = 0; i < r->count; i++)
        k->release(r->b->dev, r->t[i].data);
    k->release(r->b->dev, r->saved);
    k->release(r->b->dev, r->workspace);
}

/* The next operand, of noise. */
static inline void op_operand(struct op_run *r, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    r->t[r->count++] = bench_noise(r->b, s0, s1, s2, s3, s4);
}

/* ---- attention ---- */

enum { Q, K, V, O, DO, DQ, DK, DV, ATTENTION_OPERANDS };

static inline void attention_both_ways(void *context) {
    struct op_run *r = context;
    const struct kernels *k = r->b->k;
    const struct attention_spec *s = &r->spec.attention;
    tensor *t = r->t;
    k->attention(r->b->dev, s, t[Q], t[K], t[V], t[O], r->saved);
    k->attention_backward(r->b->dev, s, t[Q], t[K], t[V], t[O], t[DO], r->saved, t[DQ], t[DK], t[DV]);
}

/* 12 d for every visible pair and head: two products forward, four backward, as model/flops.h counts; the
 * scores that backward computes again are not work done. */
static inline double attention_flops(const struct attention_spec *s) {
    double pairs = 0;
    for (int64_t i = 0; i < s->length; i++) {
        int64_t begin, end;
        attention_keys(s, i, s->length, &begin, &end);
        pairs += (double)(end - begin);
    }
    return 12 * pairs * (double)(s->head_dim * s->heads * s->batch);
}

/* Forward and backward of one spec. *tiles: visited in one forward and backward, over all heads. */
static inline struct finding measure_attention(struct bench *b, struct attention_spec s, double *tiles) {
    struct op_run r;
    op_open(&r, b, (struct op_spec){.kind = OP_ATTENTION, .attention = s});
    for (int i = 0; i < ATTENTION_OPERANDS; i++)
        op_operand(&r, s.batch, s.length, s.heads, s.head_dim, 0);
    int64_t before = attention_tiles_visited;
    attention_both_ways(&r);
    *tiles = (double)(attention_tiles_visited - before);
    struct finding f = measure(b, attention_both_ways, &r);
    op_close(&r);
    return f;
}

static inline void attention_row(struct row *row, const struct attention_spec *s, const struct finding *f) {
    double rate = attention_flops(s) / f->seconds.median;
    cell_seconds(row->took, f->seconds);
    cell(row->rate, "%.1f GFLOP/s", rate / 1e9);
    cell(row->beside, "sgemm %.0f GFLOP/s", f->sgemm / 1e9);
    cell(row->ratio, "%.2f", rate / f->sgemm);
}

/* Short sequences of small heads, where what surrounds the products weighs most. */
static inline void bench_attention(struct bench *b, struct table *t) {
    const int64_t B = 32, T = 66, H = 8, d = 16, P = 8;
    struct attention_spec s = {
        .batch = B, .length = T * P, .heads = H, .head_dim = d, .pseudo = P, .scale = 1 / sqrt((double)d)};
    double tiles;
    struct finding f = measure_attention(b, s, &tiles);
    struct row *row =
        table_row(t, "attention, forward + backward: B=%d, H=%d, d=%d, T=%d, P=%d (S=%d), not causal", (int)B,
                  (int)H, (int)d, (int)T, (int)P, (int)s.length);
    attention_row(row, &s, &f);
    row_progress(row);
}

/* With a window, time and tiles per token must not grow with the sequence. */
static inline void bench_window(struct bench *b, struct table *t) {
    const int64_t H = 8, d = 64, P = 4, window = 512;
    for (int64_t T = 1024; T <= 16384; T *= 2) {
        struct attention_spec s = {.batch = 1,
                                   .length = T * P,
                                   .heads = H,
                                   .head_dim = d,
                                   .pseudo = P,
                                   .causal = true,
                                   .window = window,
                                   .scale = 1 / sqrt((double)d)};
        double tiles;
        struct finding f = measure_attention(b, s, &tiles);
        struct row *row = table_row(t,
                                    "IHA attention, window %d, forward + backward: T=%d, P=%d, H=%d, d=%d; "
                                    "%.2f tiles a token over all heads",
                                    (int)window, (int)T, (int)P, (int)H, (int)d, tiles / (double)T);
        attention_row(row, &s, &f);
        cell(row->rate, "%.2f ms per 1k tokens; %.1f GFLOP/s", f.seconds.median * 1e3 * 1024 / (double)T,
             attention_flops(&s) / f.seconds.median / 1e9);
        row_progress(row);
    }
}

/* ---- head mixing ---- */

enum { QKV, ALPHA_Q, ALPHA_K, ALPHA_V, TABLE, MIX_Q, MIX_K, MIX_V, DQKV, DALPHA_Q, DALPHA_K, DALPHA_V };
enum { PSEUDO_O, R, OUT, D_PSEUDO_O, DR };

static inline void mix_forward(void *context) {
    struct op_run *r = context;
    tensor *t = r->t;
    r->b->k->qkv_mix(r->b->dev, &r->spec.qkv_mix, t[QKV], t[ALPHA_Q], t[ALPHA_K], t[ALPHA_V], t[TABLE], 0,
                     t[MIX_Q], t[MIX_K], t[MIX_V]);
}

static inline void mix_backward(void *context) {
    struct op_run *r = context;
    tensor *t = r->t;
    r->b->k->qkv_mix_backward(r->b->dev, &r->spec.qkv_mix, t[MIX_Q], t[MIX_K], t[MIX_V], t[QKV], t[ALPHA_Q],
                              t[ALPHA_K], t[ALPHA_V], t[TABLE], t[DQKV], t[DALPHA_Q], t[DALPHA_K],
                              t[DALPHA_V], false);
}

static inline void collapse_forward(void *context) {
    struct op_run *r = context;
    tensor *t = r->t;
    r->b->k->collapse(r->b->dev, &r->spec.collapse, t[PSEUDO_O], t[R], t[OUT]);
}

static inline void collapse_backward(void *context) {
    struct op_run *r = context;
    tensor *t = r->t;
    r->b->k->collapse_backward(r->b->dev, &r->spec.collapse, t[OUT], t[PSEUDO_O], t[R], t[D_PSEUDO_O], t[DR],
                               false);
}

/* Bytes of operands [first, last]. */
static inline double operand_bytes(const struct op_run *r, int first, int last) {
    double bytes = 0;
    for (int i = first; i <= last; i++)
        bytes += (double)tensor_count(r->t[i]) * (double)dtype_bytes(r->t[i].dtype);
    return bytes;
}

/* A row for one direction of one operation that reads and writes `bytes`, each operand once. */
static inline void bandwidth_row(struct op_run *r, struct table *t, const char *name, void (*work)(void *),
                                 double bytes) {
    const struct qkv_mix_spec *s = &r->spec.qkv_mix;
    bool mix = r->spec.kind == OP_QKV_MIX;
    int64_t H = mix ? s->heads : r->spec.collapse.heads, d = mix ? s->head_dim : r->spec.collapse.head_dim;
    int64_t P = mix ? s->pseudo : r->spec.collapse.pseudo, T = mix ? s->tokens : r->spec.collapse.tokens;
    struct finding f = measure(r->b, work, r);
    struct row *row = table_row(t, "%s: H=%d, P=%d, d=%d, %d tokens", name, (int)H, (int)P, (int)d, (int)T);
    double rate = bytes / f.seconds.median;
    cell_seconds(row->took, f.seconds);
    cell(row->rate, "%.2f GB/s", rate / 1e9);
    cell(row->beside, "copy %.2f GB/s", f.copy / 1e9);
    cell(row->ratio, "%.2f", rate / f.copy);
    row_progress(row);
}

static inline void bench_mix(struct bench *b, struct table *t, int64_t T, int64_t H, int64_t P, int64_t d) {
    struct op_run r;
    struct qkv_mix_spec s = {1, T, H, d, P, .mixed = true, .rope = true, .rope_virtual = true};
    op_open(&r, b, (struct op_spec){.kind = OP_QKV_MIX, .qkv_mix = s});
    op_operand(&r, 1, T, 3, H, d);
    for (int i = 0; i < 3; i++)
        op_operand(&r, P, H, H, 0, 0);
    op_operand(&r, T * P, 2, d / 2, 0, 0);
    b->k->rope_table(b->dev, r.t[TABLE], 10000);
    for (int i = 0; i < 3; i++)
        op_operand(&r, 1, T * P, H, d, 0);
    op_operand(&r, 1, T, 3, H, d);
    for (int i = 0; i < 3; i++)
        op_operand(&r, P, H, H, 0, 0);
    bandwidth_row(&r, t, "qkv_mix forward", mix_forward, operand_bytes(&r, QKV, MIX_V));
    bandwidth_row(&r, t, "qkv_mix backward", mix_backward, operand_bytes(&r, QKV, DALPHA_V));
    op_close(&r);
}

static inline void bench_collapse(struct bench *b, struct table *t, int64_t T, int64_t H, int64_t P,
                                  int64_t d) {
    struct op_run r;
    struct collapse_spec s = {1, T, H, d, P, .per_head = false};
    op_open(&r, b, (struct op_spec){.kind = OP_COLLAPSE, .collapse = s});
    op_operand(&r, 1, T * P, H, d, 0);
    op_operand(&r, H, P, H, 0, 0);
    op_operand(&r, 1, T, H, d, 0);
    op_operand(&r, 1, T * P, H, d, 0);
    op_operand(&r, H, P, H, 0, 0);
    bandwidth_row(&r, t, "collapse forward", collapse_forward, operand_bytes(&r, PSEUDO_O, OUT));
    bandwidth_row(&r, t, "collapse backward", collapse_backward, operand_bytes(&r, PSEUDO_O, DR));
    op_close(&r);
}

/* Little arithmetic on much memory: held to the speed of a copy. */
static inline void bench_mixing(struct bench *b, struct table *t) {
    static const struct {
        int64_t heads, pseudo, head_dim;
    } sizes[] = {{12, 2, 64}, {16, 4, 64}, {20, 4, 128}};
    const int64_t tokens = 2048;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        bench_mix(b, t, tokens, sizes[i].heads, sizes[i].pseudo, sizes[i].head_dim);
        bench_collapse(b, t, tokens, sizes[i].heads, sizes[i].pseudo, sizes[i].head_dim);
    }
}

#endif
