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

/* Seconds left until a deadline; not positive: it has passed. */
static inline double clock_seconds_left(double deadline) {
    return deadline - clock_seconds();
}

static inline void clock_sleep(double seconds) {
    struct timespec t;
    t.tv_sec = (time_t)seconds;
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

#endif
