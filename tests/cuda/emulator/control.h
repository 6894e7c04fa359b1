/* How a test, in C, steers the harness; see emulator.h. */
#ifndef IHA_TESTS_CUDA_EMULATOR_CONTROL_H
#define IHA_TESTS_CUDA_EMULATOR_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The GPU that programs find. */
struct emulator_gpu {
    int count; /* 0: as without a driver */
    int sms;
    size_t memory;
};
extern struct emulator_gpu emulator_gpu;

/* The order of threads and blocks from here on: 0 ascending, 1 descending, others at random. */
void emulator_seed(uint64_t seed);

/* From here on a thread of its own, the GPU, runs what is queued while the host goes on: whatever is ready,
 * in random order, now and then after a pause of up to `delay_us` microseconds (0: never). There is no way
 * back. Device memory is then not protected from the host. To be called before anything is queued. */
void emulator_background(int delay_us);

/* Allocations not yet freed, on the device and of pinned host memory. */
int emulator_allocations(void);

/* Kernels launched so far, and graphs. */
int64_t emulator_launches(void);
int64_t emulator_graph_launches(void);

/* The launch of this number (from 0) never ends, and what comes after it on its stream never begins; -1: none
 * does. */
void emulator_stick(int64_t launch);

/* A host that queues more than so much work waits, as one does whose GPU's queue is full. In the background
 * mode; 0: no limit. */
void emulator_limit_queue(int64_t works);

/* What refuses to work with graphs: "begin" and "end" of a capture, "instantiate"; NULL: nothing. */
void emulator_refuse_graphs(const char *what);

/* Linked with the real runtime instead of the harness (tests/gpu/)? Then the above neither steers nor counts.
 */
bool emulator_on_gpu(void);

#ifdef __cplusplus
}
#endif
#endif
