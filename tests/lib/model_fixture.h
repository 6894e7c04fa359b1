/* A small model on the CPU device, for the tests of whole models. Every error fails the test. */
#ifndef IHA_TESTS_LIB_MODEL_FIXTURE_H
#define IHA_TESTS_LIB_MODEL_FIXTURE_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "model/model.h"
#include "model/state_dict.h"

#ifndef FIXTURE_THREADS
#define FIXTURE_THREADS 2
#endif

static struct device *fixture_device(void) {
    static struct device *dev;
    struct error e = {0};
    struct device_options options = {.threads = FIXTURE_THREADS, .precision = DEVICE_FP32};
    if (!dev)
        dev = kernels_cpu()->open(&options, &e);
    if (!dev)
        fail_msg("%s", e.text);
    return dev;
}

static inline void fixture_model(struct model *m, const struct model_config *config,
                                 struct pass_shape shape) {
    struct error e = {0};
    struct model_options options = {.shape = shape, .weight_decay = 0.1, .mix_lr_scale = 1};
    if (model_create(m, config, kernels_cpu(), fixture_device(), &options, &e) != 0)
        fail_msg("%s", e.text);
}

/* Reproducible noise in [-1, 1). */
static inline double fixture_noise(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 33) / 1073741824.0 - 1;
}

static inline void fixture_tokens(int32_t *tokens, int64_t n, int64_t vocab, uint64_t seed) {
    for (int64_t i = 0; i < n; i++)
        tokens[i] = (int32_t)((fixture_noise(&seed) + 1) / 2 * (double)vocab);
}

/* Loss of one pass, forward and backward; the gradients are in the model afterwards. */
static inline double fixture_batch_loss(struct model *m, struct batch batch, double scale) {
    m->k->step_begin(m->dev, m->state, 0, 0);
    model_forward_backward(m, batch, scale, false, NULL, NULL);
    struct step_state state;
    m->k->step_read(m->dev, m->state, &state);
    return state.loss;
}

static inline double fixture_loss(struct model *m, const int32_t *tokens, const int32_t *targets,
                                  double scale) {
    return fixture_batch_loss(m, (struct batch){tokens, targets, NULL}, scale);
}

static inline double fixture_eval(struct model *m, const int32_t *tokens, const int32_t *targets,
                                  double scale) {
    m->k->step_begin(m->dev, m->state, 0, 0);
    model_evaluate(m, (struct batch){tokens, targets, NULL}, scale, NULL);
    struct step_state state;
    m->k->step_read(m->dev, m->state, &state);
    return state.loss;
}

#endif
