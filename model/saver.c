#include "model/saver.h"

#include <pthread.h>
#include <stdlib.h>

struct saver {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    enum saver_state state; /* the mutex's, as is `closing` */
    bool closing;
    struct checkpoint_job job; /* the thread's while it writes */
    struct error error;
    float *weights, *moments; /* the copy; NULL: there is no room for one */
    bool copies;
};

static void *write_jobs(void *context) {
    struct saver *s = context;
    pthread_mutex_lock(&s->mutex);
    for (;;) {
        while (s->state != SAVER_WRITING && !s->closing)
            pthread_cond_wait(&s->changed, &s->mutex);
        if (s->state != SAVER_WRITING)
            break;
        pthread_mutex_unlock(&s->mutex);
        int status = checkpoint_write(&s->job, &s->error);
        pthread_mutex_lock(&s->mutex);
        s->state = status == 0 ? SAVER_WRITTEN : SAVER_FAILED;
    }
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

struct saver *saver_open(struct error *e) {
    struct saver *s = calloc(1, sizeof *s);
    if (!s) {
        fail_run(e, "out of memory for the thread that saves");
        return NULL;
    }
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    if (pthread_create(&s->thread, NULL, write_jobs, s) != 0) {
        fail_run(e, "cannot start the thread that saves");
        free(s);
        return NULL;
    }
    return s;
}

static void change_state(struct saver *s, enum saver_state state) {
    pthread_mutex_lock(&s->mutex);
    s->state = state;
    pthread_cond_signal(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

void saver_close(struct saver *s) {
    if (!s)
        return;
    pthread_mutex_lock(&s->mutex);
    s->closing = true;
    pthread_cond_signal(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    pthread_join(s->thread, NULL);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->mutex);
    free(s->weights);
    free(s->moments);
    free(s);
}

static size_t weight_bytes(const struct model *m) {
    return m->partition.rank == 0 ? (size_t)m->params.learned * sizeof(float) : 0;
}

size_t saver_copy_bytes(const struct model *m) {
    int64_t elements = optimizer_elements(m);
    return elements < 0 ? 0 : weight_bytes(m) + 2 * (size_t)elements * sizeof(float);
}

bool saver_reserve(struct saver *s, const struct model *m, size_t memory_free) {
    size_t bytes = saver_copy_bytes(m);
    if (bytes == 0 || (memory_free > 0 && bytes > memory_free / 2))
        return false;
    s->weights = m->partition.rank == 0 ? malloc(weight_bytes(m)) : NULL;
    s->moments = malloc(bytes - weight_bytes(m));
    s->copies = s->moments && (s->weights || m->partition.rank > 0);
    if (!s->copies) {
        free(s->weights);
        free(s->moments);
        s->weights = s->moments = NULL;
    }
    return s->copies;
}

int saver_start(struct saver *s, const struct checkpoint_job *job, bool copy, struct error *e) {
    struct model *m = job->from.model;
    s->job = *job;
    if (copy && s->copies) {
        for (int i = 0; s->weights && i < m->params.count; i++)
            model_get_param(m, i, s->weights + m->params.list[i].place);
        /* A failure is also the saver's: the others may be writing their parts of what will be no checkpoint.
         */
        if (optimizer_copy(m, s->moments, &s->error) != 0) {
            *e = s->error;
            change_state(s, SAVER_FAILED);
            return -1;
        }
        s->job.from.weights = s->weights;
        s->job.from.moments = s->moments;
    }
    change_state(s, SAVER_WRITING);
    return 0;
}

enum saver_state saver_state(struct saver *s) {
    pthread_mutex_lock(&s->mutex);
    enum saver_state state = s->state;
    pthread_mutex_unlock(&s->mutex);
    return state;
}

int saver_collect(struct saver *s, struct error *e) {
    int status = saver_state(s) == SAVER_FAILED ? -1 : 0;
    if (status != 0)
        *e = s->error;
    change_state(s, SAVER_IDLE);
    return status;
}
