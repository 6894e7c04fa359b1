/* Training on several ranks equals training on one, with a communicator that moves bytes only when a wait
 * forces it to, so no buffer may be used while a collective on it is pending. Reduce-scatter overlaps
 * backward. */
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"
#include "tests/lib/segments.h"
#include "tests/lib/thread_comm.h"

enum { STEPS = 3, PASSES = 2, GLOBAL_BATCH = 12 };

static const struct update_hyper HYPER = {0.9, 0.95, 1e-8, 1.0, 0, GLOBAL_BATCH *TOKENS};

struct job {
    struct thread_world *world;
    const struct model_config *config;
    int rank, stage, passes;
    bool labels;    /* few targets count, in some passes none, and attention stays inside segments */
    float *weights; /* [num_params] at the end */
    double loss, norm;
    int64_t dirty;
    int not_waited_for;          /* collectives without a wait */
    int started_during_backward; /* reduce-scatters begun before the last matrix product of a pass */
};

/* ---- one rank ---- */

static __thread int products, started;
static __thread int products_at_start[256];

static void count_product(struct device *dev, const struct linear_spec *s, tensor dy, tensor x, tensor w,
                          tensor dx, bool add_dx, tensor dw, tensor dbias, bool accumulate) {
    products++;
    kernels_cpu()->linear_backward(dev, s, dy, x, w, dx, add_dx, dw, dbias, accumulate);
}

static void note_start(struct thread_comm *t, enum collective kind) {
    (void)t;
    if (kind == REDUCE_SCATTER && started < 256)
        products_at_start[started++] = products;
}

/* Of the first third of the step's sequences no target counts, of the others one in 1, 2, 3, ... */
static void drop_targets(int32_t *targets, int first, int count) {
    for (int n = 0; n < count * TOKENS; n++) {
        int sequence = first + n / TOKENS, t = n % TOKENS;
        if (sequence < GLOBAL_BATCH / 3 || t % (sequence - GLOBAL_BATCH / 3 + 1) != 0)
            targets[n] = -1;
    }
}

/* Sequences first .. first + count - 1 of a step's batch; the batch does not depend on ranks or passes. */
static void fill_batch(int32_t *tokens, int32_t *targets, int step, int first, int count) {
    for (int b = 0; b < count; b++) {
        fixture_tokens(tokens + b * TOKENS, TOKENS, VOCAB, (uint64_t)(step * 100 + first + b));
        fixture_tokens(targets + b * TOKENS, TOKENS, VOCAB, (uint64_t)(step * 100 + first + b + 7000));
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

static void train(struct job *j, struct comm *comm, struct device *dev) {
    struct kernels k = *kernels_cpu();
    struct model m;
    struct error e = {0};
    int ranks = comm ? comm->ranks : 1, batch = GLOBAL_BATCH / ranks / j->passes;
    struct model_options options = {.shape = {batch, TOKENS, RECOMPUTE_NONE, true, j->labels, j->labels},
                                    .weight_decay = 0.1,
                                    .mix_lr_scale = 2,
                                    .comm = comm,
                                    .zero_stage = j->stage};
    int32_t tokens[GLOBAL_BATCH * TOKENS], targets[GLOBAL_BATCH * TOKENS];
    int32_t segments[2 * GLOBAL_BATCH * TOKENS];
    fill_segments((int64_t[SEGMENT_LENGTHS]){9}, batch, TOKENS, segments);
    k.linear_backward = count_product;
    if (model_create(&m, j->config, &k, dev, &options, &e) != 0 || model_initialize(&m, 3, &e) != 0)
        fail_msg("%s", e.text);
    for (int step = 0; step < STEPS; step++) {
        k.step_begin(dev, m.state, step, 0.01);
        for (int pass = 0; pass < j->passes; pass++) {
            products = started = 0;
            fill_batch(tokens, targets, step, (pass * ranks + j->rank) * batch, batch);
            if (j->labels)
                drop_targets(targets, (pass * ranks + j->rank) * batch, batch);
            model_train_pass(&m, (struct batch){tokens, targets, segments}, 1.0 / (GLOBAL_BATCH * TOKENS),
                             pass, j->passes);
        }
        for (int i = 0; i < started; i++)
            if (step == STEPS - 1)
                j->started_during_backward += products_at_start[i] < products;
        model_update(&m, &HYPER);
    }
    model_await_params(&m);
    j->loss = m.state->loss;
    j->norm = m.state->grad_norm;
    j->dirty = dirty_padding(&m);
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

static void run_ranks(struct job *jobs, const struct model_config *c, int ranks, int stage, int passes,
                      bool labels) {
    static struct thread_world world;
    pthread_t threads[THREAD_RANKS];
    thread_world_open(&world, ranks);
    for (int r = 0; r < ranks; r++) {
        jobs[r] = (struct job){
            .world = &world, .config = c, .rank = r, .stage = stage, .passes = passes, .labels = labels};
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

static void check_config(const struct model_config *c, bool labels) {
    int64_t n = num_params(c);
    struct job one = {.config = c, .passes = 1, .labels = labels}, jobs[THREAD_RANKS];
    train(&one, NULL, fixture_device());
    for (int ranks = 2; ranks <= 3; ranks++)
        for (int stage = 0; stage <= 2; stage++)
            for (int passes = 1; passes <= PASSES; passes++) {
                run_ranks(jobs, c, ranks, stage, passes, labels);
                for (int r = 0; r < ranks; r++) {
                    double d = distance(one.weights, jobs[r].weights, n);
                    /* Three steps of AdamW, whose first divides by the gradient: roundings of 1e-7 of a
                     * gradient near zero are worth a whole step of 0.01 there. */
                    if (!(d < 1e-4) || !(fabs(one.loss - jobs[r].loss) < 1e-5) ||
                        !(fabs(one.norm - jobs[r].norm) < 1e-5 * one.norm))
                        fail_msg("%d ranks, stage %d, %d passes: rank %d is %.2g away", ranks, stage, passes,
                                 r, d);
                    assert_int_equal(jobs[r].not_waited_for, 0);
                    assert_int_equal(jobs[r].dirty, 0);
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
    check_config(&plain, false);
    check_config(&other, false);
}

/* The mean over the targets of all passes and ranks, though one of them has none. */
static void few_targets_train_alike_on_several_ranks(void **state) {
    (void)state;
    struct model_config c = plain_config();
    c.num_hidden_layers = 2;
    check_config(&c, true);
}

/* Reduction of the head and of every layer but the first begins before backward's last matrix product. */
static void reduction_overlaps_backward(void **state) {
    (void)state;
    struct model_config c = plain_config();
    struct job jobs[THREAD_RANKS];
    for (int stage = 0; stage <= 2; stage++) {
        run_ranks(jobs, &c, 2, stage, 1, false);
        for (int r = 0; r < 2; r++) {
            assert_int_equal(jobs[r].started_during_backward, (int)c.num_hidden_layers);
            free(jobs[r].weights);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(several_ranks_train_like_one),
        cmocka_unit_test(few_targets_train_alike_on_several_ranks),
        cmocka_unit_test(reduction_overlaps_backward),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
