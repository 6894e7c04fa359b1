/* Sampling from a model, token by token. */
#ifndef IHA_MODEL_GENERATE_GENERATE_H
#define IHA_MODEL_GENERATE_GENERATE_H

#include "model/generate/decode.h"

struct sampling {
    double temperature; /* 0: the most likely token */
    int64_t top_k;      /* 0: all */
    uint64_t seed;
};

/* Feed the prompt, then up to `count` times sample a token and hand it to `emit`, which returns false to
 * stop. The decoder is reset first; its capacity must hold prompt and count. */
typedef bool emit_token(void *context, int32_t token);
int generate(struct decoder *d, const int32_t *prompt, int64_t length, int64_t count,
             const struct sampling *s, emit_token *emit, void *context, struct error *e);

/* One draw from logits [V], which are overwritten. *state is advanced. */
int32_t sample_token(float *logits, int64_t vocab, const struct sampling *s, uint64_t *state);

#endif
