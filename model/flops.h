/* What a model costs: the counts that `info` prints and MFU is measured with. */
#ifndef IHA_MODEL_FLOPS_H
#define IHA_MODEL_FLOPS_H

#include "model/config/config.h"

/* FLOPs of training on one token, forward and backward (backward costs twice the forward):
 *   matmul     6 * weights of qkv, out, up, gate, down in every layer, and of the vocabulary projection
 *   attention  12 * H * d * visible (virtual query, virtual key) pairs per token, as the mask has them
 *   mixing     6 * 4 * P * H^2 * d per token and IHA layer, three alphas and a full collapse (per head:
 * P*H*d) */
struct flops {
    double matmul, attention, mixing;
};
struct flops flops_per_token(const struct model_config *m, int64_t seq_len);

/* Visible pairs of one sequence in a layer, and what the paper's accounting charges an IHA local layer: every
 * virtual query its whole window. */
double attention_pairs(const struct model_config *m, enum layer_type type, int64_t seq_len);
double attention_pairs_as_charged(const struct model_config *m, enum layer_type type, int64_t seq_len);

#endif
