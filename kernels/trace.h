/* Ranges: named and nested sections of a device's work, and their times.
 *
 * The model and the wrappers of trace_ops.c mark them with range_begin and range_end of the table
 * (kernels.h). NVIDIA's profilers see them at any time (NVTX). This program records them between trace_begin
 * and trace_end; otherwise they cost next to nothing. */
#ifndef IHA_KERNELS_TRACE_H
#define IHA_KERNELS_TRACE_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct traced_range {
    const char *name;  /* a literal */
    int index;         /* such as the layer; -1: none */
    int depth;         /* number of enclosing ranges */
    double begin, end; /* seconds from trace_begin */
    void *marks[2];    /* private to the backend: events at begin and end */
};

enum { TRACE_DEPTH = 16 };

struct trace {
    struct traced_range *list; /* in the order of their begin */
    int count, capacity, depth;
    int open[TRACE_DEPTH];
    bool full; /* out of memory: later ranges are missing */
};

struct trace *trace_create(void); /* NULL: out of memory */
void trace_free(struct trace *t);

/* Begin and end a range: the caller sets the times of what they return, which is NULL when out of memory. */
struct traced_range *trace_enter(struct trace *t, const char *name, int index);
struct traced_range *trace_leave(struct trace *t);

#ifdef __cplusplus
}
#endif
#endif
