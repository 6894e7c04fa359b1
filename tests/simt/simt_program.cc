/* Linked into build/.../simt/train_iha alone, the whole program on GPUs of the harness: the queue runs on a
 * thread of its own, as a GPU would. The environment says what is there:
 *
 *   SIMT_GPUS       how many (1); NCCL takes one rank on each
 *   SIMT_SEED       the order of what is ready, and of threads and blocks (2); processes of one run differ by
 *                   their rank
 *   SIMT_DELAY_US   the longest pause before a piece of work, in microseconds (0) */
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

__attribute__((constructor)) static void start() {
    simt_gpu.count = number("SIMT_GPUS", 1);
    simt_seed((uint64_t)number("SIMT_SEED", 2) + (uint64_t)started_rank() * 1000);
    simt_background(number("SIMT_DELAY_US", 0));
}
