/* How a run starts: from its newest checkpoint, from another run's (train.init_from), or from random weights. */
#ifndef IHA_MODEL_TRAIN_RESUME_H
#define IHA_MODEL_TRAIN_RESUME_H

#include "model/checkpoint/checkpoint.h"

/* Set *m, and *p, whose data fingerprints are set already. Collective over the model's comm. */
int resume_or_initialize(struct model *m, const struct config *c, struct trainer_state *p, struct error *e);

#endif
