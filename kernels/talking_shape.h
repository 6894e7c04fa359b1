/* How the CUDA kernels of talking heads divide their work: for the backend, and for the estimate of it. */
#ifndef IHA_KERNELS_TALKING_SHAPE_H
#define IHA_KERNELS_TALKING_SHAPE_H

#include <stdbool.h>
#include <stdint.h>

/* A block has a warp for each head. */
enum { TALKING_MAX_HEADS = 32 };

#define TALKING_TOO_MANY_HEADS                                                                               \
    "model.num_attention_heads = %lld: talking layers on a GPU have at most %d; use system.device = cpu"

/* Of a tile: a multiple of what a matrix instruction takes. */
static inline int64_t talking_padded_heads(int64_t heads) {
    return (heads + 15) / 16 * 16;
}

/* Columns of head_dim that a block computes: as many as its registers hold. */
static inline int64_t talking_columns(int64_t heads, int64_t head_dim, bool bf16) {
    return bf16 && heads <= 16 && head_dim > 64 ? 128 : 64;
}

#endif
