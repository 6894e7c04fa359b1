/* `info --launches`: the kernels of a step against counts by hand of a small layer, in u = N C 2 bytes. */
#define FIXTURE_THREADS 1
#include "model/info/estimate.h"
#include "model/info/info_launches.h"
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"

/* N = 96 tokens, C = H d = 24, F = 4 C. */
enum { C = 24, F = 4 * C };

static struct launches launches;

/* Two layers, of which the second has a residual to add. */
static struct config config_of(struct model_config model, int passes) {
    return (struct config){.model = model,
                           .train = {.seq_len = TOKENS,
                                     .micro_batch = BATCH,
                                     .batch_tokens = (int64_t)ROWS * passes,
                                     .total_steps = 10,
                                     .mix_lr_scale = 1}};
}

static struct model_config two_layers(enum layer_type type) {
    struct model_config m = plain_config();
    m.num_hidden_layers = 2;
    m.layer_types[0] = m.layer_types[1] = type;
    m.intermediate_size = F;
    return m;
}

/* Layernorm, biases, learned positions: as in GPT-2. */
static struct model_config gpt2_layers(void) {
    struct model_config m = two_layers(LAYER_MHA_GLOBAL);
    m.norm = NORM_LAYERNORM;
    m.bias = true;
    m.position_embedding = POSITION_LEARNED;
    return m;
}

static struct run_estimate run(struct model_config model, int passes) {
    struct estimate_options o = {.gpu = gpu_spec("h200"),
                                 .link = link_spec("nvlink"),
                                 .ranks = 1,
                                 .precision = DEVICE_BF16,
                                 .launched = launches_add,
                                 .context = &launches};
    static struct config c;
    struct run_estimate p;
    struct error e = {0};
    c = config_of(model, passes);
    launches = (struct launches){.model = &c.model};
    if (estimate_run(&p, &c, &o, &e) != 0)
        fail_msg("%s", e.text);
    assert_false(launches.full);
    return p;
}

static const double UNIT = ROWS * C * 2.0,
                    SUMS = 2 * C * 4.0 / (ROWS * C * 2.0); /* SUMS: [C] fp32 read and written */

struct hand_count {
    const char *phase, *op;
    double units; /* of each */
    int64_t count;
};

/* Everything of one layer type but products and attention, in any order. */
static void expect_rows(enum layer_type type, const struct hand_count *want, int count) {
    int seen = 0;
    for (int i = 0; i < launches.count; i++) {
        const struct estimate_launch *l = &launches.rows[i].launch;
        if (launches.rows[i].type != type || l->rows > 0 || l->part == ESTIMATE_ATTENTION)
            continue;
        bool found = false;
        for (int j = 0; j < count; j++)
            found |= strcmp(l->phase, want[j].phase) == 0 && strcmp(l->op, want[j].op) == 0 &&
                     l->bytes == want[j].units * UNIT && launches.rows[i].count == want[j].count;
        if (!found)
            fail_msg("%s: %lld x %s of %g u are not in the counts by hand", l->phase,
                     (long long)launches.rows[i].count, l->op, l->bytes / UNIT);
        seen++;
    }
    assert_int_equal(seen, count);
}

/* One product [n, out] = [n, in] W^T: itself and its two gradients. */
static double product_bytes(double in, double out) {
    return 2 * 2 * (ROWS * in + in * out + ROWS * out) + 2 * (ROWS * in + ROWS * out) + 4 * in * out;
}

static void expect_layer(const struct launch_sums *layer, double units, int64_t others,
                         double attention_flops) {
    const double weights = 4 * C * C + 2 * C * F;
    assert_true(layer->bytes[LAUNCH_OTHER] == units * UNIT);
    assert_int_equal(layer->count[LAUNCH_OTHER], others);
    assert_int_equal(layer->count[LAUNCH_PRODUCT], 3 * 4);
    assert_true(layer->flops[LAUNCH_PRODUCT] == 6 * ROWS * weights);
    /* up also writes act, and the product that gives du reads up */
    assert_true(layer->bytes[LAUNCH_PRODUCT] == product_bytes(C, 3 * C) + product_bytes(C, C) +
                                                    product_bytes(C, F) + product_bytes(F, C) +
                                                    2 * 2 * ROWS * F);
    assert_int_equal(layer->count[LAUNCH_ATTENTION], 2);
    assert_true(layer->flops[LAUNCH_ATTENTION] == attention_flops);
}

/* GPT-2's layer moves 23 u beside its products and attention: 8 forward, 15 backward. Were GELU a pass of its
 * own, it would be 8 more forward (u in and act out, of 4 u each) and 12 more backward. */
static void a_layer_of_gpt2(void **state) {
    static const struct hand_count want[] = {
        {"forward", "residual_norm", 2, 1},           /* x, y: the first layer has nothing to add */
        {"forward", "residual_norm", 4, 3},           /* x, delta, their sum, y */
        {"backward", "residual_norm_backward", 4, 4}, /* dy, x, dx in and out */
        {"backward", "linear_backward", SUMS, 2},     /* column sums for the bias of out, from the norm */
        {"backward", "act_linear_backward", SUMS, 2}, /* of down */
        {"backward", "linear_backward", 4, 2},        /* of up: a pass, or beside dW */
        {"backward", "linear_backward", 3, 2},        /* of qkv */
    };
    (void)state;
    run(gpt2_layers(), 1);
    expect_rows(LAYER_MHA_GLOBAL, want, sizeof want / sizeof *want);
    /* 24 * 25 / 2 pairs a sequence and head: two products forward, five backward */
    expect_layer(&launches.layers[1], 23 + 2 * SUMS, 8, 7 * 2.0 * BATCH * C * (TOKENS * (TOKENS + 1) / 2));
    assert_true(launches.layers[0].bytes[LAUNCH_OTHER] == (21 + 2 * SUMS) * UNIT);
}

/* An IHA layer with P = 4, rmsnorm and no biases moves 63 u. */
static void an_iha_layer(void **state) {
    static const struct hand_count want[] = {
        {"forward", "residual_norm", 2, 1},      {"forward", "residual_norm", 4, 3},
        {"forward", "qkv_mix", 15, 2}, /* q, k, v in; P times as much out */
        {"forward", "collapse", 5, 2},           {"backward", "residual_norm_backward", 4, 4},
        {"backward", "collapse_backward", 9, 2}, /* dout; o and d_o of P u */
        {"backward", "qkv_mix_backward", 18, 2}, /* qkv and dqkv; dq, dk, dv of P u */
    };
    struct model_config m = two_layers(LAYER_IHA_GLOBAL);
    (void)state;
    m.num_pseudo_heads = 4;
    run(m, 1);
    expect_rows(LAYER_IHA_GLOBAL, want, sizeof want / sizeof *want);
    expect_layer(&launches.layers[1], 63, 8, 7 * 2.0 * BATCH * C * (4 * TOKENS * (4 * TOKENS + 1) / 2));
}

/* The second pass repeats the kernels of the first, but adds to gradients of weights. */
static void passes_are_added_up(void **state) {
    (void)state;
    run(gpt2_layers(), 1);
    struct launch_sums one = launches.layers[1];
    run(gpt2_layers(), 2);
    const struct launch_sums *two = &launches.layers[1];
    for (int kind = 0; kind < LAUNCH_KINDS; kind++) {
        assert_int_equal(two->count[kind], 2 * one.count[kind]);
        assert_true(two->flops[kind] == 2 * one.flops[kind]);
    }
    assert_true(two->bytes[LAUNCH_OTHER] ==
                2 * one.bytes[LAUNCH_OTHER] + 4.0 * 2 * C); /* biases of out and down */
    assert_true(two->bytes[LAUNCH_PRODUCT] == 2 * one.bytes[LAUNCH_PRODUCT] + 4.0 * (4 * C * C + 2 * C * F));
}

/* Kernels and bytes are those of the estimate, inside of layers and outside. */
static void nothing_is_missing(void **state) {
    struct model_config models[] = {plain_config(), other_config(), gpt2_layers()};
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct run_estimate p = run(models[i], 3);
        double bytes = 0, all = 0;
        int64_t count = 0, rows = 0;
        for (int layer = -1; layer < models[i].num_hidden_layers; layer++) {
            const struct launch_sums *s = layer < 0 ? &launches.outside : &launches.layers[layer];
            for (int kind = 0; kind < LAUNCH_KINDS; kind++) {
                bytes += s->bytes[kind];
                count += s->count[kind];
            }
        }
        for (int part = 0; part < ESTIMATE_PARTS; part++)
            all += p.step.bytes[part];
        for (int row = 0; row < launches.count; row++)
            rows += launches.rows[row].count;
        assert_int_equal(count, p.step.launches);
        assert_int_equal(rows, p.step.launches);
        assert_true(fabs(bytes - all) <= 1e-12 * all);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_layer_of_gpt2),
        cmocka_unit_test(an_iha_layer),
        cmocka_unit_test(passes_are_added_up),
        cmocka_unit_test(nothing_is_missing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
