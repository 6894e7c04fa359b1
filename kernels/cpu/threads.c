/* Keeping each thread on its processor.
 *
 * A kernel is a parallel loop with a barrier at its end, thousands of times a second. When the system puts
 * two of our threads on one processor, even for a tick, the barrier waits for a whole time slice; some
 * virtual machines do so by default while another processor idles (measured there: six times slower). So
 * where we use all processors we may use, thread i stays on the i-th of them. With fewer threads the system
 * keeps its choice: two such runs side by side must not meet on the first processors. OMP_PROC_BIND or
 * GOMP_CPU_AFFINITY, when set, decide instead. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>

#include "kernels/cpu/cpu.h"

/* The n-th processor of a set. */
static int nth_processor(const cpu_set_t *set, int n) {
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, set) && n-- == 0)
            return cpu;
    return 0;
}

void cpu_pin_threads(int threads) {
    static cpu_set_t allowed; /* as the process was started */
    static bool known;
    if (getenv("OMP_PROC_BIND") || getenv("GOMP_CPU_AFFINITY"))
        return;
    if (!known && sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return;
    known = true;
    bool pin = CPU_COUNT(&allowed) == threads;
#pragma omp parallel num_threads(threads)
    {
        cpu_set_t mine = allowed;
        if (pin) {
            CPU_ZERO(&mine);
            CPU_SET(nth_processor(&allowed, omp_get_thread_num()), &mine);
        }
        sched_setaffinity(0, sizeof mine, &mine); /* not vital: without it we are slower at worst */
    }
}
