#include "data/parallel.h"

#include <pthread.h>
#include <stdatomic.h>

enum { MAX_THREADS = 64 };

struct loop {
    parallel_work *work;
    void *context;
    int64_t count;
    _Atomic int64_t next;
    _Atomic int stop;
    pthread_mutex_t lock; /* of the fields below */
    int64_t failed;       /* the lowest; -1: none */
    struct error error;
};

static void *run_loop(void *argument) {
    struct loop *l = argument;
    int64_t i;
    while (!l->stop && (i = l->next++) < l->count) {
        struct error e = {0};
        if (l->work(l->context, i, &e) == 0)
            continue;
        l->stop = 1; /* all lower ones have started */
        pthread_mutex_lock(&l->lock);
        if (l->failed < 0 || i < l->failed) {
            l->failed = i;
            l->error = e;
        }
        pthread_mutex_unlock(&l->lock);
    }
    return NULL;
}

int64_t parallel_for(int threads, int64_t count, parallel_work *work, void *context, struct error *e) {
    struct loop l = {.work = work, .context = context, .count = count, .failed = -1};
    pthread_t helpers[MAX_THREADS];
    int started = 0;
    pthread_mutex_init(&l.lock, NULL);
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    while (started < threads - 1 && started < count - 1 &&
           pthread_create(&helpers[started], NULL, run_loop, &l) == 0) /* where it fails, fewer do it */
        started++;
    run_loop(&l);
    for (int i = 0; i < started; i++)
        pthread_join(helpers[i], NULL);
    pthread_mutex_destroy(&l.lock);
    if (l.failed >= 0 && e)
        *e = l.error;
    return l.failed;
}
