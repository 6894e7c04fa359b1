/* The plain computation in bf16: the CPU backend, with every activation that an operation writes rounded to
 * bf16. Its error is the measure for the CUDA backend's error in bf16. Gradients of parameters, statistics
 * and the step state stay in fp32, as in the CUDA backend. */
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

/* Rounds every element of a view of floats; an absent one is left alone. */
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

static inline void round_views(const tensor *views, int count) {
    for (int i = 0; i < count; i++)
        round_view(views[i]);
}

/* What each operation of kernels/ops.def writes in bf16. */
#define NOTHING tensor_none()
#define BF16_embed x
#define BF16_embed_backward NOTHING
#define BF16_residual_norm delta.data ? sum : NOTHING, y
#define BF16_residual_norm_recompute y
#define BF16_residual_norm_backward dx
#define BF16_linear y
#define BF16_linear_backward dx
#define BF16_qk_norm y
#define BF16_qk_norm_backward dx
#define BF16_qkv_mix q, k, v
#define BF16_qkv_mix_backward dqkv
#define BF16_attention o
#define BF16_attention_backward dq, dk, dv
#define BF16_collapse out
#define BF16_collapse_backward d_o
#define BF16_fold folded
#define BF16_fold_backward NOTHING
#define BF16_diff_combine out
#define BF16_diff_combine_backward d_o
#define BF16_talking o
#define BF16_talking_backward dq, dk, dv
#define BF16_simplicial o
#define BF16_simplicial_backward dq, dk, dv, dk2, dv2
#define BF16_add x
#define BF16_mlp_act out
#define BF16_mlp_act_backward du, dgate
#define BF16_linear_act u, act
#define BF16_act_linear_backward du
#define BF16_classifier dh
#define BF16_sumsq NOTHING
#define BF16_adamw NOTHING
#define BF16_muon_momentum NOTHING
#define BF16_orthogonalize NOTHING
#define BF16_muon_update NOTHING

#define OP(name, parameters, arguments)                                                                      \
    static void rounded_##name parameters {                                                                  \
        kernels_cpu()->name arguments;                                                                       \
        const tensor written[] = {BF16_##name};                                                              \
        round_views(written, sizeof written / sizeof *written);                                              \
    }
#define OP_AUX(name, parameters)
#include "kernels/ops.def"

static inline const struct kernels *kernels_cpu_rounded(void) {
    static struct kernels table;
    table = *kernels_cpu();
    table.name = "cpu, rounded to bf16";
#define OP(name, parameters, arguments) table.name = rounded_##name;
#define OP_AUX(name, parameters)
#include "kernels/ops.def"
    return &table;
}

#endif
