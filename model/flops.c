#include "model/flops.h"

static int64_t pseudo_of(const struct model_config *m, enum layer_type type) {
    return layer_is_iha(type) ? m->num_pseudo_heads : 1;
}

static int64_t window_of(const struct model_config *m, enum layer_type type) {
    return !layer_is_local(type) ? 0 : layer_is_iha(type) ? m->iha_window : m->local_window;
}

/* The sum over queries of the keys that they see, squared. */
static double simplicial_triples(const struct model_config *m, enum layer_type type, int64_t seq_len) {
    double T = (double)seq_len, window = (double)window_of(m, type);
    double n =
        window > 0 && window < T ? window : T; /* queries that see 1, 2, ... n keys, then as many as n */
    return m->causal ? n * (n + 1) * (2 * n + 1) / 6 + (T - n) * n * n : T * T * T;
}

/* The sum over queries of end - begin as in attention_keys(): the ends are S, or s + 1, or the end of the
 * query's token; the begins are 0, then 1, 2, ... from query `window` on. */
double attention_pairs(const struct model_config *m, enum layer_type type, int64_t seq_len) {
    if (layer_is_simplicial(type))
        return simplicial_triples(m, type, seq_len);
    double T = (double)seq_len, P = (double)pseudo_of(m, type), S = T * P,
           window = (double)window_of(m, type);
    double moved = window > 0 && window < S ? S - window : 0; /* queries whose begin is not 0 */
    double ends = !m->causal                  ? S * S
                  : m->iha_mask == MASK_TOKEN ? P * P * (T * (T + 1) / 2)
                                              : S * (S + 1) / 2;
    return ends - moved * (moved + 1) / 2;
}

/* S^2, or S * window, causal or not. */
double attention_pairs_in_paper(const struct model_config *m, enum layer_type type, int64_t seq_len) {
    double S = (double)(seq_len * pseudo_of(m, type)), window = (double)window_of(m, type);
    double keys = layer_is_local(type) && window < S ? window : S;
    return S * keys * (layer_is_simplicial(type) ? keys : 1);
}

double attention_cost(const struct model_config *m, enum layer_type type) {
    double H = (double)m->num_attention_heads, d = (double)m->head_dim;
    return layer_is_diff(type) ? 1.5 : layer_is_talking(type) ? 1 + H / d : 1;
}

/* Forward and backward. */
static double attention_flops(const struct model_config *m, double pairs) {
    return 12 * (double)m->num_attention_heads * (double)m->head_dim * pairs;
}

struct flops flops_per_token(const struct model_config *m, int64_t seq_len) {
    double C = (double)m->hidden_size, F = (double)m->intermediate_size, H = (double)m->num_attention_heads;
    double d = (double)m->head_dim, P = (double)m->num_pseudo_heads, G = (double)config_kv_heads(m);
    double mlp = (m->activation == ACTIVATION_SWIGLU ? 3 : 2) * C * F;
    struct flops f = {.matmul = 6 * (double)m->vocab_size * C};
    double alphas =
        (m->alpha_on == ALPHA_ON_V ? 0 : H * H + G * G) + (m->alpha_on == ALPHA_ON_QK ? 0 : G * G);
    double pairs[LAYER_TYPES] = {0}; /* by layer type, once computed */
    for (int i = 0; i < m->num_hidden_layers; i++) {
        enum layer_type type = m->layer_types[i];
        if (pairs[type] == 0)
            pairs[type] = attention_pairs(m, type, seq_len);
        f.matmul += 6 * ((double)layer_qkv_heads(m, type) * C * d + C * H * d + mlp);
        f.attention += attention_flops(m, attention_cost(m, type) * pairs[type]) / (double)seq_len;
        if (layer_is_iha(type))
            f.mixing += 6 * d * P * (alphas + H * (m->iha_collapse == COLLAPSE_FULL ? H : 1));
    }
    return f;
}

double flops_segments(const struct model_config *m, int64_t seq_len, const int32_t *segments, int64_t batch) {
    int64_t layers[LAYER_TYPES] = {0}; /* of each type */
    for (int i = 0; i < m->num_hidden_layers; i++)
        layers[m->layer_types[i]]++;
    double pairs = 0;
    for (int64_t n = 0; n < batch * seq_len; n++) {
        int64_t t = n % seq_len;
        if (t + 1 < seq_len && segments[n + 1] == segments[n])
            continue; /* not the last token of its segment */
        for (int type = 0; type < LAYER_TYPES; type++)
            if (layers[type] > 0)
                pairs += (double)layers[type] * attention_cost(m, (enum layer_type)type) *
                         attention_pairs(m, (enum layer_type)type, t + 1 - segments[n]);
    }
    return attention_flops(m, pairs);
}
