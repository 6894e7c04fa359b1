/* The learning rate of each step. */
#ifndef IHA_MODEL_TRAIN_SCHEDULE_H
#define IHA_MODEL_TRAIN_SCHEDULE_H

#include "kernels/error.h"
#include "model/config/config.h"

/* Step counts from 0. Warm-up rises linearly and reaches lr at step warmup_steps - 1; then, with r in [0, 1]
 * the fraction of the remaining steps done: cosine min + (lr - min)(1 + cos(pi r))/2, linear lr - (lr - min) r,
 * constant lr, wsd lr until the last fifth of all steps, then linear to min. */
double schedule_lr(const struct train_config *t, int64_t step);

/* Muon's momentum in this step: rises linearly over the first muon_momentum_warmup steps, from 0.85 or, if that is
 * less, from muon_momentum itself. */
double schedule_muon_momentum(const struct train_config *t, int64_t step);

/* Where train.epochs is given, t->total_steps from the number of training sequences: epochs * sequences * seq_len /
 * batch_tokens, rounded up, so that every sequence is seen. EXIT_USER: more steps than train.steps takes, or fewer
 * than warmup_steps. */
int epochs_to_steps(struct train_config *t, int64_t sequences, struct error *e);

#endif
