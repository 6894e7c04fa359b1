#include "model/train/schedule.h"

#include <math.h>

static const double WSD_DECAY = 0.2; /* fraction of all steps over which wsd decays */

/* Fraction of [begin, end) done at `step`, in [0, 1]. */
static double progress(int64_t step, int64_t begin, int64_t end) {
    if (step <= begin)
        return 0;
    return step >= end ? 1 : (double)(step - begin) / (double)(end - begin);
}

double schedule_lr(const struct train_config *t, int64_t step) {
    if (step < t->warmup_steps)
        return t->lr * (double)(step + 1) / (double)t->warmup_steps;
    double r = progress(step, t->warmup_steps, t->steps);
    switch (t->schedule) {
    case SCHEDULE_COSINE:
        return t->min_lr + (t->lr - t->min_lr) * 0.5 * (1 + cos(3.14159265358979323846 * r));
    case SCHEDULE_LINEAR:
        return t->lr - (t->lr - t->min_lr) * r;
    case SCHEDULE_WSD: {
        int64_t decay = (int64_t)(WSD_DECAY * (double)t->steps);
        return t->lr - (t->lr - t->min_lr) * progress(step, t->steps - decay, t->steps);
    }
    case SCHEDULE_CONSTANT:
        break;
    }
    return t->lr;
}
