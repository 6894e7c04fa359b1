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
#include "tests/bench/bench_case.h"
#include "tests/bench/bench_gpu_measure.h"
#include "tests/bench/bench_gpu_pairs.h"
#include "tests/bench/bench_models.h"

enum { MATMUL_SIZE = 8192 };
static const size_t GPU_COPY_BYTES = (size_t)1 << 30;

/* ---- measuring ---- */

/* Operands and planned memory of an operation that has no case in tests/lib/op_cases.h. */
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
    enum dtype type = j->b->k->dtypes(j->b->dev).compute;
    j->t[j->count] = bench_noise(j->b, type, s0, s1, s2, s3, s4);
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

static void bandwidth_row(struct table *t, struct bench *b, void (*work)(void *), void *context, double bytes,
                          const char *what) {
    struct summary s = time_work(b, work, context);
    double copy = copy_rate(b, 0) * ((double)GPU_COPY_BYTES / (double)COPY_BYTES);
    struct row *row = table_row(t, "%s", what);
    cell_seconds(row->took, s);
    cell(row->rate, "%.0f GB/s", bytes / s.median / 1e9);
    cell(row->compared, "copy %.0f GB/s", copy / 1e9);
    cell(row->ratio, "%.2f", bytes / s.median / copy);
    row_progress(row);
}

static void job_row(struct table *t, struct job *j, void (*run)(struct job *), double bytes,
                    const char *what) {
    j->run = run;
    bandwidth_row(t, j->b, run_job, j, bytes, what);
}

static double matmul_rate(const struct bench *b) {
    return 2 * pow(MATMUL_SIZE, 3) / samples_summary(&b->sgemm, 0).median;
}

static void flops_row(struct table *t, struct bench *b, void (*work)(void *), void *context, double flops,
                      const char *what) {
    struct summary s = time_work(b, work, context);
    struct row *row = table_row(t, "%s", what);
    cell_seconds(row->took, s);
    cell(row->rate, "%.0f TFLOP/s", flops / s.median / 1e12);
    cell(row->compared, "matmul %.0f TFLOP/s", matmul_rate(b) / 1e12);
    cell(row->ratio, "%.2f", flops / s.median / matmul_rate(b));
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

/* ---- operations ---- */

struct gpu_context {
    struct bench *b;
    struct table *t;
};

/* Both directions of one case, compared with the speed of a copy. */
static void bandwidth_rows(const struct op_case *c, void *context) {
    struct gpu_context *x = context;
    struct bench_case w;
    char sizes[OP_TEXT], what[CELL];
    case_open(&w, x->b, c);
    for (int backward = 0; backward < 2; backward++) {
        snprintf(what, sizeof what, "%s %s: %.80s%s", op_name(c), backward ? "backward" : "forward",
                 op_sizes(c, sizes), backward && c->options & SUMS ? ", sums of columns" : "");
        bandwidth_row(x->t, x->b, backward ? case_backward : case_forward, &w, case_bytes(&w, backward),
                      what);
    }
    case_close(&w);
}

static void bench_mix(struct bench *b, struct table *t) {
    op_cases_of(OP_QKV_MIX, OP_COLLAPSE, BENCH_GPU, bandwidth_rows, &(struct gpu_context){b, t});
}

/* With a device of its own, which reads the environment variable when it plans; close with close_other(). */
static struct bench open_other(const struct bench *b, const char *variable, const char *value) {
    struct bench other = *b;
    struct device_options options = {.precision = DEVICE_BF16};
    struct error e = {0};
    setenv(variable, value, 1);
    other.dev = other.k->open(&options, &e);
    if (!other.dev)
        bench_fail(&e);
    return other;
}

static void close_other(struct bench *other, const char *variable) {
    other->k->close(other->dev);
    unsetenv(variable);
}

static void attention_rows_by(const char *by, const struct op_case *c, const struct gpu_context *x) {
    struct bench other = open_other(x->b, "IHA_ATTENTION", by);
    struct op_cost cost;
    struct op_spec spec = op_spec_of(c);
    struct error e = {0};
    char sizes[OP_TEXT], what[CELL];
    if (other.k->plan(other.dev, &spec, &cost, &e) != 0) {
        struct row *row = table_row(x->t, "attention by %s: %s", by, op_sizes(c, sizes));
        cell(row->took, "not supported: %.120s", e.text);
    } else {
        struct bench_case w;
        case_open(&w, &other, c);
        for (int backward = 0; backward < 2; backward++) {
            snprintf(what, sizeof what, "attention by %s: %.80s, %s", by, op_sizes(c, sizes),
                     backward ? "backward" : "forward");
            flops_row(x->t, &other, backward ? case_backward : case_forward, &w,
                      (1 + backward) * attention_flops(c), what);
        }
        case_close(&w);
    }
    close_other(&other, "IHA_ATTENTION");
}

static void attention_rows(const struct op_case *c, void *context) {
    attention_rows_by("own", c, context);
    if (!c->spec.attention.segmented)
        attention_rows_by("cudnn", c, context);
}

/* Mixing costs H / d of a product over all pairs. */
static void talking_rows(const struct op_case *c, void *context) {
    const struct gpu_context *x = context;
    double mixing = (double)c->spec.attention.heads / (double)c->spec.attention.head_dim;
    struct bench_case w;
    char sizes[OP_TEXT], what[CELL];
    case_open(&w, x->b, c);
    for (int backward = 0; backward < 2; backward++) {
        snprintf(what, sizeof what, "talking heads: %.80s, %s", op_sizes(c, sizes),
                 backward ? "backward" : "forward");
        flops_row(x->t, x->b, backward ? case_backward : case_forward, &w,
                  (1 + backward) * (1 + mixing) * attention_flops(c), what);
    }
    case_close(&w);
}

static void bench_attention(struct bench *b, struct table *t) {
    op_cases_run(OP_ATTENTION, BENCH_GPU, attention_rows, &(struct gpu_context){b, t});
    op_cases_run(OP_TALKING, BENCH_GPU, talking_rows, &(struct gpu_context){b, t});
}

/* Loss and both gradients: three matrix products. */
static void classifier_rows(const struct op_case *c, void *context) {
    struct gpu_context *x = context;
    const struct classifier_spec *s = &c->spec.classifier;
    struct bench_case w;
    char sizes[OP_TEXT], what[CELL];
    case_open(&w, x->b, c);
    snprintf(what, sizeof what, "classifier, loss and both gradients: %.80s", op_sizes(c, sizes));
    flops_row(x->t, x->b, case_backward, &w, 6.0 * (double)(s->rows * s->hidden) * (double)s->vocab, what);
    case_close(&w);
}

/* ---- GELU in products, and apart ---- */

/* Operands: x, W, bias, u, act; and dy, act, W, u, du, dW. */
static void run_linear_act(struct job *j) {
    tensor *t = j->t;
    j->b->k->linear_act(j->b->dev, &j->spec.linear, ACT_GELU_TANH, t[0], t[1], t[2], t[3], t[4]);
}

static void run_act_linear_backward(struct job *j) {
    tensor *t = j->t;
    j->b->k->act_linear_backward(j->b->dev, &j->spec.linear, ACT_GELU_TANH, t[0], tensor_none(), t[1], t[2],
                                 t[3], t[4], t[5], tensor_none(), true);
}

/* Of an MLP of C to F. */
static void gelu_rows_by(const char *by, int64_t rows, int64_t C, int64_t F, const struct gpu_context *x) {
    struct bench other = open_other(x->b, "IHA_GELU", by);
    struct job j;
    char what[CELL];
    job_open(&j, &other, (struct op_spec){.kind = OP_LINEAR, .gelu_after = true, .linear = {rows, C, F}});
    job_operand(&j, rows, C, 0, 0, 0);
    job_operand(&j, F, C, 0, 0, 0);
    job_operand(&j, F, 0, 0, 0, 0);
    job_operand(&j, rows, F, 0, 0, 0);
    job_operand(&j, rows, F, 0, 0, 0);
    j.run = run_linear_act;
    snprintf(what, sizeof what, "linear, bias and GELU %s: %d rows, %d to %d", by, (int)rows, (int)C, (int)F);
    flops_row(x->t, &other, run_job, &j, 2.0 * (double)rows * (double)C * (double)F, what);
    job_close(&j);
    job_open(&j, &other, (struct op_spec){.kind = OP_LINEAR, .gelu_before = true, .linear = {rows, F, C}});
    job_operand(&j, rows, C, 0, 0, 0);
    job_operand(&j, rows, F, 0, 0, 0);
    job_operand(&j, C, F, 0, 0, 0);
    job_operand(&j, rows, F, 0, 0, 0);
    job_operand(&j, rows, F, 0, 0, 0);
    job_float(&j, C, F, 0);
    j.run = run_act_linear_backward;
    snprintf(what, sizeof what, "backward with GELU %s: %d rows, %d to %d", by, (int)rows, (int)F, (int)C);
    flops_row(x->t, &other, run_job, &j, 4.0 * (double)rows * (double)C * (double)F, what);
    job_close(&j);
    close_other(&other, "IHA_GELU");
}

static void bench_gelu(struct bench *b, struct table *t) {
    const struct gpu_context x = {b, t};
    for (int paper = 0; paper < 2; paper++)
        for (int fused = 0; fused < 2; fused++)
            gelu_rows_by(fused ? "fused" : "apart", paper ? 8192 : 32768, paper ? 2560 : 768,
                         paper ? 10240 : 3072, &x);
}

/* ---- the optimizer ---- */

static void run_sumsq(struct job *j) {
    j->b->k->sumsq(j->b->dev, j->t[1], j->t[5].data);
}

static void run_adamw(struct job *j) {
    static const struct adamw_hyper hyper = {0.9, 0.95, 1e-8};
    const struct param_group group = {0, j->t[0].shape[0], 1, 0.1f, 0, 0};
    tensor *t = j->t;
    j->b->k->adamw(j->b->dev, &hyper, &group, 1, t[0], t[4], t[1], t[2], t[3], t[5].data);
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
    job_row(t, &j, run_sumsq, 4.0 * (double)n, "sumsq: 124M gradients");
    struct step_state state;
    b->k->step_read(b->dev, j.t[5].data, &state);
    state.targets = 1; /* a step without targets updates nothing */
    b->k->step_write(b->dev, j.t[5].data, &state);
    b->k->step_decide(b->dev, j.t[5].data, 1, 1, 0);
    job_row(t, &j, run_adamw, 30.0 * (double)n, "adamw: 124M parameters, 16 bytes read and 14 written each");
    job_close(&j);
}

static void bench_others(struct bench *b, struct table *t) {
    struct gpu_context context = {b, t};
    op_cases_of(OP_NORM, OP_ACT, BENCH_GPU, bandwidth_rows, &context);
    op_cases_run(OP_CLASSIFIER, BENCH_GPU, classifier_rows, &context);
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
    job_row(t, &j, run_add_fp32, (8 + 4 * others) * N, "sum of 8 ranks' shares of 16M, fp32 messages");
    job_row(t, &j, run_add_bf16, (8 + 2 * others) * N, "sum of 8 ranks' shares of 16M, bf16 messages");
    job_row(t, &j, run_add_to, 12 * N, "a pass's sums added to those before: 16M");
    job_row(t, &j, run_round, 6 * SUMMED_RANKS * N, "gradients rounded to bf16 messages: 128M");
    job_close(&j);
    cell(table_row(t, "reduce-scatter and all-gather over NCCL")->took, "not measured: takes two GPUs");
}

/* ---- whole steps ---- */

/* Does the model of this configuration fit on the device? */
static bool fits(struct bench *b, const struct config *c) {
    struct memory_plan p;
    struct error e = {0};
    struct pass_shape shape = pass_shape_of(c, true);
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
        cell(row->compared, "GPU idle %.1f%% of the step, over %lld kernels and copies",
             100 * (1 - seen.busy / seen.duration), (long long)seen.count);
    else
        cell(row->compared, "GPU's idle time: not measured without CUPTI");
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

/* P = 20 without recomputation takes 137 GB of the H200's 141. */
static void bench_paper_steps(struct bench *b, struct table *table) {
    static const struct {
        const char *name;
        char *pseudo, *recompute, *micro_batch, *tokens;
    } runs[] = {
#define RUN(P, RECOMPUTE, B, TOKENS)                                                                         \
    {"the paper's 2.4B, P=" #P ", recompute = " #RECOMPUTE, "model.num_pseudo_heads=" #P,                    \
     "system.recompute=" #RECOMPUTE, "train.micro_batch=" #B, "train.batch_tokens=" #TOKENS}
        RUN(4, none, 1, 8192),  RUN(4, none, 2, 16384),  RUN(4, full, 1, 8192),
        RUN(20, none, 1, 8192), RUN(20, light, 1, 8192), RUN(20, full, 1, 8192),
#undef RUN
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        static struct training t;
        char *const keys[] = {runs[i].pseudo, runs[i].recompute, runs[i].micro_batch, runs[i].tokens,
                              "system.zero_stage=0"};
        memset(&t, 0, sizeof t);
        read_config(&t.config, "configs/paper/2.4b_iha.ini", 5, keys);
        if (fits(b, &t.config))
            step_row(b, table, &t, runs[i].name);
        else
            cell(table_row(table, "%s, B=%d", runs[i].name, (int)t.config.train.micro_batch)->took,
                 "does not fit");
    }
}

/* ---- the program ---- */

static const struct item {
    const char *name;
    void (*run)(struct bench *b, struct table *t);
    const char *help;
} ITEMS[] = {
    {"ceilings", bench_nothing, "a copy within device memory, and a matrix product"},
    {"mixing", bench_mix, "qkv_mix and collapse at three sizes"},
    {"attention", bench_attention, "built-in kernels and cuDNN's; talking heads"},
    {"gelu", bench_gelu, "GELU in the products beside it, and apart"},
    {"others", bench_others, "norm, activations, classifier, optimizer"},
    {"gpt2", bench_gpt2_steps, "optimizer steps of GPT-2 124M, with and without IHA"},
    {"ranks", bench_ranks, "what a GPU does with the messages of 8 ranks"},
    {"graphs", bench_graphs,
     "GPT-2 steps as CUDA graphs and operation by operation; the first three; idle time"},
    {"deterministic", bench_deterministic, "GPT-2 steps with system.deterministic, and the memory it takes"},
    {"paper", bench_paper_steps,
     "optimizer steps of the paper's model on 8192 and 16384 tokens, P = 4 and 20"},
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
    for (int i = 1; i < argc; i += 2) {
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
    }
    if (cuda_devices(NULL) == 0)
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
