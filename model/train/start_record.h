/* starts.jsonl in the run directory: a line for each start of a run, with the command, the machine, the memory plan and
 * the configuration, and one for each end. scripts/report.py and scripts/watch.py show them. */
#ifndef IHA_MODEL_TRAIN_START_RECORD_H
#define IHA_MODEL_TRAIN_START_RECORD_H

#include <stdint.h>

#include "kernels/error.h"

struct config;
struct model;
struct flops;
struct command_line;

/* Append the line of a start at `step`. EXIT_RUN: cannot write, or out of memory. */
int start_record_write(const struct config *c, const struct model *m, const struct flops *flops,
                       const struct command_line *line, int64_t step, struct error *e);

/* Append the line of an end after `step`, with the largest memory that this process had. */
int start_record_end(const struct config *c, int64_t step, struct error *e);

#endif
