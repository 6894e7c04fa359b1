/* Whole-model gradients against central differences, in double: every layer type, mask, RoPE, collapse, norm,
 * activation, bias and tying. For each tensor, norm of the error over norm of the gradient is under 1e-6. */
#define FIXTURE_THREADS 1 /* thousands of tiny passes: waking threads would take longer than the work */
#include "tests/lib/gradient_model.h"
#include "tests/lib/sample.h"

enum { MAX_TOKENS = 64 };

static void check_tensor(struct model *m, int index, const int32_t *tokens, const int32_t *targets,
                         double scale, const char *name) {
    const struct param *p = &m->params.list[index];
    double *values = model_param(m, index).data, *gradient = model_gradient(m, index).data;
    double error = 0, norm = 0;
    for (int64_t i = 0; i < p->count; i++) {
        double h = 1e-5, kept = values[i];
        values[i] = kept + h;
        double up = fixture_eval(m, tokens, targets, scale);
        values[i] = kept - h;
        double down = fixture_eval(m, tokens, targets, scale);
        values[i] = kept;
        double numeric = (up - down) / (2 * h);
        error += (numeric - gradient[i]) * (numeric - gradient[i]);
        norm += numeric * numeric;
    }
    /* A gradient that is exactly zero (of a key bias, which cancels in softmax) compares absolutely. */
    if (sqrt(error) > 1e-6 * sqrt(norm) + 1e-10)
        fail_msg("%s: %s: error %.3g against a gradient of norm %.3g", name, p->name, sqrt(error),
                 sqrt(norm));
}

static void check_model(const char *name, const struct model_config *config, int64_t batch, int64_t length,
                        enum recompute recompute) {
    if (!in_sample())
        return;
    struct model m;
    fixture_model(&m, config, (struct pass_shape){batch, length, recompute, true, false, false, false});
    gradient_randomize(&m);
    int32_t tokens[MAX_TOKENS], targets[MAX_TOKENS];
    fixture_tokens(tokens, batch * length, config->vocab_size, 1);
    fixture_tokens(targets, batch * length, config->vocab_size, 2);
    if (batch * length > 2)
        targets[1] = -1;
    double scale = 0.3;
    assert_int_equal(m.specs[0].one_product, strstr(name, "one_product") != NULL);
    for (int layer = 0; layer < config->num_hidden_layers;
         layer++) /* as attention is planned, so it is called */
        assert_int_equal(m.specs[layer].attention.packed, m.layers[layer].q.data == m.layers[layer].qkv.data);
    fixture_loss(&m, tokens, targets, scale);
    for (int i = 0; i < m.params.count; i++)
        check_tensor(&m, i, tokens, targets, scale, name);
    model_free(&m);
}

#define CASE(name, batch, length, recompute, ...)                                                            \
    static void name(void **state) {                                                                         \
        (void)state;                                                                                         \
        struct model_config c = gradient_config();                                                           \
        __VA_ARGS__;                                                                                         \
        check_model(#name, &c, batch, length, recompute);                                                    \
    }

CASE(iha_flat_virtual_full, 2, 5, RECOMPUTE_NONE, )
CASE(iha_token_mask, 2, 5, RECOMPUTE_NONE, c.iha_mask = MASK_TOKEN; c.iha_window = 3)
CASE(iha_token_rope, 1, 7, RECOMPUTE_NONE, c.iha_rope = IHA_ROPE_TOKEN; c.layer_types[1] = LAYER_IHA_GLOBAL)
CASE(iha_per_head, 2, 4, RECOMPUTE_NONE, c.iha_collapse = COLLAPSE_PER_HEAD)
CASE(iha_many_pseudo, 1, 4, RECOMPUTE_NONE, c.num_pseudo_heads = 5; c.iha_window = 7)
CASE(iha_one_pseudo, 2, 4, RECOMPUTE_NONE, c.num_pseudo_heads = 1)
CASE(mha_local_learned, 2, 6, RECOMPUTE_NONE, c.layer_types[0] = LAYER_MHA_LOCAL;
     c.position_embedding = POSITION_LEARNED)
CASE(gpt2_like, 2, 5, RECOMPUTE_NONE, c.layer_types[0] = LAYER_MHA_GLOBAL; c.norm = NORM_LAYERNORM;
     c.bias = true; c.position_embedding = POSITION_LEARNED)
CASE(llama_like, 2, 5, RECOMPUTE_NONE, c.layer_types[0] = LAYER_MHA_GLOBAL; c.activation = ACTIVATION_SWIGLU;
     c.tie_word_embeddings = false)
/* 16 x 12 fills whole lines of the flat buffer, so that up and gate are one matrix product. */
CASE(swiglu_one_product, 2, 5, RECOMPUTE_NONE, c.activation = ACTIVATION_SWIGLU; c.intermediate_size = 16)
CASE(swiglu_one_product_light, 1, 5, RECOMPUTE_LIGHT, c.activation = ACTIVATION_SWIGLU;
     c.intermediate_size = 16)
CASE(swiglu_one_product_full, 1, 5, RECOMPUTE_FULL, c.activation = ACTIVATION_SWIGLU;
     c.intermediate_size = 16)
CASE(swiglu_bias_iha, 1, 5, RECOMPUTE_NONE, c.activation = ACTIVATION_SWIGLU; c.bias = true;
     c.norm = NORM_LAYERNORM; c.iha_collapse = COLLAPSE_PER_HEAD)
CASE(rmsnorm_bias, 1, 5, RECOMPUTE_NONE, c.bias = true)
CASE(layernorm_no_bias, 1, 5, RECOMPUTE_NONE, c.norm = NORM_LAYERNORM)
CASE(relu2_untied, 2, 5, RECOMPUTE_NONE, c.activation = ACTIVATION_RELU2; c.tie_word_embeddings = false)
CASE(not_causal_iha, 2, 5, RECOMPUTE_NONE, c.causal = false; c.layer_types[0] = LAYER_IHA_GLOBAL;
     c.position_embedding = POSITION_LEARNED)
CASE(not_causal_rope, 1, 5, RECOMPUTE_NONE, c.causal = false; c.layer_types[0] = LAYER_IHA_GLOBAL)
CASE(no_positions, 1, 6, RECOMPUTE_NONE, c.position_embedding = POSITION_NONE)
CASE(one_token, 1, 1, RECOMPUTE_NONE, )
CASE(one_head, 1, 5, RECOMPUTE_NONE, c.num_attention_heads = 1; c.head_dim = 12)
CASE(recompute_light, 2, 5, RECOMPUTE_LIGHT, c.activation = ACTIVATION_SWIGLU)
CASE(recompute_full, 2, 5, RECOMPUTE_FULL, c.bias = true; c.norm = NORM_LAYERNORM)
CASE(four_types, 1, 6, RECOMPUTE_LIGHT, c.num_hidden_layers = 4; c.layer_types[0] = LAYER_MHA_LOCAL;
     c.layer_types[1] = LAYER_IHA_GLOBAL; c.layer_types[2] = LAYER_MHA_GLOBAL;
     c.layer_types[3] = LAYER_IHA_LOCAL)
CASE(gqa, 2, 5, RECOMPUTE_NONE, c.num_attention_heads = 4; c.num_key_value_heads = 2;
     c.layer_types[1] = LAYER_MHA_LOCAL)
CASE(gqa_one_light, 1, 6, RECOMPUTE_LIGHT, c.num_attention_heads = 3; c.num_key_value_heads = 1;
     c.layer_types[1] = LAYER_IHA_GLOBAL; c.position_embedding = POSITION_LEARNED; c.bias = true)
CASE(qk_norm, 2, 5, RECOMPUTE_NONE, c.qk_norm = QK_NORM_RMSNORM; c.layer_types[1] = LAYER_MHA_LOCAL)
CASE(qk_norm_gqa_light, 1, 6, RECOMPUTE_LIGHT, c.qk_norm = QK_NORM_RMSNORM; c.num_attention_heads = 4;
     c.num_key_value_heads = 2; c.position_embedding = POSITION_NONE)
CASE(qk_norm_gqa_full, 1, 6, RECOMPUTE_FULL, c.qk_norm = QK_NORM_RMSNORM; c.num_attention_heads = 4;
     c.num_key_value_heads = 1; c.qkv_bias = true)
CASE(qkv_bias, 2, 5, RECOMPUTE_NONE, c.qkv_bias = true; c.layer_types[1] = LAYER_FOLDED_GLOBAL;
     c.rope_scaling = ROPE_SCALING_LLAMA3; c.rope_factor = 4; c.rope_low_freq_factor = 1;
     c.rope_high_freq_factor = 4; c.rope_original_positions = 30)
CASE(folded_rope, 2, 5, RECOMPUTE_NONE, c.layer_types[0] = LAYER_FOLDED_LOCAL;
     c.layer_types[1] = LAYER_FOLDED_GLOBAL)
CASE(folded_bias, 2, 5, RECOMPUTE_NONE, c.layer_types[0] = LAYER_FOLDED_GLOBAL; c.bias = true;
     c.position_embedding = POSITION_LEARNED)
CASE(folded_light, 1, 6, RECOMPUTE_LIGHT, c.layer_types[1] = LAYER_FOLDED_GLOBAL; c.bias = true)
CASE(folded_full, 1, 6, RECOMPUTE_FULL, c.layer_types[0] = LAYER_FOLDED_GLOBAL;
     c.layer_types[1] = LAYER_FOLDED_LOCAL; c.bias = true)
CASE(diff_rope, 2, 5, RECOMPUTE_NONE, c.layer_types[0] = LAYER_DIFF_LOCAL;
     c.layer_types[1] = LAYER_DIFF_GLOBAL)
CASE(diff_bias, 2, 4, RECOMPUTE_NONE, c.layer_types[1] = LAYER_DIFF_GLOBAL; c.num_attention_heads = 4;
     c.head_dim = 3; c.bias = true; c.position_embedding = POSITION_LEARNED)
CASE(diff_light, 1, 6, RECOMPUTE_LIGHT, c.layer_types[1] = LAYER_DIFF_GLOBAL)
CASE(diff_full, 1, 6, RECOMPUTE_FULL, c.layer_types[0] = LAYER_DIFF_LOCAL;
     c.layer_types[1] = LAYER_DIFF_GLOBAL; c.position_embedding = POSITION_NONE)
CASE(talking_rope, 2, 5, RECOMPUTE_NONE, c.layer_types[0] = LAYER_TALKING_LOCAL;
     c.layer_types[1] = LAYER_TALKING_GLOBAL)
CASE(talking_full, 1, 5, RECOMPUTE_FULL, c.layer_types[0] = LAYER_TALKING_GLOBAL;
     c.position_embedding = POSITION_NONE)
CASE(simplicial_bias, 2, 5, RECOMPUTE_NONE, c.layer_types[0] = LAYER_SIMPLICIAL_LOCAL;
     c.layer_types[1] = LAYER_SIMPLICIAL_GLOBAL; c.bias = true; c.position_embedding = POSITION_LEARNED)
CASE(simplicial_light, 1, 5, RECOMPUTE_LIGHT, c.layer_types[0] = LAYER_SIMPLICIAL_GLOBAL)
CASE(alpha_on_qk, 1, 5, RECOMPUTE_NONE, c.alpha_on = ALPHA_ON_QK; c.layer_types[1] = LAYER_FOLDED_GLOBAL)
CASE(alpha_on_v, 1, 5, RECOMPUTE_LIGHT, c.alpha_on = ALPHA_ON_V; c.layer_types[1] = LAYER_FOLDED_GLOBAL)

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(iha_flat_virtual_full),
        cmocka_unit_test(iha_token_mask),
        cmocka_unit_test(iha_token_rope),
        cmocka_unit_test(iha_per_head),
        cmocka_unit_test(iha_many_pseudo),
        cmocka_unit_test(iha_one_pseudo),
        cmocka_unit_test(mha_local_learned),
        cmocka_unit_test(gpt2_like),
        cmocka_unit_test(llama_like),
        cmocka_unit_test(swiglu_one_product),
        cmocka_unit_test(swiglu_one_product_light),
        cmocka_unit_test(swiglu_one_product_full),
        cmocka_unit_test(swiglu_bias_iha),
        cmocka_unit_test(rmsnorm_bias),
        cmocka_unit_test(layernorm_no_bias),
        cmocka_unit_test(relu2_untied),
        cmocka_unit_test(not_causal_iha),
        cmocka_unit_test(not_causal_rope),
        cmocka_unit_test(no_positions),
        cmocka_unit_test(one_token),
        cmocka_unit_test(one_head),
        cmocka_unit_test(recompute_light),
        cmocka_unit_test(recompute_full),
        cmocka_unit_test(four_types),
        cmocka_unit_test(qkv_bias),
        cmocka_unit_test(gqa),
        cmocka_unit_test(gqa_one_light),
        cmocka_unit_test(qk_norm),
        cmocka_unit_test(qk_norm_gqa_light),
        cmocka_unit_test(qk_norm_gqa_full),
        cmocka_unit_test(folded_rope),
        cmocka_unit_test(folded_bias),
        cmocka_unit_test(folded_light),
        cmocka_unit_test(folded_full),
        cmocka_unit_test(diff_rope),
        cmocka_unit_test(diff_bias),
        cmocka_unit_test(diff_light),
        cmocka_unit_test(diff_full),
        cmocka_unit_test(talking_rope),
        cmocka_unit_test(talking_full),
        cmocka_unit_test(simplicial_bias),
        cmocka_unit_test(simplicial_light),
        cmocka_unit_test(alpha_on_qk),
        cmocka_unit_test(alpha_on_v),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
