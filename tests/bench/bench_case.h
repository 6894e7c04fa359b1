/* A case of tests/lib/op_cases.h on the benchmarked device: its operands, and rows about it. */
#ifndef IHA_TESTS_BENCH_BENCH_CASE_H
#define IHA_TESTS_BENCH_BENCH_CASE_H

#include "tests/bench/bench_table.h"
#include "tests/lib/op_operands.h"

struct bench_case {
    struct bench *b;
    const struct op_case *c;
    struct op_operand info[OP_OPERANDS];
    tensor t[OP_OPERANDS];
    void *saved, *workspace;
    size_t workspace_bytes;
    struct step_state *state;
};

/* Noise, a rotation's table, or ids. */
static inline tensor case_operand(const struct bench_case *w, const struct op_operand *x) {
    struct device *dev = w->b->dev;
    struct device_dtypes types = w->b->k->dtypes(dev);
    const int64_t *s = x->shape;
    enum dtype type = x->type == TYPE_COMPUTE    ? types.compute
                      : x->type == TYPE_GRADIENT ? types.gradient
                      : x->type == TYPE_ROPE     ? DTYPE_F32
                                                 : DTYPE_I32;
    if (x->type != TYPE_IDS) {
        tensor t = bench_noise(w->b, type, s[0], s[1], s[2], s[3], s[4]);
        if (x->type == TYPE_ROPE)
            w->b->k->rope_table(dev, &(const struct rope_spec){.theta = 10000}, t);
        return t;
    }
    tensor t = tensor_of(NULL, type, s[0], s[1], s[2], s[3], s[4]);
    int64_t n = tensor_count(t);
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++)
        ids[i] = x->id_type == ID_SEGMENT ? op_id(w->c, x, i, 0) : (int32_t)(i * 40503 % x->ids);
    t.data = bench_alloc(w->b, (size_t)n * sizeof *ids);
    w->b->k->upload(dev, t, ids, DTYPE_I32);
    free(ids);
    return t;
}

/* Plans the operation and gives the device its workspace. */
static inline void case_open(struct bench_case *w, struct bench *b, const struct op_case *c) {
    struct op_spec spec = op_spec_of(c);
    struct op_cost cost;
    struct error e = {0};
    *w = (struct bench_case){.b = b, .c = c};
    op_operands(c, w->info);
    if (b->k->plan(b->dev, &spec, &cost, &e) != 0)
        bench_fail(&e);
    for (int i = 0; i < OP_OPERANDS; i++)
        if (w->info[i].name)
            w->t[i] = case_operand(w, &w->info[i]);
    w->saved = bench_alloc(b, cost.saved);
    w->workspace = bench_alloc(b, cost.workspace);
    w->workspace_bytes = cost.workspace;
    w->state = bench_alloc(b, sizeof *w->state);
    b->k->set_workspace(b->dev, w->workspace, cost.workspace);
}

static inline void case_close(struct bench_case *w) {
    const struct kernels *k = w->b->k;
    k->set_workspace(w->b->dev, NULL, 0);
    for (int i = 0; i < OP_OPERANDS; i++)
        k->release(w->b->dev, w->t[i].data);
    k->release(w->b->dev, w->saved);
    k->release(w->b->dev, w->workspace);
    k->release(w->b->dev, w->state);
}

static inline void case_forward(void *context) {
    struct bench_case *w = context;
    op_forward(w->b->k, w->b->dev, w->c, w->t, w->saved, w->state);
}

static inline void case_backward(void *context) {
    struct bench_case *w = context;
    op_backward(w->b->k, w->b->dev, w->c, w->t, w->saved, w->state);
}

static inline void case_both(void *context) {
    case_forward(context);
    case_backward(context);
}

/* Bytes of every operand that is read plus those of every operand that is written. */
static inline double case_bytes(const struct bench_case *w, bool backward) {
    double bytes = 0;
    for (int i = 0; i < OP_OPERANDS; i++) {
        unsigned touched = w->info[i].touched >> (backward ? 2 : 0);
        int times = !!(touched & FORWARD_READS) + !!(touched & FORWARD_WRITES);
        if (w->info[i].name)
            bytes += times * (double)tensor_count(w->t[i]) * (double)dtype_bytes(w->t[i].dtype);
    }
    return bytes;
}

/* attention forward: two products of every visible pair. Backward has four, as model/flops.h counts: the
 * recomputed scores are not included. */
static inline double attention_flops(const struct op_case *c) {
    const struct attention_spec *s = &c->spec.attention;
    int64_t tokens = s->length / s->pseudo;
    double pairs = 0;
    for (int64_t i = 0; i < s->batch * s->length; i++) {
        int32_t first = 0, last = (int32_t)tokens;
        int64_t begin, end;
        if (s->segmented)
            segment_of_token(c->segments, i / s->length, tokens, i % s->length / s->pseudo, &first, &last);
        attention_segment_keys(s, i % s->length, first, last, &begin, &end);
        pairs += (double)(end - begin);
    }
    return 4 * pairs * (double)(s->head_dim * s->heads);
}

/* qkv_mix and collapse: a product for each of q, k, v, or one; backward has two for each. */
static inline double mixing_flops(const struct op_case *c, bool backward) {
    const struct qkv_mix_spec *m = &c->spec.qkv_mix;
    const struct collapse_spec *s = &c->spec.collapse;
    double products = c->spec.kind == OP_QKV_MIX
                          ? 3.0 * (double)(m->batch * m->tokens * m->head_dim * m->pseudo)
                          : (double)(s->batch * s->tokens * s->head_dim * s->pseudo);
    double heads = (double)(c->spec.kind == OP_QKV_MIX ? m->heads : s->heads);
    return (backward ? 2 : 1) * 2 * products * heads * heads;
}

#endif
