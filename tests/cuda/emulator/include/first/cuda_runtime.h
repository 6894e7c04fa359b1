/* In place of the toolkit's header of this name, which nccl.h includes and whose templates launch kernels on
 * a GPU; emulator.h defines those for the emulator. */
#include <cuda_runtime_api.h>
