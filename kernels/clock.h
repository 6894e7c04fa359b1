/* Monotonic time, for speeds and deadlines: unlike the wall clock it never jumps. */
#ifndef IHA_KERNELS_CLOCK_H
#define IHA_KERNELS_CLOCK_H

#include <stdio.h>
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

/* "1:05", "2:01:05", or from a day on "1d 02h". */
static inline void clock_format_duration(double seconds, char out[32]) {
    long s = (long)(seconds + 0.5);
    if (s < 3600)
        snprintf(out, 32, "%ld:%02ld", s / 60, s % 60);
    else if (s < 86400)
        snprintf(out, 32, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    else
        snprintf(out, 32, "%ldd %02ldh", s / 86400, s / 3600 % 24);
}

#endif
