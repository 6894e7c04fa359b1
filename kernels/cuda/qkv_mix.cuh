/* What the two directions of qkv_mix share. */
#ifndef IHA_KERNELS_CUDA_QKV_MIX_CUH
#define IHA_KERNELS_CUDA_QKV_MIX_CUH

#include "kernels/cuda/head_mix_plain.cuh"

/* N = B T. */
static inline int64_t qkv_mix_tokens(const struct qkv_mix_spec *s) {
    return s->batch * s->tokens;
}

/* Check the shapes of one direction's tensors; return the rows of the table to rotate by. */
struct rope_rows check_qkv_mix(const struct device *, const char *op, const struct qkv_mix_spec *, tensor qkv,
                               tensor q, tensor k, tensor v, tensor alpha_q, tensor alpha_k, tensor alpha_v,
                               tensor table, tensor positions, int64_t first);

/* Bytes of workspace of qkv_mix_backward. */
size_t qkv_mix_backward_workspace(const struct device *, const struct qkv_mix_spec *);

#endif
