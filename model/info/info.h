/* What `train_iha info` prints: parameters by group, memory by family, FLOPs per token, the layer schedule.
 */
#ifndef IHA_MODEL_INFO_INFO_H
#define IHA_MODEL_INFO_INFO_H

#include <stdio.h>

#include "model/model.h"

int info_print(FILE *out, const struct config *c, const struct kernels *k, struct device *dev,
               struct error *e);

/* Its parts: all that depends on the model alone, and what one rank holds. */
int info_print_counts(FILE *out, const struct config *c, struct error *e);
void info_print_memory(FILE *out, const struct config *c, enum dtype compute, const struct memory_plan *p);

#endif
