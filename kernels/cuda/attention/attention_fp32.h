/* The fp32 kernels of the built-in attention; see attention_bf16.h. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_FP32_H
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_FP32_H

#include "kernels/cuda/cuda.h"

/* lse, delta [B,H,S]: log-sum-exp in base 2, and <dO, O>. */
void attention_fp32(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                    tensor segments, tensor o, float *lse);
void attention_fp32_backward(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                             tensor segments, tensor d_o, const float *lse, const float *delta, tensor dq,
                             tensor dk, tensor dv);

#endif
