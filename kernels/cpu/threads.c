/* How many threads compute, and which processor each runs on.
 *
 * A library that splits its work by omp_get_max_threads() leaves part of a result unwritten when the parallel
 * region then gets fewer threads (OMP_DYNAMIC, OMP_THREAD_LIMIT, OMP_MAX_ACTIVE_LEVELS; oneDNN's sgemm does
 * so). So the team is made once, here: what could change its size is switched off or respected, a parallel
 * region is opened, and the number of threads that it got is used everywhere from then on.
 *
 * A kernel is a parallel loop with a barrier at its end, thousands of times a second. When the system runs
 * two of our threads on one processor, even briefly, the barrier waits for a whole time slice; some virtual
 * machines do so while another processor idles (measured: six times slower). So where all processors are
 * used, thread i is pinned to the i-th of them. With fewer threads the system chooses: two such runs side by
 * side must not both be pinned to the first processors. OMP_PROC_BIND or GOMP_CPU_AFFINITY, when set, decide
 * instead.
 *
 * Ranks on one machine that may use the same processors divide them, in rank order. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/cpu/cgroup.h"
#include "kernels/cpu/cpu.h"
#include "kernels/limits.h"

/* ---- processors ---- */

/* What this process may run on, as it was started; later calls would see where a thread was pinned. */
static const cpu_set_t *allowed_processors(void) {
    static cpu_set_t allowed;
    static bool known;
    if (!known && sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        CPU_ZERO(&allowed); /* more processors than a cpu_set_t holds: not pinned */
    known = true;
    return &allowed;
}

static int count_processors(const cpu_set_t *allowed) {
    int count = CPU_COUNT(allowed);
    if (count == 0)
        count = (int)sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? count : 1;
}

/* The n-th processor of a set. */
static int nth_processor(const cpu_set_t *set, int n) {
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, set) && n-- == 0)
            return cpu;
    return 0;
}

struct host_processors {
    char host[64];
    cpu_set_t allowed;
};

/* How many ranks may use the same processors as this one, and the index of this one among them. */
static void count_sharers(struct comm *comm, const cpu_set_t *allowed, int *sharers, int *index) {
    struct host_processors mine = {.allowed = *allowed};
    *sharers = 1;
    *index = 0;
    if (!comm || comm->ranks == 1)
        return;
    gethostname(mine.host, sizeof mine.host - 1);
    const struct host_processors *all = comm_all_gather_small(comm, &mine, sizeof mine);
    *sharers = 0;
    for (int r = 0; r < comm->ranks; r++)
        if (strcmp(all[r].host, mine.host) == 0 && CPU_EQUAL(&all[r].allowed, allowed)) {
            *index += r < comm->rank;
            ++*sharers;
        }
}

/* ---- how many threads ---- */

struct team {
    int processors; /* that the process may use, by affinity and by quota */
    int wanted;
    bool requested; /* by system.threads; otherwise `wanted` may be lowered */
    char note[96];
};

/* Would OpenMP use this value of OMP_NUM_THREADS? It ignores others, with a warning. */
static bool is_thread_list(const char *text) {
    return text && atoi(text) > 0 && text[strspn(text, "0123456789, ")] == '\0';
}

/* As OMP_NUM_THREADS was at the start: omp_set_num_threads changes what OpenMP reports later. */
static int environment_threads(void) {
    static int threads = -1;
    if (threads < 0)
        threads = is_thread_list(getenv("OMP_NUM_THREADS")) ? omp_get_max_threads() : 0;
    return threads;
}

static int choose_threads(struct team *t, int requested, int sharers, struct error *e) {
    int from_environment = environment_threads(), limit = omp_get_thread_limit();
    double quota = cgroup_cpu_quota();
    int processors = t->processors;
    t->requested = requested > 0;
    if (requested > processors)
        return fail_user(
            e,
            "system.threads = %d, but this process may use %d processor%s; lower it to %d or set "
            "system.threads = all",
            requested, processors, processors == 1 ? "" : "s", processors);
    if (quota > 0 &&
        quota < processors) { /* more threads than that would wait for each other's next period */
        t->processors = quota < 1 ? 1 : (int)(quota + 0.5);
        snprintf(t->note, sizeof t->note, ", CPU quota %.3g", quota);
    }
    int share = t->processors / sharers > 1 ? t->processors / sharers : 1;
    t->wanted = requested > 0 ? requested : from_environment > 0 ? from_environment : share;
    if (t->wanted > processors) {
        t->wanted = processors;
        snprintf(t->note, sizeof t->note, ", OMP_NUM_THREADS = %d limited to the processors",
                 from_environment);
    }
    if (t->wanted > limit && t->requested)
        return fail_user(
            e, "system.threads = %d, but OMP_THREAD_LIMIT allows %d; unset it or lower system.threads",
            requested, limit);
    t->wanted = t->wanted < limit ? t->wanted : limit;
    return 0;
}

/* ---- making the team ---- */

/* The stack size that OpenMP will request, in bytes, from OMP_STACKSIZE or GOMP_STACKSIZE (a number of KiB,
 * or with a letter B, K, M or G); 0: the system's default. */
static size_t environment_stack(const char **name) {
    static const char *const names[] = {"OMP_STACKSIZE", "GOMP_STACKSIZE"};
    for (int i = 0; i < 2; i++) {
        const char *text = getenv(names[i]);
        char *end;
        if (!text)
            continue;
        unsigned long long n = strtoull(text, &end, 10);
        while (*end == ' ')
            end++;
        int shift = *end == 'B' || *end == 'b'   ? 0
                    : *end == 'M' || *end == 'm' ? 20
                    : *end == 'G' || *end == 'g' ? 30
                                                 : 10;
        if (end == text || n == 0)
            continue; /* OpenMP has printed a warning */
        *name = names[i];
        return n > SIZE_MAX >> shift ? SIZE_MAX : (size_t)n << shift;
    }
    return 0;
}

struct latch {
    pthread_mutex_t mutex;
    pthread_cond_t opened;
    bool open;
};

static void *wait_for_latch(void *latch) {
    struct latch *l = latch;
    pthread_mutex_lock(&l->mutex);
    while (!l->open)
        pthread_cond_wait(&l->opened, &l->mutex);
    pthread_mutex_unlock(&l->mutex);
    return NULL;
}

/* Check that `count` more threads can be started: OpenMP would end the program if they cannot. */
static int try_threads(int count, struct error *e) {
    struct latch latch = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
    pthread_t *threads = malloc((size_t)(count > 0 ? count : 1) * sizeof *threads);
    pthread_attr_t attributes;
    const char *name = "";
    size_t stack = environment_stack(&name);
    int started = 0, status = threads ? 0 : ENOMEM;
    pthread_attr_init(&attributes);
    if (stack > 0 && pthread_attr_setstacksize(&attributes, stack) != 0)
        status = EINVAL;
    while (status == 0 && started < count &&
           (status = pthread_create(&threads[started], &attributes, wait_for_latch, &latch)) == 0)
        started++;
    pthread_mutex_lock(&latch.mutex);
    latch.open = true;
    pthread_cond_broadcast(&latch.opened);
    pthread_mutex_unlock(&latch.mutex);
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    pthread_attr_destroy(&attributes);
    free(threads);
    if (status == 0)
        return 0;
    if (stack > 0)
        return fail_user(e, "cannot start %d threads with stacks of %s = %s: %s; unset it, or set 8M",
                         count + 1, name, getenv(name), strerror(status));
    char what[32];
    snprintf(what, sizeof what, "%d threads", count + 1);
    limits_fail_thread(e, what, status);
    e->exit_code = EXIT_USER; /* the user asks for so many */
    return -1;
}

static size_t stack_of_this_thread(void) {
    pthread_attr_t attributes;
    void *address;
    size_t bytes = SIZE_MAX;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0)
        return bytes;
    pthread_attr_getstack(&attributes, &address, &bytes);
    pthread_attr_destroy(&attributes);
    return bytes;
}

static void pin_this_thread(const cpu_set_t *allowed, bool each, int processor) {
    cpu_set_t mine = *allowed;
    if (each) {
        CPU_ZERO(&mine);
        CPU_SET(nth_processor(allowed, processor), &mine);
    }
    sched_setaffinity(0, sizeof mine, &mine); /* if it fails, threads are only slower */
}

int cpu_set_threads(int requested, struct comm *comm, char note[96], struct error *e) {
    const cpu_set_t *allowed = allowed_processors();
    struct team t = {.processors = count_processors(allowed)};
    int sharers, index, team = 0;
    count_sharers(comm, allowed, &sharers, &index); /* all ranks together, so before any fails */
    if (choose_threads(&t, requested, sharers, e) != 0 || try_threads(t.wanted - 1, e) != 0)
        return -1;
    omp_set_dynamic(0);
    if (omp_get_max_active_levels() < 1)
        omp_set_max_active_levels(1);
    omp_set_num_threads(t.wanted);
    int share = CPU_COUNT(allowed) / sharers;
    bool pins = CPU_COUNT(allowed) > 0 && !getenv("OMP_PROC_BIND") && !getenv("GOMP_CPU_AFFINITY");
    bool each = t.wanted == share && t.wanted <= t.processors; /* together, all processors are used */
    size_t stack = SIZE_MAX;
#pragma omp parallel reduction(min : stack)
    {
        stack = stack_of_this_thread();
        if (pins)
            pin_this_thread(allowed, each, index * share + omp_get_thread_num());
#pragma omp master
        team = omp_get_num_threads();
    }
    if (stack < MIN_STACK_BYTES)
        return fail_user(
            e,
            "threads have stacks of %zu KiB, and at least %d KiB are needed; unset OMP_STACKSIZE and "
            "GOMP_STACKSIZE, or raise ulimit -s",
            stack >> 10, MIN_STACK_BYTES >> 10);
    if (team < t.wanted && t.requested)
        return fail_user(e, "system.threads = %d, but OpenMP gives %d; unset the OMP_ variables or lower it",
                         requested, team);
    omp_set_num_threads(team);
    snprintf(note, 96, "%s", t.note);
    return team;
}
