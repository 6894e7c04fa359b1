/* What traced steps look like: a table of where the time went, and a time line for a browser. */
#ifndef IHA_MODEL_TRAIN_PROFILE_H
#define IHA_MODEL_TRAIN_PROFILE_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"
#include "kernels/trace.h"

/* The name of ranges that are no part of a step: what lies in them is counted apart. */
#define PROFILE_BETWEEN_STEPS "between steps"

/* The table to `out`: time by name, most first, each range's own, without that of ranges in it, per step and
 * as a share. The time line to run_dir/profile.json, in the format that ui.perfetto.dev and chrome://tracing
 * open. first: steps before the first that was traced. */
int profile_report(FILE *out, const struct trace *t, const char *run_dir, int64_t first, int64_t steps,
                   struct error *e);

#endif
