/* Events and copies on the device's queue. */
#include "tests/bench/timing.h"

#include "kernels/cuda/cuda.h"

static cudaEvent_t begin, end;

void timing_start(struct device *dev) {
    if (!begin) {
        cuda_check(cudaEventCreate(&begin));
        cuda_check(cudaEventCreate(&end));
    }
    cuda_check(cudaEventRecord(begin, dev->stream));
}

double timing_stop(struct device *dev) {
    float milliseconds;
    cuda_check(cudaEventRecord(end, dev->stream));
    cuda_check(cudaEventSynchronize(end));
    cuda_check(cudaEventElapsedTime(&milliseconds, begin, end));
    return 1e-3 * (double)milliseconds;
}

void *timing_queue(struct device *dev) {
    return dev->stream;
}

void timing_copy(struct device *dev, void *to, const void *from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, dev->stream));
}
