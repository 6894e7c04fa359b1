/* The system's limits on stacks, threads and memory (ulimit -s, -u, -v), and what to say where one is too low. */
#ifndef IHA_KERNELS_LIMITS_H
#define IHA_KERNELS_LIMITS_H

#include <stddef.h>

#include "kernels/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Stack frames of this program take up to 33 KiB; the rest is for libraries. */
enum { MIN_STACK_BYTES = 256 << 10 };

/* Is the stack of the first thread too small for this program (ulimit -s)? Itself it needs little of it. */
int limits_check_stack(struct error *e);

/* Check that `bytes` more of address space can be had, for a library that does not check its allocations. */
int limits_check_address_space(size_t bytes, const char *library, struct error *e);

/* " (ulimit -v allows N KiB)", or an empty text where that is not limited: for the error of an allocation. */
const char *limits_memory_note(char out[64]);

/* Fail because pthread_create returned `status`; `what`: what was to be started. Names the limit that is the
 * likely cause: EXIT_USER if it is the user's (ulimit -s or -v), otherwise EXIT_RUN. */
int limits_fail_thread(struct error *e, const char *what, int status);

#ifdef __cplusplus
}
#endif
#endif
