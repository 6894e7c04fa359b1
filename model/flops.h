/* FLOPs of a model: the counts that `info` prints and MFU is measured with. */
#ifndef IHA_MODEL_FLOPS_H
#define IHA_MODEL_FLOPS_H

#include "model/config/config.h"

/* FLOPs of training on one token, forward and backward (backward costs twice the forward):
 *   matmul     6 * weights of qkv, out, up, gate, down in every layer, and of the vocabulary projection
 *   attention  12 * H * d * visible (virtual query, virtual key) pairs per token
 *              times attention_cost()
 *   mixing     6 * d * P * (H^2 + 2 G^2 + H^2) per IHA layer: alphas of q, k and v, as far as alpha_on has them, and
 *              a full collapse (per head: H in place of the last H^2) */
struct flops {
    double matmul, attention, mixing;
};
struct flops flops_per_token(const struct model_config *m, int64_t seq_len);

/* FLOPs of training's attention, forward and backward, on one batch whose attention stays inside segments: as
 * above, in all layers. segments: [batch, seq_len] the index in its sequence of the first token of each token's
 * segment (struct batch in model.h). Costs little: a segment's pairs are a formula of its length. */
double flops_segments(const struct model_config *m, int64_t seq_len, const int32_t *segments, int64_t batch);

/* What attention over a pair costs, next to 12 * H * d: 1.5 in differential layers, whose values are twice as wide and
 * are weighted by both maps (the program computes their scores once for each half of the values, as counted here
 * once), and 1 + H/d in those of talking heads, for their two mixings. In simplicial layers it is 1, for each of the
 * triples of a query and two keys that attention_pairs() then counts. */
double attention_cost(const struct model_config *m, enum layer_type type);

/* Visible (query, key) pairs of one sequence in a layer: as the mask has them; and as the paper counts them,
 * where every query sees its whole window, or the whole sequence. */
double attention_pairs(const struct model_config *m, enum layer_type type, int64_t seq_len);
double attention_pairs_in_paper(const struct model_config *m, enum layer_type type, int64_t seq_len);

#endif
