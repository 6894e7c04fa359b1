/* How the GPU's benchmark measures: by events on the device's queue. */
#ifndef IHA_TESTS_BENCH_BENCH_GPU_MEASURE_H
#define IHA_TESTS_BENCH_BENCH_GPU_MEASURE_H

#include <math.h>

#include "tests/bench/bench_measure.h"
#include "tests/bench/timing.h"

/* Medians over b->repeats samples of at least 20 ms each. */
static inline struct summary time_work(struct bench *b, void (*work)(void *), void *context) {
    static struct samples s;
    const double lasting = 0.02;
    work(context); /* chooses algorithms, builds plans, warms up */
    timing_start(b->dev);
    work(context);
    double once = timing_stop(b->dev);
    int calls = once < lasting ? (int)fmin(lasting / fmax(once, 1e-6), 2000) + 1 : 1;
    s.count = 0;
    for (int i = 0; i < b->repeats; i++) {
        timing_start(b->dev);
        for (int j = 0; j < calls; j++)
            work(context);
        samples_add(&s, timing_stop(b->dev) / calls);
    }
    return samples_summary(&s, 0);
}

#endif
