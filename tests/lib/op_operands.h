/* What the operations of op_cases.h work on: the operands of a case, in the order of kernels/ops.def, which
 * direction reads or writes them, and the calls themselves. So a test or a benchmark sets up any operation in
 * one loop. */
#ifndef IHA_TESTS_LIB_OP_OPERANDS_H
#define IHA_TESTS_LIB_OP_OPERANDS_H

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tests/lib/op_cases.h"

enum { OP_OPERANDS = 16 };

/* Which direction reads or writes an operand. What only backward reads is the gradient of an output; what it
 * reads and writes, it adds to. */
enum { FORWARD_READS = 1, FORWARD_WRITES = 2, BACKWARD_READS = 4, BACKWARD_WRITES = 8 };
enum { BOTH_READ = FORWARD_READS | BACKWARD_READS, BACKWARD_ADDS = BACKWARD_READS | BACKWARD_WRITES };

enum operand_type { TYPE_COMPUTE, TYPE_GRADIENT /* of parameters */, TYPE_ROPE, TYPE_IDS /* i32 */ };
enum id_type { ID_TOKEN, ID_TARGET, ID_POSITION, ID_SEGMENT, ID_CORRECT };

struct op_operand {
    const char *name; /* NULL: absent */
    unsigned touched;
    enum operand_type type;
    int64_t shape[TENSOR_MAX_DIMS];
    double scale, offset; /* of the noise that an input holds; 0: 1 */
    int64_t ids;          /* of TYPE_IDS: below this */
    enum id_type id_type;
    /* Indices, counted from 1; 0: none. */
    int gradient_of_output; /* as backward finds it */
    int gradient_of[2];     /* inputs, as backward leaves it */
    int64_t zero_rows;      /* the last so many entries of the first dimension are zero */
    bool of_added; /* computed from what backward adds to, so that it differs when that is repeated */
};

/* Written over, or added to. */
static inline unsigned parameter_gradient(const struct op_case *c) {
    return c->options & ACCUMULATE ? BACKWARD_ADDS : BACKWARD_WRITES;
}

#define SHAPE(...) .shape = {__VA_ARGS__}
#define PRESENT(condition, name) ((condition) ? (name) : NULL)

static inline void embed_operands(const struct op_case *c, struct op_operand *x) {
    const struct embed_spec *s = &c->spec.embed;
    const int64_t N = s->batch * s->tokens, V = s->vocab, C = s->hidden;
    bool pos = c->options & POSITIONS;
    x[0] = (struct op_operand){"tokens", BOTH_READ, TYPE_IDS, SHAPE(s->batch, s->tokens), .ids = V};
    x[1] = (struct op_operand){"W", FORWARD_READS, SHAPE(V, C)};
    x[2] = (struct op_operand){PRESENT(pos, "pos"), FORWARD_READS, SHAPE(s->tokens + 3, C)};
    x[3] = (struct op_operand){"x", FORWARD_WRITES, SHAPE(N, C)};
    x[4] = (struct op_operand){"dx", BACKWARD_READS, SHAPE(N, C), .gradient_of_output = 4};
    x[5] = (struct op_operand){"dW", BACKWARD_ADDS, TYPE_GRADIENT, SHAPE(V, C), .gradient_of = {2}};
    x[6] = (struct op_operand){PRESENT(pos, "dpos"), BACKWARD_ADDS, TYPE_GRADIENT, SHAPE(s->tokens + 3, C),
                               .gradient_of = {3}};
    x[7] = (struct op_operand){PRESENT(c->options & GIVEN_POSITIONS, "positions"),
                               BOTH_READ,
                               TYPE_IDS,
                               SHAPE(s->batch, s->tokens),
                               .ids = s->tokens,
                               .id_type = ID_POSITION};
}

static inline void norm_operands(const struct op_case *c, struct op_operand *x) {
    const int64_t N = c->spec.norm.rows, C = c->spec.norm.hidden;
    bool delta = c->options & DELTA, bias = c->options & BIAS;
    unsigned dparam = parameter_gradient(c);
    x[0] = (struct op_operand){"x", FORWARD_READS | (delta ? 0 : BACKWARD_READS), SHAPE(N, C), .scale = 2,
                               .offset = 0.5};
    x[1] = (struct op_operand){PRESENT(delta, "delta"), FORWARD_READS, SHAPE(N, C)};
    x[2] = (struct op_operand){"w", BOTH_READ, SHAPE(C), .scale = 0.5, .offset = 1};
    x[3] = (struct op_operand){PRESENT(bias, "b"), FORWARD_READS, SHAPE(C)};
    x[4] = (struct op_operand){PRESENT(delta, "sum"), FORWARD_WRITES | BACKWARD_READS, SHAPE(N, C)};
    x[5] = (struct op_operand){"y", FORWARD_WRITES, SHAPE(N, C)};
    x[6] = (struct op_operand){"dy", BACKWARD_READS, SHAPE(N, C), .gradient_of_output = 6};
    x[7] = (struct op_operand){"dx", c->options & FIRST_DX ? BACKWARD_WRITES : BACKWARD_ADDS, SHAPE(N, C),
                               .gradient_of_output = delta && !(c->options & FIRST_DX) ? 5 : 0,
                               .gradient_of = {1, delta ? 2 : 0}};
    x[8] = (struct op_operand){"dw", dparam, TYPE_GRADIENT, SHAPE(C), .gradient_of = {3}};
    x[9] = (struct op_operand){PRESENT(bias, "db"), dparam, TYPE_GRADIENT, SHAPE(C), .gradient_of = {4}};
    x[10] = (struct op_operand){PRESENT(c->options & SUMS, "dx_sums"), BACKWARD_WRITES, TYPE_GRADIENT,
                                SHAPE(C), .of_added = !(c->options & FIRST_DX)};
}

static inline void linear_operands(const struct op_case *c, struct op_operand *x) {
    const struct linear_spec *s = &c->spec.linear;
    bool bias = c->options & BIAS;
    unsigned dparam = parameter_gradient(c);
    x[0] = (struct op_operand){"x", BOTH_READ, SHAPE(s->rows, s->in)};
    x[1] = (struct op_operand){"W", BOTH_READ, SHAPE(s->out, s->in)};
    x[2] = (struct op_operand){PRESENT(bias, "bias"), FORWARD_READS, SHAPE(s->out)};
    x[3] = (struct op_operand){"y", FORWARD_WRITES, SHAPE(s->rows, s->out)};
    x[4] = (struct op_operand){"dy", BACKWARD_READS, SHAPE(s->rows, s->out), .gradient_of_output = 4};
    x[5] = (struct op_operand){"dx", dparam, SHAPE(s->rows, s->in), .gradient_of = {1}};
    x[6] = (struct op_operand){"dW", dparam, TYPE_GRADIENT, SHAPE(s->out, s->in), .gradient_of = {2}};
    x[7] =
        (struct op_operand){PRESENT(bias, "dbias"), dparam, TYPE_GRADIENT, SHAPE(s->out), .gradient_of = {3}};
    x[8] = (struct op_operand){PRESENT(c->options & SUMS, "dy_sums"), BACKWARD_READS, TYPE_GRADIENT,
                               SHAPE(s->out)};
}

static inline void qkv_mix_operands(const struct op_case *c, struct op_operand *x) {
    static const char *const names[4][3] = {{"alpha_q", "alpha_k", "alpha_v"},
                                            {"q", "k", "v"},
                                            {"dq", "dk", "dv"},
                                            {"dalpha_q", "dalpha_k", "dalpha_v"}};
    const struct qkv_mix_spec *s = &c->spec.qkv_mix;
    const int64_t B = s->batch, d = s->head_dim, P = s->pseudo, S = s->tokens * P, row = mix_row_heads(s);
    x[0] = (struct op_operand){"qkv", BOTH_READ, SHAPE(B, s->tokens, row, d)};
    x[4] = (struct op_operand){PRESENT(s->rope, "table"), BOTH_READ, TYPE_ROPE,
                               SHAPE((c->first + s->tokens) * P, 2, d / 2)};
    x[11] = (struct op_operand){"dqkv", BACKWARD_WRITES, SHAPE(B, s->tokens, row, d), .gradient_of = {1}};
    for (int i = 0; i < 3; i++) {
        const int64_t H = mix_heads_of(s, i);
        x[1 + i] = (struct op_operand){PRESENT(s->mixed, names[0][i]), BOTH_READ, SHAPE(P, H, H)};
        x[5 + i] = (struct op_operand){names[1][i], FORWARD_WRITES, SHAPE(B, S, H, d)};
        x[8 + i] =
            (struct op_operand){names[2][i], BACKWARD_READS, SHAPE(B, S, H, d), .gradient_of_output = 6 + i};
        x[12 + i] = (struct op_operand){PRESENT(s->mixed, names[3][i]), parameter_gradient(c), TYPE_GRADIENT,
                                        SHAPE(P, H, H), .gradient_of = {2 + i}};
    }
    x[15] = (struct op_operand){PRESENT(c->options & GIVEN_POSITIONS, "positions"),
                                BOTH_READ,
                                TYPE_IDS,
                                SHAPE(B, s->tokens),
                                .ids = s->tokens,
                                .id_type = ID_POSITION};
}

static inline void attention_operands(const struct op_case *c, struct op_operand *x) {
    static const char *const names[] = {"q", "k", "v", "o", "do", "dq", "dk", "dv"};
    static const unsigned touched[] = {
        BOTH_READ,      BOTH_READ,       BOTH_READ,       FORWARD_WRITES | BACKWARD_READS,
        BACKWARD_READS, BACKWARD_WRITES, BACKWARD_WRITES, BACKWARD_WRITES};
    const struct attention_spec *s = &c->spec.attention;
    for (int i = 0; i < 8; i++)
        x[i] = (struct op_operand){
            names[i], touched[i],
            SHAPE(s->batch, s->length,
                  names[i][strlen(names[i]) - 1] == 'k' || names[i][strlen(names[i]) - 1] == 'v'
                      ? attention_kv_heads(s)
                      : s->heads,
                  s->head_dim),
            .gradient_of_output = i == 4 ? 4 : 0, .gradient_of = {i > 4 ? i - 4 : 0}};
    x[8] = (struct op_operand){PRESENT(s->segmented, "segments"),
                               BOTH_READ,
                               TYPE_IDS,
                               SHAPE(2, s->batch, s->length / s->pseudo),
                               .ids = s->length / s->pseudo + 1,
                               .id_type = ID_SEGMENT};
}

static inline void talking_operands(const struct op_case *c, struct op_operand *x) {
    static const char *const names[] = {"logits", "weights", "dlogits", "dweights"};
    const int64_t H = c->spec.attention.heads;
    attention_operands(c, x);
    for (int i = 0; i < 2; i++) {
        x[9 + i] = (struct op_operand){names[i], BOTH_READ, SHAPE(H, H)};
        x[11 + i] = (struct op_operand){names[2 + i], parameter_gradient(c), TYPE_GRADIENT, SHAPE(H, H),
                                        .gradient_of = {10 + i}};
    }
}

static inline void simplicial_operands(const struct op_case *c, struct op_operand *x) {
    const struct attention_spec *s = &c->spec.attention;
    attention_operands(c, x);
    for (int i = 0; i < 2; i++) {
        x[9 + i] = (struct op_operand){i ? "v2" : "k2", BOTH_READ,
                                       SHAPE(s->batch, s->length, s->heads, s->head_dim)};
        x[11 + i] =
            (struct op_operand){i ? "dv2" : "dk2", BACKWARD_WRITES,
                                SHAPE(s->batch, s->length, s->heads, s->head_dim), .gradient_of = {10 + i}};
    }
}

static inline void collapse_operands(const struct op_case *c, struct op_operand *x) {
    const struct collapse_spec *s = &c->spec.collapse;
    const int64_t B = s->batch, T = s->tokens, H = s->heads, d = s->head_dim, P = s->pseudo;
    const int64_t last = s->per_head ? 0 : H;
    x[0] = (struct op_operand){"o", BOTH_READ, SHAPE(B, T * P, H, d)};
    x[1] = (struct op_operand){"R", BOTH_READ, SHAPE(H, P, last)};
    x[2] = (struct op_operand){"out", FORWARD_WRITES, SHAPE(B, T, H, d)};
    x[3] = (struct op_operand){"dout", BACKWARD_READS, SHAPE(B, T, H, d), .gradient_of_output = 3};
    x[4] = (struct op_operand){"do", BACKWARD_WRITES, SHAPE(B, T * P, H, d), .gradient_of = {1}};
    x[5] = (struct op_operand){"dR", parameter_gradient(c), TYPE_GRADIENT, SHAPE(H, P, last),
                               .gradient_of = {2}};
}

static inline void fold_operands(const struct op_case *c, struct op_operand *x) {
    const int64_t H = c->spec.fold.heads, n = c->spec.fold.columns;
    static const char *const alphas[] = {"alpha_q", "alpha_k", "alpha_v"}, *const gradients[] = {"dalpha_q",
                                                                                                 "dalpha_k",
                                                                                                 "dalpha_v"};
    unsigned dparam = parameter_gradient(c);
    x[0] = (struct op_operand){"w", BOTH_READ, SHAPE(3, H, n)};
    x[4] = (struct op_operand){"folded", FORWARD_WRITES, SHAPE(3, H, n)};
    x[5] = (struct op_operand){"dfolded", BACKWARD_READS, TYPE_GRADIENT, SHAPE(3, H, n),
                               .gradient_of_output = 5};
    x[6] = (struct op_operand){"dw", dparam, TYPE_GRADIENT, SHAPE(3, H, n), .gradient_of = {1}};
    for (int i = 0; i < 3; i++) {
        x[1 + i] = (struct op_operand){alphas[i], BOTH_READ, SHAPE(H, H)};
        x[7 + i] =
            (struct op_operand){gradients[i], dparam, TYPE_GRADIENT, SHAPE(H, H), .gradient_of = {2 + i}};
    }
}

/* The lambdas as small as they begin, w about 1. */
static inline void diff_combine_operands(const struct op_case *c, struct op_operand *x) {
    static const char *const names[] = {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "w"};
    static const char *const gradients[] = {"dlambda_q1", "dlambda_k1", "dlambda_q2", "dlambda_k2", "dw"};
    const struct diff_combine_spec *s = &c->spec.diff_combine;
    x[0] = (struct op_operand){"o", BOTH_READ, SHAPE(s->rows, 2, s->pairs, 2 * s->head_dim)};
    x[6] = (struct op_operand){"out", FORWARD_WRITES, SHAPE(s->rows, s->pairs, 2 * s->head_dim)};
    x[7] = (struct op_operand){"dout", BACKWARD_READS, SHAPE(s->rows, s->pairs, 2 * s->head_dim),
                               .gradient_of_output = 7};
    x[8] = (struct op_operand){"do", BACKWARD_WRITES, SHAPE(s->rows, 2, s->pairs, 2 * s->head_dim),
                               .gradient_of = {1}};
    for (int i = 0; i < 5; i++) {
        x[1 + i] = (struct op_operand){names[i], BOTH_READ, SHAPE(i < 4 ? s->head_dim : 2 * s->head_dim),
                                       .scale = 0.5, .offset = i < 4 ? 0 : 1};
        x[9 + i] = (struct op_operand){gradients[i], parameter_gradient(c), TYPE_GRADIENT,
                                       SHAPE(i < 4 ? s->head_dim : 2 * s->head_dim), .gradient_of = {2 + i}};
    }
}

static inline void qk_norm_operands(const struct op_case *c, struct op_operand *x) {
    const struct qk_norm_spec *s = &c->spec.qk_norm;
    const int64_t N = s->rows, heads = s->heads + 2 * s->kv_heads, d = s->head_dim;
    unsigned dparam = parameter_gradient(c);
    x[0] = (struct op_operand){"x", BOTH_READ, SHAPE(N, heads, d)};
    x[1] = (struct op_operand){"w_q", BOTH_READ, SHAPE(d), .scale = 0.5, .offset = 1};
    x[2] = (struct op_operand){"w_k", BOTH_READ, SHAPE(d), .scale = 0.5, .offset = 1};
    x[3] = (struct op_operand){"y", FORWARD_WRITES, SHAPE(N, heads, d)};
    x[4] = (struct op_operand){"dy", BACKWARD_READS, SHAPE(N, heads, d), .gradient_of_output = 4};
    x[5] = (struct op_operand){"dx", BACKWARD_WRITES, SHAPE(N, heads, d), .gradient_of = {1}};
    x[6] = (struct op_operand){"dw_q", dparam, TYPE_GRADIENT, SHAPE(d), .gradient_of = {2}};
    x[7] = (struct op_operand){"dw_k", dparam, TYPE_GRADIENT, SHAPE(d), .gradient_of = {3}};
}

/* Inputs large enough to reach the nonlinear parts of the activations. */
static inline void act_operands(const struct op_case *c, struct op_operand *x) {
    const int64_t N = c->spec.act.rows, F = c->spec.act.hidden;
    bool gated = c->spec.act.type == ACT_SWIGLU;
    x[0] = (struct op_operand){"u", BOTH_READ, SHAPE(N, F), .scale = 4};
    x[1] = (struct op_operand){PRESENT(gated, "gate"), BOTH_READ, SHAPE(N, F), .scale = 4};
    x[2] = (struct op_operand){"out", FORWARD_WRITES, SHAPE(N, F)};
    x[3] = (struct op_operand){"dout", BACKWARD_READS, SHAPE(N, F), .gradient_of_output = 3};
    x[4] = (struct op_operand){"du", BACKWARD_WRITES, SHAPE(N, F), .gradient_of = {1}};
    x[5] = (struct op_operand){PRESENT(gated, "dgate"), BACKWARD_WRITES, SHAPE(N, F), .gradient_of = {2}};
}

static inline void classifier_operands(const struct op_case *c, struct op_operand *x) {
    const struct classifier_spec *s = &c->spec.classifier;
    bool gradient = !(c->options & LOSS_ONLY);
    int64_t padded = classifier_padded(s), padding = padded - s->vocab;
    x[0] = (struct op_operand){"h", BOTH_READ, SHAPE(s->rows, s->hidden), .scale = 2};
    x[1] = (struct op_operand){"W", BOTH_READ, SHAPE(padded, s->hidden), .zero_rows = padding};
    x[2] = (struct op_operand){"targets",      BOTH_READ,       TYPE_IDS,
                               SHAPE(s->rows), .ids = s->vocab, .id_type = ID_TARGET};
    x[3] = (struct op_operand){PRESENT(gradient, "dh"), BACKWARD_WRITES, SHAPE(s->rows, s->hidden),
                               .gradient_of = {1}};
    x[4] = (struct op_operand){PRESENT(gradient, "dW"),  parameter_gradient(c), TYPE_GRADIENT,
                               SHAPE(padded, s->hidden), .gradient_of = {2},    .zero_rows = padding};
    x[5] = (struct op_operand){PRESENT(c->options & CORRECT, "correct"),
                               FORWARD_WRITES | BACKWARD_WRITES,
                               TYPE_IDS,
                               SHAPE(s->rows),
                               .ids = 2,
                               .id_type = ID_CORRECT};
}

/* The operands of a case; the absent ones have no name. */
static inline void op_operands(const struct op_case *c, struct op_operand x[OP_OPERANDS]) {
    static void (*const of[])(const struct op_case *,
                              struct op_operand *) = {[OP_EMBED] = embed_operands,
                                                      [OP_NORM] = norm_operands,
                                                      [OP_LINEAR] = linear_operands,
                                                      [OP_QKV_MIX] = qkv_mix_operands,
                                                      [OP_ATTENTION] = attention_operands,
                                                      [OP_TALKING] = talking_operands,
                                                      [OP_SIMPLICIAL] = simplicial_operands,
                                                      [OP_COLLAPSE] = collapse_operands,
                                                      [OP_FOLD] = fold_operands,
                                                      [OP_DIFF_COMBINE] = diff_combine_operands,
                                                      [OP_QK_NORM] = qk_norm_operands,
                                                      [OP_ACT] = act_operands,
                                                      [OP_CLASSIFIER] = classifier_operands};
    for (int i = 0; i < OP_OPERANDS; i++)
        x[i] = (struct op_operand){0};
    of[c->spec.kind](c, x);
}

/* The spec as it is planned. */
static inline struct op_spec op_spec_of(const struct op_case *c) {
    struct op_spec spec = c->spec;
    if ((spec.kind == OP_ATTENTION || spec.kind == OP_TALKING || spec.kind == OP_SIMPLICIAL) &&
        spec.attention.scale == 0)
        spec.attention.scale = 1 / sqrt((double)spec.attention.head_dim);
    return spec;
}

/* Element i of segments [2,B,T]. */
static inline int32_t op_segment(const struct op_case *c, int64_t i) {
    const struct attention_spec *s = &c->spec.attention;
    int64_t tokens = s->length / s->pseudo, b = i / tokens;
    int32_t first, last;
    segment_of_token(c->segments, b % s->batch, tokens, i % tokens, &first, &last);
    return b < s->batch ? first : last;
}

/* Element i of an operand of TYPE_IDS, from noise in [-1, 1). One target in four does not count. */
static inline int32_t op_id(const struct op_case *c, const struct op_operand *x, int64_t i, double noise) {
    int64_t any = (int64_t)((noise + 1) / 2 * (double)x->ids);
    if (x->id_type == ID_SEGMENT)
        return op_segment(c, i);
    if (x->id_type == ID_TARGET)
        return i % 4 == 3 ? -1 : (int32_t)any;
    if (x->id_type != ID_TOKEN)
        return (int32_t)any;
    switch (c->options & ALL_TOKENS) {
    case ONE_TOKEN:
        return (int32_t)(x->ids - 1);
    case FEW_TOKENS:
        return (int32_t)(any % 3);
    case ALL_TOKENS:
        return (int32_t)(i % x->ids);
    }
    return (int32_t)any;
}

/* ---- calls; t: a backend's tensors, in the order of op_operands ---- */

static const double CLASSIFIER_SCALE = 1.0 / 16;

static inline void op_forward(const struct kernels *k, struct device *dev, const struct op_case *c,
                              const tensor *t, void *saved, struct step_state *state) {
    const struct op_spec s = op_spec_of(c);
    switch (s.kind) {
    case OP_EMBED:
        return k->embed(dev, &s.embed, t[0], t[1], t[2], t[7], t[2].data ? c->first : 0, t[3]);
    case OP_NORM:
        return k->residual_norm(dev, &s.norm, t[0], t[1], t[2], t[3], t[1].data ? t[4] : t[0], t[5], saved);
    case OP_LINEAR:
        return k->linear(dev, &s.linear, t[0], t[1], t[2], t[3]);
    case OP_QKV_MIX:
        return k->qkv_mix(dev, &s.qkv_mix, t[0], t[1], t[2], t[3], t[4], t[15], c->first, t[5], t[6], t[7]);
    case OP_ATTENTION:
        return k->attention(dev, &s.attention, t[0], t[1], t[2], t[8], t[3], saved);
    case OP_TALKING:
        return k->talking(dev, &s.attention, t[0], t[1], t[2], t[8], t[9], t[10], t[3], saved);
    case OP_SIMPLICIAL:
        return k->simplicial(dev, &s.attention, t[0], t[1], t[2], t[9], t[10], t[8], t[3], saved);
    case OP_COLLAPSE:
        return k->collapse(dev, &s.collapse, t[0], t[1], t[2]);
    case OP_QK_NORM:
        return k->qk_norm(dev, &s.qk_norm, t[0], t[1], t[2], t[3]);
    case OP_FOLD:
        return k->fold(dev, &s.fold, t[0], t[1], t[2], t[3], t[4]);
    case OP_DIFF_COMBINE:
        return k->diff_combine(dev, &s.diff_combine, t[0], t[1], t[2], t[3], t[4], t[5], t[6]);
    case OP_ACT:
        return k->mlp_act(dev, &s.act, t[0], t[1], t[2]);
    default:
        return k->classifier(dev, &s.classifier, t[0], t[1], t[2], CLASSIFIER_SCALE, state, t[5],
                             tensor_none(), tensor_none(), false);
    }
}

/* classifier: the loss once more, and its gradients. */
static inline void op_backward(const struct kernels *k, struct device *dev, const struct op_case *c,
                               const tensor *t, const void *saved, struct step_state *state) {
    const struct op_spec s = op_spec_of(c);
    bool add = c->options & ACCUMULATE;
    switch (s.kind) {
    case OP_EMBED:
        return k->embed_backward(dev, &s.embed, t[0], t[7], t[4], t[5], t[6]);
    case OP_NORM:
        return k->residual_norm_backward(dev, &s.norm, t[6], t[1].data ? t[4] : t[0], t[2], saved, t[7],
                                         !(c->options & FIRST_DX), t[8], t[9], t[10], add);
    case OP_LINEAR:
        return k->linear_backward(dev, &s.linear, t[4], t[8], t[0], t[1], t[5], add, t[6], t[7], add);
    case OP_QKV_MIX:
        return k->qkv_mix_backward(dev, &s.qkv_mix, t[8], t[9], t[10], t[0], t[1], t[2], t[3], t[4], t[15],
                                   t[11], t[12], t[13], t[14], add);
    case OP_ATTENTION:
        return k->attention_backward(dev, &s.attention, t[0], t[1], t[2], t[8], t[3], t[4], saved, t[5], t[6],
                                     t[7]);
    case OP_TALKING:
        return k->talking_backward(dev, &s.attention, t[0], t[1], t[2], t[8], t[9], t[10], t[4], saved, t[5],
                                   t[6], t[7], t[11], t[12], add);
    case OP_SIMPLICIAL:
        return k->simplicial_backward(dev, &s.attention, t[0], t[1], t[2], t[9], t[10], t[8], t[3], t[4],
                                      saved, t[5], t[6], t[7], t[11], t[12]);
    case OP_COLLAPSE:
        return k->collapse_backward(dev, &s.collapse, t[3], t[0], t[1], t[4], t[5], add);
    case OP_QK_NORM:
        return k->qk_norm_backward(dev, &s.qk_norm, t[4], t[0], t[1], t[2], t[5], t[6], t[7], add);
    case OP_FOLD:
        return k->fold_backward(dev, &s.fold, t[5], t[0], t[1], t[2], t[3], t[6], t[7], t[8], t[9], add, add);
    case OP_DIFF_COMBINE:
        return k->diff_combine_backward(dev, &s.diff_combine, t[7], t[0], t[1], t[2], t[3], t[4], t[5], t[8],
                                        t[9], t[10], t[11], t[12], t[13], add);
    case OP_ACT:
        return k->mlp_act_backward(dev, &s.act, t[3], t[0], t[1], t[4], t[5]);
    default:
        return k->classifier(dev, &s.classifier, t[0], t[1], t[2], CLASSIFIER_SCALE, state, t[5], t[3], t[4],
                             add);
    }
}

/* ---- descriptions ---- */

enum { OP_TEXT = 256 };

static inline const char *op_name(const struct op_case *c) {
    static const char *const names[] = {[OP_EMBED] = "embed",
                                        [OP_NORM] = "residual_norm",
                                        [OP_LINEAR] = "linear",
                                        [OP_QKV_MIX] = "qkv_mix",
                                        [OP_ATTENTION] = "attention",
                                        [OP_TALKING] = "talking",
                                        [OP_SIMPLICIAL] = "simplicial",
                                        [OP_COLLAPSE] = "collapse",
                                        [OP_FOLD] = "fold",
                                        [OP_DIFF_COMBINE] = "diff_combine",
                                        [OP_CLASSIFIER] = "classifier"};
    static const char *const acts[] = {"gelu_tanh", "relu2", "swiglu"};
    return c->spec.kind == OP_ACT ? acts[c->spec.act.type] : names[c->spec.kind];
}

/* "H=12, P=2, d=64, 2048 tokens": the sizes in which the cases of an operation differ. */
static inline const char *op_sizes(const struct op_case *c, char text[OP_TEXT]) {
    const struct op_spec *s = &c->spec;
    int at;
    switch (s->kind) {
    case OP_EMBED:
        snprintf(text, OP_TEXT, "%d x %d tokens, V=%d, C=%d", (int)s->embed.batch, (int)s->embed.tokens,
                 (int)s->embed.vocab, (int)s->embed.hidden);
        break;
    case OP_NORM:
        snprintf(text, OP_TEXT, "%d rows of %d", (int)s->norm.rows, (int)s->norm.hidden);
        break;
    case OP_LINEAR:
        snprintf(text, OP_TEXT, "%d rows, %d to %d", (int)s->linear.rows, (int)s->linear.in,
                 (int)s->linear.out);
        break;
    case OP_QKV_MIX:
        snprintf(text, OP_TEXT, "H=%d, P=%d, d=%d, %d tokens", (int)s->qkv_mix.heads, (int)s->qkv_mix.pseudo,
                 (int)s->qkv_mix.head_dim, (int)(s->qkv_mix.batch * s->qkv_mix.tokens));
        break;
    case OP_ATTENTION:
    case OP_TALKING:
    case OP_SIMPLICIAL:
        at = snprintf(text, OP_TEXT, "B=%d, S=%d, H=%d, d=%d, P=%d%s%s", (int)s->attention.batch,
                      (int)s->attention.length, (int)s->attention.heads, (int)s->attention.head_dim,
                      (int)s->attention.pseudo, s->attention.causal ? "" : ", not causal",
                      s->attention.token_mask ? ", token mask" : "");
        if (s->attention.window > 0)
            at += snprintf(text + at, OP_TEXT - (size_t)at, ", window %d", (int)s->attention.window);
        if (s->attention.segmented)
            snprintf(text + at, OP_TEXT - (size_t)at, ", segments of %d, %d, ... tokens", (int)c->segments[0],
                     (int)c->segments[c->segments[1] > 0]);
        break;
    case OP_COLLAPSE:
        snprintf(text, OP_TEXT, "H=%d, P=%d, d=%d, %d tokens%s", (int)s->collapse.heads,
                 (int)s->collapse.pseudo, (int)s->collapse.head_dim,
                 (int)(s->collapse.batch * s->collapse.tokens), s->collapse.per_head ? ", per head" : "");
        break;
    case OP_QK_NORM:
        snprintf(text, OP_TEXT, "%d rows, H=%d, G=%d, d=%d", (int)s->qk_norm.rows, (int)s->qk_norm.heads,
                 (int)s->qk_norm.kv_heads, (int)s->qk_norm.head_dim);
        break;
    case OP_FOLD:
        snprintf(text, OP_TEXT, "H=%d, %d columns", (int)s->fold.heads, (int)s->fold.columns);
        break;
    case OP_DIFF_COMBINE:
        snprintf(text, OP_TEXT, "%d rows, %d pairs of heads, d=%d", (int)s->diff_combine.rows,
                 (int)s->diff_combine.pairs, (int)s->diff_combine.head_dim);
        break;
    case OP_ACT:
        snprintf(text, OP_TEXT, "%d rows of %d", (int)s->act.rows, (int)s->act.hidden);
        break;
    default:
        at = snprintf(text, OP_TEXT, "%d rows, C=%d, V=%d", (int)s->classifier.rows,
                      (int)s->classifier.hidden, (int)s->classifier.vocab);
        if (s->classifier.padded)
            snprintf(text + at, OP_TEXT - (size_t)at, " padded to %d", (int)s->classifier.padded);
    }
    return text;
}

/* For a failure: the operation, its sizes and what its spec leaves open. */
static inline const char *op_describe(const struct op_case *c) {
    static const char *const options[] = {
        "accumulate", "bias",       "delta",          "learned positions",
        "one token",  "few tokens", "loss only",      "positions of each token",
        "correct",    "dx written", "sums of columns"};
    static char text[2 * OP_TEXT];
    char sizes[OP_TEXT];
    int at = snprintf(text, sizeof text, "%s %s", op_name(c), op_sizes(c, sizes));
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (c->options >> i & 1)
            at += snprintf(text + at, sizeof text - (size_t)at, ", %s", options[i]);
    return text;
}

#endif
