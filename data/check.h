/* `train_iha check`: all of the shards of a glob and their labels. */
#ifndef IHA_DATA_CHECK_H
#define IHA_DATA_CHECK_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"

/* Check every header, size and id of the shards and labels that the glob matches, on all cores, and the vocab_size of a
 * dataset.json beside them. Progress and a line for each bad file go to stderr, a summary to `out`. EXIT_USER:
 * something was wrong. */
int check_data(FILE *out, const char *glob, int64_t vocab_size, struct error *e);

#endif
