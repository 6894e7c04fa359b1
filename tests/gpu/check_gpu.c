/* The checks of whole models of `make check-gpu`: the CUDA backend against the CPU backend.
 *
 *  - Loss and every gradient of a model of each layer type, in fp32 and bf16, by the rule of
 *    tests/cuda/fixture.h: the error against the CPU backend in double is at most FACTOR times that of the
 *    plain computation in the same precision (bf16: tests/lib/rounded.h), or a few roundings of the largest
 *    value.
 *  - The same for sequences of several segments.
 *  - A hundred training steps, the losses compared with those of the CPU.
 *  - One-layer models of real sizes in bf16, as CUDA graphs, against the GPU's own fp32 (tests/lib/real_sizes.h).
 *
 * One line a check on stdout, "ok" or "FAIL" first; the exit code is 1 when one failed and 2 without a GPU.
 * --self: the CPU backend instead of a GPU's, to test this program; --devices: print how many GPUs there are.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/model.h"
#include "model/state_dict.h"
#include "tests/lib/real_sizes.h"
#include "tests/lib/rounded.h"
#include "tests/lib/model_configs.h"
#include "tests/lib/segments.h"

/* The CPU backend built in double; the Makefile renames it. */
const struct kernels *kernels_cpu_double(void);

static const double FACTOR = 3;

enum { TESTED, PLAIN, EXACT, SIDES };

/* One model on three backends. */
struct trio {
    const char *name;
    const struct kernels *k[SIDES];
    struct device *dev[SIDES];
    struct model m[SIDES];
    double ulp;     /* half a unit in the last place, relative */
    bool segmented; /* each sequence is several segments */
};

static bool self;
static int failures;

static void die(const struct error *e) {
    fprintf(stderr, "check-gpu: %s\n", e->text);
    exit(e->exit_code ? e->exit_code : EXIT_RUN);
}

static void report(bool ok, const char *name, const char *precision, const char *text) {
    printf("%-4s  %-24s %-4s  %s\n", ok ? "ok" : "FAIL", name, precision, text);
    fflush(stdout);
    failures += !ok;
}

/* ---- three models with the same weights ---- */

static void open_side(struct trio *t, int side, const struct kernels *k, enum device_precision precision,
                      const struct model_config *c, enum recompute recompute) {
    struct error e = {0};
    struct device_options options = {.threads = 1, .precision = precision};
    struct model_options shape = {.shape = {BATCH, TOKENS, recompute, true, t->segmented, t->segmented},
                                  .weight_decay = 0.1,
                                  .mix_lr_scale = 1};
    t->k[side] = k;
    t->dev[side] = k->open(&options, &e);
    if (!t->dev[side] || model_create(&t->m[side], c, k, t->dev[side], &shape, &e) != 0 ||
        model_initialize(&t->m[side], 1, &e) != 0)
        die(&e);
}

/* Weights that bf16 holds, so that all three compute with the same. */
static void round_weights(struct trio *t) {
    for (int i = 0; i < t->m[PLAIN].params.count; i++) {
        int64_t n = t->m[PLAIN].params.list[i].count;
        float *values = malloc((size_t)n * sizeof *values);
        model_get_param(&t->m[PLAIN], i, values);
        for (int64_t j = 0; j < n; j++)
            values[j] = bf16_of(values[j]);
        for (int side = 0; side < SIDES; side++)
            model_set_param(&t->m[side], i, values, 0);
        free(values);
    }
}

static void trio_open(struct trio *t, const char *name, enum device_precision precision,
                      const struct model_config *c, enum recompute recompute, bool segmented) {
    bool bf16 = precision == DEVICE_BF16;
    *t = (struct trio){.name = name, .ulp = bf16 ? 0x1p-9 : 0x1p-24, .segmented = segmented};
    const struct kernels *plain = bf16 ? kernels_cpu_rounded() : kernels_cpu();
    open_side(t, TESTED, self ? plain : kernels_cuda(), self ? DEVICE_FP32 : precision, c, recompute);
    open_side(t, PLAIN, plain, DEVICE_FP32, c, RECOMPUTE_NONE);
    open_side(t, EXACT, kernels_cpu_double(), DEVICE_FP32, c, RECOMPUTE_NONE);
    round_weights(t);
}

static void trio_close(struct trio *t) {
    for (int side = 0; side < SIDES; side++) {
        model_free(&t->m[side]);
        t->k[side]->close(t->dev[side]);
    }
}

/* ---- tokens that follow a rule ---- */

/* Each token follows from the one before, one in eight at random: [BATCH, TOKENS] and the same shifted by
 * one. */
static void draw_tokens(int32_t *tokens, int32_t *targets, uint64_t seed) {
    for (int b = 0; b < BATCH; b++) {
        int32_t at = (int32_t)((seed * 31 + (uint64_t)b * 7) % VOCAB);
        for (int i = 0; i < TOKENS; i++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            tokens[b * TOKENS + i] = at;
            at = seed >> 61 == 0 ? (int32_t)((seed >> 33) % VOCAB) : (at * 7 + 3) % VOCAB;
            targets[b * TOKENS + i] = at;
        }
    }
}

/* ---- loss and gradients ---- */

static double loss_of(struct model *m, const int32_t *tokens, const int32_t *targets) {
    static const int64_t lengths[SEGMENT_LENGTHS] = {5, 1, 9, 3};
    int32_t segments[2 * ROWS];
    struct step_state state;
    fill_segments(lengths, BATCH, TOKENS, segments);
    m->k->step_begin(m->dev, m->state, 0, 0);
    model_forward_backward(m, (struct batch){tokens, targets, m->shape.segments ? segments : NULL},
                           1.0 / ROWS, false, NULL, NULL);
    m->k->step_read(m->dev, m->state, &state);
    return state.loss;
}

struct deviation {
    double norm, largest;
};

static struct deviation deviation(const double *x, const double *from, int64_t n) {
    struct deviation d = {0, 0};
    for (int64_t i = 0; i < n; i++) {
        double error = x[i] - (from ? from[i] : 0);
        d.norm += error * error;
        d.largest = fabs(error) <= d.largest ? d.largest : fabs(error); /* NaN stays */
    }
    d.norm = sqrt(d.norm);
    return d;
}

/* The error of one parameter's gradient over the error it may have: at most 1 passes. */
static double excess(struct trio *t, int param) {
    int64_t n = t->m[EXACT].params.list[param].count;
    double *g[SIDES];
    for (int side = 0; side < SIDES; side++) {
        g[side] = malloc((size_t)n * sizeof *g[side]);
        t->k[side]->download(t->dev[side], model_gradient(&t->m[side], param), g[side], DTYPE_F64);
    }
    struct deviation error = deviation(g[TESTED], g[EXACT], n), plain = deviation(g[PLAIN], g[EXACT], n),
                     size = deviation(g[EXACT], NULL, n);
    for (int side = 0; side < SIDES; side++)
        free(g[side]);
    double few = (n < 16 ? 32 : 4) * t->ulp,
           norm = error.norm / (FACTOR * plain.norm + few * size.norm + 1e-30),
           largest = error.largest / (FACTOR * plain.largest + few * size.largest + 1e-30);
    return norm >= largest || norm != norm ? norm : largest;
}

static void check_gradients(const char *name, enum device_precision precision, const struct model_config *c,
                            enum recompute recompute, bool segmented) {
    static struct trio t;
    int32_t tokens[ROWS], targets[ROWS];
    char text[256];
    double loss[SIDES], worst = -1;
    int at = 0;
    draw_tokens(tokens, targets, 5);
    trio_open(&t, name, precision, c, recompute, segmented);
    for (int side = 0; side < SIDES; side++)
        loss[side] = loss_of(&t.m[side], tokens, targets);
    for (int i = 0; i < t.m[EXACT].params.count; i++) {
        double x = excess(&t, i);
        if (x != x || x > worst) {
            worst = x;
            at = i;
            if (x != x)
                break;
        }
    }
    /* The loss is one number, whose plain error may happen to be zero: a few roundings of it are allowed.
     */
    double off = fabs(loss[TESTED] - loss[EXACT]),
           allowed = FACTOR * fabs(loss[PLAIN] - loss[EXACT]) + 4 * t.ulp * loss[EXACT];
    snprintf(text, sizeof text, "loss %.6f, exactly %.6f; worst gradient: %s, %.2f of the error it may have",
             loss[TESTED], loss[EXACT], t.m[EXACT].params.list[at].name, worst);
    report(off <= allowed && worst <= 1, name, precision == DEVICE_BF16 ? "bf16" : "fp32", text);
    trio_close(&t);
}

static void check_all_gradients(void) {
    static const struct {
        const char *name;
        enum layer_type type;
    } types[] = {{"mha_global", LAYER_MHA_GLOBAL},
                 {"mha_local", LAYER_MHA_LOCAL},
                 {"iha_global", LAYER_IHA_GLOBAL},
                 {"iha_local", LAYER_IHA_LOCAL},
                 {"folded_global", LAYER_FOLDED_GLOBAL},
                 {"talking_local", LAYER_TALKING_LOCAL},
                 {"simplicial_global", LAYER_SIMPLICIAL_GLOBAL}};
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++) {
        enum device_precision p = (enum device_precision)precision;
        for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
            struct model_config c = plain_config();
            for (int layer = 0; layer < c.num_hidden_layers; layer++)
                c.layer_types[layer] = types[i].type;
            check_gradients(types[i].name, p, &c, RECOMPUTE_NONE, false);
        }
        struct model_config plain = plain_config(), other = other_config();
        check_gradients("all types, rope", p, &plain, RECOMPUTE_NONE, false);
        check_gradients("all types, other choices", p, &other, RECOMPUTE_NONE, false);
        check_gradients("recompute = light", p, &plain, RECOMPUTE_LIGHT, false);
        check_gradients("recompute = full", p, &other, RECOMPUTE_FULL, false);
        check_gradients("segments, rope", p, &plain, RECOMPUTE_NONE, true);
        check_gradients("segments, other choices", p, &other, RECOMPUTE_NONE, true);
    }
}

/* ---- a hundred steps ---- */

enum { STEPS = 100 };

static void train(struct model *m, double *losses) {
    int32_t tokens[ROWS], targets[ROWS];
    for (int step = 0; step < STEPS; step++) {
        struct step_state state;
        draw_tokens(tokens, targets, (uint64_t)step + 100);
        m->k->step_begin(m->dev, m->state, step, 3e-3);
        model_forward_backward(m, (struct batch){tokens, targets, NULL}, 1.0 / ROWS, false, NULL, NULL);
        model_update(m, &(struct update_hyper){0.9, 0.95, 1e-8, 1, 0, ROWS, 0});
        m->k->step_read(m->dev, m->state, &state);
        losses[step] = state.loss;
    }
}

/* Two runs differ more and more as rounding errors grow from step to step, so no step's loss is compared by
 * itself: the mean distance over the run may be 0.1 % in fp32 and, as bf16 weights follow their master
 * weights in steps of 0.4 %, 1 % in bf16; and the loss must have fallen. (The plain computation's are 0.000 %
 * and 0.013 %.) */
static void check_training(enum device_precision precision) {
    static struct trio t;
    static double losses[SIDES][STEPS];
    struct model_config c = plain_config();
    bool bf16 = precision == DEVICE_BF16;
    double off = 0, mean = 0;
    char text[256];
    trio_open(&t, "training", precision, &c, RECOMPUTE_NONE, false);
    train(&t.m[TESTED], losses[TESTED]);
    train(&t.m[EXACT], losses[EXACT]);
    trio_close(&t);
    for (int i = 0; i < STEPS; i++) {
        off += fabs(losses[TESTED][i] - losses[EXACT][i]) / STEPS;
        mean += losses[EXACT][i] / STEPS;
    }
    for (int i = 0; i < STEPS; i += i < STEPS - 10 ? 10 : 9)
        printf("      step %3d  loss %.5f  on the CPU %.5f\n", i + 1, losses[TESTED][i], losses[EXACT][i]);
    bool fell = losses[TESTED][STEPS - 1] < 0.8 * losses[TESTED][0];
    snprintf(text, sizeof text, "%d steps, loss %.4f to %.4f, %.3f%% from the CPU's in the mean", STEPS,
             losses[TESTED][0], losses[TESTED][STEPS - 1], 100 * off / mean);
    report(fell && off <= (bf16 ? 0.01 : 0.001) * mean, "training", bf16 ? "bf16" : "fp32", text);
}

/* ---- real sizes ---- */

static void check_real_sizes(void) {
    const struct size_case cases[] = {
        real_size("C=768, P=2, local", 12, 64, 1024, 2, LAYER_IHA_LOCAL, true),
        real_size("C=768, P=2, global", 12, 64, 1024, 2, LAYER_IHA_GLOBAL, true),
        real_size("C=768, MHA", 12, 64, 1024, 1, LAYER_MHA_GLOBAL, true),
        real_size("C=2560, P=4, local", 20, 128, 1024, 4, LAYER_IHA_LOCAL, false),
        real_size("C=2560, P=4, global", 20, 128, 1024, 4, LAYER_IHA_GLOBAL, false),
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct size_verdict v;
        struct error e = {0};
        char text[256];
        if (size_check(&cases[i], kernels_cuda(), 0, &v, &e) != 0)
            die(&e);
        snprintf(text, sizeof text, "loss %.6f, in fp32 %.6f; worst: %s, %.2f of the error it may have",
                 v.loss[GPU_BF16], v.loss[GPU_FP32], v.bf16_at, v.bf16);
        report(v.bf16 <= 1, cases[i].name, "bf16", text);
        snprintf(text, sizeof text, "loss %.6f, on the CPU %.6f; worst: %s, %.2f of the error it may have",
                 v.loss[GPU_FP32], v.loss[PLAIN_FP32], v.fp32_at, v.fp32);
        report(v.fp32 <= 1, cases[i].name, "fp32", text);
    }
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--devices") == 0) {
        printf("%d\n", cuda_devices(NULL));
        return EXIT_OK;
    }
    self = argc > 1 && strcmp(argv[1], "--self") == 0;
    struct error why;
    if (!self && cuda_devices(&why) == 0) {
        fprintf(stderr, "check-gpu: %s\n",
                why.text[0] ? why.text
                            : "no GPU, or no driver for it, was found; nvidia-smi should list one");
        return EXIT_USER;
    }
    check_all_gradients();
    check_training(DEVICE_FP32);
    check_training(DEVICE_BF16);
    if (!self)
        check_real_sizes();
    printf("%d of the checks on whole models failed\n", failures);
    return failures ? EXIT_RUN : EXIT_OK;
}
