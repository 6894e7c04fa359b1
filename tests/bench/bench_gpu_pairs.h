/* Optimizer steps of two devices that differ in one option, measured in turns: the time that CUDA graphs
 * save, the time that capturing them takes, and the cost of determinism. Steps are queued as the trainer
 * queues them. */
#ifndef IHA_TESTS_BENCH_BENCH_GPU_PAIRS_H
#define IHA_TESTS_BENCH_BENCH_GPU_PAIRS_H

#include "tests/bench/bench_gpu_measure.h"
#include "tests/bench/bench_models.h"

enum { PAIR_STEPS = 5, FIRST_STEPS = 3 };

struct side {
    struct device *dev;
    struct training t;
    int posted;
    double first[FIRST_STEPS]; /* seconds of the first steps, each by itself */
    struct samples steps;
    struct activity activity; /* of one step; count 0: not measured */
};

/* GPT-2 124M with its 4:1 schedule, two passes a step. */
static inline void side_open(struct side *s, struct bench *b, struct device_options options) {
    static char *const keys[] = {"model.layer_pattern=iha_local*4 mha_global", "model.num_pseudo_heads=2",
                                 "train.micro_batch=8", "train.batch_tokens=16384"};
    struct error e = {0};
    memset(s, 0, sizeof *s);
    options.precision = DEVICE_BF16;
    s->dev = b->k->open(&options, &e);
    if (!s->dev)
        bench_fail(&e);
    read_config(&s->t.config, "configs/gpt2_124m.ini", sizeof keys / sizeof *keys, keys);
    training_open(&s->t, b->k, s->dev);
}

static inline void side_close(struct side *s, struct bench *b) {
    training_close(&s->t);
    b->k->close(s->dev);
}

static inline void side_collect(struct side *s, int ahead) {
    struct step_state state;
    for (; s->posted > ahead; s->posted--)
        s->t.model.k->step_collect(s->dev, &state);
}

static inline void side_step(struct side *s) {
    struct model *m = &s->t.model;
    const struct train_config *c = &s->t.config.train;
    int passes = (int)(c->batch_tokens / (c->micro_batch * c->seq_len));
    m->k->step_begin(m->dev, m->state, s->t.step++, c->lr);
    for (int pass = 0; pass < passes; pass++)
        model_train_pass(m, (struct batch){s->t.tokens, s->t.targets, NULL}, 1.0 / (double)c->batch_tokens,
                         pass, passes);
    model_update(
        m, &(struct update_hyper){c->beta1, c->beta2, c->eps, c->grad_clip, 0, (double)c->batch_tokens, 0});
    m->k->step_post(m->dev, m->state);
    s->posted++;
    side_collect(s, m->k->run_ahead);
}

/* Seconds of a step, over `steps` in a row. */
static inline double side_time(struct side *s, int steps) {
    timing_start(s->dev);
    for (int i = 0; i < steps; i++)
        side_step(s);
    double seconds = timing_stop(s->dev) / steps;
    side_collect(s, 0);
    return seconds;
}

/* The first steps of each, then both in turns, then one step of each with the GPU's activity recorded. */
static inline void pair_run(struct bench *b, struct side *plain, struct side *other) {
    struct side *sides[] = {plain, other};
    for (int i = 0; i < FIRST_STEPS; i++)
        for (int k = 0; k < 2; k++) {
            double start = clock_seconds(); /* capturing is the host's work */
            side_time(sides[k], 1);
            sides[k]->first[i] = clock_seconds() - start;
        }
    for (int i = 0; i < b->repeats; i++)
        for (int k = 0; k < 2; k++)
            samples_add(&sides[k]->steps, side_time(sides[k], PAIR_STEPS));
    for (int k = 0; k < 2 && activity_available(); k++) {
        activity_start();
        side_time(sides[k], 1);
        sides[k]->activity = activity_stop(sides[k]->dev);
    }
}

/* baseline: the device that this one is compared with; NULL: none. */
static inline void side_row(struct table *t, const struct side *s, const char *what,
                            const struct side *baseline, const char *baseline_name) {
    struct summary mine = samples_summary(&s->steps, 0);
    struct row *row = table_row(t, "GPT-2 124M, IHA P=2, 2 passes of 8 x 1024: %s", what);
    cell_seconds(row->took, mine);
    if (s->activity.count > 0)
        cell(row->rate, "GPU idle %.1f%% of the step, over %lld kernels and copies",
             100 * (1 - s->activity.busy / s->activity.duration), (long long)s->activity.count);
    else
        cell(row->rate, "GPU's idle time: not measured without CUPTI");
    if (baseline) {
        double other = samples_summary(&baseline->steps, 0).median;
        cell(row->compared, "%s %.2f ms", baseline_name, 1e3 * other);
        cell(row->ratio, "%.3f", mine.median / other);
    }
    row_progress(row);
}

static inline void bench_graphs(struct bench *b, struct table *t) {
    static struct side plain, graphs;
    side_open(&plain, b, (struct device_options){.graphs = false});
    side_open(&graphs, b, (struct device_options){.graphs = true});
    pair_run(b, &plain, &graphs);
    side_row(t, &plain, "operation by operation", NULL, NULL);
    side_row(t, &graphs, "as CUDA graphs", &plain, "one by one");
    struct row *row =
        table_row(t, "its first three steps, the first two of which capture graphs; host and GPU");
    cell(row->took, "%.1f, %.1f, %.1f ms", 1e3 * graphs.first[0], 1e3 * graphs.first[1],
         1e3 * graphs.first[2]);
    cell(row->compared, "without graphs %.1f, %.1f, %.1f ms", 1e3 * plain.first[0], 1e3 * plain.first[1],
         1e3 * plain.first[2]);
    row_progress(row);
    side_close(&graphs, b);
    side_close(&plain, b);
}

static inline void bench_deterministic(struct bench *b, struct table *t) {
    static struct side plain, fixed;
    side_open(&plain, b, (struct device_options){.graphs = true});
    side_open(&fixed, b, (struct device_options){.graphs = true, .deterministic = true});
    pair_run(b, &plain, &fixed);
    side_row(t, &fixed, "deterministic", &plain, "otherwise");
    double before = (double)memory_total(&plain.t.model.plan),
           after = (double)memory_total(&fixed.t.model.plan);
    struct row *row = table_row(t, "its memory plan");
    cell(row->took, "%.1f MB", after / 1e6);
    cell(row->compared, "otherwise %.1f MB", before / 1e6);
    cell(row->ratio, "%.3f", after / before);
    row_progress(row);
    side_close(&fixed, b);
    side_close(&plain, b);
}

#endif
