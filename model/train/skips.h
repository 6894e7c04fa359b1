/* Why a run gives up when too many steps in a row were skipped. */
#ifndef IHA_MODEL_TRAIN_SKIPS_H
#define IHA_MODEL_TRAIN_SKIPS_H

#include "model/model.h"

/* Say which steps they were, up to the one that *state is of, and whose gradient it was: always -1, EXIT_RUN.
 * All ranks look for it together (model_worst_gradient). */
int skips_fail(struct model *m, const struct step_state *state, double skip_zscore, struct error *e);

#endif
