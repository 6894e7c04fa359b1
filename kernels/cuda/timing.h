/* Which of several ways to compute the same is the fastest on this GPU. */
#ifndef IHA_KERNELS_CUDA_TIMING_H
#define IHA_KERNELS_CUDA_TIMING_H

#include <functional>

#include "kernels/cuda/cuda.h"

/* The index of the fastest of `count` ways, or -1 if none can run. run(i) queues way i once on dev->stream;
 * false: it cannot run. Takes about 10 ms per way, and before that 100 ms if the GPU was idle. */
int time_fastest(struct device *dev, int count, const std::function<bool(int)> &run);

#endif
