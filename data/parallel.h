/* Work on many files at once: a thread that waits for a disk or a file server leaves the processor to others. */
#ifndef IHA_DATA_PARALLEL_H
#define IHA_DATA_PARALLEL_H

#include <stdint.h>

#include "kernels/error.h"

/* Fails by filling *e and returning -1. */
typedef int parallel_work(void *context, int64_t i, struct error *e);

/* Call work(context, i, e) for each i in [0, count), in this order of starting, on up to `threads` threads, this one
 * included. After a failure no further calls start. Returns -1, or the lowest i that failed, with its error in *e. */
int64_t parallel_for(int threads, int64_t count, parallel_work *work, void *context, struct error *e);

#endif
