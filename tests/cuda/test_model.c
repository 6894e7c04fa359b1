/* Whole models on the CUDA backend: losses and gradients against the CPU backend, recomputation, segments, and
 * steps whose bits do not depend on the order in which threads and blocks run. */
#include "tests/cuda/fixture.h"

#include "kernels/estimate/estimate.h"
#include "model/model.h"
#include "model/state_dict.h"
#include "tests/lib/model_configs.h"
#include "tests/lib/segments.h"

enum { SEED = 3 };

static int32_t TOKENS_IN[ROWS], TARGETS[ROWS], SEGMENTS[2 * ROWS];

/* What models are made for: SEGMENTS, and positions that begin again in each of them. */
static bool segmented, restarting;

static void fill_tokens(void) {
    for (int i = 0; i < ROWS; i++) {
        TOKENS_IN[i] = (int32_t)((fixture_noise() + 1) / 2 * VOCAB);
        TARGETS[i] = i % 7 == 5 ? -1 : (int32_t)((fixture_noise() + 1) / 2 * VOCAB);
    }
}

/* A model with the same initial values on every backend, rounded to the type under test. */
static void make(struct model *m, struct backends *k, struct backend *b, struct model_config config,
                 enum recompute recompute) {
    struct error e = {0};
    struct model_options options = {.shape = {BATCH, TOKENS, recompute, true, segmented, restarting},
                                    .weight_decay = 0.1,
                                    .mix_lr_scale = 1};
    if (model_create(m, &config, b->k, b->dev, &options, &e) != 0 || model_initialize(m, SEED, &e) != 0)
        fail_msg("%s", e.text);
    for (int i = 0; i < m->params.count; i++) {
        float *values = malloc((size_t)m->params.list[i].count * sizeof *values);
        model_get_param(m, i, values);
        for (int64_t j = 0; j < m->params.list[i].count; j++)
            values[j] = (float)round_to(k->compute, (double)values[j]);
        model_set_param(m, i, values, 0);
        free(values);
    }
}

static struct batch batch(void) {
    return (struct batch){TOKENS_IN, TARGETS, segmented ? SEGMENTS : NULL};
}

static double pass(struct model *m, bool accumulate) {
    struct step_state state;
    if (!accumulate)
        m->k->step_begin(m->dev, m->state, 0, 0.01);
    model_forward_backward(m, batch(), 1.0 / ROWS, accumulate, NULL, NULL);
    m->k->step_read(m->dev, m->state, &state);
    return state.loss;
}

static double *gradient(struct model *m, int index) {
    tensor g = model_gradient(m, index);
    double *values = malloc((size_t)tensor_count(g) * sizeof *values);
    m->k->download(m->dev, g, values, DTYPE_F64);
    return values;
}

/* bf16 has no plain computation to compare a whole model with. What a layer stores between operations, some
 * 20 tensors forward and back, is rounded once each, and independent errors add as their squares do. */
static double bf16_error(const struct model *m) {
    return FACTOR * sqrt(20.0 * (double)m->config.num_hidden_layers) * 0x1p-9;
}

/* Two passes, the second added to the first. */
static void check_gradients(enum device_precision precision, struct model_config config) {
    struct backends *k = backends(precision);
    struct model m[BACKENDS];
    double loss[BACKENDS];
    EACH(k, b) {
        make(&m[b->which], k, b, config, RECOMPUTE_NONE);
        pass(&m[b->which], false);
        loss[b->which] = pass(&m[b->which], true);
    }
    if (precision == DEVICE_FP32)
        expect_close_values("model", "loss", DTYPE_F32, &loss[CUDA], &loss[PLAIN], &loss[EXACT], 1);
    else
        assert_true(fabs(loss[CUDA] - loss[EXACT]) < bf16_error(&m[CUDA]) * loss[EXACT]);
    for (int i = 0; i < m[CUDA].params.count; i++) {
        int64_t n = m[CUDA].params.list[i].count;
        double *g[BACKENDS], *zero = calloc((size_t)n, sizeof *zero);
        for (int b = 0; b < BACKENDS; b++)
            g[b] = gradient(&m[b], i);
        /* A layer's lambda is one number, whose rounding may be small in the plain computation by chance:
         * test_diff_combine.c compares it over several draws. */
        if (strstr(m[CUDA].params.list[i].name, "lambda_")) {
            assert_true(isfinite(g[CUDA][0]));
        } else if (precision == DEVICE_FP32) {
            expect_close_values("model", m[CUDA].params.list[i].name, DTYPE_F32, g[CUDA], g[PLAIN], g[EXACT],
                                n);
        } else {
            double error = deviation(g[CUDA], g[EXACT], n).norm, norm = deviation(g[EXACT], zero, n).norm;
            if (!(error < bf16_error(&m[CUDA]) * norm))
                fail_msg("gradient of %s: error %.3g, norm %.3g", m[CUDA].params.list[i].name, error, norm);
        }
        for (int b = 0; b < BACKENDS; b++)
            free(g[b]);
        free(zero);
    }
    for (int b = 0; b < BACKENDS; b++)
        model_free(&m[b]);
    done(k);
}

static void gradients_fp32(void **state) {
    (void)state;
    emulator_seed(2);
    check_gradients(DEVICE_FP32, plain_config());
    emulator_seed(3);
    check_gradients(DEVICE_FP32, other_config());
}

static void gradients_bf16(void **state) {
    (void)state;
    emulator_seed(4);
    check_gradients(DEVICE_BF16, plain_config());
    emulator_seed(5);
    check_gradients(DEVICE_BF16, other_config());
}

/* Without biases swiglu's up and gate are one matrix product. */
static struct model_config gated_config(void) {
    struct model_config c = plain_config();
    c.activation = ACTIVATION_SWIGLU;
    return c;
}

static void gradients_of_one_product(void **state) {
    (void)state;
    emulator_seed(9);
    check_gradients(DEVICE_FP32, gated_config());
    check_gradients(DEVICE_BF16, gated_config());
}

/* Differential layers: pairs of heads, seen through views. */
static struct model_config differential_config(void) {
    struct model_config c = plain_config();
    c.num_hidden_layers = 2;
    c.num_attention_heads = 4;
    c.layer_types[0] = LAYER_DIFF_LOCAL;
    c.layer_types[1] = LAYER_DIFF_GLOBAL;
    return c;
}

static void gradients_of_differential_layers(void **state) {
    (void)state;
    emulator_seed(6);
    check_gradients(DEVICE_FP32, differential_config());
    check_gradients(DEVICE_BF16, differential_config());
}

/* Talking heads, and attention to pairs of keys. */
static struct model_config compared_config(void) {
    struct model_config c = plain_config();
    c.num_hidden_layers = 3;
    c.layer_types[0] = LAYER_TALKING_LOCAL;
    c.layer_types[1] = LAYER_SIMPLICIAL_LOCAL;
    c.layer_types[2] = LAYER_TALKING_GLOBAL;
    return c;
}

static void gradients_of_compared_layers(void **state) {
    (void)state;
    emulator_seed(10);
    check_gradients(DEVICE_FP32, compared_config());
    check_gradients(DEVICE_BF16, compared_config());
}

/* What pads the vocabulary is zero wherever the flat buffer's layout has it. */
static void check_padded_rows(const struct model *m) {
    const struct param *p = &m->params.list[m->params.lm_head];
    int64_t first = p->offset + p->count, n = p->padded_rows * p->shape[1] - p->count;
    int64_t moments = m->partition.moment_elements;
    tensor padded[] = {flat_range(m->values, m->dtypes.compute, first, n),
                       flat_range(m->master_weights, m->dtypes.master, first, n),
                       flat_range(m->gradients, m->dtypes.gradient, first, n),
                       flat_range(m->moments, m->dtypes.master, first, n),
                       flat_range(m->moments, m->dtypes.master, moments + first, n)};
    double *values = malloc((size_t)n * sizeof *values);
    assert_true(n > 0);
    for (int i = 0; i < 5; i++) {
        m->k->download(m->dev, padded[i], values, DTYPE_F64);
        for (int64_t j = 0; j < n; j++)
            assert_true(values[j] == 0);
    }
    free(values);
}

/* A step of training; returns the parameters. */
static float *train(enum device_precision precision, struct model_config config, enum recompute recompute,
                    int steps, int64_t *count, double *losses) {
    struct backends *k = backends(precision);
    struct model m;
    make(&m, k, &k->each[CUDA], config, recompute);
    for (int step = 0; step < steps; step++) {
        losses[step] = pass(&m, false);
        struct update_hyper hyper = {
            .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .grad_clip = 1, .tokens = ROWS};
        model_update(&m, &hyper);
    }
    *count = m.params.elements;
    float *values = calloc((size_t)m.params.elements, sizeof *values);
    for (int i = 0; i < m.params.count; i++)
        model_get_param(&m, i, values + m.params.list[i].offset);
    check_padded_rows(&m);
    model_free(&m);
    done(k);
    return values;
}

/* The same bits for every order of threads and blocks, and whatever is recomputed; and the loss falls. */
static void check_bits(enum device_precision precision, struct model_config config) {
    enum { STEPS = 3 };
    int64_t count;
    double losses[STEPS], again[STEPS];
    emulator_seed(0);
    float *first = train(precision, config, RECOMPUTE_NONE, STEPS, &count, losses);
    assert_true(losses[STEPS - 1] < losses[0]);
    for (int recompute = RECOMPUTE_NONE; recompute <= RECOMPUTE_FULL; recompute++) {
        emulator_seed(6 + (uint64_t)recompute);
        float *values = train(precision, config, (enum recompute)recompute, STEPS, &count, again);
        assert_memory_equal(losses, again, sizeof losses);
        assert_memory_equal(first, values, (size_t)count * sizeof *values);
        free(values);
    }
    free(first);
}

static void bits_fp32(void **state) {
    (void)state;
    check_bits(DEVICE_FP32, other_config());
}

static void bits_bf16(void **state) {
    (void)state;
    check_bits(DEVICE_BF16, plain_config());
    check_bits(DEVICE_BF16, gated_config());
    check_bits(DEVICE_BF16, compared_config());
}

/* ---- segments ---- */

static void segments_open(bool restart) {
    static const int64_t lengths[SEGMENT_LENGTHS] = {5, 1, 9, 3};
    fill_segments(lengths, BATCH, TOKENS, SEGMENTS);
    segmented = true;
    restarting = restart;
}

static void segments_close(void) {
    segmented = restarting = false;
}

static void gradients_of_segments(void **state) {
    (void)state;
    for (int restart = 0; restart < 2; restart++) {
        segments_open(restart);
        emulator_seed(7 + (uint64_t)restart);
        check_gradients(restart ? DEVICE_BF16 : DEVICE_FP32, plain_config());
        check_gradients(restart ? DEVICE_FP32 : DEVICE_BF16, other_config());
        check_gradients(restart ? DEVICE_FP32 : DEVICE_BF16, plain_config());
        segments_close();
    }
}

static void bits_of_segments(void **state) {
    (void)state;
    segments_open(true);
    check_bits(DEVICE_BF16, other_config());
    segments_close();
}

enum { SHRINKING_STEPS = 4, MOST = 1 << 18 /* parameters */ };

/* Steps whose batches have more and more segments, and fewer and fewer targets that count. */
static void train_shrinking(bool graphs, double *losses, float *values) {
    struct device_options options = {
        .threads = 1, .precision = DEVICE_BF16, .deterministic = true, .graphs = graphs};
    struct model_config config = other_config();
    const struct kernels *k = kernels_cuda();
    struct error e = {0};
    struct model m;
    struct device *dev = k->open(&options, &e);
    struct model_options shape = {
        .shape = {BATCH, TOKENS, RECOMPUTE_NONE, true, true, true}, .weight_decay = 0.1, .mix_lr_scale = 1};
    int64_t launches = emulator_graph_launches();
    if (!dev || model_create(&m, &config, k, dev, &shape, &e) != 0 || model_initialize(&m, SEED, &e) != 0)
        fail_msg("%s", e.text);
    for (int step = 0; step < SHRINKING_STEPS; step++) {
        const int64_t lengths[SEGMENT_LENGTHS] = {step == 0 ? TOKENS : 13 / step, step + 1};
        int32_t targets[ROWS], counted = 0;
        fill_segments(lengths, BATCH, TOKENS, SEGMENTS);
        for (int i = 0; i < ROWS; i++) {
            targets[i] = i % (step + 1) == 0 ? TARGETS[i] : -1;
            counted += targets[i] >= 0;
        }
        struct step_state state;
        k->step_begin(dev, m.state, step, 0.01);
        for (int pass = 0; pass < 2; pass++)
            model_train_pass(&m, (struct batch){TOKENS_IN, targets, SEGMENTS}, 0.5 / ROWS, pass, 2);
        model_update(&m, &(struct update_hyper){0.9, 0.95, 1e-8, 1, 0, 2 * ROWS, 0});
        k->step_read(dev, m.state, &state);
        assert_true(state.targets == 2 * counted);
        losses[step] = state.loss;
    }
    model_await_params(&m);
    assert_true(m.params.elements <= MOST);
    for (int i = 0; i < m.params.count; i++)
        model_get_param(&m, i, values + m.params.list[i].offset);
    assert_true(emulator_on_gpu() || (emulator_graph_launches() > launches) == graphs);
    model_free(&m);
    k->close(dev);
}

/* A graph holds neither the bounds of segments nor how many targets count. */
static void graphs_of_segments(void **state) {
    (void)state;
    double losses[2][SHRINKING_STEPS] = {{0}};
    float *values[2];
    for (int graphs = 0; graphs < 2; graphs++) {
        values[graphs] = calloc(MOST, sizeof(float));
        train_shrinking(graphs, losses[graphs], values[graphs]);
    }
    assert_memory_equal(losses[0], losses[1], sizeof losses[0]);
    assert_memory_equal(values[0], values[1], MOST * sizeof(float));
    free(values[0]);
    free(values[1]);
}

/* `info --gpus` counts memory without a GPU: the same bytes, but for scratch, which depends on the chip. */
static void estimated_memory_is_the_same(void **state) {
    (void)state;
    struct estimate_options o = {
        .gpu = gpu_spec("h200"), .link = link_spec("nvlink"), .ranks = 4, .deterministic = true};
    struct pass_shape shape = {BATCH, TOKENS, RECOMPUTE_NONE, true, false, false, false};
    struct model_config configs[] = {plain_config(), other_config()};
    struct error e = {0};
    for (int i = 0; i < 2 * 2 * 3; i++) {
        o.precision = i % 2 ? DEVICE_BF16 : DEVICE_FP32;
        shape.recompute = (enum recompute)(i / 4);
        shape.segments = shape.restart_positions = i % 3 == 0;
        struct backends *k = backends(o.precision);
        struct backend *b = &k->each[CUDA];
        struct device *dev = estimate_open(&o, &e);
        struct memory_plan cuda, estimate;
        for (int wire = DTYPE_F32; wire <= DTYPE_BF16; wire++) {
            enum dtype t = (enum dtype)wire;
            struct model_config *c = &configs[i / 2 % 2];
            if (t != DTYPE_F32 && t != DTYPE_BF16)
                continue;
            assert_int_equal(model_memory(c, b->k, b->dev, &shape, 4, 1, t, &cuda, &e), 0);
            assert_int_equal(model_memory(c, kernels_estimate(), dev, &shape, 4, 1, t, &estimate, &e), 0);
            estimate.workspace = cuda.workspace;
            assert_memory_equal(&estimate, &cuda, sizeof cuda);
        }
        kernels_estimate()->close(dev);
        done(k);
    }
}

int main(void) {
    fill_tokens();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_fp32),
        cmocka_unit_test(gradients_bf16),
        cmocka_unit_test(gradients_of_one_product),
        cmocka_unit_test(gradients_of_differential_layers),
        cmocka_unit_test(gradients_of_compared_layers),
        cmocka_unit_test(bits_fp32),
        cmocka_unit_test(bits_bf16),
        cmocka_unit_test(gradients_of_segments),
        cmocka_unit_test(bits_of_segments),
        cmocka_unit_test(graphs_of_segments),
        cmocka_unit_test(estimated_memory_is_the_same),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
