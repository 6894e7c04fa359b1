/* Training on several ranks equals training on one, with a communicator that moves bytes only when a wait
 * forces it to, so no buffer may be used while a collective on it is pending. Reduce-scatter overlaps
 * backward. */
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"
#include "tests/lib/segments.h"
#include "tests/lib/thread_comm.h"

enum { STEPS = 3, PASSES = 2, GLOBAL_BATCH = 12 };

/* Which targets count, the same for any number of ranks and passes. */
enum labels {
    ALL_COUNT,
    RAGGED,     /* another number of each sequence, and of the last third of the batch none */
    FIRST_FOUR, /* all of four sequences */
    SECOND_STEP_EMPTY,
};

struct job {
    struct thread_world *world;
    const struct model_config *config;
    int rank, stage, passes;
    int batch; /* sequences of a step, on all ranks; 0: GLOBAL_BATCH */
    enum labels labels;
    bool segments; /* attention stays inside segments of 9 tokens */
    bool muon;
    bool leave_out_second_step;
    double eps;     /* 0: 1e-8; larger than gradients, it makes AdamW depend on their scale */
    float *weights; /* [num_params] at the end */
    double losses[STEPS], norms[STEPS], targets[STEPS];
    int64_t updates, dirty;
    int64_t misplaced;           /* parameters that the optimizer would round by the index of another */
    int not_waited_for;          /* collectives without a wait */
    int started_during_backward; /* reduce-scatters begun before the last matrix product of a pass */
};

/* ---- one rank ---- */

static __thread int products, started;
static __thread int products_at_start[256];

static void count_product(struct device *dev, const struct linear_spec *s, tensor dy, tensor dy_sums,
                          tensor x, tensor w, tensor dx, bool add_dx, tensor dw, tensor dbias,
                          bool accumulate) {
    products++;
    kernels_cpu()->linear_backward(dev, s, dy, dy_sums, x, w, dx, add_dx, dw, dbias, accumulate);
}

static void note_start(struct thread_comm *t, enum collective kind) {
    (void)t;
    if (kind == REDUCE_SCATTER && started < 256)
        products_at_start[started++] = products;
}

/* Sequences first .. first + count - 1 of a step's batch; the batch does not depend on ranks or passes. */
static void fill_batch(int32_t *tokens, int32_t *targets, enum labels labels, int step, int first,
                       int count) {
    for (int b = 0; b < count; b++) {
        int sequence = first + b;
        fixture_tokens(tokens + b * TOKENS, TOKENS, VOCAB, (uint64_t)(step * 100 + sequence));
        fixture_tokens(targets + b * TOKENS, TOKENS, VOCAB, (uint64_t)(step * 100 + sequence + 7000));
        int counted = labels == RAGGED              ? (sequence < 8) * (sequence * 5 + step) % (TOKENS + 1)
                      : labels == FIRST_FOUR        ? (sequence < 4) * TOKENS
                      : labels == SECOND_STEP_EMPTY ? (step != 1) * TOKENS
                                                    : TOKENS;
        for (int t = counted; t < TOKENS; t++)
            targets[b * TOKENS + t] = -1 - t % 2;
    }
}

/* How many elements of padding got a gradient: none may, or they would count in the norm. */
static int64_t dirty_padding(const struct model *m) {
    char *used = calloc((size_t)m->params.elements, 1);
    int64_t dirty = 0;
    for (int i = 0; i < m->params.count; i++)
        memset(used + m->params.list[i].offset, 1, (size_t)m->params.list[i].count);
    for (int b = 0; b < m->partition.bucket_count; b++) {
        const struct shard *s = &m->partition.shards[b];
        for (int64_t i = s->begin; i < s->end; i++)
            dirty += !used[i] && ((const float *)m->moments)[s->local_offset + i - s->begin] != 0;
    }
    free(used);
    return dirty;
}

/* The parameters of a group of a shard whose index in rounding is not their own. */
static int64_t misplaced_in(const struct model *m, const struct shard *s, const struct param_group *g) {
    int64_t begin = s->begin + g->begin, end = s->begin + g->end, misplaced = 0;
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        struct element_range in = param_overlap(p, begin, end);
        if (in.begin < in.end &&
            g->rounding_index + in.begin - begin != p->rounding_index + in.begin - p->offset)
            misplaced += in.end - in.begin;
    }
    return misplaced;
}

static int64_t misplaced_parameters(const struct model *m) {
    int64_t misplaced = 0;
    for (int u = 0; u < m->partition.update_count; u++) {
        const struct shard *s = &m->partition.updates[u];
        for (int i = 0; i < s->group_count; i++)
            misplaced += misplaced_in(m, s, &s->groups[i]);
        for (int i = 0; i < s->muon_count; i++)
            misplaced += misplaced_in(m, s, &s->muon_groups[i]);
    }
    return misplaced;
}

static void train(struct job *j, struct comm *comm, struct device *dev) {
    struct kernels k = *kernels_cpu();
    struct model m;
    struct error e = {0};
    int sequences = j->batch ? j->batch : GLOBAL_BATCH;
    int ranks = comm ? comm->ranks : 1, batch = sequences / ranks / j->passes;
    const struct update_hyper hyper = {
        0.9, 0.95, j->eps > 0 ? j->eps : 1e-8, j->eps > 0 ? 0.25 : 1.0, 0, sequences * TOKENS, 0.9};
    struct model_options options = {
        .shape = {batch, TOKENS, RECOMPUTE_NONE, true, j->segments, j->segments, j->muon},
        .weight_decay = 0.1,
        .mix_lr_scale = 2,
        .muon_lr_scale = 0.5,
        .comm = comm,
        .zero_stage = j->stage};
    int32_t tokens[GLOBAL_BATCH * TOKENS], targets[GLOBAL_BATCH * TOKENS];
    int32_t segments[2 * GLOBAL_BATCH * TOKENS];
    for (int b = 0; b < batch; b++) /* the same in every sequence */
        fill_segments((int64_t[SEGMENT_LENGTHS]){9}, 1, TOKENS, segments + b * TOKENS);
    k.linear_backward = count_product;
    if (model_create(&m, j->config, &k, dev, &options, &e) != 0 || model_initialize(&m, 3, &e) != 0)
        fail_msg("%s", e.text);
    for (int step = 0; step < STEPS; step++) {
        if (step == 1 && j->leave_out_second_step)
            continue;
        k.step_begin(dev, m.state, step, 0.01);
        for (int pass = 0; pass < j->passes; pass++) {
            products = started = 0;
            fill_batch(tokens, targets, j->labels, step, (pass * ranks + j->rank) * batch, batch);
            model_train_pass(&m, (struct batch){tokens, targets, segments}, 1.0 / (sequences * TOKENS), pass,
                             j->passes);
        }
        for (int i = 0; i < started; i++)
            if (step == STEPS - 1)
                j->started_during_backward += products_at_start[i] < products;
        model_update(&m, &hyper);
        j->losses[step] = m.state->loss;
        j->norms[step] = m.state->grad_norm;
        j->targets[step] = m.state->targets;
    }
    model_await_params(&m);
    j->updates = m.state->history.updates;
    j->dirty = dirty_padding(&m);
    j->misplaced = misplaced_parameters(&m);
    j->weights = malloc((size_t)m.params.num_params * sizeof *j->weights);
    for (int i = 0; i < m.params.count; i++)
        model_get_param(&m, i, j->weights + m.params.list[i].packed_offset);
    model_free(&m);
}

static void *run_rank(void *context) {
    struct job *j = context;
    struct thread_comm comm;
    struct error e = {0};
    thread_comm_open(&comm, j->world, j->rank);
    comm.on_start = note_start;
    struct device_options options = {.threads = 1, .precision = DEVICE_FP32, .comm = &comm.base};
    struct device *dev = kernels_cpu()->open(&options, &e);
    train(j, &comm.base, dev);
    for (comm_event i = 1; i <= comm.last; i++)
        j->not_waited_for += !j->world->events[j->rank][i].done;
    kernels_cpu()->close(dev);
    return NULL;
}

/* ---- all ranks ---- */

static void run_ranks(struct job *jobs, const struct model_config *c, enum labels labels, bool segments,
                      bool muon, int ranks, int stage, int passes) {
    static struct thread_world world;
    pthread_t threads[THREAD_RANKS];
    thread_world_open(&world, ranks);
    for (int r = 0; r < ranks; r++) {
        jobs[r] = (struct job){.world = &world,
                               .config = c,
                               .rank = r,
                               .stage = stage,
                               .passes = passes,
                               .labels = labels,
                               .segments = segments,
                               .muon = muon};
        assert_int_equal(pthread_create(&threads[r], NULL, run_rank, &jobs[r]), 0);
    }
    for (int r = 0; r < ranks; r++)
        pthread_join(threads[r], NULL);
    pthread_barrier_destroy(&world.barrier);
}

static int64_t num_params(const struct model_config *c) {
    struct params p;
    struct error e = {0};
    assert_int_equal(params_create(&p, c, 1, &e), 0);
    int64_t n = p.num_params;
    params_free(&p);
    return n;
}

static double distance(const float *a, const float *b, int64_t n) {
    double d = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)a[i] * a[i];
    }
    return sqrt(d / norm);
}

/* Loss, gradient norm and number of targets of every step. */
static bool same_steps(const struct job *a, const struct job *b) {
    for (int step = 0; step < STEPS; step++)
        if (a->targets[step] != b->targets[step] || !(fabs(a->losses[step] - b->losses[step]) < 1e-5) ||
            !(fabs(a->norms[step] - b->norms[step]) <= 1e-5 * a->norms[step]))
            return false;
    return a->updates == b->updates;
}

static void check_config(const struct model_config *c, enum labels labels, bool segments, bool muon) {
    int64_t n = num_params(c);
    struct job one = {.config = c, .passes = 1, .labels = labels, .segments = segments, .muon = muon},
               jobs[THREAD_RANKS];
    train(&one, NULL, fixture_device());
    for (int ranks = 2; ranks <= 3; ranks++)
        for (int stage = 0; stage <= 2; stage++)
            for (int passes = 1; passes <= PASSES; passes++) {
                run_ranks(jobs, c, labels, segments, muon, ranks, stage, passes);
                for (int r = 0; r < ranks; r++) {
                    double d = distance(one.weights, jobs[r].weights, n);
                    /* Three steps of AdamW, whose first divides by the gradient: roundings of 1e-7 of a
                     * gradient near zero are worth a whole step of 0.01 there. */
                    if (!(d < 1e-4) || !same_steps(&one, &jobs[r]))
                        fail_msg("%d ranks, stage %d, %d passes: rank %d is %.2g away", ranks, stage, passes,
                                 r, d);
                    assert_int_equal(jobs[r].not_waited_for, 0);
                    assert_int_equal(jobs[r].dirty, 0);
                    assert_int_equal(jobs[r].misplaced, 0);
                    assert_memory_equal(jobs[r].weights, jobs[0].weights, (size_t)n * sizeof(float));
                }
                for (int r = 0; r < ranks; r++)
                    free(jobs[r].weights);
            }
    free(one.weights);
}

static void several_ranks_train_like_one(void **state) {
    (void)state;
    struct model_config plain = plain_config(), other = other_config();
    /* Layer types in an order in which units that share stage 2's memory differ in their layout. */
    plain.num_hidden_layers = 5;
    plain.layer_types[1] = LAYER_IHA_GLOBAL;
    plain.layer_types[2] = LAYER_MHA_GLOBAL;
    plain.layer_types[4] = LAYER_IHA_LOCAL;
    check_config(&plain, ALL_COUNT, false, false);
    check_config(&other, ALL_COUNT, false, false);
    check_config(&plain, ALL_COUNT, false, true);
    check_config(&other, RAGGED, false, true);
}

/* Where one third of the ranks, and some passes of others, have no target. */
static void ranks_and_passes_with_few_targets(void **state) {
    (void)state;
    struct model_config plain = plain_config();
    check_config(&plain, RAGGED, false, false);
    check_config(&plain, SECOND_STEP_EMPTY, false, false);
    plain.num_hidden_layers = 2;
    check_config(&plain, RAGGED, true, false);
}

static void train_one(struct job *j, int passes) {
    j->passes = passes;
    train(j, NULL, fixture_device());
}

/* Gradients are of the mean over the targets: sequences without any change nothing. */
static void only_targets_are_averaged(void **state) {
    (void)state;
    struct model_config c = plain_config();
    struct job alone = {.config = &c, .batch = 4, .eps = 1},
               some = {.config = &c, .labels = FIRST_FOUR, .eps = 1};
    train_one(&alone, 1);
    assert_true(alone.norms[0] > 0.25); /* clipped */
    for (int passes = 1; passes <= 6; passes++) {
        if (GLOBAL_BATCH % passes)
            continue;
        train_one(&some, passes);
        assert_true(same_steps(&alone, &some));
        assert_true(distance(alone.weights, some.weights, num_params(&c)) < 1e-6);
        free(some.weights);
    }
    free(alone.weights);
}

static void a_step_without_targets_updates_nothing(void **state) {
    (void)state;
    struct model_config c = plain_config();
    for (int muon = 0; muon < 2; muon++) {
        struct job empty = {.config = &c, .labels = SECOND_STEP_EMPTY, .muon = muon},
                   left_out = {.config = &c, .leave_out_second_step = true, .muon = muon};
        train_one(&empty, 2);
        train_one(&left_out, 2);
        assert_int_equal(empty.updates, STEPS - 1);
        assert_true(empty.targets[1] == 0 && empty.norms[1] == 0);
        assert_memory_equal(empty.weights, left_out.weights, (size_t)num_params(&c) * sizeof(float));
        free(empty.weights);
        free(left_out.weights);
    }
}

/* Reduction of the head and of every layer but the first begins before backward's last matrix product. */
static void reduction_overlaps_backward(void **state) {
    (void)state;
    struct model_config c = plain_config();
    struct job jobs[THREAD_RANKS];
    for (int stage = 0; stage <= 2; stage++) {
        run_ranks(jobs, &c, ALL_COUNT, false, false, 2, stage, 1);
        for (int r = 0; r < 2; r++) {
            assert_int_equal(jobs[r].started_during_backward, (int)c.num_hidden_layers);
            free(jobs[r].weights);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(several_ranks_train_like_one),
        cmocka_unit_test(ranks_and_passes_with_few_targets),
        cmocka_unit_test(only_targets_are_averaged),
        cmocka_unit_test(a_step_without_targets_updates_nothing),
        cmocka_unit_test(reduction_overlaps_backward),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
