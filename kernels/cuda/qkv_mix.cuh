/* What the two directions of qkv_mix share. */
#ifndef IHA_KERNELS_CUDA_QKV_MIX_CUH
#define IHA_KERNELS_CUDA_QKV_MIX_CUH

#include "kernels/cuda/head_mix_plain.cuh"

/* N = B T. */
static inline int64_t qkv_mix_tokens(const struct qkv_mix_spec *s) {
    return s->batch * s->tokens;
}

/* q, k and v are mixed by one launch where they have equally many heads; otherwise q by one, k and v by another. */
struct mix_part {
    int first, tensors; /* of q, k, v */
    int rotated;        /* of these, the first ones are */
    int64_t heads;      /* of each */
    int64_t offset;     /* of the first in a row of qkv */
};

static inline int mix_parts(const struct qkv_mix_spec *s, struct mix_part parts[2]) {
    int64_t H = s->heads, G = mix_kv_heads(s);
    parts[0] = {0, H == G ? 3 : 1, H == G ? 2 : 1, H, 0};
    parts[1] = {1, 2, 1, G, H * s->head_dim};
    return H == G ? 1 : 2;
}

/* Check the shapes of one direction's tensors; return the rows of the table to rotate by. */
struct rope_rows check_qkv_mix(const struct device *, const char *op, const struct qkv_mix_spec *, tensor qkv,
                               tensor q, tensor k, tensor v, tensor alpha_q, tensor alpha_k, tensor alpha_v,
                               tensor table, tensor positions, int64_t first);

/* Bytes of workspace of qkv_mix_backward. */
size_t qkv_mix_backward_workspace(const struct device *, const struct qkv_mix_spec *);

#endif
