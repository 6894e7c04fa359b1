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

/* From here on a thread of its own, the GPU, runs what is queued while the host goes on: whatever is ready,
 * in random order, now and then after a pause of up to `delay_us` microseconds (0: never). There is no way
 * back. Device memory is then not protected from the host. To be called before anything is queued. */
void simt_background(int delay_us);

/* Allocations not yet freed, on the device and of pinned host memory. */
int simt_allocations(void);

/* Kernels launched so far, and graphs. */
int64_t simt_launches(void);
int64_t simt_graph_launches(void);

/* The launch of this number (from 0) never ends, and what comes after it on its stream never begins; -1: none
 * does. */
void simt_stick(int64_t launch);

/* A host that queues more than so much work waits, as one does whose GPU's queue is full. In the background
 * mode; 0: no limit. */
void simt_limit_queue(int64_t works);

/* What refuses to work with graphs: "begin" and "end" of a capture, "instantiate"; NULL: nothing. */
void simt_refuse_graphs(const char *what);

/* Linked with the real runtime instead of the harness (tests/gpu/)? Then the above neither steers nor counts.
 */
bool simt_on_gpu(void);

#ifdef __cplusplus
}
#endif
#endif
