/* model.safetensors: the weights of a checkpoint, fp32, on one rank. */
#ifndef IHA_MODEL_CHECKPOINT_WEIGHTS_H
#define IHA_MODEL_CHECKPOINT_WEIGHTS_H

#include "model/model.h"

/* weights: a copy of all parameters [params.num_params], or NULL: they are read from the model, which then must
 * not change meanwhile. */
int weights_write(const char *path, struct model *m, const float *weights, struct error *e);

/* Tensors must have the model's names and shapes, in fp32 or bf16. updates: see model_set_param. */
int weights_read(const char *path, struct model *m, int64_t updates, struct error *e);

/* The weights of another model, each of whose tensors this one has too. Its vocabulary may be of another size: rows of
 * token ids are copied, new rows are the mean of the old, and rows beyond the model's vocabulary are left out. Tensors
 * that it has not keep their values. */
int weights_read_from(const char *path, struct model *m, const struct model_config *then, struct error *e);

#endif
