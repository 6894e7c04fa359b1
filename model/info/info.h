/* What `train_iha info` prints: parameters by group, memory by family, FLOPs per token, the layer schedule; and
 * what deterministic mode takes, for the first lines of a run. */
#ifndef IHA_MODEL_INFO_INFO_H
#define IHA_MODEL_INFO_INFO_H

#include <stdio.h>

#include "model/model.h"

int info_print(FILE *out, const struct config *c, const struct kernels *k, struct device *dev,
               struct error *e);

/* Its parts: what depends on the model alone, and the memory of one rank. */
int info_print_counts(FILE *out, const struct config *c, struct error *e);
void info_print_memory(FILE *out, const struct config *c, enum dtype compute, const struct memory_plan *p);

/* With system.deterministic: the attention backend of each layer type, and the memory that determinism takes.
 * At most two lines; nothing on devices that are always deterministic. */
void info_print_determinism(FILE *out, const struct model *m);

#endif
