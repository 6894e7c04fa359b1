#include "model/train/schedule.h"

#include <math.h>

static const double WSD_DECAY = 0.2; /* fraction of all steps over which wsd decays */
static const double MUON_FIRST_MOMENTUM = 0.85;

/* Fraction of [begin, end) done at `step`, in [0, 1]. */
static double progress(int64_t step, int64_t begin, int64_t end) {
    if (step <= begin)
        return 0;
    return step >= end ? 1 : (double)(step - begin) / (double)(end - begin);
}

double schedule_lr(const struct train_config *t, int64_t step) {
    if (step < t->warmup_steps)
        return t->lr * (double)(step + 1) / (double)t->warmup_steps;
    double r = progress(step, t->warmup_steps, t->total_steps);
    switch (t->schedule) {
    case SCHEDULE_COSINE:
        return t->min_lr + (t->lr - t->min_lr) * 0.5 * (1 + cos(3.14159265358979323846 * r));
    case SCHEDULE_LINEAR:
        return t->lr - (t->lr - t->min_lr) * r;
    case SCHEDULE_WSD: {
        int64_t decay = (int64_t)(WSD_DECAY * (double)t->total_steps);
        return t->lr - (t->lr - t->min_lr) * progress(step, t->total_steps - decay, t->total_steps);
    }
    case SCHEDULE_CONSTANT:
        break;
    }
    return t->lr;
}

double schedule_muon_momentum(const struct train_config *t, int64_t step) {
    double first = t->muon_momentum < MUON_FIRST_MOMENTUM ? t->muon_momentum : MUON_FIRST_MOMENTUM;
    return first + (t->muon_momentum - first) *
                       (t->muon_momentum_warmup > 0 ? progress(step, 0, t->muon_momentum_warmup) : 1);
}

int epochs_to_steps(struct train_config *t, int64_t sequences, struct error *e) {
    const double most = (double)((int64_t)1 << 30);
    if (!(t->epochs > 0))
        return 0;
    double steps = t->epochs * (double)sequences * (double)t->seq_len / (double)t->batch_tokens;
    /* 1.1 epochs of 10 steps are 11.000000000000002 as doubles. */
    double whole = ceil(steps * (1 - 1e-12));
    if (whole > most)
        return fail_user(e, "train.epochs = %g of %lld sequences are %.0f steps; the limit is %.0f: lower it",
                         t->epochs, (long long)sequences, whole, most);
    t->total_steps = whole > 1 ? (int64_t)whole : 1;
    if (t->warmup_steps < 0)
        t->warmup_steps = derived_warmup(t);
    if (t->warmup_steps > t->total_steps)
        return fail_user(
            e,
            "train.warmup_steps = %lld is above the %lld steps of train.epochs = %g (%lld sequences); "
            "lower it or train longer",
            (long long)t->warmup_steps, (long long)t->total_steps, t->epochs, (long long)sequences);
    return 0;
}
