/* tests/simt/control.h on a real GPU: what lets the same tests run there. There is nothing to steer. */
#include "tests/simt/control.h"

struct simt_gpu simt_gpu = {.count = 1};

int64_t cuda_attention_tiles; /* counted in the harness alone */

void simt_seed(uint64_t seed) {
    (void)seed;
}

int simt_allocations(void) {
    return 0;
}

int64_t simt_launches(void) {
    return 0;
}

bool simt_on_gpu(void) {
    return true;
}
