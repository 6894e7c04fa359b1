/* Tensor-core and asynchronous-copy instructions that CUDA C++ does not offer, as inline PTX; under the
 * emulator (tests/cuda/emulator/) the same functions on the CPU.
 *
 * mma_m16n8k16: D[16,8] += A[16,16] B[16,8] over one warp, bf16 products summed in fp32. With
 * g = lane / 4 and c = 2 (lane % 4), each register of a lane holds two neighbours, the first in the low half:
 *
 *   a[0] = A[g][c..c+1]      a[1] = A[g+8][c..c+1]      a[2] = A[g][c+8..c+9]    a[3] = A[g+8][c+8..c+9]
 *   b[0] = B[c..c+1][g]      b[1] = B[c+8..c+9][g]
 *   d[0], d[1] = D[g][c..c+1]                           d[2], d[3] = D[g+8][c..c+1]
 *
 * ldmatrix<COUNT, TRANSPOSE>: COUNT (1, 2, 4) matrices of 8x8 bf16 from shared memory. Lane 8i + r passes the
 * address of row r of matrix i, 16 bytes and aligned to 16; other lanes' addresses are ignored. Register i of
 * a lane then holds M_i[g][c..c+1], or transposed M_i[c..c+1][g]. So A, stored by rows, loads with COUNT = 4
 * (rows 0-7 and 8-15 of its left half, then of its right half), and B loads as it is when stored by columns
 * ([n][k]), transposed when stored by rows ([k][n]).
 *
 * cp_async<BYTES> (4, 8, 16): copies from global to shared memory asynchronously, without registers; writes
 * zeros if not `valid` (the address must be valid even then). cp_async_commit closes a group;
 * cp_async_wait<N> waits until at most the N newest groups are in flight. It waits for the calling thread's
 * copies only: other threads may read them after a barrier that follows the wait.
 *
 * prefetch_l2: prefetches so many bytes of global memory into the L2 (a bulk asynchronous copy), without
 * registers and without waiting. One thread prefetches for all. Address and bytes are multiples of 16, and
 * the memory must exist. Before Hopper it does nothing.
 *
 * exp2_fast: 2^x by the special function unit alone, to 2 units in the last place, with results below 2^-126
 * flushed to zero. exp2f() takes three more instructions to get those right. */
#ifndef IHA_KERNELS_CUDA_MMA_CUH
#define IHA_KERNELS_CUDA_MMA_CUH

#include <stdint.h>

#ifdef CUDA_EMULATOR

static inline float exp2_fast(float x) {
    return exp2f(x);
}

void emulator_mma_m16n8k16(float *d, const uint32_t *a, const uint32_t *b);
void emulator_ldmatrix(uint32_t *r, int count, bool transpose, const void *row);

static inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator_mma_m16n8k16(d, a, b);
}

template <int COUNT, bool TRANSPOSE> static inline void ldmatrix(uint32_t (&r)[COUNT], const void *row) {
    emulator_ldmatrix(r, COUNT, TRANSPOSE, row);
}

template <int BYTES> static inline void cp_async(void *shared, const void *global, bool valid = true) {
    emulator_copy(shared, global, BYTES, valid ? BYTES : 0);
}

static inline void cp_async_commit() {
    emulator_copy_commit();
}

template <int N> static inline void cp_async_wait() {
    emulator_copy_wait(N);
}

static inline void prefetch_l2(const void *global, uint32_t bytes) {
    emulator_prefetch(global, bytes);
}

#else

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

template <int COUNT, bool TRANSPOSE>
static __device__ __forceinline__ void ldmatrix(uint32_t (&r)[COUNT], const void *row) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "ldmatrix loads 1, 2 or 4 matrices");
    uint32_t at = shared_address(row);
    if constexpr (COUNT == 4 && TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    else if constexpr (COUNT == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    else if constexpr (COUNT == 2 && TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(at)
                     : "memory");
    else if constexpr (COUNT == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(at)
                     : "memory");
    else if constexpr (TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(at)
                     : "memory");
}

template <int BYTES>
static __device__ __forceinline__ void cp_async(void *shared, const void *global, bool valid = true) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16) /* .cg: only through the L2; the data goes to shared memory, not to the L1 */
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                     "l"(global), "n"(BYTES), "r"(bytes)
                     : "memory");
}

static __device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

static __device__ __forceinline__ void prefetch_l2(const void *global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
                 "r"(bytes));
#else
    (void)global, (void)bytes;
#endif
}

#endif
#endif
