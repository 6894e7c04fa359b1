/* How many heads the CUDA kernels of talking heads take, a warp each: what the backend and the estimate of it refuse. */
#ifndef IHA_KERNELS_TALKING_LIMIT_H
#define IHA_KERNELS_TALKING_LIMIT_H

enum { TALKING_MAX_HEADS = 32 };

#define TALKING_TOO_MANY_HEADS                                                                               \
    "model.num_attention_heads = %lld: talking layers on a GPU have at most %d; use system.device = cpu"

#endif
