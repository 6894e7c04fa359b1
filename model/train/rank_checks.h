/* What ranks must agree on before they train together. Each call is made by all ranks, fails on all or on
 * none, and names the rank that differs. */
#ifndef IHA_MODEL_TRAIN_RANK_CHECKS_H
#define IHA_MODEL_TRAIN_RANK_CHECKS_H

#include "kernels/comm.h"
#include "model/checkpoint/trainer_state.h"
#include "model/config/config.h"

/* The same configuration, and the same data by the fingerprints in *trainer: ranks that were started with
 * different files would train nobody's model. */
int ranks_check_alike(struct comm *comm, const struct config *config, const struct trainer_state *trainer,
                      struct error *e);

/* A run.dir that only some hosts see would cost the first checkpoint: all must find the lock there that rank
 * 0 holds by now, and be able to write. */
int ranks_check_run_dir(struct comm *comm, const char *run_dir, struct error *e);

/* The checkpoint that `path` names (checkpoint_find), as rank 0 finds it: where it is a run that goes on,
 * ranks must not choose each for itself. */
int ranks_find_checkpoint(struct comm *comm, const char *path, char dir[MAX_TEXT], struct error *e);

#endif
