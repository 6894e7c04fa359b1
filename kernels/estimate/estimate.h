/* A GPU on paper, with its communicator, behind the tables of kernels.h and comm.h: it computes nothing and
 * allocates nothing, but counts what each operation would cost and keeps a timeline. The model's own code
 * drives it, so operations and messages are those of a real run, in their real order.
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
    PAPER_MATMUL,
    PAPER_ATTENTION,
    PAPER_MIXING, /* qkv_mix, plain RoPE too, and collapse */
    PAPER_CLASSIFIER,
    PAPER_ELEMENTWISE, /* norm, activation, embedding, clearing buffers */
    PAPER_OPTIMIZER,
    PAPER_PARTS
};

struct estimate_options {
    const struct gpu_spec *gpu;
    const struct link_spec *link;
    int ranks; /* this is rank 0 of them */
    enum device_precision precision;
    bool deterministic;
};

/* What has been counted since estimate_open. */
struct estimate_totals {
    double seconds[PAPER_PARTS];
    double flops[PAPER_PARTS]; /* as model/flops.h counts: scores that attention's backward repeats do not */
    double bytes[PAPER_PARTS];
    int64_t launches;
    int64_t messages[MESSAGES];
    double message_bytes[MESSAGES]; /* of the whole buffers, in the type they travel in */
    double now;                     /* s: computing is done with everything so far */
    double exposed[MESSAGES], moving[MESSAGES];
};

const struct kernels *kernels_estimate(void);
/* NULL and *e when memory runs out. */
struct device *estimate_open(const struct estimate_options *options, struct error *e);
/* Of the device, which closes it. */
struct comm *estimate_comm(struct device *dev);
struct estimate_totals estimate_totals(const struct device *dev);

#endif
