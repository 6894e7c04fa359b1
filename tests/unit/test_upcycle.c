/* Starting from another model's weights: what config_compare says about the function, against what the two models
 * compute. Every kind of layer becomes every other, with all masks, positions, collapses and windows. */
#define FIXTURE_THREADS 1
#include "tests/lib/model_fixture.h"

#include "model/checkpoint/weights.h"
#include "model/config/config_compare.h"
#include "tests/lib/temporary_directory.h"

enum { B = 1, T = 8, V = 30, C = 12 };

static void load_config(struct config *c, int count, const char *const *extra) {
    static const char *const base[] = {"model.vocab_size=30",
                                       "model.hidden_size=12",
                                       "model.num_hidden_layers=1",
                                       "model.num_attention_heads=3",
                                       "data.train=x.bin",
                                       "train.seq_len=8",
                                       "train.micro_batch=1",
                                       "train.steps=1",
                                       "train.lr=1",
                                       "run.dir=x"};
    char *overrides[32];
    struct error e = {0};
    int n = 0;
    for (size_t i = 0; i < sizeof base / sizeof *base; i++)
        overrides[n++] = (char *)(uintptr_t)base[i];
    for (int i = 0; i < count; i++)
        overrides[n++] = (char *)(uintptr_t)extra[i];
    if (config_load(c, NULL, n, overrides, 1, &e) != 0)
        fail_msg("%s", e.text);
}

/* Values that are not small, so that another function is another by more than rounding. */
static void randomise(struct model *m) {
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        float values[4096];
        uint64_t state = (uint64_t)i + 1;
        assert_in_range(p->count, 1, 4096);
        for (int64_t j = 0; j < p->count; j++)
            values[j] = (float)fixture_noise(&state);
        model_set_param(m, i, values, 0);
    }
}

static void last_hidden(struct model *m, float h[T * C]) {
    int32_t tokens[T], targets[T];
    fixture_tokens(tokens, T, V, 7);
    fixture_tokens(targets, T, V, 8);
    fixture_eval(m, tokens, targets, 1);
    m->k->download(m->dev, m->h, h, DTYPE_F32);
}

/* The norm of the difference between the two models' outputs, by the norm of the first one's. */
static double difference(const struct config *then, const struct config *now) {
    struct model source, model;
    struct pass_shape shape = {B, T, RECOMPUTE_NONE, false, false, false, false};
    struct error e = {0};
    static float a[T * C], b[T * C];
    fixture_model(&source, &then->model, shape);
    randomise(&source);
    last_hidden(&source, a);
    assert_int_equal(weights_write("weights.safetensors", &source, NULL, &e), 0);
    model_free(&source);
    fixture_model(&model, &now->model, shape);
    assert_int_equal(model_initialize(&model, 3, &e), 0);
    if (weights_read_from("weights.safetensors", &model, &then->model, &e) != 0)
        fail_msg("%s", e.text);
    last_hidden(&model, b);
    model_free(&model);
    double sum = 0, norm = 0;
    for (int i = 0; i < T * C; i++) {
        sum += pow((double)a[i] - (double)b[i], 2);
        norm += pow((double)a[i], 2);
    }
    return sqrt(sum / norm);
}

static int preserved, changed;

static void check(int then_count, const char *const *then_keys, int now_count, const char *const *now_keys) {
    static struct config then, now;
    struct model_comparison c;
    load_config(&then, then_count, then_keys);
    load_config(&now, now_count, now_keys);
    config_compare(&then.model, &now.model, T, &c);
    if (c.misfits[0])
        fail_msg("misfits: %s", c.misfits);
    double d = difference(&then, &now);
    preserved += !c.changes[0];
    changed += c.changes[0] != 0;
    if (c.changes[0] ? d > 1e-4 : d < 1e-5)
        return;
    for (int i = 0; i < then_count; i++)
        print_message("was %s\n", then_keys[i]);
    for (int i = 0; i < now_count; i++)
        print_message("now %s\n", now_keys[i]);
    fail_msg("the outputs differ by %g, and the comparison says: %s", d,
             c.changes[0] ? c.changes : "the same");
}

#define EACH(name, ...)                                                                                      \
    static const char *const name[] = {__VA_ARGS__};                                                         \
    enum { name##_count = sizeof name / sizeof *name }

static void mha_becomes_iha(void **state) {
    (void)state;
    EACH(sources, "model.layer_pattern=mha_global", "model.layer_pattern=mha_local");
    EACH(reaches, "model.local_window=3", "model.local_window=8");
    EACH(kinds, "model.layer_pattern=iha_global", "model.layer_pattern=iha_local");
    EACH(pseudo, "model.num_pseudo_heads=1", "model.num_pseudo_heads=2");
    EACH(windows, "model.iha_window=3", "model.iha_window=6", "model.iha_window=7", "model.iha_window=16");
    EACH(masks, "model.iha_mask=flat", "model.iha_mask=token");
    EACH(positions, "model.position_embedding=rope", "model.position_embedding=learned",
         "model.position_embedding=none");
    EACH(ropes, "model.iha_rope=virtual", "model.iha_rope=token");
    EACH(collapses, "model.init_collapse=last", "model.init_collapse=mean");
    EACH(shapes, "model.iha_collapse=full", "model.iha_collapse=per_head");
    preserved = changed = 0;
    for (int n = 0; n < sources_count * reaches_count * kinds_count * pseudo_count * windows_count; n++)
        for (int j = 0; j < masks_count * positions_count * ropes_count * collapses_count; j++) {
            int i = n, k = j;
            const char *source = sources[i % 2], *reach = reaches[i / 2 % 2], *kind = kinds[i / 4 % 2];
            const char *P = pseudo[i / 8 % 2], *window = windows[i / 16], *position = positions[k % 3];
            /* Keys that a layer does not read are left at their first value. */
            if ((source == sources[0] && reach != reaches[0]) || (kind == kinds[0] && window != windows[0]) ||
                (position != positions[0] && k / 3 % 2))
                continue;
            const char *then[] = {source, reach, position};
            const char *now[] = {kind,
                                 P,
                                 window,
                                 position,
                                 ropes[k / 3 % 2],
                                 masks[k / 6 % 2],
                                 collapses[k / 12],
                                 reach,
                                 shapes[n % 2]};
            check(3, then, 9, now);
        }
    assert_in_range(preserved, 50, 2000);
    assert_in_range(changed, 50, 2000);
}

static void other_starts(void **state) {
    (void)state;
    EACH(bidirectional, "model.causal=false", "model.layer_pattern=mha_global");
    EACH(mean, "model.causal=false", "model.layer_pattern=iha_global", "model.init_collapse=mean",
         "model.iha_rope=token");
    EACH(noise, "model.causal=false", "model.layer_pattern=iha_global", "model.init_alpha=noise",
         "model.iha_rope=token");
    preserved = changed = 0;
    check(bidirectional_count, bidirectional, mean_count, mean);
    check(bidirectional_count, bidirectional, noise_count, noise);
    assert_int_equal(preserved, 1);
    assert_int_equal(changed, 1);
}

/* As imported models have them: groups of query heads, normalised q and k, biases of qkv alone, scaled RoPE. */
static void grouped_heads(void **state) {
    (void)state;
    EACH(then, "model.layer_pattern=mha_global", "model.num_key_value_heads=1", "model.qk_norm=rmsnorm",
         "model.qkv_bias=true", "model.rope_scaling=llama3", "model.rope_original_positions=12");
    EACH(now, "model.layer_pattern=iha_global", "model.num_key_value_heads=1", "model.qk_norm=rmsnorm",
         "model.qkv_bias=true", "model.rope_scaling=llama3", "model.rope_original_positions=12",
         "model.num_pseudo_heads=3", "model.iha_rope=token");
    EACH(virtual, "model.layer_pattern=iha_global", "model.num_key_value_heads=1", "model.qk_norm=rmsnorm",
         "model.qkv_bias=true", "model.rope_scaling=llama3", "model.rope_original_positions=12",
         "model.num_pseudo_heads=3", "model.iha_rope=virtual");
    preserved = changed = 0;
    check(then_count, then, now_count, now);
    check(then_count, then, virtual_count, virtual);
    assert_int_equal(preserved, 1);
    assert_int_equal(changed, 1);
}

static void iha_and_mha_stay(void **state) {
    (void)state;
    EACH(kinds, "model.layer_pattern=iha_global", "model.layer_pattern=iha_local");
    EACH(windows, "model.iha_window=5", "model.iha_window=16", "model.iha_window=20");
    EACH(masks, "model.iha_mask=flat", "model.iha_mask=token");
    EACH(ropes, "model.iha_rope=virtual", "model.iha_rope=token");
    for (int n = 0; n < 2 * 3 * 2 * 2; n++) {
        const char *then[] = {kinds[0], windows[0], masks[0], ropes[0]};
        const char *now[] = {kinds[n % 2], windows[n / 2 % 3], masks[n / 6 % 2], ropes[n / 12]};
        check(4, then, 4, now);
        check(4, now, 4, then);
    }
    EACH(small, "model.layer_pattern=mha_local", "model.local_window=3");
    EACH(large, "model.layer_pattern=mha_local", "model.local_window=9");
    EACH(all, "model.layer_pattern=mha_global");
    EACH(theta, "model.layer_pattern=mha_global", "model.rope_theta=100");
    EACH(eps, "model.layer_pattern=mha_global", "model.norm_eps=0.01");
    EACH(scaled, "model.layer_pattern=mha_global", "model.rope_scaling=llama3",
         "model.rope_original_positions=12");
    EACH(far, "model.layer_pattern=mha_global", "model.rope_original_positions=12");
    EACH(factor, "model.layer_pattern=mha_global", "model.rope_scaling=llama3",
         "model.rope_original_positions=12", "model.rope_factor=3");
    check(small_count, small, large_count, large);
    check(large_count, large, all_count, all);
    check(all_count, all, theta_count, theta);
    check(all_count, all, eps_count, eps);
    check(all_count, all, scaled_count, scaled);
    check(all_count, all, far_count, far);
    check(scaled_count, scaled, factor_count, factor);
}

static void check_misfit(const char *then_key, const char *now_key, const char *expected) {
    static struct config then, now;
    struct model_comparison c;
    load_config(&then, 1, &then_key);
    load_config(&now, 1, &now_key);
    config_compare(&then.model, &now.model, T, &c);
    if (!strstr(c.misfits, expected))
        fail_msg("\"%s\" does not say \"%s\"", c.misfits, expected);
}

static void misfits_are_named(void **state) {
    (void)state;
    const char *same = "model.layer_pattern=iha_global";
    check_misfit("model.layer_pattern=iha_global", "model.layer_pattern=mha_global",
                 "layer 0: it is mha_global");
    check_misfit(same, "model.activation=relu2", "model.activation is relu2 and was gelu_tanh");
    check_misfit(same, "model.norm=layernorm", "model.norm is layernorm and was rmsnorm");
    check_misfit(same, "model.num_pseudo_heads=3", "model.num_pseudo_heads");
    check_misfit(same, "model.iha_collapse=per_head", "model.iha_collapse");
    check_misfit(same, "model.num_hidden_layers=2", "model.num_hidden_layers is 2 and was 1");
    check_misfit(same, "model.num_key_value_heads=1", "model.num_key_value_heads is 1 and was");
    check_misfit(same, "model.qk_norm=rmsnorm", "model.qk_norm is rmsnorm and was none");
    check_misfit(same, "model.qkv_bias=true", "model.qkv_bias is true and was false");
    check_misfit("model.position_embedding=learned", "model.position_embedding=none",
                 "model.position_embedding");
    struct model_comparison c;
    static struct config then, now;
    EACH(both, "model.norm=layernorm", "model.bias=true", "model.head_dim=6");
    load_config(&then, 0, NULL);
    load_config(&now, both_count, both);
    config_compare(&then.model, &now.model, T, &c);
    assert_non_null(strstr(c.misfits, "model.norm"));
    assert_non_null(strstr(c.misfits, "model.bias"));
    assert_non_null(strstr(c.misfits, "model.head_dim"));
}

static void mha_becomes_folded(void **state) {
    (void)state;
    EACH(sources, "model.layer_pattern=mha_global", "model.layer_pattern=mha_local");
    EACH(kinds, "model.layer_pattern=folded_global", "model.layer_pattern=folded_local");
    EACH(windows, "model.local_window=3", "model.local_window=8");
    EACH(alphas, "model.init_alpha=identity", "model.init_alpha=noise");
    preserved = changed = 0;
    for (int i = 0; i < 32; i++) {
        const char *then[] = {sources[i & 1], windows[i >> 1 & 1]};
        const char *now[] = {kinds[i >> 2 & 1], windows[i >> 3 & 1], alphas[i >> 4 & 1]};
        check(2, then, 3, now);
    }
    assert_true(preserved > 0 && changed > preserved);
}

static void mixing_is_not_lost_in_silence(void **state) {
    (void)state;
    EACH(kinds, "model.layer_pattern=mha_global", "model.layer_pattern=iha_global",
         "model.layer_pattern=folded_global");
    for (int i = 0; i < kinds_count; i++)
        for (int j = 0; j < kinds_count; j++) {
            static struct config then, now;
            struct model_comparison c;
            load_config(&then, 1, &kinds[i]);
            load_config(&now, 1, &kinds[j]);
            config_compare(&then.model, &now.model, T, &c);
            bool lost = i > 0 && i != j;
            assert_int_equal(lost, c.misfits[0] != 0);
            if (lost)
                assert_non_null(strstr(c.misfits, i == 1 ? "whose alpha and collapse would be lost"
                                                         : "whose alpha would be lost"));
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mha_becomes_folded), cmocka_unit_test(mixing_is_not_lost_in_silence),
        cmocka_unit_test(mha_becomes_iha),    cmocka_unit_test(other_starts),
        cmocka_unit_test(iha_and_mha_stay),   cmocka_unit_test(misfits_are_named),
        cmocka_unit_test(grouped_heads),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
