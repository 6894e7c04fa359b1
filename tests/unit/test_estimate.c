/* The estimate of a run: its operations against flops.h, its messages against those of real ranks, its times
 * against a few lines of arithmetic, and its memory against the model's plan. */
#define FIXTURE_THREADS 1
#include "kernels/estimate/hardware.h"
#include "model/flops.h"
#include "model/info/estimate.h"
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"
#include "tests/lib/thread_comm.h"

static void expect_near(const char *what, double is, double want) {
    if (!(fabs(is - want) <= 1e-12 * fabs(want)))
        fail_msg("%s: %.17g instead of %.17g", what, is, want);
}

/* ---- hardware with round figures ---- */

/* Everything infinitely fast; a test sets the rates that it checks. */
static struct gpu_spec fast_gpu(void) {
    const double inf = INFINITY;
    return (struct gpu_spec){.name = "fast",
                             .peak = 1e15,
                             .matmul = inf,
                             .wide = {inf, inf},
                             .narrow = {inf, inf},
                             .builtin = {inf, inf},
                             .cudnn_head_dim = 256,
                             .cudnn_scratch = 1,
                             .cudnn_nan = true,
                             .window = 1,
                             .copy = inf,
                             .mixing = 1,
                             .mixing_matmul = 1,
                             .launch = 0,
                             .memory = 80e9,
                             .reserved = 2e9,
                             .nvlink = inf};
}

static struct link_spec fast_link(void) {
    return (struct link_spec){.name = "fast",
                              .network = INFINITY,
                              .nvlink_attained = 1,
                              .network_attained = 1,
                              .protocols = {{1, 0, 0, 0}, {1, 0, 0, 0}}};
}

static struct estimate_options options_of(const struct gpu_spec *g, const struct link_spec *l, int ranks) {
    return (struct estimate_options){.gpu = g, .link = l, .ranks = ranks, .precision = DEVICE_BF16};
}

static struct config config_of(struct model_config model, int ranks, int passes, int stage) {
    return (struct config){.model = model,
                           .train = {.seq_len = TOKENS,
                                     .micro_batch = BATCH,
                                     .batch_tokens = (int64_t)ROWS * ranks * passes,
                                     .total_steps = 10,
                                     .mix_lr_scale = 1},
                           .system = {.zero_stage = stage}};
}

static struct run_estimate estimate_of(const struct config *c, const struct estimate_options *o) {
    struct run_estimate p;
    struct error e = {0};
    if (estimate_run(&p, c, o, &e) != 0)
        fail_msg("%s", e.text);
    return p;
}

static double sum(const double *values, int count) {
    double s = 0;
    for (int i = 0; i < count; i++)
        s += values[i];
    return s;
}

/* ---- operations ---- */

/* FLOPs of a layer's matrix products that recompute = full runs again: all but `down`. */
static double repeated_products(const struct model_config *m) {
    double C = (double)m->hidden_size, width = (double)(m->num_attention_heads * m->head_dim);
    double ups = m->activation == ACTIVATION_SWIGLU ? 2 : 1;
    return 2 * ROWS * (double)m->num_hidden_layers * (4 * C * width + ups * C * (double)m->intermediate_size);
}

static void check_flops(struct model_config model) {
    struct gpu_spec g = fast_gpu();
    struct link_spec l = fast_link();
    struct estimate_options o = options_of(&g, &l, 1);
    struct flops f = flops_per_token(&model, TOKENS);
    for (int passes = 1; passes <= 2; passes++)
        for (enum recompute mode = RECOMPUTE_NONE; mode <= RECOMPUTE_FULL; mode++) {
            struct config c = config_of(model, 1, passes, 0);
            c.system.recompute = mode;
            struct run_estimate p = estimate_of(&c, &o);
            double again = mode == RECOMPUTE_FULL ? passes * repeated_products(&model) : 0;
            const double *is = p.step.flops, tokens = (double)ROWS * passes;
            /* Products are over the rows that pad the vocabulary too, which the model's FLOPs do not count. */
            double classifier = 6 * tokens * (double)(model.vocab_size * model.hidden_size),
                   padded = 6 * tokens * (double)((model.vocab_size + 127) / 128 * 128 * model.hidden_size);
            expect_near("products", is[ESTIMATE_MATMUL] + is[ESTIMATE_CLASSIFIER] - again,
                        tokens * f.matmul - classifier + padded);
            expect_near("classifier", is[ESTIMATE_CLASSIFIER], padded);
            expect_near("attention", is[ESTIMATE_ATTENTION],
                        tokens * f.attention * (mode == RECOMPUTE_FULL ? 4.0 / 3 : 1));
            expect_near("mixing", is[ESTIMATE_MIXING],
                        tokens * f.mixing * (mode == RECOMPUTE_NONE ? 1 : 4.0 / 3));
        }
}

static void operations_are_those_that_flops_count(void **state) {
    (void)state;
    check_flops(plain_config());
    check_flops(other_config());
}

/* One operation on a GPU of round figures. */
static struct device *device_with(struct gpu_spec *g, struct estimate_options *o) {
    static struct link_spec l;
    struct error e = {0};
    l = fast_link();
    bool exact = o->deterministic;
    *o = options_of(g, &l, 1);
    o->deterministic = exact;
    struct device *dev = estimate_open(o, &e);
    assert_non_null(dev);
    return dev;
}

static void a_product_takes_the_longer_of_its_two_times(void **state) {
    struct gpu_spec g = fast_gpu();
    struct estimate_options o = {0};
    struct linear_spec s = {8, 4, 16}; /* 1024 FLOPs, 2 * (32 + 64 + 128) = 448 bytes */
    (void)state;
    g.launch = 1;
    for (int bound = 0; bound < 2; bound++) {
        g.matmul = bound ? 1e9 : 512;
        g.copy = bound ? 64 : 1e9;
        struct device *dev = device_with(&g, &o);
        kernels_estimate()->linear(dev, &s, tensor_none(), tensor_none(), tensor_none(), tensor_none());
        struct estimate_totals a = estimate_totals(dev);
        assert_true(a.now == (bound ? 7 + 1 : 2 + 1));
        assert_true(a.flops[ESTIMATE_MATMUL] == 1024 && a.bytes[ESTIMATE_MATMUL] == 448 && a.launches == 1);
        kernels_estimate()->close(dev);
    }
}

/* dW (fp32, read as well when added to), the column sums, dx. */
static void backward_of_a_product_by_hand(void **state) {
    struct gpu_spec g = fast_gpu();
    struct estimate_options o = {0};
    struct linear_spec s = {8, 4, 16};
    tensor some = {.data = &g};
    (void)state;
    for (int more = 0; more < 2; more++) {
        struct device *dev = device_with(&g, &o);
        kernels_estimate()->linear_backward(dev, &s, some, tensor_none(), some, some, some, more, some,
                                            more ? some : tensor_none(), more);
        struct estimate_totals a = estimate_totals(dev);
        double dw = 2 * (128 + 32) + 4 * 64 * (more ? 2 : 1), dx = 2 * (128 + 64 + 32 * (more ? 2 : 1));
        assert_true(a.flops[ESTIMATE_MATMUL] == 2048 && a.bytes[ESTIMATE_MATMUL] == dw + dx);
        assert_true(a.bytes[ESTIMATE_ELEMENTWISE] == (more ? 256 : 0) && a.launches == 2 + more);
        kernels_estimate()->close(dev);
    }
}

static bool deterministic;

static double attention_seconds(struct gpu_spec *g, struct attention_spec s, bool backward) {
    struct estimate_options o = {.deterministic = deterministic};
    tensor none = tensor_none();
    struct device *dev = device_with(g, &o);
    if (backward)
        kernels_estimate()->attention_backward(dev, &s, none, none, none, none, none, none, NULL, none, none,
                                               none);
    else
        kernels_estimate()->attention(dev, &s, none, none, none, none, none, NULL);
    double seconds = estimate_totals(dev).now;
    kernels_estimate()->close(dev);
    return seconds;
}

/* Two products and two mixings are what talking heads need; three and three are computed, and ten and twelve backward, of
 * heads padded to 16; with two parts of d the scores, and what follows from them, are computed twice. */
static void talking_heads_by_hand(void **state) {
    struct gpu_spec g = fast_gpu();
    struct estimate_options o = {0};
    (void)state;
    g.talking = 10;
    struct attention_spec s = {2, 4, 3, 8, 1, true, false, 0, 1, false, 0, false};
    tensor none = tensor_none();
    double pairs = 2 * 10, product = 2 * pairs * 3 * 8, mixing = 2 * pairs * 3 * 3,
           padded = 2 * pairs * 16 * 16;
    struct device *dev = device_with(&g, &o);
    kernels_estimate()->talking(dev, &s, none, none, none, none, none, none, none, NULL);
    struct estimate_totals a = estimate_totals(dev);
    assert_true(a.flops[ESTIMATE_ATTENTION] == 2 * product + 2 * mixing);
    expect_near("talking", a.now, (3 * product + 3 * padded) / 10);
    kernels_estimate()->talking_backward(dev, &s, none, none, none, none, none, none, none, NULL, none, none,
                                         none, none, none, false);
    struct estimate_totals b = estimate_totals(dev);
    assert_true(b.flops[ESTIMATE_ATTENTION] == 3 * a.flops[ESTIMATE_ATTENTION]);
    expect_near("talking, backward", b.now - a.now, (10 * product + 12 * padded) / 10);
    s.heads = 20;
    s.head_dim = 128;
    kernels_estimate()->talking(dev, &s, none, none, none, none, none, none, none, NULL);
    product = 2 * pairs * 20 * 128;
    padded = 2 * pairs * 32 * 32;
    expect_near("talking, two parts", estimate_totals(dev).now - b.now, (5 * product + 6 * padded) / 10);
    kernels_estimate()->close(dev);
}

/* A causal square of 128 has 128 * 129 / 2 visible pairs. Backward has five products where forward has two.
 */
static void attention_goes_at_the_rate_of_who_serves_it(void **state) {
    struct gpu_spec g = fast_gpu();
    (void)state;
    g.wide = (struct attention_rate){1000, 500};
    g.narrow = (struct attention_rate){100, 50};
    g.builtin = (struct attention_rate){10, 5};
    g.window = 0.5;
    double product = 2 * 128 * (128 * 129 / 2);
    struct attention_spec s = {1, 128, 1, 128, 1, true, false, 0, 1, false, 0, false}, t = s;
    expect_near("wide", attention_seconds(&g, s, false), 2 * product / 1000);
    expect_near("wide, backward", attention_seconds(&g, s, true), 5 * product / 500);
    t.head_dim = 64;
    expect_near("narrow", attention_seconds(&g, t, false), product / 100);
    t.head_dim = 68; /* not a multiple of 8 */
    expect_near("own", attention_seconds(&g, t, false), 2 * product * 68 / 128 / 10);
    t = s;
    t.window = 1;
    expect_near("window", attention_seconds(&g, t, false), 2 * 2 * 128 * 128 / 500.0);
    t.causal = false;
    expect_near("not causal", attention_seconds(&g, t, true), 5 * 2 * 128 * (128 * 129 / 2.0) / 5);
    t = s;
    t.pseudo = 2;
    t.token_mask = true; /* half of the queries see one key more */
    expect_near("token mask", attention_seconds(&g, t, false), 2 * 2 * 128 * (128 * 129 / 2.0 + 64) / 10);
    t = s;
    deterministic = true; /* cuDNN needs 2 B H S^2 bytes: over 256 MiB from S = 11586 for one head */
    expect_near("deterministic", attention_seconds(&g, t, false), 2 * product / 1000);
    t.length = 11648;
    expect_near("too large", attention_seconds(&g, t, false), 2 * 2 * 128 * (11648 * 11649 / 2.0) / 10);
    deterministic = false;
    expect_near("large", attention_seconds(&g, t, false), 2 * 2 * 128 * (11648 * 11649 / 2.0) / 1000);
    t = s;
    t.length = 64;
    expect_near("64 mod 128", attention_seconds(&g, t, false), 2 * 2 * 128 * (64 * 65 / 2.0) / 10);
}

static void mixing_moves_what_it_reads_and_writes(void **state) {
    struct gpu_spec g = fast_gpu();
    struct estimate_options o = {0};
    struct qkv_mix_spec s = {1, 10, 4, 8, 3, true, true, true, 0};
    struct collapse_spec r = {1, 10, 4, 8, 3, false};
    const double one = 10 * 4 * 8 * 2; /* bytes of one of q, k, v */
    tensor t = tensor_none();
    (void)state;
    g.copy = 100;
    g.mixing = 0.5;
    struct device *dev = device_with(&g, &o);
    const struct kernels *k = kernels_estimate();
    double want = 0;
    k->qkv_mix(dev, &s, t, t, t, t, t, tensor_none(), 0, t, t, t);
    assert_true(estimate_totals(dev).bytes[ESTIMATE_MIXING] == (want += 3 * 4 * one));
    k->qkv_mix_backward(dev, &s, t, t, t, t, t, t, t, t, t, t, t, t, t, false);
    assert_true(estimate_totals(dev).bytes[ESTIMATE_MIXING] == (want += 3 * 5 * one));
    struct qkv_mix_spec rotation = {1,     10,   4,    8, 1,
                                    false, true, true, 2}; /* q and k of half the heads, in place */
    k->qkv_mix(dev, &rotation, t, t, t, t, t, tensor_none(), 0, t, t, t);
    assert_true(estimate_totals(dev).bytes[ESTIMATE_MIXING] == (want += 2 * 1.5 * one));
    k->qkv_mix_backward(dev, &rotation, t, t, t, t, t, t, t, t, t, t, t, t, t, false);
    assert_true(estimate_totals(dev).bytes[ESTIMATE_MIXING] == (want += 2 * 1.5 * one));
    k->collapse(dev, &r, t, t, t);
    assert_true(estimate_totals(dev).bytes[ESTIMATE_MIXING] == (want += 4 * one));
    k->collapse_backward(dev, &r, t, t, t, t, t, false);
    assert_true(estimate_totals(dev).bytes[ESTIMATE_MIXING] == (want += 7 * one));
    expect_near("seconds", estimate_totals(dev).now, want / 50);
    k->close(dev);
}

/* What an operation has added to *seen bytes. */
static double added(const struct device *dev, enum estimate_part part, double *seen) {
    double before = *seen;
    *seen = estimate_totals(dev).bytes[part];
    return *seen - before;
}

/* Bytes of each operation that only moves them, in units of its rows times its width. */
static void the_rest_moves_what_it_reads_and_writes(void **state) {
    struct gpu_spec g = fast_gpu();
    struct estimate_options o = {0};
    struct norm_spec norm = {NORM_TYPE_RMS, 1e-5, 6, 10};
    struct act_spec gelu = {ACT_GELU_TANH, 6, 10}, swiglu = {ACT_SWIGLU, 6, 10};
    struct embed_spec embed = {2, 3, 50, 10};
    tensor no = tensor_none(), yes = {.data = &g};
    const double one = 6 * 10 * 2, positions = 3 * 10;
    (void)state;
    struct device *dev = device_with(&g, &o);
    const struct kernels *k = kernels_estimate();
    double seen = 0;
    k->residual_norm(dev, &norm, yes, no, yes, no, no, yes, NULL);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 2 * one);
    k->residual_norm(dev, &norm, yes, yes, yes, no, yes, yes, NULL);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 4 * one);
    k->residual_norm_recompute(dev, &norm, yes, yes, no, yes, NULL);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 2 * one);
    k->residual_norm_backward(dev, &norm, yes, yes, yes, NULL, yes, true, yes, no, no, false);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 4 * one);
    k->residual_norm_backward(dev, &norm, yes, yes, yes, NULL, yes, false, yes, no, yes, false);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 3 * one);
    k->mlp_act(dev, &gelu, yes, no, yes);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 2 * one);
    k->mlp_act(dev, &swiglu, yes, yes, yes);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 3 * one);
    k->mlp_act_backward(dev, &gelu, yes, yes, no, yes, no);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 3 * one);
    k->mlp_act_backward(dev, &swiglu, yes, yes, yes, yes, yes);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 5 * one);
    k->embed(dev, &embed, yes, yes, no, no, 0, yes);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 2 * one);
    k->embed(dev, &embed, yes, yes, yes, no, 0, yes);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 2 * one + 2 * positions);
    k->embed_backward(dev, &embed, yes, no, yes, yes, no); /* 4 bytes in and out for 2 of dx */
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == one + 4 * one);
    k->embed_backward(dev, &embed, yes, no, yes, yes, yes);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == one + 4 * one + one + 8 * positions);
    k->zero(dev, NULL, 77);
    assert_true(added(dev, ESTIMATE_ELEMENTWISE, &seen) == 77);
    seen = 0;
    tensor fp32 = tensor_of(&g, DTYPE_F32, 5, 0, 0, 0, 0), bf16 = tensor_of(&g, DTYPE_BF16, 5, 0, 0, 0, 0);
    k->sumsq(dev, fp32, NULL);
    assert_true(added(dev, ESTIMATE_OPTIMIZER, &seen) == 5 * 4);
    k->adamw(dev, NULL, NULL, 0, fp32, bf16, fp32, fp32, fp32, NULL);
    assert_true(added(dev, ESTIMATE_OPTIMIZER, &seen) == 5 * (4 + 3 * 8 + 2));
    k->adamw(dev, NULL, NULL, 0, fp32, no, fp32, fp32, fp32, NULL);
    assert_true(added(dev, ESTIMATE_OPTIMIZER, &seen) == 5 * (4 + 3 * 8));
    k->close(dev);
}

/* Logits of 1 GiB in bf16 are made in two chunks: each reads W twice and adds to dW, the second reads it too.
 * Evaluation makes logits and reads them once. */
static void a_classifier_works_in_chunks(void **state) {
    struct gpu_spec g = fast_gpu();
    struct estimate_options o = {0};
    struct classifier_spec s = {1 << 11, 8, 1 << 18, 0};
    const double h = 2.0 * (1 << 11) * 8, w = 2.0 * 8 * (1 << 18), logits = 1 << 30;
    tensor no = tensor_none(), yes = {.data = &g};
    (void)state;
    g.memory = 32.0 * (1 << 30);
    struct device *dev = device_with(&g, &o);
    kernels_estimate()->classifier(dev, &s, yes, yes, yes, 1, NULL, no, yes, yes, false);
    struct estimate_totals a = estimate_totals(dev);
    expect_near("bytes", a.bytes[ESTIMATE_CLASSIFIER], 5 * logits + 3 * h + 2 * 2 * w + 2 * w * 3);
    expect_near("flops", a.flops[ESTIMATE_CLASSIFIER], 6.0 * 8 * (1 << 18) * (1 << 11));
    assert_int_equal(a.launches, 8);
    kernels_estimate()->classifier(dev, &s, yes, yes, yes, 1, NULL, no, no, no, false);
    double more = estimate_totals(dev).bytes[ESTIMATE_CLASSIFIER] - a.bytes[ESTIMATE_CLASSIFIER];
    expect_near("evaluation", more, 2 * logits + h + 2 * w);
    kernels_estimate()->close(dev);
}

static void note_logits(void *context, const struct estimate_launch *l) {
    int64_t *rows = context;
    if (l->inner != 8)
        return;
    while (*rows > 0)
        rows++;
    *rows = (int64_t)l->rows;
}

/* As in kernels/cuda/classifier.cu: 1024 rows would fit, but 2560 are made in three chunks of multiples of 128. */
static void chunks_are_of_about_equal_size(void **state) {
    int64_t rows[8] = {0};
    struct gpu_spec g = fast_gpu();
    struct link_spec l = fast_link();
    struct estimate_options o = options_of(&g, &l, 1);
    struct classifier_spec s = {2560, 8, 1 << 18, 0};
    struct error e = {0};
    tensor no = tensor_none(), yes = {.data = &g};
    (void)state;
    g.memory = 32.0 * (1 << 30);
    o.launched = note_logits;
    o.context = rows;
    struct device *dev = estimate_open(&o, &e);
    assert_non_null(dev);
    kernels_estimate()->classifier(dev, &s, yes, yes, yes, 1, NULL, no, no, no, false);
    kernels_estimate()->close(dev);
    assert_true(rows[0] == 896 && rows[1] == 896 && rows[2] == 768 && rows[3] == 0);
}

/* ---- messages ---- */

struct sent {
    int64_t messages[MESSAGES];
    double bytes[MESSAGES];
};

struct job {
    struct thread_world *world;
    const struct config *config;
    int rank;
    struct sent sent;
};

static __thread struct sent *counting;
static __thread const struct comm_ops *real_ops;

static void count(enum estimate_message kind, double bytes) {
    counting->messages[kind]++;
    counting->bytes[kind] += bytes;
}

static double bytes_of(tensor t) {
    return (double)tensor_count(t) * (double)dtype_bytes(t.dtype);
}

static comm_event counted_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    count(MESSAGE_REDUCE_SCATTER, bytes_of(buffer));
    return real_ops->reduce_scatter(c, buffer, piece, accumulate);
}

static comm_event counted_all_gather(struct comm *c, tensor buffer) {
    count(MESSAGE_ALL_GATHER, bytes_of(buffer));
    return real_ops->all_gather(c, buffer);
}

static void counted_all_reduce(struct comm *c, double *values, int n) {
    count(MESSAGE_ALL_REDUCE, (double)n * sizeof *values);
    real_ops->all_reduce(c, values, n);
}

/* One step of a real rank, in fp32 on the CPU. */
static void *run_rank(void *context) {
    struct job *j = context;
    const struct config *c = j->config;
    struct thread_comm comm;
    struct error e = {0};
    struct model m;
    int32_t tokens[ROWS], targets[ROWS];
    int passes = (int)(c->train.batch_tokens / ROWS / j->world->ranks);
    thread_comm_open(&comm, j->world, j->rank);
    real_ops = comm.base.ops;
    struct comm_ops ops = *real_ops;
    ops.reduce_scatter = counted_reduce_scatter;
    ops.all_gather = counted_all_gather;
    ops.all_reduce = counted_all_reduce;
    comm.base.ops = &ops;
    counting = &j->sent;
    struct device_options device = {.threads = 1, .precision = DEVICE_FP32, .comm = &comm.base};
    struct device *dev = kernels_cpu()->open(&device, &e);
    struct model_options options = {.shape = {BATCH, TOKENS, RECOMPUTE_NONE, true},
                                    .mix_lr_scale = 1,
                                    .comm = &comm.base,
                                    .zero_stage = (int)c->system.zero_stage};
    if (!dev || model_create(&m, &c->model, kernels_cpu(), dev, &options, &e) != 0)
        fail_msg("%s", e.text);
    fixture_tokens(tokens, ROWS, VOCAB, 1);
    fixture_tokens(targets, ROWS, VOCAB, 2);
    m.k->step_begin(dev, m.state, 0, 0.01);
    for (int pass = 0; pass < passes; pass++)
        model_train_pass(&m, (struct batch){tokens, targets, NULL}, 1.0 / (double)c->train.batch_tokens, pass,
                         passes);
    model_update(&m, &(struct update_hyper){0.9, 0.95, 1e-8, 1.0, 0, (double)c->train.batch_tokens, 0});
    model_free(&m);
    kernels_cpu()->close(dev);
    return NULL;
}

static void run_ranks(struct job *jobs, const struct config *c, int ranks) {
    static struct thread_world world;
    pthread_t threads[THREAD_RANKS];
    thread_world_open(&world, ranks);
    for (int r = 0; r < ranks; r++) {
        jobs[r] = (struct job){.world = &world, .config = c, .rank = r};
        assert_int_equal(pthread_create(&threads[r], NULL, run_rank, &jobs[r]), 0);
    }
    for (int r = 0; r < ranks; r++)
        pthread_join(threads[r], NULL);
    pthread_barrier_destroy(&world.barrier);
}

/* Gradients in fp32, summed in every pass in stage 2; what is gathered is gradients in stage 0, and
 * parameters in the type they are read in otherwise. */
static void check_bytes(const struct config *c, const struct run_estimate *p, int ranks, double parameter) {
    struct params params;
    struct error e = {0};
    assert_int_equal(params_create(&params, &c->model, ranks, &e), 0);
    double n = (double)params.elements, sums = c->system.zero_stage == 2 ? (double)p->passes : 1;
    assert_true(p->step.message_bytes[MESSAGE_REDUCE_SCATTER] == 4 * n * sums);
    assert_true(p->step.message_bytes[MESSAGE_ALL_GATHER] == (c->system.zero_stage == 0 ? 4 : parameter) * n);
    params_free(&params);
}

static void check_messages(struct model_config model, int ranks, int stage, int passes) {
    struct gpu_spec g = fast_gpu();
    struct link_spec l = fast_link();
    struct estimate_options o = options_of(&g, &l, ranks);
    struct config c = config_of(model, ranks, passes, stage);
    struct job jobs[THREAD_RANKS];
    o.precision = DEVICE_FP32;
    run_ranks(jobs, &c, ranks);
    struct run_estimate p = estimate_of(&c, &o);
    assert_int_equal(p.passes, passes);
    for (int r = 0; r < ranks; r++)
        for (int kind = 0; kind < MESSAGES; kind++) {
            assert_int_equal(p.step.messages[kind], jobs[r].sent.messages[kind]);
            assert_true(p.step.message_bytes[kind] == jobs[r].sent.bytes[kind]);
        }
    check_bytes(&c, &p, ranks, 4);
    o.precision = DEVICE_BF16;
    p = estimate_of(&c, &o);
    check_bytes(&c, &p, ranks, 2);
}

static void messages_are_those_that_real_ranks_send(void **state) {
    (void)state;
    for (int ranks = 2; ranks <= 4; ranks++)
        for (int stage = 0; stage <= 2; stage++)
            for (int passes = 1; passes <= 2; passes++)
                check_messages(ranks == 3 ? other_config() : plain_config(), ranks, stage, passes);
}

static void one_rank_sends_nothing(void **state) {
    struct gpu_spec g = fast_gpu();
    struct link_spec l = {.name = "broken"};
    struct estimate_options o = options_of(&g, &l, 1);
    (void)state;
    for (int stage = 0; stage <= 2; stage++) {
        struct config c = config_of(plain_config(), 1, 2, stage);
        struct run_estimate p = estimate_of(&c, &o);
        assert_true(sum(p.step.moving, MESSAGES) == 0 && sum(p.step.exposed, MESSAGES) == 0);
        assert_true(p.step.messages[MESSAGE_REDUCE_SCATTER] == 0 && p.step.messages[MESSAGE_ALL_REDUCE] == 0);
    }
}

/* ---- times ---- */

static void a_timeline_by_hand(void **state) {
    static struct timeline t;
    (void)state;
    timeline_compute(&t, 3);
    int64_t first = timeline_send(&t, MESSAGE_REDUCE_SCATTER, 4); /* 3 to 7 */
    timeline_compute(&t, 2);
    int64_t second = timeline_send(&t, MESSAGE_REDUCE_SCATTER, 1); /* ready at 5, but 7 to 8 */
    assert_true(t.compute_end == 5 && t.link_end == 8);
    timeline_wait(&t, 0);
    assert_true(t.compute_end == 5);
    timeline_wait(&t, first);
    assert_true(t.compute_end == 7 && t.exposed[MESSAGE_REDUCE_SCATTER] == 2);
    timeline_compute(&t, 5);
    timeline_wait(&t, second); /* arrived before */
    assert_true(t.compute_end == 12 && t.exposed[MESSAGE_REDUCE_SCATTER] == 2);
    int64_t third = timeline_send(&t, MESSAGE_ALL_GATHER, 10); /* the link was idle: 12 to 22 */
    timeline_wait(&t, third);
    timeline_wait(&t, third);
    assert_true(t.compute_end == 22 && t.exposed[MESSAGE_ALL_GATHER] == 10);
    assert_true(t.moving[MESSAGE_REDUCE_SCATTER] == 5 && t.moving[MESSAGE_ALL_GATHER] == 10);
}

static void a_ring_by_hand(void **state) {
    struct gpu_spec g = fast_gpu();
    struct link_spec l = fast_link();
    (void)state;
    g.nvlink = 1000;
    l.nvlink_attained = 0.5;
    l.network = 100;
    l.network_attained = 0.25; /* 8 * 100 * 0.25 = 200 a node, where NVLink has 500 */
    l.protocols[0] = (struct ring_protocol){1, 3, 0.5, 2};
    l.protocols[1] = (struct ring_protocol){0.5, 1, 0.25, 1};
    expect_near("one rank", collective_seconds(&g, &l, 1, 1e6), 0);
    expect_near("one node", collective_seconds(&g, &l, 4, 40000), 0.75 * 40000 / 500 + 3 + 3 * 0.5);
    expect_near("two nodes", collective_seconds(&g, &l, 16, 64000), 60000 / 200.0 + 3 + 14 * 0.5 + 2);
    expect_near("a short one", collective_seconds(&g, &l, 16, 64), 60 / 100.0 + 1 + 14 * 0.25 + 1);
    l.all_reduce_base = 7;
    l.all_reduce_step = 0.5;
    l.all_reduce_step_between_nodes = 2;
    expect_near("a tree", all_reduce_seconds(&l, 32), 7 + 2 * (7 * 0.5 + 2 * 2));
    expect_near("a tree of one", all_reduce_seconds(&l, 1), 0);
}

/* Relations that must hold between the figures of the hand-written table. */
static void figures_are_possible(void **state) {
    (void)state;
    for (int i = 0; gpu_names[i]; i++) {
        const struct gpu_spec *g = gpu_spec(gpu_names[i]);
        assert_non_null(g);
        assert_true(g->matmul < g->peak && g->wide.forward < g->matmul &&
                    g->builtin.forward < g->wide.forward);
        assert_true(g->narrow.forward < g->wide.forward && g->wide.backward < g->wide.forward);
        assert_true(g->narrow.backward < g->narrow.forward && g->builtin.backward < g->builtin.forward);
        assert_true(g->window < 1 && g->mixing < 1 && g->copy > 1e12 && g->copy < 5e12);
        assert_true(g->reserved < 0.1 * g->memory && g->nvlink > 50e9 && g->launch < 1e-5);
        for (int j = 0; link_names[j]; j++) {
            const struct link_spec *l = link_spec(link_names[j]);
            assert_non_null(l);
            double node = collective_seconds(g, l, 8, 1e9);
            assert_true(node > 0.875e9 / g->nvlink && node < 2 * 0.875e9 / g->nvlink);
            assert_true(l->network == 0 || collective_seconds(g, l, 16, 1e9) > node);
        }
    }
    assert_null(gpu_spec("h20"));
    assert_null(link_spec(""));
}

static struct model_config layers(int count) {
    struct model_config m = plain_config();
    m.num_hidden_layers = count;
    for (int i = 0; i < count; i++)
        m.layer_types[i] = LAYER_IHA_LOCAL;
    return m;
}

/* A GPU on which a step takes milliseconds, and a link with `bandwidth` bytes/s. */
static struct run_estimate on_link(struct model_config model, int ranks, int stage, double bandwidth) {
    struct gpu_spec g = *gpu_spec("h200");
    struct link_spec l = fast_link();
    g.nvlink = bandwidth;
    struct estimate_options o = options_of(&g, &l, ranks);
    struct config c = config_of(model, ranks, 1, stage);
    return estimate_of(&c, &o);
}

static void a_fast_link_is_hidden_and_a_slow_one_is_all_there_is(void **state) {
    (void)state;
    for (int stage = 0; stage <= 2; stage++) {
        struct run_estimate p = on_link(layers(4), 4, stage, INFINITY);
        assert_true(sum(p.step.exposed, MESSAGES) == 0);
        assert_true(p.step.message_bytes[MESSAGE_REDUCE_SCATTER] > 0);
        expect_near("step", p.step.now, p.compute);
        p = on_link(layers(4), 4, stage, 1e3);
        double moving = sum(p.step.moving, MESSAGES);
        assert_true(p.step.now >= moving && p.step.now <= moving + p.compute && p.compute < 0.01 * moving);
    }
}

/* A step takes at least as long as computation and as communication alone, and at most as long as both one
 * after the other. */
static void a_step_is_computing_and_waiting(void **state) {
    double before = INFINITY;
    (void)state;
    for (double bandwidth = 1e6; bandwidth < 1e12; bandwidth *= 4)
        for (int stage = 0; stage <= 2; stage++) {
            struct run_estimate p = on_link(layers(4), 4, stage, bandwidth);
            double moving = sum(p.step.moving, MESSAGES), exposed = sum(p.step.exposed, MESSAGES);
            assert_true(fabs(p.step.now - p.compute - exposed) < 1e-9 * p.step.now);
            assert_true(exposed <= moving * (1 + 1e-9));
            if (stage == 1) {
                assert_true(exposed <= before);
                before = exposed;
            }
        }
}

/* The reduction of all but the last gradients overlaps with backward, so the exposed part shrinks with the
 * number of layers. */
static void layers_hide_each_other(void **state) {
    struct run_estimate one, many;
    (void)state;
    for (int stage = 1; stage <= 2; stage++) {
        /* A link on which a layer's gradients take half as long as its backward. */
        one = on_link(layers(1), 4, stage, INFINITY);
        many = on_link(layers(9), 4, stage, INFINITY);
        double layer = (many.compute - one.compute) / 8;
        double bytes = (many.step.message_bytes[MESSAGE_REDUCE_SCATTER] -
                        one.step.message_bytes[MESSAGE_REDUCE_SCATTER]) /
                       8;
        double bandwidth = 0.75 * bytes / (0.25 * layer);
        one = on_link(layers(1), 4, stage, bandwidth);
        many = on_link(layers(9), 4, stage, bandwidth);
        double least = many.step.exposed[MESSAGE_REDUCE_SCATTER];
        assert_true(least > 0); /* nothing overlaps with the embeddings' gradients */
        assert_true(least <= one.step.exposed[MESSAGE_REDUCE_SCATTER] * (1 + 1e-9));
        assert_true(many.step.moving[MESSAGE_REDUCE_SCATTER] > 3 * one.step.moving[MESSAGE_REDUCE_SCATTER]);
    }
}

static void speed_and_mfu_follow_from_the_step(void **state) {
    struct link_spec l = *link_spec("ib400");
    struct estimate_options o = options_of(gpu_spec("a100"), &l, 16);
    struct config c = config_of(plain_config(), 16, 3, 2);
    struct run_estimate p = estimate_of(&c, &o);
    struct flops f = flops_per_token(&c.model, TOKENS);
    (void)state;
    assert_int_equal(p.passes, 3);
    expect_near("speed", p.tokens_per_second, ROWS * 16 * 3 / p.step.now);
    expect_near("MFU", p.mfu, (f.matmul + f.attention + f.mixing) * ROWS * 3 / (p.step.now * 312e12));
}

/* ---- memory ---- */

static void memory_is_what_the_model_plans(void **state) {
    struct gpu_spec g = fast_gpu();
    struct link_spec l = fast_link();
    struct pass_shape shape = {BATCH, TOKENS, RECOMPUTE_LIGHT, true, false, false, false};
    struct error e = {0};
    (void)state;
    for (int stage = 0; stage <= 2; stage++) {
        struct estimate_options o = options_of(&g, &l, 4);
        struct config c = config_of(other_config(), 4, 1, stage);
        c.system.recompute = RECOMPUTE_LIGHT;
        struct memory_plan cpu, paper = estimate_of(&c, &o).memory;
        assert_int_equal(
            model_memory(&c.model, kernels_cpu(), fixture_device(), &shape, 4, stage, DTYPE_F32, &cpu, &e),
            0);
        /* Parameters and activations in 2 bytes, and master weights beside the moments, in 4. */
        assert_int_equal(2 * paper.parameters, cpu.parameters);
        assert_int_equal(paper.gradients, cpu.gradients);
        assert_int_equal(2 * paper.optimizer, 3 * cpu.optimizer);
        assert_true(paper.activations < cpu.activations && paper.activations > cpu.activations / 3);
        o.precision = DEVICE_FP32;
        paper = estimate_of(&c, &o).memory;
        assert_int_equal(paper.parameters, cpu.parameters);
        assert_int_equal(paper.optimizer, cpu.optimizer);
        /* A GPU sums one share at a time; the CPU keeps three whole buckets in flight. */
        assert_int_equal(3 * 4 * paper.messages, cpu.messages);
        assert_int_equal(paper.snapshot, cpu.snapshot);
    }
}

/* A GPU that is a little too small, then one that is too small for any setting. */
static void advice_fits(void **state) {
    struct gpu_spec g = fast_gpu();
    struct link_spec l = fast_link();
    struct estimate_options o = options_of(&g, &l, 4);
    struct config c = config_of(layers(24), 4, 1, 0), changed;
    struct memory_plan plan = {0};
    struct error e = {0};
    (void)state;
    c.model.hidden_size = 1024;
    c.model.intermediate_size = 4096;
    c.train.seq_len = 1024;
    c.train.micro_batch = 8;
    c.train.batch_tokens = 4 * 8 * 1024;
    plan = estimate_of(&c, &o).memory;
    g.memory = g.reserved + 0.9 * (double)memory_total(&plan);
    for (int attempt = 0; attempt < FIT_ATTEMPTS; attempt++) {
        assert_int_equal(estimate_fit(&c, &o, attempt, &changed, &plan, &e), 1);
        struct memory_plan again = estimate_of(&changed, &o).memory;
        assert_int_equal(memory_total(&again), memory_total(&plan));
        assert_true((double)memory_total(&plan) <= estimate_usable_memory(&g));
        assert_int_equal(changed.train.micro_batch, attempt == 0 ? 4 : 8);
        assert_int_equal(changed.system.recompute, attempt == 1 ? RECOMPUTE_LIGHT : RECOMPUTE_NONE);
        assert_int_equal(changed.system.zero_stage, attempt >= 2);
    }
    g.memory = g.reserved + 1;
    for (int attempt = 0; attempt < FIT_ATTEMPTS; attempt++)
        assert_int_equal(estimate_fit(&c, &o, attempt, &changed, &plan, &e), 0);
    assert_true(changed.train.micro_batch == 1 && changed.system.recompute == RECOMPUTE_FULL &&
                changed.system.zero_stage == 2); /* every setting was tried */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(operations_are_those_that_flops_count),
        cmocka_unit_test(a_product_takes_the_longer_of_its_two_times),
        cmocka_unit_test(backward_of_a_product_by_hand),
        cmocka_unit_test(talking_heads_by_hand),
        cmocka_unit_test(attention_goes_at_the_rate_of_who_serves_it),
        cmocka_unit_test(mixing_moves_what_it_reads_and_writes),
        cmocka_unit_test(the_rest_moves_what_it_reads_and_writes),
        cmocka_unit_test(a_classifier_works_in_chunks),
        cmocka_unit_test(chunks_are_of_about_equal_size),
        cmocka_unit_test(messages_are_those_that_real_ranks_send),
        cmocka_unit_test(one_rank_sends_nothing),
        cmocka_unit_test(a_timeline_by_hand),
        cmocka_unit_test(a_ring_by_hand),
        cmocka_unit_test(figures_are_possible),
        cmocka_unit_test(a_fast_link_is_hidden_and_a_slow_one_is_all_there_is),
        cmocka_unit_test(a_step_is_computing_and_waiting),
        cmocka_unit_test(layers_hide_each_other),
        cmocka_unit_test(speed_and_mfu_follow_from_the_step),
        cmocka_unit_test(memory_is_what_the_model_plans),
        cmocka_unit_test(advice_fits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
