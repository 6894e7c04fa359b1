/* The checkpoint directories of a run directory: their names, which there are, removing them. */
#ifndef IHA_MODEL_CHECKPOINT_CHECKPOINT_DIRS_H
#define IHA_MODEL_CHECKPOINT_CHECKPOINT_DIRS_H

#include "model/config/config.h"

enum { PATH_BYTES = MAX_TEXT + 128, CHECKPOINT_NAME = 32 };

/* dir/name */
void path_join(char out[PATH_BYTES], const char *dir, const char *name);

/* Whether dir/name exists. True also if that cannot be found out: opening it will then report the error. */
bool path_exists(const char *dir, const char *name);

/* "step_00001000", its path, and the path that it has while it is being written. */
void checkpoint_name(char out[CHECKPOINT_NAME], int64_t step);
void checkpoint_path(char out[PATH_BYTES], const char *run_dir, int64_t step);
void checkpoint_tmp_path(char out[PATH_BYTES], const char *run_dir, int64_t step);

/* The steps of all checkpoints in run_dir, newest first: a malloc'd array and its length; -1 and EXIT_RUN if they
 * cannot all be listed. (A run that missed its newest checkpoint would repeat steps and overwrite it.) */
int checkpoint_list_steps(const char *run_dir, int64_t **steps, struct error *e);

/* Remove a checkpoint, whole or not at all: renamed first, to a name that checkpoint_clean removes. One that does
 * not exist is no error. */
int checkpoint_remove(const char *run_dir, int64_t step, struct error *e);

/* Remove what a killed run left half written or half removed. Failures are warnings. */
void checkpoint_clean(const char *run_dir);

#endif
