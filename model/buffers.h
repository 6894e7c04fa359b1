/* Where every activation lives: laid out once, in one block, from the pass's shape. */
#ifndef IHA_MODEL_BUFFERS_H
#define IHA_MODEL_BUFFERS_H

#include "model/model.h"

/* Fill m->specs, and plan every operation: m->workspace_bytes, and *activation_bytes. */
int buffers_measure(struct model *m, size_t *activation_bytes, struct error *e);

/* Point every buffer of *m into `block`, which is as large as buffers_measure said. */
void buffers_place(struct model *m, void *block);

#endif
