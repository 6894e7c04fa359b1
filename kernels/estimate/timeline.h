/* The time of a GPU with two queues, one of kernels and one of messages. A message starts when the kernels
 * queued before it are done and the messages before it have arrived. Waiting for a message delays the next
 * kernel until it has arrived. */
#ifndef IHA_KERNELS_ESTIMATE_TIMELINE_H
#define IHA_KERNELS_ESTIMATE_TIMELINE_H

#include <stdint.h>

enum estimate_message { MESSAGE_REDUCE_SCATTER, MESSAGE_ALL_GATHER, MESSAGE_ALL_REDUCE, MESSAGES };

/* How many of the latest messages can be waited for: two a bucket, and about 2^16 buckets. */
enum { TIMELINE_MESSAGES = 1 << 18 };

struct timeline {
    double compute_end; /* s: when the kernels queued so far are done */
    double link_end;    /* s: when the messages sent so far have arrived */
    int64_t last;       /* messages so far, numbered from 1 */
    struct {
        double arrives;
        enum estimate_message kind;
    } messages[TIMELINE_MESSAGES]; /* by number modulo TIMELINE_MESSAGES */
    double exposed[MESSAGES];      /* s that kernels waited, by what they waited for */
    double moving[MESSAGES];       /* s that messages took on the link */
};

void timeline_compute(struct timeline *t, double seconds);
/* Returns the message's number, to be waited for. */
int64_t timeline_send(struct timeline *t, enum estimate_message kind, double seconds);
/* 0: nothing to wait for. */
void timeline_wait(struct timeline *t, int64_t message);

#endif
