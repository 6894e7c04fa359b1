/* What the files of kernels/estimate/ share. */
#ifndef IHA_KERNELS_ESTIMATE_DEVICE_H
#define IHA_KERNELS_ESTIMATE_DEVICE_H

#include "kernels/estimate/estimate.h"

/* Visible pairs of one sequence and head, counted once for each spec: a model has a few. */
enum { PAIRS_KEPT = 4 };
struct counted_pairs {
    struct attention_spec spec;
    double pairs;
};

struct estimate_comm {
    struct comm base;
    struct device *dev;
    enum dtype wire; /* gradients travel in it */
};

struct device {
    struct estimate_options options;
    struct estimate_totals account;
    struct timeline timeline;
    struct estimate_comm comm;
    uintptr_t allocated; /* the next address that is handed out and never used */
    struct counted_pairs pairs[PAIRS_KEPT];
    int pairs_count;
};

void estimate_comm_open(struct estimate_comm *c, struct device *dev);

#endif
