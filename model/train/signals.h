/* The signals that ask a run to save and end: SIGINT and SIGTERM, which users send, and SIGUSR1, which
 * schedulers send before a time limit and mpirun passes on. The first asks; another one, a second later or
 * more, ends at once. */
#ifndef IHA_MODEL_TRAIN_SIGNALS_H
#define IHA_MODEL_TRAIN_SIGNALS_H

#include "kernels/error.h"

/* No handler may run on a thread that computes: oneDNN's matrix products keep their stack pointer inside heap
 * memory at times, where a signal's frame would overwrite what lies below. So all threads block these
 * signals, and one that does nothing else waits for them. To be called before any other thread exists. Until
 * signals_enable_graceful_stop the first one ends the process at once. */
int signals_watch(struct error *e);

/* The run will look for them from now on. */
void signals_enable_graceful_stop(void);

/* The signal that has asked, or 0. */
int signals_stop_requested(void);

#endif
