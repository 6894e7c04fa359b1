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

/* The largest of the values below `bound`, and how often it occurs; -INFINITY where there is none. */
static float largest_below(const float *values, int64_t count, float bound, int64_t *times) {
    float largest = -INFINITY;
    for (int64_t i = 0; i < count; i++)
        if (values[i] < bound && values[i] > largest)
            largest = values[i];
    *times = 0;
    for (int64_t i = 0; i < count; i++)
        *times += values[i] == largest;
    return largest;
}

/* The same as threshold(), without memory and slower: finds the largest values one after the other. */
static float threshold_in_place(const float *logits, int64_t vocab, int64_t k) {
    float value = INFINITY;
    int64_t times;
    for (int64_t found = 0; found < k && value > -INFINITY; found += times)
        value = largest_below(logits, vocab, value, &times);
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

/* The weights that remain in top-p sampling: those above `value`, and the first `ties` that equal it. */
struct nucleus {
    float value;
    int64_t ties;
};

/* Count one more weight, the next in descending order. Returns whether the sum has reached `enough`. */
static bool nucleus_add(struct nucleus *n, float weight, double *sum, double enough) {
    n->ties = weight == n->value ? n->ties + 1 : 1;
    n->value = weight;
    *sum += (double)weight;
    return *sum >= enough;
}

/* The fewest largest weights whose sum is at least `enough`. */
static struct nucleus find_nucleus(const float *weights, int64_t vocab, double enough) {
    struct nucleus n = {INFINITY, 0};
    double sum = 0;
    int64_t count = 0, times;
    float *sorted = malloc((size_t)vocab * sizeof *sorted);
    for (int64_t i = 0; sorted && i < vocab; i++)
        if (weights[i] > 0)
            sorted[count++] = weights[i];
    if (sorted)
        qsort(sorted, (size_t)count, sizeof *sorted, descending);
    for (int64_t i = 0; sorted && i < count && !nucleus_add(&n, sorted[i], &sum, enough);)
        i++;
    free(sorted);
    if (sorted)
        return n;
    /* The same without memory, and slower. */
    for (float next = largest_below(weights, vocab, INFINITY, &times); next > 0;
         next = largest_below(weights, vocab, next, &times))
        for (int64_t i = 0; i < times; i++)
            if (nucleus_add(&n, next, &sum, enough))
                return n;
    return n;
}

/* Set the weights outside the nucleus to 0. Returns the sum of the others. */
static double keep_nucleus(float *weights, int64_t vocab, double enough) {
    struct nucleus n = find_nucleus(weights, vocab, enough);
    double total = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (weights[i] < n.value || (weights[i] == n.value && n.ties-- <= 0))
            weights[i] = 0;
        total += (double)weights[i];
    }
    return total;
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
    if (s->top_p < 1)
        total = keep_nucleus(logits, vocab, s->top_p * total);
    double point = uniform(state) * total;
    for (int64_t i = 0; i < vocab; i++) {
        point -= (double)logits[i];
        if (point < 0)
            return (int32_t)i;
    }
    return top;
}

uint64_t sampling_state(const struct sampling *s) {
    return (s->seed + 1) * 0x9e3779b97f4a7c15u;
}

int generate_from(struct decoder *d, const int32_t *tokens, int64_t length, int64_t count,
                  const struct sampling *s, uint64_t *state, emit_token *emit, void *context, int32_t *unfed,
                  struct error *e) {
    int64_t vocab = d->m->config.vocab_size;
    int32_t token = -1;
    float *logits = malloc((size_t)vocab * sizeof *logits);
    if (!logits)
        return fail_run(e, "out of memory for %lld logits", (long long)vocab);
    decoder_feed(d, tokens, length, logits);
    int status = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(logits[0])) {
            status = fail_run(
                e, "the logits are not finite: the weights have diverged; use an earlier checkpoint");
            break;
        }
        token = sample_token(logits, vocab, s, state);
        if (!emit(context, token))
            break;
        if (i + 1 < count)
            decoder_feed(d, &token, 1, logits);
    }
    free(logits);
    if (unfed)
        *unfed = token;
    return status;
}

int generate(struct decoder *d, const int32_t *prompt, int64_t length, int64_t count,
             const struct sampling *s, emit_token *emit, void *context, struct error *e) {
    uint64_t state = sampling_state(s);
    decoder_reset(d);
    return generate_from(d, prompt, length, count, s, &state, emit, context, NULL, e);
}
