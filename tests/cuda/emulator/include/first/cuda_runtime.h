/* In the place of the toolkit's header of this name, which nccl.h includes: its templates launch kernels on GPUs,
 * emulator.h's here. */
#include <cuda_runtime_api.h>
