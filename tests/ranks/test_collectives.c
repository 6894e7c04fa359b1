/* Collectives over TCP between ranks that are threads of this process: every result bit for bit, in each
 * type in which gradients are sent, and the number of bytes sent. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/comm/comm_p2p.h"
#include "kernels/comm/launcher.h"

enum { MOST_RANKS = 3, N = 5003 /* elements of a share; more than one block of a sum */ };

/* ---- a transport that counts ---- */

struct counter {
    struct transport base; /* a copy of the inner one's with other operations */
    struct transport *inner;
    size_t sent;
};

static struct transport *inner(struct transport *t) {
    return ((struct counter *)t)->inner;
}

static int count_reserve(struct transport *t, int count, struct error *e) {
    return inner(t)->ops->reserve(inner(t), count, e);
}

static int count_receive(struct transport *t, int slot, int source, void *to, size_t bytes, struct error *e) {
    return inner(t)->ops->receive(inner(t), slot, source, to, bytes, e);
}

static int count_send(struct transport *t, int slot, int target, const void *from, size_t bytes,
                      struct error *e) {
    ((struct counter *)t)->sent += bytes;
    return inner(t)->ops->send(inner(t), slot, target, from, bytes, e);
}

static int count_test(struct transport *t, int slot, int count, struct error *e) {
    return inner(t)->ops->test(inner(t), slot, count, e);
}

static void count_pause(struct transport *t, double seconds) {
    inner(t)->ops->pause(inner(t), seconds);
}

static void count_abort_run(struct transport *t, const char *line) {
    inner(t)->ops->abort_run(inner(t), line);
}

static void count_close(struct transport *t) {
    inner(t)->ops->close(inner(t));
}

static void counter_open(struct counter *c, struct transport *t) {
    static const struct transport_ops ops = {.name = "counter",
                                             .close_needs_barrier = true,
                                             .reserve = count_reserve,
                                             .receive = count_receive,
                                             .send = count_send,
                                             .test = count_test,
                                             .pause = count_pause,
                                             .abort_run = count_abort_run,
                                             .close = count_close,
                                             .release = count_close};
    *c = (struct counter){.base = *t, .inner = t};
    c->base.ops = &ops;
}

/* ---- ranks as threads ---- */

struct job {
    int rank, ranks, port;
    enum dtype dtype, wire;
    bool in_place, accumulate;
    struct counter counter;
    struct comm *comm;
    int wrong;      /* elements, of all collectives */
    size_t reduced; /* bytes sent by one reduce_scatter */
};

/* A rank's value at an index: of many magnitudes, so that another order of summation gives other bits;
 * some round to bf16 up, down and to even; some are infinite or NaN. */
static double given(const struct job *j, int rank, int64_t i) {
    if (i % 1000 == 7)
        return rank == 1 ? (double)INFINITY : 1;
    if (i % 1000 == 8)
        return rank == 1 ? (double)NAN : 1;
    if (i % 10 == 3)
        return 1 + (double)(1 + 2 * (i / 10 % 64)) / 256; /* in the middle between two of bf16 */
    uint64_t h = ((uint64_t)i * 4 + (uint64_t)rank + 1) * 0x9e3779b97f4a7c15u;
    double x = ldexp((double)(int64_t)(h ^ h >> 29), (int)(h >> 60) - 66);
    return j->dtype == DTYPE_F64 ? x : (double)(float)x;
}

/* To the nearest bf16, of two the even one, by arithmetic rather than bits. */
static double nearest_bf16(double x) {
    int exponent;
    if (!isfinite(x) || x == 0)
        return x;
    double fraction = frexp((double)(float)x, &exponent); /* [0.5, 1): 8 bits of it stay */
    return ldexp(nearbyint(ldexp(fraction, 8)), exponent - 8);
}

static bool same(double a, double b) {
    return a == b || (isnan(a) && isnan(b));
}

static double at(const void *data, enum dtype t, int64_t i) {
    return t == DTYPE_F64 ? ((const double *)data)[i] : ((const float *)data)[i];
}

static void put(void *data, enum dtype t, int64_t i, double x) {
    if (t == DTYPE_F64)
        ((double *)data)[i] = x;
    else
        ((float *)data)[i] = (float)x;
}

/* In rank order, every step in the buffer's type. */
static double expected(const struct job *j, int64_t i, double before) {
    volatile float narrow = 0;
    volatile double wide = 0;
    for (int r = 0; r < j->ranks; r++) {
        double x = given(j, r, i);
        x = j->wire == DTYPE_BF16 && r != j->rank ? nearest_bf16(x) : x;
        narrow = r == 0 ? (float)x : narrow + (float)x;
        wide = r == 0 ? x : wide + x;
    }
    if (j->accumulate) {
        narrow = (float)before + narrow;
        wide = before + wide;
    }
    return j->dtype == DTYPE_F64 ? wide : (double)narrow;
}

static void scatter(struct job *j) {
    struct comm *c = j->comm;
    size_t bytes = dtype_bytes(j->dtype), before = j->counter.sent;
    int64_t own = (int64_t)c->rank * N, all = (int64_t)c->ranks * N;
    char *buffer = malloc((size_t)all * bytes), *apart = malloc(N * bytes);
    char *piece = j->in_place ? buffer + (size_t)own * bytes : apart;
    for (int64_t i = 0; i < all; i++)
        put(buffer, j->dtype, i, given(j, c->rank, i));
    for (int64_t i = 0; i < N && !j->in_place; i++)
        put(piece, j->dtype, i, (double)(i % 7) / 3);
    c->ops->wait(c, c->ops->reduce_scatter(c, tensor_of(buffer, j->dtype, all, 0, 0, 0, 0),
                                           tensor_of(piece, j->dtype, N, 0, 0, 0, 0), j->accumulate));
    j->reduced = j->counter.sent - before;
    for (int64_t i = 0; i < N; i++) {
        double old = j->dtype == DTYPE_F64 ? (double)(i % 7) / 3 : (double)(float)((double)(i % 7) / 3);
        j->wrong += !same(at(piece, j->dtype, i), expected(j, own + i, old));
    }
    free(buffer);
    free(apart);
}

/* More collectives at once than can be in flight, waited for in another order. */
static void gather(struct job *j) {
    enum { AT_ONCE = 5 };
    static const int order[AT_ONCE] = {4, 0, 3, 1, 2};
    struct comm *c = j->comm;
    int64_t all = (int64_t)c->ranks * N;
    float *buffers[AT_ONCE];
    comm_event events[AT_ONCE];
    for (int b = 0; b < AT_ONCE; b++) {
        buffers[b] = calloc((size_t)all, sizeof(float));
        for (int64_t i = 0; i < N; i++)
            buffers[b][c->rank * N + i] = (float)(c->rank * 10 + b) + (float)i / 8192;
        events[b] = c->ops->all_gather(c, tensor_of(buffers[b], DTYPE_F32, all, 0, 0, 0, 0));
    }
    for (int b = 0; b < AT_ONCE; b++)
        c->ops->wait(c, events[order[b]]);
    for (int b = 0; b < AT_ONCE; b++) {
        for (int64_t i = 0; i < all; i++)
            j->wrong += buffers[b][i] != (float)(i / N * 10 + b) + (float)(i % N) / 8192;
        free(buffers[b]);
    }
}

static void sum(struct job *j) {
    double values[2] = {1e16 * (j->rank == 0), 1 + j->rank}, expect[2] = {0, 0};
    for (int r = 0; r < j->ranks; r++) {
        expect[0] += 1e16 * (r == 0);
        expect[1] += 1 + r;
    }
    j->comm->ops->all_reduce(j->comm, values, 2);
    j->wrong += values[0] != expect[0] || values[1] != expect[1];
}

static void *run_rank(void *context) {
    struct job *j = context;
    struct error e = {0};
    struct launcher_env env = {.rank = j->rank,
                               .ranks = j->ranks,
                               .master_addr = "127.0.0.1",
                               .master_port = j->port,
                               .run_token = 7};
    struct transport *t = transport_tcp_open(&env, 20, &e);
    if (!t || (counter_open(&j->counter, t), !(j->comm = comm_p2p_open(&j->counter.base, &e))) ||
        j->comm->ops->reserve(j->comm, (int64_t)j->ranks * N, j->dtype, j->wire, &e) != 0) {
        fprintf(stderr, "%s\n", e.text);
        abort();
    }
    j->wrong +=
        j->comm->local_rank != j->rank || j->comm->local_ranks != j->ranks; /* all are on this machine */
    scatter(j);
    gather(j);
    scatter(j);
    sum(j);
    j->comm->ops->close(j->comm);
    return NULL;
}

static int free_port(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) != 0 || getsockname(fd, (struct sockaddr *)&a, &bytes) != 0)
        abort();
    close(fd);
    return ntohs(a.sin_port);
}

static struct comm *open_rank(struct job *j) {
    struct error e = {0};
    struct launcher_env env = {.rank = j->rank,
                               .ranks = j->ranks,
                               .master_addr = "127.0.0.1",
                               .master_port = j->port,
                               .run_token = 7};
    struct comm *c = comm_p2p_open(transport_tcp_open(&env, 20, &e), &e);
    if (!c)
        fprintf(stderr, "%s\n", e.text);
    return c;
}

static size_t check(int ranks, enum dtype dtype, enum dtype wire, bool in_place, bool accumulate) {
    struct job jobs[MOST_RANKS];
    pthread_t threads[MOST_RANKS];
    int port = free_port();
    for (int r = 0; r < ranks; r++) {
        jobs[r] = (struct job){.rank = r,
                               .ranks = ranks,
                               .port = port,
                               .dtype = dtype,
                               .wire = wire,
                               .in_place = in_place,
                               .accumulate = accumulate};
        assert_int_equal(pthread_create(&threads[r], NULL, run_rank, &jobs[r]), 0);
    }
    for (int r = 0; r < ranks; r++)
        pthread_join(threads[r], NULL);
    for (int r = 0; r < ranks; r++)
        if (jobs[r].wrong || jobs[r].reduced != jobs[0].reduced)
            fail_msg("rank %d of %d: %d wrong, %zu bytes", r, ranks, jobs[r].wrong, jobs[r].reduced);
    return jobs[0].reduced;
}

static void sums_are_in_rank_order(void **state) {
    (void)state;
    for (int ranks = 2; ranks <= MOST_RANKS; ranks++)
        for (int wire = 0; wire < 2; wire++) {
            enum dtype type = wire ? DTYPE_BF16 : DTYPE_F32;
            size_t others = (size_t)(ranks - 1) * N;
            assert_int_equal(check(ranks, DTYPE_F32, type, false, false), others * (wire ? 2 : 4));
            assert_int_equal(check(ranks, DTYPE_F32, type, true, false), others * (wire ? 2 : 4));
            assert_int_equal(check(ranks, DTYPE_F32, type, false, true), others * (wire ? 2 : 4));
            assert_int_equal(check(ranks, DTYPE_F64, type, false, true), others * (wire ? 2 : 8));
        }
}

/* ---- ranks as processes, for those that end ---- */

/* Run `what` on each rank, in a process of its own; all must end with exit code 1. What they print goes to
 * `output`. */
static void run_until_exit(int ranks, void (*what)(struct comm *), char *output, size_t size) {
    int pipes[2], status, port = free_port();
    size_t used = 0;
    assert_int_equal(pipe(pipes), 0);
    for (int r = 0; r < ranks; r++) {
        struct job j = {.rank = r, .ranks = ranks, .port = port};
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            dup2(pipes[1], STDERR_FILENO);
            close(pipes[0]);
            close(pipes[1]);
            struct comm *c = open_rank(&j);
            if (c)
                what(c);
            _exit(99);
        }
    }
    close(pipes[1]);
    for (ssize_t n = 1; n > 0; used += (size_t)n)
        n = read(pipes[0], output + used, size - 1 - used);
    output[used] = '\0';
    close(pipes[0]);
    for (int r = 0; r < ranks; r++) {
        assert_true(wait(&status) > 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != EXIT_RUN)
            fail_msg("status %x: %s", (unsigned)status, output);
    }
}

static void barrier(struct comm *c) {
    char all[MOST_RANKS];
    c->ops->all_gather_host(c, "", all, 1);
}

static void last_rank_aborts(struct comm *c) {
    barrier(c);
    if (c->rank == c->ranks - 1)
        c->ops->abort_run(c, "out of luck");
    barrier(c);
}

/* Rank 1 exchanges another number of bytes. */
static void differing_sizes(struct comm *c) {
    char all[64];
    barrier(c);
    c->ops->all_gather_host(c, all, all, c->rank == 1 ? 16 : 8);
}

/* Before the other ranks have closed their communicators. */
static void last_rank_dies_before_close(struct comm *c) {
    barrier(c);
    if (c->rank == c->ranks - 1)
        _exit(EXIT_RUN);
    c->ops->close(c);
}

/* Exactly one line, which contains `words`. */
static void check_one_line(const char *output, const char *words) {
    int lines = 0;
    for (const char *at = output; (at = strstr(at, "train_iha: ")); at++)
        lines++;
    if (lines != 1 || !strstr(output, words))
        fail_msg("\"%s\" is not one line with \"%s\"", output, words);
}

static void one_rank_aborts_the_run(void **state) {
    (void)state;
    char output[4096], host[256] = "", words[400];
    gethostname(host, sizeof host - 1);
    snprintf(words, sizeof words, "\ntrain_iha: rank %d (%s): out of luck\n", MOST_RANKS - 1, host);
    run_until_exit(MOST_RANKS, last_rank_aborts, output, sizeof output);
    check_one_line(output, words);
}

static void no_rank_ends_before_all_have_closed(void **state) {
    (void)state;
    char output[4096], words[80];
    run_until_exit(MOST_RANKS, last_rank_dies_before_close, output, sizeof output);
    check_one_line(output, "the end of the run failed: ");
    /* It "has ended"; or the connection to it is lost, when it had unread data. */
    snprintf(words, sizeof words, "rank %d (", MOST_RANKS - 1);
    assert_non_null(strstr(output, words));
}

static void ranks_out_of_step_are_found(void **state) {
    (void)state;
    char output[4096];
    run_until_exit(2, differing_sizes, output, sizeof output);
    assert_true(strstr(output, " sent message 2 of ") != NULL);
}

static void staging_memory_is_as_documented(void **state) {
    (void)state;
    assert_int_equal(comm_staging_bytes(100, DTYPE_F32, DTYPE_F32), COMM_IN_FLIGHT * 400);
    assert_int_equal(comm_staging_bytes(100, DTYPE_F64, DTYPE_F32), COMM_IN_FLIGHT * 800);
    assert_int_equal(comm_staging_bytes(100, DTYPE_F32, DTYPE_BF16), COMM_IN_FLIGHT * 400); /* in and out */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_are_in_rank_order),
        cmocka_unit_test(one_rank_aborts_the_run),
        cmocka_unit_test(no_rank_ends_before_all_have_closed),
        cmocka_unit_test(ranks_out_of_step_are_found),
        cmocka_unit_test(staging_memory_is_as_documented),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
