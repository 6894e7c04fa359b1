/* What kernels share: vector loads and stores, conversion, sums over warps and blocks in a fixed order. */
#ifndef IHA_KERNELS_CUDA_CUDA_CUH
#define IHA_KERNELS_CUDA_CUDA_CUH

#include "kernels/cuda/cuda.h"

/* Wait until the kernels that were queued before have ended and what they wrote can be read: the first
 * statement of every kernel, since launch() lets it begin while the one before it ends. Before Hopper kernels
 * do not overlap, and this does nothing. */
static __device__ __forceinline__ void wait_for_previous() {
#ifdef CUDA_EMULATOR
    emulator_wait_for_previous();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* x times this is the exponent of e^x in base 2: the GPU has an instruction for 2^x. */
constexpr double LOG2_E = 1.4426950408889634;

/* Elements in 16 bytes, the widest load or store of a thread. */
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

/* The unsigned type of that many bytes: moved by a single load or store instruction. */
template <int BYTES> struct word;
template <> struct word<2> { typedef uint16_t type; };
template <> struct word<4> { typedef uint32_t type; };
template <> struct word<8> { typedef uint2 type; };
template <> struct word<16> { typedef uint4 type; };

/* N elements as one word, and as numbers to compute with. */
template <int N, typename T> using word_of = typename word<N *(int)sizeof(T)>::type;

template <int N, typename T> __device__ __forceinline__ void unpack(word_of<N, T> from, float (&x)[N]) {
    union {
        word_of<N, T> whole;
        T part[N];
    } u = {from};
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = to_float(u.part[i]);
}

template <int N, typename T> __device__ __forceinline__ word_of<N, T> pack(const float (&x)[N]) {
    union U {
        word_of<N, T> whole;
        T part[N];
        __device__ U() : whole() {}
    } u;
#pragma unroll
    for (int i = 0; i < N; i++)
        u.part[i] = from_float<T>(x[i]);
    return u.whole;
}

/* A GPU faults on an address that is not a multiple of the word's size; so does the emulator. */
template <typename W> __device__ __forceinline__ void check_aligned(const void *p) {
#ifdef CUDA_EMULATOR
    if ((uintptr_t)p % sizeof(W) != 0)
        emulator_fail("%p is not aligned to %zu bytes", p, sizeof(W));
#else
    (void)p;
#endif
}

template <int N, typename T> __device__ __forceinline__ word_of<N, T> load_word(const T *p) {
    check_aligned<word_of<N, T>>(p);
    return *reinterpret_cast<const word_of<N, T> *>(p);
}

template <int N, typename T> __device__ __forceinline__ void store_word(T *p, word_of<N, T> x) {
    check_aligned<word_of<N, T>>(p);
    *reinterpret_cast<word_of<N, T> *>(p) = x;
}

/* N consecutive elements, aligned to their size, at most 16 bytes of them (32 as two words). */
template <int N, typename T> __device__ __forceinline__ void load(const T *p, float (&x)[N]) {
    if constexpr (N * sizeof(T) > 16) {
        load<N / 2>(p, *reinterpret_cast<float(*)[N / 2]>(x));
        load<N / 2>(p + N / 2, *reinterpret_cast<float(*)[N / 2]>(x + N / 2));
    } else {
        unpack<N, T>(load_word<N>(p), x);
    }
}

template <int N, typename T> __device__ __forceinline__ void store(T *p, const float (&x)[N]) {
    if constexpr (N * sizeof(T) > 16) {
        store<N / 2>(p, *reinterpret_cast<const float(*)[N / 2]>(x));
        store<N / 2>(p + N / 2, *reinterpret_cast<const float(*)[N / 2]>(x + N / 2));
    } else {
        store_word<N>(p, pack<N, T>(x));
    }
}

/* The block's dynamic shared memory. */
template <typename T> __device__ __forceinline__ T *dynamic_shared() {
#ifdef CUDA_EMULATOR
    return (T *)emulator_dynamic_shared();
#else
    extern __shared__ __align__(1024) unsigned char cuda_dynamic_shared[];
    return (T *)cuda_dynamic_shared;
#endif
}

/* The sum over a warp. With exchanges by xor (a butterfly) every lane gets it, bit-identical. */
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

/* The sum over a block of THREADS, the same bits in every thread. All threads call it. */
template <int THREADS, typename T> __device__ __forceinline__ T block_sum(T x) {
    static_assert(THREADS % 32 == 0, "whole warps");
    x = warp_sum(x);
    if constexpr (THREADS > 32) {
        __shared__ T part[THREADS / 32];
        __syncthreads(); /* all threads have read `part` of the previous call */
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

/* On the host: call f with the vector width, 16 bytes or one element, that rows of C elements allow. */
template <typename T, typename F> void by_width(int64_t C, bool aligned, F f) {
    if (aligned && C % VECTOR<T> == 0)
        f(std::integral_constant<int, VECTOR<T>>());
    else
        f(std::integral_constant<int, 1>());
}

#endif
