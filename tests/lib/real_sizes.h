/* One-layer models of the sizes that are trained, whose layer's kernels, tiles and CUDA graphs are those of a run: every
 * gradient in bf16, from passes that are replayed as CUDA graphs, judged against the GPU's own fp32, by what the plain
 * computation in bf16 errs against its own fp32 on the CPU. And that fp32 against the CPU's, from which it may be apart
 * by a small part of an error of bf16. For tests/gpu/check_gpu.c; tests/cuda/test_real_sizes.c tests it on the emulator. */
#ifndef IHA_TESTS_LIB_REAL_SIZES_H
#define IHA_TESTS_LIB_REAL_SIZES_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/model.h"
#include "model/state_dict.h"
#include "tests/lib/rounded.h"

enum { GPU_BF16, GPU_FP32, PLAIN_BF16, PLAIN_FP32, SIZE_SIDES };

struct size_case {
    const char *name;
    int64_t batch, tokens;
    struct model_config config[SIZE_SIDES]; /* equal, unless a test breaks a side */
};

/* The error over what it may be, of the worst gradient and, in bf16, of the loss: at most 1 passes. */
struct size_verdict {
    double loss[SIZE_SIDES];
    double bf16, fp32;
    char bf16_at[64], fp32_at[64];
};

/* C = H d; GPT-2's choices (layernorm, biases, learned positions), or those of the paper's model. */
static inline struct size_case real_size(const char *name, int64_t heads, int64_t head_dim, int64_t tokens,
                                         int64_t pseudo, enum layer_type type, bool gpt2) {
    int64_t window = tokens / (2 * pseudo * pseudo) * pseudo; /* iha_window = auto */
    struct size_case c = {name, 1, tokens, {{0}}};
    for (int side = 0; side < SIZE_SIDES; side++)
        c.config[side] = (struct model_config){
            .vocab_size = 1009, /* a prime, as little aligned as GPT-2's */
            .hidden_size = heads * head_dim,
            .num_hidden_layers = 1,
            .num_attention_heads = heads,
            .head_dim = head_dim,
            .intermediate_size = 4 * heads * head_dim,
            .max_position_embeddings = tokens,
            .position_embedding = gpt2 ? POSITION_LEARNED : POSITION_ROPE,
            .rope_theta = 10000,
            .norm = gpt2 ? NORM_LAYERNORM : NORM_RMSNORM,
            .norm_eps = 1e-5,
            .bias = gpt2,
            .tie_word_embeddings = true,
            .causal = true,
            .layer_types = {type},
            .local_window = tokens / 2,
            .num_pseudo_heads = pseudo,
            .iha_window = window > pseudo ? window : pseudo,
            .init_alpha = ALPHA_NOISE,
        };
    return c;
}

struct size_models {
    const struct kernels *k[SIZE_SIDES];
    struct device *dev[SIZE_SIDES];
    struct model m[SIZE_SIDES];
};

/* threads: of the CPU's sides, 0: all. */
static inline int size_open(struct size_models *s, const struct size_case *c, const struct kernels *gpu,
                            int threads, struct error *e) {
    const struct kernels *plain[] = {kernels_cpu_rounded(), kernels_cpu()};
    for (int side = 0; side < SIZE_SIDES; side++) {
        struct device_options device = {.threads = side < PLAIN_BF16 ? 1 : threads,
                                        .precision = side == GPU_BF16 ? DEVICE_BF16 : DEVICE_FP32,
                                        .graphs = side == GPU_BF16};
        struct model_options options = {.shape = {c->batch, c->tokens, RECOMPUTE_NONE, true},
                                        .mix_lr_scale = 1};
        s->k[side] = side < PLAIN_BF16 ? gpu : plain[side - PLAIN_BF16];
        s->dev[side] = s->k[side]->open(&device, e);
        if (!s->dev[side] ||
            model_create(&s->m[side], &c->config[side], s->k[side], s->dev[side], &options, e) != 0 ||
            model_initialize(&s->m[side], 1, e) != 0)
            return -1;
    }
    for (int i = 0; i < s->m[PLAIN_FP32].params.count; i++) { /* weights that bf16 holds */
        int64_t n = s->m[PLAIN_FP32].params.list[i].count;
        float *values = malloc((size_t)n * sizeof *values);
        model_get_param(&s->m[PLAIN_FP32], i, values);
        for (int64_t j = 0; j < n; j++)
            values[j] = bf16_of(values[j]);
        for (int side = 0; side < SIZE_SIDES; side++)
            model_set_param(&s->m[side], i, values, 0);
        free(values);
    }
    return 0;
}

static inline void size_close(struct size_models *s) {
    for (int side = 0; side < SIZE_SIDES; side++) {
        model_free(&s->m[side]);
        s->k[side]->close(s->dev[side]);
    }
}

/* The loss; three passes where they are graphs, of which the first captures and the others replay. */
static inline double size_pass(struct model *m, const int32_t *tokens, const int32_t *targets, int passes) {
    int64_t rows = m->shape.batch * m->shape.tokens;
    struct step_state state;
    for (int i = 0; i < passes; i++) {
        m->k->step_begin(m->dev, m->state, 0, 0);
        model_train_pass(m, (struct batch){tokens, targets, NULL}, 1.0 / (double)rows, 0, 1);
    }
    m->k->step_read(m->dev, m->state, &state);
    return state.loss;
}

struct size_deviation {
    double norm, largest;
};

/* NaN stays. */
static inline struct size_deviation size_deviation(const double *x, const double *from, int64_t n) {
    struct size_deviation d = {0, 0};
    for (int64_t i = 0; i < n; i++) {
        double error = x[i] - (from ? from[i] : 0);
        d.norm += error * error;
        d.largest = fabs(error) <= d.largest ? d.largest : fabs(error);
    }
    d.norm = sqrt(d.norm);
    return d;
}

/* error over factor * plain + few * size, by norm and by the largest element. */
static inline double size_excess(struct size_deviation error, double factor, struct size_deviation plain,
                                 double few, struct size_deviation size) {
    double norm = error.norm / (factor * plain.norm + few * size.norm + 1e-30),
           largest = error.largest / (factor * plain.largest + few * size.largest + 1e-30);
    return norm >= largest || norm != norm ? norm : largest;
}

/* Keeps the worst, and the first NaN. */
static inline void size_worst(double *worst, char at[64], double excess, const char *name) {
    if (*worst == *worst && !(excess <= *worst)) {
        *worst = excess;
        snprintf(at, 64, "%s", name);
    }
}

/* Roundings of the largest value that are allowed where the plain error happens to be small, as in check_gpu.c. */
static inline double size_roundings(int64_t n, double ulp) {
    return (n < 16 ? 32 : 4) * ulp;
}

static inline void size_judge(struct size_models *s, int param, struct size_verdict *v) {
    const double FACTOR_BF16 = 3, FACTOR_FP32 = 1.0 / 16; /* of the plain error in bf16 */
    const struct param *p = &s->m[PLAIN_FP32].params.list[param];
    int64_t n = p->count;
    double *g[SIZE_SIDES];
    for (int side = 0; side < SIZE_SIDES; side++) {
        g[side] = malloc((size_t)n * sizeof *g[side]);
        s->k[side]->download(s->dev[side], model_gradient(&s->m[side], param), g[side], DTYPE_F64);
    }
    struct size_deviation plain = size_deviation(g[PLAIN_BF16], g[PLAIN_FP32], n),
                          size = size_deviation(g[PLAIN_FP32], NULL, n);
    size_worst(&v->bf16, v->bf16_at,
               size_excess(size_deviation(g[GPU_BF16], g[GPU_FP32], n), FACTOR_BF16, plain,
                           size_roundings(n, 0x1p-9), size),
               p->name);
    size_worst(&v->fp32, v->fp32_at,
               size_excess(size_deviation(g[GPU_FP32], g[PLAIN_FP32], n), FACTOR_FP32, plain,
                           size_roundings(n, 0x1p-24), size),
               p->name);
    for (int side = 0; side < SIZE_SIDES; side++)
        free(g[side]);
}

/* gpu: the backend under test. 0, or -1 and *e where a model cannot be made. */
static inline int size_check(const struct size_case *c, const struct kernels *gpu, int threads,
                             struct size_verdict *v, struct error *e) {
    static struct size_models s;
    int64_t rows = c->batch * c->tokens, vocab = c->config[0].vocab_size;
    *v = (struct size_verdict){.bf16_at = "loss", .fp32_at = "loss"};
    if (size_open(&s, c, gpu, threads, e) != 0)
        return -1;
    int32_t *tokens = malloc((size_t)rows * 2 * sizeof *tokens), *targets = tokens + rows;
    uint64_t seed = 1;
    for (int64_t i = 0; i < 2 * rows; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        tokens[i] = (int32_t)((seed >> 33) % (uint64_t)vocab);
    }
    for (int side = 0; side < SIZE_SIDES; side++)
        v->loss[side] = size_pass(&s.m[side], tokens, targets, side == GPU_BF16 ? 3 : 1);
    v->bf16 = fabs(v->loss[GPU_BF16] - v->loss[GPU_FP32]) /
              (3 * fabs(v->loss[PLAIN_BF16] - v->loss[PLAIN_FP32]) + 4 * 0x1p-9 * v->loss[PLAIN_FP32]);
    v->fp32 = fabs(v->loss[GPU_FP32] - v->loss[PLAIN_FP32]) / (32 * 0x1p-24 * v->loss[PLAIN_FP32]);
    for (int i = 0; i < s.m[PLAIN_FP32].params.count; i++)
        size_judge(&s, i, v);
    free(tokens);
    size_close(&s);
    return 0;
}

#endif
