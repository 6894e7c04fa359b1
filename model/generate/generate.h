/* Sampling from a model, token by token. */
#ifndef IHA_MODEL_GENERATE_GENERATE_H
#define IHA_MODEL_GENERATE_GENERATE_H

#include "model/generate/decode.h"

struct sampling {
    double temperature; /* 0: the most likely token */
    int64_t top_k;      /* 0: all */
    double top_p;       /* the fewest most likely tokens whose probabilities sum to it or more; 1: all */
    uint64_t seed;
};

/* Reset the decoder, feed the prompt, then sample up to `count` tokens and pass each to `emit`, which returns false
 * to stop. The decoder's capacity must be at least length + count. */
typedef bool emit_token(void *context, int32_t token);
int generate(struct decoder *d, const int32_t *prompt, int64_t length, int64_t count,
             const struct sampling *s, emit_token *emit, void *context, struct error *e);

/* The same with what the decoder has been fed before: feed these tokens (one or more), then sample. state: the random
 * numbers' (sampling_state). *unfed, unless unfed is NULL: the last token sampled, which is not fed; -1: none. */
int generate_from(struct decoder *d, const int32_t *tokens, int64_t length, int64_t count,
                  const struct sampling *s, uint64_t *state, emit_token *emit, void *context, int32_t *unfed,
                  struct error *e);

/* The state with which sampling by s->seed begins. */
uint64_t sampling_state(const struct sampling *s);

/* Sample from logits [V], which are overwritten. Advances *state. */
int32_t sample_token(float *logits, int64_t vocab, const struct sampling *s, uint64_t *state);

#endif
