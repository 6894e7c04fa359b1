/* The built-in attention, for every mask and every supported device; attention.cu calls it. The bf16 kernels
 * are in attention_bf16.cu and attention_bf16_backward.cu; fp32 goes to attention_fp32.cu. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BF16_H
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BF16_H

#include "kernels/cuda/cuda.h"

/* The largest head_dim there are kernels for. */
enum { ATTENTION_MAX_DIM = 256 };

/* As attention and attention_backward in kernels/ops.def, for scale > 0. Bit-identical from run to run. */
int attention_builtin_plan(struct device *, const struct attention_spec *, struct op_cost *, struct error *);
void attention_builtin(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                       tensor segments, tensor o, void *saved);
void attention_builtin_backward(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                                tensor segments, tensor o, tensor d_o, const void *saved, tensor dq,
                                tensor dk, tensor dv);

#endif
