/* What each operation of kernels.h costs, and the device that counts it. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cudnn_scratch.h"
#include "kernels/estimate/device.h"

/* As kernels/cuda/ has them, to plan the same memory and the same chunks. */
#define MATMUL_WORKSPACE ((size_t)32 << 20)
#define CHUNK_BYTES ((double)(512 << 20)) /* of logits */

/* ---- counting ---- */

static double most(double a, double b) {
    return a > b ? a : b;
}

static double element(const struct device *dev) {
    return dev->options.precision == DEVICE_BF16 ? 2 : 4;
}

/* One kernel: flops as the model counts them, and what is really executed at `rate`. */
static void kernel(struct device *dev, enum estimate_part part, double flops, double executed, double rate,
                   double bytes, double bandwidth) {
    double seconds = most(executed / rate, bytes / bandwidth) + dev->options.gpu->launch;
    dev->account.flops[part] += flops;
    dev->account.bytes[part] += bytes;
    dev->account.seconds[part] += seconds;
    dev->account.launches++;
    timeline_compute(&dev->timeline, seconds);
}

/* One that only moves bytes. */
static void pass(struct device *dev, enum estimate_part part, double bytes) {
    kernel(dev, part, 0, 0, 1, bytes, dev->options.gpu->copy);
}

static void product(struct device *dev, enum estimate_part part, double m, double n, double k, double bytes) {
    double flops = 2 * m * n * k;
    kernel(dev, part, flops, flops, dev->options.gpu->matmul, bytes, dev->options.gpu->copy);
}

static void mixing(struct device *dev, double flops, double bytes) {
    const struct gpu_spec *g = dev->options.gpu;
    kernel(dev, PAPER_MIXING, flops, flops, g->matmul * g->mixing_matmul, bytes, g->copy * g->mixing);
}

/* ---- embedding, norm, activation ---- */

static void embed(struct device *dev, const struct embed_spec *s, tensor tokens, tensor w, tensor pos,
                  int64_t first, tensor x) {
    double values = (double)(s->batch * s->tokens * s->hidden), E = element(dev);
    (void)tokens, (void)w, (void)first, (void)x;
    pass(dev, PAPER_ELEMENTWISE, 2 * values * E + (pos.data ? (double)(s->tokens * s->hidden) * E : 0));
}

/* Rows of dw are read, added to and written. */
static void embed_backward(struct device *dev, const struct embed_spec *s, tensor tokens, tensor dx,
                           tensor dw, tensor dpos) {
    double values = (double)(s->batch * s->tokens * s->hidden), E = element(dev);
    (void)tokens, (void)dx, (void)dw;
    pass(dev, PAPER_ELEMENTWISE, values * (E + 8));
    if (dpos.data)
        pass(dev, PAPER_ELEMENTWISE, values * E + (double)(s->tokens * s->hidden) * 8);
}

static void norm_pass(struct device *dev, const struct norm_spec *s, double tensors) {
    pass(dev, PAPER_ELEMENTWISE, tensors * (double)(s->rows * s->hidden) * element(dev));
}

static void residual_norm(struct device *dev, const struct norm_spec *s, tensor x, tensor delta, tensor w,
                          tensor b, tensor sum, tensor y, void *saved) {
    (void)x, (void)w, (void)b, (void)sum, (void)y, (void)saved;
    norm_pass(dev, s, delta.data ? 4 : 2);
}

static void residual_norm_recompute(struct device *dev, const struct norm_spec *s, tensor sum, tensor w,
                                    tensor b, tensor y, const void *saved) {
    (void)sum, (void)w, (void)b, (void)y, (void)saved;
    norm_pass(dev, s, 2);
}

static void residual_norm_backward(struct device *dev, const struct norm_spec *s, tensor dy, tensor sum,
                                   tensor w, const void *saved, tensor dx, tensor dw, tensor db,
                                   bool accumulate) {
    (void)dy, (void)sum, (void)w, (void)saved, (void)dx, (void)dw, (void)db, (void)accumulate;
    norm_pass(dev, s, 4); /* dy, sum, and dx in and out */
}

static void act_pass(struct device *dev, const struct act_spec *s, double tensors) {
    pass(dev, PAPER_ELEMENTWISE, tensors * (double)(s->rows * s->hidden) * element(dev));
}

static void mlp_act(struct device *dev, const struct act_spec *s, tensor u, tensor gate, tensor out) {
    (void)u, (void)gate, (void)out;
    act_pass(dev, s, s->type == ACT_SWIGLU ? 3 : 2);
}

static void mlp_act_backward(struct device *dev, const struct act_spec *s, tensor dout, tensor u, tensor gate,
                             tensor du, tensor dgate) {
    (void)dout, (void)u, (void)gate, (void)du, (void)dgate;
    act_pass(dev, s, s->type == ACT_SWIGLU ? 5 : 3);
}

/* ---- matrix products ---- */

static void linear(struct device *dev, const struct linear_spec *s, tensor x, tensor w, tensor bias,
                   tensor y) {
    double N = (double)s->rows, in = (double)s->in, out = (double)s->out;
    (void)x, (void)w, (void)bias, (void)y;
    product(dev, PAPER_MATMUL, N, out, in, (N * in + out * in + N * out) * element(dev));
}

/* dW is kept in fp32; adding to it reads it as well. */
static double gradient_bytes(double elements, bool accumulate) {
    return elements * 4 * (accumulate ? 2 : 1);
}

static void linear_backward(struct device *dev, const struct linear_spec *s, tensor dy, tensor x, tensor w,
                            tensor dx, bool add_dx, tensor dw, tensor dbias, bool accumulate) {
    double N = (double)s->rows, in = (double)s->in, out = (double)s->out, E = element(dev);
    (void)dy, (void)x, (void)w, (void)dw;
    product(dev, PAPER_MATMUL, out, in, N, (N * out + N * in) * E + gradient_bytes(out * in, accumulate));
    if (dbias.data)
        pass(dev, PAPER_ELEMENTWISE, N * out * E);
    if (dx.data)
        product(dev, PAPER_MATMUL, N, in, out, (N * out + out * in + N * in * (add_dx ? 2 : 1)) * E);
}

/* Rows whose logits exist at once. */
static int64_t chunk_rows(const struct device *dev, const struct classifier_spec *s) {
    double row = (double)s->vocab * element(dev);
    double rows = CHUNK_BYTES / row < 128 ? 128 : CHUNK_BYTES / row;
    return rows < (double)s->rows ? (int64_t)rows : s->rows;
}

static void classifier(struct device *dev, const struct classifier_spec *s, tensor h, tensor w,
                       tensor targets, double scale, struct step_state *state, tensor dh, tensor dw,
                       bool accumulate) {
    double C = (double)s->hidden, V = (double)s->vocab, E = element(dev);
    int64_t chunk = chunk_rows(dev, s);
    (void)h, (void)w, (void)targets, (void)scale, (void)state, (void)dw;
    for (int64_t begin = 0; begin < s->rows; begin += chunk) {
        double N = (double)(s->rows - begin < chunk ? s->rows - begin : chunk);
        product(dev, PAPER_CLASSIFIER, N, V, C, (N * C + V * C + N * V) * E);
        pass(dev, PAPER_CLASSIFIER, N * V * E * (dh.data ? 2 : 1));
        if (!dh.data)
            continue;
        product(dev, PAPER_CLASSIFIER, N, C, V, (N * V + V * C + N * C) * E);
        product(dev, PAPER_CLASSIFIER, V, C, N,
                (N * V + N * C) * E + gradient_bytes(V * C, accumulate || begin > 0));
    }
}

/* ---- attention, mixing ---- */

static bool same_pattern(const struct attention_spec *a, const struct attention_spec *b) {
    return a->length == b->length && a->pseudo == b->pseudo && a->causal == b->causal &&
           a->token_mask == b->token_mask && a->window == b->window;
}

static double visible_pairs(struct device *dev, const struct attention_spec *s) {
    for (int i = 0; i < dev->pairs_count; i++)
        if (same_pattern(&dev->pairs[i].spec, s))
            return dev->pairs[i].pairs;
    double pairs = 0;
    for (int64_t q = 0; q < s->length; q++) {
        int64_t begin, end;
        attention_keys(s, q, s->length, &begin, &end);
        pairs += (double)(end - begin);
    }
    if (dev->pairs_count < PAIRS_KEPT)
        dev->pairs[dev->pairs_count++] = (struct counted_pairs){*s, pairs};
    return pairs;
}

static bool in_window(const struct attention_spec *s) {
    return s->window > 0 && s->window < s->length;
}

/* As kernels/cuda/attention/attention.cu decides. */
static bool cudnn_serves(const struct device *dev, const struct attention_spec *s) {
    return dev->options.precision == DEVICE_BF16 && !(s->token_mask && s->causal && s->pseudo > 1) &&
           (s->causal || !in_window(s)) && s->head_dim % 8 == 0 &&
           s->head_dim <= dev->options.gpu->cudnn_head_dim && s->length > 1 &&
           !(dev->options.gpu->cudnn_nan && s->length % 128 == 64) &&
           !(dev->options.deterministic && cudnn_deterministic_bytes(s) > CUDNN_DETERMINISTIC_LIMIT);
}

static struct attention_rate rate_of(const struct device *dev, const struct attention_spec *s) {
    const struct gpu_spec *g = dev->options.gpu;
    if (!cudnn_serves(dev, s))
        return g->own;
    if (s->head_dim <= 64)
        return g->narrow;
    double factor = in_window(s) ? g->window : 1;
    return (struct attention_rate){g->wide.forward * factor, g->wide.backward * factor};
}

/* FLOPs of one product over the visible pairs, and values of one of q, k, v, o. */
static double pair_flops(struct device *dev, const struct attention_spec *s) {
    return 2 * (double)(s->batch * s->heads * s->head_dim) * visible_pairs(dev, s);
}

static double attention_values(const struct attention_spec *s) {
    return (double)(s->batch * s->length * s->heads * s->head_dim);
}

static void attention(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                      tensor o, void *saved) {
    double flops = 2 * pair_flops(dev, s);
    (void)q, (void)k, (void)v, (void)o, (void)saved;
    kernel(dev, PAPER_ATTENTION, flops, flops, rate_of(dev, s).forward,
           4 * attention_values(s) * element(dev), dev->options.gpu->copy);
}

/* Five products: the scores once more, and the gradients of v, of the weights, of q and of k. */
static void attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                               tensor v, tensor o, tensor d_o, const void *saved, tensor dq, tensor dk,
                               tensor dv) {
    double one = pair_flops(dev, s);
    (void)q, (void)k, (void)v, (void)o, (void)d_o, (void)saved, (void)dq, (void)dk, (void)dv;
    kernel(dev, PAPER_ATTENTION, 4 * one, 5 * one, rate_of(dev, s).backward,
           8 * attention_values(s) * element(dev), dev->options.gpu->copy);
}

/* FLOPs of three mixtures, and bytes of one head vector of every token. */
static double mix_flops(const struct qkv_mix_spec *s) {
    double H = (double)s->heads;
    return s->mixed ? 3 * 2 * (double)(s->batch * s->tokens) * (double)s->pseudo * H * H * (double)s->head_dim
                    : 0;
}

static double heads_bytes(const struct device *dev, int64_t tokens, int64_t heads, int64_t head_dim) {
    return (double)tokens * (double)heads * (double)head_dim * element(dev);
}

static void qkv_mix(struct device *dev, const struct qkv_mix_spec *s, tensor qkv, tensor alpha_q,
                    tensor alpha_k, tensor alpha_v, tensor table, int64_t first, tensor q, tensor k,
                    tensor v) {
    double one = heads_bytes(dev, s->batch * s->tokens, s->heads, s->head_dim);
    (void)qkv, (void)alpha_q, (void)alpha_k, (void)alpha_v, (void)table, (void)first, (void)q, (void)k,
        (void)v;
    mixing(dev, mix_flops(s), one * 3 * (1 + (double)s->pseudo));
}

/* dq, dk, dv; qkv again where alphas have gradients; dqkv. */
static void qkv_mix_backward(struct device *dev, const struct qkv_mix_spec *s, tensor dq, tensor dk,
                             tensor dv, tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v,
                             tensor table, tensor dqkv, tensor dalpha_q, tensor dalpha_k, tensor dalpha_v,
                             bool accumulate) {
    double one = heads_bytes(dev, s->batch * s->tokens, s->heads, s->head_dim);
    (void)dq, (void)dk, (void)dv, (void)qkv, (void)alpha_q, (void)alpha_k, (void)alpha_v, (void)table;
    (void)dqkv, (void)dalpha_q, (void)dalpha_k, (void)dalpha_v, (void)accumulate;
    mixing(dev, 2 * mix_flops(s), one * 3 * ((s->mixed ? 2 : 1) + (double)s->pseudo));
}

static double collapse_flops(const struct collapse_spec *s) {
    return 2 * (double)(s->batch * s->tokens) * (double)(s->pseudo * s->heads) *
           (double)(s->per_head ? 1 : s->heads) * (double)s->head_dim;
}

static void collapse(struct device *dev, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    double one = heads_bytes(dev, s->batch * s->tokens, s->heads, s->head_dim);
    (void)o, (void)r, (void)out;
    mixing(dev, collapse_flops(s), one * (1 + (double)s->pseudo));
}

static void collapse_backward(struct device *dev, const struct collapse_spec *s, tensor dout, tensor o,
                              tensor r, tensor d_o, tensor dr, bool accumulate) {
    double one = heads_bytes(dev, s->batch * s->tokens, s->heads, s->head_dim);
    (void)dout, (void)o, (void)r, (void)d_o, (void)dr, (void)accumulate;
    mixing(dev, 2 * collapse_flops(s), one * (1 + 2 * (double)s->pseudo));
}

/* ---- optimizer and step state ---- */

static void sumsq(struct device *dev, tensor g, struct step_state *state) {
    (void)state;
    pass(dev, PAPER_OPTIMIZER, (double)tensor_count(g) * (double)dtype_bytes(g.dtype));
}

/* The gradient is read; master and moments are read and written, and the rounded parameter is written. */
static void adamw(struct device *dev, const struct adamw_hyper *h, const struct param_group *groups,
                  int count, int64_t first, tensor master, tensor p, tensor g, tensor m, tensor v,
                  const struct step_state *state) {
    double each = (double)(dtype_bytes(g.dtype) + 2 * dtype_bytes(master.dtype) + 2 * dtype_bytes(m.dtype) +
                           2 * dtype_bytes(v.dtype) + (p.data ? dtype_bytes(p.dtype) : 0));
    (void)h, (void)groups, (void)count, (void)first, (void)state;
    pass(dev, PAPER_OPTIMIZER, (double)tensor_count(g) * each);
}

static void step_begin(struct device *dev, struct step_state *state, int64_t step, double lr) {
    (void)state, (void)step, (void)lr;
    pass(dev, PAPER_OPTIMIZER, 0);
}

static void step_decide(struct device *dev, struct step_state *state, double grad_clip, double skip_zscore) {
    (void)state, (void)grad_clip, (void)skip_zscore;
    pass(dev, PAPER_OPTIMIZER, 0);
}

/* ---- the device ---- */

static void close_device(struct device *dev) {
    free(dev);
}

static struct device_dtypes dtypes(struct device *dev) {
    return (struct device_dtypes){dev->options.precision == DEVICE_BF16 ? DTYPE_BF16 : DTYPE_F32, DTYPE_F32,
                                  DTYPE_F32};
}

/* Addresses nobody reads or writes, apart from each other as real ones are. */
static void *alloc(struct device *dev, size_t bytes, struct error *e) {
    uintptr_t at = dev->allocated;
    (void)e;
    dev->allocated += (bytes + 511) / 256 * 256;
    return (void *)at;
}

static void release(struct device *dev, void *data) {
    (void)dev, (void)data;
}

static size_t memory_available(struct device *dev) {
    (void)dev;
    return 0; /* nothing is refused: the caller compares */
}

static void zero(struct device *dev, void *data, size_t bytes) {
    (void)data;
    pass(dev, PAPER_ELEMENTWISE, (double)bytes);
}

/* As the CUDA backend: what is sent and what comes in bf16; a share, or with deterministic sums all of them.
 */
static size_t staging_bytes(struct device *dev, int64_t elements, int ranks, enum dtype dtype,
                            enum dtype wire) {
    if (wire == DTYPE_BF16)
        return 2 * (size_t)elements * dtype_bytes(wire);
    return (size_t)(dev->options.deterministic ? elements : elements / ranks) * dtype_bytes(dtype);
}

/* Every operation counts, each time. */
static bool graph_replay(struct device *dev, int id) {
    (void)dev, (void)id;
    return false;
}

static void graph_begin(struct device *dev, int id) {
    (void)dev, (void)id;
}

static bool graph_end(struct device *dev, int id) {
    (void)dev, (void)id;
    return true;
}

static void range_begin(struct device *dev, const char *name, int index) {
    (void)dev, (void)name, (void)index;
}

static void range_end(struct device *dev) {
    (void)dev;
}

/* Tokens come from pinned memory while the step before runs. */
static void upload(struct device *dev, tensor dst, const void *host, enum dtype host_dtype) {
    (void)dev, (void)dst, (void)host, (void)host_dtype;
}

/* What is saved is what the CUDA backend saves. Of workspaces the two largest are counted: logits, and what
 * cuDNN's backward of attention takes: a sum of o do for each query, and either dq in fp32 or, to be
 * deterministic, the square of the length. */
static int plan(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e) {
    (void)e;
    *cost = (struct op_cost){0, MATMUL_WORKSPACE};
    if (spec->kind == OP_NORM)
        cost->saved = (size_t)spec->norm.rows * 2 * sizeof(float);
    if (spec->kind == OP_ATTENTION) {
        const struct attention_spec *a = &spec->attention;
        cost->saved = (size_t)(a->batch * a->heads * a->length) * sizeof(float);
        bool square = dev->options.deterministic && cudnn_serves(dev, a);
        cost->workspace = cost->saved + 4096 /* alignment */;
        cost->workspace += square ? cudnn_deterministic_bytes(a)
                                  : (size_t)attention_values(a) * 4 * (size_t)dev->options.gpu->cudnn_scratch;
    }
    if (spec->kind == OP_CLASSIFIER)
        cost->workspace += (size_t)((double)chunk_rows(dev, &spec->classifier) *
                                    (double)spec->classifier.vocab * element(dev)) +
                           (size_t)spec->classifier.rows * sizeof(double);
    return 0;
}

static void set_workspace(struct device *dev, void *data, size_t bytes) {
    (void)dev, (void)data, (void)bytes;
}

static void rope_table(struct device *dev, tensor table, double theta) {
    (void)dev, (void)table, (void)theta;
}

/* Training alone: what only decoding, saving or reporting calls is absent. */
const struct kernels *kernels_estimate(void) {
    static const struct kernels table = {
        .name = "estimate",
        .close = close_device,
        .dtypes = dtypes,
        .alloc = alloc,
        .release = release,
        .staging_bytes = staging_bytes,
        .memory_available = memory_available,
        .zero = zero,
        .upload = upload,
        .graph_replay = graph_replay,
        .graph_begin = graph_begin,
        .graph_end = graph_end,
        .range_begin = range_begin,
        .range_end = range_end,
        .plan = plan,
        .set_workspace = set_workspace,
        .embed = embed,
        .embed_backward = embed_backward,
        .residual_norm = residual_norm,
        .residual_norm_recompute = residual_norm_recompute,
        .residual_norm_backward = residual_norm_backward,
        .linear = linear,
        .linear_backward = linear_backward,
        .rope_table = rope_table,
        .qkv_mix = qkv_mix,
        .qkv_mix_backward = qkv_mix_backward,
        .attention = attention,
        .attention_backward = attention_backward,
        .collapse = collapse,
        .collapse_backward = collapse_backward,
        .mlp_act = mlp_act,
        .mlp_act_backward = mlp_act_backward,
        .classifier = classifier,
        .step_begin = step_begin,
        .sumsq = sumsq,
        .step_decide = step_decide,
        .adamw = adamw,
    };
    return &table;
}

struct device *estimate_open(const struct estimate_options *options, struct error *e) {
    struct device *dev = calloc(1, sizeof *dev);
    if (!dev) {
        fail_run(e, "out of memory for a run_estimate");
        return NULL;
    }
    dev->options = *options;
    dev->allocated = 4096;
    estimate_comm_open(&dev->comm, dev);
    return dev;
}

struct comm *estimate_comm(struct device *dev) {
    return &dev->comm.base;
}

struct estimate_totals estimate_totals(const struct device *dev) {
    struct estimate_totals a = dev->account;
    a.now = dev->timeline.computed;
    memcpy(a.exposed, dev->timeline.exposed, sizeof a.exposed);
    memcpy(a.moving, dev->timeline.moving, sizeof a.moving);
    return a;
}
