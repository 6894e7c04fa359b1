/* Matrix products of tiles on tensor cores, for the built-in bf16 attention kernels.
 *
 * A warp works on M tiles of 16 rows. A product X [16 M, N] is held as float x[M][N / 8][4], in the layout of
 * mma_m16n8k16's D (mma.cuh): with g = lane / 4 and c = 2 (lane % 4), a lane has columns 8 n + c and 8 n + c
 * + 1 of rows 16 m + g (x[m][n][0..1]) and 16 m + g + 8 (x[m][n][2..3]). Rounded to bf16, two neighbouring n
 * have the layout of the operand A of the next product, so probabilities stay in registers. With two row
 * tiles a warp (M = 2) each fragment of B is used twice, which halves the reads from shared memory that limit
 * these products; there are enough registers for that only where d is not too large. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_MMA_CUH
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_MMA_CUH

#include "kernels/cuda/attention/attention_band.cuh"

static __device__ __forceinline__ int lane_of() {
    return (int)threadIdx.x % 32;
}

static __device__ __forceinline__ int warp_of() {
    return (int)threadIdx.x / 32;
}

template <int M, int N> static __device__ __forceinline__ void clear(float (&x)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                x[m][n][r] = 0;
}

/* x[m][2n], x[m][2n+1] += a b, where b holds two neighbouring fragments of B. */
template <int M, int N>
static __device__ __forceinline__ void mma_pair(float (&x)[M][N][4], int n, const uint32_t (&a)[M][4],
                                                const uint32_t (&b)[4]) {
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < M; m++) {
        mma_m16n8k16(x[m][2 * n], a[m], low);
        mma_m16n8k16(x[m][2 * n + 1], a[m], high);
    }
}

/* Columns k to k + 15 of A [16 M, D], a tile in shared memory. */
template <int D, int M>
static __device__ __forceinline__ void load_fragments(uint32_t (&fragments)[M][4], const bf16 *a, int k) {
    constexpr int LD = PITCH<bf16, D>;
    const int lane = lane_of();
#pragma unroll
    for (int m = 0; m < M; m++)
        ldmatrix<4, false>(fragments[m], a + (m * 16 + lane % 16) * LD + lane / 16 * 8 + k);
}

/* x += A B^T for these columns of both; B [8 N, D] is a tile. */
template <int D, int M, int N>
static __device__ __forceinline__ void multiply_step(float (&x)[M][N][4], const uint32_t (&a)[M][4],
                                                     const bf16 *b, int k) {
    constexpr int LD = PITCH<bf16, D>;
    const int lane = lane_of();
    b += (lane % 8 + lane / 16 * 8) * LD + lane / 8 % 2 * 8 + k;
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
        uint32_t fb[4];
        ldmatrix<4, false>(fb, b + n * 16 * LD);
        mma_pair(x, n, a, fb);
    }
}

/* x += A B^T, both tiles in shared memory. A smaller UNROLL takes fewer registers. */
template <int D, int UNROLL = D / 16, int M, int N>
static __device__ __forceinline__ void multiply_rows(float (&x)[M][N][4], const bf16 *a, const bf16 *b) {
#pragma unroll UNROLL
    for (int k = 0; k < D; k += 16) {
        uint32_t fragments[M][4];
        load_fragments<D>(fragments, a, k);
        multiply_step<D>(x, fragments, b, k);
    }
}

/* A [16 M, D], loaded into registers once where there are enough of them, otherwise read from shared memory
 * again for every product. */
template <int D, int M, bool REGISTERS> struct left_operand {
    const bf16 *tile;
    uint32_t fragments[REGISTERS ? D / 16 : 1][M][4];

    __device__ __forceinline__ void load() {
        if constexpr (REGISTERS)
#pragma unroll
            for (int k = 0; k < D; k += 16)
                load_fragments<D>(fragments[k / 16], tile, k);
    }

    template <int N> __device__ __forceinline__ void multiply(float (&x)[M][N][4], const bf16 *b) const {
        if constexpr (REGISTERS)
#pragma unroll
            for (int k = 0; k < D; k += 16)
                multiply_step<D>(x, fragments[k / 16], b, k);
        else
            multiply_rows<D>(x, tile, b);
    }
};

static __device__ __forceinline__ uint32_t pack(float low, float high) {
    union {
        __nv_bfloat162 pair;
        uint32_t word;
    } u = {__floats2bfloat162_rn(low, high)};
    return u.word;
}

/* Round x to bf16: A of the next product, in half the registers. */
template <int M, int N>
static __device__ __forceinline__ void round_fragments(uint32_t (&p)[M][N / 2][4],
                                                       const float (&x)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                p[m][n / 2][n % 2 * 2 + half] = pack(x[m][n][half * 2], x[m][n][half * 2 + 1]);
}

/* x += P B for P [16 M, 16 K] and B [16 K, 8 N], columns of a tile of rows LD apart. */
template <int LD, int M, int K, int N>
static __device__ __forceinline__ void multiply_columns(float (&x)[M][N][4], const uint32_t (&p)[M][K][4],
                                                        const bf16 *b) {
    const int lane = lane_of();
    b += lane % 16 * LD + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k++) {
        uint32_t fa[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                fa[m][r] = p[m][k][r];
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            uint32_t fb[4];
            ldmatrix<4, true>(fb, b + k * 16 * LD + n * 16);
            mma_pair(x, n, fa, fb);
        }
    }
}

/* Set the elements that are not visible to `masked`. The warp's rows begin at `first` and its columns at
 * `column` of the whole score matrix; VISIBLE is keys_of where rows are queries, queries_of where they are
 * keys. half 0 is row 16 m + g, half 1 row 16 m + g + 8. */
template <interval (*VISIBLE)(const struct band &, int), int M, int N>
static __device__ __forceinline__ void apply_mask(float (&x)[M][N][4], const struct band &band, int first,
                                                  int column, float masked) {
    const int lane = lane_of();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            interval visible = VISIBLE(band, first + m * 16 + half * 8 + lane / 4);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int c = column + n * 8 + lane % 4 * 2 + r;
                    if (c < visible.begin || c >= visible.end)
                        x[m][n][half * 2 + r] = masked;
                }
        }
}

/* Write x, times one factor per row, to columns [column, column + 8 N) of a head's rows from `first`. It goes
 * through `tile`, the warp's rows of a tile that is no longer needed: in the layout of mma a lane has only 4
 * bytes of a row, from shared memory it stores 16 and neighbouring lanes store neighbouring ones. Only this
 * warp touches these rows, so a warp barrier is enough. */
template <int LD, int M, int N>
static __device__ __forceinline__ void store_rows(bf16 *tile, const float (&x)[M][N][4],
                                                  const float (&factor)[M][2], bf16 *head, int64_t stride,
                                                  int first, int length, int column, int d, bool aligned) {
    const int lane = lane_of();
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < N; n++)
                *(uint32_t *)(tile + (m * 16 + half * 8 + lane / 4) * LD + n * 8 + lane % 4 * 2) =
                    pack(x[m][n][half * 2] * factor[m][half], x[m][n][half * 2 + 1] * factor[m][half]);
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * M * N; i += 32) {
        int row = i / N, at = column + i % N * 8;
        if (first + row >= length || at >= d)
            continue;
        const bf16 *from = tile + row * LD + i % N * 8;
        bf16 *to = head + (first + row) * stride + at;
        if (aligned) {
            *(uint4 *)to = *(const uint4 *)from;
        } else {
            for (int j = 0; j < 8 && at + j < d; j++)
                to[j] = from[j];
        }
    }
}

#endif
