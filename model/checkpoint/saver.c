#include "model/checkpoint/saver.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/limits.h"
#include "model/checkpoint/optimizer_state.h"
#include "model/state_dict.h"

struct saver {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    enum saver_state state; /* under the mutex, as is `closing` */
    bool closing;
    struct checkpoint_job job; /* the thread reads it while it writes */
    struct error error;
    struct comm *comm;
    float *weights, *moments; /* buffers for the snapshot; NULL: none */
    bool has_snapshot;        /* this rank has both buffers */
    bool async;               /* all ranks have: training goes on while the thread writes */
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
        fail_run(e, "out of memory for the thread that writes checkpoints");
        return NULL;
    }
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    int status = pthread_create(&s->thread, NULL, write_jobs, s);
    if (status != 0) {
        limits_fail_thread(e, "the thread that writes checkpoints", status);
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

size_t saver_snapshot_bytes(const struct model *m) {
    int64_t elements = optimizer_elements(m);
    return elements < 0 ? 0 : weight_bytes(m) + (size_t)elements * sizeof(float);
}

/* Allocate the snapshot, if it takes at most half of memory_free (0: unknown). Rank 0 needs the weights' buffer
 * anyway to gather sharded master weights. */
static bool allocate_snapshot(struct saver *s, const struct model *m, size_t memory_free) {
    size_t bytes = saver_snapshot_bytes(m);
    bool fits = bytes > 0 && (memory_free == 0 || bytes <= memory_free / 2);
    if ((fits || model_master_weights_sharded(m)) && m->partition.rank == 0)
        s->weights = malloc(weight_bytes(m));
    s->moments = fits ? malloc(bytes - weight_bytes(m)) : NULL;
    return s->moments && (s->weights || m->partition.rank > 0);
}

bool saver_reserve(struct saver *s, const struct model *m, size_t memory_free) {
    s->comm = m->comm;
    s->has_snapshot = allocate_snapshot(s, m, memory_free);
    s->async = comm_agree(s->comm, s->has_snapshot ? 0 : -1, &(struct error){0}) == 0;
    return s->async;
}

/* Copy what the thread will write, unless training waits for it. Sharded master weights are always gathered, which
 * takes all ranks. */
static int take_snapshot(struct saver *s, struct model *m, bool wait, struct error *e) {
    bool gather = model_master_weights_sharded(m), copy = s->has_snapshot && !wait;
    model_await_params(m);
    if (gather || copy) {
        model_get_params(m, s->weights);
        s->job.weights = s->weights;
    }
    if (gather && !s->weights && m->partition.rank == 0)
        return fail_run(e, "out of memory to gather the weights of all ranks (%zu bytes)", weight_bytes(m));
    if (copy)
        s->job.moments = s->moments;
    return copy ? optimizer_copy(m, s->moments, e) : 0;
}

/* Start the thread. On failure the state is SAVER_FAILED, so that saver_finish waits for the other ranks, which
 * may be writing already, and removes their files. */
static int start_writing(struct saver *s, const struct checkpoint_job *job, bool wait, struct error *e) {
    s->job = *job;
    int status = take_snapshot(s, job->model, wait, &s->error);
    if (status != 0)
        *e = s->error;
    change_state(s, status == 0 ? SAVER_WRITING : SAVER_FAILED);
    return status;
}

int saver_save(struct saver *s, const struct checkpoint_job *job, bool wait, struct error *e) {
    bool rank0 = s->comm->rank == 0;
    wait = wait || !s->async;
    if (saver_finish(s, e) != 0 ||
        comm_agree(s->comm, rank0 ? checkpoint_begin(job->run_dir, job->trainer.step, e) : 0, e) != 0 ||
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

/* WRITING before FAILED and WRITTEN, IDLE last. */
enum saver_state saver_state_merge(enum saver_state a, enum saver_state b) {
    return b == SAVER_WRITING || (b != SAVER_IDLE && a != SAVER_WRITING) ? b : a;
}

/* How this rank's writing ended; sets the thread idle. */
static int collect(struct saver *s, struct error *e) {
    int status = saver_state(s) == SAVER_FAILED ? -1 : 0;
    if (status != 0)
        *e = s->error;
    change_state(s, SAVER_IDLE);
    return status;
}

/* Called when every rank has written its files or failed. */
static int publish(struct saver *s, struct error *e) {
    bool rank0 = s->comm->rank == 0;
    if (comm_agree(s->comm, collect(s, e), e) == 0 &&
        comm_agree(s->comm, rank0 ? checkpoint_publish(&s->job, e) : 0, e) == 0)
        return 0;
    if (rank0)
        checkpoint_clean(s->job.run_dir);
    e->exit_code = EXIT_RUN;
    return -1;
}

int saver_advance(struct saver *s, enum saver_state all, struct error *e) {
    return all == SAVER_WRITTEN || all == SAVER_FAILED ? publish(s, e) : 0;
}

int saver_finish(struct saver *s, struct error *e) {
    for (;;) {
        enum saver_state all = SAVER_IDLE, own = saver_state(s);
        const enum saver_state *gathered = comm_all_gather_small(s->comm, &own, sizeof own);
        for (int i = 0; i < s->comm->ranks; i++)
            all = saver_state_merge(all, gathered[i]);
        if (all == SAVER_IDLE)
            return 0;
        if (all != SAVER_WRITING)
            return publish(s, e);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}
