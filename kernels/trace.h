/* Ranges: named stretches of a device's work, one within the other, and how long they took.
 *
 * Model and operations name what they do with range_begin and range_end of the table (kernels.h), which costs
 * next to nothing unless somebody looks: NVIDIA's tools do at any time, the program between trace_begin and
 * trace_end. */
#ifndef IHA_KERNELS_TRACE_H
#define IHA_KERNELS_TRACE_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct traced_range {
    const char *name;  /* a literal */
    int index;         /* the layer, say; -1: none */
    int depth;         /* ranges around it */
    double begin, end; /* seconds from trace_begin */
    void *marks[2];    /* the backend's */
};

enum { TRACE_DEPTH = 16 };

struct trace {
    struct traced_range *list; /* in the order they began */
    int count, capacity, depth;
    int open[TRACE_DEPTH];
    bool full; /* out of memory: later ranges are missing */
};

struct trace *trace_create(void); /* NULL: out of memory */
void trace_free(struct trace *t);

/* The range that begins, or ends, now; NULL when there is no memory for it. */
struct traced_range *trace_enter(struct trace *t, const char *name, int index);
struct traced_range *trace_leave(struct trace *t);

#ifdef __cplusplus
}
#endif
#endif
