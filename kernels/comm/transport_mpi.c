/* Messages between ranks over MPI.
 *
 * They move only while some MPI function runs. MPI keeps messages of a pair in order, so they need no tags.
 */
#include <mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/comm/transport.h"

_Static_assert(MPI_MAX_PROCESSOR_NAME <= TRANSPORT_HOST, "names of hosts fit");

enum {
    DIE_SECONDS = 5,  /* for MPI_Abort to tell the others, before we end anyway */
    TURN_SECONDS = 5, /* for a rank that knows better to end the run first */
};

struct mpi_transport {
    struct transport base;
    MPI_Request *requests; /* by slot */
};

static MPI_Request *request_of(struct transport *t, int slot) {
    return ((struct mpi_transport *)t)->requests + slot;
}

/* ---- the end of a run ---- */

/* MPI itself waits for ranks where it opens and closes, and knows no timeout: an alarm ends the process. */
static char overdue[256]; /* what is said then */

static void give_up(int number) {
    (void)number;
    ssize_t written = write(STDERR_FILENO, overdue, strlen(overdue));
    (void)written;
    _exit(EXIT_RUN);
}

/* Of the ranks that wait the first speaks. */
static void set_alarm(const struct transport *t, int rank, const char *call) {
    double seconds = t->timeout + DIE_SECONDS + (rank > 0 ? TURN_SECONDS : 0);
    snprintf(
        overdue, sizeof overdue,
        "\ntrain_iha: rank %d: %s has not returned for %.0f s: another rank is dead, stuck or cut off; the "
        "last checkpoint is good: start again to go on from it\n",
        rank, call, seconds);
    signal(SIGALRM, give_up);
    alarm((unsigned)seconds);
}

static void mpi_end(struct transport *t, const char *line) {
    (void)t;
    fprintf(stderr, "\ntrain_iha: %s\n", line);
    overdue[0] = '\0';
    alarm(DIE_SECONDS); /* the way to the others may be what is broken */
    MPI_Abort(MPI_COMM_WORLD, EXIT_RUN);
    _exit(EXIT_RUN);
}

/* mpirun ends us when a rank has ended the run. */
static void mpi_pause(struct transport *t, double seconds) {
    (void)t;
    nanosleep(&(struct timespec){.tv_sec = (time_t)seconds}, NULL);
}

/* ---- messages ---- */

static int check(int code, struct error *e) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    if (code == MPI_SUCCESS)
        return 0;
    MPI_Error_string(code, text, &length);
    return fail_run(e, "%s", text);
}

static int mpi_reserve(struct transport *t, int count, struct error *e) {
    MPI_Request *requests = malloc((size_t)count * sizeof *requests);
    if (!requests)
        return fail_run(e, "rank %d: out of memory opening MPI", t->rank);
    for (int i = 0; i < count; i++)
        requests[i] = MPI_REQUEST_NULL;
    ((struct mpi_transport *)t)->requests = requests;
    return 0;
}

static int mpi_receive(struct transport *t, int slot, int source, void *to, size_t bytes, struct error *e) {
    return check(MPI_Irecv(to, (int)bytes, MPI_BYTE, source, 0, MPI_COMM_WORLD, request_of(t, slot)), e);
}

static int mpi_send(struct transport *t, int slot, int target, const void *from, size_t bytes,
                    struct error *e) {
    return check(MPI_Isend(from, (int)bytes, MPI_BYTE, target, 0, MPI_COMM_WORLD, request_of(t, slot)), e);
}

static int mpi_test(struct transport *t, int slot, int count, struct error *e) {
    int done = 0;
    if (check(MPI_Testall(count, request_of(t, slot), &done, MPI_STATUSES_IGNORE), e) != 0)
        return -1;
    return done;
}

static bool mpi_unasked(struct transport *t, int source, size_t bytes) {
    MPI_Status status;
    int there = 0, count = 0;
    (void)t;
    return MPI_Iprobe(source, 0, MPI_COMM_WORLD, &there, &status) == MPI_SUCCESS && there &&
           MPI_Get_count(&status, MPI_BYTE, &count) == MPI_SUCCESS && (size_t)count == bytes;
}

/* ---- opening and closing ---- */

static void mpi_release(struct transport *t) {
    free(((struct mpi_transport *)t)->requests);
    free(t->hosts);
    free(t);
}

static void mpi_close(struct transport *t) {
    set_alarm(t, t->rank, "MPI_Finalize");
    if (MPI_Finalize() != MPI_SUCCESS) { /* past that there is no MPI_Abort; the launcher ends the others */
        fprintf(stderr, "\ntrain_iha: rank %d: MPI_Finalize failed; what was saved is good\n", t->rank);
        _exit(EXIT_RUN);
    }
    alarm(0);
    mpi_release(t);
}

static int place(struct transport *t, struct error *e) {
    MPI_Comm local;
    int length;
    if (MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN) != MPI_SUCCESS ||
        MPI_Comm_rank(MPI_COMM_WORLD, &t->rank) != MPI_SUCCESS ||
        MPI_Comm_size(MPI_COMM_WORLD, &t->ranks) != MPI_SUCCESS)
        return fail_run(e, "rank %d: MPI cannot tell how many ranks there are", comm_launch_rank());
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local) != MPI_SUCCESS ||
        MPI_Comm_rank(local, &t->local_rank) != MPI_SUCCESS ||
        MPI_Comm_size(local, &t->local_ranks) != MPI_SUCCESS || MPI_Comm_free(&local) != MPI_SUCCESS)
        return fail_run(e, "rank %d: MPI cannot tell which ranks share a machine", t->rank);
    t->hosts = calloc((size_t)t->ranks, sizeof *t->hosts);
    if (!t->hosts)
        return fail_run(e, "rank %d: out of memory opening MPI", t->rank);
    MPI_Get_processor_name(t->hosts[t->rank], &length);
    return 0;
}

struct transport *transport_mpi_open(double timeout, struct error *e) {
    static const struct transport_ops ops = {
        .name = "mpi",
        .reserve = mpi_reserve,
        .receive = mpi_receive,
        .send = mpi_send,
        .test = mpi_test,
        .unasked = mpi_unasked,
        .pause = mpi_pause,
        .end = mpi_end,
        .close = mpi_close,
        .release = mpi_release,
    };
    struct mpi_transport *m = calloc(1, sizeof *m);
    int given;
    if (!m) {
        fail_run(e, "rank %d: out of memory opening MPI", comm_launch_rank());
        return NULL;
    }
    m->base.ops = &ops;
    m->base.timeout = timeout;
    set_alarm(&m->base, comm_launch_rank(), "MPI_Init");
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &given) != MPI_SUCCESS) {
        fail_run(e, "rank %d: MPI does not start; look at what it printed", comm_launch_rank());
        free(m);
        return NULL;
    }
    /* Not closed: that would wait for ranks which wait for this one. A process that ends without closing
     * takes them along. */
    if (place(&m->base, e) != 0) {
        mpi_release(&m->base);
        return NULL;
    }
    alarm(0);
    return &m->base;
}
