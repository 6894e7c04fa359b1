/* Graceful stop on signals: SIGINT, SIGTERM and SIGHUP, and those that schedulers and limits send before a run is out
 * of time: SIGUSR1 and SIGUSR2 (which mpirun forwards), SIGALRM and SIGXCPU. Those that were ignored at start stay
 * ignored. After the first one the run saves and ends; another one, at least a second later, ends the process
 * immediately, unless it is SIGXCPU. */
#ifndef IHA_MODEL_TRAIN_SIGNALS_H
#define IHA_MODEL_TRAIN_SIGNALS_H

#include "kernels/error.h"

/* Block the signals in all threads and start a thread that waits for them. No handler may run on a computing thread:
 * oneDNN's matrix products sometimes point the stack pointer into heap memory, where a signal frame would overwrite
 * data. Call it before any other thread exists. Until signals_enable_graceful_stop, the first signal ends the process
 * immediately. */
int signals_watch(struct error *e);

/* From now on the run polls signals_stop_requested. */
void signals_enable_graceful_stop(void);

/* The signal that requested a stop, or 0. */
int signals_stop_requested(void);

#endif
