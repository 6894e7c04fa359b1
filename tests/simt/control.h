/* How a test, in C, steers the harness; see simt.h. */
#ifndef IHA_SIMT_CONTROL_H
#define IHA_SIMT_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The GPU that programs find. */
struct simt_gpu {
    int count; /* 0: as without a driver */
    int sms;
    size_t memory;
};
extern struct simt_gpu simt_gpu;

/* The order of threads and blocks from here on: 0 ascending, 1 descending, others at random. */
void simt_seed(uint64_t seed);

/* Allocations not yet freed, on the device and of pinned host memory. */
int simt_allocations(void);

/* Kernels launched so far. */
int64_t simt_launches(void);

/* Linked with the real runtime instead of the harness (tests/gpu/)? Then the above neither steers nor counts. */
bool simt_on_gpu(void);

#ifdef __cplusplus
}
#endif
#endif
