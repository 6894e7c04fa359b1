/* Linked into build/.../simt/train_iha alone, the whole program on GPUs of the harness: the queue runs on a
 * thread of its own, as a GPU would. The environment says what is there:
 *
 *   SIMT_GPUS       how many (1)
 *   SIMT_SEED       the order of what is ready, and of threads and blocks (2); processes of one run differ by
 *                   their rank
 *   SIMT_DELAY_US   the longest pause before a piece of work, in microseconds (0) */
#include <stdlib.h>

#include "tests/simt/control.h"

static int number(const char *variable, int otherwise) {
    const char *text = getenv(variable);
    return text ? atoi(text) : otherwise;
}

__attribute__((constructor)) static void start() {
    simt_gpu.count = number("SIMT_GPUS", 1);
    simt_seed((uint64_t)number("SIMT_SEED", 2) + (uint64_t)number("OMPI_COMM_WORLD_RANK", 0) * 1000);
    simt_background(number("SIMT_DELAY_US", 0));
}
