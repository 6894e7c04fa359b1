/* What is only known before the constructors of shared libraries have run, which is before main. */
#ifndef IHA_KERNELS_AT_START_H
#define IHA_KERNELS_AT_START_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Was this signal ignored when the program was started? UCX, which some builds of Open MPI link, gives SIGHUP a handler
 * when it is loaded. */
bool at_start_ignored(int number);

/* Ignore again those signals that end a run and were ignored at start, except SIGALRM. Call it after the start of a
 * library that may have given them a handler. */
void at_start_keep_ignored(void);

#ifdef __cplusplus
}
#endif
#endif
