/* The emulator: runs the CUDA backend's kernels on a CPU, to test them where there is no GPU.
 *
 * The .cu files compile with g++ against the toolkit's own headers and this one (-include
 * tests/cuda/emulator/emulator.h, which defines CUDA_EMULATOR). The emulator has its own CUDA runtime,
 * cuBLASLt and NCCL.
 *
 * Threads. A block's threads are fibers (fibers.cc). Each runs until it reaches a barrier, a warp operation
 * or an atomic; then the scheduler picks the next one by the seed (0: the first, 1: the last, others: at
 * random; odd seeds let one warp run ahead of the others as far as it can). Blocks run one after another, in
 * an order chosen in the same way. These are errors, reported with the kernel's name:
 *  - a barrier or warp operation that not all its threads reach, or that they reach at different places;
 *  - a store beside an allocation: every allocation of device and dynamic shared memory is followed, and
 *    device memory preceded, by a sentinel. With SANITIZE=1, AddressSanitizer also catches loads, where they
 *    happen;
 *  - a thread that does not wait for the kernel before it, although it was launched to overlap with that;
 *  - the host accessing device memory, which is protected except while kernels and copies run;
 *  - more shared memory than cudaFuncSetAttribute allowed, or a launch that a device would refuse.
 * New device memory and every block's shared memory are filled with 0xff (NaN). cp.async copies only when it
 * is waited for.
 *
 * Streams. Launches, copies and library calls are appended to their streams, which keep the order that CUDA
 * guarantees and no other: with even seeds work runs only when the host waits for it, and then only what that
 * needs; with odd seeds it may run at once. Among the work that is ready, the seed chooses as it does among
 * threads (queue.cc). So a missing event or wait shows as wrong results under some seed. Streams and events
 * are in streams.cc; capture and graphs, with the runtime's errors, in graphs.cc; the rest of the runtime is
 * in runtime.cc, cuBLASLt in cublaslt.cc.
 *
 * NCCL runs between processes, with delays and faults on request, and detects buffers that are used while a
 * collective is in flight (nccl.cc, nccl_tasks.cc). $(BUILD)/emulator/train_iha is the whole program on
 * emulated GPUs, whose queue runs on a thread of its own (program.cc lists its environment variables);
 * emulator_background() does the same for a test.
 *
 * To write a test: add tests/cuda/test_NAME.c, with cmocka as everywhere, including tests/cuda/fixture.h. It
 * gives the same inputs to three backends, cuda (in the emulator), cpu in float and cpu in double, and
 * compares them by one rule. For a kernel that is not an operation, add a .cu file to tests/cuda/ with a
 * function that launches it. `make check ONLY=cuda` builds and runs these tests alone.
 *
 * Known limits: one block runs at a time, so blocks must not wait for each other; static shared memory has no
 * sentinels; a data race between two synchronizations shows only if the order of threads changes the result. */
#ifndef IHA_TESTS_CUDA_EMULATOR_EMULATOR_H
#define IHA_TESTS_CUDA_EMULATOR_EMULATOR_H

#define CUDA_EMULATOR 1

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>

#include "tests/cuda/emulator/control.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
/* Blocks run one at a time, so a static variable can be a block's shared memory. Thread-local, because the
 * thread-local segment holds these variables and nothing else, and so can be filled with 0xff as a whole. */
#define __shared__ static thread_local

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

/* ---- the scheduler (fibers.cc) ---- */

[[noreturn]] void emulator_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Let other threads run first. */
void emulator_yield();

/* Wait for the whole block; returns how many threads passed a true predicate. */
int emulator_barrier(bool predicate, const char *file, int line);

/* Wait for the lanes of `mask`; the last to arrive calls complete() with every lane's payload, to which it
 * writes the results. */
typedef void emulator_complete(void *const *lanes, uint32_t mask);
void emulator_warp(uint32_t mask, const char *operation, void *payload, emulator_complete *complete);

int emulator_lane();

/* The block's dynamic shared memory. */
void *emulator_dynamic_shared();

/* Asynchronous copies of the calling thread: zero-filled from `valid` to `bytes`. */
void emulator_copy(void *shared, const void *global, int bytes, int valid);
void emulator_copy_commit();
void emulator_copy_wait(int groups_left);

/* Checks the address; copies nothing. */
void emulator_prefetch(const void *global, uint32_t bytes);

/* ---- launches ---- */

/* Every thread of a kernel that may overlap with the one before it calls this. */
void emulator_wait_for_previous();
extern int64_t emulator_waited; /* threads of all kernels so far that have */

/* The kernel's name in messages, of the next launch. */
extern const char *emulator_kernel_name;

cudaError_t emulator_launch(const cudaLaunchConfig_t *config, const void *kernel,
                            std::function<void()> thread);

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), A &&...args) {
    std::tuple<std::decay_t<P>...> kept(std::forward<A>(args)...);
    return emulator_launch(config, (const void *)kernel, [=] { std::apply(kernel, kept); });
}

/* ---- CUDA C++'s built-in functions ---- */

inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulator_barrier(false, file, line);
}

inline int __syncthreads_count(int predicate, const char *file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
    return emulator_barrier(predicate != 0, file, line);
}

inline int __syncthreads_or(int predicate, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulator_barrier(predicate != 0, file, line) > 0;
}

inline int __syncthreads_and(int predicate, const char *file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
    return emulator_barrier(predicate == 0, file, line) == 0;
}

struct emulator_exchange {
    uint64_t value, result;
    int from; /* the lane that is read */
};

void emulator_complete_exchange(void *const *lanes, uint32_t mask);
void emulator_complete_ballot(void *const *lanes, uint32_t mask);
void emulator_complete_nothing(void *const *lanes, uint32_t mask);

inline void __syncwarp(uint32_t mask = 0xffffffff) {
    emulator_warp(mask, "__syncwarp", nullptr, emulator_complete_nothing);
}

/* Reading a lane outside the mask gives NaN: its value is undefined in CUDA. */
template <typename T> T emulator_exchange_lanes(uint32_t mask, const char *operation, T value, int from) {
    static_assert(std::is_arithmetic_v<T> || std::is_same_v<T, __nv_bfloat16> ||
                      std::is_same_v<T, __nv_bfloat162>,
                  "CUDA shuffles numbers of up to 8 bytes");
    emulator_exchange e = {0, ~(uint64_t)0, from};
    memcpy(&e.value, &value, sizeof value);
    emulator_warp(mask, operation, &e, emulator_complete_exchange);
    memcpy(&value, &e.result, sizeof value);
    return value;
}

template <typename T> T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
    int lane = emulator_lane();
    return emulator_exchange_lanes(mask, "__shfl_sync", value, (lane & ~(width - 1)) | (from & (width - 1)));
}

template <typename T> T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    int lane = emulator_lane(), from = lane - (int)delta;
    return emulator_exchange_lanes(mask, "__shfl_up_sync", value, from < (lane & ~(width - 1)) ? lane : from);
}

template <typename T> T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    int lane = emulator_lane(), from = lane + (int)delta;
    return emulator_exchange_lanes(mask, "__shfl_down_sync", value,
                                   from > (lane | (width - 1)) ? lane : from);
}

template <typename T> T __shfl_xor_sync(uint32_t mask, T value, int with, int width = 32) {
    int lane = emulator_lane(), from = lane ^ with;
    return emulator_exchange_lanes(mask, "__shfl_xor_sync", value, from > (lane | (width - 1)) ? lane : from);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    emulator_exchange e = {predicate != 0, 0, 0};
    emulator_warp(mask, "__ballot_sync", &e, emulator_complete_ballot);
    return (uint32_t)e.result;
}

inline int __any_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}

inline int __all_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}

template <typename T, typename F>
T emulator_reduce(uint32_t mask, const char *operation, T value, F combine) {
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
    T result = value;
    for (int lane = 0; lane < 32; lane++) { /* every lane reads all; the order does not matter for integers */
        T other = emulator_exchange_lanes(mask, operation, value, lane);
        if ((mask >> lane & 1) && lane != emulator_lane())
            result = combine(result, other);
    }
    return result;
}

template <typename T> T __reduce_add_sync(uint32_t mask, T value) {
    return emulator_reduce(mask, "__reduce_add_sync", value, [](T a, T b) { return a + b; });
}

template <typename T> T __reduce_max_sync(uint32_t mask, T value) {
    return emulator_reduce(mask, "__reduce_max_sync", value, [](T a, T b) { return a > b ? a : b; });
}

template <typename T> T __reduce_min_sync(uint32_t mask, T value) {
    return emulator_reduce(mask, "__reduce_min_sync", value, [](T a, T b) { return a < b ? a : b; });
}

template <typename T> uint32_t __match_any_sync(uint32_t mask, T value) {
    uint32_t same = 0;
    for (int lane = 0; lane < 32; lane++)
        if (emulator_exchange_lanes(mask, "__match_any_sync", value, lane) == value && (mask >> lane & 1))
            same |= 1u << lane;
    return same;
}

template <typename T> T atomicAdd(T *at, std::common_type_t<T> value) {
    emulator_yield();
    T old = *at;
    *at = old + value;
    return old;
}

template <typename T> T atomicMax(T *at, std::common_type_t<T> value) {
    emulator_yield();
    T old = *at;
    *at = old > value ? old : value;
    return old;
}

template <typename T> T atomicMin(T *at, std::common_type_t<T> value) {
    emulator_yield();
    T old = *at;
    *at = old < value ? old : value;
    return old;
}

template <typename T> T atomicExch(T *at, std::common_type_t<T> value) {
    emulator_yield();
    T old = *at;
    *at = value;
    return old;
}

template <typename T> T atomicCAS(T *at, std::common_type_t<T> compare, std::common_type_t<T> value) {
    emulator_yield();
    T old = *at;
    if (old == compare)
        *at = value;
    return old;
}

inline void __threadfence() {}

inline void __threadfence_system() {
    __sync_synchronize();
}

inline void __threadfence_block() {}

template <typename T> T __ldg(const T *p) {
    return *p;
}

template <typename T> T __ldcs(const T *p) {
    return *p;
}

template <typename T> T __ldcg(const T *p) {
    return *p;
}

template <typename T> void __stcs(T *p, std::common_type_t<T> value) {
    *p = value;
}

template <typename T> void __stcg(T *p, std::common_type_t<T> value) {
    *p = value;
}

template <typename To, typename From> To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline uint32_t __float_as_uint(float x) {
    return emulator_bits<uint32_t>(x);
}

inline int __float_as_int(float x) {
    return emulator_bits<int>(x);
}

inline float __uint_as_float(uint32_t x) {
    return emulator_bits<float>(x);
}

inline float __int_as_float(int x) {
    return emulator_bits<float>(x);
}

/* Four bytes of {y, x}, picked by the low three bits of the selector's four digits. */
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t both = (uint64_t)y << 32 | x;
    uint32_t picked = 0;
    for (int i = 0; i < 4; i++)
        picked |= (uint32_t)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return picked;
}

inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}

inline int __ffs(uint32_t x) {
    return __builtin_ffs((int)x);
}

inline int __clz(int x) {
    return x ? __builtin_clz((unsigned)x) : 32;
}

inline float rsqrtf(float x) {
    return 1 / sqrtf(x);
}

inline float __expf(float x) {
    return expf(x);
}

inline float __logf(float x) {
    return logf(x);
}

inline float __fdividef(float x, float y) {
    return x / y;
}

inline float __frcp_rn(float x) {
    return 1 / x;
}

template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}

template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

#endif
