/* Where a run starts: at its newest checkpoint, at another run's (train.init_from), or at random numbers. */
#ifndef IHA_MODEL_TRAIN_RESUME_H
#define IHA_MODEL_TRAIN_RESUME_H

#include "model/checkpoint/checkpoint.h"

/* Numbers for *m, and how far the run has come for *p, whose fingerprints are those of the data at hand. All
 * ranks of the model's comm call it, and find the same. */
int resume_or_initialize(struct model *m, const struct config *c, struct trainer_state *p, struct error *e);

#endif
