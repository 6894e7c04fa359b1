/* The benchmark's whole models: optimizer steps, and the memory they take. */
#ifndef IHA_TESTS_BENCH_BENCH_MODELS_H
#define IHA_TESTS_BENCH_BENCH_MODELS_H

#include <sys/wait.h>
#include <unistd.h>

#include "model/flops.h"
#include "model/model.h"
#include "model/state_dict.h"
#include "tests/bench/bench_table.h"

/* A model in training, on random tokens. */
struct training {
    struct config config;
    struct model model;
    int32_t *tokens, *targets; /* [micro_batch, seq_len] */
    int64_t step;
};

/* Read a configuration or end: of a file, of overrides, or both. */
static inline void read_config(struct config *c, const char *path, int count, char *const *overrides) {
    struct error e = {0};
    if (config_load(c, path, count, overrides, 1, &e) != 0)
        bench_fail(&e);
}

/* Random tokens; each one's target is another. */
static inline void random_tokens(int32_t *tokens, int64_t n, int64_t vocab, uint64_t state) {
    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        tokens[i] = (int32_t)((state >> 33) % (uint64_t)vocab);
    }
}

/* Build and initialise the model of t->config. */
static inline void training_open(struct training *t, const struct kernels *k, struct device *dev) {
    const struct config *c = &t->config;
    struct model_options options = {.shape = pass_shape_of(c, true),
                                    .weight_decay = c->train.weight_decay,
                                    .mix_lr_scale = c->train.mix_lr_scale,
                                    .muon_lr_scale = config_muon_lr_scale(c)};
    struct error e = {0};
    if (model_create(&t->model, &c->model, k, dev, &options, &e) != 0 ||
        model_initialize(&t->model, (uint64_t)c->train.seed, &e) != 0)
        bench_fail(&e);
    int64_t n = c->train.micro_batch * c->train.seq_len;
    t->tokens = malloc((size_t)n * sizeof *t->tokens);
    t->targets = malloc((size_t)n * sizeof *t->targets);
    if (!t->tokens || !t->targets) {
        fail_run(&e, "out of memory for a batch of tokens");
        bench_fail(&e);
    }
    random_tokens(t->tokens, n, c->model.vocab_size, 1);
    random_tokens(t->targets, n, c->model.vocab_size, 2);
}

static inline void training_close(struct training *t) {
    model_free(&t->model);
    free(t->tokens);
    free(t->targets);
}

/* One optimizer step, as training takes it; reading the state back waits for the device. */
static inline void training_step(void *context) {
    struct training *t = context;
    struct model *m = &t->model;
    const struct train_config *c = &t->config.train;
    int64_t passes = c->batch_tokens / (c->micro_batch * c->seq_len);
    struct step_state state;
    m->k->step_begin(m->dev, m->state, t->step++, c->lr);
    for (int64_t pass = 0; pass < passes; pass++)
        model_forward_backward(m, (struct batch){t->tokens, t->targets, NULL}, 1.0 / (double)c->batch_tokens,
                               pass > 0, NULL, NULL);
    model_update(
        m, &(struct update_hyper){c->beta1, c->beta2, c->eps, c->grad_clip, 0, (double)c->batch_tokens, 0});
    m->k->step_read(m->dev, m->state, &state);
}

/* What the keys below leave out: required of a run, and not used here. */
#define UNUSED_KEYS "train.steps=1", "train.lr=1e-4", "data.train=none", "run.dir=none"
#define GPT2_KEYS                                                                                            \
    "model.vocab_size=50257", "model.position_embedding=learned", "model.norm=layernorm",                    \
        "model.activation=gelu_tanh", "model.bias=true", "model.tie_word_embeddings=true",                   \
        "model.layer_pattern=mha_global", "model.max_position_embeddings=1024", UNUSED_KEYS

/* 124M, on few tokens. */
#define GPT2_STEP_KEYS                                                                                       \
    GPT2_KEYS, "model.hidden_size=768", "model.num_hidden_layers=12", "model.num_attention_heads=12",        \
        "train.seq_len=64", "train.micro_batch=4", "train.batch_tokens=256", "system.recompute=none"

/* A step of GPT-2 124M on few tokens. Its floor: the step's matrix products at the rate of sgemm, and the
 * optimizer's memory (28 bytes a parameter: p, g, m, v read and p, m, v written) at the rate of a copy. */
static inline void bench_gpt2(struct bench *b, struct table *table) {
    static char *const keys[] = {GPT2_STEP_KEYS};
    static struct training t;
    read_config(&t.config, NULL, sizeof keys / sizeof *keys, keys);
    training_open(&t, b->k, b->dev);
    struct finding f = measure(b, training_step, &t);
    double tokens = (double)t.config.train.batch_tokens;
    double flops = flops_per_token(&t.config.model, t.config.train.seq_len).matmul * tokens;
    double bytes = 28 * (double)t.model.params.elements;
    double floor = flops / f.sgemm + bytes / f.copy;
    struct row *row = table_row(table, "GPT-2 124M, one optimizer step: B=%d, T=%d",
                                (int)t.config.train.micro_batch, (int)t.config.train.seq_len);
    cell_seconds(row->took, f.seconds);
    cell(row->rate, "%.1f tokens/s", tokens / f.seconds.median);
    cell(row->compared, "floor %.2f s: %.0f GFLOP at %.0f GFLOP/s + %.2f GB at %.2f GB/s", floor, flops / 1e9,
         f.sgemm / 1e9, bytes / 1e9, f.copy / 1e9);
    cell(row->ratio, "%.2f", f.seconds.median / floor);
    row_progress(row);
    training_close(&t);
}

/* An update alone: the state says that something counted, so that the step is not skipped. */
static inline void training_update(void *context) {
    struct training *t = context;
    struct model *m = &t->model;
    const struct train_config *c = &t->config.train;
    struct step_state state = {.step = t->step++, .lr = c->lr, .loss = 1, .targets = (double)c->batch_tokens};
    m->k->step_write(m->dev, m->state, &state);
    model_update(m, &(struct update_hyper){c->beta1, c->beta2, c->eps, c->grad_clip, 0,
                                           (double)c->batch_tokens, c->muon_momentum});
    m->k->step_read(m->dev, m->state, &state);
}

/* What Muon adds to a step of GPT-2 124M over AdamW: with 8k tokens and, as the ratio, with 32k tokens a step, whose
 * matrix products run at the rate of sgemm. */
static inline void bench_muon(struct bench *b, struct table *table) {
    static char *const keys[] = {GPT2_KEYS,
                                 "model.hidden_size=768",
                                 "model.num_hidden_layers=12",
                                 "model.num_attention_heads=12",
                                 "train.seq_len=16",
                                 "train.micro_batch=1",
                                 "train.optimizer=adamw"};
    enum { KEYS = sizeof keys / sizeof *keys };
    static char *muon[KEYS];
    struct finding found[2];
    double each = 0;
    for (int i = 0; i < 2; i++) {
        static struct training t;
        memcpy(muon, keys, sizeof keys);
        muon[KEYS - 1] = i ? "train.optimizer=muon" : keys[KEYS - 1];
        memset(&t, 0, sizeof t);
        read_config(&t.config, NULL, KEYS, muon);
        training_open(&t, b->k, b->dev);
        found[i] = measure(b, training_update, &t);
        each = flops_per_token(&t.config.model, 1024).matmul / found[i].sgemm;
        training_close(&t);
    }
    double adamw = found[0].seconds.median, more = found[1].seconds.median - adamw;
    struct row *row = table_row(table, "GPT-2 124M, an update by Muon");
    cell_seconds(row->took, found[1].seconds);
    cell(row->rate, "AdamW: %.2f s", adamw);
    cell(row->compared, "a step with AdamW, at the rate of sgemm: of 8k tokens %.1f s, of 32k %.1f s",
         8192 * each + adamw, 32768 * each + adamw);
    cell(row->ratio, "%.2f and %.2f", 1 + more / (8192 * each + adamw), 1 + more / (32768 * each + adamw));
    row_progress(row);
}

/* A step of the model that `make quickstart` trains. */
static inline void bench_quickstart(struct bench *b, struct table *table) {
    static struct training t;
    read_config(&t.config, b->quickstart, 0, NULL);
    training_open(&t, b->k, b->dev);
    struct finding f = measure(b, training_step, &t);
    const struct config *c = &t.config;
    struct flops each = flops_per_token(&c->model, c->train.seq_len);
    double rate = (double)c->train.batch_tokens / f.seconds.median;
    double flops = (each.matmul + each.attention + each.mixing) * rate;
    struct row *row = table_row(table, "%s, one optimizer step: %.2fM parameters, %d tokens", b->quickstart,
                                (double)t.model.params.num_params / 1e6, (int)c->train.batch_tokens);
    cell_seconds(row->took, f.seconds);
    cell(row->rate, "%.0f tokens/s; %.1f GFLOP/s", rate, flops / 1e9);
    cell(row->compared, "sgemm %.0f GFLOP/s", f.sgemm / 1e9);
    cell(row->ratio, "%.2f", flops / f.sgemm);
    row_progress(row);
    training_close(&t);
}

/* ---- peak memory ---- */

/* Memory planned by model_memory, and the peak that was resident. */
struct footprint {
    double planned, measured; /* bytes */
    double seconds;           /* of two steps */
};

/* This process's peak of resident memory in bytes; 0: unknown. */
static inline double peak_resident(void) {
    char line[256];
    double kb = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmHWM: %lf kB", &kb) == 1)
            break;
    if (f)
        fclose(f);
    return kb * 1024;
}

/* Plan, then take two steps, since memory is resident only once it was touched. Runs in a
 * process of its own. */
static inline struct footprint measure_footprint(int count, char *const *keys) {
    static struct training t;
    struct device_options options = {.precision = DEVICE_FP32};
    struct memory_plan p;
    struct error e = {0};
    const struct kernels *k = kernels_cpu();
    struct device *dev = k->open(&options, &e);
    read_config(&t.config, NULL, count, keys);
    struct pass_shape shape = pass_shape_of(&t.config, true);
    if (!dev || model_memory(&t.config.model, k, dev, &shape, 1, 0, DTYPE_F32, &p, &e) != 0)
        bench_fail(&e);
    training_open(&t, k, dev);
    double start = clock_seconds();
    for (int i = 0; i < 2; i++)
        training_step(&t);
    double bytes = (double)(p.parameters + p.gradients + p.optimizer + p.activations + p.workspace);
    return (struct footprint){bytes, peak_resident(), clock_seconds() - start};
}

/* Run measure_footprint in a forked process, and return its result. */
static inline struct footprint footprint_of(int count, char *const *keys) {
    int ends[2];
    struct footprint f = {0};
    struct error e = {.exit_code = EXIT_RUN, .text = "the process that measures memory failed"};
    fflush(NULL);
    pid_t child = pipe(ends) == 0 ? fork() : -1;
    if (child < 0)
        bench_fail(&e);
    if (child == 0) {
        f = measure_footprint(count, keys);
        _exit(write(ends[1], &f, sizeof f) == sizeof f ? EXIT_OK : EXIT_RUN);
    }
    close(ends[1]);
    if (read(ends[0], &f, sizeof f) != sizeof f)
        bench_fail(&e);
    close(ends[0]);
    waitpid(child, NULL, 0);
    return f;
}

/* Two sizes, whose plans are near 1 and 2 GB. Must run before this process starts any threads: a forked child
 * would wait for them for ever. */
static inline void bench_memory(struct bench *b, struct table *table) {
    static char *const small[] = {GPT2_KEYS,
                                  "model.hidden_size=512",
                                  "model.num_hidden_layers=8",
                                  "model.num_attention_heads=8",
                                  "train.seq_len=128",
                                  "train.micro_batch=2",
                                  "train.batch_tokens=256",
                                  "system.recompute=none"};
    static char *const large[] = {GPT2_KEYS,
                                  "model.hidden_size=768",
                                  "model.num_hidden_layers=10",
                                  "model.num_attention_heads=12",
                                  "train.seq_len=128",
                                  "train.micro_batch=2",
                                  "train.batch_tokens=256",
                                  "system.recompute=none"};
    static char *const *const models[] = {small, large};
    static const char *const names[] = {"8 layers of 512", "10 layers of 768"};
    (void)b;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        struct footprint f = footprint_of(sizeof small / sizeof *small, models[i]);
        struct row *row = table_row(table, "peak memory of training: GPT-2 with %s, B=2, T=128", names[i]);
        cell(row->took, "two steps in %.1f s", f.seconds);
        cell(row->rate, "%.3f GB resident at most", f.measured / 1e9);
        cell(row->compared, "planned %.3f GB", f.planned / 1e9);
        cell(row->ratio, "%.3f", f.measured / f.planned);
        row_progress(row);
    }
}

#endif
