/* Parameters in and out of a model: initial values, and values from and to host memory, gathered from all
 * ranks where each holds only its own. Values here are the master weights, in fp32 on the host. */
#ifndef IHA_MODEL_STATE_DICT_H
#define IHA_MODEL_STATE_DICT_H

#include "model/model.h"

/* Initial values, by seed. EXIT_RUN when out of memory. */
int model_initialize(struct model *m, uint64_t seed, struct error *e);

/* Set one parameter from values [param.count]. updates: how many updates the optimizer has made of it, on
 * which the stochastic rounding of bf16 parameters depends; 0 rounds to nearest. */
void model_set_param(struct model *m, int index, const float *values, int64_t updates);

/* Do the master weights exist only in shards, one a rank (bf16 in ZeRO stages 1 and 2)? */
bool model_master_weights_sharded(const struct model *m);

/* One parameter, into values [param.count]. Not where master weights are sharded. */
void model_get_param(const struct model *m, int index, float *values);

/* All parameters, into values [params.num_params], each at its packed_offset; values is NULL on ranks that do
 * not want them. Where master weights are sharded, every rank must call this, between steps: it gathers them
 * in the memory of the gradients. */
void model_get_params(struct model *m, float *values);

#endif
