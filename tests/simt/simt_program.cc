/* Linked into build/.../simt/train_iha alone, the whole program on GPUs of the harness: the queue runs on a
 * thread of its own, as a GPU would. The environment says what is there:
 *
 *   SIMT_GPUS       how many (1); NCCL takes one rank on each
 *   SIMT_SEED       the order of what is ready, and of threads and blocks (2); processes of one run differ by
 *                   their rank
 *   SIMT_DELAY_US   the longest pause before a piece of work, in microseconds (0)
 *   SIMT_STUCK      "rank:launch": that rank's launch of that number never ends
 *   SIMT_QUEUE      how much work the queue takes before the host waits (all)
 *   SIMT_NO_CAPTURE what refuses to work with graphs: begin, end or instantiate
 *   SIMT_REPORT     anything: say at the end how many graphs were launched
 *   SIMT_HOST_MEMORY bytes of host memory that the program finds free
 *
 * and faults of NCCL as simt_nccl_tasks.cc says. */
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "tests/simt/control.h"

static int number(const char *variable, int otherwise) {
    const char *text = getenv(variable);
    return text ? atoi(text) : otherwise;
}

static int started_rank() {
    for (const char *variable : {"OMPI_COMM_WORLD_RANK", "RANK", "SLURM_PROCID"})
        if (number(variable, 0) > 0)
            return number(variable, 0);
    return 0;
}

/* For what the program asks; the linker puts it in place of the other. */
extern "C" size_t __real_cpu_memory_available(struct device *dev);
extern "C" size_t __wrap_cpu_memory_available(struct device *dev) {
    const char *text = getenv("SIMT_HOST_MEMORY");
    return text ? (size_t)atoll(text) : __real_cpu_memory_available(dev);
}

static void report() {
    fprintf(stderr, "simt: %lld graphs launched\n", (long long)simt_graph_launches());
}

__attribute__((constructor)) static void start() {
    int rank;
    long long launch;
    const char *stuck = getenv("SIMT_STUCK");
    simt_gpu.count = number("SIMT_GPUS", 1);
    simt_seed((uint64_t)number("SIMT_SEED", 2) + (uint64_t)started_rank() * 1000);
    if (stuck && sscanf(stuck, "%d:%lld", &rank, &launch) == 2 && rank == started_rank())
        simt_stick(launch);
    simt_limit_queue(number("SIMT_QUEUE", 0));
    simt_refuse_graphs(getenv("SIMT_NO_CAPTURE"));
    if (getenv("SIMT_REPORT"))
        atexit(report);
    simt_background(number("SIMT_DELAY_US", 0));
}
