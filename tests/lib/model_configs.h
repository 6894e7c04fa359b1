/* Small models for tests of parameters and of training. Between them the first two use nearly every option of
 * [model]. */
#ifndef IHA_TESTS_LIB_MODEL_CONFIGS_H
#define IHA_TESTS_LIB_MODEL_CONFIGS_H

#include "model/config/config.h"

enum { BATCH = 4, TOKENS = 24, ROWS = BATCH * TOKENS, VOCAB = 31 };

/* All four layer types, RoPE, one window smaller than the sequence in each local layer. */
static inline struct model_config plain_config(void) {
    return (struct model_config){
        .vocab_size = VOCAB,
        .hidden_size = 24,
        .num_hidden_layers = 4,
        .num_attention_heads = 3,
        .head_dim = 8,
        .intermediate_size = 40,
        .max_position_embeddings = TOKENS,
        .rope_theta = 1000,
        .norm_eps = 1e-5,
        .tie_word_embeddings = true,
        .causal = true,
        .layer_types = {LAYER_IHA_LOCAL, LAYER_MHA_GLOBAL, LAYER_IHA_GLOBAL, LAYER_MHA_LOCAL},
        .local_window = 7,
        .num_pseudo_heads = 2,
        .iha_window = 12,
        .init_alpha = ALPHA_NOISE,
    };
}

/* What plain_config() leaves out: biases, layernorm, swiglu, untied, learned positions, per-head collapse. */
static inline struct model_config other_config(void) {
    struct model_config c = plain_config();
    c.norm = NORM_LAYERNORM;
    c.activation = ACTIVATION_SWIGLU;
    c.bias = true;
    c.tie_word_embeddings = false;
    c.position_embedding = POSITION_LEARNED;
    c.iha_mask = MASK_TOKEN;
    c.iha_collapse = COLLAPSE_PER_HEAD;
    c.init_collapse = COLLAPSE_MEAN;
    return c;
}

/* One layer, small enough to count by hand. */
static inline struct model_config counted_config(enum layer_type type) {
    return (struct model_config){
        .vocab_size = 10,
        .hidden_size = 8,
        .num_hidden_layers = 1,
        .num_attention_heads = 2,
        .head_dim = 4,
        .intermediate_size = 16,
        .causal = true,
        .layer_types = {type},
        .local_window = 2,
        .num_pseudo_heads = 2,
        .iha_window = 3,
    };
}

#endif
