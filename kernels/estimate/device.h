/* What the files of kernels/estimate/ share. */
#ifndef IHA_KERNELS_ESTIMATE_DEVICE_H
#define IHA_KERNELS_ESTIMATE_DEVICE_H

#include "kernels/estimate/estimate.h"

/* Visible pairs of one sequence and head, counted once for each spec; a model has only a few specs. */
enum { PAIRS_KEPT = 4 };
struct counted_pairs {
    struct attention_spec spec;
    double pairs;
};

struct estimate_comm {
    struct comm base;
    struct device *dev;
    enum dtype wire; /* the type in which gradients are sent */
};

/* Where in a step the next kernel is: the ranges around it, and the operation that queues it. */
enum { RANGES = 16 };
struct estimate_place {
    struct {
        const char *name;
        int index;
    } ranges[RANGES];
    int depth;
    const char *op;
    double rows, columns, inner; /* of the next kernel, if it is a matrix product */
};

struct device {
    struct estimate_options options;
    struct estimate_place place;
    struct estimate_totals totals;
    struct timeline timeline;
    struct estimate_comm comm;
    uintptr_t next_address; /* of the next allocation; never read or written */
    struct counted_pairs pairs[PAIRS_KEPT];
    int pairs_count;
};

void estimate_comm_open(struct estimate_comm *c, struct device *dev);

int estimate_plan(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e);
void estimate_zero(struct device *dev, void *data, size_t bytes);

/* The operations: estimate_embed, estimate_embed_backward, ... */
#define OP(name, parameters, arguments) op_##name estimate_##name;
#include "kernels/ops.def"

#endif
