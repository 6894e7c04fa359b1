/* How an optimizer stores the parameters that it has updated in fp32. */
#ifndef IHA_KERNELS_CUDA_STORE_ROUNDED_CUH
#define IHA_KERNELS_CUDA_STORE_ROUNDED_CUH

#include "kernels/cuda/cuda.cuh"
#include "kernels/rounding.h"

/* Store updated master weights as parameters: to bf16 by stochastic rounding, in fp32 unchanged. */
template <int V>
__device__ __forceinline__ void store_rounded(bf16 *p, const float (&x)[V], uint32_t step, int64_t index) {
    typedef typename word<V * 2>::type W;
    union U {
        W whole;
        uint16_t part[V];
        __device__ U() : whole() {}
    } u;
#pragma unroll
    for (int j = 0; j < V; j++)
        u.part[j] = round_stochastic(x[j], step, (uint64_t)(index + j));
    *reinterpret_cast<W *>(p) = u.whole;
}

template <int V>
__device__ __forceinline__ void store_rounded(float *p, const float (&x)[V], uint32_t, int64_t) {
    store(p, x);
}

#endif
