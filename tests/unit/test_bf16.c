/* The CPU backend in bf16: every operation and whole models by the rule of tests/cuda/fixture.h, with this
 * backend in the place of the GPU's, and the optimizer's rounding to the bit.
 *
 * A model's plain computation is the fp32 backend with what operations write rounded (tests/lib/rounded.h). */
#define TESTED_KERNELS tested_kernels
#include "kernels/kernels.h"
const struct kernels *tested_kernels(void);
#include "tests/cuda/classifier_check.h"
#include "tests/cuda/muon_check.h"
#include "tests/cuda/qkv_mix_check.h"

#include "kernels/cpu/cpu.h"
#include "model/model.h"
#include "model/state_dict.h"
#include "tests/lib/model_configs.h"
#include "tests/lib/rounded.h"

/* fixture.h is for the emulator of GPUs, which is not here. */
void emulator_seed(uint64_t seed) {
    (void)seed;
}

int emulator_allocations(void) {
    return 0;
}

/* ---- with and without vdpbf16ps ---- */

static bool with_pairs;

static struct device *open_tested(const struct device_options *options, struct error *e) {
    struct device *dev = kernels_cpu_bf16()->open(options, e);
    if (dev)
        dev->uses_pairs = with_pairs;
    return dev;
}

/* Attention and mixing do what `with_pairs` says, rather than what is faster here. */
const struct kernels *tested_kernels(void) {
    static struct kernels k;
    k = *kernels_cpu_bf16();
    k.open = open_tested;
    return &k;
}

static int choose_pairs(void **unused) {
    (void)unused;
    with_pairs = true;
    return 0;
}

static int choose_conversion(void **unused) {
    (void)unused;
    with_pairs = false;
    return 0;
}

/* ---- operations ---- */

/* Forward and backward; between them the plain computation stores in bf16 what forward has written. */
static void run_once(struct op_run *r) {
    EACH(r->k, b) {
        run_forward(r, b, NULL);
        for (int i = 0; i < OP_OPERANDS && b->which == PLAIN; i++)
            if (r->info[i].name && r->info[i].type == TYPE_COMPUTE && r->info[i].touched & FORWARD_WRITES &&
                run_gap(r, i) == 0)
                round_plain(r->k, r->x[i]);
        run_backward(r, b, NULL);
    }
}

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_once(&r);
    for (int draw = 1; draw < run_draws(&r); draw++) {
        run_collect(&r);
        run_draw(&r);
        run_once(&r);
    }
    run_expect_close(&r);
    done(r.k);
}

/* With vdpbf16ps what was rotated back is rounded, as on a GPU. */
static void check_paired_mix(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_mix(&r, c->spec.qkv_mix.head_dim % 2 == 0);
    run_expect_close(&r);
    done(r.k);
}

static void check_attention_case(const struct op_case *c, void *context) {
    fixture_seed = ++*(uint64_t *)context;
    check(DEVICE_BF16, c);
}

/* dq and dk are small differences of larger sums; the cases of the gradients' test are few enough elements
 * that their plain error may be less by chance. */
static void attention(void **state) {
    (void)state;
    uint64_t number = 0;
    assert_true(op_cases_run(OP_ATTENTION, GRADIENT | COMPARE, check_attention_case, &number) > 0);
    assert_true(op_cases_run(OP_TALKING, GRADIENT, check_attention_case, &number) > 0);
    assert_true(op_cases_run(OP_SIMPLICIAL, GRADIENT, check_attention_case, &number) > 0);
}

/* Several tiles, and of one head several units: whole blocks of products, and what is left over at every edge. */
static void attention_of_several_tiles(void **state) {
    (void)state;
    static const struct op_case cases[] = {{COMPARE, ATTENTION_CASE(1, 200, 2, 64, 2, true, false, 0, 0)},
                                           {COMPARE, ATTENTION_CASE(1, 330, 1, 64, 2, true, false, 90, 0)},
                                           {COMPARE, ATTENTION_CASE(1, 197, 2, 20, 1, false, false, 0, 0)},
                                           {COMPARE, ATTENTION_CASE(1, 203, 1, 48, 1, true, false, 0, 0)},
                                           {COMPARE, ATTENTION_CASE(1, 150, 1, 96, 3, true, true, 0, 0)},
                                           {COMPARE, ATTENTION_CASE(2, 129, 1, 16, 1, true, false, 0, 0)}};
    uint64_t number = 100;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_attention_case(&cases[i], &number);
}

/* Passes over a ring of keys that wraps. */
static void decode(void **state) {
    (void)state;
    enum { B = 2, N = 3, H = 2, D = 20, WINDOW = 5, CAPACITY = WINDOW + N };
    struct backends *k = backends(DEVICE_BF16);
    struct attention_spec s = {B, N, H, D, 1, true, false, WINDOW, 0.3, false, 0, false};
    struct operand cache_k = input(k, DTYPE_BF16, B, CAPACITY, H, D, 0),
                   cache_v = input(k, DTYPE_BF16, B, CAPACITY, H, D, 0);
    plan(k, (struct op_spec){.kind = OP_DECODE, .attention = s});
    for (int64_t first = 0; first < 5 * N; first += N) {
        struct operand q = input(k, DTYPE_BF16, B, N, H, D, 0), key = input(k, DTYPE_BF16, B, N, H, D, 0),
                       v = input(k, DTYPE_BF16, B, N, H, D, 0), o = output(k, DTYPE_BF16, B, N, H, D, 0);
        EACH(k, b)
        b->k->attention_decode(b->dev, &s, on(q, b), on(key, b), on(v, b), on(cache_k, b), on(cache_v, b),
                               first, on(o, b));
        expect_close("attention_decode", "o", k, o);
    }
    done(k);
}

/* ---- conversion ---- */

/* Every bf16 value survives an upload in fp32 and a download; what lies between is rounded to nearest. */
static void conversion(void **state) {
    (void)state;
    enum { ALL = 1 << 16 };
    static float values[ALL], back[ALL];
    struct backends *k = backends(DEVICE_BF16);
    struct backend *b = &k->each[CUDA];
    struct operand x = output(k, DTYPE_BF16, ALL, 0, 0, 0, 0);
    for (int between = 0; between < 2; between++) {
        for (uint32_t i = 0; i < ALL; i++) {
            uint32_t bits = i << 16 | (between ? 0x9fff : 0);
            memcpy(&values[i], &bits, sizeof bits);
        }
        b->k->upload(b->dev, on(x, b), values, DTYPE_F32);
        b->k->download(b->dev, on(x, b), back, DTYPE_F32);
        for (int i = 0; i < ALL; i++)
            if (isnan(values[i]))
                assert_true(isnan(back[i]));
            else
                assert_true(back[i] == bf16_of(values[i]));
    }
    done(k);
}

/* ---- the optimizer ---- */

/* Parameters are the masters, rounded by the hash of rounding.h, which the CUDA backend uses as well; masters
 * and moments are those of the fp32 backend. */
static void adamw(void **unused) {
    (void)unused;
    enum { COUNT = 1003, SECOND = 500, STEPS = 3 };
    static const int64_t index[] = {12345, 99999 /* the second group's is apart, as behind padding */};
    struct backends *k = backends(DEVICE_BF16);
    struct operand master = input(k, DTYPE_F32, COUNT, 0, 0, 0, 0),
                   p = output(k, DTYPE_BF16, COUNT, 0, 0, 0, 0), g = input(k, DTYPE_F32, COUNT, 0, 0, 0, 0),
                   m = scaled_input(k, DTYPE_F32, 0, 0, COUNT, 0, 0, 0, 0),
                   v = scaled_input(k, DTYPE_F32, 0, 0, COUNT, 0, 0, 0, 0);
    struct param_group groups[] = {{0, SECOND, 1, 0.1f, 0, index[0]}, {SECOND, COUNT, 2, 0, 0, index[1]}};
    struct adamw_hyper hyper = {0.9, 0.95, 1e-8};
    double *masters[BACKENDS];
    EACH(k, b) {
        struct step_state state = {.factor = 0.5, .lr = 0.01},
                          *on_device = b->k->alloc(b->dev, sizeof state, NULL);
        for (state.history.updates = 1; state.history.updates <= STEPS; state.history.updates++) {
            b->k->step_write(b->dev, on_device, &state);
            b->k->adamw(b->dev, &hyper, groups, 2, on(master, b), b->which == CUDA ? on(p, b) : tensor_none(),
                        on(g, b), on(m, b), on(v, b), on_device);
        }
        b->k->release(b->dev, on_device);
        masters[b->which] = values_on(b, master);
    }
    double *values = values_on(&k->each[CUDA], p);
    for (int i = 0; i < COUNT; i++) {
        int64_t at = i < SECOND ? index[0] + i : index[1] + i - SECOND;
        assert_true(masters[CUDA][i] == masters[PLAIN][i]);
        assert_true(values[i] ==
                    (double)from_bf16(round_stochastic((float)masters[CUDA][i], STEPS, (uint64_t)at)));
    }
    free(values);
    for (int i = 0; i < BACKENDS; i++)
        free(masters[i]);
    done(k);
}

/* Sides of one and of two blocks of rows of a symmetric product. */
static void muon(void **unused) {
    (void)unused;
    static const int64_t shapes[][2] = {{1, 9},  {16, 40},   {40, 16},  {24, 24},
                                        {7, 13}, {200, 210}, {210, 200}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        fixture_seed = i + 1;
        check_orthogonalize(DEVICE_BF16, shapes[i][0], shapes[i][1], i == 3 ? 1e-25 : 1);
    }
    for (int skip = 0; skip < 2; skip++) {
        check_muon(DEVICE_BF16, 0, 64, 0, skip);
        check_muon(DEVICE_BF16, 3, 77, 5, skip);
    }
}

/* ---- whole models ---- */

struct side {
    const struct kernels *k;
    struct device *dev;
    struct model m;
    double loss;
};

static void open_side(struct side *s, const struct kernels *k, enum device_precision precision,
                      const struct model_config *c, enum recompute recompute) {
    struct error e = {0};
    struct device_options options = {.threads = 2, .precision = precision};
    struct model_options how = {.shape = {BATCH, TOKENS, recompute, true, false, false}, .mix_lr_scale = 1};
    s->k = k;
    s->dev = k->open(&options, &e);
    if (!s->dev || model_create(&s->m, c, k, s->dev, &how, &e) != 0 || model_initialize(&s->m, 1, &e) != 0)
        fail_msg("%s", e.text);
    for (int i = 0; i < s->m.params.count; i++) {
        int64_t n = s->m.params.list[i].count;
        float *values = malloc((size_t)n * sizeof *values);
        params_initial(&s->m.params.list[i], c, 1, values);
        for (int64_t j = 0; j < n; j++)
            values[j] = bf16_of(values[j]); /* all three compute with the same weights */
        model_set_param(&s->m, i, values, 0);
        free(values);
    }
}

static double *gradient_of(struct side *s, int index) {
    tensor g = model_gradient(&s->m, index);
    double *values = malloc((size_t)tensor_count(g) * sizeof *values);
    s->k->download(s->dev, g, values, DTYPE_F64);
    return values;
}

/* Loss and gradients of two passes, the second added to the first. */
static void check_model(struct model_config c, enum recompute recompute) {
    int32_t tokens[ROWS], targets[ROWS];
    static struct side sides[BACKENDS];
    for (int i = 0; i < ROWS; i++) {
        tokens[i] = (int32_t)((fixture_noise() + 1) / 2 * VOCAB);
        targets[i] = i % 7 == 5 ? -1 : (int32_t)((fixture_noise() + 1) / 2 * VOCAB);
    }
    open_side(&sides[CUDA], tested_kernels(), DEVICE_BF16, &c, recompute);
    open_side(&sides[PLAIN], kernels_cpu_rounded(), DEVICE_FP32, &c, RECOMPUTE_NONE);
    open_side(&sides[EXACT], kernels_cpu_double(), DEVICE_FP32, &c, RECOMPUTE_NONE);
    for (struct side *s = sides; s < sides + BACKENDS; s++) {
        struct step_state state;
        s->k->step_begin(s->dev, s->m.state, 0, 0);
        for (int pass = 0; pass < 2; pass++)
            model_forward_backward(&s->m, (struct batch){tokens, targets, NULL}, 1.0 / ROWS, pass > 0, NULL,
                                   NULL);
        s->k->step_read(s->dev, s->m.state, &state);
        s->loss = state.loss;
    }
    expect_close_values("model", "loss", DTYPE_BF16, &sides[CUDA].loss, &sides[PLAIN].loss,
                        &sides[EXACT].loss, 1);
    for (int i = 0; i < sides[EXACT].m.params.count; i++) {
        double *g[BACKENDS];
        for (int b = 0; b < BACKENDS; b++)
            g[b] = gradient_of(&sides[b], i);
        expect_close_values("gradient", sides[EXACT].m.params.list[i].name, DTYPE_F32, g[CUDA], g[PLAIN],
                            g[EXACT], sides[EXACT].m.params.list[i].count);
        for (int b = 0; b < BACKENDS; b++)
            free(g[b]);
    }
    for (struct side *s = sides; s < sides + BACKENDS; s++) {
        model_free(&s->m);
        s->k->close(s->dev);
    }
}

static void models(void **state) {
    (void)state;
    check_model(plain_config(), RECOMPUTE_NONE);
    check_model(other_config(), RECOMPUTE_NONE);
    check_model(other_config(), RECOMPUTE_FULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("embed", OP_EMBED, DEVICE_BF16, check),
        EVERY_CASE("norm", OP_NORM, DEVICE_BF16, check),
        EVERY_CASE("linear", OP_LINEAR, DEVICE_BF16, check),
        EVERY_CASE("qkv_mix", OP_QKV_MIX, DEVICE_BF16, check),
        EVERY_CASE("collapse", OP_COLLAPSE, DEVICE_BF16, check),
        EVERY_CASE("fold", OP_FOLD, DEVICE_BF16, check),
        EVERY_CASE("diff_combine", OP_DIFF_COMBINE, DEVICE_BF16, check),
        EVERY_CASE("qk_norm", OP_QK_NORM, DEVICE_BF16, check),
        EVERY_CASE("mlp_act", OP_ACT, DEVICE_BF16, check),
        EVERY_CASE("classifier", OP_CLASSIFIER, DEVICE_BF16, check_classifier),
        cmocka_unit_test(attention),
        cmocka_unit_test(attention_of_several_tiles),
        cmocka_unit_test(decode),
        cmocka_unit_test(conversion),
        cmocka_unit_test(adamw),
        cmocka_unit_test(muon),
        cmocka_unit_test(models),
    };
    const struct CMUnitTest paired[] = {
        EVERY_CASE("qkv_mix, vdpbf16ps", OP_QKV_MIX, DEVICE_BF16, check_paired_mix),
        EVERY_CASE("collapse, vdpbf16ps", OP_COLLAPSE, DEVICE_BF16, check),
        cmocka_unit_test(attention),
        cmocka_unit_test(attention_of_several_tiles),
        cmocka_unit_test(models),
    };
    int failed = cmocka_run_group_tests(tests, choose_conversion, NULL);
    if (cpu_bf16_has_pairs())
        failed += cmocka_run_group_tests(paired, choose_pairs, NULL);
    else
        print_message("this processor has no vdpbf16ps: not tested with it\n");
    return failed;
}
