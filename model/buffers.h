/* The activations of a pass: all buffers in one allocation, their addresses fixed before the first step. */
#ifndef IHA_MODEL_BUFFERS_H
#define IHA_MODEL_BUFFERS_H

#include "model/model.h"

/* Plan every operation of the pass: m->specs, m->workspace_bytes, and the bytes of all buffers. */
int buffers_plan(struct model *m, size_t *activation_bytes, struct error *e);

/* The operations of a layer besides attention, for the rows that its specs have. */
enum { MAX_LAYER_OPS = 10 };
int layer_ops(const struct model_config *c, const struct layer_specs *s, bool training,
              struct op_spec ops[MAX_LAYER_OPS]);

/* Give every buffer of *m its address in `memory`, which holds the bytes that buffers_plan returned. */
void buffers_assign(struct model *m, void *memory);

#endif
