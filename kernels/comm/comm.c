/* What every kind of communicator shares: opening the right one, agreeing on errors, and the one of a single
 * rank, whose collectives are copies at most. */
#include "kernels/comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/comm/comm_internal.h"
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
    static _Alignas(16) char said[COMM_SMALL_BYTES];
    static struct comm single = {
        .ops = &ops, .ranks = 1, .local_ranks = 1, .timeout = 300, .small_buffer = said};
    return &single;
}

/* ---- opening ---- */

#ifdef WITH_MPI
static const char WITHOUT_MPI[] = "the launcher and the MPI of this program do not match";
#else
static const char WITHOUT_MPI[] =
    "this program was built without MPI: install it (make deps) and build again";
#endif

/* One rank: no ranks of MPI's to be had, *e as it was. */
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
    struct start start;
    int started = start_mpi_ranks();
    if (start_by_mpi()) { /* alone, MPI would only cost a helper process and half a second */
        struct comm *c = open_mpi(peer_timeout, e);
        if (!c || c->ranks > 1)
            return c;
    }
    if (started > 1) { /* they would train the same model side by side */
        fail_user(e, "started as %d processes that do not see each other; %s", started, WITHOUT_MPI);
        return NULL;
    }
    if (started == 0 && start_read(&start, e) != 0)
        return NULL;
    if (started == 0 && start.ranks > 1)
        return comm_p2p_open(transport_tcp_open(&start, peer_timeout, e), e);
    return comm_single();
}

void comm_set_timeout(struct comm *c, double seconds) {
    c->timeout = seconds;
    if (c->ranks > 1) /* of processes; those of devices take theirs over when they are opened */
        comm_p2p_set_timeout(c, seconds);
}

size_t comm_staging_bytes(int64_t elements, enum dtype dtype, enum dtype wire) {
    size_t arriving = dtype_bytes(wire == DTYPE_BF16 ? wire : dtype), leaving = wire == DTYPE_BF16 ? 2 : 0;
    return COMM_IN_FLIGHT * (size_t)elements * (arriving + leaving);
}

/* ---- agreeing ---- */

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
