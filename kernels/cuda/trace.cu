/* Named ranges on the device's queue: as NVTX ranges for NVIDIA's profilers, and timed by events while a
 * trace (kernels/trace.h) is recorded. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

#if !defined CUDA_EMULATOR && defined __has_include
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <cuda_profiler_api.h>
#include <nvtx3/nvToolsExt.h>
#define WITH_NVTX
#endif
#endif

static void nvtx_push(const char *name, int index) {
#ifdef WITH_NVTX
    char text[64];
    if (index >= 0)
        snprintf(text, sizeof text, "%s %d", name, index);
    nvtxRangePushA(index >= 0 ? text : name);
#else
    (void)name, (void)index;
#endif
}

static void nvtx_pop() {
#ifdef WITH_NVTX
    nvtxRangePop();
#endif
}

/* Start or stop a profiler that is configured to record between these calls only (nsys -c cudaProfilerApi). */
static void set_profiler(bool on) {
#ifdef WITH_NVTX
    cuda_check(on ? cudaProfilerStart() : cudaProfilerStop());
#else
    (void)on;
#endif
}

static void record_mark(struct device *dev, struct traced_range *r, int which) {
    cudaEvent_t event;
    if (!r)
        return;
    cuda_check(cudaEventCreate(&event));
    cuda_check(cudaEventRecord(event, dev->stream));
    r->marks[which] = event;
}

void cuda_range_begin(struct device *dev, const char *name, int index) {
    nvtx_push(name, index);
    if (dev->trace)
        record_mark(dev, trace_enter(dev->trace, name, index), 0);
}

void cuda_range_end(struct device *dev) {
    if (dev->trace)
        record_mark(dev, trace_leave(dev->trace), 1);
    nvtx_pop();
}

void cuda_trace_begin(struct device *dev) {
    cuda_await_queue(dev);
    dev->trace = trace_create();
    set_profiler(true);
}

struct trace *cuda_trace_end(struct device *dev) {
    struct trace *t = dev->trace;
    cuda_await_queue(dev);
    set_profiler(false);
    dev->trace = NULL;
    for (int i = 0; t && i < t->count; i++) {
        float ms[2];
        for (int which = 0; which < 2; which++)
            cuda_check(cudaEventElapsedTime(&ms[which], (cudaEvent_t)t->list[0].marks[0],
                                            (cudaEvent_t)t->list[i].marks[which]));
        t->list[i].begin = 1e-3 * (double)ms[0];
        t->list[i].end = 1e-3 * (double)ms[1];
    }
    for (int i = 0; t && i < t->count; i++)
        for (void *event : t->list[i].marks)
            cuda_check(cudaEventDestroy((cudaEvent_t)event));
    return t;
}
