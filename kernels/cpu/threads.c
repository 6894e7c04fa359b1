/* How many threads, and keeping each on its processor.
 *
 * A kernel is a parallel loop with a barrier at its end, thousands of times a second. When the system puts
 * two of our threads on one processor, even for a tick, the barrier waits for a whole time slice; some
 * virtual machines do so by default while another processor idles (measured there: six times slower). So
 * where we use all processors we may use, thread i stays on the i-th of them. With fewer threads the system
 * keeps its choice: two such runs side by side must not meet on the first processors. OMP_PROC_BIND or
 * GOMP_CPU_AFFINITY, when set, decide instead.
 *
 * Ranks on one machine that were given the same processors divide them, in rank order. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

/* The n-th processor of a set. */
static int nth_processor(const cpu_set_t *set, int n) {
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, set) && n-- == 0)
            return cpu;
    return 0;
}

struct place {
    char host[64];
    cpu_set_t allowed;
};

/* How many ranks have the same processors as this one, and which of them it is. */
static void count_sharers(struct comm *comm, const cpu_set_t *allowed, int *sharers, int *index) {
    struct place mine = {.allowed = *allowed};
    *sharers = 1;
    *index = 0;
    if (!comm || comm->ranks == 1)
        return;
    gethostname(mine.host, sizeof mine.host - 1);
    const struct place *all = comm_all_gather_small(comm, &mine, sizeof mine);
    *sharers = 0;
    for (int r = 0; r < comm->ranks; r++)
        if (strcmp(all[r].host, mine.host) == 0 && CPU_EQUAL(&all[r].allowed, allowed)) {
            *index += r < comm->rank;
            ++*sharers;
        }
}

static void pin(const cpu_set_t *allowed, int threads, bool each, int first) {
    (void)threads; /* in a build without OpenMP */
#pragma omp parallel num_threads(threads)
    {
        cpu_set_t mine = *allowed;
        if (each) {
            CPU_ZERO(&mine);
            CPU_SET(nth_processor(allowed, first + omp_get_thread_num()), &mine);
        }
        sched_setaffinity(0, sizeof mine, &mine); /* not vital: without it we are slower at worst */
    }
}

int cpu_place_threads(int threads, struct comm *comm) {
    static cpu_set_t allowed; /* as the process was started */
    static bool known;
    int sharers, index;
    if (!known && sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        CPU_ZERO(&allowed);
    known = true;
    count_sharers(comm, &allowed, &sharers, &index);
    int processors = CPU_COUNT(&allowed), share = processors / sharers > 1 ? processors / sharers : 1;
    if (threads > 0)
        omp_set_num_threads(threads);
    else if (sharers > 1 && !getenv("OMP_NUM_THREADS"))
        omp_set_num_threads(share);
    threads = omp_get_max_threads();
    if (processors > 0 && !getenv("OMP_PROC_BIND") && !getenv("GOMP_CPU_AFFINITY"))
        pin(&allowed, threads, threads == share && share * sharers <= processors, index * share);
    return threads;
}
