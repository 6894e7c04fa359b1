/* Stubs for programs without the CUDA backend. They are weak symbols: if kernels/cuda/ is linked, its
 * functions are used. */
#include "kernels/kernels.h"

__attribute__((weak)) int cuda_devices(struct error *why) {
    if (why)
        *why = (struct error){0};
    return 0;
}

__attribute__((weak)) const struct kernels *kernels_cuda(void) {
    return NULL;
}
