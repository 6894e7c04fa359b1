/* An evaluation: a model's loss, and with labels its accuracy, over validation sequences. */
#ifndef IHA_MODEL_TRAIN_VALIDATION_H
#define IHA_MODEL_TRAIN_VALIDATION_H

#include "model/model.h"
#include "model/train/evaluation.h"

/* Sequences of T tokens, from wherever they come. */
struct validation_data {
    int64_t sequences; /* that an evaluation reads */
    bool labelled;     /* see struct evaluation */
    void *source;
    /* Read sequence i of `source`: tokens, targets, and segments as in struct batch, each [T]. */
    int (*read)(void *source, int64_t i, int32_t *tokens, int32_t *targets, int32_t *segments,
                struct error *e);
};

/* *found: whether a target counts in any sequence. */
int validation_find_target(const struct validation_data *data, int64_t T, bool *found, struct error *e);

/* One batch, [B,T] of the model's shape. */
struct validation_buffers {
    int32_t *tokens, *targets, *segments;
    int32_t *correct; /* NULL without labels */
};

/* EXIT_RUN: out of memory. Freeing is allowed after an error, and of buffers that are all zero. */
int validation_buffers_create(struct validation_buffers *b, const struct pass_shape *shape, bool labelled,
                              struct error *e);
void validation_buffers_free(struct validation_buffers *b);

/* Evaluate. Batches are distributed over the ranks of m->comm, and do not depend on how many there are. The device's
 * step state is as before afterwards. All ranks call it, and fail together. */
int validate(struct model *m, const struct validation_data *data, const struct validation_buffers *buffers,
             struct evaluation *v, struct error *e);

#endif
