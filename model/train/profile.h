/* The report of --profile: a table of times by operation, and a timeline for a trace viewer. */
#ifndef IHA_MODEL_TRAIN_PROFILE_H
#define IHA_MODEL_TRAIN_PROFILE_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"
#include "kernels/trace.h"

/* The name of ranges between steps, which the table leaves out. */
#define PROFILE_BETWEEN_STEPS "between steps"

/* Print the table to `out`: self time by name (without nested ranges), per step and as a share, longest first.
 * Write the timeline to run_dir/profile.json, in the trace event format, for ui.perfetto.dev and chrome://tracing.
 * first: number of steps before the first traced one. */
int profile_report(FILE *out, const struct trace *t, const char *run_dir, int64_t first, int64_t steps,
                   struct error *e);

#endif
