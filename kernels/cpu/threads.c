/* The number of threads, and pinning them to processors.
 *
 * An operation is a parallel loop with a barrier at its end, thousands of times a second. If the system puts
 * two of our threads on one processor, even briefly, the barrier waits for a whole time slice. Some virtual
 * machines do so by default while another processor is idle (measured on one: six times slower). So if we use
 * all processors that we may use, thread i is pinned to the i-th of them. With fewer threads the system
 * chooses: two such runs on one machine must not both be pinned to the first processors. OMP_PROC_BIND or
 * GOMP_CPU_AFFINITY, if set, take precedence.
 *
 * Ranks on one machine that may use the same processors divide them, in rank order. */
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

struct host_processors {
    char host[64];
    cpu_set_t allowed;
};

/* The number of ranks that may use the same processors as this one, and its index among them. */
static void find_sharing_ranks(struct comm *comm, const cpu_set_t *allowed, int *sharing, int *index) {
    struct host_processors mine = {.allowed = *allowed};
    *sharing = 1;
    *index = 0;
    if (!comm || comm->ranks == 1)
        return;
    gethostname(mine.host, sizeof mine.host - 1);
    const struct host_processors *all = comm_all_gather_small(comm, &mine, sizeof mine);
    *sharing = 0;
    for (int r = 0; r < comm->ranks; r++)
        if (strcmp(all[r].host, mine.host) == 0 && CPU_EQUAL(&all[r].allowed, allowed)) {
            *index += r < comm->rank;
            ++*sharing;
        }
}

/* one_each: pin thread i to the (first + i)-th allowed processor; otherwise threads may use all of them. */
static void pin_threads(const cpu_set_t *allowed, int threads, bool one_each, int first) {
    (void)threads; /* in a build without OpenMP */
#pragma omp parallel num_threads(threads)
    {
        cpu_set_t mine = *allowed;
        if (one_each) {
            CPU_ZERO(&mine);
            CPU_SET(nth_processor(allowed, first + omp_get_thread_num()), &mine);
        }
        sched_setaffinity(0, sizeof mine, &mine); /* errors are ignored: at worst it is slower */
    }
}

int cpu_set_threads(int threads, struct comm *comm) {
    static cpu_set_t allowed; /* when the process started: pinning changes what the system says */
    static bool known;
    int sharing, index;
    if (!known && sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        CPU_ZERO(&allowed);
    known = true;
    find_sharing_ranks(comm, &allowed, &sharing, &index);
    int processors = CPU_COUNT(&allowed), share = processors / sharing > 1 ? processors / sharing : 1;
    if (threads > 0)
        omp_set_num_threads(threads);
    else if (sharing > 1 && !getenv("OMP_NUM_THREADS"))
        omp_set_num_threads(share);
    threads = omp_get_max_threads();
    if (processors > 0 && !getenv("OMP_PROC_BIND") && !getenv("GOMP_CPU_AFFINITY"))
        pin_threads(&allowed, threads, threads == share && share * sharing <= processors, index * share);
    return threads;
}
