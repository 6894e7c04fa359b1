/* TEST_SAMPLE=N in the environment: tests of many cases take every Nth of them, as on an emulated processor, where all
 * would take hours. */
#ifndef IHA_TESTS_LIB_SAMPLE_H
#define IHA_TESTS_LIB_SAMPLE_H

#include <stdbool.h>
#include <stdlib.h>

static inline int sample_every(void) {
    const char *n = getenv("TEST_SAMPLE");
    return n && atoi(n) > 1 ? atoi(n) : 1;
}

/* To be asked once for each case. */
static inline bool in_sample(void) {
    static int cases;
    return cases++ % sample_every() == 0;
}

#endif
