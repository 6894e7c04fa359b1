/* The lines on stderr with which a run starts. */
#ifndef IHA_CLI_BANNER_H
#define IHA_CLI_BANNER_H

#include "cli/run.h"

/* Ranks, device, model and data, what deterministic mode takes, and settings without effect. Rank 0 prints.
 * async_saving: checkpoints are written while training goes on. */
void banner_print(const struct run *r, bool async_saving);

/* Settings that have no effect in this process. */
void banner_print_ignored(const struct run *r);

#endif
