/* What traced steps look like: a table of where the time went, and a time line for a browser. */
#ifndef IHA_PROFILE_H
#define IHA_PROFILE_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"
#include "kernels/trace.h"

/* Time by name, most first: each range's own, without that of ranges in it; per step and as a share. */
void profile_print(FILE *out, const struct trace *t, int64_t steps);

/* In the format that chrome://tracing and ui.perfetto.dev open. */
int profile_write(const char *path, const struct trace *t, int rank, struct error *e);

#endif
