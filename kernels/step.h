/* The state of an optimizer step, kept on the device: loss, gradient norm, and whether it is applied. */
#ifndef IHA_KERNELS_STEP_H
#define IHA_KERNELS_STEP_H

#include <math.h>
#include <stdint.h>

/* Carried from step to step, and in checkpoints from run to run. */
struct step_history {
    int64_t updates;   /* steps applied so far: AdamW's t */
    int32_t skips_run; /* steps skipped in a row up to now */
    /* Running mean and variance of grad_norm over the applied steps: exact for the first NORM_MEMORY steps,
     * an exponential average after that. */
    int64_t norm_count;
    double norm_mean, norm_variance;
};

/* One optimizer step. step_begin sets the first two members; the rest is computed on the device and may be
 * read back later. */
struct step_state {
    double lr;
    int64_t step;
    /* One all_reduce sums these three. */
    double loss;      /* sum over the step of scale * (nats of every target); step_decide makes it the mean */
    double targets;   /* targets that count: those >= 0 */
    double sumsq;     /* of all gradients so far */
    double grad_norm; /* of the mean loss */
    double factor;    /* on the gradients: from sum * scale to the mean over targets, and clipping */
    int32_t skip;     /* enum step_skip */
    double zscore;    /* (grad_norm - mean) / standard deviation; 0 while the history is short */
    struct step_history history; /* including this step */
};

enum step_skip {
    STEP_APPLIED,
    STEP_NOT_FINITE, /* the loss, or the norm of the gradients */
    STEP_OUTLIER,    /* zscore above skip_zscore */
    STEP_EMPTY,      /* no target counts: nothing is updated, and nothing is wrong */
};
enum { NORM_MEMORY = 128, NORM_HISTORY = 16 /* applied steps before there is a zscore */ };

/* The decision from loss, targets and sumsq, for the step_decide of every backend. `tokens`: 1 / scale. Where
 * all tokens of the step are targets, tokens / targets is exactly 1.
 *   d = norm - mean;  w = 1 / min(count + 1, NORM_MEMORY);  mean += w d;  variance = (1-w)(variance + w d^2)
 * A skipped step changes neither the mean and variance nor t, AdamW's step count. */
#ifdef __CUDACC__
#define STEP_DECISION static inline __host__ __device__
#else
#define STEP_DECISION static inline
#endif
STEP_DECISION void step_decision(struct step_state *s, double tokens, double grad_clip, double skip_zscore) {
    struct step_history *h = &s->history;
    double mean = s->targets > 0 ? tokens / s->targets : 0;
    double norm = sqrt(s->sumsq) * mean, d = norm - h->norm_mean, deviation = sqrt(h->norm_variance);
    s->loss *= mean;
    bool has_zscore = h->norm_count >= NORM_HISTORY && deviation > 0;
    s->grad_norm = norm;
    s->factor = grad_clip > 0 && norm > grad_clip ? grad_clip / norm * mean : mean;
    s->zscore = has_zscore && isfinite(norm) ? d / deviation : 0;
    if (s->targets == 0) {
        s->zscore = 0;
        s->skip = STEP_EMPTY;
        return;
    }
    s->skip = STEP_APPLIED;
    if (!isfinite(s->loss) || !isfinite(norm))
        s->skip = STEP_NOT_FINITE;
    else if (skip_zscore > 0 && s->zscore > skip_zscore)
        s->skip = STEP_OUTLIER;
    h->skips_run = s->skip ? h->skips_run + 1 : 0;
    if (s->skip)
        return;
    h->updates++;
    h->norm_count++;
    double w = 1.0 / (h->norm_count < NORM_MEMORY ? (double)h->norm_count : (double)NORM_MEMORY);
    h->norm_mean += w * d;
    h->norm_variance = (1 - w) * (h->norm_variance + w * d * d);
}

#endif
