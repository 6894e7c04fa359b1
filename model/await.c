/* What is on its way between ranks, and waiting for it: where a pass comes to parameters that the last update
 * changed, and where anything else reads them. */
#include "model/model.h"

void model_await(struct model *m, comm_event *event) {
    if (!*event)
        return;
    m->k->range_begin(m->dev, "await ranks", -1);
    m->comm->ops->wait(m->comm, *event);
    m->k->range_end(m->dev);
    *event = 0;
}

void model_await_unit(struct model *m, int unit) {
    const struct partition *p = &m->partition;
    for (int b = p->first_bucket[unit]; b < p->first_bucket[unit + 1] && m->gathering; b++)
        model_await(m, &m->gathered[b]);
}

void model_await_params(struct model *m) {
    for (int b = 0; b < m->partition.bucket_count; b++)
        model_await(m, &m->gathered[b]);
    m->gathering = false;
}
