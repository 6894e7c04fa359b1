/* The lines with which a run starts and ends, on stderr. For rank 0. */
#ifndef IHA_MODEL_TRAIN_BANNER_H
#define IHA_MODEL_TRAIN_BANNER_H

#include "model/checkpoint/trainer_state.h"
#include "model/model.h"

/* Ranks, device, model and data (so many tokens in so many files), what deterministic mode takes, and settings
 * without effect. async_saving: checkpoints are written while training goes on. */
void banner_print(const struct config *c, const struct model *m, int64_t data_tokens, int data_files,
                  bool async_saving);

/* Settings that have no effect in a run of `ranks` ranks. */
void banner_print_ignored(const struct config *c, int ranks);

/* How the run ended. stop: the signal that stopped it, or 0. */
void banner_print_end(const struct config *c, const struct trainer_state *trainer, int stop);

/* On stdout, where a run without steps left is started again: it is finished, and what to raise to continue. */
void banner_print_finished(const struct config *c, const struct trainer_state *trainer);

#endif
