/* Two queues of one GPU as times on paper: one computes, the other carries messages. A message sets out when
 * what was queued before it has been computed and the messages before it are through; waiting for one holds
 * up computing until it has arrived. */
#ifndef IHA_KERNELS_ESTIMATE_TIMELINE_H
#define IHA_KERNELS_ESTIMATE_TIMELINE_H

#include <stdint.h>

enum estimate_message { MESSAGE_REDUCE_SCATTER, MESSAGE_ALL_GATHER, MESSAGE_ALL_REDUCE, MESSAGES };

/* How many of the latest messages can be waited for: two a bucket, of which there are about 2^16. */
enum { TIMELINE_MESSAGES = 1 << 18 };

struct timeline {
    double computed; /* s: when the computing queue is done with what it was given */
    double carried;  /* the same of the other */
    int64_t last;    /* messages so far, numbered from 1 */
    struct {
        double arrives;
        enum estimate_message kind;
    } messages[TIMELINE_MESSAGES]; /* by number modulo their count */
    double exposed[MESSAGES];      /* s that computing waited, by what it waited for */
    double moving[MESSAGES];       /* s that messages took on the link */
};

void timeline_compute(struct timeline *t, double seconds);
/* Returns the message's number, to be waited for. */
int64_t timeline_send(struct timeline *t, enum estimate_message kind, double seconds);
/* 0: nothing to wait for. */
void timeline_wait(struct timeline *t, int64_t message);

#endif
