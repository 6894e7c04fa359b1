#include "kernels/estimate/timeline.h"

void timeline_compute(struct timeline *t, double seconds) {
    t->computed += seconds;
}

int64_t timeline_send(struct timeline *t, enum estimate_message kind, double seconds) {
    double start = t->computed > t->carried ? t->computed : t->carried;
    int64_t message = ++t->last;
    t->carried = start + seconds;
    t->moving[kind] += seconds;
    t->messages[message % TIMELINE_MESSAGES].arrives = t->carried;
    t->messages[message % TIMELINE_MESSAGES].kind = kind;
    return message;
}

void timeline_wait(struct timeline *t, int64_t message) {
    /* What is so old that its place was taken has arrived: later ones, on which something waited, have. */
    if (message == 0 || message <= t->last - TIMELINE_MESSAGES)
        return;
    double arrives = t->messages[message % TIMELINE_MESSAGES].arrives;
    if (arrives <= t->computed)
        return;
    t->exposed[t->messages[message % TIMELINE_MESSAGES].kind] += arrives - t->computed;
    t->computed = arrives;
}
