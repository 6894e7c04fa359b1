/* What kernels share: vector access, conversion, and sums over warps and blocks in a fixed order. */
#ifndef IHA_CUDA_CUH
#define IHA_CUDA_CUH

#include "kernels/cuda/cuda.h"

/* Elements in 16 bytes, the widest access there is. */
template <typename T> constexpr int VECTOR = 16 / (int)sizeof(T);

static __device__ __forceinline__ float to_float(float x) {
    return x;
}

static __device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}

template <typename T> __device__ __forceinline__ T from_float(float x) {
    return x;
}

template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

/* The unsigned type of that many bytes: what one load instruction moves. */
template <int BYTES> struct word;
template <> struct word<2> { typedef uint16_t type; };
template <> struct word<4> { typedef uint32_t type; };
template <> struct word<8> { typedef uint2 type; };
template <> struct word<16> { typedef uint4 type; };

/* N consecutive elements, aligned to their size or to 16 bytes. */
template <int N, typename T> __device__ __forceinline__ void load(const T *p, float (&x)[N]) {
    constexpr int EACH = N * sizeof(T) > 16 ? VECTOR<T> : N;
    typedef typename word<EACH *(int)sizeof(T)>::type W;
#pragma unroll
    for (int i = 0; i < N; i += EACH) {
        union {
            W whole;
            T part[EACH];
        } u = {*reinterpret_cast<const W *>(p + i)};
#pragma unroll
        for (int j = 0; j < EACH; j++)
            x[i + j] = to_float(u.part[j]);
    }
}

template <int N, typename T> __device__ __forceinline__ void store(T *p, const float (&x)[N]) {
    constexpr int EACH = N * sizeof(T) > 16 ? VECTOR<T> : N;
    typedef typename word<EACH *(int)sizeof(T)>::type W;
#pragma unroll
    for (int i = 0; i < N; i += EACH) {
        union U {
            W whole;
            T part[EACH];
            __device__ U() : whole() {}
        } u;
#pragma unroll
        for (int j = 0; j < EACH; j++)
            u.part[j] = from_float<T>(x[i + j]);
        *reinterpret_cast<W *>(p + i) = u.whole;
    }
}

/* The block's dynamic shared memory. */
template <typename T> __device__ __forceinline__ T *dynamic_shared() {
#ifdef SIMT
    return (T *)simt_dynamic_shared();
#else
    extern __shared__ __align__(1024) unsigned char cuda_dynamic_shared[];
    return (T *)cuda_dynamic_shared;
#endif
}

/* The sum over a warp, the same bits in every lane. */
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2)
        x += __shfl_xor_sync(0xffffffff, x, with);
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, with));
    return x;
}

/* The sum over a block of THREADS, the same bits in every thread. All threads call it. */
template <int THREADS, typename T> __device__ __forceinline__ T block_sum(T x) {
    static_assert(THREADS % 32 == 0, "whole warps");
    x = warp_sum(x);
    if constexpr (THREADS > 32) {
        __shared__ T part[THREADS / 32];
        __syncthreads(); /* the last call's readers are done */
        if (threadIdx.x % 32 == 0)
            part[threadIdx.x / 32] = x;
        __syncthreads();
        x = part[0];
#pragma unroll
        for (int i = 1; i < THREADS / 32; i++)
            x += part[i];
    }
    return x;
}

#endif
