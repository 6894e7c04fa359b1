/* What the benchmark needs of the CUDA runtime, for C. */
#ifndef IHA_TESTS_BENCH_TIMING_H
#define IHA_TESTS_BENCH_TIMING_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Seconds on the device's queue between the two calls, by CUDA events; stop waits for the queue. */
void timing_start(struct device *dev);
double timing_stop(struct device *dev);

/* The device's queue, a cudaStream_t. */
void *timing_queue(struct device *dev);

/* Queue a copy within device memory. */
void timing_copy(struct device *dev, void *to, const void *from, size_t bytes);

/* Kernels, copies and fills that the GPU works on from here to the next call (CUPTI's activity records). */
struct activity {
    int64_t count;   /* of them */
    double busy;     /* seconds in which at least one ran */
    double duration; /* from the first's start to the last's end */
};
bool activity_available(void);
void activity_start(void);
struct activity activity_stop(struct device *dev);

#ifdef __cplusplus
}
#endif
#endif
