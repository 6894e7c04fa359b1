/* What every kind of communicator shares: opening the right one, agreeing on errors, and the one of a single
 * rank, whose collectives are copies at most. */
#include "kernels/comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/comm_internal.h"

/* ---- one rank ----------------------------------------------------------------------------------------- */

static void single_close(struct comm *c) {
    (void)c;
}

static int single_reserve(struct comm *c, int64_t elements, enum dtype dtype, struct error *e) {
    (void)c, (void)elements, (void)dtype, (void)e;
    return 0;
}

static comm_event single_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    (void)c;
    if (buffer.data != piece.data || accumulate)
        abort(); /* a single rank has no shards: there is nothing to move */
    return 0;
}

static comm_event single_all_gather(struct comm *c, tensor buffer) {
    (void)c, (void)buffer;
    return 0;
}

static void single_all_reduce(struct comm *c, double *values, int count) {
    (void)c, (void)values, (void)count;
}

static void single_wait(struct comm *c, comm_event event) {
    (void)c, (void)event;
}

static void single_progress(struct comm *c) {
    (void)c;
}

static void single_exchange(struct comm *c, const void *mine, void *all, size_t bytes) {
    (void)c;
    memcpy(all, mine, bytes);
}

struct comm *comm_single(void) {
    static const struct comm_ops ops = {
        .name = "single",
        .close = single_close,
        .reserve = single_reserve,
        .reduce_scatter = single_reduce_scatter,
        .all_gather = single_all_gather,
        .all_reduce = single_all_reduce,
        .wait = single_wait,
        .progress = single_progress,
        .exchange = single_exchange,
    };
    static _Alignas(16) char said[COMM_SAID];
    static struct comm single = {.ops = &ops, .ranks = 1, .local_ranks = 1, .said = said};
    return &single;
}

/* ---- opening ------------------------------------------------------------------------------------------ */

static int number_in(const char *variable) {
    const char *text = getenv(variable);
    return text ? atoi(text) : 0;
}

int comm_started_rank(void) {
    static const char *const variables[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"};
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++)
        if (number_in(variables[i]) > 0)
            return number_in(variables[i]);
    return 0;
}

/* Several processes that do not know of each other would train the same model side by side. */
static int check_alone(const char *advice, struct error *e) {
    int tasks = number_in("SLURM_STEP_NUM_TASKS"), ranks = number_in("OMPI_COMM_WORLD_SIZE");
    int started = tasks > ranks ? tasks : ranks;
    if (started > 1)
        return fail_user(e, "started as %d processes that do not see each other; %s", started, advice);
    return 0;
}

struct comm *comm_open(double peer_timeout, struct error *e) {
#ifdef WITH_MPI
    /* Alone, MPI would only cost a helper process and half a second. */
    if (getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK") || getenv("PMI_RANK")) {
        struct comm *c = comm_mpi_open(peer_timeout, e);
        if (!c || c->ranks > 1)
            return c;
        c->ops->close(c);
    }
    return check_alone("under srun, add --mpi=pmix", e) == 0 ? comm_single() : NULL;
#else
    (void)peer_timeout;
    return check_alone("this program was built without MPI: install it (make deps) and build again", e) == 0
               ? comm_single()
               : NULL;
#endif
}

void comm_set_timeout(struct comm *c, double seconds) {
#ifdef WITH_MPI
    if (c->ranks > 1)
        comm_mpi_set_timeout(c, seconds);
#else
    (void)c, (void)seconds;
#endif
}

size_t comm_staging_bytes(int64_t elements, enum dtype dtype) {
    return COMM_IN_FLIGHT * (size_t)elements * dtype_bytes(dtype);
}

/* ---- agreeing ----------------------------------------------------------------------------------------- */

const void *comm_tell(struct comm *c, const void *mine, size_t bytes) {
    if (bytes > COMM_SAID)
        abort();
    c->ops->exchange(c, mine, c->said, bytes);
    return c->said;
}

int comm_agree(struct comm *c, int status, struct error *e) {
    if (c->ranks == 1)
        return status;
    struct report {
        int status;
        struct error error;
    };
    struct report mine = {.status = status};
    if (status != 0)
        mine.error = *e;
    const struct report *all = comm_tell(c, &mine, sizeof mine);
    int first = 0, failed = 0;
    for (int r = c->ranks - 1; r >= 0; r--)
        if (all[r].status != 0) {
            first = r;
            failed++;
        }
    bool alike = failed == c->ranks;
    for (int r = 0; alike && r < c->ranks; r++)
        alike = strcmp(all[r].error.text, all[0].error.text) == 0;
    if (failed) {
        e->exit_code = all[first].error.exit_code;
        if (alike)
            memcpy(e->text, all[0].error.text, sizeof e->text);
        else
            snprintf(e->text, sizeof e->text, "rank %d: %.1000s", first, all[first].error.text);
    }
    return failed ? -1 : 0;
}
