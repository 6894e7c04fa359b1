/* What tests/cuda/samples.cu can run. */
#ifndef IHA_TESTS_CUDA_SAMPLES_H
#define IHA_TESTS_CUDA_SAMPLES_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SAMPLE_WARP_RESULTS = 10 };

void sample_reverse(float *out /* [256] */, int barrier);
void sample_rotate(float *out /* [64] */, int second_barrier);
void sample_uninitialised(float *out /* [32] */);
/* Wrong bytes of a large new block, which is NaN, and of one whose middle a memset cleared. */
int64_t sample_large_block(void);
void sample_write_at(int at /* of 10 */);
void sample_read_at(int at /* of 10 */);
void sample_early(int waiting /* threads of 64 */);
void sample_write_shared(int at /* of 16 */);
/* 0: a thread returns before a barrier; 1: it meets another barrier; 2: it misses a warp operation; 3: the
 * mask names lanes that the block does not have. */
void sample_divergent(int kind);
void sample_host_access(void);
void sample_warps(float *out /* [SAMPLE_WARP_RESULTS, 32] */);
void sample_atomics(float *out /* [4] */);
void sample_matmul(const float *a, const float *b, float *d, int wait);

#ifdef __cplusplus
}
#endif
#endif
