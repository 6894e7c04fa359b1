/* train.init_from: what the run says about the weights it starts from. */
#ifndef IHA_MODEL_TRAIN_INIT_FROM_H
#define IHA_MODEL_TRAIN_INIT_FROM_H

#include <stdio.h>

#include "model/checkpoint/checkpoint.h"

/* Check that the checkpoint `dir` fits the run's model (EXIT_USER), and say whether the function stays the same. Where
 * layers differ, show it: the mean loss of `batch` (tokens NULL: no batch), of `micro_batch` sequences, by the
 * checkpoint's model and by the new one. One is freed before the other is created, without optimizer. Each rank does this
 * alone; out: NULL on all but one. */
int init_from_report(const char *dir, const struct config *c, const struct kernels *k, struct device *dev,
                     struct batch batch, FILE *out, struct error *e);

#endif
