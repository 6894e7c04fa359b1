/* Laying out activations. One walk over the layers assigns every buffer; it runs first without memory, to
 * learn the size, then with it. Buffers that backward does not need kept share one slot among all layers. */
#include "model/buffers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The buffers of a layer that either are the layer's own or share memory with those of the other layers. */
enum slot {
    SLOT_X_ATTN,
    SLOT_Y_ATTN,
    SLOT_FOLDED_WEIGHT,
    SLOT_FOLDED_BIAS,
    SLOT_QKV_RAW,
    SLOT_QKV,
    SLOT_Q,
    SLOT_K,
    SLOT_V,
    SLOT_O_PSEUDO,
    SLOT_O,
    SLOT_X_MLP,
    SLOT_Y_MLP,
    SLOT_UP,
    SLOT_GATE,
    SLOT_ACT,
    SLOT_ATTENTION_SAVED,
    SLOTS
};

struct layout {
    char *base; /* NULL: only count */
    size_t offset;
    size_t shared_bytes[SLOTS]; /* the most that any layer needs */
    void *shared[SLOTS];
};

/* The next free bytes, on a boundary of 256. */
static void *allocate(struct layout *l, size_t bytes) {
    void *p = l->base ? l->base + l->offset : NULL;
    l->offset += (bytes + 255) / 256 * 256;
    return p;
}

static tensor allocate_tensor(struct layout *l, tensor shape) {
    shape.data = allocate(l, (size_t)tensor_count(shape) * dtype_bytes(shape.dtype));
    return shape;
}

/* Does this buffer keep its contents from forward to backward? */
static bool is_kept(const struct model *m, const struct layer_specs *s, enum slot slot) {
    if (!m->shape.training)
        return false;
    if (m->shape.recompute == RECOMPUTE_NONE)
        return true;
    if (m->shape.recompute == RECOMPUTE_FULL)
        return slot == SLOT_X_ATTN;
    switch (slot) { /* light: what needs no matrix product and no attention is recomputed */
    case SLOT_Y_ATTN:
    case SLOT_FOLDED_WEIGHT:
    case SLOT_FOLDED_BIAS:
    case SLOT_Y_MLP:
    case SLOT_ACT:
    case SLOT_Q:
    case SLOT_K:
    case SLOT_V:
        return false;
    case SLOT_QKV:
        return !s->normed;
    case SLOT_O:
        return !s->iha && !s->diff;
    default:
        return true;
    }
}

static void *allocate_slot(struct model *m, struct layout *l, int layer, enum slot slot, size_t bytes) {
    if (is_kept(m, &m->specs[layer], slot))
        return allocate(l, bytes);
    if (bytes > l->shared_bytes[slot])
        l->shared_bytes[slot] = bytes;
    return l->shared[slot];
}

static tensor slot_tensor(struct model *m, struct layout *l, int layer, enum slot slot, tensor shape) {
    shape.data = allocate_slot(m, l, layer, slot, (size_t)tensor_count(shape) * dtype_bytes(shape.dtype));
    return shape;
}

/* ---- planning ---- */

/* The configuration's names for the kernels' operations. No default: the compiler reports a missing case. */
static enum norm_type norm_type_of(enum norm norm) {
    switch (norm) {
    case NORM_RMSNORM:
        return NORM_TYPE_RMS;
    case NORM_LAYERNORM:
        return NORM_TYPE_LAYER;
    }
    abort();
}

static enum act_type act_type_of(enum activation activation) {
    switch (activation) {
    case ACTIVATION_GELU_TANH:
        return ACT_GELU_TANH;
    case ACTIVATION_RELU2:
        return ACT_RELU2;
    case ACTIVATION_SWIGLU:
        return ACT_SWIGLU;
    }
    abort();
}

/* Two tensors with padding or a bias between them are two products. */
static bool is_one_product(const struct model *m, int layer) {
    const struct layer_params *l = &m->params.layers[layer];
    if (l->gate < 0)
        return false;
    const struct param *up = &m->params.list[l->up];
    return m->params.list[l->gate].offset == up->offset + up->count;
}

static struct layer_specs specs_for_layer(const struct model *m, int layer) {
    const struct model_config *c = &m->config;
    enum layer_type type = c->layer_types[layer];
    bool iha = layer_is_iha(type),
         rope = c->position_embedding == POSITION_ROPE && !layer_is_simplicial(type);
    int64_t P = iha ? c->num_pseudo_heads : 1, B = m->shape.batch, T = m->shape.tokens;
    int64_t H = c->num_attention_heads, G = config_kv_heads(c), d = c->head_dim;
    int64_t window = !layer_is_local(type) ? 0 : iha ? c->iha_window : c->local_window;
    struct attention_spec pair_attention = {
        B, T, H / 2, d, 1, c->causal, false, window, 1 / sqrt((double)d), m->shape.segments, 0, false};
    return (struct layer_specs){
        .iha = iha,
        .diff = layer_is_diff(type),
        .talking = layer_is_talking(type),
        .simplicial = layer_is_simplicial(type),
        .qkv_heads = layer_qkv_heads(c, type),
        .pair_attention = pair_attention,
        .diff_combine = {B * T, H / 2, d, 0.8 - 0.6 * exp(-0.3 * layer), c->norm_eps},
        .folded = layer_is_folded(type),
        .mixes = iha,
        .rotates = rope && !iha,
        .qkv_mix = {B, T, H, d, P, iha, rope, c->iha_rope == IHA_ROPE_VIRTUAL, G},
        .attention = {B, T * P, H, d, P, c->causal, c->iha_mask == MASK_TOKEN, window, 1 / sqrt((double)d),
                      m->shape.segments, G, !iha},
        .collapse = {B, T, H, d, P, c->iha_collapse == COLLAPSE_PER_HEAD},
        .qk_norm = {B * T, H, G, d, c->norm_eps},
        .normed = c->qk_norm != QK_NORM_NONE,
        .one_product = is_one_product(m, layer),
    };
}

/* Plan one operation. Workspace is shared, so only the largest counts. *saved: the bytes it saves. */
static int plan(struct model *m, struct op_spec spec, size_t *saved, struct error *e) {
    struct op_cost cost;
    if (m->k->plan(m->dev, &spec, &cost, e) != 0)
        return -1;
    if (cost.workspace > m->workspace_bytes)
        m->workspace_bytes = cost.workspace;
    if (saved)
        *saved = cost.saved;
    return 0;
}

int layer_ops(const struct model_config *c, const struct layer_specs *s, bool training,
              struct op_spec ops[MAX_LAYER_OPS]) {
    int64_t n = s->qk_norm.rows, C = c->hidden_size, F = c->intermediate_size, d = c->head_dim;
    int count = 0;
    const int64_t linears[][2] = {
        {C, s->qkv_heads * d}, {c->num_attention_heads * d, C}, {C, s->one_product ? 2 * F : F}, {F, C}};
    bool gelu = act_type_of(c->activation) == ACT_GELU_TANH;
    for (int i = 0; i < 4; i++) {
        bool bias = i == 0 ? config_qkv_bias(c) : c->bias;
        ops[count++] = (struct op_spec){.kind = OP_LINEAR,
                                        .no_bias = !bias,
                                        .no_backward = !training,
                                        .dy_sums = i == 1 || i == 3, /* by the norm after it */
                                        .gelu_after = gelu && i == 2,
                                        .gelu_before = gelu && i == 3,
                                        .linear = {n, linears[i][0], linears[i][1]}};
    }
    ops[count++] = (struct op_spec){.kind = OP_ACT, .act = {act_type_of(c->activation), n, F}};
    if (s->mixes || s->rotates)
        ops[count++] = (struct op_spec){.kind = OP_QKV_MIX, .qkv_mix = s->qkv_mix};
    if (s->iha)
        ops[count++] = (struct op_spec){.kind = OP_COLLAPSE, .collapse = s->collapse};
    if (s->normed)
        ops[count++] = (struct op_spec){.kind = OP_QK_NORM, .qk_norm = s->qk_norm};
    if (s->folded)
        ops[count++] = (struct op_spec){.kind = OP_FOLD, .fold = {c->num_attention_heads, d * C}};
    if (s->diff)
        ops[count++] = (struct op_spec){.kind = OP_DIFF_COMBINE, .diff_combine = s->diff_combine};
    return count;
}

static int plan_layer(struct model *m, int layer, struct error *e) {
    struct layer_specs *s = &m->specs[layer];
    *s = specs_for_layer(m, layer);
    struct op_spec attend = {.kind = attention_kind(s), .attention = *planned_attention(s)},
                   ops[MAX_LAYER_OPS];
    if (plan(m, attend, &s->attention_saved_bytes, e) != 0)
        return -1;
    /* What a differential layer's second map saves comes after this, aligned as allocations are. */
    s->attention_saved_bytes = (s->attention_saved_bytes + 255) / 256 * 256;
    for (int i = 0, count = layer_ops(&m->config, s, m->shape.training, ops); i < count; i++) {
        ops[i].gelu_after &= m->shape.recompute != RECOMPUTE_LIGHT; /* see mlp_hidden() in forward.c */
        if (plan(m, ops[i], NULL, e) != 0)
            return -1;
    }
    return 0;
}

static int plan_muon(struct model *m, struct error *e) {
    for (int i = 0; i < m->muon.count; i++) {
        const struct muon_matrix *x = &m->muon.list[i];
        struct op_spec spec = {.kind = OP_ORTHOGONALIZE, .orthogonalize = {x->rows, x->cols}};
        if (plan(m, spec, NULL, e) != 0)
            return -1;
    }
    return 0;
}

static int plan_all(struct model *m, struct error *e) {
    const struct model_config *c = &m->config;
    int64_t N = m->shape.batch * m->shape.tokens, C = c->hidden_size;
    m->workspace_bytes = 0;
    m->norm_spec = (struct norm_spec){norm_type_of(c->norm), c->norm_eps, N, C};
    m->act_spec = (struct act_spec){act_type_of(c->activation), N, c->intermediate_size};
    struct op_spec norm = {.kind = OP_NORM, .norm = m->norm_spec};
    struct op_spec embed = {.kind = OP_EMBED, .embed = {m->shape.batch, m->shape.tokens, c->vocab_size, C}};
    struct op_spec classifier = {.kind = OP_CLASSIFIER, .classifier = model_classifier_spec(m, N)};
    if (plan(m, norm, &m->norm_saved_bytes, e) != 0 || plan(m, embed, NULL, e) != 0 ||
        plan(m, classifier, NULL, e) != 0)
        return -1;
    struct op_spec scored = {.kind = OP_CLASSIFIER, .classifier = model_classifier_spec(m, m->shape.tokens)};
    if (m->scores && plan(m, scored, NULL, e) != 0)
        return -1;
    for (int layer = 0; layer < c->num_hidden_layers; layer++)
        if (plan_layer(m, layer, e) != 0)
            return -1;
    return plan_muon(m, e);
}

/* ---- addresses ---- */

/* wide: [N,F]. */
static void assign_up(struct model *m, struct layout *l, int layer, tensor wide) {
    struct layer_buffers *b = &m->layers[layer];
    b->gate = tensor_none();
    if (m->specs[layer].one_product) {
        tensor both = slot_tensor(m, l, layer, SLOT_UP,
                                  tensor_of(NULL, wide.dtype, wide.shape[0], 2 * wide.shape[1], 0, 0, 0));
        b->up = half_of_columns(both, 0);
        b->gate = half_of_columns(both, 1);
        return;
    }
    b->up = slot_tensor(m, l, layer, SLOT_UP, wide);
    if (m->config.activation == ACTIVATION_SWIGLU)
        b->gate = slot_tensor(m, l, layer, SLOT_GATE, wide);
}

static void assign_layer(struct model *m, struct layout *l, int layer) {
    const struct model_config *c = &m->config;
    struct layer_buffers *b = &m->layers[layer];
    const struct layer_specs *s = &m->specs[layer];
    enum dtype t = m->dtypes.compute;
    int64_t B = m->shape.batch, T = m->shape.tokens, N = B * T, C = c->hidden_size, F = c->intermediate_size;
    int64_t H = c->num_attention_heads, G = config_kv_heads(c), d = c->head_dim, S = s->attention.length;
    tensor hidden = tensor_of(NULL, t, N, C, 0, 0, 0), wide = tensor_of(NULL, t, N, F, 0, 0, 0);
    tensor pseudo = tensor_of(NULL, t, B, S, H, d, 0), pseudo_kv = tensor_of(NULL, t, B, S, G, d, 0);
    tensor one = tensor_of(NULL, t, B, T, H, d, 0), pairs = tensor_of(NULL, t, B, T, 2, H, d);
    b->attn_norm_saved = allocate(l, m->norm_saved_bytes);
    b->mlp_norm_saved = allocate(l, m->norm_saved_bytes);
    b->attention_saved =
        allocate_slot(m, l, layer, SLOT_ATTENTION_SAVED, s->attention_saved_bytes * (s->diff ? 2 : 1));
    b->x_attn = slot_tensor(m, l, layer, SLOT_X_ATTN, hidden);
    b->y_attn = slot_tensor(m, l, layer, SLOT_Y_ATTN, hidden);
    b->folded_weight = b->folded_bias = tensor_none();
    if (s->folded)
        b->folded_weight =
            slot_tensor(m, l, layer, SLOT_FOLDED_WEIGHT, tensor_of(NULL, t, 3 * H * d, C, 0, 0, 0));
    if (s->folded && config_qkv_bias(c))
        b->folded_bias =
            slot_tensor(m, l, layer, SLOT_FOLDED_BIAS, tensor_of(NULL, t, 3 * H * d, 0, 0, 0, 0));
    tensor rows = tensor_of(NULL, t, B, T, s->qkv_heads, d, 0);
    b->qkv = slot_tensor(m, l, layer, SLOT_QKV, rows);
    b->qkv_raw = s->normed ? slot_tensor(m, l, layer, SLOT_QKV_RAW, rows) : b->qkv;
    b->q = s->mixes ? slot_tensor(m, l, layer, SLOT_Q, pseudo) : qkv_part(c, b->qkv, 0);
    b->k = s->mixes ? slot_tensor(m, l, layer, SLOT_K, pseudo_kv) : qkv_part(c, b->qkv, 1);
    b->v = s->mixes ? slot_tensor(m, l, layer, SLOT_V, pseudo_kv) : qkv_part(c, b->qkv, 2);
    b->o_pseudo = slot_tensor(m, l, layer, SLOT_O_PSEUDO, s->diff ? pairs : pseudo);
    b->o = s->iha || s->diff ? slot_tensor(m, l, layer, SLOT_O, one) : b->o_pseudo;
    b->x_mlp = slot_tensor(m, l, layer, SLOT_X_MLP, hidden);
    b->y_mlp = slot_tensor(m, l, layer, SLOT_Y_MLP, hidden);
    assign_up(m, l, layer, wide);
    b->act = slot_tensor(m, l, layer, SLOT_ACT, wide);
}

/* The MLP's gradients and attention's are never needed at the same time, so they share memory. */
static void assign_gradients(struct model *m, struct layout *l) {
    const struct model_config *c = &m->config;
    enum dtype t = m->dtypes.compute;
    int64_t B = m->shape.batch, T = m->shape.tokens, N = B * T, H = c->num_attention_heads, d = c->head_dim;
    tensor hidden = tensor_of(NULL, t, N, c->hidden_size, 0, 0, 0);
    tensor wide = tensor_of(NULL, t, N, c->intermediate_size, 0, 0, 0);
    struct gradient_buffers *g = &m->grad;
    g->dx = allocate_tensor(l, hidden);
    g->dy = allocate_tensor(l, hidden);
    tensor sums = tensor_of(NULL, m->dtypes.gradient, c->hidden_size, 0, 0, 0, 0);
    g->dx_sums = c->bias ? allocate_tensor(l, sums) : tensor_none();
    size_t shared = l->offset;
    g->dact = allocate_tensor(l, wide);
    size_t mlp_end = l->offset;
    l->offset = shared;
    int64_t S = T, heads = 0;                                        /* the largest of any layer */
    bool mixes = false, apart = false, folded = false, diff = false; /* apart: o is not o_pseudo */
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        S = m->specs[layer].attention.length > S ? m->specs[layer].attention.length : S;
        mixes |= m->specs[layer].mixes;
        apart |= m->specs[layer].iha || m->specs[layer].diff;
        diff |= m->specs[layer].diff;
        folded |= m->specs[layer].folded;
        heads = m->specs[layer].qkv_heads > heads ? m->specs[layer].qkv_heads : heads;
    }
    int64_t G = config_kv_heads(c);
    size_t head_bytes = (size_t)(B * S * d) * dtype_bytes(t), pseudo_bytes = head_bytes * (size_t)H,
           pair_bytes = (size_t)(B * T * 2 * H * d) * dtype_bytes(t);
    g->d_o = allocate_tensor(l, tensor_of(NULL, t, B, T, H, d, 0));
    g->dqkv = allocate_tensor(l, tensor_of(NULL, t, B, T, heads, d, 0));
    tensor weight = tensor_of(NULL, m->dtypes.gradient, 3 * H * d, c->hidden_size, 0, 0, 0);
    g->dfolded_weight = folded ? allocate_tensor(l, weight) : tensor_none();
    tensor bias = tensor_of(NULL, m->dtypes.gradient, 3 * H * d, 0, 0, 0, 0);
    g->dfolded_bias = folded && config_qkv_bias(c) ? allocate_tensor(l, bias) : tensor_none();
    g->dqkv_other = diff ? allocate_tensor(l, tensor_of(NULL, t, B, T, 3 * H, d, 0)) : tensor_none();
    g->dalpha_unused = m->identity_alpha;
    g->dalpha_unused.dtype = m->dtypes.gradient;
    if (c->alpha_on != ALPHA_ON_QKV)
        g->dalpha_unused = allocate_tensor(l, g->dalpha_unused);
    g->d_o_pseudo = apart ? allocate(l, diff && pair_bytes > pseudo_bytes ? pair_bytes : pseudo_bytes) : NULL;
    void **pseudo[] = {&g->dq, &g->dk, &g->dv};
    for (int i = 0; i < 3 && mixes; i++)
        *pseudo[i] = allocate(l, head_bytes * (size_t)(i == 0 ? H : G));
    if (l->offset < mlp_end)
        l->offset = mlp_end;
}

static void assign_all(struct model *m, struct layout *l) {
    const struct model_config *c = &m->config;
    enum dtype t = m->dtypes.compute;
    int64_t B = m->shape.batch, T = m->shape.tokens, d = c->head_dim, P = 1;
    /* The shared slots come first; while only counting, last, when their sizes are known. */
    for (int i = 0; i < SLOTS; i++)
        l->shared[i] = l->base ? allocate(l, l->shared_bytes[i]) : NULL;
    for (int layer = 0; layer < c->num_hidden_layers; layer++)
        P = m->specs[layer].qkv_mix.pseudo > P ? m->specs[layer].qkv_mix.pseudo : P;
    tensor hidden = tensor_of(NULL, t, B * T, c->hidden_size, 0, 0, 0);
    m->tokens = allocate_tensor(l, tensor_of(NULL, DTYPE_I32, B, T, 0, 0, 0));
    m->targets = allocate_tensor(l, tensor_of(NULL, DTYPE_I32, B * T, 0, 0, 0, 0));
    m->correct = allocate_tensor(l, tensor_of(NULL, DTYPE_I32, B * T, 0, 0, 0, 0));
    m->segments = m->positions = tensor_none();
    if (m->shape.segments)
        m->segments = allocate_tensor(l, tensor_of(NULL, DTYPE_I32, 2, B, T, 0, 0));
    if (m->shape.segments && m->shape.restart_positions)
        m->positions = allocate_tensor(l, tensor_of(NULL, DTYPE_I32, B, T, 0, 0, 0));
    /* In the master type: angles rounded to bf16 would rotate every pair by a wrong amount. */
    m->rope = c->position_embedding == POSITION_ROPE
                  ? allocate_tensor(l, tensor_of(NULL, m->dtypes.master, T * P, 2, d / 2, 0, 0))
                  : tensor_none();
    m->identity_alpha =
        c->alpha_on == ALPHA_ON_QKV
            ? tensor_none()
            : allocate_tensor(l, tensor_of(NULL, t, P, c->num_attention_heads, c->num_attention_heads, 0, 0));
    m->delta = allocate_tensor(l, hidden);
    m->x_final = allocate_tensor(l, hidden);
    m->h = allocate_tensor(l, hidden);
    m->final_norm_saved = allocate(l, m->norm_saved_bytes);
    for (int layer = 0; layer < c->num_hidden_layers; layer++)
        assign_layer(m, l, layer);
    if (m->shape.training)
        assign_gradients(m, l);
    if (!l->base)
        for (int i = 0; i < SLOTS; i++)
            allocate(l, l->shared_bytes[i]);
}

int buffers_plan(struct model *m, size_t *activation_bytes, struct error *e) {
    if (plan_all(m, e) != 0)
        return -1;
    struct layout l = {0};
    assign_all(m, &l);
    *activation_bytes = l.offset;
    return 0;
}

void buffers_assign(struct model *m, void *memory) {
    struct layout l = {0};
    assign_all(m, &l); /* to learn the sizes of the shared slots */
    l.base = memory;
    l.offset = 0;
    assign_all(m, &l);
}
