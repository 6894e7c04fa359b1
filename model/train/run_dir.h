/* A run's directory, run.dir. */
#ifndef IHA_MODEL_TRAIN_RUN_DIR_H
#define IHA_MODEL_TRAIN_RUN_DIR_H

#include <stdint.h>

#include "kernels/error.h"

/* Create it, lock it against other runs, and remove what a killed run left. Returns the descriptor of the lock, which
 * is held until it is closed; -1 on errors: those of files_make_dirs and files_lock. */
int run_dir_open(const char *dir, struct error *e);

/* EXIT_USER: the disk has no space for a checkpoint of so many parameters. */
int run_dir_check_space(const char *dir, int64_t num_params, struct error *e);

#endif
