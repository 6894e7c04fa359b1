/* The backward pass: the loss's gradient, then the layers from last to first. */
#include "model/model.h"

/* dx of one linear layer (or dx += with add), and its weight and bias gradients. dy_sums: column sums of dy, or
 * absent. */
static void linear_of_backward(struct model *m, tensor dy, tensor dy_sums, tensor x, int64_t in,
                               tensor weight, int64_t out, tensor dx, bool add, tensor dweight, tensor dbias,
                               bool accumulate) {
    int64_t N = m->shape.batch * m->shape.tokens;
    struct linear_spec spec = {N, in, out};
    dy = tensor_of(dy.data, dy.dtype, N, out, 0, 0, 0);
    x = tensor_of(x.data, x.dtype, N, in, 0, 0, 0);
    dx = tensor_of(dx.data, dx.dtype, N, in, 0, 0, 0);
    m->k->linear_backward(m->dev, &spec, dy, dy_sums, x, weight, dx, add, dweight, dbias, accumulate);
}

static void linear_backward(struct model *m, tensor dy, tensor dy_sums, tensor x, int64_t in, int weight,
                            int bias, int64_t out, tensor dx, bool add, bool accumulate) {
    linear_of_backward(m, dy, dy_sums, x, in, model_param(m, weight), out, dx, add, model_gradient(m, weight),
                       model_gradient(m, bias), accumulate);
}

/* As linear_backward, of the layer that has an activation in front of it, act = f(u): du instead of dx. */
static void act_linear_backward(struct model *m, tensor dy, tensor dy_sums, tensor act, int64_t in,
                                int weight, int bias, int64_t out, tensor u, tensor du, bool accumulate) {
    struct linear_spec spec = {m->shape.batch * m->shape.tokens, in, out};
    m->k->act_linear_backward(m->dev, &spec, m->act_spec.type, dy, dy_sums, act, model_param(m, weight), u,
                              du, model_gradient(m, weight), model_gradient(m, bias), accumulate);
}

/* grad.dx from grad.dy, added to the gradient of the residual path where there is one already (add); its column
 * sums are the gradient of the bias of out or down, whose output the norm was given. */
static void norm_backward(struct model *m, tensor sum, int weight, int bias, const void *saved, bool add,
                          bool accumulate) {
    m->k->residual_norm_backward(m->dev, &m->norm_spec, m->grad.dy, sum, model_param(m, weight), saved,
                                 m->grad.dx, add, model_gradient(m, weight), model_gradient(m, bias),
                                 m->grad.dx_sums, accumulate);
}

/* On entry grad.dx is the gradient of the layer's output; on return, of x_mlp. */
static void mlp_backward(struct model *m, int layer, bool accumulate) {
    const struct layer_params *p = &m->params.layers[layer];
    struct layer_buffers *b = &m->layers[layer];
    struct gradient_buffers *g = &m->grad;
    int64_t C = m->config.hidden_size, F = m->config.intermediate_size;
    tensor dup = b->gate.data ? b->up : g->dact; /* nobody reads up and gate after this */
    if (b->gate.data) {
        linear_backward(m, g->dx, g->dx_sums, b->act, F, p->down, p->down_bias, C, g->dact, false,
                        accumulate);
        m->k->mlp_act_backward(m->dev, &m->act_spec, g->dact, b->up, b->gate, dup, b->gate);
    } else {
        act_linear_backward(m, g->dx, g->dx_sums, b->act, F, p->down, p->down_bias, C, b->up, dup,
                            accumulate);
    }
    if (m->specs[layer].one_product) {
        linear_of_backward(m, dup, tensor_none(), b->y_mlp, C, model_up_and_gate(m, layer), 2 * F, g->dy,
                           false, model_up_and_gate_gradient(m, layer), tensor_none(), accumulate);
    } else {
        linear_backward(m, dup, tensor_none(), b->y_mlp, C, p->up, p->up_bias, F, g->dy, false, accumulate);
        if (b->gate.data)
            linear_backward(m, b->gate, tensor_none(), b->y_mlp, C, p->gate, -1, F, g->dy, true, accumulate);
    }
    norm_backward(m, b->x_mlp, p->mlp_norm, p->mlp_norm_bias, b->mlp_norm_saved, true, accumulate);
}

/* A tensor of the shape [B,S,H,d] of `like`, at `data`. */
static tensor with_data(tensor like, void *data) {
    return tensor_of(data, like.dtype, like.shape[0], like.shape[1], like.shape[2], like.shape[3], 0);
}

/* The gradients of a folded layer's raw weight, bias and alphas, from those of what they were folded into. */
static void fold_backward(struct model *m, int layer, bool accumulate) {
    const struct layer_params *p = &m->params.layers[layer];
    const struct gradient_buffers *g = &m->grad;
    const int weights[] = {p->qkv, p->qkv_bias};
    const tensor folded[] = {qkv_by_heads(m, g->dfolded_weight), qkv_by_heads(m, g->dfolded_bias)};
    for (int i = 0; i < 2 && folded[i].data; i++) {
        struct fold_spec spec = {m->config.num_attention_heads, folded[i].shape[2]};
        m->k->fold_backward(m->dev, &spec, folded[i], qkv_by_heads(m, model_param(m, weights[i])),
                            model_alpha(m, layer, p->alpha_q), model_alpha(m, layer, p->alpha_k),
                            model_alpha(m, layer, p->alpha_v), qkv_by_heads(m, model_gradient(m, weights[i])),
                            model_alpha_gradient(m, layer, p->alpha_q),
                            model_alpha_gradient(m, layer, p->alpha_k),
                            model_alpha_gradient(m, layer, p->alpha_v), accumulate, accumulate || i > 0);
    }
}

/* The gradient of the layer's qkv. */
static tensor dqkv_of(const struct model *m, int layer) {
    tensor like = m->layers[layer].qkv;
    like.data = m->grad.dqkv.data;
    return like;
}

/* dy, and the gradients of qkv's weight and bias, from dqkv. */
static void qkv_backward(struct model *m, int layer, bool accumulate) {
    const struct layer_params *p = &m->params.layers[layer];
    struct layer_buffers *b = &m->layers[layer];
    struct gradient_buffers *g = &m->grad;
    int64_t C = m->config.hidden_size, rows = m->specs[layer].qkv_heads * m->config.head_dim;
    tensor dqkv = qkv_rows(dqkv_of(m, layer));
    if (m->specs[layer].normed)
        m->k->qk_norm_backward(m->dev, &m->specs[layer].qk_norm, dqkv, qkv_rows(b->qkv_raw),
                               model_param(m, p->q_norm), model_param(m, p->k_norm), dqkv,
                               model_gradient(m, p->q_norm), model_gradient(m, p->k_norm), accumulate);
    if (!m->specs[layer].folded) {
        linear_backward(m, g->dqkv, tensor_none(), b->y_attn, C, p->qkv, p->qkv_bias, rows, g->dy, false,
                        accumulate);
        return;
    }
    linear_of_backward(m, g->dqkv, tensor_none(), b->y_attn, C, b->folded_weight, rows, g->dy, false,
                       g->dfolded_weight, g->dfolded_bias, false);
    fold_backward(m, layer, accumulate);
}

/* dq, dk, dv from grad.d_o. */
static void attend_backward(struct model *m, int layer, tensor dq, tensor dk, tensor dv, bool accumulate) {
    const struct layer_specs *s = &m->specs[layer];
    struct layer_buffers *b = &m->layers[layer];
    struct gradient_buffers *g = &m->grad;
    if (s->diff) {
        differential_backward(m, layer, dq, dk, dv, accumulate);
        return;
    }
    const struct layer_params *p = &m->params.layers[layer];
    if (s->talking) {
        m->k->talking_backward(m->dev, &s->attention, b->q, b->k, b->v, m->segments,
                               model_param(m, p->talk_logits), model_param(m, p->talk_weights), g->d_o,
                               b->attention_saved, dq, dk, dv, model_gradient(m, p->talk_logits),
                               model_gradient(m, p->talk_weights), accumulate);
        return;
    }
    if (s->simplicial) {
        m->k->simplicial_backward(m->dev, &s->attention, b->q, b->k, b->v, qkv_part(&m->config, b->qkv, 3),
                                  qkv_part(&m->config, b->qkv, 4), m->segments, b->o_pseudo, g->d_o,
                                  b->attention_saved, dq, dk, dv, qkv_part(&m->config, dqkv_of(m, layer), 3),
                                  qkv_part(&m->config, dqkv_of(m, layer), 4));
        return;
    }
    tensor d_o = g->d_o;
    if (s->iha) {
        d_o = with_data(b->o_pseudo, g->d_o_pseudo);
        m->k->collapse_backward(m->dev, &s->collapse, g->d_o, b->o_pseudo, model_param(m, p->collapse), d_o,
                                model_gradient(m, p->collapse), accumulate);
    }
    m->k->attention_backward(m->dev, &s->attention, b->q, b->k, b->v, m->segments, b->o_pseudo, d_o,
                             b->attention_saved, dq, dk, dv);
}

/* On entry grad.dx is the gradient of x_mlp; on return, of x_attn. Where nothing is mixed, dq, dk and dv are
 * slices of dqkv. */
static void attention_backward(struct model *m, int layer, bool accumulate) {
    const struct model_config *c = &m->config;
    const struct kernels *k = m->k;
    const struct layer_params *p = &m->params.layers[layer];
    const struct layer_specs *s = &m->specs[layer];
    struct layer_buffers *b = &m->layers[layer];
    struct gradient_buffers *g = &m->grad;
    int64_t C = c->hidden_size, width = c->num_attention_heads * c->head_dim;
    linear_backward(m, g->dx, g->dx_sums, b->o, width, p->out, p->out_bias, C, g->d_o, false, accumulate);
    tensor dq = s->mixes ? with_data(b->q, g->dq) : qkv_part(c, dqkv_of(m, layer), 0);
    tensor dk = s->mixes ? with_data(b->k, g->dk) : qkv_part(c, dqkv_of(m, layer), 1);
    tensor dv = s->mixes ? with_data(b->v, g->dv) : qkv_part(c, dqkv_of(m, layer), 2);
    attend_backward(m, layer, dq, dk, dv, accumulate);
    if (s->mixes || s->rotates)
        k->qkv_mix_backward(m->dev, &s->qkv_mix, dq, dk, dv, b->qkv, model_alpha(m, layer, p->alpha_q),
                            model_alpha(m, layer, p->alpha_k), model_alpha(m, layer, p->alpha_v), m->rope,
                            m->positions, dqkv_of(m, layer), model_alpha_gradient(m, layer, p->alpha_q),
                            model_alpha_gradient(m, layer, p->alpha_k),
                            model_alpha_gradient(m, layer, p->alpha_v), accumulate);
    qkv_backward(m, layer, accumulate);
    norm_backward(m, b->x_attn, p->attn_norm, p->attn_norm_bias, b->attn_norm_saved, true, accumulate);
}

/* state.loss, and in grad.dx the gradient of x_final. */
static void head_backward(struct model *m, double scale, bool accumulate) {
    const struct kernels *k = m->k;
    struct classifier_spec spec = model_classifier_spec(m, m->norm_spec.rows);
    k->classifier(m->dev, &spec, m->h, model_classifier(m), m->targets, scale, m->state, tensor_none(),
                  m->grad.dy, model_classifier_gradient(m), accumulate);
    norm_backward(m, m->x_final, m->params.final_norm, m->params.final_norm_bias, m->final_norm_saved, false,
                  accumulate);
}

static void clear_gradient(struct model *m, int index) {
    tensor g = model_gradient(m, index);
    if (g.data)
        m->k->zero(m->dev, g.data, (size_t)tensor_count(g) * dtype_bytes(g.dtype));
}

/* embed_backward adds to the tables' gradients. The first pass has to clear them, except that of a tied
 * table, which the classifier's backward has just written. */
static void embed_backward(struct model *m, bool accumulate) {
    struct embed_spec spec = {m->shape.batch, m->shape.tokens, m->config.vocab_size, m->config.hidden_size};
    if (!accumulate) {
        clear_gradient(m, m->params.pos_embed);
        if (m->params.lm_head != m->params.embed)
            clear_gradient(m, m->params.embed);
    }
    m->k->embed_backward(m->dev, &spec, m->tokens, m->positions, m->grad.dx,
                         model_gradient(m, m->params.embed), model_gradient(m, m->params.pos_embed));
}

void model_backward(struct model *m, double scale, bool accumulate, gradients_ready *ready, void *context) {
    int layers = (int)m->config.num_hidden_layers;
    head_backward(m, scale, accumulate);
    if (ready)
        ready(context, layers + 1);
    for (int layer = layers - 1; layer >= 0; layer--) {
        m->k->range_begin(m->dev, "layer", layer);
        layer_recompute(m, layer);
        mlp_backward(m, layer, accumulate);
        attention_backward(m, layer, accumulate);
        m->k->range_end(m->dev);
        if (ready)
            ready(context, layer + 1);
    }
    embed_backward(m, accumulate);
    if (ready)
        ready(context, 0);
}

void model_forward_backward(struct model *m, struct batch batch, double scale, bool accumulate,
                            gradients_ready *ready, void *context) {
    model_upload(m, batch);
    model_forward(m);
    model_backward(m, scale, accumulate, ready, context);
}
