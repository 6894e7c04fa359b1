/* Ranks as threads of one process, for tests: a communicator that delays everything as long as it is allowed
 * to. A collective reads and writes nothing until every rank waits for it, so code that touches a buffer in
 * flight gets wrong numbers every time. */
#ifndef IHA_TESTS_LIB_THREAD_COMM_H
#define IHA_TESTS_LIB_THREAD_COMM_H

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/comm.h"

enum { THREAD_RANKS = 4, THREAD_EVENTS = 4096 };

enum collective { REDUCE_SCATTER, ALL_GATHER };

struct thread_collective {
    enum collective kind;
    tensor buffer, piece;
    bool accumulate, done;
};

struct thread_world {
    int ranks;
    pthread_barrier_t barrier;
    struct thread_collective events[THREAD_RANKS][THREAD_EVENTS];
    const void *sent[THREAD_RANKS]; /* of an all_gather_host */
};

struct thread_comm {
    struct comm base;
    struct thread_world *world;
    comm_event last;
    void (*on_start)(struct thread_comm *,
                     enum collective); /* called when a collective starts; may be NULL */
    _Alignas(16) char small_buffer[THREAD_RANKS * COMM_SMALL_BYTES];
};

static void thread_barrier(struct comm *c) {
    pthread_barrier_wait(&((struct thread_comm *)c)->world->barrier);
}

static comm_event thread_start(struct comm *c, struct thread_collective what) {
    struct thread_comm *t = (struct thread_comm *)c;
    if (++t->last == THREAD_EVENTS)
        abort();
    t->world->events[c->rank][t->last] = what;
    if (t->on_start)
        t->on_start(t, what.kind);
    return t->last;
}

static comm_event thread_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    if (tensor_count(buffer) != c->ranks * tensor_count(piece))
        abort();
    return thread_start(c, (struct thread_collective){REDUCE_SCATTER, buffer, piece, accumulate, false});
}

static comm_event thread_all_gather(struct comm *c, tensor buffer) {
    return thread_start(c, (struct thread_collective){ALL_GATHER, buffer, tensor_none(), false, false});
}

/* Share s of rank r's buffer. */
static const float *thread_share(struct thread_world *w, comm_event event, int r, int s) {
    tensor b = w->events[r][event].buffer;
    return (const float *)b.data + s * tensor_count(b) / w->ranks;
}

static void thread_wait(struct comm *c, comm_event event) {
    struct thread_comm *t = (struct thread_comm *)c;
    struct thread_collective *mine = &t->world->events[c->rank][event];
    if (event == 0 || mine->done)
        return;
    int64_t n = tensor_count(mine->buffer) / c->ranks, count = mine->kind == ALL_GATHER ? n * c->ranks : n;
    float *result = calloc((size_t)count, sizeof *result);
    thread_barrier(c);
    for (int r = 0; r < c->ranks; r++)
        for (int64_t i = 0; i < n; i++) {
            if (mine->kind == ALL_GATHER)
                result[r * n + i] = thread_share(t->world, event, r, r)[i];
            else
                result[i] += thread_share(t->world, event, r, c->rank)[i];
        }
    thread_barrier(c);
    float *out = mine->kind == ALL_GATHER ? mine->buffer.data : mine->piece.data;
    for (int64_t i = 0; i < count; i++)
        out[i] = mine->accumulate ? out[i] + result[i] : result[i];
    mine->done = true;
    free(result);
    thread_barrier(c);
}

static void thread_all_gather_host(struct comm *c, const void *mine, void *all, size_t bytes) {
    struct thread_comm *t = (struct thread_comm *)c;
    t->world->sent[c->rank] = mine;
    thread_barrier(c);
    for (int r = 0; r < c->ranks; r++)
        memcpy((char *)all + (size_t)r * bytes, t->world->sent[r], bytes);
    thread_barrier(c);
}

static void thread_all_reduce(struct comm *c, double *values, int count) {
    double all[THREAD_RANKS][8];
    thread_all_gather_host(c, values, all, (size_t)count * sizeof *values);
    for (int i = 0; i < count; i++) {
        values[i] = 0;
        for (int r = 0; r < c->ranks; r++)
            values[i] += ((double *)all)[r * count + i];
    }
}

static int thread_reserve(struct comm *c, int64_t elements, enum dtype dtype, enum dtype wire,
                          struct error *e) {
    (void)c, (void)elements, (void)dtype, (void)wire, (void)e;
    return 0;
}

static void thread_abort_run(struct comm *c, const char *text) {
    (void)c, (void)text;
    abort();
}

static void thread_nothing(struct comm *c) {
    (void)c;
}

static inline void thread_comm_open(struct thread_comm *t, struct thread_world *w, int rank) {
    static const struct comm_ops ops = {
        .name = "threads",
        .close = thread_nothing,
        .abort_run = thread_abort_run,
        .reserve = thread_reserve,
        .reduce_scatter = thread_reduce_scatter,
        .all_gather = thread_all_gather,
        .all_reduce = thread_all_reduce,
        .wait = thread_wait,
        .progress = thread_nothing,
        .all_gather_host = thread_all_gather_host,
    };
    *t = (struct thread_comm){.base = {.ops = &ops,
                                       .rank = rank,
                                       .ranks = w->ranks,
                                       .local_rank = rank,
                                       .local_ranks = w->ranks,
                                       .small_buffer = t->small_buffer},
                              .world = w};
}

static inline void thread_world_open(struct thread_world *w, int ranks) {
    memset(w, 0, sizeof *w);
    w->ranks = ranks;
    pthread_barrier_init(&w->barrier, NULL, (unsigned)ranks);
}

#endif
