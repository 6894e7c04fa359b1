/* Checks that all ranks run the same training. The calls are collective, fail on all ranks or on none, and the error
 * names the rank that differs. */
#ifndef IHA_MODEL_TRAIN_RANK_CHECKS_H
#define IHA_MODEL_TRAIN_RANK_CHECKS_H

#include "kernels/comm.h"
#include "model/config/config.h"

/* The same configuration. That the data is the same is checked as it is opened. */
int ranks_check_same_config(struct comm *comm, const struct config *config, struct error *e);

/* The same kind of device: with system.device = auto some hosts may have a GPU and others not. */
int ranks_check_same_device(struct comm *comm, bool cuda, struct error *e);

/* The same writable run.dir: every rank must find there the lock that rank 0 holds. Otherwise the first checkpoint
 * would fail. */
int ranks_check_run_dir(struct comm *comm, const char *run_dir, struct error *e);

/* checkpoint_find on rank 0, for all ranks: in the directory of a run that goes on, ranks could find different
 * checkpoints. */
int ranks_find_checkpoint(struct comm *comm, const char *path, char dir[MAX_TEXT], struct error *e);

#endif
