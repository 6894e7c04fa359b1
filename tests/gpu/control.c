/* tests/cuda/emulator/control.h on a real GPU, so that the same tests run there. Its settings
 * have no effect. */
#include "tests/cuda/emulator/control.h"

struct emulator_gpu emulator_gpu = {.count = 1};

struct emulator_products emulator_products;
double (*emulator_seconds)(const char *kernel, int candidate);
bool emulator_no_sums, emulator_no_gelu;
int64_t emulator_prefetched;

int64_t cuda_attention_tiles; /* counted by the emulator alone */

void emulator_seed(uint64_t seed) {
    (void)seed;
}

int emulator_allocations(void) {
    return 0;
}

int64_t emulator_launches(void) {
    return 0;
}

int64_t emulator_overlapping(void) {
    return 0;
}

int64_t emulator_graph_launches(void) {
    return 0;
}

bool emulator_on_gpu(void) {
    return true;
}

void emulator_refuse_graphs(const char *what) {
    (void)what;
}
