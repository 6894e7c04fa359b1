#include "model/generate/generate.h"

#include <math.h>
#include <stdlib.h>

static int32_t most_likely(const float *logits, int64_t vocab) {
    int64_t best = 0;
    for (int64_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return (int32_t)best;
}

/* Uniform in [0, 1), by xorshift64* (Vigna 2016). */
static double uniform(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)((*state * 0x2545f4914f6cdd1du) >> 11) / 9007199254740992.0;
}

static int descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The same as threshold(), without memory and slower: finds the largest values one after the other. */
static float threshold_in_place(const float *logits, int64_t vocab, int64_t k) {
    float value = INFINITY;
    for (int64_t found = 0; found < k && value > -INFINITY;) {
        float next = -INFINITY;
        for (int64_t i = 0; i < vocab; i++)
            if (logits[i] < value && logits[i] > next)
                next = logits[i];
        value = next;
        for (int64_t i = 0; i < vocab; i++)
            found += logits[i] == value;
    }
    return value;
}

/* The k-th largest logit; smaller ones are not sampled. */
static float threshold(const float *logits, int64_t vocab, int64_t k) {
    if (k <= 0 || k >= vocab)
        return -INFINITY;
    float *sorted = malloc((size_t)vocab * sizeof *sorted);
    if (!sorted)
        return threshold_in_place(logits, vocab, k);
    for (int64_t i = 0; i < vocab; i++)
        sorted[i] = logits[i];
    qsort(sorted, (size_t)vocab, sizeof *sorted, descending);
    float result = sorted[k - 1];
    free(sorted);
    return result;
}

int32_t sample_token(float *logits, int64_t vocab, const struct sampling *s, uint64_t *state) {
    int32_t top = most_likely(logits, vocab);
    if (s->temperature <= 0)
        return top;
    float least = threshold(logits, vocab, s->top_k), max = logits[top];
    double total = 0;
    for (int64_t i = 0; i < vocab; i++) {
        double weight = logits[i] < least ? 0 : exp((double)(logits[i] - max) / s->temperature);
        logits[i] = (float)weight;
        total += (double)logits[i];
    }
    double point = uniform(state) * total;
    for (int64_t i = 0; i < vocab; i++) {
        point -= (double)logits[i];
        if (point < 0)
            return (int32_t)i;
    }
    return top;
}

int generate(struct decoder *d, const int32_t *prompt, int64_t length, int64_t count,
             const struct sampling *s, emit_token *emit, void *context, struct error *e) {
    int64_t vocab = d->m->config.vocab_size;
    float *logits = malloc((size_t)vocab * sizeof *logits);
    if (!logits)
        return fail_run(e, "out of memory for %lld logits", (long long)vocab);
    uint64_t state = (s->seed + 1) * 0x9e3779b97f4a7c15u;
    decoder_reset(d);
    decoder_feed(d, prompt, length, logits);
    int status = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(logits[0])) {
            status = fail_run(
                e, "the logits are not finite: the weights have diverged; use an earlier checkpoint");
            break;
        }
        int32_t token = sample_token(logits, vocab, s, &state);
        if (!emit(context, token))
            break;
        if (i + 1 < count)
            decoder_feed(d, &token, 1, logits);
    }
    free(logits);
    return status;
}
