/* A backend that estimates: a GPU and its communicator behind the tables of kernels.h and comm.h, which
 * compute and allocate nothing, but count what each operation would cost and keep a timeline. The model's own
 * code calls it, so operations and messages are those of a real run, in the same order.
 *
 * An operation takes  max(FLOPs / rate, bytes / bandwidth) + launch,  where bytes are each input read once
 * and each output written once. A linear layer's backward is two products, a classifier three and a pass over
 * the logits for each chunk of rows. */
#ifndef IHA_KERNELS_ESTIMATE_ESTIMATE_H
#define IHA_KERNELS_ESTIMATE_ESTIMATE_H

#include "kernels/kernels.h"
#include "kernels/estimate/hardware.h"
#include "kernels/estimate/timeline.h"

enum estimate_part {
    ESTIMATE_MATMUL,
    ESTIMATE_ATTENTION,
    ESTIMATE_MIXING, /* qkv_mix, plain RoPE too, and collapse */
    ESTIMATE_CLASSIFIER,
    ESTIMATE_ELEMENTWISE, /* norm, activation, embedding, clearing buffers */
    ESTIMATE_OPTIMIZER,
    ESTIMATE_PARTS
};

/* One kernel as it is queued. */
struct estimate_launch {
    const char *op;    /* its name in kernels/ops.def */
    const char *phase; /* the outermost range that it is in: "forward", "backward", "update"; "": none */
    int layer;         /* -1: none */
    enum estimate_part part;
    double rows, columns, inner; /* of a matrix product [rows, inner] x [inner, columns]; 0: it is none */
    double flops, bytes;         /* that it executes and moves */
    double floor;                /* s that these take at the GPU's rates, the longer of the two */
};

struct estimate_options {
    const struct gpu_spec *gpu;
    const struct link_spec *link;
    int ranks; /* this is rank 0 of them */
    enum device_precision precision;
    bool deterministic;
    /* Called for every kernel; NULL: not wanted. */
    void (*launched)(void *context, const struct estimate_launch *launch);
    void *context;
};

/* What has been counted since estimate_open. */
struct estimate_totals {
    double seconds[ESTIMATE_PARTS];
    double flops[ESTIMATE_PARTS]; /* as in model/flops.h: without the scores that backward computes again */
    double bytes[ESTIMATE_PARTS];
    int64_t launches;
    int64_t messages[MESSAGES];
    double message_bytes[MESSAGES]; /* of the whole buffers, in the type that is sent */
    double now;                     /* s from the start to the end of all kernels so far */
    double exposed[MESSAGES], moving[MESSAGES];
};

const struct kernels *kernels_estimate(void);
/* NULL and *e when memory runs out. */
struct device *estimate_open(const struct estimate_options *options, struct error *e);
/* The device's communicator; closing the device closes it. */
struct comm *estimate_comm(struct device *dev);
struct estimate_totals estimate_totals(const struct device *dev);

#endif
