/* Whole models on the CUDA backend: losses and gradients against the CPU
 * backend, recomputation, and steps whose bits do not depend on the order in which threads and blocks run. */
#include "tests/cuda/fixture.h"

#include "kernels/estimate/estimate.h"
#include "model/model.h"
#include "model/state_dict.h"
#include "tests/lib/model_configs.h"

enum { SEED = 3 };

static int32_t TOKENS_IN[ROWS], TARGETS[ROWS];

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
    struct model_options options = {
        .shape = {BATCH, TOKENS, recompute, true}, .weight_decay = 0.1, .mix_lr_scale = 1};
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

static double pass(struct model *m, bool accumulate) {
    struct step_state state;
    if (!accumulate)
        m->k->step_begin(m->dev, m->state, 0, 0.01);
    model_forward_backward(m, (struct batch){TOKENS_IN, TARGETS, NULL}, 1.0 / ROWS, accumulate, NULL, NULL);
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
        if (precision == DEVICE_FP32) {
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
}

/* `info --gpus` counts memory without a GPU: the same bytes, but for scratch, which depends on the chip. */
static void estimated_memory_is_the_same(void **state) {
    (void)state;
    struct estimate_options o = {
        .gpu = gpu_spec("h200"), .link = link_spec("nvlink"), .ranks = 4, .deterministic = true};
    struct pass_shape shape = {BATCH, TOKENS, RECOMPUTE_NONE, true, false, false};
    struct model_config configs[] = {plain_config(), other_config()};
    struct error e = {0};
    for (int i = 0; i < 2 * 2 * 3; i++) {
        o.precision = i % 2 ? DEVICE_BF16 : DEVICE_FP32;
        shape.recompute = (enum recompute)(i / 4);
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
        cmocka_unit_test(bits_fp32),
        cmocka_unit_test(bits_bf16),
        cmocka_unit_test(estimated_memory_is_the_same),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
