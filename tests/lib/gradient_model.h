/* The model of the tests of gradients in double: as small as all of its parts allow. */
#ifndef IHA_TESTS_LIB_GRADIENT_MODEL_H
#define IHA_TESTS_LIB_GRADIENT_MODEL_H

#include "tests/lib/model_fixture.h"

enum { GRADIENT_VOCAB = 11 };

static inline struct model_config gradient_config(void) {
    return (struct model_config){
        .vocab_size = GRADIENT_VOCAB,
        .hidden_size = 12,
        .num_hidden_layers = 2,
        .num_attention_heads = 2,
        .head_dim = 6,
        .intermediate_size = 20,
        .max_position_embeddings = 8,
        .position_embedding = POSITION_ROPE,
        .rope_theta = 100,
        .norm = NORM_RMSNORM,
        .norm_eps = 1e-5,
        .activation = ACTIVATION_GELU_TANH,
        .bias = false,
        .tie_word_embeddings = true,
        .causal = true,
        .layer_types = {LAYER_IHA_LOCAL, LAYER_MHA_GLOBAL},
        .local_window = 3,
        .num_pseudo_heads = 2,
        .iha_window = 4,
    };
}

/* Every parameter away from its initial value, so that no zero or one hides a term. */
static inline void gradient_randomize(struct model *m) {
    uint64_t seed = 7;
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        double *values = model_param(m, i).data;
        double spread = p->class == PARAM_MATRIX ? 0.4 : 0.6;
        for (int64_t j = 0; j < p->count; j++)
            values[j] = spread * fixture_noise(&seed) + (p->init == INIT_ONES);
    }
}

#endif
