/* Monotonic time, for speeds and deadlines: unlike the wall clock it never jumps. */
#ifndef IHA_KERNELS_CLOCK_H
#define IHA_KERNELS_CLOCK_H

#include <time.h>

/* Seconds since an arbitrary start. */
static inline double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
