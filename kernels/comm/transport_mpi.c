/* Messages between ranks over MPI. They make progress only inside MPI functions. */
#include <mpi.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/at_start.h"
#include "kernels/clock.h"
#include "kernels/comm.h"
#include "kernels/comm/mpi_shared_memory.h"
#include "kernels/comm/transport.h"

_Static_assert(MPI_MAX_PROCESSOR_NAME <= TRANSPORT_HOST_BYTES, "host names fit");

enum {
    ABORT_SECONDS = 5, /* for MPI_Abort to end the other ranks; then this process exits anyway */
    DELAY_SECONDS = 5, /* for rank 0 to report a timeout before the others do */
};

struct mpi_transport {
    struct transport base;
    MPI_Request *requests; /* by slot */
};

static MPI_Request *request_of(struct transport *t, int slot) {
    return ((struct mpi_transport *)t)->requests + slot;
}

/* ---- aborting the run ---- */

/* MPI_Init and MPI_Finalize wait for all ranks and have no timeout: an alarm ends the process. */
static char alarm_message[256];

static void on_alarm(int number) {
    (void)number;
    ssize_t written = write(STDERR_FILENO, alarm_message, strlen(alarm_message));
    (void)written;
    _exit(EXIT_RUN);
}

/* The trainer blocks the signals that save, SIGALRM among them, and a thread waits for them. Here it is let through to
 * this thread, to which the kernel then gives it. */
static void start_alarm(double seconds) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    signal(SIGALRM, on_alarm);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    alarm((unsigned)seconds);
}

/* The alarm of rank 0 comes first, so that only one rank reports. */
static void set_alarm(const struct transport *t, int rank, const char *call) {
    double seconds = t->timeout + ABORT_SECONDS + (rank > 0 ? DELAY_SECONDS : 0);
    snprintf(alarm_message, sizeof alarm_message,
             "\ntrain_iha: rank %d: %s has not returned for %.0f s: another rank is dead, hung or "
             "unreachable; " COMM_RESUME_HINT "\n",
             rank, call, seconds);
    start_alarm(seconds);
}

static void mpi_abort_run(struct transport *t, const char *line) {
    (void)t;
    fprintf(stderr, "\ntrain_iha: %s\n", line);
    alarm_message[0] = '\0';
    start_alarm(ABORT_SECONDS); /* MPI_Abort may hang when the connection to the other ranks is broken */
    MPI_Abort(MPI_COMM_WORLD, EXIT_RUN);
    _exit(EXIT_RUN);
}

/* mpirun ends this process when another rank aborts the run. */
static void mpi_pause(struct transport *t, double seconds) {
    (void)t;
    clock_sleep(seconds);
}

/* ---- messages ---- */

static int check_mpi(int code, struct error *e) {
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
    return check_mpi(MPI_Irecv(to, (int)bytes, MPI_BYTE, source, 0, MPI_COMM_WORLD, request_of(t, slot)), e);
}

static int mpi_send(struct transport *t, int slot, int target, const void *from, size_t bytes,
                    struct error *e) {
    return check_mpi(MPI_Isend(from, (int)bytes, MPI_BYTE, target, 0, MPI_COMM_WORLD, request_of(t, slot)),
                     e);
}

static int mpi_test(struct transport *t, int slot, int count, struct error *e) {
    int done = 0;
    if (check_mpi(MPI_Testall(count, request_of(t, slot), &done, MPI_STATUSES_IGNORE), e) != 0)
        return -1;
    return done;
}

static bool mpi_probe(struct transport *t, int source, size_t bytes) {
    MPI_Status status;
    int found = 0, count = 0;
    (void)t;
    return MPI_Iprobe(source, 0, MPI_COMM_WORLD, &found, &status) == MPI_SUCCESS && found &&
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
    if (MPI_Finalize() != MPI_SUCCESS) { /* MPI_Abort is no longer allowed; mpirun ends the other ranks */
        fprintf(stderr, "\ntrain_iha: rank %d: MPI_Finalize failed; everything saved is intact\n", t->rank);
        _exit(EXIT_RUN);
    }
    alarm(0);
    mpi_shared_memory_close();
    mpi_release(t);
}

/* Rank, number of ranks, the same on this machine, and the host name. */
static int query_ranks(struct transport *t, struct error *e) {
    MPI_Comm local;
    int length;
    if (MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN) != MPI_SUCCESS ||
        MPI_Comm_rank(MPI_COMM_WORLD, &t->rank) != MPI_SUCCESS ||
        MPI_Comm_size(MPI_COMM_WORLD, &t->ranks) != MPI_SUCCESS)
        return fail_run(e, "rank %d: MPI does not report how many ranks there are", launcher_rank());
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local) != MPI_SUCCESS ||
        MPI_Comm_rank(local, &t->local_rank) != MPI_SUCCESS ||
        MPI_Comm_size(local, &t->local_ranks) != MPI_SUCCESS || MPI_Comm_free(&local) != MPI_SUCCESS)
        return fail_run(e, "rank %d: MPI does not report which ranks share a machine", t->rank);
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
        .probe = mpi_probe,
        .pause = mpi_pause,
        .abort_run = mpi_abort_run,
        .close = mpi_close,
        .release = mpi_release,
    };
    struct mpi_transport *m = calloc(1, sizeof *m);
    int provided;
    if (!m) {
        fail_run(e, "rank %d: out of memory opening MPI", launcher_rank());
        return NULL;
    }
    m->base.ops = &ops;
    m->base.timeout = timeout;
    mpi_shared_memory_open();
    set_alarm(&m->base, launcher_rank(), "MPI_Init");
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        fail_run(e, "rank %d: MPI_Init failed; see what MPI printed", launcher_rank());
        free(m);
        return NULL;
    }
    at_start_keep_ignored(); /* UCX gives SIGHUP a handler */
    /* No MPI_Finalize on failure: it would wait for ranks that wait for this one. mpirun ends the others when
     * a process exits without it. */
    if (query_ranks(&m->base, e) != 0) {
        mpi_release(&m->base);
        return NULL;
    }
    alarm(0);
    return &m->base;
}
