/* The lines on stderr with which a run starts. */
#ifndef IHA_MODEL_TRAIN_BANNER_H
#define IHA_MODEL_TRAIN_BANNER_H

#include "model/model.h"

/* Ranks, device, model and data (so many tokens in so many files), what deterministic mode takes, and settings
 * without effect. For rank 0. async_saving: checkpoints are written while training goes on. */
void banner_print(const struct config *c, const struct model *m, int64_t data_tokens, int data_files,
                  bool async_saving);

/* Settings that have no effect in a run of `ranks` ranks. */
void banner_print_ignored(const struct config *c, int ranks);

#endif
