/* The device of the estimate: its table of functions, its addresses, which have no memory behind them, and
 * the totals. */
#include "kernels/estimate/device.h"

#include <stdlib.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are those of struct kernels */

static void close_device(struct device *dev) {
    free(dev);
}

static struct device_dtypes dtypes(struct device *dev) {
    return (struct device_dtypes){dev->options.precision == DEVICE_BF16 ? DTYPE_BF16 : DTYPE_F32, DTYPE_F32,
                                  DTYPE_F32};
}

/* Addresses without memory, which are never read or written; as far apart as those of real buffers. */
static void *alloc(struct device *dev, size_t bytes, struct error *e) {
    uintptr_t at = dev->next_address;
    dev->next_address += (bytes + 511) / 256 * 256;
    return (void *)at;
}

static void release(struct device *dev, void *data) {}

static size_t memory_available(struct device *dev) {
    return 0; /* not known: the caller compares with gpu_spec.memory itself */
}

/* As in the CUDA backend. In bf16 both the sent and the received elements are staged; otherwise one rank's
 * share, or, for deterministic sums, the shares of all ranks. */
static size_t staging_bytes(struct device *dev, int64_t elements, int ranks, enum dtype dtype,
                            enum dtype wire) {
    if (wire == DTYPE_BF16)
        return 2 * (size_t)elements * dtype_bytes(wire);
    return (size_t)(dev->options.deterministic ? elements : elements / ranks) * dtype_bytes(dtype);
}

/* Operations are counted each time they are queued, so none are kept as a graph. */
static bool graph_replay(struct device *dev, int id) {
    return false;
}

static void graph_begin(struct device *dev, int id) {}

static bool graph_end(struct device *dev, int id) {
    return true;
}

static void range_begin(struct device *dev, const char *name, int index) {
    struct estimate_place *at = &dev->place;
    if (at->depth == RANGES)
        abort(); /* a range without an end */
    at->ranges[at->depth].name = name;
    at->ranges[at->depth++].index = index;
}

static void range_end(struct device *dev) {
    dev->place.depth--;
}

/* At no cost: tokens are copied from pinned memory while the previous step runs. */
static void upload(struct device *dev, tensor dst, const void *host, enum dtype host_dtype) {}

static void set_workspace(struct device *dev, void *data, size_t bytes) {}

/* Each operation says its name before it queues kernels. */
#define OP(name, parameters, arguments)                                                                      \
    static void named_##name parameters {                                                                    \
        dev->place.op = #name;                                                                               \
        estimate_##name arguments;                                                                           \
    }
#define OP_AUX(name, parameters) /* those that training calls are below */
#include "kernels/ops.def"

static void named_step_begin(struct device *dev, struct step_state *state, int64_t step, double lr) {
    dev->place.op = "step_begin";
    estimate_step_begin(dev, state, step, lr);
}

static void named_step_decide(struct device *dev, struct step_state *state, double tokens, double grad_clip,
                              double skip_zscore) {
    dev->place.op = "step_decide";
    estimate_step_decide(dev, state, tokens, grad_clip, skip_zscore);
}

static void named_zero(struct device *dev, void *data, size_t bytes) {
    dev->place.op = "zero";
    estimate_zero(dev, data, bytes);
}

/* Only what training calls; the other members are NULL. */
const struct kernels *kernels_estimate(void) {
    static const struct kernels table = {
        .name = "estimate",
        .close = close_device,
        .dtypes = dtypes,
        .alloc = alloc,
        .release = release,
        .staging_bytes = staging_bytes,
        .memory_available = memory_available,
        .zero = named_zero,
        .upload = upload,
        .message_elements = 16 << 20, /* as cuda.cu */
        .graph_replay = graph_replay,
        .graph_begin = graph_begin,
        .graph_end = graph_end,
        .range_begin = range_begin,
        .range_end = range_end,
        .plan = estimate_plan,
        .set_workspace = set_workspace,
        .rope_table = estimate_rope_table,
        .step_begin = named_step_begin,
        .step_decide = named_step_decide,
#define OP(name, parameters, arguments) .name = named_##name,
#define OP_AUX(name, parameters) /* only decoding, saving and reporting use the others */
#include "kernels/ops.def"
    };
    return &table;
}

struct device *estimate_open(const struct estimate_options *options, struct error *e) {
    struct device *dev = calloc(1, sizeof *dev);
    if (!dev) {
        fail_run(e, "out of memory for the estimate");
        return NULL;
    }
    dev->options = *options;
    dev->next_address = 4096;
    estimate_comm_open(&dev->comm, dev);
    return dev;
}

struct comm *estimate_comm(struct device *dev) {
    return &dev->comm.base;
}

struct estimate_totals estimate_totals(const struct device *dev) {
    struct estimate_totals a = dev->totals;
    a.now = dev->timeline.compute_end;
    memcpy(a.exposed, dev->timeline.exposed, sizeof a.exposed);
    memcpy(a.moving, dev->timeline.moving, sizeof a.moving);
    return a;
}
