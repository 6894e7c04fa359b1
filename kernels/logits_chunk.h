/* How many rows of logits the CUDA backend computes at once. Here, not in kernels/cuda/, because the estimate
 * (kernels/estimate/) counts chunks too. */
#ifndef IHA_KERNELS_LOGITS_CHUNK_H
#define IHA_KERNELS_LOGITS_CHUNK_H

#include <stdint.h>

/* A chunk's logits may take 1/64 of the GPU's memory. Every chunk reads and writes dW once more, in fp32, so chunks should
 * be long: of the time that an H200 needs for a chunk's three products this takes 245 / rows, 12 % at 2048 rows. The
 * 2.4B model's 8192 rows are one chunk, which writes dW once and reads nothing. The limit does not depend on the memory
 * that is free: other chunks would give other bits, in a resumed run too. */
#define LOGITS_MEMORY_SHARE 64

/* Chunks are of about equal size, in steps of 128 rows, so that the last one is not much smaller. row_bytes: of a row of
 * logits; memory: of the GPU, in bytes. */
static inline int64_t logits_chunk_rows(int64_t rows, int64_t row_bytes, int64_t memory) {
    int64_t most = memory / LOGITS_MEMORY_SHARE / row_bytes;
    most = most < 128 ? 128 : most;
    int64_t chunks = (rows + most - 1) / most, equal = (rows + chunks - 1) / chunks;
    int64_t chunk = (equal + 127) / 128 * 128;
    return chunk < rows ? chunk : rows;
}

#endif
