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
    double loss;      /* sum over the step of scale * (nats of every counted token) */
    double sumsq;     /* of all gradients so far; directly after loss, so that one all_reduce sums both */
    double grad_norm; /* sqrt(sumsq) */
    double clip;      /* factor on the gradients */
    int32_t skip;     /* enum step_skip */
    double zscore;    /* (grad_norm - mean) / standard deviation; 0 while the history is short */
    struct step_history history; /* including this step */
};

enum step_skip {
    STEP_APPLIED,
    STEP_NOT_FINITE, /* the loss, or the norm of the gradients */
    STEP_OUTLIER,    /* zscore above skip_zscore */
};
enum { NORM_MEMORY = 128, NORM_HISTORY = 16 /* applied steps before there is a zscore */ };

/* The decision from loss and sumsq, for the step_decide of every backend.
 *   d = norm - mean;  w = 1 / min(count + 1, NORM_MEMORY);  mean += w d;  variance = (1-w)(variance + w d^2)
 * A skipped step changes neither the mean and variance nor t, AdamW's step count. */
#ifdef __CUDACC__
#define STEP_DECISION static inline __host__ __device__
#else
#define STEP_DECISION static inline
#endif
STEP_DECISION void step_decision(struct step_state *s, double grad_clip, double skip_zscore) {
    struct step_history *h = &s->history;
    double norm = sqrt(s->sumsq), d = norm - h->norm_mean, deviation = sqrt(h->norm_variance);
    bool has_zscore = h->norm_count >= NORM_HISTORY && deviation > 0;
    s->grad_norm = norm;
    s->clip = grad_clip > 0 && norm > grad_clip ? grad_clip / norm : 1;
    s->zscore = has_zscore && isfinite(norm) ? d / deviation : 0;
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
