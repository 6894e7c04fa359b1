#include "model/params.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGN_ELEMENTS = 64 }; /* 256 bytes of fp32: enough for every vector and cache-line width */

/* The vocabulary is a dimension of the classifier's products, whose tiles on a GPU are of 128 rows or columns and whose
 * loads are of 16 bytes: a vocabulary of 50257 would take the slow ones. */
enum { VOCAB_ROWS = 128 };

struct builder {
    struct params *p;
    int capacity;
    int layer, unit;
    int64_t rounding_index; /* of the next parameter */
    bool failed;
};

static int64_t round_up_to(int64_t n, int64_t grain) {
    return (n + grain - 1) / grain * grain;
}

static void align(struct params *p, int ranks) {
    p->elements = round_up_to(p->elements, (int64_t)ALIGN_ELEMENTS * ranks);
}

/* Append one tensor; trailing zero dimensions end the shape. Returns its index. */
static int add(struct builder *b, const char *name, int64_t s0, int64_t s1, int64_t s2,
               enum param_class class, enum param_init init) {
    struct params *p = b->p;
    if (b->failed)
        return -1;
    if (p->count == b->capacity) {
        b->capacity = b->capacity ? 2 * b->capacity : 64;
        struct param *list = realloc(p->list, (size_t)b->capacity * sizeof *list);
        if (!list) {
            b->failed = true;
            return -1;
        }
        p->list = list;
    }
    struct param *t = &p->list[p->count];
    *t = (struct param){
        .shape = {s0, s1, s2}, .layer = b->layer, .unit = b->unit, .class = class, .init = init, .count = 1};
    if (b->layer >= 0)
        snprintf(t->name, sizeof t->name, "layers.%d.%s", b->layer, name);
    else
        snprintf(t->name, sizeof t->name, "%s", name);
    while (t->ndim < 3 && t->shape[t->ndim] > 0)
        t->count *= t->shape[t->ndim++];
    t->offset = p->elements;
    t->packed_offset = p->num_params;
    t->rounding_index = b->rounding_index;
    t->padded_rows = s0;
    b->rounding_index = round_up_to(b->rounding_index + t->count, ALIGN_ELEMENTS);
    p->elements += t->count;
    align(p, 1);
    p->num_params += t->count;
    return p->count++;
}

/* A table [vocabulary, hidden]. classifier: it is multiplied by, and gets rows up to a whole number of tiles. Nothing
 * else needs to know of them: they are a gap after the tensor, which is zero and stays zero. */
static int add_table(struct builder *b, const struct model_config *m, const char *name, bool classifier) {
    int index = add(b, name, m->vocab_size, m->hidden_size, 0, PARAM_MATRIX, INIT_NORMAL);
    if (b->failed || !classifier)
        return index;
    struct param *t = &b->p->list[index];
    t->padded_rows = round_up_to(m->vocab_size, VOCAB_ROWS);
    b->p->elements = t->offset + t->padded_rows * m->hidden_size;
    align(b->p, 1);
    return index;
}

static int add_bias(struct builder *b, bool present, const char *name, int64_t size) {
    return present ? add(b, name, size, 0, 0, PARAM_VECTOR, INIT_ZEROS) : -1;
}

/* [P,H,H] of an IHA layer, [H,H] of a folded one, for H heads. mixed: alpha_on has it. */
static int add_alpha(struct builder *b, const struct model_config *m, int layer, bool mixed, const char *name,
                     int64_t H) {
    if (!mixed)
        return -1;
    if (layer_is_folded(m->layer_types[layer]))
        return add(b, name, H, H, 0, PARAM_MIX, INIT_ALPHA);
    return layer_is_iha(m->layer_types[layer])
               ? add(b, name, m->num_pseudo_heads, H, H, PARAM_MIX, INIT_ALPHA)
               : -1;
}

/* Of a differential layer. */
static void add_diff(struct builder *b, const struct model_config *m, int layer, struct layer_params *l) {
    static const char *const names[] = {"attn.lambda_q1", "attn.lambda_k1", "attn.lambda_q2",
                                        "attn.lambda_k2"};
    bool diff = layer_is_diff(m->layer_types[layer]);
    for (int i = 0; i < 4; i++)
        l->lambda[i] = diff ? add(b, names[i], m->head_dim, 0, 0, PARAM_MIX, INIT_LAMBDA) : -1;
    l->diff_norm =
        diff ? add(b, "attn.diff_norm.weight", 2 * m->head_dim, 0, 0, PARAM_VECTOR, INIT_ONES) : -1;
}

/* Of a layer with talking heads, which begin as the identity. */
static void add_talking(struct builder *b, const struct model_config *m, int layer, struct layer_params *l) {
    int64_t H = m->num_attention_heads;
    bool talking = layer_is_talking(m->layer_types[layer]);
    l->talk_logits = talking ? add(b, "attn.talk_logits", H, H, 0, PARAM_MIX, INIT_ALPHA) : -1;
    l->talk_weights = talking ? add(b, "attn.talk_weights", H, H, 0, PARAM_MIX, INIT_ALPHA) : -1;
}

static void add_layer(struct builder *b, const struct model_config *m, int layer, struct layer_params *l) {
    int64_t C = m->hidden_size, F = m->intermediate_size, H = m->num_attention_heads, P = m->num_pseudo_heads;
    int64_t width = H * m->head_dim;
    bool norm_bias = m->bias && m->norm == NORM_LAYERNORM, iha = layer_is_iha(m->layer_types[layer]);
    bool full = m->iha_collapse == COLLAPSE_FULL;
    b->layer = layer;
    l->attn_norm = add(b, "attn_norm.weight", C, 0, 0, PARAM_VECTOR, INIT_ONES);
    l->attn_norm_bias = add_bias(b, norm_bias, "attn_norm.bias", C);
    int64_t qkv_rows = layer_qkv_heads(m, m->layer_types[layer]) * m->head_dim;
    l->qkv = add(b, "attn.qkv.weight", qkv_rows, C, 0, PARAM_MATRIX, INIT_NORMAL);
    l->qkv_bias = add_bias(b, config_qkv_bias(m), "attn.qkv.bias", qkv_rows);
    bool qk_norm = m->qk_norm != QK_NORM_NONE;
    l->q_norm = qk_norm ? add(b, "attn.q_norm.weight", m->head_dim, 0, 0, PARAM_VECTOR, INIT_ONES) : -1;
    l->k_norm = qk_norm ? add(b, "attn.k_norm.weight", m->head_dim, 0, 0, PARAM_VECTOR, INIT_ONES) : -1;
    bool qk = m->alpha_on != ALPHA_ON_V, v = m->alpha_on != ALPHA_ON_QK;
    l->alpha_q = add_alpha(b, m, layer, qk, "attn.alpha_q", H);
    l->alpha_k = add_alpha(b, m, layer, qk, "attn.alpha_k", config_kv_heads(m));
    l->alpha_v = add_alpha(b, m, layer, v, "attn.alpha_v", config_kv_heads(m));
    l->collapse = iha ? add(b, "attn.collapse", H, P, full ? H : 0, PARAM_MIX, INIT_COLLAPSE) : -1;
    add_diff(b, m, layer, l);
    add_talking(b, m, layer, l);
    l->out = add(b, "attn.out.weight", C, width, 0, PARAM_MATRIX, INIT_NORMAL_OUTPUT);
    l->out_bias = add_bias(b, m->bias, "attn.out.bias", C);
    l->mlp_norm = add(b, "mlp_norm.weight", C, 0, 0, PARAM_VECTOR, INIT_ONES);
    l->mlp_norm_bias = add_bias(b, norm_bias, "mlp_norm.bias", C);
    l->up = add(b, "mlp.up.weight", F, C, 0, PARAM_MATRIX, INIT_NORMAL);
    l->up_bias = add_bias(b, m->bias, "mlp.up.bias", F);
    l->gate = m->activation == ACTIVATION_SWIGLU
                  ? add(b, "mlp.gate.weight", F, C, 0, PARAM_MATRIX, INIT_NORMAL)
                  : -1;
    l->down = add(b, "mlp.down.weight", C, F, 0, PARAM_MATRIX, INIT_NORMAL_OUTPUT);
    l->down_bias = add_bias(b, m->bias, "mlp.down.bias", C);
}

/* The parameters added from here on are of this unit. */
static void begin_unit(struct builder *b, int unit, int ranks) {
    align(b->p, ranks);
    b->unit = unit;
    if (!b->failed)
        b->p->unit_offset[unit] = b->p->elements;
}

int params_create(struct params *p, const struct model_config *m, int ranks, struct error *e) {
    int L = (int)m->num_hidden_layers;
    *p = (struct params){.unit_count = L + 2};
    p->layers = calloc((size_t)L, sizeof *p->layers);
    p->unit_offset = calloc((size_t)p->unit_count + 1, sizeof *p->unit_offset);
    struct builder b = {.p = p, .layer = -1, .failed = !p->layers || !p->unit_offset};
    p->embed = add_table(&b, m, "embed.weight", m->tie_word_embeddings);
    p->pos_embed = -1;
    if (m->position_embedding == POSITION_LEARNED)
        p->pos_embed = add(&b, "pos_embed.weight", m->max_position_embeddings, m->hidden_size, 0,
                           PARAM_MATRIX, INIT_NORMAL);
    for (int layer = 0; layer < L && !b.failed; layer++) {
        begin_unit(&b, layer + 1, ranks);
        add_layer(&b, m, layer, &p->layers[layer]);
    }
    begin_unit(&b, L + 1, ranks);
    b.layer = -1;
    p->final_norm = add(&b, "final_norm.weight", m->hidden_size, 0, 0, PARAM_VECTOR, INIT_ONES);
    p->final_norm_bias =
        add_bias(&b, m->bias && m->norm == NORM_LAYERNORM, "final_norm.bias", m->hidden_size);
    p->lm_head = m->tie_word_embeddings ? p->embed : add_table(&b, m, "lm_head.weight", true);
    align(p, ranks);
    if (b.failed) {
        params_free(p);
        return fail_run(e, "out of memory listing the model's parameters");
    }
    p->unit_offset[p->unit_count] = p->elements;
    return 0;
}

void params_free(struct params *p) {
    free(p->list);
    free(p->layers);
    free(p->unit_offset);
    *p = (struct params){0};
}

enum param_part param_part_of(const struct param *t) {
    if (strstr(t->name, "norm"))
        return PART_NORMS;
    if (t->layer < 0)
        return strstr(t->name, "lm_head") ? PART_HEAD : PART_EMBEDDINGS;
    return t->class == PARAM_MIX ? PART_MIX : strstr(t->name, ".mlp.") ? PART_MLP : PART_ATTENTION;
}

struct element_range param_overlap(const struct param *t, int64_t begin, int64_t end) {
    int64_t t_end = t->offset + t->count;
    return (struct element_range){begin > t->offset ? begin : t->offset, end < t_end ? end : t_end};
}

/* ---- initial values ---- */

/* splitmix64's finalizer: a hash of x. */
static uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* A standard normal number from (key, index), by the Box-Muller transform. */
static double normal(uint64_t key, uint64_t index) {
    uint64_t bits = mix64(key + mix64(index));
    double u = ((double)(bits >> 32) + 0.5) / 4294967296.0, v = (double)(bits & 0xffffffffu) / 4294967296.0;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

static uint64_t key_of(uint64_t seed, const char *name) {
    uint64_t key = mix64(seed);
    for (; *name; name++)
        key = mix64(key ^ (unsigned char)*name);
    return key;
}

static void initial_collapse(const struct param *t, enum init_collapse how, float *values) {
    int64_t H = t->shape[0], P = t->shape[1], G = t->ndim == 3 ? t->shape[2] : 1;
    for (int64_t h = 0; h < H; h++)
        for (int64_t p = 0; p < P; p++)
            for (int64_t g = 0; g < G; g++) {
                bool same_head = t->ndim == 2 || g == h;
                float weight = how == COLLAPSE_MEAN ? 1.0f / (float)P : p == P - 1;
                values[(h * P + p) * G + g] = same_head ? weight : 0;
            }
}

void params_initial(const struct param *t, const struct model_config *m, uint64_t seed, float *values) {
    uint64_t key = key_of(seed, t->name);
    double scale = t->init == INIT_NORMAL ? 0.02 : 0;
    if (t->init == INIT_NORMAL_OUTPUT)
        scale = 0.02 / sqrt(2.0 * (double)m->num_hidden_layers);
    else if (t->init == INIT_ALPHA && m->init_alpha == ALPHA_NOISE)
        scale = 0.02;
    else if (t->init == INIT_LAMBDA)
        scale = 0.1;
    if (scale == 0)
        memset(values, 0, (size_t)t->count * sizeof *values);
    else {
#pragma omp parallel for
        for (int64_t i = 0; i < t->count; i++)
            values[i] = (float)(scale * normal(key, (uint64_t)i));
    }
    if (t->init == INIT_ONES)
        for (int64_t i = 0; i < t->count; i++)
            values[i] = 1;
    if (t->init == INIT_ALPHA)
        for (int64_t row = 0, H = t->shape[1]; row < t->count / H; row++) /* of all pseudo-heads */
            values[row * H + row % H] += 1;
    if (t->init == INIT_COLLAPSE)
        initial_collapse(t, m->init_collapse, values);
}

void param_shape_text(const struct param *t, char *out, size_t bytes) {
    size_t length = 0;
    for (int i = 0; i < t->ndim && length < bytes; i++)
        length +=
            (size_t)snprintf(out + length, bytes - length, "%s%lld", i ? ", " : "[", (long long)t->shape[i]);
    if (length < bytes)
        snprintf(out + length, bytes - length, "]");
}
