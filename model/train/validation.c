#include "model/train/validation.h"

#include <stdlib.h>

int validation_find_target(const struct validation_data *data, int64_t T, bool *found, struct error *e) {
    int32_t *tokens = malloc((size_t)(3 * T) * sizeof *tokens), *targets = tokens + T;
    int status = tokens ? 0 : fail_run(e, "out of memory for a sequence of the validation data");
    *found = false;
    for (int64_t i = 0; i < data->sequences && !*found && status == 0; i++) {
        status = data->read(data->source, i, tokens, targets, targets + T, e);
        for (int64_t t = 0; t < T && !*found && status == 0; t++)
            *found = targets[t] >= 0;
    }
    free(tokens);
    return status;
}

int validation_buffers_create(struct validation_buffers *b, const struct pass_shape *shape, bool labelled,
                              struct error *e) {
    size_t bytes = (size_t)(shape->batch * shape->tokens) * sizeof(int32_t);
    b->tokens = malloc(bytes);
    b->targets = malloc(bytes);
    b->segments = malloc(bytes);
    b->correct = labelled ? malloc(bytes) : NULL;
    if (!b->tokens || !b->targets || !b->segments || (labelled && !b->correct))
        return fail_run(e, "out of memory for a batch of tokens");
    return 0;
}

void validation_buffers_free(struct validation_buffers *b) {
    free(b->tokens);
    free(b->targets);
    free(b->segments);
    free(b->correct);
}

/* Read the batch of sequences [i, i + B). */
static int read_batch(const struct validation_data *data, const struct validation_buffers *b,
                      const struct pass_shape *shape, int64_t i, struct error *e) {
    int64_t T = shape->tokens;
    for (int64_t n = 0; n < shape->batch; n++) {
        int32_t *targets = b->targets + n * T;
        bool padding =
            i + n >= data->sequences; /* the last batch is padded with sequences that do not count */
        if (data->read(data->source, padding ? i : i + n, b->tokens + n * T, targets, b->segments + n * T,
                       e) != 0)
            return -1;
        for (int64_t t = 0; t < T && padding; t++)
            targets[t] = -1;
    }
    return 0;
}

/* Add up what the ranks have counted. Decisions depend on the figures, so all ranks take the loss of rank 0. */
static void merge_evaluations(struct comm *comm, struct evaluation *v) {
    const struct evaluation *gathered = comm_all_gather_small(comm, v, sizeof *v);
    *v = gathered[0];
    for (int i = 1; i < comm->ranks; i++) {
        v->correct += gathered[i].correct;
        v->segments += gathered[i].segments;
        v->exact += gathered[i].exact;
    }
}

int validate(struct model *m, const struct validation_data *data, const struct validation_buffers *buffers,
             struct evaluation *v, struct error *e) {
    int64_t B = m->shape.batch;
    const int32_t *segments = m->shape.segments ? buffers->segments : NULL;
    struct step_state before, after;
    int status = 0;
    *v = (struct evaluation){.labelled = data->labelled};
    m->k->step_read(m->dev, m->state, &before);
    m->k->step_begin(m->dev, m->state, before.step, before.lr);
    for (int64_t i = m->comm->rank * B; i < data->sequences && status == 0; i += m->comm->ranks * B) {
        status = read_batch(data, buffers, &m->shape, i, e);
        if (status == 0)
            model_evaluate(m, (struct batch){buffers->tokens, buffers->targets, segments}, 1,
                           buffers->correct);
        if (status == 0 && data->labelled)
            evaluation_count(v, B, m->shape.tokens, buffers->targets, segments, buffers->correct);
    }
    if (comm_agree(m->comm, status, e) != 0)
        return -1;
    m->comm->ops->all_reduce(m->comm, &m->state->loss, 2); /* and targets, the next field */
    m->k->step_read(m->dev, m->state, &after);
    m->k->step_write(m->dev, m->state, &before);
    v->targets = (int64_t)after.targets;
    v->loss = after.loss / after.targets;
    merge_evaluations(m->comm, v);
    return 0;
}
