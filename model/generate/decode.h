/* Decoding with a key/value cache: tokens in, the logits of the next one out.
 *
 * A token is P virtual tokens in an IHA layer, so a step appends P keys and values. Local layers keep a ring
 * as long as their window and one chunk; global layers keep everything. */
#ifndef IHA_MODEL_GENERATE_DECODE_H
#define IHA_MODEL_GENERATE_DECODE_H

#include "model/model.h"

struct decoder {
    struct model *m;
    int64_t capacity; /* tokens */
    int64_t chunk;    /* tokens at most in one pass */
    int64_t position; /* tokens seen */
    void *memory;     /* caches and buffers, one allocation */
    size_t bytes;
    void *workspace;
    size_t workspace_bytes;
    tensor rope, *cache_k, *cache_v; /* per layer [1, ring, H, d] */
    tensor tokens, x, y, delta, qkv, q, k, v, o_pseudo, o, up, gate, act, logits;
    void *norm_saved;
};

/* For at most `capacity` tokens, fed at most `chunk` at a time. The model keeps its own buffers. Refuses
 * (EXIT_USER) a model that is not causal, or learned positions fewer than the capacity. */
int decoder_create(struct decoder *d, struct model *m, int64_t capacity, int64_t chunk, struct error *e);
void decoder_free(struct decoder *d);
void decoder_reset(struct decoder *d);

/* Append n tokens (any n: it is split into chunks) and give the logits [V] after the last. The caller keeps
 * position + n <= capacity. */
void decoder_feed(struct decoder *d, const int32_t *tokens, int64_t n, float *logits);

#endif
