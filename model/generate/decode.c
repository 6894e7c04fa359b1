#include "model/generate/decode.h"

#include <stdlib.h>
#include <string.h>

#include "model/buffers.h"

/* Attentions of a token whose outputs are kept apart, at most. */
static int64_t max_outputs(const struct model *m) {
    for (int layer = 0; layer < m->config.num_hidden_layers; layer++)
        if (m->specs[layer].diff)
            return 2;
    return 1;
}

static int64_t max_qkv_heads(const struct model *m) {
    int64_t heads = 0;
    for (int layer = 0; layer < m->config.num_hidden_layers; layer++)
        heads = m->specs[layer].qkv_heads > heads ? m->specs[layer].qkv_heads : heads;
    return heads;
}

/* The largest P of any layer. */
static int64_t max_pseudo(const struct model *m) {
    int64_t P = 1;
    for (int layer = 0; layer < m->config.num_hidden_layers; layer++)
        P = m->specs[layer].qkv_mix.pseudo > P ? m->specs[layer].qkv_mix.pseudo : P;
    return P;
}

/* Keys in a layer's ring cache: all, or the window before the first query of a chunk, and the chunk. */
static int64_t ring_length(const struct decoder *d, int layer) {
    const struct layer_specs *s = &d->m->specs[layer];
    int64_t P = s->qkv_mix.pseudo, all = d->capacity * P, ring = s->attention.window + d->chunk * P;
    return s->attention.window > 0 && ring < all ? ring : all;
}

static tensor assign(struct decoder *d, tensor shape) {
    shape.data = d->memory ? (char *)d->memory + d->bytes : NULL;
    d->bytes += ((size_t)tensor_count(shape) * dtype_bytes(shape.dtype) + 255) / 256 * 256;
    return shape;
}

/* Assign every buffer its address in d->memory; as long as there is none, only count d->bytes. */
static void assign_buffers(struct decoder *d, size_t norm_saved) {
    const struct model_config *c = &d->m->config;
    enum dtype t = d->m->dtypes.compute;
    int64_t n = d->chunk, C = c->hidden_size, H = c->num_attention_heads, dim = c->head_dim;
    int64_t G = config_kv_heads(c);
    int64_t P = max_pseudo(d->m);
    d->bytes = 0;
    tensor hidden = tensor_of(NULL, t, n, C, 0, 0, 0),
           wide = tensor_of(NULL, t, n, c->intermediate_size, 0, 0, 0);
    tensor pseudo = tensor_of(NULL, t, 1, n * P, H, dim, 0),
           pseudo_kv = tensor_of(NULL, t, 1, n * P, G, dim, 0);
    d->tokens = assign(d, tensor_of(NULL, DTYPE_I32, 1, n, 0, 0, 0));
    d->rope = c->position_embedding == POSITION_ROPE
                  ? assign(d, tensor_of(NULL, d->m->dtypes.master, d->capacity * P, 2, dim / 2, 0, 0))
                  : tensor_none();
    tensor *hiddens[] = {&d->x, &d->y, &d->delta}, *pseudos[] = {&d->q, &d->k, &d->v};
    for (size_t i = 0; i < 3; i++)
        *hiddens[i] = assign(d, hidden);
    for (size_t i = 0; i < 3; i++)
        *pseudos[i] = assign(d, i == 0 ? pseudo : pseudo_kv);
    int64_t outputs = P > max_outputs(d->m) ? P : max_outputs(d->m);
    d->o_pseudo = assign(d, tensor_of(NULL, t, 1, n * outputs, H, dim, 0));
    int64_t widths = c->activation == ACTIVATION_SWIGLU ? 2 : 1;
    d->up = assign(d, tensor_of(NULL, t, n, widths * c->intermediate_size, 0, 0, 0));
    d->act = assign(d, wide);
    d->qkv = assign(d, tensor_of(NULL, t, 1, n, max_qkv_heads(d->m), dim, 0));
    d->o = assign(d, tensor_of(NULL, t, 1, n, H, dim, 0));
    d->logits = assign(d, tensor_of(NULL, t, 1, c->vocab_size, 0, 0, 0));
    d->norm_saved = assign(d, tensor_of(NULL, DTYPE_I32, (int64_t)(norm_saved + 3) / 4, 0, 0, 0, 0)).data;
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        int64_t heads = d->m->specs[layer].simplicial ? 2 * H : G; /* k and k', v and v' */
        d->cache_k[layer] = assign(d, tensor_of(NULL, t, 1, ring_length(d, layer), heads, dim, 0));
        d->cache_v[layer] = assign(d, tensor_of(NULL, t, 1, ring_length(d, layer), heads, dim, 0));
        bool folded = d->m->specs[layer].folded;
        d->folded_weight[layer] =
            folded ? assign(d, tensor_of(NULL, t, 3 * H * dim, C, 0, 0, 0)) : tensor_none();
        d->folded_bias[layer] = folded && config_qkv_bias(c)
                                    ? assign(d, tensor_of(NULL, t, 3 * H * dim, 0, 0, 0, 0))
                                    : tensor_none();
    }
}

static struct norm_spec norm_of(const struct decoder *d, int64_t n) {
    struct norm_spec s = d->m->norm_spec;
    s.rows = n;
    return s;
}

static struct act_spec act_of(const struct decoder *d, int64_t n) {
    struct act_spec s = d->m->act_spec;
    s.rows = n;
    return s;
}

/* Plan one operation; its workspace counts towards the largest. */
static int plan_op(struct decoder *d, struct op_spec spec, size_t *saved, struct error *e) {
    struct op_cost cost;
    if (d->m->k->plan(d->m->dev, &spec, &cost, e) != 0)
        return -1;
    d->workspace_bytes = cost.workspace > d->workspace_bytes ? cost.workspace : d->workspace_bytes;
    if (saved)
        *saved = cost.saved;
    return 0;
}

/* A layer's specs for one pass over n tokens of one sequence. */
static struct layer_specs specs_for(const struct model *m, int layer, int64_t n) {
    struct layer_specs s = m->specs[layer];
    s.qkv_mix.batch = s.attention.batch = s.collapse.batch = 1;
    s.qkv_mix.tokens = s.collapse.tokens = n;
    s.attention.length = n * s.qkv_mix.pseudo;
    s.qk_norm.rows = n;
    s.pair_attention.batch = 1;
    s.pair_attention.length = s.diff_combine.rows = n;
    s.attention.segmented = s.pair_attention.segmented = false; /* what is generated is one segment */
    return s;
}

static int plan_layer(struct decoder *d, int layer, int64_t n, struct error *e) {
    struct layer_specs s = specs_for(d->m, layer, n);
    struct op_spec attend = {.kind = OP_DECODE, .attention = *planned_attention(&s)}, ops[MAX_LAYER_OPS];
    if (s.talking || s.simplicial)
        attend.kind = attention_kind(&s);
    if (s.simplicial)
        attend.attention.length = ring_length(d, layer);
    if (plan_op(d, attend, NULL, e) != 0)
        return -1;
    for (int i = 0, count = layer_ops(&d->m->config, &s, false, ops); i < count; i++)
        if (plan_op(d, ops[i], NULL, e) != 0)
            return -1;
    return 0;
}

/* Plan every operation of a pass over n tokens. *saved: the bytes that a norm saves. */
static int plan(struct decoder *d, int64_t n, size_t *saved, struct error *e) {
    const struct model_config *c = &d->m->config;
    struct op_spec norm = {.kind = OP_NORM, .norm = norm_of(d, n)};
    struct op_spec embed = {.kind = OP_EMBED, .embed = {1, n, c->vocab_size, c->hidden_size}};
    struct op_spec head = {.kind = OP_LINEAR,
                           .no_bias = true,
                           .no_backward = true,
                           .linear = {1, c->hidden_size, c->vocab_size}};
    if (plan_op(d, norm, saved, e) != 0 || plan_op(d, embed, NULL, e) != 0 || plan_op(d, head, NULL, e) != 0)
        return -1;
    for (int layer = 0; layer < c->num_hidden_layers; layer++)
        if (plan_layer(d, layer, n, e) != 0)
            return -1;
    return 0;
}

static int check(const struct model *m, int64_t capacity, struct error *e) {
    if (!m->config.causal)
        return fail_user(e, "this model is not causal (model.causal = false): it cannot generate");
    if (m->config.position_embedding == POSITION_LEARNED && capacity > m->config.max_position_embeddings)
        return fail_user(e,
                         "%lld tokens asked for, but the model has learned positions for %lld; ask for fewer",
                         (long long)capacity, (long long)m->config.max_position_embeddings);
    return 0;
}

/* In the larger of the two blocks of memory, which are not used yet; the check leaves zeros. */
static int check_libraries(struct decoder *d, struct error *e) {
    struct model *m = d->m;
    bool caches = d->bytes > d->workspace_bytes;
    m->k->set_workspace(m->dev, caches ? d->memory : d->workspace, caches ? d->bytes : d->workspace_bytes);
    int status = m->k->check_libraries ? m->k->check_libraries(m->dev, e) : 0;
    m->k->set_workspace(m->dev, m->workspace, m->workspace_bytes);
    return status;
}

int decoder_create(struct decoder *d, struct model *m, int64_t capacity, int64_t chunk, struct error *e) {
    size_t layers = (size_t)m->config.num_hidden_layers, saved, saved_one;
    *d = (struct decoder){.m = m, .capacity = capacity, .chunk = chunk < capacity ? chunk : capacity};
    if (check(m, capacity, e) != 0)
        return -1;
    d->cache_k = calloc(layers, sizeof *d->cache_k);
    d->cache_v = calloc(layers, sizeof *d->cache_v);
    d->folded_weight = calloc(layers, sizeof *d->folded_weight);
    d->folded_bias = calloc(layers, sizeof *d->folded_bias);
    if (!d->cache_k || !d->cache_v || !d->folded_weight || !d->folded_bias) {
        fail_run(e, "out of memory for the caches of %zu layers", layers);
        goto failed;
    }
    if (plan(d, 1, &saved_one, e) != 0 || plan(d, d->chunk, &saved, e) != 0)
        goto failed;
    assign_buffers(d, saved);
    if (!(d->memory = m->k->alloc(m->dev, d->bytes, e)))
        goto failed;
    assign_buffers(d, saved);
    if (!(d->workspace = m->k->alloc(m->dev, d->workspace_bytes, e)))
        goto failed;
    if (check_libraries(d, e) != 0)
        goto failed;
    struct rope_spec rope = model_rope(&m->config);
    if (d->rope.data)
        m->k->rope_table(m->dev, &rope, d->rope);
    return 0;
failed:
    decoder_free(d);
    return -1;
}

void decoder_free(struct decoder *d) {
    if (d->memory)
        d->m->k->release(d->m->dev, d->memory);
    if (d->workspace)
        d->m->k->release(d->m->dev, d->workspace);
    free(d->cache_k);
    free(d->cache_v);
    free(d->folded_weight);
    free(d->folded_bias);
    *d = (struct decoder){0};
}

void decoder_reset(struct decoder *d) {
    d->position = 0;
}

static tensor with_shape(tensor t, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    return tensor_of(t.data, t.dtype, s0, s1, s2, s3, s4);
}

static void linear_of(struct decoder *d, int64_t n, tensor x, int64_t in, tensor weight, tensor bias,
                      int64_t out, tensor y) {
    struct model *m = d->m;
    struct linear_spec spec = {n, in, out};
    m->k->linear(m->dev, &spec, with_shape(x, n, in, 0, 0, 0), weight, bias, with_shape(y, n, out, 0, 0, 0));
}

static void linear(struct decoder *d, int64_t n, tensor x, int64_t in, int weight, int bias, int64_t out,
                   tensor y) {
    linear_of(d, n, x, in, model_param(d->m, weight), model_param(d->m, bias), out, y);
}

static void project_qkv(struct decoder *d, int layer, int64_t n) {
    const struct model_config *c = &d->m->config;
    const struct layer_params *p = &d->m->params.layers[layer];
    int64_t C = c->hidden_size, rows = d->m->specs[layer].qkv_heads * c->head_dim;
    if (d->m->specs[layer].folded)
        linear_of(d, n, d->y, C, d->folded_weight[layer], d->folded_bias[layer], rows, d->qkv);
    else
        linear(d, n, d->y, C, p->qkv, p->qkv_bias, rows, d->qkv);
}

/* x += delta; y = norm(x).  delta may be absent. */
static void norm(struct decoder *d, int64_t n, tensor delta, int weight, int bias) {
    struct model *m = d->m;
    struct norm_spec spec = norm_of(d, n);
    int64_t C = m->config.hidden_size;
    tensor x = with_shape(d->x, n, C, 0, 0, 0), y = with_shape(d->y, n, C, 0, 0, 0);
    if (delta.data)
        delta = with_shape(delta, n, C, 0, 0, 0);
    m->k->residual_norm(m->dev, &spec, x, delta, model_param(m, weight), model_param(m, bias), x, y,
                        d->norm_saved);
}

/* Of the heads of a cache the first or the second half. */
static tensor half_of_heads(tensor t, int half) {
    t.shape[2] /= 2;
    t.data = (char *)t.data + (size_t)(half * t.shape[2] * t.stride[2]) * dtype_bytes(t.dtype);
    return t;
}

/* As differential_attention() and differential_combine(), with the caches. Calls that share keys or values append the
 * same to the caches. */
static void attend_differential(struct decoder *d, int layer, int64_t n, tensor q, tensor k, tensor v,
                                tensor o) {
    struct model *m = d->m;
    struct layer_specs s = specs_for(m, layer, n);
    tensor pairs = with_shape(d->o_pseudo, 1, n, 2, m->config.num_attention_heads, m->config.head_dim);
    for (int map = 0; map < 2; map++)
        for (int half = 0; half < 2; half++)
            m->k->attention_decode(m->dev, &s.pair_attention, every_other_head(q, map),
                                   every_other_head(k, map), every_other_head(v, half),
                                   every_other_head(d->cache_k[layer], map),
                                   every_other_head(d->cache_v[layer], half), d->position,
                                   every_other_head(tensor_select(pairs, 2, map), half));
    differential_combine_of(m, layer, &s.diff_combine, pairs, o);
}

/* o [n,H,d] from qkv [n,H+2G,d] (simplicial layers: [n,5H,d]) and the caches, to which the n tokens' keys and values
 * are appended. */
static void attention(struct decoder *d, int layer, int64_t n) {
    struct model *m = d->m;
    const struct kernels *k = m->k;
    const struct layer_params *p = &m->params.layers[layer];
    struct layer_specs s = specs_for(m, layer, n);
    int64_t H = s.qkv_mix.heads, G = mix_kv_heads(&s.qkv_mix), dim = s.qkv_mix.head_dim, P = s.qkv_mix.pseudo;
    tensor qkv = with_shape(d->qkv, 1, n, s.qkv_heads, dim, 0), o = with_shape(d->o, 1, n, H, dim, 0);
    tensor q = s.mixes ? with_shape(d->q, 1, n * P, H, dim, 0) : qkv_part(&m->config, qkv, 0);
    tensor key = s.mixes ? with_shape(d->k, 1, n * P, G, dim, 0) : qkv_part(&m->config, qkv, 1);
    tensor v = s.mixes ? with_shape(d->v, 1, n * P, G, dim, 0) : qkv_part(&m->config, qkv, 2);
    tensor o_pseudo = with_shape(d->o_pseudo, 1, n * P, H, dim, 0);
    if (s.normed)
        k->qk_norm(m->dev, &s.qk_norm, qkv_rows(qkv), model_param(m, p->q_norm), model_param(m, p->k_norm),
                   qkv_rows(qkv));
    if (s.mixes || s.rotates)
        k->qkv_mix(m->dev, &s.qkv_mix, qkv, model_alpha(m, layer, p->alpha_q),
                   model_alpha(m, layer, p->alpha_k), model_alpha(m, layer, p->alpha_v), d->rope,
                   tensor_none(), d->position, q, key, v);
    if (s.diff) {
        attend_differential(d, layer, n, q, key, v, o);
        return;
    }
    if (s.talking) {
        k->talking_decode(m->dev, &s.attention, q, key, v, model_param(m, p->talk_logits),
                          model_param(m, p->talk_weights), d->cache_k[layer], d->cache_v[layer], d->position,
                          o);
        return;
    }
    if (s.simplicial) {
        k->simplicial_decode(m->dev, &s.attention, q, key, v, qkv_part(&m->config, qkv, 3),
                             qkv_part(&m->config, qkv, 4), half_of_heads(d->cache_k[layer], 0),
                             half_of_heads(d->cache_v[layer], 0), half_of_heads(d->cache_k[layer], 1),
                             half_of_heads(d->cache_v[layer], 1), d->position, o);
        return;
    }
    if (!s.iha)
        o_pseudo = o;
    k->attention_decode(m->dev, &s.attention, q, key, v, d->cache_k[layer], d->cache_v[layer],
                        d->position * P, o_pseudo);
    if (s.iha)
        k->collapse(m->dev, &s.collapse, o_pseudo, model_param(m, p->collapse), o);
}

/* delta = attn(y) */
static void attention_half(struct decoder *d, int layer, int64_t n) {
    const struct model_config *c = &d->m->config;
    const struct layer_params *p = &d->m->params.layers[layer];
    int64_t C = c->hidden_size, width = c->num_attention_heads * c->head_dim;
    project_qkv(d, layer, n);
    attention(d, layer, n);
    linear(d, n, d->o, width, p->out, p->out_bias, C, d->delta);
}

/* delta = mlp(y) */
static void mlp_half(struct decoder *d, int layer, int64_t n) {
    struct model *m = d->m;
    const struct layer_params *p = &m->params.layers[layer];
    int64_t C = m->config.hidden_size, F = m->config.intermediate_size;
    tensor both = with_shape(d->up, n, 2 * F, 0, 0, 0), up = with_shape(d->up, n, F, 0, 0, 0),
           hidden = with_shape(d->act, n, F, 0, 0, 0), gate = tensor_none();
    struct act_spec act = act_of(d, n);
    if (m->specs[layer].one_product) {
        linear_of(d, n, d->y, C, model_up_and_gate(m, layer), tensor_none(), 2 * F, both);
        up = half_of_columns(both, 0);
        gate = half_of_columns(both, 1);
    } else if (p->gate >= 0) {
        gate = tensor_rows(with_shape(d->up, 2 * n, F, 0, 0, 0), n, n);
        linear(d, n, d->y, C, p->up, p->up_bias, F, up);
        linear(d, n, d->y, C, p->gate, -1, F, gate);
    }
    if (gate.data) {
        m->k->mlp_act(m->dev, &act, up, gate, hidden);
    } else {
        struct linear_spec spec = {n, C, F};
        m->k->linear_act(m->dev, &spec, act.type, with_shape(d->y, n, C, 0, 0, 0), model_param(m, p->up),
                         model_param(m, p->up_bias), up, hidden);
    }
    linear(d, n, d->act, F, p->down, p->down_bias, C, d->delta);
}

/* x += delta, what the layer before adds; the layer's own output is left in d->delta. */
static void decode_layer(struct decoder *d, int layer, int64_t n, tensor delta) {
    const struct layer_params *p = &d->m->params.layers[layer];
    norm(d, n, delta, p->attn_norm, p->attn_norm_bias);
    attention_half(d, layer, n);
    norm(d, n, d->delta, p->mlp_norm, p->mlp_norm_bias);
    mlp_half(d, layer, n);
}

static void feed_chunk(struct decoder *d, const int32_t *tokens, int64_t n, float *logits) {
    struct model *m = d->m;
    const struct model_config *c = &m->config;
    int64_t C = c->hidden_size, V = c->vocab_size;
    struct embed_spec embed = {1, n, V, C};
    tensor ids = with_shape(d->tokens, 1, n, 0, 0, 0), delta = tensor_none();
    m->k->upload(m->dev, ids, tokens, DTYPE_I32);
    m->k->embed(m->dev, &embed, ids, model_param(m, m->params.embed), model_param(m, m->params.pos_embed),
                tensor_none(), d->position, with_shape(d->x, n, C, 0, 0, 0));
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        decode_layer(d, layer, n, delta);
        delta = d->delta;
    }
    d->position += n;
    if (!logits)
        return;
    norm(d, n, delta, m->params.final_norm, m->params.final_norm_bias);
    tensor last = tensor_rows(with_shape(d->y, n, C, 0, 0, 0), n - 1, 1);
    linear(d, 1, last, C, m->params.lm_head, -1, V, d->logits);
    m->k->download(m->dev, d->logits, logits, DTYPE_F32);
}

void decoder_feed(struct decoder *d, const int32_t *tokens, int64_t n, float *logits) {
    model_await_params(d->m);
    struct model *m = d->m;
    m->k->set_workspace(m->dev, d->workspace, d->workspace_bytes);
    for (int layer = 0; d->position == 0 && layer < m->config.num_hidden_layers; layer++)
        if (m->specs[layer].folded)
            model_fold(m, layer, d->folded_weight[layer], d->folded_bias[layer]);
    for (int64_t fed = 0, count; fed < n; fed += count) {
        count = n - fed < d->chunk ? 1 : d->chunk; /* the two sizes that were planned */
        feed_chunk(d, tokens + fed, count, fed + count == n ? logits : NULL);
    }
    m->k->set_workspace(m->dev, m->workspace, m->workspace_bytes);
}
