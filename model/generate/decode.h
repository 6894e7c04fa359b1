/* Decoding with a key/value cache: tokens in, the logits of the next one out.
 *
 * A token is P virtual tokens in an IHA layer, so a step appends P keys and values. A local layer's cache is
 * a ring of its window and one chunk; a global layer's holds everything. */
#ifndef IHA_MODEL_GENERATE_DECODE_H
#define IHA_MODEL_GENERATE_DECODE_H

#include "model/model.h"

struct decoder {
    struct model *m;
    int64_t capacity; /* the most tokens in all */
    int64_t chunk;    /* the most tokens in one pass */
    int64_t position; /* tokens fed so far */
    void *memory;     /* caches and buffers, one allocation */
    size_t bytes;
    void *workspace;
    size_t workspace_bytes;
    tensor rope, *cache_k, *cache_v; /* per layer [1, ring, H, d] */
    tensor *folded_weight,
        *folded_bias; /* per layer, of folded ones; computed before a sequence's first token */
    tensor tokens, x, y, delta, qkv, q, k, v, o_pseudo, o, up, act,
        logits; /* up: [n,F], with a gate [n,2F] */
    void *norm_saved;
};

/* For at most `capacity` tokens, in passes of at most `chunk`. The decoder has buffers of its own: the
 * model's are left as they are. EXIT_USER: the model is not causal, or has fewer learned positions than
 * `capacity`. */
int decoder_create(struct decoder *d, struct model *m, int64_t capacity, int64_t chunk, struct error *e);
void decoder_free(struct decoder *d);
void decoder_reset(struct decoder *d);

/* Append n tokens (any n: it is split into chunks). logits [V]: of the token after the last; NULL: not
 * wanted. The caller keeps position + n <= capacity. */
void decoder_feed(struct decoder *d, const int32_t *tokens, int64_t n, float *logits);

#endif
