/* A thread that reads the next steps' data while the current one is trained on, so that a disk that is slow at times but
 * fast enough on average delays no step. */
#ifndef IHA_DATA_READ_AHEAD_H
#define IHA_DATA_READ_AHEAD_H

#include <stdint.h>

#include "kernels/error.h"

struct read_ahead;

/* Read one step into a slot. Called in the thread, for one step after the other and the slots in turn. */
typedef int read_step_function(void *context, int slot, struct error *e);

/* Start to read `steps` steps, at most `slots` - 1 ahead of the step that is in use. EXIT_RUN: no memory, or no
 * thread. */
struct read_ahead *read_ahead_start(int slots, int64_t steps, read_step_function *read, void *context,
                                    struct error *e);

/* Wait until the thread has returned from its current read, and end it. */
void read_ahead_stop(struct read_ahead *r);

/* The slot of the next step, which stays as it is until the next call; or -1 and the error of its read, after which no
 * further step is read. */
int read_ahead_next(struct read_ahead *r, struct error *e);

#endif
