/* The communicator of the estimate: messages take time on the timeline and move no data. */
#include "kernels/estimate/device.h"

static struct device *device_of(struct comm *c) {
    return ((struct estimate_comm *)c)->dev;
}

static comm_event send_message(struct comm *c, enum estimate_message kind, double bytes, double seconds) {
    struct device *dev = device_of(c);
    dev->totals.messages[kind]++;
    dev->totals.message_bytes[kind] += bytes;
    return timeline_send(&dev->timeline, kind, seconds);
}

static comm_event collective(struct comm *c, enum estimate_message kind, tensor buffer, enum dtype wire) {
    const struct estimate_options *o = &device_of(c)->options;
    double bytes = (double)tensor_count(buffer) * (double)dtype_bytes(wire);
    return send_message(c, kind, bytes, collective_seconds(o->gpu, o->link, o->ranks, bytes));
}

static comm_event reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    (void)piece, (void)accumulate;
    return collective(c, MESSAGE_REDUCE_SCATTER, buffer, ((struct estimate_comm *)c)->wire);
}

static comm_event all_gather(struct comm *c, tensor buffer) {
    return collective(c, MESSAGE_ALL_GATHER, buffer, buffer.dtype);
}

static void wait_event(struct comm *c, comm_event event) {
    timeline_wait(&device_of(c)->timeline, event);
}

static void all_reduce(struct comm *c, double *values, int count) {
    const struct estimate_options *o = &device_of(c)->options;
    (void)values;
    if (o->ranks > 1)
        wait_event(c, send_message(c, MESSAGE_ALL_REDUCE, (double)count * sizeof *values,
                                   all_reduce_seconds(o->link, o->ranks)));
}

static int reserve(struct comm *c, int64_t elements, enum dtype dtype, enum dtype wire, struct error *e) {
    (void)elements, (void)dtype, (void)e;
    ((struct estimate_comm *)c)->wire = wire;
    return 0;
}

static void do_nothing(struct comm *c) {
    (void)c;
}

void estimate_comm_open(struct estimate_comm *c, struct device *dev) {
    static const struct comm_ops ops = {
        .name = "estimate",
        .queued = true,
        .close = do_nothing,
        .reserve = reserve,
        .reduce_scatter = reduce_scatter,
        .all_gather = all_gather,
        .all_reduce = all_reduce,
        .wait = wait_event,
        .progress = do_nothing,
    };
    int ranks = dev->options.ranks;
    int local = ranks < NODE_GPUS ? ranks : NODE_GPUS;
    *c = (struct estimate_comm){.base = {.ops = &ops, .ranks = ranks, .local_ranks = local}, .dev = dev};
}
