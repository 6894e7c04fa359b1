/* Kernels of the GPU communicators: sums over ranks in rank order, and rounding to bf16. Callable from C, for
 * the tests. */
#ifndef IHA_KERNELS_CUDA_COMM_COMM_SUMS_H
#define IHA_KERNELS_CUDA_COMM_COMM_SUMS_H

#include <cuda_runtime_api.h>

#include "kernels/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] (+)= the sum over r < ranks, in this order, of own[i] where r is `rank`, others[r n + i] elsewhere.
 * own, out F32 [n], and may be the same; others F32 or BF16 [ranks n]. Bytes: n (8 + (ranks - 1) sizes of
 * others), and 4 n to accumulate. */
void comm_add_in_rank_order(cudaStream_t stream, const float *own, const void *others, enum dtype dtype,
                            int rank, int ranks, int64_t n, float *out, bool accumulate);
/* out[i] += x[i], F32 [n]. Bytes: 12 n. */
void comm_add_to(cudaStream_t stream, const float *x, int64_t n, float *out);
/* to[i] = from[i] to the nearest bf16; from F32 [n], to BF16 [n]. Bytes: 6 n. */
void comm_round_to_bf16(cudaStream_t stream, const float *from, int64_t n, void *to);
/* values[i] = the sum over r < ranks, in order, of all[r count + i]; count at most 1024. */
void comm_sum_doubles(cudaStream_t stream, const double *all, int ranks, int count, double *values);

#ifdef __cplusplus
}
#endif
#endif
