#include "model/generate/attention_weights.h"

#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "model/checkpoint/safetensors.h"

/* A layer's queries and keys on the host: vector s of head h is at q[s * step + h * d], and k likewise. */
struct host_vectors {
    float *memory, *q, *k;
    int64_t q_step, k_step; /* floats from one virtual token to the next */
};

/* Where nothing is mixed, queries and keys are slices of qkv. */
static int download_vectors(struct model *m, int layer, struct host_vectors *v, struct error *e) {
    const struct layer_buffers *b = &m->layers[layer];
    const struct attention_spec *a = &m->specs[layer].attention;
    int64_t q_width = a->heads * a->head_dim, k_width = attention_kv_heads(a) * a->head_dim;
    int64_t row = m->specs[layer].qkv_heads * a->head_dim;
    bool mixes = m->specs[layer].mixes;
    v->memory = malloc((size_t)(a->length * row) * sizeof(float));
    if (!v->memory)
        return fail_run(e, "out of memory for the queries and keys of a layer");
    v->q_step = mixes ? q_width : row;
    v->k_step = mixes ? k_width : row;
    v->q = v->memory;
    v->k = v->memory + (mixes ? a->length * q_width : q_width);
    if (mixes) {
        m->k->download(m->dev, b->q, v->q, DTYPE_F32);
        m->k->download(m->dev, b->k, v->k, DTYPE_F32);
    } else
        m->k->download(m->dev, b->qkv, v->memory, DTYPE_F32);
    return 0;
}

static double dot(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* The weights of virtual query s in one head, as weights[p,q,t,u]; scores: [S], scratch. */
static void weigh_keys(const struct attention_spec *a, const struct host_vectors *v, int64_t head, int64_t s,
                       double *scores, float *weights) {
    int64_t begin, end, d = a->head_dim, P = a->pseudo, T = a->length / P;
    double max = -INFINITY, sum = 0;
    attention_keys(a, s, a->length, &begin, &end);
    for (int64_t key = begin; key < end; key++) {
        scores[key] = a->scale * dot(v->q + s * v->q_step + head * d,
                                     v->k + key * v->k_step + head / attention_group(a) * d, d);
        max = scores[key] > max ? scores[key] : max;
    }
    for (int64_t key = begin; key < end; key++)
        sum += scores[key] = exp(scores[key] - max);
    for (int64_t key = 0; key < a->length; key++)
        weights[((s % P * P + key % P) * T + s / P) * T + key / P] =
            key >= begin && key < end ? (float)(scores[key] / sum) : 0;
}

/* All heads, one after the other. */
static int append_weights(struct safetensors_writer *w, const struct attention_spec *a,
                          const struct host_vectors *v, struct error *e) {
    size_t bytes = (size_t)(a->length * a->length) * sizeof(float);
    float *weights = malloc(bytes);
    double *scores = malloc((size_t)a->length * sizeof *scores);
    int status = weights && scores ? 0 : fail_run(e, "out of memory for the attention weights of a head");
    if (status != 0)
        safetensors_abandon(w);
    for (int64_t head = 0; head < a->heads && status == 0; head++) {
        for (int64_t s = 0; s < a->length; s++)
            weigh_keys(a, v, head, s, scores, weights);
        status = safetensors_append(w, weights, bytes, e);
    }
    free(weights);
    free(scores);
    return status;
}

static int write_file(const struct attention_spec *a, const struct host_vectors *v, const int32_t *tokens,
                      const struct token_texts *texts, const char *path, struct error *e) {
    int64_t P = a->pseudo, T = a->length / P, text_bytes = texts->ends[T - 1];
    const struct safetensors_entry entries[] = {
        {.name = "weights", .dtype = ST_F32, .ndim = 5, .shape = {a->heads, P, P, T, T}},
        {.name = "tokens", .dtype = ST_I32, .ndim = 1, .shape = {T}},
        {.name = "text_ends", .dtype = ST_I64, .ndim = 1, .shape = {T}},
        {.name = "text", .dtype = ST_U8, .ndim = 1, .shape = {text_bytes}}};
    struct safetensors_writer *w = safetensors_create(path, entries, 4, e);
    if (!w)
        return -1; /* a file that cannot be written is left as it is */
    if (append_weights(w, a, v, e) != 0 ||
        safetensors_append(w, tokens, (size_t)T * sizeof *tokens, e) != 0 ||
        safetensors_append(w, texts->ends, (size_t)T * sizeof *texts->ends, e) != 0 ||
        safetensors_append(w, texts->bytes, (size_t)text_bytes, e) != 0 || safetensors_finish(w, e) != 0) {
        unlink(path);
        return -1;
    }
    return 0;
}

int attention_weights_write(struct model *m, const int32_t *tokens, int layer,
                            const struct token_texts *texts, const char *path, struct error *e) {
    struct host_vectors v = {0};
    if (m->specs[layer].talking || m->specs[layer].simplicial)
        return fail_user(
            e,
            "layer %d is %s, whose weights are not those of one softmax for each head and key; choose "
            "another layer",
            layer, layer_type_name(m->config.layer_types[layer]));
    model_forward_attention(m, (struct batch){.tokens = tokens, .targets = tokens}, layer);
    int status = download_vectors(m, layer, &v, e);
    if (status == 0)
        status = write_file(&m->specs[layer].attention, &v, tokens, texts, path, e);
    free(v.memory);
    return status;
}
