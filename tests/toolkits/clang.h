/* For Clang, which compiles kernels where a toolkit's wheels bring no nvcc: what it lacks of the CUDA language. */
#ifndef IHA_TESTS_TOOLKITS_CLANG_H
#define IHA_TESTS_TOOLKITS_CLANG_H

/* It neither includes sm_32_intrinsics.h nor has all of its stores of its own. */
static inline __device__ void __stcg(uint4 *p, uint4 x) {
    *p = x;
}

#undef __grid_constant__
#define __grid_constant__ /* where a parameter is kept; not part of its type */

#endif
