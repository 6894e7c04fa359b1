/* Workspace of cuDNN's deterministic attention backward, for the CUDA backend and for the estimate. */
#ifndef IHA_KERNELS_CUDNN_SCRATCH_H
#define IHA_KERNELS_CUDNN_SCRATCH_H

#include "kernels/kernels.h"

/* It needs 2 B H S^2 bytes, S rounded up to its tiles (cuDNN 9.19). Above this limit our own attention
 * kernels are used, which are deterministic without extra memory. */
#define CUDNN_DETERMINISTIC_LIMIT ((size_t)256 << 20)

static inline size_t cudnn_deterministic_bytes(const struct attention_spec *s) {
    int64_t length = (s->length + 63) / 64 * 64;
    return (size_t)(2 * s->batch * s->heads) * (size_t)(length * length);
}

#endif
