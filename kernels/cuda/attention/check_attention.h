/* The check of cuDNN's attention at the start; attention.cu calls it for each shape that cuDNN computes. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_CHECK_ATTENTION_H
#define IHA_KERNELS_CUDA_ATTENTION_CHECK_ATTENTION_H

#include "kernels/cuda/cuda.h"

/* Run attention and attention_backward of this planned shape, and compare them with the built-in kernels.
 * op_workspace: what they need of the workspace; the operands follow it. packed: q, k, v and their gradients
 * are slices of [B,S,3,H,d]. Adds to *used the bytes of the workspace that it wrote. -1 and an EXIT_RUN error
 * where a result is wrong. What does not fit into the workspace is not checked. */
int check_attention(struct device *, const struct attention_spec *, size_t op_workspace, bool packed,
                    size_t *used, struct error *);

#endif
