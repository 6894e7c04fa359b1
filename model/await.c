/* Waiting for collectives: a pass waits for the parameters of a unit just before it uses them, everything
 * else for all parameters. */
#include "model/model.h"

void model_await(struct model *m, comm_event *event) {
    if (!*event)
        return;
    m->k->range_begin(m->dev, "await ranks", -1);
    m->comm->ops->wait(m->comm, *event);
    m->k->range_end(m->dev);
    *event = 0;
}

void model_group_begin(struct model *m) {
    if (m->comm->ops->group_begin)
        m->comm->ops->group_begin(m->comm);
}

void model_group_end(struct model *m) {
    if (m->comm->ops->group_end)
        m->comm->ops->group_end(m->comm);
}

void model_await_unit(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1] && m->gather_pending; b++)
        model_await(m, &m->gather_events[b]);
}

void model_await_params(struct model *m) {
    for (int b = 0; b < m->partition.bucket_count; b++)
        model_await(m, &m->gather_events[b]);
    m->gather_pending = false;
}
