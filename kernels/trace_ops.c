/* A table whose operations are ranges of their own name: what a profile sees below the model's layers. */
#include "kernels/kernels.h"

static const struct kernels *inner;

#define TRACED(name, parameters, arguments)                                                                  \
    static void name parameters {                                                                            \
        inner->range_begin(dev, #name, -1);                                                                  \
        inner->name arguments;                                                                               \
        inner->range_end(dev);                                                                               \
    }
#define DEV struct device *dev

TRACED(embed, (DEV, const struct embed_spec *s, tensor tokens, tensor w, tensor pos, int64_t first, tensor x),
       (dev, s, tokens, w, pos, first, x))
TRACED(embed_backward, (DEV, const struct embed_spec *s, tensor tokens, tensor dx, tensor dw, tensor dpos),
       (dev, s, tokens, dx, dw, dpos))
TRACED(residual_norm,
       (DEV, const struct norm_spec *s, tensor x, tensor delta, tensor w, tensor b, tensor sum, tensor y,
        void *saved),
       (dev, s, x, delta, w, b, sum, y, saved))
TRACED(residual_norm_recompute,
       (DEV, const struct norm_spec *s, tensor sum, tensor w, tensor b, tensor y, const void *saved),
       (dev, s, sum, w, b, y, saved))
TRACED(residual_norm_backward,
       (DEV, const struct norm_spec *s, tensor dy, tensor sum, tensor w, const void *saved, tensor dx,
        tensor dw, tensor db, bool accumulate),
       (dev, s, dy, sum, w, saved, dx, dw, db, accumulate))
TRACED(linear, (DEV, const struct linear_spec *s, tensor x, tensor w, tensor bias, tensor y),
       (dev, s, x, w, bias, y))
TRACED(linear_backward,
       (DEV, const struct linear_spec *s, tensor dy, tensor x, tensor w, tensor dx, bool add_dx, tensor dw,
        tensor dbias, bool accumulate),
       (dev, s, dy, x, w, dx, add_dx, dw, dbias, accumulate))
TRACED(qkv_mix,
       (DEV, const struct qkv_mix_spec *s, tensor qkv, tensor aq, tensor ak, tensor av, tensor table,
        int64_t first, tensor q, tensor k, tensor v),
       (dev, s, qkv, aq, ak, av, table, first, q, k, v))
TRACED(qkv_mix_backward,
       (DEV, const struct qkv_mix_spec *s, tensor dq, tensor dk, tensor dv, tensor qkv, tensor aq, tensor ak,
        tensor av, tensor table, tensor dqkv, tensor daq, tensor dak, tensor dav, bool accumulate),
       (dev, s, dq, dk, dv, qkv, aq, ak, av, table, dqkv, daq, dak, dav, accumulate))
TRACED(attention, (DEV, const struct attention_spec *s, tensor q, tensor k, tensor v, tensor o, void *saved),
       (dev, s, q, k, v, o, saved))
TRACED(attention_backward,
       (DEV, const struct attention_spec *s, tensor q, tensor k, tensor v, tensor o, tensor d_o,
        const void *saved, tensor dq, tensor dk, tensor dv),
       (dev, s, q, k, v, o, d_o, saved, dq, dk, dv))
TRACED(collapse, (DEV, const struct collapse_spec *s, tensor o, tensor r, tensor out), (dev, s, o, r, out))
TRACED(collapse_backward,
       (DEV, const struct collapse_spec *s, tensor dout, tensor o, tensor r, tensor d_o, tensor dr,
        bool accumulate),
       (dev, s, dout, o, r, d_o, dr, accumulate))
TRACED(mlp_act, (DEV, const struct act_spec *s, tensor u, tensor gate, tensor out), (dev, s, u, gate, out))
TRACED(mlp_act_backward,
       (DEV, const struct act_spec *s, tensor dout, tensor u, tensor gate, tensor du, tensor dgate),
       (dev, s, dout, u, gate, du, dgate))
TRACED(classifier,
       (DEV, const struct classifier_spec *s, tensor h, tensor w, tensor targets, double scale,
        struct step_state *state, tensor dh, tensor dw, bool accumulate),
       (dev, s, h, w, targets, scale, state, dh, dw, accumulate))
TRACED(sumsq, (DEV, tensor g, struct step_state *state), (dev, g, state))
TRACED(adamw,
       (DEV, const struct adamw_hyper *h, const struct param_group *groups, int count, int64_t first,
        tensor master, tensor p, tensor g, tensor m, tensor v, const struct step_state *state),
       (dev, h, groups, count, first, master, p, g, m, v, state))

const struct kernels *kernels_traced(const struct kernels *k) {
    static struct kernels table;
    inner = k;
    table = *k;
    table.embed = embed;
    table.embed_backward = embed_backward;
    table.residual_norm = residual_norm;
    table.residual_norm_recompute = residual_norm_recompute;
    table.residual_norm_backward = residual_norm_backward;
    table.linear = linear;
    table.linear_backward = linear_backward;
    table.qkv_mix = qkv_mix;
    table.qkv_mix_backward = qkv_mix_backward;
    table.attention = attention;
    table.attention_backward = attention_backward;
    table.collapse = collapse;
    table.collapse_backward = collapse_backward;
    table.mlp_act = mlp_act;
    table.mlp_act_backward = mlp_act_backward;
    table.classifier = classifier;
    table.sumsq = sumsq;
    table.adamw = adamw;
    return &table;
}
