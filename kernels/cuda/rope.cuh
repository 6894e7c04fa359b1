/* Rotary position embedding: the rows of the table that tokens are rotated by, and rotation without mixing
 * (rope.cu). Rotation of mixed heads is part of the kernels of qkv_mix (head_mix.cuh, head_mix_plain.cuh). */
#ifndef IHA_KERNELS_CUDA_ROPE_CUH
#define IHA_KERNELS_CUDA_ROPE_CUH

#include "kernels/cuda/cuda.cuh"

/* The rows of the table that the tokens n = b T + t are rotated by: those of positions[n], or of first + t. */
struct rope_rows {
    const float *table; /* NULL: nothing is rotated */
    int tokens;
    int64_t first;
    bool by_pseudo;           /* a row for each pseudo-head */
    const int32_t *positions; /* [B,T], or NULL */
};

/* The row of a token's pseudo-head 0, and the distance to the next pseudo-head's. */
static __device__ __forceinline__ const float *rope_token(const struct rope_rows &rope, int n, int pseudo,
                                                          int d) {
    int64_t position = rope.positions ? rope.positions[n] : rope.first + n % rope.tokens;
    return rope.table + position * (rope.by_pseudo ? pseudo : 1) * d;
}

static __device__ __forceinline__ int rope_step(const struct rope_rows &rope, int d) {
    return rope.by_pseudo ? d : 0;
}

/* out = rotate(qkv), or with `back` qkv = rotate back(out), for q and k; v is copied. qkv [N,H+2G,d], out
 * [N,H,d], [N,G,d]: P = 1 without alphas. out may be the heads of qkv, and v is then left alone. */
void rope_rotate(struct device *, const struct qkv_mix_spec *, struct rope_rows, tensor qkv, tensor q,
                 tensor k, tensor v, bool back);

#endif
