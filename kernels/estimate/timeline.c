#include "kernels/estimate/timeline.h"

void timeline_compute(struct timeline *t, double seconds) {
    t->compute_end += seconds;
}

int64_t timeline_send(struct timeline *t, enum estimate_message kind, double seconds) {
    double start = t->compute_end > t->link_end ? t->compute_end : t->link_end;
    int64_t message = ++t->last;
    t->link_end = start + seconds;
    t->moving[kind] += seconds;
    t->messages[message % TIMELINE_MESSAGES].arrives = t->link_end;
    t->messages[message % TIMELINE_MESSAGES].kind = kind;
    return message;
}

void timeline_wait(struct timeline *t, int64_t message) {
    /* Overwritten: so old that later messages have already been waited for, and messages arrive in order. */
    if (message == 0 || message <= t->last - TIMELINE_MESSAGES)
        return;
    double arrives = t->messages[message % TIMELINE_MESSAGES].arrives;
    if (arrives <= t->compute_end)
        return;
    t->exposed[t->messages[message % TIMELINE_MESSAGES].kind] += arrives - t->compute_end;
    t->compute_end = arrives;
}
