/* The workspace of cuDNN's deterministic attention. Here, not in kernels/cuda/, because the estimate
 * (kernels/estimate/) counts it too. */
#ifndef IHA_KERNELS_CUDNN_SCRATCH_H
#define IHA_KERNELS_CUDNN_SCRATCH_H

#include "kernels/kernels.h"

/* Its backward needs 2 B H S^2 bytes, with S rounded up to its tiles (cuDNN 9.19). Beyond this limit the
 * built-in attention is used, which is deterministic without extra memory. */
#define CUDNN_DETERMINISTIC_LIMIT ((size_t)256 << 20)

static inline size_t cudnn_deterministic_bytes(const struct attention_spec *s) {
    int64_t length = (s->length + 63) / 64 * 64;
    return (size_t)(2 * s->batch * s->heads) * (size_t)(length * length);
}

#endif
