/* How a run starts: from its newest checkpoint, from another run's (train.init_from), or from random weights. */
#ifndef IHA_MODEL_TRAIN_RESUME_H
#define IHA_MODEL_TRAIN_RESUME_H

#include "kernels/comm.h"
#include "model/checkpoint/checkpoint.h"

/* Replace system.precision = auto by what the newest checkpoint of run.dir records, or for a new run by what is the
 * fastest on all ranks: bf16 if `fastest` is on each of them. cuda: runs from before precisions were recorded used bf16
 * on GPUs and fp32 on CPUs. Collective. */
int resolve_precision(struct comm *comm, struct config *c, bool cuda, enum precision fastest,
                      struct error *e);

/* Set *m, and *p, whose data fingerprints are set already. Collective over the model's comm. */
int resume_or_initialize(struct model *m, const struct config *c, struct trainer_state *p, struct error *e);

#endif
