/* The forward pass, and the parts of it that backward repeats.
 *
 * A block is  x += attn(norm(x)); x += mlp(norm(x)).  Each half leaves what it adds to the residual stream in
 * m->delta; the norm in front of the next half adds it, because residual_norm is one operation:
 *
 *   x_attn = x + delta       y_attn = norm(x_attn)     attention_norm
 *   delta  = attn(y_attn)                              attention_half
 *   x_mlp  = x_attn + delta  y_mlp  = norm(x_mlp)      mlp_norm
 *   delta  = mlp(y_mlp)                                mlp_half */
#include "model/model.h"

static const struct layer_params *params_of(const struct model *m, int layer) {
    return &m->params.layers[layer];
}

/* y [N,out] = x [N,in] W^T (+ bias) */
static void linear_of(struct model *m, tensor x, int64_t in, tensor weight, tensor bias, int64_t out,
                      tensor y) {
    int64_t N = m->shape.batch * m->shape.tokens;
    struct linear_spec spec = {N, in, out};
    x = tensor_of(x.data, x.dtype, N, in, 0, 0, 0);
    y = tensor_of(y.data, y.dtype, N, out, 0, 0, 0);
    m->k->linear(m->dev, &spec, x, weight, bias, y);
}

static void linear(struct model *m, tensor x, int64_t in, int weight, int bias, int64_t out, tensor y) {
    linear_of(m, x, in, model_param(m, weight), model_param(m, bias), out, y);
}

/* The same, and act [N,out] = f(y) */
static void linear_act(struct model *m, tensor x, int64_t in, int weight, int bias, int64_t out, tensor y,
                       tensor act) {
    struct linear_spec spec = {m->shape.batch * m->shape.tokens, in, out};
    m->k->linear_act(m->dev, &spec, m->act_spec.type, x, model_param(m, weight), model_param(m, bias), y,
                     act);
}

/* x [N,C] = embed[tokens] (+ pos_embed, where positions are learned). Sequences start at position 0. */
static void embed(struct model *m, tensor x) {
    struct embed_spec spec = {m->shape.batch, m->shape.tokens, m->config.vocab_size, m->config.hidden_size};
    m->k->embed(m->dev, &spec, m->tokens, model_param(m, m->params.embed),
                model_param(m, m->params.pos_embed), m->positions, 0, x);
}

/* ---- attention ---- */

static void attention_norm(struct model *m, int layer, tensor x, tensor delta) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    m->k->residual_norm(m->dev, &m->norm_spec, x, delta, model_param(m, p->attn_norm),
                        model_param(m, p->attn_norm_bias), b->x_attn, b->y_attn, b->attn_norm_saved);
}

void model_fold(const struct model *m, int layer, tensor weight, tensor bias) {
    const struct layer_params *p = params_of(m, layer);
    tensor q = model_alpha(m, layer, p->alpha_q), k = model_alpha(m, layer, p->alpha_k),
           v = model_alpha(m, layer, p->alpha_v);
    const int from[] = {p->qkv, p->qkv_bias};
    const tensor to[] = {qkv_by_heads(m, weight), qkv_by_heads(m, bias)};
    for (int i = 0; i < 2 && to[i].data; i++) {
        struct fold_spec spec = {m->config.num_attention_heads, to[i].shape[2]};
        m->k->fold(m->dev, &spec, qkv_by_heads(m, model_param(m, from[i])), q, k, v, to[i]);
    }
}

static void fold(struct model *m, int layer) {
    if (m->specs[layer].folded)
        model_fold(m, layer, m->layers[layer].folded_weight, m->layers[layer].folded_bias);
}

/* [B,T,H+2G,d] from y_attn (paper: step 1), before qk_norm. */
static void project_qkv(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    int64_t C = m->config.hidden_size, rows = m->specs[layer].qkv_heads * m->config.head_dim;
    fold(m, layer);
    if (m->specs[layer].folded)
        linear_of(m, b->y_attn, C, b->folded_weight, b->folded_bias, rows, b->qkv_raw);
    else
        linear(m, b->y_attn, C, p->qkv, p->qkv_bias, rows, b->qkv_raw);
}

static void norm_heads(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    if (m->specs[layer].normed)
        m->k->qk_norm(m->dev, &m->specs[layer].qk_norm, qkv_rows(b->qkv_raw), model_param(m, p->q_norm),
                      model_param(m, p->k_norm), qkv_rows(b->qkv));
}

/* q~, k~, v~ from qkv (paper: steps 2-4), or q and k rotated where they are. */
static void mix_heads(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    if (m->specs[layer].mixes || m->specs[layer].rotates)
        m->k->qkv_mix(m->dev, &m->specs[layer].qkv_mix, b->qkv, model_alpha(m, layer, p->alpha_q),
                      model_alpha(m, layer, p->alpha_k), model_alpha(m, layer, p->alpha_v), m->rope,
                      m->positions, 0, b->q, b->k, b->v);
}

static void attend(struct model *m, int layer) {
    struct layer_buffers *b = &m->layers[layer];
    if (m->specs[layer].diff)
        differential_attention(m, layer);
    else if (m->specs[layer].talking)
        m->k->talking(m->dev, &m->specs[layer].attention, b->q, b->k, b->v, m->segments,
                      model_param(m, params_of(m, layer)->talk_logits),
                      model_param(m, params_of(m, layer)->talk_weights), b->o_pseudo, b->attention_saved);
    else if (m->specs[layer].simplicial)
        m->k->simplicial(m->dev, &m->specs[layer].attention, b->q, b->k, b->v,
                         qkv_part(&m->config, b->qkv, 3), qkv_part(&m->config, b->qkv, 4), m->segments,
                         b->o_pseudo, b->attention_saved);
    else
        m->k->attention(m->dev, &m->specs[layer].attention, b->q, b->k, b->v, m->segments, b->o_pseudo,
                        b->attention_saved);
}

/* o from the pseudo-heads' outputs (paper: step 6), or from those of the pairs of a differential layer. */
static void collapse(struct model *m, int layer) {
    struct layer_buffers *b = &m->layers[layer];
    if (m->specs[layer].diff)
        differential_combine(m, layer);
    else if (m->specs[layer].iha)
        m->k->collapse(m->dev, &m->specs[layer].collapse, b->o_pseudo,
                       model_param(m, params_of(m, layer)->collapse), b->o);
}

/* delta = attn(y_attn) */
static void attention_half(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    int64_t C = m->config.hidden_size, width = m->config.num_attention_heads * m->config.head_dim;
    project_qkv(m, layer);
    norm_heads(m, layer);
    mix_heads(m, layer);
    attend(m, layer);
    collapse(m, layer);
    linear(m, b->o, width, p->out, p->out_bias, C, m->delta);
}

/* ---- MLP ---- */

static void mlp_norm(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    m->k->residual_norm(m->dev, &m->norm_spec, b->x_attn, m->delta, model_param(m, p->mlp_norm),
                        model_param(m, p->mlp_norm_bias), b->x_mlp, b->y_mlp, b->mlp_norm_saved);
}

static void mlp_act(struct model *m, int layer) {
    struct layer_buffers *b = &m->layers[layer];
    m->k->mlp_act(m->dev, &m->act_spec, b->up, b->gate, b->act);
}

/* act [N,F] from y_mlp [N,C]: all of the MLP but its last product, whose output backward does not read. */
static void mlp_hidden(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    int64_t C = m->config.hidden_size, F = m->config.intermediate_size;
    /* With `light`, backward computes act from up again, and must find the same bits. */
    if (!b->gate.data && m->shape.recompute != RECOMPUTE_LIGHT) {
        linear_act(m, b->y_mlp, C, p->up, p->up_bias, F, b->up, b->act);
        return;
    }
    if (m->specs[layer].one_product) {
        linear_of(m, b->y_mlp, C, model_up_and_gate(m, layer), tensor_none(), 2 * F, b->up);
    } else {
        linear(m, b->y_mlp, C, p->up, p->up_bias, F, b->up);
        if (b->gate.data)
            linear(m, b->y_mlp, C, p->gate, -1, F, b->gate);
    }
    mlp_act(m, layer);
}

/* delta = mlp(y_mlp) */
static void mlp_half(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    int64_t C = m->config.hidden_size, F = m->config.intermediate_size;
    mlp_hidden(m, layer);
    linear(m, m->layers[layer].act, F, p->down, p->down_bias, C, m->delta);
}

/* ---- passes ---- */

/* Ends and positions from the first token of each segment, [B,T] each. */
static void upload_segments(struct model *m, const int32_t *first) {
    int64_t T = m->shape.tokens, N = m->shape.batch * T;
    int32_t *begins = m->host_segments, *ends = begins + N, *positions = ends + N;
    for (int64_t n = N - 1; n >= 0; n--) {
        int32_t t = (int32_t)(n % T);
        bool last = t == T - 1 || first[n + 1] != first[n];
        begins[n] = first[n];
        ends[n] = last ? t + 1 : ends[n + 1];
        positions[n] = t - first[n];
    }
    m->k->upload(m->dev, m->segments, begins, DTYPE_I32);
    if (m->positions.data)
        m->k->upload(m->dev, m->positions, positions, DTYPE_I32);
}

void model_upload(struct model *m, struct batch batch) {
    m->k->upload(m->dev, m->tokens, batch.tokens, DTYPE_I32);
    m->k->upload(m->dev, m->targets, batch.targets, DTYPE_I32);
    if (m->segments.data)
        upload_segments(m, batch.segments);
}

/* The embedding and the layers before `end`. The residual stream that they leave is *x + *delta. */
static void forward_layers(struct model *m, int end, tensor *x, tensor *delta) {
    *x = m->layers[0].x_attn;
    *delta = tensor_none();
    model_await_unit(m, 0);
    embed(m, *x);
    for (int layer = 0; layer < end; layer++) {
        model_await_unit(m, layer + 1);
        m->k->range_begin(m->dev, "layer", layer);
        attention_norm(m, layer, *x, *delta);
        attention_half(m, layer);
        mlp_norm(m, layer);
        mlp_half(m, layer);
        *x = m->layers[layer].x_mlp;
        *delta = m->delta;
        m->k->range_end(m->dev);
    }
}

void model_forward(struct model *m) {
    tensor x, delta;
    forward_layers(m, (int)m->config.num_hidden_layers, &x, &delta);
    model_await_unit(m, m->params.unit_count - 1);
    m->gather_pending = false;
    m->k->residual_norm(m->dev, &m->norm_spec, x, delta, model_param(m, m->params.final_norm),
                        model_param(m, m->params.final_norm_bias), m->x_final, m->h, m->final_norm_saved);
}

void model_forward_attention(struct model *m, struct batch batch, int layer) {
    tensor x, delta;
    model_await_params(m);
    model_upload(m, batch);
    forward_layers(m, layer, &x, &delta);
    attention_norm(m, layer, x, delta);
    attention_half(m, layer);
}

void model_evaluate(struct model *m, struct batch batch, double scale, int32_t *correct) {
    model_upload(m, batch);
    model_forward(m);
    struct classifier_spec spec = model_classifier_spec(m, m->norm_spec.rows);
    m->k->classifier(m->dev, &spec, m->h, model_classifier(m), m->targets, scale, m->state,
                     correct ? m->correct : tensor_none(), tensor_none(), tensor_none(), false);
    if (correct)
        m->k->download(m->dev, m->correct, correct, DTYPE_I32);
}

/* Sequence b's rows of h begin where products may read them: backends expect what an allocation is aligned to. */
static bool rows_are_aligned(const struct model *m) {
    size_t bytes = (size_t)(m->shape.tokens * m->config.hidden_size) * dtype_bytes(m->dtypes.compute);
    return bytes % 256 == 0;
}

static tensor rows_of(tensor t, int64_t first, int64_t count, int64_t columns) {
    return tensor_of((char *)t.data + (size_t)(first * columns) * dtype_bytes(t.dtype), t.dtype, count,
                     columns > 1 ? columns : 0, 0, 0, 0);
}

/* The targets of sequence b of a batch. */
static void upload_targets(struct model *m, int64_t b, const int32_t *targets) {
    m->k->upload(m->dev, rows_of(m->targets, b * m->shape.tokens, m->shape.tokens, 1), targets, DTYPE_I32);
}

void model_score(struct model *m, struct batch batch, const int32_t *ignored, int64_t rows, double *nats) {
    int64_t T = m->shape.tokens, C = m->config.hidden_size;
    bool alone = rows_are_aligned(m); /* or else all rows, of which only those of one sequence count */
    struct step_state state;
    model_upload(m, batch);
    model_forward(m);
    for (int64_t b = 0; b < m->shape.batch && !alone; b++)
        upload_targets(m, b, ignored);
    for (int64_t b = 0; b < rows; b++) {
        struct classifier_spec spec = model_classifier_spec(m, alone ? T : m->norm_spec.rows);
        if (!alone)
            upload_targets(m, b, batch.targets + b * T);
        m->k->step_begin(m->dev, m->state, 0, 0);
        m->k->classifier(m->dev, &spec, alone ? rows_of(m->h, b * T, T, C) : m->h, model_classifier(m),
                         alone ? rows_of(m->targets, b * T, T, 1) : m->targets, 1, m->state, tensor_none(),
                         tensor_none(), tensor_none(), false);
        m->k->step_read(m->dev, m->state, &state);
        if (!alone)
            upload_targets(m, b, ignored);
        nats[b] = state.loss;
    }
}

/* ---- recompute ---- */

static void recompute_attention_norm(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    m->k->residual_norm_recompute(m->dev, &m->norm_spec, b->x_attn, model_param(m, p->attn_norm),
                                  model_param(m, p->attn_norm_bias), b->y_attn, b->attn_norm_saved);
}

static void recompute_mlp_norm(struct model *m, int layer) {
    const struct layer_params *p = params_of(m, layer);
    struct layer_buffers *b = &m->layers[layer];
    m->k->residual_norm_recompute(m->dev, &m->norm_spec, b->x_mlp, model_param(m, p->mlp_norm),
                                  model_param(m, p->mlp_norm_bias), b->y_mlp, b->mlp_norm_saved);
}

/* full: everything from x_attn to act. light: what needs no matrix product and no attention. */
void layer_recompute(struct model *m, int layer) {
    switch (m->shape.recompute) {
    case RECOMPUTE_NONE:
        return;
    case RECOMPUTE_LIGHT:
        recompute_attention_norm(m, layer);
        fold(m, layer);
        norm_heads(m, layer);
        if (m->specs[layer].mixes || m->specs[layer].normed) /* or else qkv is kept as it was rotated */
            mix_heads(m, layer);
        collapse(m, layer);
        recompute_mlp_norm(m, layer);
        mlp_act(m, layer);
        return;
    case RECOMPUTE_FULL:
        recompute_attention_norm(m, layer);
        attention_half(m, layer);
        mlp_norm(m, layer);
        mlp_hidden(m, layer);
        return;
    }
}
