#include "model/flops.h"

#include "kernels/kernels.h"

static int64_t pseudo_of(const struct model_config *m, enum layer_type type) {
    return layer_is_iha(type) ? m->num_pseudo_heads : 1;
}

static int64_t window_of(const struct model_config *m, enum layer_type type) {
    return !layer_is_local(type) ? 0 : layer_is_iha(type) ? m->iha_window : m->local_window;
}

double attention_pairs(const struct model_config *m, enum layer_type type, int64_t seq_len) {
    int64_t P = pseudo_of(m, type), S = seq_len * P;
    struct attention_spec spec = {.length = S,
                                  .pseudo = P,
                                  .causal = m->causal,
                                  .token_mask = m->iha_mask == MASK_TOKEN,
                                  .window = window_of(m, type)};
    double pairs = 0;
    for (int64_t s = 0; s < S; s++) {
        int64_t begin, end;
        attention_keys(&spec, s, S, &begin, &end);
        pairs += (double)(end - begin);
    }
    return pairs;
}

/* S^2, or S * window, causal or not. */
double attention_pairs_in_paper(const struct model_config *m, enum layer_type type, int64_t seq_len) {
    double S = (double)(seq_len * pseudo_of(m, type)), window = (double)window_of(m, type);
    return layer_is_local(type) && window < S ? S * window : S * S;
}

struct flops flops_per_token(const struct model_config *m, int64_t seq_len) {
    double C = (double)m->hidden_size, F = (double)m->intermediate_size, H = (double)m->num_attention_heads;
    double d = (double)m->head_dim, P = (double)m->num_pseudo_heads;
    double mlp = (m->activation == ACTIVATION_SWIGLU ? 3 : 2) * C * F;
    struct flops f = {.matmul = 6 * (double)m->vocab_size * C};
    double pairs[LAYER_IHA_LOCAL + 1] = {0}; /* by layer type, once computed */
    for (int i = 0; i < m->num_hidden_layers; i++) {
        enum layer_type type = m->layer_types[i];
        if (pairs[type] == 0)
            pairs[type] = attention_pairs(m, type, seq_len);
        f.matmul += 6 * (4 * C * H * d + mlp);
        f.attention += 12 * H * d * pairs[type] / (double)seq_len;
        if (layer_is_iha(type))
            f.mixing += 6 * d * P * H * (3 * H + (m->iha_collapse == COLLAPSE_FULL ? H : 1));
    }
    return f;
}
