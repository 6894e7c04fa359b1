/* The check of cuDNN's attention at the start; attention.cu calls it for each shape that cuDNN computes. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_CHECK_ATTENTION_H
#define IHA_KERNELS_CUDA_ATTENTION_CHECK_ATTENTION_H

#include "kernels/cuda/cuda.h"

/* Bytes of q, k and v of this shape in bf16, or of their gradients. */
size_t attention_qkv_bytes(const struct attention_spec *);
/* The three in so many bytes, as the model has them: slices of packed rows, or tensors one after another. */
void attention_place_qkv(const struct attention_spec *, char *data, tensor *q, tensor *k, tensor *v);

/* Run attention and attention_backward of this planned shape, and compare them with the built-in kernels.
 * op_workspace: what they need of the workspace; the operands follow it. Adds to *used the bytes of the workspace that it wrote. -1 and an EXIT_RUN error
 * where a result is wrong. What does not fit into the workspace is not checked. */
int check_attention(struct device *, const struct attention_spec *, size_t op_workspace, size_t *used,
                    struct error *);

#endif
