/* Linked into build/.../emulator/train_iha alone, the whole program on GPUs of the harness: the queue runs on a
 * thread of its own, as a GPU would. The environment says what is there:
 *
 *   EMULATOR_GPUS       how many (1); NCCL takes one rank on each
 *   EMULATOR_SEED       the order of what is ready, and of threads and blocks (2); processes of one run differ by
 *                   their rank
 *   EMULATOR_DELAY_US   the longest pause before a piece of work, in microseconds (0)
 *   EMULATOR_STUCK      "rank:launch": that rank's launch of that number never ends
 *   EMULATOR_QUEUE      how much work the queue takes before the host waits (all)
 *   EMULATOR_NO_CAPTURE what refuses to work with graphs: begin, end or instantiate
 *   EMULATOR_REPORT     anything: say at the end how many graphs were launched
 *   EMULATOR_HOST_MEMORY bytes of host memory that the program finds free
 *
 * and faults of NCCL as emulator_nccl_tasks.cc says. */
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "tests/cuda/emulator/control.h"

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
    const char *text = getenv("EMULATOR_HOST_MEMORY");
    return text ? (size_t)atoll(text) : __real_cpu_memory_available(dev);
}

static void report() {
    fprintf(stderr, "emulator: %lld graphs launched\n", (long long)emulator_graph_launches());
}

__attribute__((constructor)) static void start() {
    int rank;
    long long launch;
    const char *stuck = getenv("EMULATOR_STUCK");
    emulator_gpu.count = number("EMULATOR_GPUS", 1);
    emulator_seed((uint64_t)number("EMULATOR_SEED", 2) + (uint64_t)started_rank() * 1000);
    if (stuck && sscanf(stuck, "%d:%lld", &rank, &launch) == 2 && rank == started_rank())
        emulator_stick(launch);
    emulator_limit_queue(number("EMULATOR_QUEUE", 0));
    emulator_refuse_graphs(getenv("EMULATOR_NO_CAPTURE"));
    if (getenv("EMULATOR_REPORT"))
        atexit(report);
    emulator_background(number("EMULATOR_DELAY_US", 0));
}
