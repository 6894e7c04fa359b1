/* Linked only into build/.../emulator/train_iha, the whole program on emulated GPUs: the queue runs on a
 * thread of its own, as on a GPU. Environment variables (defaults in parentheses):
 *
 *   EMULATOR_GPUS         number of GPUs (1); NCCL needs one per rank
 *   EMULATOR_DRIVER       the version of CUDA that the driver supports (13000), 0: there is no driver
 *   EMULATOR_SEED         the order of ready work, threads and blocks (2); each rank of a run gets its own
 *   EMULATOR_DELAY_US     the longest pause before a piece of work, in microseconds (0)
 *   EMULATOR_STUCK        "rank:launch": that rank's launch of that number never ends
 *   EMULATOR_QUEUE        how much work can be queued before the host waits (0: no limit)
 *   EMULATOR_NO_CAPTURE   which call of CUDA graphs fails: begin, end or instantiate
 *   EMULATOR_REPORT       if set, print at the end how many graphs were launched
 *   EMULATOR_PRODUCTS     what is wrong with the last quarter of cuBLASLt's results: unwritten or wrong
 *   EMULATOR_HOST_MEMORY  bytes of free host memory that the program sees
 *
 * NCCL's faults and delays are described in nccl_tasks.cc. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "tests/cuda/emulator/control.h"

static int number(const char *variable, int fallback) {
    const char *text = getenv(variable);
    return text ? atoi(text) : fallback;
}

static int started_rank() {
    for (const char *variable : {"OMPI_COMM_WORLD_RANK", "RANK", "SLURM_PROCID"})
        if (number(variable, 0) > 0)
            return number(variable, 0);
    return 0;
}

/* Linked in place of cpu_memory_available() (ld --wrap). */
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
    const char *hanging = getenv("EMULATOR_STUCK");
    emulator_gpu.count = number("EMULATOR_GPUS", 1);
    emulator_gpu.driver = number("EMULATOR_DRIVER", 13000);
    emulator_seed((uint64_t)number("EMULATOR_SEED", 2) + (uint64_t)started_rank() * 1000);
    if (hanging && sscanf(hanging, "%d:%lld", &rank, &launch) == 2 && rank == started_rank())
        emulator_hang_launch(launch);
    emulator_limit_queue(number("EMULATOR_QUEUE", 0));
    emulator_refuse_graphs(getenv("EMULATOR_NO_CAPTURE"));
    if (const char *fault = getenv("EMULATOR_PRODUCTS"))
        emulator_products = {
            strcmp(fault, "wrong") == 0 ? PRODUCTS_WRONG : PRODUCTS_UNWRITTEN, 3, 2, -1, 0, 0};
    if (getenv("EMULATOR_REPORT"))
        atexit(report);
    emulator_background(number("EMULATOR_DELAY_US", 0));
}
