#include "data/read_ahead.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "kernels/limits.h"

struct read_ahead {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    read_step_function *read;
    void *context;
    int slots;
    int64_t steps;
    /* under the mutex */
    int64_t read_count, used_count; /* steps that were read, and given out */
    bool slot_in_use;               /* the one given out last */
    bool stopping;
    int status; /* of the read after read_count; -1: failed, and the thread has ended */
    struct error error;
};

static bool has_free_slot(const struct read_ahead *r) {
    return r->read_count - r->used_count + r->slot_in_use < r->slots;
}

static void *read_steps(void *context) {
    struct read_ahead *r = context;
    pthread_mutex_lock(&r->mutex);
    while (r->read_count < r->steps && r->status == 0) {
        while (!r->stopping && !has_free_slot(r))
            pthread_cond_wait(&r->changed, &r->mutex);
        if (r->stopping)
            break;
        int slot = (int)(r->read_count % r->slots);
        pthread_mutex_unlock(&r->mutex);
        int status = r->read(r->context, slot, &r->error);
        pthread_mutex_lock(&r->mutex);
        r->status = status;
        r->read_count += status == 0;
        pthread_cond_signal(&r->changed);
    }
    pthread_mutex_unlock(&r->mutex);
    return NULL;
}

struct read_ahead *read_ahead_start(int slots, int64_t steps, read_step_function *read, void *context,
                                    struct error *e) {
    struct read_ahead *r = malloc(sizeof *r);
    if (!r) {
        fail_run(e, "out of memory for the thread that reads data ahead");
        return NULL;
    }
    *r = (struct read_ahead){.read = read, .context = context, .slots = slots, .steps = steps};
    pthread_mutex_init(&r->mutex, NULL);
    pthread_cond_init(&r->changed, NULL);
    int status = pthread_create(&r->thread, NULL, read_steps, r);
    if (status != 0) {
        limits_fail_thread(e, "the thread that reads data ahead", status);
        free(r);
        return NULL;
    }
    return r;
}

void read_ahead_stop(struct read_ahead *r) {
    if (!r)
        return;
    pthread_mutex_lock(&r->mutex);
    r->stopping = true;
    pthread_cond_signal(&r->changed);
    pthread_mutex_unlock(&r->mutex);
    pthread_join(r->thread, NULL);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->mutex);
    free(r);
}

int read_ahead_next(struct read_ahead *r, struct error *e) {
    int slot = -1;
    pthread_mutex_lock(&r->mutex);
    r->slot_in_use = false;
    pthread_cond_signal(&r->changed);
    while (r->read_count == r->used_count && r->status == 0)
        pthread_cond_wait(&r->changed, &r->mutex);
    if (r->read_count > r->used_count) {
        slot = (int)(r->used_count++ % r->slots);
        r->slot_in_use = true;
    } else if (e) {
        *e = r->error;
    }
    pthread_mutex_unlock(&r->mutex);
    return slot;
}
