/* What cuDNN's deterministic attention costs: for the backend that runs it, and for the GPU on paper that
 * only counts.
 */
#ifndef IHA_KERNELS_CUDNN_SCRATCH_H
#define IHA_KERNELS_CUDNN_SCRATCH_H

#include "kernels/kernels.h"

/* Its backward wants 2 B H S^2 bytes, S rounded up to its tiles (9.19); beyond this much, our own attention
 * serves, which is deterministic for none. */
#define CUDNN_DETERMINISTIC_LIMIT ((size_t)256 << 20)

static inline size_t cudnn_deterministic_bytes(const struct attention_spec *s) {
    int64_t length = (s->length + 63) / 64 * 64;
    return (size_t)(2 * s->batch * s->heads) * (size_t)(length * length);
}

#endif
