/* What a program without the CUDA backend has in its place. Where kernels/cuda/ is linked too, its own
 * functions of these names count. */
#include "kernels/kernels.h"

__attribute__((weak)) int cuda_devices(void) {
    return 0;
}

/* NULL: there is none. */
__attribute__((weak)) const struct kernels *kernels_cuda(void) {
    return NULL;
}
