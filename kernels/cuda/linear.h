/* The matrix products of a linear layer that linear.cu and linear_act.cu share. */
#ifndef IHA_KERNELS_CUDA_LINEAR_H
#define IHA_KERNELS_CUDA_LINEAR_H

#include "kernels/cuda/cuda.h"

/* y [N,out] = x W^T (+ bias) */
static inline struct matmul linear_product(const struct linear_spec *s, enum dtype t, int64_t ldx,
                                           int64_t ldw, int64_t ldy, bool bias) {
    return (struct matmul){false, true, s->rows, s->out, s->in, ldx, ldw, ldy, t, t, bias};
}

/* dx [N,in] = dy W */
static inline struct matmul linear_dx_product(const struct linear_spec *s, enum dtype t, int64_t ldy,
                                              int64_t ldw, int64_t ldx) {
    return (struct matmul){false, false, s->rows, s->in, s->out, ldy, ldw, ldx, t, t, false};
}

#endif
