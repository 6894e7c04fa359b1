/* The plain computation in bf16: the CPU backend, with every activation that an operation writes rounded to
 * bf16. What the CUDA backend in bf16 may be wrong by is measured with it. Gradients of parameters,
 * statistics and the step state stay in fp32, as they do there. */
#ifndef IHA_TESTS_LIB_ROUNDED_H
#define IHA_TESTS_LIB_ROUNDED_H

#include <string.h>

#include "kernels/kernels.h"

static inline float bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Every element of a view of floats, or of none. */
static inline void round_view(tensor t) {
    if (!t.data)
        return;
    if (t.ndim > 1) {
        for (int64_t i = 0; i < t.shape[0]; i++)
            round_view(tensor_select(t, 0, i));
        return;
    }
    float *x = t.data;
    for (int64_t i = 0; i < t.shape[0]; i++)
        x[i * t.stride[0]] = bf16_of(x[i * t.stride[0]]);
}

static void rounded_embed(struct device *dev, const struct embed_spec *s, tensor tokens, tensor w, tensor pos,
                          int64_t first, tensor x) {
    kernels_cpu()->embed(dev, s, tokens, w, pos, first, x);
    round_view(x);
}

static void rounded_norm(struct device *dev, const struct norm_spec *s, tensor x, tensor delta, tensor w,
                         tensor b, tensor sum, tensor y, void *saved) {
    kernels_cpu()->residual_norm(dev, s, x, delta, w, b, sum, y, saved);
    if (delta.data)
        round_view(sum);
    round_view(y);
}

static void rounded_norm_recompute(struct device *dev, const struct norm_spec *s, tensor sum, tensor w,
                                   tensor b, tensor y, const void *saved) {
    kernels_cpu()->residual_norm_recompute(dev, s, sum, w, b, y, saved);
    round_view(y);
}

static void rounded_norm_backward(struct device *dev, const struct norm_spec *s, tensor dy, tensor sum,
                                  tensor w, const void *saved, tensor dx, tensor dw, tensor db,
                                  bool accumulate) {
    kernels_cpu()->residual_norm_backward(dev, s, dy, sum, w, saved, dx, dw, db, accumulate);
    round_view(dx);
}

static void rounded_linear(struct device *dev, const struct linear_spec *s, tensor x, tensor w, tensor bias,
                           tensor y) {
    kernels_cpu()->linear(dev, s, x, w, bias, y);
    round_view(y);
}

static void rounded_linear_backward(struct device *dev, const struct linear_spec *s, tensor dy, tensor x,
                                    tensor w, tensor dx, bool add_dx, tensor dw, tensor dbias,
                                    bool accumulate) {
    kernels_cpu()->linear_backward(dev, s, dy, x, w, dx, add_dx, dw, dbias, accumulate);
    round_view(dx);
}

static void rounded_qkv_mix(struct device *dev, const struct qkv_mix_spec *s, tensor qkv, tensor alpha_q,
                            tensor alpha_k, tensor alpha_v, tensor table, int64_t first, tensor q, tensor k,
                            tensor v) {
    kernels_cpu()->qkv_mix(dev, s, qkv, alpha_q, alpha_k, alpha_v, table, first, q, k, v);
    round_view(q);
    round_view(k);
    round_view(v);
}

static void rounded_qkv_mix_backward(struct device *dev, const struct qkv_mix_spec *s, tensor dq, tensor dk,
                                     tensor dv, tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v,
                                     tensor table, tensor dqkv, tensor dalpha_q, tensor dalpha_k,
                                     tensor dalpha_v, bool accumulate) {
    kernels_cpu()->qkv_mix_backward(dev, s, dq, dk, dv, qkv, alpha_q, alpha_k, alpha_v, table, dqkv, dalpha_q,
                                    dalpha_k, dalpha_v, accumulate);
    round_view(dqkv);
}

static void rounded_attention(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                              tensor v, tensor o, void *saved) {
    kernels_cpu()->attention(dev, s, q, k, v, o, saved);
    round_view(o);
}

static void rounded_attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                                       tensor v, tensor o, tensor d_o, const void *saved, tensor dq,
                                       tensor dk, tensor dv) {
    kernels_cpu()->attention_backward(dev, s, q, k, v, o, d_o, saved, dq, dk, dv);
    round_view(dq);
    round_view(dk);
    round_view(dv);
}

static void rounded_collapse(struct device *dev, const struct collapse_spec *s, tensor o, tensor r,
                             tensor out) {
    kernels_cpu()->collapse(dev, s, o, r, out);
    round_view(out);
}

static void rounded_collapse_backward(struct device *dev, const struct collapse_spec *s, tensor dout,
                                      tensor o, tensor r, tensor d_o, tensor dr, bool accumulate) {
    kernels_cpu()->collapse_backward(dev, s, dout, o, r, d_o, dr, accumulate);
    round_view(d_o);
}

static void rounded_act(struct device *dev, const struct act_spec *s, tensor u, tensor gate, tensor out) {
    kernels_cpu()->mlp_act(dev, s, u, gate, out);
    round_view(out);
}

static void rounded_act_backward(struct device *dev, const struct act_spec *s, tensor dout, tensor u,
                                 tensor gate, tensor du, tensor dgate) {
    kernels_cpu()->mlp_act_backward(dev, s, dout, u, gate, du, dgate);
    round_view(du);
    round_view(dgate);
}

static void rounded_classifier(struct device *dev, const struct classifier_spec *s, tensor h, tensor w,
                               tensor targets, double scale, struct step_state *state, tensor dh, tensor dw,
                               bool accumulate) {
    kernels_cpu()->classifier(dev, s, h, w, targets, scale, state, dh, dw, accumulate);
    round_view(dh);
}

static inline const struct kernels *kernels_cpu_rounded(void) {
    static struct kernels table;
    table = *kernels_cpu();
    table.name = "cpu, rounded to bf16";
    table.embed = rounded_embed;
    table.residual_norm = rounded_norm;
    table.residual_norm_recompute = rounded_norm_recompute;
    table.residual_norm_backward = rounded_norm_backward;
    table.linear = rounded_linear;
    table.linear_backward = rounded_linear_backward;
    table.qkv_mix = rounded_qkv_mix;
    table.qkv_mix_backward = rounded_qkv_mix_backward;
    table.attention = rounded_attention;
    table.attention_backward = rounded_attention_backward;
    table.collapse = rounded_collapse;
    table.collapse_backward = rounded_collapse_backward;
    table.mlp_act = rounded_act;
    table.mlp_act_backward = rounded_act_backward;
    table.classifier = rounded_classifier;
    return &table;
}

#endif
