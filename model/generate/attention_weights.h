/* The attention weights of one layer for one sequence, to be looked at: `train_iha attention`. */
#ifndef IHA_MODEL_GENERATE_ATTENTION_WEIGHTS_H
#define IHA_MODEL_GENERATE_ATTENTION_WEIGHTS_H

#include "model/model.h"

/* The text of the tokens: token t is bytes [ends[t-1], ends[t]) of `bytes`. */
struct token_texts {
    const char *bytes;
    const int64_t *ends; /* [T] */
};

/* Run the layers up to `layer` on the tokens [T], where T is that of a model created for one sequence without
 * segments, and write a safetensors file:
 *
 *   weights     f32 [H,P,P,T,T]  weights[h,p,q,t,u]: how much virtual token t*P + p attends to u*P + q in head h, 0
 *                                where it does not see it; over q and u they sum to 1. P = 1 in MHA layers
 *   tokens      i32 [T]
 *   text        u8  [bytes]      the tokens' text, one after the other, and where each ends
 *   text_ends   i64 [T]
 *
 * They are computed from the layer's queries and keys on the host, in double. On an error no file is left. */
int attention_weights_write(struct model *m, const int32_t *tokens, int layer,
                            const struct token_texts *texts, const char *path, struct error *e);

#endif
