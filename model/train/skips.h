/* The error that ends a run after too many skipped steps in a row. */
#ifndef IHA_MODEL_TRAIN_SKIPS_H
#define IHA_MODEL_TRAIN_SKIPS_H

#include "model/model.h"

/* Fill *e (EXIT_RUN) with the skipped steps, up to the one of *state, and the parameter with the worst gradient.
 * Returns -1. Collective (model_worst_gradient). */
int skips_fail(struct model *m, const struct step_state *state, double skip_zscore, struct error *e);

#endif
