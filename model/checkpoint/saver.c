#include "model/checkpoint/saver.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "model/state_dict.h"

struct saver {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    enum saver_state state; /* the mutex's, as is `closing` */
    bool closing;
    struct checkpoint_job job; /* the thread's while it writes */
    struct error error;
    struct comm *comm;
    float *weights, *moments; /* the copy; NULL: there is no room for one */
    bool copies, behind;      /* this rank has one; all have: saving goes on behind training */
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
    return m->partition.rank == 0 ? (size_t)m->params.num_params * sizeof(float) : 0;
}

size_t saver_copy_bytes(const struct model *m) {
    int64_t elements = optimizer_elements(m);
    return elements < 0 ? 0 : weight_bytes(m) + 2 * (size_t)elements * sizeof(float);
}

/* Has this rank memory for a copy now? */
static bool reserve_copy(struct saver *s, const struct model *m, size_t memory_free) {
    size_t bytes = saver_copy_bytes(m);
    bool room = bytes > 0 && (memory_free == 0 || bytes <= memory_free / 2);
    if ((room || model_master_weights_sharded(m)) && m->partition.rank == 0)
        s->weights = malloc(weight_bytes(m));
    s->moments = room ? malloc(bytes - weight_bytes(m)) : NULL;
    return s->moments && (s->weights || m->partition.rank > 0);
}

bool saver_reserve(struct saver *s, const struct model *m, size_t memory_free) {
    s->comm = m->comm;
    s->copies = reserve_copy(s, m, memory_free);
    s->behind = comm_agree(s->comm, s->copies ? 0 : -1, &(struct error){0}) == 0;
    return s->behind;
}

/* The copy, unless training waits anyway; of sharded master_weights always, which take all ranks to gather. */
static int take_copy(struct saver *s, struct model *m, bool wait, struct error *e) {
    bool gathers = model_master_weights_sharded(m), copies = s->copies && !wait;
    model_await_params(m);
    if (gathers || copies) {
        model_get_params(m, s->weights);
        s->job.from.weights = s->weights;
    }
    if (gathers && !s->weights && m->partition.rank == 0)
        return fail_run(e, "out of memory to gather the weights of all ranks (%zu bytes)", weight_bytes(m));
    if (copies)
        s->job.from.moments = s->moments;
    return copies ? optimizer_copy(m, s->moments, e) : 0;
}

/* Write from the copy, or from the model, which then must not change meanwhile. A failure is also the
 * saver's: the others may be writing their parts of what will be no checkpoint. */
static int start_writing(struct saver *s, const struct checkpoint_job *job, bool wait, struct error *e) {
    s->job = *job;
    int status = take_copy(s, job->from.model, wait, &s->error);
    if (status != 0)
        *e = s->error;
    change_state(s, status == 0 ? SAVER_WRITING : SAVER_FAILED);
    return status;
}

int saver_save(struct saver *s, const struct checkpoint_job *job, bool wait, struct error *e) {
    bool leads = s->comm->rank == 0;
    wait = wait || !s->behind;
    if (saver_finish(s, e) != 0 ||
        comm_agree(s->comm, leads ? checkpoint_begin(job->run_dir, job->trainer.step, e) : 0, e) != 0 ||
        comm_agree(s->comm, start_writing(s, job, wait, e), e) != 0)
        return -1;
    return wait ? saver_finish(s, e) : 0;
}

enum saver_state saver_state(struct saver *s) {
    pthread_mutex_lock(&s->mutex);
    enum saver_state state = s->state;
    pthread_mutex_unlock(&s->mutex);
    return state;
}

/* The one that is furthest from done; an idle rank has nothing to say. */
enum saver_state saver_state_merge(enum saver_state one, enum saver_state other) {
    return other == SAVER_WRITING || (other != SAVER_IDLE && one != SAVER_WRITING) ? other : one;
}

/* How this rank's writing ended; the thread is idle again. */
static int collect(struct saver *s, struct error *e) {
    int status = saver_state(s) == SAVER_FAILED ? -1 : 0;
    if (status != 0)
        *e = s->error;
    change_state(s, SAVER_IDLE);
    return status;
}

/* All ranks have written their files, or failed to. */
static int publish(struct saver *s, struct error *e) {
    bool leads = s->comm->rank == 0;
    if (comm_agree(s->comm, collect(s, e), e) == 0 &&
        comm_agree(s->comm, leads ? checkpoint_publish(&s->job, e) : 0, e) == 0)
        return 0;
    if (leads)
        checkpoint_clean(s->job.run_dir);
    e->exit_code = EXIT_RUN;
    return -1;
}

int saver_advance(struct saver *s, enum saver_state all, struct error *e) {
    return all == SAVER_WRITTEN || all == SAVER_FAILED ? publish(s, e) : 0;
}

int saver_finish(struct saver *s, struct error *e) {
    for (;;) {
        enum saver_state all = SAVER_IDLE, mine = saver_state(s);
        const enum saver_state *told = comm_all_gather_small(s->comm, &mine, sizeof mine);
        for (int i = 0; i < s->comm->ranks; i++)
            all = saver_state_merge(all, told[i]);
        if (all == SAVER_IDLE)
            return 0;
        if (all != SAVER_WRITING)
            return publish(s, e);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}
