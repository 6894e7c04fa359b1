/* Choosing and opening a communicator, agreeing on errors, and the communicator of a single rank. */
#include "kernels/comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/comm/comm_p2p.h"
#include "kernels/comm/launcher.h"

/* ---- one rank ---- */

static void single_close(struct comm *c) {
    (void)c;
}

static void single_abort_run(struct comm *c, const char *text) {
    (void)c;
    fprintf(stderr, "\ntrain_iha: %s\n", text);
    _exit(EXIT_RUN);
}

static int single_reserve(struct comm *c, int64_t elements, enum dtype dtype, enum dtype wire,
                          struct error *e) {
    (void)c, (void)elements, (void)dtype, (void)wire, (void)e;
    return 0;
}

static comm_event single_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    (void)c;
    if (buffer.data != piece.data || accumulate)
        abort(); /* a single rank's share is the whole buffer: there is nothing to do */
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

static bool single_probe(struct comm *c, size_t bytes) {
    (void)c, (void)bytes;
    return false;
}

static void single_all_gather_host(struct comm *c, const void *mine, void *all, size_t bytes) {
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
        .probe = single_probe,
        .all_gather_host = single_all_gather_host,
        .abort_run = single_abort_run,
    };
    static _Alignas(16) char small_buffer[COMM_SMALL_BYTES];
    static struct comm single = {
        .ops = &ops, .ranks = 1, .local_ranks = 1, .timeout = 300, .small_buffer = small_buffer};
    return &single;
}

/* ---- opening ---- */

#ifdef WITH_MPI
static const char MPI_HINT[] = "use the mpirun of the MPI library that this program was built with";
#else
static const char MPI_HINT[] = "this program was built without MPI: install it (make deps) and build again";
#endif

/* The communicator of a single rank where MPI has only one. NULL and *e: MPI fails. */
static struct comm *open_mpi(double timeout, struct error *e) {
#ifdef WITH_MPI
    struct comm *c = comm_p2p_open(transport_mpi_open(timeout, e), e);
    if (!c || c->ranks > 1)
        return c;
    c->ops->close(c);
#else
    (void)timeout, (void)e;
#endif
    return comm_single();
}

struct comm *comm_open(double peer_timeout, struct error *e) {
    struct launcher_env env;
    int mpi_ranks = launcher_mpi_ranks();
    if (launcher_is_mpi()) { /* otherwise MPI_Init would only cost half a second and a helper process */
        struct comm *c = open_mpi(peer_timeout, e);
        if (!c || c->ranks > 1)
            return c;
    }
    if (mpi_ranks > 1) { /* each process would train the whole model by itself */
        fail_user(e, "mpirun started %d processes, but MPI connects each only to itself; %s", mpi_ranks,
                  MPI_HINT);
        return NULL;
    }
    if (mpi_ranks == 0 && launcher_read_env(&env, e) != 0)
        return NULL;
    if (mpi_ranks == 0 && env.ranks > 1)
        return comm_p2p_open(transport_tcp_open(&env, peer_timeout, e), e);
    return comm_single();
}

int comm_launch_rank(void) {
    return launcher_rank();
}

void comm_set_timeout(struct comm *c, double seconds) {
    c->timeout = seconds;
    if (c->ranks > 1) /* `c` is of processes: comm_p2p.c's; those of GPUs copy its timeout when opened */
        comm_p2p_set_timeout(c, seconds);
}

size_t comm_staging_bytes(int64_t elements, enum dtype dtype, enum dtype wire) {
    return comm_p2p_staging_bytes(elements, dtype, wire);
}

/* ---- exchanging small values and errors ---- */

const void *comm_all_gather_small(struct comm *c, const void *mine, size_t bytes) {
    if (bytes > COMM_SMALL_BYTES)
        abort();
    c->ops->all_gather_host(c, mine, c->small_buffer, bytes);
    return c->small_buffer;
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
    const struct report *all = comm_all_gather_small(c, &mine, sizeof mine);
    int first = 0, failed = 0;
    for (int r = c->ranks - 1; r >= 0; r--)
        if (all[r].status != 0) {
            first = r;
            failed++;
        }
    bool all_equal = failed == c->ranks;
    for (int r = 0; all_equal && r < c->ranks; r++)
        all_equal = strcmp(all[r].error.text, all[0].error.text) == 0;
    if (failed) {
        e->exit_code = all[first].error.exit_code;
        if (all_equal)
            memcpy(e->text, all[0].error.text, sizeof e->text);
        else
            snprintf(e->text, sizeof e->text, "rank %d: %.1000s", first, all[first].error.text);
    }
    return failed ? -1 : 0;
}
