/* What each operation costs on a GPU: FLOPs, bytes, seconds and, from its plan, memory. */
#include "kernels/estimate/device.h"

#include <string.h>

#include "kernels/cudnn_scratch.h"
#include "kernels/logits_chunk.h"
#include "kernels/talking_shape.h"

#pragma GCC diagnostic ignored                                                                               \
    "-Wunused-parameter" /* most costs follow from the spec, not from the tensors */

/* The same value as in kernels/cuda/, so that memory is planned alike. */
#define MATMUL_WORKSPACE ((size_t)32 << 20)

/* ---- counting ---- */

static double max_double(double a, double b) {
    return a > b ? a : b;
}

static double element_bytes(const struct device *dev) {
    return dev->options.precision == DEVICE_BF16 ? 2 : 4;
}

static void report_launch(struct device *dev, enum estimate_part part, double flops, double bytes,
                          double floor) {
    const struct estimate_place *at = &dev->place;
    struct estimate_launch launch = {.op = at->op,
                                     .phase = at->depth > 0 ? at->ranges[0].name : "",
                                     .layer = -1,
                                     .part = part,
                                     .rows = at->rows,
                                     .columns = at->columns,
                                     .inner = at->inner,
                                     .flops = flops,
                                     .bytes = bytes,
                                     .floor = floor};
    for (int i = 0; i < at->depth; i++)
        launch.layer = strcmp(at->ranges[i].name, "layer") == 0 ? at->ranges[i].index : launch.layer;
    dev->options.launched(dev->options.context, &launch);
}

/* One kernel. flops: as model/flops.h counts them; executed: what runs at `rate`. */
static void count_kernel(struct device *dev, enum estimate_part part, double flops, double executed,
                         double rate, double bytes, double bandwidth) {
    double floor = max_double(executed / rate, bytes / bandwidth), seconds = floor + dev->options.gpu->launch;
    if (dev->options.launched)
        report_launch(dev, part, executed, bytes, floor);
    dev->totals.flops[part] += flops;
    dev->totals.bytes[part] += bytes;
    dev->totals.seconds[part] += seconds;
    dev->totals.launches++;
    timeline_compute(&dev->timeline, seconds);
}

/* A kernel that only moves bytes. */
static void count_pass(struct device *dev, enum estimate_part part, double bytes) {
    count_kernel(dev, part, 0, 0, 1, bytes, dev->options.gpu->copy);
}

static void count_matmul(struct device *dev, enum estimate_part part, double m, double n, double k,
                         double bytes) {
    double flops = 2 * m * n * k;
    dev->place.rows = m;
    dev->place.columns = n;
    dev->place.inner = k;
    count_kernel(dev, part, flops, flops, dev->options.gpu->matmul, bytes, dev->options.gpu->copy);
    dev->place.rows = dev->place.columns = dev->place.inner = 0;
}

static void count_mixing(struct device *dev, double flops, double bytes) {
    const struct gpu_spec *g = dev->options.gpu;
    count_kernel(dev, ESTIMATE_MIXING, flops, flops, g->matmul * g->mixing_matmul, bytes,
                 g->copy * g->mixing);
}

/* ---- embedding, norm, activation ---- */

void estimate_embed(struct device *dev, const struct embed_spec *s, tensor tokens, tensor w, tensor pos,
                    tensor positions, int64_t first, tensor x) {
    double values = (double)(s->batch * s->tokens * s->hidden), E = element_bytes(dev);
    count_pass(dev, ESTIMATE_ELEMENTWISE,
               2 * values * E + (pos.data ? (double)(s->tokens * s->hidden) * E : 0));
}

/* Rows of dw are read, added to and written. */
void estimate_embed_backward(struct device *dev, const struct embed_spec *s, tensor tokens, tensor positions,
                             tensor dx, tensor dw, tensor dpos) {
    double values = (double)(s->batch * s->tokens * s->hidden), E = element_bytes(dev);
    count_pass(dev, ESTIMATE_ELEMENTWISE, values * (E + 8));
    if (dpos.data)
        count_pass(dev, ESTIMATE_ELEMENTWISE, values * E + (double)(s->tokens * s->hidden) * 8);
}

static void count_norm(struct device *dev, const struct norm_spec *s, double tensors) {
    count_pass(dev, ESTIMATE_ELEMENTWISE, tensors * (double)(s->rows * s->hidden) * element_bytes(dev));
}

void estimate_residual_norm(struct device *dev, const struct norm_spec *s, tensor x, tensor delta, tensor w,
                            tensor b, tensor sum, tensor y, void *saved) {
    count_norm(dev, s, delta.data ? 4 : 2);
}

void estimate_residual_norm_recompute(struct device *dev, const struct norm_spec *s, tensor sum, tensor w,
                                      tensor b, tensor y, const void *saved) {
    count_norm(dev, s, 2);
}

void estimate_residual_norm_backward(struct device *dev, const struct norm_spec *s, tensor dy, tensor sum,
                                     tensor w, const void *saved, tensor dx, bool add_dx, tensor dw,
                                     tensor db, tensor dx_sums, bool accumulate) {
    count_norm(dev, s, add_dx ? 4 : 3); /* dy, sum, dx out, and in */
}

static void count_act(struct device *dev, const struct act_spec *s, double tensors) {
    count_pass(dev, ESTIMATE_ELEMENTWISE, tensors * (double)(s->rows * s->hidden) * element_bytes(dev));
}

void estimate_mlp_act(struct device *dev, const struct act_spec *s, tensor u, tensor gate, tensor out) {
    count_act(dev, s, s->type == ACT_SWIGLU ? 3 : 2);
}

void estimate_mlp_act_backward(struct device *dev, const struct act_spec *s, tensor dout, tensor u,
                               tensor gate, tensor du, tensor dgate) {
    count_act(dev, s, s->type == ACT_SWIGLU ? 5 : 3);
}

/* ---- matrix products ---- */

void estimate_linear(struct device *dev, const struct linear_spec *s, tensor x, tensor w, tensor bias,
                     tensor y) {
    double N = (double)s->rows, in = (double)s->in, out = (double)s->out;
    count_matmul(dev, ESTIMATE_MATMUL, N, out, in, (N * in + out * in + N * out) * element_bytes(dev));
}

/* dW is kept in fp32; adding to it reads it as well. */
static double gradient_bytes(double elements, bool accumulate) {
    return elements * 4 * (accumulate ? 2 : 1);
}

void estimate_linear_backward(struct device *dev, const struct linear_spec *s, tensor dy, tensor dy_sums,
                              tensor x, tensor w, tensor dx, bool add_dx, tensor dw, tensor dbias,
                              bool accumulate) {
    double N = (double)s->rows, in = (double)s->in, out = (double)s->out, E = element_bytes(dev);
    count_matmul(dev, ESTIMATE_MATMUL, out, in, N,
                 (N * out + N * in) * E + gradient_bytes(out * in, accumulate));
    if (dbias.data)
        count_pass(dev, ESTIMATE_ELEMENTWISE,
                   dy_sums.data ? out * 4 + gradient_bytes(out, accumulate) : N * out * E);
    if (dx.data)
        count_matmul(dev, ESTIMATE_MATMUL, N, in, out, (N * out + out * in + N * in * (add_dx ? 2 : 1)) * E);
}

/* Whether the products of linear_act and act_linear_backward apply GELU, which the trainer decides by timing
 * (kernels/cuda/linear_act.cu). */
static bool fuses_gelu(const struct device *dev, enum act_type type, int64_t columns) {
    return dev->options.gpu->fused_gelu && type == ACT_GELU_TANH && dev->options.precision == DEVICE_BF16 &&
           !dev->options.deterministic && columns % 8 == 0;
}

void estimate_linear_act(struct device *dev, const struct linear_spec *s, enum act_type type, tensor x,
                         tensor w, tensor bias, tensor u, tensor act) {
    double N = (double)s->rows, in = (double)s->in, out = (double)s->out;
    struct act_spec spec = {type, s->rows, s->out};
    if (fuses_gelu(dev, type, s->out)) {
        count_matmul(dev, ESTIMATE_MATMUL, N, out, in,
                     (N * in + out * in + 2 * N * out) * element_bytes(dev));
    } else {
        estimate_linear(dev, s, x, w, bias, u);
        estimate_mlp_act(dev, &spec, u, tensor_none(), act);
    }
}

void estimate_act_linear_backward(struct device *dev, const struct linear_spec *s, enum act_type type,
                                  tensor dy, tensor dy_sums, tensor act, tensor w, tensor u, tensor du,
                                  tensor dw, tensor dbias, bool accumulate) {
    double N = (double)s->rows, in = (double)s->in, out = (double)s->out;
    struct act_spec spec = {type, s->rows, s->in};
    bool fused = fuses_gelu(dev, type, s->in);
    estimate_linear_backward(dev, s, dy, dy_sums, act, w, fused ? tensor_none() : du, false, dw, dbias,
                             accumulate);
    if (fused)
        count_matmul(dev, ESTIMATE_MATMUL, N, in, out,
                     (N * out + out * in + 2 * N * in) * element_bytes(dev));
    else
        estimate_mlp_act_backward(dev, &spec, du, u, tensor_none(), du, tensor_none());
}

/* Rows whose logits exist at once. */
static int64_t chunk_rows(const struct device *dev, const struct classifier_spec *s) {
    double row = (double)classifier_padded(s) * element_bytes(dev);
    return logits_chunk_rows(s->rows, (int64_t)row, (int64_t)dev->options.gpu->memory);
}

void estimate_classifier(struct device *dev, const struct classifier_spec *s, tensor h, tensor w,
                         tensor targets, double scale, struct step_state *state, tensor correct, tensor dh,
                         tensor dw, bool accumulate) {
    double C = (double)s->hidden, V = (double)classifier_padded(s), E = element_bytes(dev);
    int64_t chunk = chunk_rows(dev, s);
    for (int64_t begin = 0; begin < s->rows; begin += chunk) {
        double N = (double)(s->rows - begin < chunk ? s->rows - begin : chunk);
        count_matmul(dev, ESTIMATE_CLASSIFIER, N, V, C, (N * C + V * C + N * V) * E);
        count_pass(dev, ESTIMATE_CLASSIFIER, N * V * E * (dh.data ? 2 : 1));
        if (!dh.data)
            continue;
        count_matmul(dev, ESTIMATE_CLASSIFIER, N, C, V, (N * V + V * C + N * C) * E);
        count_matmul(dev, ESTIMATE_CLASSIFIER, V, C, N,
                     (N * V + N * C) * E + gradient_bytes(V * C, accumulate || begin > 0));
    }
}

/* ---- attention ---- */

static bool same_pattern(const struct attention_spec *a, const struct attention_spec *b) {
    return a->length == b->length && a->pseudo == b->pseudo && a->causal == b->causal &&
           a->token_mask == b->token_mask && a->window == b->window;
}

/* Of a whole sequence: segments are data, which the estimate does not have, so theirs are at most these. */
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

static bool has_window(const struct attention_spec *s) {
    return s->window > 0 && s->window < s->length;
}

/* The same decision as in kernels/cuda/attention/attention.cu. */
static bool uses_cudnn(const struct device *dev, const struct attention_spec *s) {
    return dev->options.precision == DEVICE_BF16 && !s->segmented &&
           !(s->token_mask && s->causal && s->pseudo > 1) && (s->causal || !has_window(s)) &&
           s->head_dim % 8 == 0 && s->head_dim <= dev->options.gpu->cudnn_head_dim && s->length > 1 &&
           !(dev->options.gpu->cudnn_nan && s->length % 128 == 64) &&
           !(dev->options.deterministic && cudnn_deterministic_bytes(s) > CUDNN_DETERMINISTIC_LIMIT);
}

static struct attention_rate rate_for(const struct device *dev, const struct attention_spec *s) {
    const struct gpu_spec *g = dev->options.gpu;
    if (!uses_cudnn(dev, s))
        return g->builtin;
    if (s->head_dim <= 64)
        return g->narrow;
    double factor = has_window(s) ? g->window : 1;
    return (struct attention_rate){g->wide.forward * factor, g->wide.backward * factor};
}

/* FLOPs of one product over the visible pairs. */
static double pair_flops(struct device *dev, const struct attention_spec *s) {
    return 2 * (double)(s->batch * s->heads * s->head_dim) * visible_pairs(dev, s);
}

/* Elements of q or o. */
static double attention_values(const struct attention_spec *s) {
    return (double)(s->batch * s->length * s->heads * s->head_dim);
}

/* Elements of q, k, v and o together. */
static double all_values(const struct attention_spec *s) {
    return 2 * (double)(s->batch * s->length * (s->heads + attention_kv_heads(s)) * s->head_dim);
}

void estimate_attention(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                        tensor segments, tensor o, void *saved) {
    double flops = 2 * pair_flops(dev, s);
    count_kernel(dev, ESTIMATE_ATTENTION, flops, flops, rate_for(dev, s).forward,
                 all_values(s) * element_bytes(dev), dev->options.gpu->copy);
}

/* Five products: the scores again, and the gradients of v, of the weights, of q and of k. */
void estimate_attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                                 tensor v, tensor segments, tensor o, tensor d_o, const void *saved,
                                 tensor dq, tensor dk, tensor dv) {
    double one = pair_flops(dev, s);
    count_kernel(dev, ESTIMATE_ATTENTION, 4 * one, 5 * one, rate_for(dev, s).backward,
                 2 * all_values(s) * element_bytes(dev), dev->options.gpu->copy);
}

static void count_qk_norm(struct device *dev, const struct qk_norm_spec *s, double tensors) {
    double elements = (double)(s->rows * (s->heads + 2 * s->kv_heads) * s->head_dim);
    count_pass(dev, ESTIMATE_ELEMENTWISE, tensors * elements * element_bytes(dev));
}

void estimate_qk_norm(struct device *dev, const struct qk_norm_spec *s, tensor x, tensor w_q, tensor w_k,
                      tensor y) {
    count_qk_norm(dev, s, 2);
}

void estimate_qk_norm_backward(struct device *dev, const struct qk_norm_spec *s, tensor dy, tensor x,
                               tensor w_q, tensor w_k, tensor dx, tensor dw_q, tensor dw_k, bool accumulate) {
    count_qk_norm(dev, s, 3);
}

/* ---- mixing ---- */

static double mix_flops(const struct qkv_mix_spec *s) {
    double H = (double)s->heads, G = (double)mix_kv_heads(s);
    return s->mixed ? 2 * (double)(s->batch * s->tokens) * (double)s->pseudo * (H * H + 2 * G * G) *
                          (double)s->head_dim
                    : 0;
}

/* Bytes of one vector for every head and token. */
static double heads_bytes(const struct device *dev, int64_t tokens, int64_t heads, int64_t head_dim) {
    return (double)tokens * (double)heads * (double)head_dim * element_bytes(dev);
}

/* qkv so many times. */
static double mix_bytes(const struct device *dev, const struct qkv_mix_spec *s, double times) {
    return times * heads_bytes(dev, s->batch * s->tokens, mix_row_heads(s), s->head_dim);
}

/* Without alphas the model rotates q and k in place. */
static double rotation_bytes(const struct device *dev, const struct qkv_mix_spec *s) {
    return 2 * heads_bytes(dev, s->batch * s->tokens, s->heads + mix_kv_heads(s), s->head_dim);
}

void estimate_qkv_mix(struct device *dev, const struct qkv_mix_spec *s, tensor qkv, tensor alpha_q,
                      tensor alpha_k, tensor alpha_v, tensor table, tensor positions, int64_t first, tensor q,
                      tensor k, tensor v) {
    count_mixing(dev, mix_flops(s),
                 s->mixed ? mix_bytes(dev, s, 1 + (double)s->pseudo) : rotation_bytes(dev, s));
}

/* dq, dk, dv; qkv again where alphas have gradients; dqkv. */
void estimate_qkv_mix_backward(struct device *dev, const struct qkv_mix_spec *s, tensor dq, tensor dk,
                               tensor dv, tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v,
                               tensor table, tensor positions, tensor dqkv, tensor dalpha_q, tensor dalpha_k,
                               tensor dalpha_v, bool accumulate) {
    count_mixing(dev, 2 * mix_flops(s),
                 s->mixed ? mix_bytes(dev, s, 2 + (double)s->pseudo) : rotation_bytes(dev, s));
}

static double collapse_flops(const struct collapse_spec *s) {
    return 2 * (double)(s->batch * s->tokens) * (double)(s->pseudo * s->heads) *
           (double)(s->per_head ? 1 : s->heads) * (double)s->head_dim;
}

void estimate_collapse(struct device *dev, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    double one = heads_bytes(dev, s->batch * s->tokens, s->heads, s->head_dim);
    count_mixing(dev, collapse_flops(s), one * (1 + (double)s->pseudo));
}

void estimate_collapse_backward(struct device *dev, const struct collapse_spec *s, tensor dout, tensor o,
                                tensor r, tensor d_o, tensor dr, bool accumulate) {
    double one = heads_bytes(dev, s->batch * s->tokens, s->heads, s->head_dim);
    count_mixing(dev, 2 * collapse_flops(s), one * (1 + 2 * (double)s->pseudo));
}

static double fold_flops(const struct fold_spec *s) {
    return 3 * 2 * (double)(s->heads * s->heads) * (double)s->columns;
}

void estimate_fold(struct device *dev, const struct fold_spec *s, tensor w, tensor alpha_q, tensor alpha_k,
                   tensor alpha_v, tensor folded) {
    count_mixing(dev, fold_flops(s), 2 * 3 * (double)(s->heads * s->columns) * element_bytes(dev));
}

void estimate_fold_backward(struct device *dev, const struct fold_spec *s, tensor dfolded, tensor w,
                            tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor dw, tensor dalpha_q,
                            tensor dalpha_k, tensor dalpha_v, bool accumulate, bool accumulate_alpha) {
    double elements = 3 * (double)(s->heads * s->columns);
    count_mixing(dev, 2 * fold_flops(s),
                 elements * (4 + element_bytes(dev)) + gradient_bytes(elements, accumulate));
}

/* It is read or written once each: o [N,2,pairs,2d] and an array of half the size. */
void estimate_diff_combine(struct device *dev, const struct diff_combine_spec *s, tensor o, tensor lambda_q1,
                           tensor lambda_k1, tensor lambda_q2, tensor lambda_k2, tensor w, tensor out) {
    count_pass(dev, ESTIMATE_ELEMENTWISE, 3 * heads_bytes(dev, s->rows, 2 * s->pairs, s->head_dim));
}

void estimate_diff_combine_backward(struct device *dev, const struct diff_combine_spec *s, tensor dout,
                                    tensor o, tensor lambda_q1, tensor lambda_k1, tensor lambda_q2,
                                    tensor lambda_k2, tensor w, tensor d_o, tensor dlambda_q1,
                                    tensor dlambda_k1, tensor dlambda_q2, tensor dlambda_k2, tensor dw,
                                    bool accumulate) {
    count_pass(dev, ESTIMATE_ELEMENTWISE, 5 * heads_bytes(dev, s->rows, 2 * s->pairs, s->head_dim));
}

void estimate_add(struct device *dev, tensor x, tensor y) {
    count_pass(dev, ESTIMATE_ELEMENTWISE, 3 * (double)tensor_count(x) * element_bytes(dev));
}

/* What kernels/cuda/attention/talking.cu computes: see the headers of it and talking_backward.cu. */
struct talking_flops {
    double product, mixing; /* over all visible pairs */
    double executed;        /* of a mixing, with padding heads */
    double parts;           /* of d, each of which computes the scores */
};

static struct talking_flops talking_flops(struct device *dev, const struct attention_spec *s) {
    double one = pair_flops(dev, s), heads = (double)s->heads, d = (double)s->head_dim;
    int64_t padded = talking_padded_heads(s->heads),
            columns = talking_columns(s->heads, s->head_dim, dev->options.precision == DEVICE_BF16);
    return (struct talking_flops){one, one * heads / d, one * (double)(padded * padded) / (heads * d),
                                  (double)((s->head_dim + columns - 1) / columns)};
}

void estimate_talking(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                      tensor segments, tensor logits, tensor weights, tensor o, void *saved) {
    struct talking_flops f = talking_flops(dev, s);
    count_kernel(dev, ESTIMATE_ATTENTION, 2 * (f.product + f.mixing),
                 (2 * f.parts + 1) * f.product + 3 * f.parts * f.executed, dev->options.gpu->talking,
                 all_values(s) * element_bytes(dev), dev->options.gpu->copy);
}

void estimate_talking_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                               tensor v, tensor segments, tensor logits, tensor weights, tensor d_o,
                               const void *saved, tensor dq, tensor dk, tensor dv, tensor dlogits,
                               tensor dweights, bool accumulate) {
    struct talking_flops f = talking_flops(dev, s);
    count_kernel(dev, ESTIMATE_ATTENTION, 4 * (f.product + f.mixing),
                 (7 * f.parts + 3) * f.product + 12 * f.parts * f.executed, dev->options.gpu->talking,
                 2 * all_values(s) * element_bytes(dev), dev->options.gpu->copy);
}

/* ---- simplicial: estimate_plan refuses it ---- */

void estimate_simplicial(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                         tensor k2, tensor v2, tensor segments, tensor o, void *saved) {}

void estimate_simplicial_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                                  tensor v, tensor k2, tensor v2, tensor segments, tensor o, tensor d_o,
                                  const void *saved, tensor dq, tensor dk, tensor dv, tensor dk2,
                                  tensor dv2) {}

/* ---- optimizer and step state ---- */

void estimate_sumsq(struct device *dev, tensor g, struct step_state *state) {
    count_pass(dev, ESTIMATE_OPTIMIZER, (double)tensor_count(g) * (double)dtype_bytes(g.dtype));
}

/* The gradient is read; master and moments are read and written, and the rounded parameter is written. */
void estimate_adamw(struct device *dev, const struct adamw_hyper *hyper, const struct param_group *groups,
                    int count, tensor master, tensor p, tensor g, tensor m, tensor v,
                    const struct step_state *state) {
    double each = (double)(dtype_bytes(g.dtype) + 2 * dtype_bytes(master.dtype) + 2 * dtype_bytes(m.dtype) +
                           2 * dtype_bytes(v.dtype) + (p.data ? dtype_bytes(p.dtype) : 0));
    count_pass(dev, ESTIMATE_OPTIMIZER, (double)tensor_count(g) * each);
}

void estimate_muon_momentum(struct device *dev, double momentum, const struct param_group *groups, int count,
                            tensor g, tensor m, const struct step_state *state) {
    count_pass(dev, ESTIMATE_OPTIMIZER,
               (double)tensor_count(g) * 2 * (double)(dtype_bytes(g.dtype) + dtype_bytes(m.dtype)));
}

/* Of five iterations each has three products. They are not part of the model's FLOPs. */
void estimate_orthogonalize(struct device *dev, const struct orthogonalize_spec *s, tensor x,
                            const struct step_state *state) {
    double r = (double)(s->rows < s->cols ? s->rows : s->cols),
           c = (double)(s->rows < s->cols ? s->cols : s->rows);
    double E = element_bytes(dev);
    count_pass(dev, ESTIMATE_OPTIMIZER, r * c * 8);
    for (int i = 0; i < 5; i++) {
        count_kernel(dev, ESTIMATE_OPTIMIZER, 0, 2 * r * r * c, dev->options.gpu->matmul, (r * c + r * r) * E,
                     dev->options.gpu->copy);
        count_kernel(dev, ESTIMATE_OPTIMIZER, 0, 2 * r * r * r, dev->options.gpu->matmul, 2 * r * r * E,
                     dev->options.gpu->copy);
        count_kernel(dev, ESTIMATE_OPTIMIZER, 0, 2 * r * r * c, dev->options.gpu->matmul,
                     (r * r + 3 * r * c) * E, dev->options.gpu->copy);
    }
    count_pass(dev, ESTIMATE_OPTIMIZER, r * c * (E + 4));
}

void estimate_muon_update(struct device *dev, const struct param_group *groups, int count, tensor master,
                          tensor p, tensor o, const struct step_state *state) {
    double each =
        (double)(dtype_bytes(o.dtype) + 2 * dtype_bytes(master.dtype) + (p.data ? dtype_bytes(p.dtype) : 0));
    count_pass(dev, ESTIMATE_OPTIMIZER, (double)tensor_count(o) * each);
}

void estimate_step_begin(struct device *dev, struct step_state *state, int64_t step, double lr) {
    count_pass(dev, ESTIMATE_OPTIMIZER, 0);
}

void estimate_step_decide(struct device *dev, struct step_state *state, double tokens, double grad_clip,
                          double skip_zscore) {
    count_pass(dev, ESTIMATE_OPTIMIZER, 0);
}

/* ---- the rest of the table ---- */

/* Not counted: it is computed once, before the first step. */
void estimate_rope_table(struct device *dev, const struct rope_spec *s, tensor table) {}

void estimate_zero(struct device *dev, void *data, size_t bytes) {
    count_pass(dev, ESTIMATE_ELEMENTWISE, (double)bytes);
}

/* Saved bytes are those of the CUDA backend. Of workspaces the two largest are counted: the logits, and that
 * of cuDNN's attention backward: a sum of o do for each query, and either dq in fp32 or, for deterministic
 * results, an array that grows with the square of the length; with fewer heads of keys and values, their gradients
 * for each query head in bf16. */
int estimate_plan(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e) {
    *cost = (struct op_cost){0, MATMUL_WORKSPACE};
    if (spec->kind == OP_SIMPLICIAL)
        return fail_user(
            e, "model.layer_pattern: simplicial layers are for short sequences, and are not estimated; "
               "leave out --gpus, or use other layers");
    if (spec->kind == OP_TALKING) {
        const struct attention_spec *a = &spec->attention;
        if (a->heads > TALKING_MAX_HEADS)
            return fail_user(e, TALKING_TOO_MANY_HEADS, (long long)a->heads, TALKING_MAX_HEADS);
        cost->saved = (size_t)(a->batch * a->heads * a->length) * sizeof(float);
        cost->workspace += cost->saved;
    }
    if (spec->kind == OP_NORM)
        cost->saved = (size_t)spec->norm.rows * 2 * sizeof(float);
    if (spec->kind == OP_ATTENTION) {
        const struct attention_spec *a = &spec->attention;
        cost->saved = (size_t)(a->batch * a->heads * a->length) * sizeof(float);
        bool square = dev->options.deterministic && uses_cudnn(dev, a);
        cost->workspace = cost->saved + 4096 /* alignment */;
        cost->workspace += square ? cudnn_deterministic_bytes(a)
                                  : (size_t)attention_values(a) * 4 * (size_t)dev->options.gpu->cudnn_scratch;
        if (uses_cudnn(dev, a) && a->kv_heads && a->kv_heads < a->heads)
            cost->workspace += 2 * (size_t)attention_values(a) * 2;
    }
    if (spec->kind == OP_ORTHOGONALIZE) {
        double n = (double)(spec->orthogonalize.rows * spec->orthogonalize.cols);
        double side =
            (double)(spec->orthogonalize.rows < spec->orthogonalize.cols ? spec->orthogonalize.rows
                                                                         : spec->orthogonalize.cols);
        cost->workspace += (size_t)(2 * (n + side * side) * element_bytes(dev)) + 4 * 256;
    }
    if (spec->kind == OP_CLASSIFIER)
        cost->workspace += (size_t)((double)chunk_rows(dev, &spec->classifier) *
                                    (double)classifier_padded(&spec->classifier) * element_bytes(dev)) +
                           (size_t)spec->classifier.rows * sizeof(double);
    return 0;
}
