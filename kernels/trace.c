#include "kernels/trace.h"

#include <stdlib.h>

struct trace *trace_create(void) {
    return calloc(1, sizeof(struct trace));
}

void trace_free(struct trace *t) {
    if (t)
        free(t->list);
    free(t);
}

struct traced_range *trace_enter(struct trace *t, const char *name, int index) {
    if (t->count == t->capacity && !t->full) {
        int capacity = t->capacity ? 2 * t->capacity : 4096;
        struct traced_range *list = realloc(t->list, (size_t)capacity * sizeof *list);
        t->full = !list;
        t->list = list ? list : t->list;
        t->capacity = list ? capacity : t->capacity;
    }
    if (t->depth == TRACE_DEPTH)
        abort(); /* a range without an end */
    bool room = t->count < t->capacity;
    t->open[t->depth] = room ? t->count : -1;
    if (room)
        t->list[t->count] = (struct traced_range){.name = name, .index = index, .depth = t->depth};
    t->depth++;
    return room ? &t->list[t->count++] : NULL;
}

struct traced_range *trace_leave(struct trace *t) {
    if (t->depth == 0)
        return NULL; /* the range began before the trace */
    int i = t->open[--t->depth];
    return i < 0 ? NULL : &t->list[i];
}
