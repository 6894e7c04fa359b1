/* The program behind `make bench-gpu`: measures the CUDA backend, asserts nothing, and prints a Markdown
 * table.
 *
 * Times are medians over --repeats samples by CUDA events on the device's queue. Bytes count every input read
 * once and every output written once; the ceilings, a copy within device memory and a bf16 matrix product,
 * are measured again before each item, and ratios are against their medians. Progress goes to stderr. Without
 * a GPU every row says "not measured". To measure one more thing, write its function and add a line to ITEMS.
 */
#include <math.h>

#include "kernels/cuda/comm/comm_sums.h"
#include "model/flops.h"
#include "tests/bench/bench_gpu_measure.h"
#include "tests/bench/bench_gpu_pairs.h"
#include "tests/bench/bench_models.h"

enum { MATMUL_SIZE = 8192 };
static const size_t GPU_COPY_BYTES = (size_t)1 << 30;

/* ---- measuring ---- */

/* Operands of one operation, and what its plan asked for. */
enum { OPERANDS = 16 };
struct job {
    struct bench *b;
    struct op_spec spec;
    void (*run)(struct job *j);
    tensor t[OPERANDS];
    int count;
    void *saved, *workspace;
};

static void run_job(void *context) {
    struct job *j = context;
    j->run(j);
}

static void job_open(struct job *j, struct bench *b, struct op_spec spec) {
    struct op_cost cost = {0, 0};
    struct error e = {0};
    *j = (struct job){.b = b, .spec = spec};
    if (b->k->plan(b->dev, &spec, &cost, &e) != 0)
        bench_fail(&e);
    j->saved = bench_alloc(b, cost.saved);
    j->workspace = bench_alloc(b, cost.workspace);
    b->k->set_workspace(b->dev, j->workspace, cost.workspace);
}

static tensor *job_operand(struct job *j, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    j->t[j->count] = bench_noise(j->b, s0, s1, s2, s3, s4);
    return &j->t[j->count++];
}

/* In fp32, zero. */
static tensor *job_float(struct job *j, int64_t s0, int64_t s1, int64_t s2) {
    tensor t = tensor_of(NULL, DTYPE_F32, s0, s1, s2, 0, 0);
    t.data = bench_alloc(j->b, (size_t)tensor_count(t) * sizeof(float));
    j->t[j->count] = t;
    return &j->t[j->count++];
}

static void job_close(struct job *j) {
    const struct kernels *k = j->b->k;
    k->set_workspace(j->b->dev, NULL, 0);
    for (int i = 0; i < j->count; i++)
        k->release(j->b->dev, j->t[i].data);
    k->release(j->b->dev, j->saved);
    k->release(j->b->dev, j->workspace);
}

static void bandwidth_row(struct table *t, struct job *j, void (*run)(struct job *), double bytes,
                          const char *what) {
    j->run = run;
    struct summary s = time_work(j->b, run_job, j);
    double copy = copy_rate(j->b, 0) * ((double)GPU_COPY_BYTES / (double)COPY_BYTES);
    struct row *row = table_row(t, "%s", what);
    cell_seconds(row->took, s);
    cell(row->rate, "%.0f GB/s", bytes / s.median / 1e9);
    cell(row->beside, "copy %.0f GB/s", copy / 1e9);
    cell(row->ratio, "%.2f", bytes / s.median / copy);
    row_progress(row);
}

static double matmul_rate(const struct bench *b) {
    return 2 * pow(MATMUL_SIZE, 3) / samples_summary(&b->sgemm, 0).median;
}

static void flops_row(struct table *t, struct job *j, void (*run)(struct job *), double flops,
                      const char *what) {
    j->run = run;
    struct summary s = time_work(j->b, run_job, j);
    struct row *row = table_row(t, "%s", what);
    cell_seconds(row->took, s);
    cell(row->rate, "%.0f TFLOP/s", flops / s.median / 1e12);
    cell(row->beside, "matmul %.0f TFLOP/s", matmul_rate(j->b) / 1e12);
    cell(row->ratio, "%.2f", flops / s.median / matmul_rate(j->b));
    row_progress(row);
}

/* ---- ceilings ---- */

static void run_device_copy(struct job *j) {
    timing_copy(j->b->dev, j->t[1].data, j->t[0].data, GPU_COPY_BYTES);
}

static void run_linear(struct job *j) {
    j->b->k->linear(j->b->dev, &j->spec.linear, j->t[0], j->t[1], tensor_none(), j->t[2]);
}

/* One sample of each into b->copy and b->sgemm. */
static void sample_ceilings(struct bench *b) {
    struct job j;
    const int64_t n = MATMUL_SIZE;
    job_open(&j, b, (struct op_spec){.kind = OP_ACT});
    job_float(&j, (int64_t)(GPU_COPY_BYTES / sizeof(float)), 0, 0);
    job_float(&j, (int64_t)(GPU_COPY_BYTES / sizeof(float)), 0, 0);
    j.run = run_device_copy;
    samples_add(&b->copy, time_work(b, run_job, &j).median);
    job_close(&j);
    job_open(&j, b, (struct op_spec){.kind = OP_LINEAR, .linear = {n, n, n}});
    for (int i = 0; i < 3; i++)
        job_operand(&j, n, n, 0, 0, 0);
    j.run = run_linear;
    samples_add(&b->sgemm, time_work(b, run_job, &j).median);
    job_close(&j);
    fprintf(stderr, "ceilings: copy %.0f GB/s, matmul %.0f TFLOP/s\n",
            2e-9 * (double)GPU_COPY_BYTES / b->copy.seconds[b->copy.count - 1],
            2e-12 * pow(MATMUL_SIZE, 3) / b->sgemm.seconds[b->sgemm.count - 1]);
}

static void bench_nothing(struct bench *b, struct table *t) {
    (void)b;
    (void)t;
}

static void ceiling_rows(const struct bench *b, struct table *t) {
    struct row *row = table_row(t, "ceiling: copy of 1 GiB within device memory, read and written");
    cell_seconds(row->took, samples_summary(&b->copy, 0));
    cell(row->rate, "%.0f GB/s", 2e-9 * (double)GPU_COPY_BYTES / samples_summary(&b->copy, 0).median);
    row = table_row(t, "ceiling: bf16 matrix product %d x %d x %d", MATMUL_SIZE, MATMUL_SIZE, MATMUL_SIZE);
    cell_seconds(row->took, samples_summary(&b->sgemm, 0));
    cell(row->rate, "%.0f TFLOP/s", matmul_rate(b) / 1e12);
}

/* ---- mixing heads
 * ------------------------------------------------------------------------------------------ */

enum { QKV, ALPHA_Q, ALPHA_K, ALPHA_V, ROPE, MQ, MK, MV, DQKV, DALPHA_Q, DALPHA_K, DALPHA_V };

static void run_mix(struct job *j) {
    tensor *t = j->t;
    j->b->k->qkv_mix(j->b->dev, &j->spec.qkv_mix, t[QKV], t[ALPHA_Q], t[ALPHA_K], t[ALPHA_V], t[ROPE], 0,
                     t[MQ], t[MK], t[MV]);
}

static void run_mix_backward(struct job *j) {
    tensor *t = j->t;
    j->b->k->qkv_mix_backward(j->b->dev, &j->spec.qkv_mix, t[MQ], t[MK], t[MV], t[QKV], t[ALPHA_Q],
                              t[ALPHA_K], t[ALPHA_V], t[ROPE], t[DQKV], t[DALPHA_Q], t[DALPHA_K], t[DALPHA_V],
                              true);
}

enum { COLLAPSE_O, COLLAPSE_R, COLLAPSE_OUT, COLLAPSE_DO, COLLAPSE_DR };

static void run_collapse(struct job *j) {
    tensor *t = j->t;
    j->b->k->collapse(j->b->dev, &j->spec.collapse, t[COLLAPSE_O], t[COLLAPSE_R], t[COLLAPSE_OUT]);
}

static void run_collapse_backward(struct job *j) {
    tensor *t = j->t;
    j->b->k->collapse_backward(j->b->dev, &j->spec.collapse, t[COLLAPSE_OUT], t[COLLAPSE_O], t[COLLAPSE_R],
                               t[COLLAPSE_DO], t[COLLAPSE_DR], true);
}

static void bench_mixing_of(struct bench *b, struct table *table, int64_t T, int64_t H, int64_t P,
                            int64_t d) {
    struct job j;
    char what[CELL];
    double row = 2.0 * (double)(T * H * d); /* bytes of one [T,H,d] */
    job_open(&j, b, (struct op_spec){.kind = OP_QKV_MIX, .qkv_mix = {1, T, H, d, P, true, true, true}});
    job_operand(&j, 1, T, 3, H, d);
    for (int i = 0; i < 3; i++)
        job_operand(&j, P, H, H, 0, 0);
    tensor *table_of_rope = job_float(&j, T * P, 2, d / 2);
    b->k->rope_table(b->dev, *table_of_rope, 10000);
    for (int i = 0; i < 3; i++)
        job_operand(&j, 1, T * P, H, d, 0);
    job_operand(&j, 1, T, 3, H, d);
    for (int i = 0; i < 3; i++)
        job_float(&j, P, H, H);
    snprintf(what, sizeof what, "qkv_mix forward: H=%d, P=%d, d=%d, %d tokens", (int)H, (int)P, (int)d,
             (int)T);
    bandwidth_row(table, &j, run_mix, 3 * (1 + (double)P) * row, what);
    snprintf(what, sizeof what, "qkv_mix backward: H=%d, P=%d, d=%d, %d tokens", (int)H, (int)P, (int)d,
             (int)T);
    bandwidth_row(table, &j, run_mix_backward, 3 * (2 + (double)P) * row, what);
    job_close(&j);
    job_open(&j, b, (struct op_spec){.kind = OP_COLLAPSE, .collapse = {1, T, H, d, P, false}});
    job_operand(&j, 1, T * P, H, d, 0);
    job_operand(&j, H, P, H, 0, 0);
    job_operand(&j, 1, T, H, d, 0);
    job_operand(&j, 1, T * P, H, d, 0);
    job_float(&j, H, P, H);
    snprintf(what, sizeof what, "collapse forward: H=%d, P=%d, d=%d, %d tokens", (int)H, (int)P, (int)d,
             (int)T);
    bandwidth_row(table, &j, run_collapse, (1 + (double)P) * row, what);
    snprintf(what, sizeof what, "collapse backward: H=%d, P=%d, d=%d, %d tokens", (int)H, (int)P, (int)d,
             (int)T);
    bandwidth_row(table, &j, run_collapse_backward, (1 + 2 * (double)P) * row, what);
    job_close(&j);
}

static void bench_mix(struct bench *b, struct table *t) {
    static const int64_t sizes[][2] = {{12, 2}, {16, 4}, {20, 20}};
    for (int i = 0; i < 3; i++)
        for (int64_t d = 64; d <= 128; d *= 2)
            bench_mixing_of(b, t, i < 2 ? 16384 : 4096, sizes[i][0], sizes[i][1], d);
}

/* ---- attention, own and cuDNN's ---- */

enum { AQ, AK, AV, AO, ADO, ADQ, ADK, ADV, ATTENTION_TENSORS };

static void run_attention(struct job *j) {
    tensor *t = j->t;
    j->b->k->attention(j->b->dev, &j->spec.attention, t[AQ], t[AK], t[AV], t[AO], j->saved);
}

static void run_attention_backward(struct job *j) {
    tensor *t = j->t;
    j->b->k->attention_backward(j->b->dev, &j->spec.attention, t[AQ], t[AK], t[AV], t[AO], t[ADO], j->saved,
                                t[ADQ], t[ADK], t[ADV]);
}

/* Visible (query, key) pairs of one head. */
static double pairs_of(const struct attention_spec *s) {
    double pairs = 0;
    for (int64_t i = 0; i < s->length; i++) {
        int64_t begin, end;
        attention_keys(s, i, s->length, &begin, &end);
        pairs += (double)(end - begin);
    }
    return pairs;
}

/* Forward counts two products of every visible pair, backward four: those it computes again are not work
 * done. */
static void bench_attention_by(struct bench *b, struct table *t, const char *by, struct attention_spec s) {
    struct bench other = *b; /* a device of its own, which reads the variable when it plans */
    struct op_cost cost;
    struct op_spec spec = {.kind = OP_ATTENTION, .attention = s};
    struct device_options options = {.precision = DEVICE_BF16};
    struct error e = {0};
    struct job j;
    char what[CELL];
    setenv("IHA_ATTENTION", by, 1);
    other.dev = b->k->open(&options, &e);
    if (!other.dev)
        bench_fail(&e);
    snprintf(what, sizeof what, "attention by %s: B=%d, S=%d, H=%d, d=%d, window %d", by, (int)s.batch,
             (int)s.length, (int)s.heads, (int)s.head_dim, (int)s.window);
    if (b->k->plan(other.dev, &spec, &cost, &e) != 0) {
        struct row *row = table_row(t, "%s", what);
        cell(row->took, "not supported: %.120s", e.text);
    } else {
        job_open(&j, &other, spec);
        for (int i = 0; i < ATTENTION_TENSORS; i++)
            job_operand(&j, s.batch, s.length, s.heads, s.head_dim, 0);
        double flops = 4 * pairs_of(&s) * (double)(s.head_dim * s.heads * s.batch);
        char direction[CELL + 16];
        snprintf(direction, sizeof direction, "%s, forward", what);
        flops_row(t, &j, run_attention, flops, direction);
        snprintf(direction, sizeof direction, "%s, backward", what);
        flops_row(t, &j, run_attention_backward, 2 * flops, direction);
        job_close(&j);
    }
    b->k->close(other.dev);
    unsetenv("IHA_ATTENTION");
}

static void bench_attention_both(struct bench *b, struct table *t) {
    static const int64_t sizes[][5] = {
        /* B, S, H, d, window */
        {16, 1024, 12, 64, 0}, {8, 2048, 12, 64, 512},    {4, 4096, 16, 128, 0},
        {2, 8192, 20, 128, 0}, {1, 32768, 20, 128, 1024},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const int64_t *z = sizes[i];
        struct attention_spec s = {z[0], z[1], z[2], z[3], 1, true, false, z[4], 1 / sqrt((double)z[3])};
        bench_attention_by(b, t, "own", s);
        bench_attention_by(b, t, "cudnn", s);
    }
}

/* ---- the other operations ---- */

static void run_norm(struct job *j) {
    tensor *t = j->t;
    j->b->k->residual_norm(j->b->dev, &j->spec.norm, t[0], t[1], t[4], tensor_none(), t[2], t[3], j->saved);
}

static void run_norm_backward(struct job *j) {
    tensor *t = j->t;
    j->b->k->residual_norm_backward(j->b->dev, &j->spec.norm, t[3], t[2], t[4], j->saved, t[0], t[5],
                                    tensor_none(), true);
}

static void run_act(struct job *j) {
    bool gated = j->spec.act.type == ACT_SWIGLU;
    j->b->k->mlp_act(j->b->dev, &j->spec.act, j->t[0], gated ? j->t[1] : tensor_none(), j->t[2]);
}

static void run_act_backward(struct job *j) {
    bool gated = j->spec.act.type == ACT_SWIGLU;
    j->b->k->mlp_act_backward(j->b->dev, &j->spec.act, j->t[2], j->t[0], gated ? j->t[1] : tensor_none(),
                              j->t[3], gated ? j->t[4] : tensor_none());
}

static void run_classifier(struct job *j) {
    tensor *t = j->t;
    j->b->k->classifier(j->b->dev, &j->spec.classifier, t[0], t[1], t[2], 1e-4, t[3].data, t[4], t[5], true);
}

static void run_sumsq(struct job *j) {
    j->b->k->sumsq(j->b->dev, j->t[1], j->t[5].data);
}

static void run_adamw(struct job *j) {
    static const struct adamw_hyper hyper = {0.9, 0.95, 1e-8};
    const struct param_group group = {0, j->t[0].shape[0], 1, 0.1f};
    tensor *t = j->t;
    j->b->k->adamw(j->b->dev, &hyper, &group, 1, 0, t[0], t[4], t[1], t[2], t[3], t[5].data);
}

static void bench_norm(struct bench *b, struct table *t) {
    const int64_t N = 65536, C = 2560;
    struct job j;
    job_open(&j, b, (struct op_spec){.kind = OP_NORM, .norm = {NORM_TYPE_RMS, 1e-5, N, C}});
    for (int i = 0; i < 4; i++)
        job_operand(&j, N, C, 0, 0, 0);
    job_operand(&j, C, 0, 0, 0, 0);
    job_float(&j, C, 0, 0);
    bandwidth_row(t, &j, run_norm, 4 * 2.0 * (double)(N * C), "residual_norm forward: 65536 rows of 2560");
    bandwidth_row(t, &j, run_norm_backward, 4 * 2.0 * (double)(N * C),
                  "residual_norm backward: 65536 rows of 2560");
    job_close(&j);
}

static void bench_act(struct bench *b, struct table *t) {
    const int64_t N = 32768, F = 4096;
    const double each = 2.0 * (double)(N * F);
    for (int gated = 0; gated <= 1; gated++) {
        struct job j;
        enum act_type type = gated ? ACT_SWIGLU : ACT_GELU_TANH;
        job_open(&j, b, (struct op_spec){.kind = OP_ACT, .act = {type, N, F}});
        for (int i = 0; i < 5; i++)
            job_operand(&j, N, F, 0, 0, 0);
        bandwidth_row(t, &j, run_act, (gated ? 3 : 2) * each,
                      gated ? "swiglu forward: 32768 rows of 4096" : "gelu_tanh forward: 32768 rows of 4096");
        bandwidth_row(t, &j, run_act_backward, (gated ? 5 : 3) * each,
                      gated ? "swiglu backward: 32768 rows of 4096"
                            : "gelu_tanh backward: 32768 rows of 4096");
        job_close(&j);
    }
}

static void bench_classifier(struct bench *b, struct table *t) {
    const int64_t N = 16384, C = 768, V = 50257;
    struct job j;
    int32_t *targets = malloc((size_t)N * sizeof *targets);
    job_open(&j, b, (struct op_spec){.kind = OP_CLASSIFIER, .classifier = {N, C, V}});
    job_operand(&j, N, C, 0, 0, 0);
    job_operand(&j, V, C, 0, 0, 0);
    tensor *ids = job_float(&j, N, 0, 0);
    ids->dtype = DTYPE_I32;
    random_tokens(targets, N, V, 3);
    b->k->upload(b->dev, *ids, targets, DTYPE_I32);
    job_float(&j, (int64_t)(sizeof(struct step_state) / sizeof(float)) + 1, 0, 0);
    job_operand(&j, N, C, 0, 0, 0);
    job_float(&j, V, C, 0);
    flops_row(t, &j, run_classifier, 6.0 * (double)(N * C) * (double)V,
              "classifier, loss and both gradients: 16384 rows, C=768, V=50257");
    job_close(&j);
    free(targets);
}

static void bench_optimizer(struct bench *b, struct table *t) {
    const int64_t n = 124475904;
    struct job j;
    job_open(&j, b, (struct op_spec){.kind = OP_ACT});
    for (int i = 0; i < 4; i++) /* master, gradient, two moments */
        job_float(&j, n, 0, 0);
    tensor p = tensor_of(NULL, DTYPE_BF16, n, 0, 0, 0, 0);
    p.data = bench_alloc(b, (size_t)n * 2);
    j.t[j.count++] = p;
    job_float(&j, (int64_t)(sizeof(struct step_state) / sizeof(float)) + 1, 0, 0);
    b->k->step_begin(b->dev, j.t[5].data, 0, 1e-4);
    bandwidth_row(t, &j, run_sumsq, 4.0 * (double)n, "sumsq: 124M gradients");
    b->k->step_decide(b->dev, j.t[5].data, 1, 0);
    bandwidth_row(t, &j, run_adamw, 30.0 * (double)n,
                  "adamw: 124M parameters, 16 bytes read and 14 written each");
    job_close(&j);
}

static void bench_others(struct bench *b, struct table *t) {
    bench_norm(b, t);
    bench_act(b, t);
    bench_classifier(b, t);
    bench_optimizer(b, t);
}

/* ---- between ranks ---- */

enum { SUMMED_RANKS = 8 };

/* Operands: own or what is added, the ranks' shares, and the result. */
static void run_add_fp32(struct job *j) {
    comm_add_in_rank_order(timing_queue(j->b->dev), j->t[0].data, j->t[1].data, DTYPE_F32, 3, SUMMED_RANKS,
                           j->t[0].shape[0], j->t[2].data, false);
}

static void run_add_bf16(struct job *j) {
    comm_add_in_rank_order(timing_queue(j->b->dev), j->t[0].data, j->t[1].data, DTYPE_BF16, 3, SUMMED_RANKS,
                           j->t[0].shape[0], j->t[2].data, false);
}

static void run_add_to(struct job *j) {
    comm_add_to(timing_queue(j->b->dev), j->t[0].data, j->t[0].shape[0], j->t[2].data);
}

static void run_round(struct job *j) {
    comm_round_to_bf16(timing_queue(j->b->dev), j->t[1].data, j->t[1].shape[0], j->t[3].data);
}

/* What a rank's GPU does with messages; the messages themselves need another GPU. */
static void bench_ranks(struct bench *b, struct table *t) {
    const int64_t n = (int64_t)16 << 20;
    const double N = (double)n, others = SUMMED_RANKS - 1;
    struct job j;
    job_open(&j, b, (struct op_spec){.kind = OP_ACT});
    job_float(&j, n, 0, 0);
    job_float(&j, n * SUMMED_RANKS, 0, 0);
    job_float(&j, n, 0, 0);
    job_float(&j, n * SUMMED_RANKS / 2, 0, 0);
    bandwidth_row(t, &j, run_add_fp32, (8 + 4 * others) * N, "sum of 8 ranks' shares of 16M, fp32 messages");
    bandwidth_row(t, &j, run_add_bf16, (8 + 2 * others) * N, "sum of 8 ranks' shares of 16M, bf16 messages");
    bandwidth_row(t, &j, run_add_to, 12 * N, "a pass's sums added to those before: 16M");
    bandwidth_row(t, &j, run_round, 6 * SUMMED_RANKS * N, "gradients rounded to bf16 messages: 128M");
    job_close(&j);
    cell(table_row(t, "reduce-scatter and all-gather over NCCL")->took, "not measured: takes two GPUs");
}

/* ---- whole steps ---- */

/* Does the model of this configuration fit on the device? */
static bool fits(struct bench *b, const struct config *c) {
    struct memory_plan p;
    struct error e = {0};
    struct pass_shape shape = pass_shape_of(c);
    if (model_memory(&c->model, b->k, b->dev, &shape, 1, 0, DTYPE_F32, &p, &e) != 0)
        bench_fail(&e);
    return (double)memory_total(&p) < 0.95 * (double)b->k->memory_available(b->dev);
}

/* A step of t->config: time, tokens per second, MFU, and for how much of it the GPU waits. */
static void step_row(struct bench *b, struct table *table, struct training *t, const char *name) {
    const struct config *c = &t->config;
    training_open(t, b->k, b->dev);
    struct summary s = time_work(b, training_step, t);
    struct activity seen = {0, 0, 0};
    if (activity_available()) {
        activity_start();
        training_step(t);
        seen = activity_stop(b->dev);
    }
    struct flops each = flops_per_token(&c->model, c->train.seq_len);
    double rate = (double)c->train.batch_tokens / s.median, peak = b->k->peak_flops(b->dev);
    double flops = (each.matmul + each.attention + each.mixing) * rate;
    struct row *row = table_row(table, "%s: B=%d, T=%d, one optimizer step", name, (int)c->train.micro_batch,
                                (int)c->train.seq_len);
    cell_seconds(row->took, s);
    if (peak > 0)
        cell(row->rate, "%.0f tokens/s; %.0f TFLOP/s, MFU %.1f%%", rate, flops / 1e12, 100 * flops / peak);
    else
        cell(row->rate, "%.0f tokens/s; %.0f TFLOP/s", rate, flops / 1e12);
    if (seen.count > 0)
        cell(row->beside, "GPU idle %.1f%% of the step, over %lld kernels and copies",
             100 * (1 - seen.busy / seen.duration), (long long)seen.count);
    else
        cell(row->beside, "GPU's idle time: not measured without CUPTI");
    cell(row->ratio, "%.2f of matmul", flops / matmul_rate(b));
    row_progress(row);
    training_close(t);
}

static void bench_gpt2_steps(struct bench *b, struct table *table) {
    static const char *const names[] = {"GPT-2 124M, MHA", "GPT-2 124M, IHA P=2", "GPT-2 124M, IHA P=4"};
    static char *const patterns[] = {"model.layer_pattern=mha_global",
                                     "model.layer_pattern=iha_local*4 mha_global",
                                     "model.layer_pattern=iha_local*4 mha_global"};
    static char *const pseudo[] = {"model.num_pseudo_heads=2", "model.num_pseudo_heads=2",
                                   "model.num_pseudo_heads=4"};
    static const int batches[] = {128, 96, 64, 48, 32, 24, 16, 8, 4, 2, 1};
    for (int i = 0; i < 3; i++) {
        static struct training t;
        bool found = false;
        for (size_t k = 0; k < sizeof batches / sizeof *batches && !found; k++) {
            char batch[64], tokens[64];
            snprintf(batch, sizeof batch, "train.micro_batch=%d", batches[k]);
            snprintf(tokens, sizeof tokens, "train.batch_tokens=%d", batches[k] * 1024);
            char *const keys[] = {patterns[i], pseudo[i], batch, tokens};
            memset(&t, 0, sizeof t);
            read_config(&t.config, "configs/gpt2_124m.ini", 4, keys);
            found = fits(b, &t.config);
        }
        if (found)
            step_row(b, table, &t, names[i]);
        else
            cell(table_row(table, "%s", names[i])->took, "does not fit");
    }
}

static void bench_paper_steps(struct bench *b, struct table *table) {
    static const struct {
        const char *name;
        char *pseudo, *recompute;
    } runs[] = {
        {"the paper's 2.4B, P=4", "model.num_pseudo_heads=4", "system.recompute=none"},
        {"the paper's 2.4B, P=4, recompute = full", "model.num_pseudo_heads=4", "system.recompute=full"},
        {"the paper's 2.4B, P=20, recompute = full", "model.num_pseudo_heads=20", "system.recompute=full"}};
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        static struct training t;
        char *const keys[] = {runs[i].pseudo, runs[i].recompute, "train.batch_tokens=8192",
                              "system.zero_stage=0"};
        memset(&t, 0, sizeof t);
        read_config(&t.config, "configs/iha_paper_2.4b.ini", 4, keys);
        if (fits(b, &t.config))
            step_row(b, table, &t, runs[i].name);
        else
            cell(table_row(table, "%s", runs[i].name)->took, "does not fit");
    }
}

/* ---- the program
 * -------------------------------------------------------------------------------------------- */

static const struct item {
    const char *name;
    void (*run)(struct bench *b, struct table *t);
    const char *help;
} ITEMS[] = {
    {"ceilings", bench_nothing, "a copy within device memory, and a matrix product"},
    {"mixing", bench_mix, "qkv_mix and collapse at three sizes"},
    {"attention", bench_attention_both, "own kernels and cuDNN's"},
    {"others", bench_others, "norm, activations, classifier, optimizer"},
    {"gpt2", bench_gpt2_steps, "optimizer steps of GPT-2 124M, with and without IHA"},
    {"ranks", bench_ranks, "what a GPU does with the messages of 8 ranks"},
    {"graphs", bench_graphs,
     "GPT-2 steps as CUDA graphs and operation by operation; the first three; idle time"},
    {"deterministic", bench_deterministic, "GPT-2 steps with system.deterministic, and the memory it takes"},
    {"paper", bench_paper_steps, "optimizer steps of the paper's model on 8192 tokens"},
};
enum { ITEM_COUNT = sizeof ITEMS / sizeof *ITEMS };

static int usage(int status) {
    fprintf(status ? stderr : stdout,
            "bench_gpu [--only NAME] [--repeats N]\n\nTimes are medians over N repeats (9).\n\n");
    for (int i = 0; i < ITEM_COUNT; i++)
        fprintf(status ? stderr : stdout, "  %-12s %s\n", ITEMS[i].name, ITEMS[i].help);
    return status;
}

/* The table with nothing in it. */
static int not_measured(void) {
    static struct table t;
    for (int i = 0; i < ITEM_COUNT; i++)
        cell(table_row(&t, "%s: %s", ITEMS[i].name, ITEMS[i].help)->took, "not measured");
    printf("No GPU, or no driver for it, was found.\n\n");
    table_print_head(stdout);
    table_print(stdout, &t);
    return EXIT_USER;
}

int main(int argc, char **argv) {
    static struct bench b;
    static struct table ceilings, work;
    const char *only = NULL;
    struct error e = {0};
    b.repeats = 9;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--help") == 0)
            return usage(EXIT_OK);
        if (strcmp(argv[i], "--only") == 0)
            for (int item = 0; item < ITEM_COUNT; item++)
                only = strcmp(value, ITEMS[item].name) == 0 ? ITEMS[item].name : only;
        else if (strcmp(argv[i], "--repeats") == 0)
            b.repeats = atoi(value);
        else
            return usage(EXIT_USER);
        if (b.repeats < 1 || b.repeats > MAX_REPEATS || (strcmp(argv[i], "--only") == 0 && !only))
            return usage(EXIT_USER);
        i++;
    }
    if (cuda_devices() == 0)
        return not_measured();
    struct device_options options = {.precision = DEVICE_BF16};
    b.k = kernels_cuda();
    b.dev = b.k->open(&options, &e);
    if (!b.dev)
        bench_fail(&e);
    for (int i = 0; i < ITEM_COUNT; i++)
        if (!only || strcmp(only, ITEMS[i].name) == 0) {
            sample_ceilings(&b);
            ITEMS[i].run(&b, &work);
        }
    ceiling_rows(&b, &ceilings);
    printf("%s; medians over %d repeats\n\n", b.k->describe(b.dev), b.repeats);
    table_print_head(stdout);
    table_print(stdout, &ceilings);
    table_print(stdout, &work);
    b.k->close(b.dev);
    return EXIT_OK;
}
