/* The backend's own attention, which serves every shape, mask and device; attention.cu calls it. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BF16_H
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BF16_H

#include "kernels/cuda/cuda.h"

/* The widest head there are kernels for. */
enum { ATTENTION_MAX_DIM = 256 };

/* As attention and attention_backward in kernels/ops.def, for scale > 0. Two runs give the same bits. */
int own_attention_plan(struct device *, const struct attention_spec *, struct op_cost *, struct error *);
void own_attention(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v, tensor o,
                   void *saved);
void own_attention_backward(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                            tensor o, tensor d_o, const void *saved, tensor dq, tensor dk, tensor dv);

#endif
