/* The parts of a training step, except the gradients themselves: recompute is bit-identical, accumulated
 * passes equal one pass, every unit is announced once, AdamW follows its equation and skips bad steps,
 * learning rates follow the schedules, and a model overfits one batch. */
#include "tests/lib/sample.h"
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"

#include "kernels/rounding.h"

#include "model/train/schedule.h"
#include "model/train/skips.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))

static const struct adamw_hyper HYPER = {0.9, 0.95, 1e-8};

static void open_model(struct model *m, const struct model_config *c, int64_t batch, enum recompute r) {
    struct error e = {0};
    fixture_model(m, c, (struct pass_shape){batch, TOKENS, r, true, false, false, false});
    assert_int_equal(model_initialize(m, 4, &e), 0);
}

static void make_batch(int32_t tokens[ROWS], int32_t targets[ROWS]) {
    fixture_tokens(tokens, ROWS, VOCAB, 1);
    fixture_tokens(targets, ROWS, VOCAB, 2);
    targets[3] = targets[ROWS - 1] = -1;
}

static struct step_state read_state(const struct model *m) {
    struct step_state s;
    m->k->step_read(m->dev, m->state, &s);
    return s;
}

static double distance(const float *a, const float *b, int64_t n, double *norm) {
    double sum = 0;
    *norm = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        *norm += (double)b[i] * (double)b[i];
    }
    *norm = sqrt(*norm);
    return sqrt(sum);
}

/* ---- recompute, accumulation, finished units ---- */

static void check_recompute(const struct model_config *c) {
    int32_t tokens[ROWS], targets[ROWS];
    struct model kept;
    make_batch(tokens, targets);
    open_model(&kept, c, BATCH, RECOMPUTE_NONE);
    double loss = fixture_loss(&kept, tokens, targets, 0.01);
    for (int r = RECOMPUTE_LIGHT; r <= RECOMPUTE_FULL; r++) {
        struct model m;
        open_model(&m, c, BATCH, (enum recompute)r);
        double again = fixture_loss(&m, tokens, targets, 0.01);
        assert_memory_equal(&again, &loss, sizeof loss);
        assert_memory_equal(m.gradients, kept.gradients, (size_t)m.params.elements * sizeof(float));
        model_free(&m);
    }
    model_free(&kept);
}

static void recompute_is_bit_identical(void **state) {
    (void)state;
    struct model_config plain = plain_config(), other = other_config();
    check_recompute(&plain);
    check_recompute(&other);
    plain.position_embedding = POSITION_NONE;
    plain.activation = ACTIVATION_RELU2;
    check_recompute(&plain);
}

/* Two passes of half a batch. The first must overwrite the gradients that are there. */
static double run_two_passes(struct model *m, const int32_t *tokens, const int32_t *targets) {
    fixture_loss(m, tokens + 7, targets, 1);
    m->k->step_begin(m->dev, m->state, 0, 0);
    for (int half = 0; half < 2; half++)
        model_forward_backward(m, (struct batch){tokens + half * ROWS / 2, targets + half * ROWS / 2, NULL},
                               0.01, half > 0, NULL, NULL);
    return read_state(m).loss;
}

static void check_accumulate(const struct model_config *c) {
    int32_t tokens[ROWS], targets[ROWS];
    struct model whole, halves;
    double norm;
    make_batch(tokens, targets);
    open_model(&whole, c, BATCH, RECOMPUTE_NONE);
    open_model(&halves, c, BATCH / 2, RECOMPUTE_NONE);
    double loss = fixture_loss(&whole, tokens, targets, 0.01), sum = run_two_passes(&halves, tokens, targets);
    assert_true(fabs(sum - loss) < 1e-6 * loss);
    for (int i = 0; i < whole.params.count; i++) {
        const struct param *p = &whole.params.list[i];
        double error =
            distance(model_gradient(&halves, i).data, model_gradient(&whole, i).data, p->count, &norm);
        if (!(norm > 0 && error < 3e-6 * norm))
            fail_msg("%s: error %.3g, norm %.3g", p->name, error, norm);
    }
    model_free(&whole);
    model_free(&halves);
}

static void accumulated_passes_equal_one_pass(void **state) {
    (void)state;
    struct model_config plain = plain_config(), other = other_config();
    check_accumulate(&plain);
    check_accumulate(&other);
}

struct announced {
    const struct model *m;
    float *copy; /* the gradients as they were when announced */
    int next_unit;
};

static void copy_announced(void *context, int unit) {
    struct announced *a = context;
    int64_t begin = a->m->params.unit_offset[unit], end = a->m->params.unit_offset[unit + 1];
    assert_int_equal(unit, a->next_unit--);
    assert_true(begin < end);
    memcpy(a->copy + begin, (float *)a->m->gradients + begin, (size_t)(end - begin) * sizeof(float));
}

/* Every unit once, from last to first, and with its final gradients; together they are the whole buffer. */
static void check_announced(const struct model_config *c) {
    int32_t tokens[ROWS], targets[ROWS];
    struct model m;
    make_batch(tokens, targets);
    open_model(&m, c, BATCH, RECOMPUTE_LIGHT);
    size_t bytes = (size_t)m.params.elements * sizeof(float);
    struct announced a = {&m, calloc(1, bytes), m.params.unit_count - 1};
    m.k->step_begin(m.dev, m.state, 0, 0);
    model_forward_backward(&m, (struct batch){tokens, targets, NULL}, 0.01, false, copy_announced, &a);
    assert_int_equal(a.next_unit, -1);
    assert_int_equal(m.params.unit_count, c->num_hidden_layers + 2);
    assert_int_equal(m.params.unit_offset[0], 0);
    assert_int_equal(m.params.unit_offset[m.params.unit_count], m.params.elements);
    assert_memory_equal(a.copy, m.gradients, bytes);
    free(a.copy);
    model_free(&m);
}

static void every_unit_is_announced_once(void **state) {
    (void)state;
    struct model_config plain = plain_config(), other = other_config();
    check_announced(&plain);
    check_announced(&other);
}

/* ---- AdamW ---- */

enum { N = 333 };
static const struct param_group GROUPS[] = {
    {0, 100, 1, 0.1f, 0, 0}, {100, 201, 1, 0, 0, 0}, {201, N, 5, 0.3f, 0, 0}};

/* The flat buffers of the kernel, and the same in double. */
struct adamw_test {
    float p[N], g[N], m[N], v[N];
    double rp[N], rm[N], rv[N];
    struct step_state state;
    int64_t updates; /* of the reference */
    uint64_t seed;
};

static tensor flat(float *x) {
    return tensor_of(x, DTYPE_F32, N, 0, 0, 0, 0);
}

static struct adamw_test *adamw_open(void) {
    struct adamw_test *t = calloc(1, sizeof *t);
    t->seed = 8;
    for (int i = 0; i < N; i++)
        t->rp[i] = t->p[i] = (float)fixture_noise(&t->seed);
    return t;
}

static void draw_gradients(struct adamw_test *t, double size) {
    for (int i = 0; i < N; i++)
        t->g[i] = (float)(size * fixture_noise(&t->seed));
}

/* One step on the gradients and the loss as they are. */
static void kernel_step(struct adamw_test *t, double lr, double clip, double loss) {
    const struct kernels *k = kernels_cpu();
    struct device *dev = fixture_device();
    k->step_begin(dev, &t->state, 0, lr);
    t->state.loss = loss;
    t->state.targets = 1;
    k->sumsq(dev, flat(t->g), &t->state);
    k->step_decide(dev, &t->state, 1, clip, 0);
    k->adamw(dev, &HYPER, GROUPS, COUNT(GROUPS), flat(t->p), tensor_none(), flat(t->g), flat(t->m),
             flat(t->v), &t->state);
}

static void reference_step(struct adamw_test *t, double lr, double clip) {
    double sumsq = 0, n = (double)++t->updates;
    for (int i = 0; i < N; i++)
        sumsq += (double)t->g[i] * (double)t->g[i];
    double factor = clip > 0 && sqrt(sumsq) > clip ? clip / sqrt(sumsq) : 1;
    for (size_t k = 0; k < COUNT(GROUPS); k++)
        for (int64_t i = GROUPS[k].begin; i < GROUPS[k].end; i++) {
            double g = factor * (double)t->g[i];
            t->rm[i] = HYPER.beta1 * t->rm[i] + (1 - HYPER.beta1) * g;
            t->rv[i] = HYPER.beta2 * t->rv[i] + (1 - HYPER.beta2) * g * g;
            double step = t->rm[i] / (1 - pow(HYPER.beta1, n)) /
                          (sqrt(t->rv[i] / (1 - pow(HYPER.beta2, n))) + HYPER.eps);
            t->rp[i] -= lr * (double)GROUPS[k].lr_scale * (step + (double)GROUPS[k].weight_decay * t->rp[i]);
        }
}

static void compare_one(const char *what, const float *got, const double *want) {
    double error = 0, norm = 0;
    for (int i = 0; i < N; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += want[i] * want[i];
    }
    if (!(sqrt(error) < 1e-6 * sqrt(norm))) /* a few steps, each a few roundings */
        fail_msg("%s: error %.3g, norm %.3g", what, sqrt(error), sqrt(norm));
}

static void compare_adamw(const struct adamw_test *t) {
    compare_one("parameters", t->p, t->rp);
    compare_one("first moments", t->m, t->rm);
    compare_one("second moments", t->v, t->rv);
    assert_int_equal(t->state.history.updates, t->updates);
}

/* Gradients above and below the clip, and no clip; learning rates that change. */
static void adamw_follows_its_equation(void **state) {
    (void)state;
    static const struct {
        double size, clip, lr;
    } steps[] = {{1, 1, 1e-2}, {0.01, 1, 2e-2}, {1, 0, 5e-3}, {30, 1, 1e-2}, {0.1, 0.5, 1e-3}, {1, 3, 1e-2}};
    struct adamw_test *t = adamw_open();
    for (size_t i = 0; i < COUNT(steps); i++) {
        draw_gradients(t, steps[i].size);
        kernel_step(t, steps[i].lr, steps[i].clip, 1);
        reference_step(t, steps[i].lr, steps[i].clip);
        compare_adamw(t);
    }
    free(t);
}

static void clip_and_norm_are_reported(void **state) {
    (void)state;
    struct adamw_test *t = adamw_open();
    draw_gradients(t, 1);
    double sumsq = 0;
    for (int i = 0; i < N; i++)
        sumsq += (double)t->g[i] * (double)t->g[i];
    kernel_step(t, 0, 2, 1);
    assert_true(fabs(t->state.grad_norm - sqrt(sumsq)) < 1e-6 * sqrt(sumsq));
    assert_true(fabs(t->state.factor - 2 / sqrt(sumsq)) < 1e-6);
    kernel_step(t, 0, 1000, 1);
    assert_true(t->state.factor == 1);
    kernel_step(t, 0, 0, 1);
    assert_true(t->state.factor == 1);
    free(t);
}

/* A bad step changes nothing, t included, and skips_run counts bad steps until a good one. */
static void bad_steps_are_skipped(void **state) {
    (void)state;
    static const struct {
        double gradient, loss;
    } bad[] = {{NAN, 1}, {INFINITY, 1}, {-INFINITY, 1}, {1, NAN}, {1, INFINITY}, {1e30, 1}};
    struct adamw_test *t = adamw_open(), *kept = malloc(sizeof *kept);
    for (int round = 0; round < 2; round++) {
        draw_gradients(t, 1);
        kernel_step(t, 1e-2, 1, 1);
        reference_step(t, 1e-2, 1);
        compare_adamw(t);
        assert_int_equal(t->state.skip, 0);
        assert_int_equal(t->state.history.skips_run, 0);
        for (int i = 0; i < (int)COUNT(bad); i++) {
            draw_gradients(t, 1);
            t->g[i * 60] = (float)bad[i].gradient;
            *kept = *t;
            kernel_step(t, 1e-2, 1, bad[i].loss);
            assert_memory_equal(t->p, kept->p, sizeof t->p);
            assert_memory_equal(t->m, kept->m, sizeof t->m);
            assert_memory_equal(t->v, kept->v, sizeof t->v);
            assert_int_equal(t->state.skip, 1);
            assert_int_equal(t->state.history.skips_run, i + 1);
            assert_int_equal(t->state.history.updates, round + 1);
        }
    }
    free(kept);
    free(t);
}

/* A resumed run writes the update count back: AdamW continues with the same t. */
static void step_write_restores_the_update_count(void **state) {
    (void)state;
    struct adamw_test *t = adamw_open();
    struct step_state resumed = {.history = {.updates = 41, .skips_run = 2}};
    kernels_cpu()->step_write(fixture_device(), &t->state, &resumed);
    t->updates = 41;
    draw_gradients(t, 1);
    kernel_step(t, 1e-2, 1, 1);
    reference_step(t, 1e-2, 1);
    compare_adamw(t);
    free(t);
}

/* ---- a step of a model ---- */

static const struct param_group *group_of(const struct model *m, int64_t element) {
    for (int i = 0; i < m->group_count; i++)
        if (m->groups[i].begin <= element && element < m->groups[i].end)
            return &m->groups[i];
    return NULL;
}

/* Every parameter is in one group: matrices with weight decay, alpha and collapse with their own lr_scale. */
static void groups_follow_the_parameter_classes(void **state) {
    (void)state;
    struct model_config c = other_config();
    struct model m;
    struct error e = {0};
    struct model_options options = {
        .shape = {1, TOKENS, RECOMPUTE_NONE, true}, .weight_decay = 0.25, .mix_lr_scale = 3};
    assert_int_equal(model_create(&m, &c, kernels_cpu(), fixture_device(), &options, &e), 0);
    int64_t at = 0;
    for (int i = 0; i < m.group_count; at = m.groups[i++].end)
        assert_int_equal(m.groups[i].begin, at);
    assert_int_equal(at, m.params.elements);
    for (int i = 0; i < m.params.count; i++) {
        const struct param *p = &m.params.list[i];
        const struct param_group *g = group_of(&m, p->offset);
        bool mix = strstr(p->name, "alpha") || strstr(p->name, "collapse");
        bool matrix = p->ndim == 2 && !mix;
        assert_ptr_equal(g, group_of(&m, p->offset + p->count - 1));
        assert_true(g->weight_decay == (matrix ? 0.25f : 0));
        assert_true(g->lr_scale == (mix ? 3.0f : 1));
    }
    model_free(&m);
}

static void step(struct model *m, const int32_t *tokens, const int32_t *targets, double scale, double lr) {
    m->k->step_begin(m->dev, m->state, 0, lr);
    model_forward_backward(m, (struct batch){tokens, targets, NULL}, scale, false, NULL, NULL);
    model_update(m, &(struct update_hyper){HYPER.beta1, HYPER.beta2, HYPER.eps, 1, 0, 1 / scale, 0});
}

static void nan_gradients_leave_the_parameters_unchanged(void **state) {
    (void)state;
    struct model_config c = plain_config();
    int32_t tokens[ROWS], targets[ROWS];
    struct model m;
    make_batch(tokens, targets);
    open_model(&m, &c, BATCH, RECOMPUTE_NONE);
    size_t bytes = (size_t)m.params.elements * sizeof(float);
    char *values = malloc(bytes), *moments = malloc(2 * bytes);
    step(&m, tokens, targets, 0.01, 1e-2);
    memcpy(values, m.values, bytes);
    memcpy(moments, m.moments, 2 * bytes);
    step(&m, tokens, targets, NAN, 1e-2); /* every gradient is NaN */
    assert_int_equal(read_state(&m).history.skips_run, 1);
    assert_memory_equal(values, m.values, bytes);
    assert_memory_equal(moments, m.moments, 2 * bytes);
    step(&m, tokens, targets, 0.01, 1e-2);
    assert_int_equal(read_state(&m).history.skips_run, 0);
    assert_int_equal(read_state(&m).history.updates, 2);
    assert_memory_not_equal(values, m.values, bytes);
    free(values);
    free(moments);
    model_free(&m);
}

static void check_overfits(const struct model_config *c) {
    if (!in_sample())
        return;
    int32_t tokens[ROWS], targets[ROWS];
    struct model m;
    fixture_tokens(tokens, ROWS, VOCAB, 1);
    fixture_tokens(targets, ROWS, VOCAB, 2);
    open_model(&m, c, BATCH, RECOMPUTE_NONE);
    double loss = 10;
    for (int i = 0; i < 400 && !(loss < 0.05); i++) {
        step(&m, tokens, targets, 1.0 / ROWS, 1e-2);
        loss = read_state(&m).loss;
    }
    if (!(loss < 0.05))
        fail_msg("the loss is still %.3f", loss);
    model_free(&m);
}

static void a_model_overfits_one_batch(void **state) {
    (void)state;
    struct model_config plain = plain_config(), other = other_config();
    check_overfits(&plain);
    check_overfits(&other);
}

/* ---- learning rate ---- */

static void check_lr(enum schedule schedule, int64_t warmup, int64_t at, double expected) {
    struct train_config t = {
        .total_steps = 110, .lr = 1, .min_lr = 0.1, .warmup_steps = warmup, .schedule = schedule};
    double lr = schedule_lr(&t, at);
    if (!(fabs(lr - expected) < 1e-12))
        fail_msg("schedule %d, warm-up %d, step %d: %.15g, not %.15g", schedule, (int)warmup, (int)at, lr,
                 expected);
}

static void learning_rates_at_known_points(void **state) {
    (void)state;
    for (int s = SCHEDULE_COSINE; s <= SCHEDULE_WSD; s++) {
        check_lr((enum schedule)s, 10, 0, 0.1);
        check_lr((enum schedule)s, 10, 4, 0.5);
        check_lr((enum schedule)s, 10, 9, 1);
        check_lr((enum schedule)s, 10, 10, 1);
        check_lr((enum schedule)s, 0, 0, 1);
        check_lr((enum schedule)s, 10, 110, s == SCHEDULE_CONSTANT ? 1 : 0.1);
        check_lr((enum schedule)s, 10, 500, s == SCHEDULE_CONSTANT ? 1 : 0.1);
    }
    check_lr(SCHEDULE_COSINE, 10, 60, 0.55);
    check_lr(SCHEDULE_COSINE, 10, 35, 0.1 + 0.45 * (1 + sqrt(0.5)));
    check_lr(SCHEDULE_LINEAR, 10, 35, 0.775);
    check_lr(SCHEDULE_LINEAR, 10, 60, 0.55);
    check_lr(SCHEDULE_CONSTANT, 10, 109, 1);
    check_lr(SCHEDULE_WSD, 10, 88, 1); /* the last fifth begins */
    check_lr(SCHEDULE_WSD, 10, 99, 0.55);
    check_lr(SCHEDULE_WSD, 10, 109, 0.1 + 0.9 / 22);
}

static void check_epochs(double epochs, int64_t sequences, int64_t expected) {
    struct train_config t = {.epochs = epochs, .seq_len = 4, .batch_tokens = 12}; /* 3 sequences a step */
    struct error e = {0};
    assert_int_equal(epochs_to_steps(&t, sequences, &e), 0);
    assert_int_equal(t.total_steps, expected);
}

static void epochs_are_whole_steps(void **state) {
    (void)state;
    check_epochs(1, 30, 10);
    check_epochs(1, 31, 11);
    check_epochs(1, 29, 10);
    check_epochs(1.1, 30, 11); /* 11.000000000000002 */
    check_epochs(0.25, 30, 3);
    check_epochs(1e-9, 30, 1);
    check_epochs(3, 1000000001, 1000000001);
    struct train_config t = {.epochs = 2, .seq_len = 4, .batch_tokens = 4, .warmup_steps = 7};
    struct error e = {0};
    assert_int_equal(epochs_to_steps(&t, 3, &e), -1);
    assert_non_null(strstr(e.text, "train.warmup_steps = 7 is above the 6 steps of train.epochs = 2"));
    assert_int_equal(epochs_to_steps(&t, (int64_t)1 << 30, &e), -1);
    assert_non_null(strstr(e.text, "the limit is 1073741824"));
    t = (struct train_config){.steps = 5, .total_steps = 5}; /* no epochs: nothing changes */
    assert_int_equal(epochs_to_steps(&t, 3, &e), 0);
    assert_int_equal(t.total_steps, 5);
}

static float bf16_value(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* To one of the two neighbours, with the value as the mean; numbers that bf16 holds exactly, inf and NaN
 * stay. */
static void stochastic_rounding_is_unbiased(void **state) {
    (void)state;
    enum { DRAWS = 200000 };
    const float numbers[] = {1.001f, -0.3337f, 3e-30f};
    for (size_t k = 0; k < COUNT(numbers); k++) {
        float x = numbers[k], low = bf16_value(round_stochastic(x, 1, 0)), gap = fabsf(x) / 128;
        double sum = 0;
        for (int i = 0; i < DRAWS; i++) {
            float y = bf16_value(round_stochastic(x, 7, (uint64_t)i * 3));
            assert_true(fabsf(y - x) < gap && fabsf(y - low) <= gap);
            sum += (double)y - (double)x;
        }
        /* The mean of draws that are off by half a gap at most: four deviations. */
        assert_true(fabs(sum / DRAWS) < 4 * 0.5 * (double)gap / sqrt(DRAWS));
    }
    for (uint64_t i = 0; i < 100; i++) {
        assert_true(bf16_value(round_stochastic(-1.5f, 3, i)) == -1.5f);
        assert_true(isinf(bf16_value(round_stochastic(INFINITY, 3, i))));
        assert_true(isnan(bf16_value(round_stochastic(NAN, 3, i))));
    }
    int same = 0;
    for (uint64_t i = 0; i < 1000; i++)
        same += round_stochastic(1.004f, 1, i) == round_stochastic(1.004f, 2, i);
    assert_true(same > 300 && same < 700); /* each step draws anew */
}

/* The tensor nearest to the loss whose gradient is not finite; if all are finite, the largest. */
static void worst_gradient_is_found(void **state) {
    (void)state;
    struct model_config c = plain_config();
    struct model m;
    bool finite;
    open_model(&m, &c, BATCH, RECOMPUTE_NONE);
    for (int i = 0; i < m.params.count; i++) {
        tensor g = model_gradient(&m, i);
        for (int64_t j = 0; j < tensor_count(g); j++)
            ((float *)g.data)[j] = 0.001f;
    }
    int early = m.params.layers[0].up, late = m.params.layers[2].alpha_k;
    ((float *)model_gradient(&m, early).data)[3] = 9;
    assert_int_equal(model_worst_gradient(&m, &finite), early);
    assert_true(finite);
    ((float *)model_gradient(&m, early).data)[3] = NAN;
    ((float *)model_gradient(&m, late).data)[1] = INFINITY;
    assert_int_equal(model_worst_gradient(&m, &finite), late);
    assert_false(finite);
    model_free(&m);
}

/* The state is that of the last bad step; later ones may have begun. */
static void too_many_skips_report_the_steps(void **state) {
    (void)state;
    struct model_config c = plain_config();
    struct step_state seen = {.step = 6, .loss = 3, .skip = STEP_OUTLIER, .grad_norm = 41.5, .zscore = 9.25};
    struct error e = {0};
    struct model m;
    seen.history.skips_run = 3;
    open_model(&m, &c, BATCH, RECOMPUTE_NONE);
    assert_int_equal(skips_fail(&m, &seen, 4.5, &e), -1);
    assert_int_equal(e.exit_code, EXIT_RUN);
    assert_non_null(strstr(e.text, "skip_zscore = 4.5) in 3 steps in a row, the last of them step 7; "));
    assert_non_null(strstr(e.text, "it was 41.5, 9.2 deviations"));
    seen.skip = STEP_NOT_FINITE;
    assert_int_equal(skips_fail(&m, &seen, 0, &e), -1);
    assert_non_null(
        strstr(e.text, "the gradient was not finite in 3 steps in a row, the last of them step 7; "));
    seen.loss = (double)NAN;
    assert_int_equal(skips_fail(&m, &seen, 0, &e), -1);
    assert_non_null(strstr(e.text, "the loss was not finite in 3 steps"));
    model_free(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(worst_gradient_is_found),
        cmocka_unit_test(too_many_skips_report_the_steps),
        cmocka_unit_test(stochastic_rounding_is_unbiased),
        cmocka_unit_test(recompute_is_bit_identical),
        cmocka_unit_test(accumulated_passes_equal_one_pass),
        cmocka_unit_test(every_unit_is_announced_once),
        cmocka_unit_test(adamw_follows_its_equation),
        cmocka_unit_test(clip_and_norm_are_reported),
        cmocka_unit_test(bad_steps_are_skipped),
        cmocka_unit_test(step_write_restores_the_update_count),
        cmocka_unit_test(groups_follow_the_parameter_classes),
        cmocka_unit_test(nan_gradients_leave_the_parameters_unchanged),
        cmocka_unit_test(a_model_overfits_one_batch),
        cmocka_unit_test(learning_rates_at_known_points),
        cmocka_unit_test(epochs_are_whole_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
