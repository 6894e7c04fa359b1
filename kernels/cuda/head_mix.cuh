/* Mixing along the head axis, the operation that IHA adds to attention: per token, a small matrix between the
 * H heads and the P H pseudo-heads. With I = P H, i = p H + h a pseudo-head, j a head, and M [I, H]:
 *
 *   expand    big[n,i,:] = sum_j M[i,j] small[n,j,:]          qkv_mix; the input gradient of collapse
 *   contract  small[n,j,:] = sum_i M[i,j] big[n,i,:]          collapse; the input gradient of qkv_mix
 *   outer     dM[i,j] = sum_n <big[n,i,:], small[n,j,:]>      the weight gradient of both
 *
 * This file has what the bf16 kernels of qkv_mix and collapse share; outer is in head_mix_outer.cuh, kernels
 * without tensor cores in head_mix_plain.cuh.
 *
 * All three are limited by memory bandwidth: each element of big is read or written once and takes part in H
 * multiplications, 2 P H^2 d FLOPs for (1 + P) H d elements. On an H200, fp32 FMAs (67 TFLOP/s) could not
 * keep up with memory from about H = 16 on, so bf16 runs on tensor cores (m16n8k16, fp32 sums), with heads
 * padded to 16 in registers; padding moves no bytes. Bytes and FLOPs of a pass per token and tensor, for d =
 * 64 (d = 128: twice), and the rate that the tensor cores need to keep up with 4.3 TB/s (as executed, padding
 * included; mma.sync reaches about 600 TFLOP/s there):
 *
 *                        bytes                      FLOPs, useful (executed)          TFLOP/s at 4.3 TB/s
 *   expand (P+1) H d 2:   H=12 P=2    4,608           36,864    (65,536)               61
 *                         H=16 P=4   10,240          131,072   (131,072)               55
 *                         H=20 P=20  53,760        1,024,000 (1,638,400)              131
 *   contract: the same bytes; executed 65,536, 131,072, 1,638,400
 *   mix backward, contract + outer, (P+2) H d 2:
 *                         H=12 P=2    6,144           73,728   (131,072)               92
 *                         H=16 P=4   12,288          262,144   (262,144)               92
 *                         H=20 P=20  56,320        2,048,000 (2,867,200)              219
 *   collapse backward, expand + outer, (2P+1) H d 2:
 *                         H=12 P=2    7,680           73,728   (131,072)               73
 *                         H=16 P=4   18,432          262,144   (262,144)               61
 *                         H=20 P=20 104,960        2,048,000 (2,867,200)              117
 *
 * Tiling. A warp takes 64 columns of one token at a time: 32 of the first half of d and the 32 that RoPE
 * pairs them with (fewer where less than 32 of d/2 are left). Which column has which index in a tensor-core
 * tile is free, as long as the operands agree. Three assignments let every thread load and store 16 bytes at
 * a time, 64 contiguous bytes of a row by four lanes, without going through shared memory first. With g =
 * lane / 4, t = lane % 4, and columns counted within a half:
 *
 *   across  rows are contracted. A lane loads 8 columns of rows 2t, 2t+1, 2t+8, 2t+9, at 8 (g/2) in half
 *           g % 2; column 8 (g/2) + j is column g of tile j (0..7), the operand B. So results lie as
 *           d[tile j][2 r + e] = row g + 8 r, half e, column 8 t + j: 8 neighbours in 8 tiles, and a RoPE
 *           pair in two registers of a tile.
 *   along   columns are contracted (outer). A lane loads 8 columns of row g at 8 t in either half: again
 *           both of a RoPE pair. Step s (0..3) contracts the four columns 8 t + 4 (s%2) .. of half s / 2 of
 *           every lane, for A and B alike.
 *   staged  rows that were loaded along and are then contracted over rows go through shared memory: tile
 *           4 e + w gets word w of the lanes' 16 bytes in half e, so a row of the tile is 16 bytes. ldmatrix
 *           transposes it to B, and d[tile 4 e + w][2 r ..] = row g + 8 r, half e, columns 8 t + 2 w and + 1.
 *
 * Rows of M are taken in an order (struct head_rows) in which a lane has the same pseudo-head over many
 * tiles: RoPE's cosines and sines are loaded once for all its heads.
 *
 * Instruction issue could be the other limit. From the machine code for sm_90 (a group of 64 columns, mean of
 * q, k and v; 4.3 TB/s are 18.6 bytes per cycle and SM, which issues 4 instructions a cycle; counted before
 * prefetches and wait_for_previous(), which add a few instructions a token):
 *
 *                      registers  warps/SM  share of the issue slots at 4.3 TB/s
 *                      H<=16 <=32           H=12 P=2   H=16 P=4   H=20 P=20
 *   expand (mix)        104   120       16     46%        32%        33%
 *   contract (collapse) 122   128       16     28%        19%        19%
 *   mix backward        128   239     16, 8    55%        46%        80%
 *   collapse backward   116   164     16, 8    29%        19%        27%
 *
 * Latency is the third: at 4.3 TB/s and about 0.7 us from memory an SM needs 23 KB in flight, as much as the
 * registers of its warps hold. So a token's rows, which are contiguous, are prefetched into the L2 one token
 * ahead (prefetch_l2 of mma.cuh), from where they take about a third as long. Mix backward does not where it
 * takes rows in groups, which are not contiguous.
 *
 * Only mix backward with P = 20 may stay below memory bandwidth: its seven warps also have two barriers per
 * group of columns to add up dq. */
#ifndef IHA_KERNELS_CUDA_HEAD_MIX_CUH
#define IHA_KERNELS_CUDA_HEAD_MIX_CUH

#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/rope.cuh"

/* ---- the matrix and the order of its rows ---- */

enum head_storage {
    BY_PSEUDO_HEAD, /* alpha [P,H,H]: M[i,j] at i H + j */
    BY_HEAD,        /* R [H,P,H]: M[i,j] at j P H + i */
    DIAGONAL        /* R [H,P], one head each: M[p H + h, h] at h P + p, and 0 elsewhere */
};

struct head_rows {
    enum head_storage storage;
    int heads, pseudo;
    /* Eight rows of a tile are 2^shift pseudo-heads p, each with 8 / 2^shift heads h. `tiles` tiles of 16
     * rows hold all heads of these pseudo-heads: a chunk. `chunks` chunks hold all pseudo-heads. */
    int shift, tiles, chunks;
};

/* The order in which a lane keeps its pseudo-head throughout a chunk: of the four possible shifts the one
 * with the fewest tiles, and among equals the one with the fewest chunks. */
static inline struct head_rows pseudo_order(enum head_storage storage, int64_t heads, int64_t pseudo) {
    struct head_rows best = {storage, (int)heads, (int)pseudo, 0, 0, 0};
    for (int shift = 0; shift <= 3; shift++) {
        int chunks = (int)ceil_div(pseudo, 1 << shift);
        int tiles = (int)ceil_div(ceil_div(heads, 8 >> shift), 2);
        if (shift == 0 || chunks * tiles <= best.chunks * best.tiles) {
            best.shift = shift;
            best.chunks = chunks;
            best.tiles = tiles;
        }
    }
    return best;
}

/* Rows in memory order, row i of M at row i of the tiles: for collapse, which rotates nothing. One chunk. */
enum { IN_MEMORY = -1 };
static inline struct head_rows memory_order(enum head_storage storage, int64_t heads, int64_t pseudo) {
    return {storage, (int)heads, (int)pseudo, IN_MEMORY, (int)ceil_div(heads * pseudo, 16), 1};
}

/* The pseudo-head in row r of a tile in `chunk`, which may be beyond the last. */
static __device__ __forceinline__ int row_pseudo(const struct head_rows &o, int chunk, int r) {
    return (chunk << o.shift) + (r & ((1 << o.shift) - 1));
}

/* The head in row r of the chunk's tile `tile`, which may be beyond the last. */
static __device__ __forceinline__ int row_head(const struct head_rows &o, int tile, int r) {
    return ((2 * tile + r / 8) << (3 - o.shift)) + ((r & 7) >> o.shift);
}

/* i = p H + h of row r of tile `tile`, counted over all chunks; -1 in the padding. */
static __device__ __forceinline__ int row_index(const struct head_rows &o, int tile, int r) {
    if (o.shift == IN_MEMORY)
        return tile * 16 + r < o.heads * o.pseudo ? tile * 16 + r : -1;
    int p = row_pseudo(o, tile / o.tiles, r), h = row_head(o, tile % o.tiles, r);
    return p < o.pseudo && h < o.heads ? p * o.heads + h : -1;
}

/* The reverse: the row, counted over all tiles, of head h of pseudo-head p. */
static __device__ __forceinline__ int row_position(const struct head_rows &o, int p, int h) {
    if (o.shift == IN_MEMORY)
        return p * o.heads + h;
    int heads = 3 - o.shift; /* 2^heads in eight rows */
    int r = ((h & ((1 << heads) - 1)) << o.shift) + (p & ((1 << o.shift) - 1));
    return (p >> o.shift) * o.tiles * 16 + (h >> heads) * 8 + r;
}

/* The offset of M[i,j] in memory; -1: it is 0 and not stored. */
static __device__ __forceinline__ int64_t weight_offset(const struct head_rows &o, int i, int j) {
    if (o.storage == BY_PSEUDO_HEAD)
        return (int64_t)i * o.heads + j;
    if (o.storage == BY_HEAD)
        return (int64_t)j * o.heads * o.pseudo + i;
    return i % o.heads == j ? (int64_t)j * o.pseudo + i / o.heads : -1;
}

/* The warp's number in its block. The shuffle tells the compiler that it is the same in all lanes, so that it
 * can use uniform registers and branches. */
static __device__ __forceinline__ int warp_number() {
    return __shfl_sync(0xffffffff, (int)threadIdx.x / 32, 0);
}

/* ---- columns ---- */

enum {
    GROUP = 32,             /* columns of either half that a warp takes at a time */
    STAGED = 2 * GROUP + 8, /* elements from one staged row to the next: 8 more avoid bank conflicts */
};

/* Whether the tensor-core kernels support this shape. Half a row must be whole vectors of 16 bytes. */
static inline bool tensor_core_shape(enum dtype type, int64_t heads, int64_t head_dim) {
    return type == DTYPE_BF16 && heads <= 64 && head_dim % 16 == 0;
}

/* ---- tensor-core tiles ---- */

static __device__ __forceinline__ uint32_t pack(float low, float high) {
    union {
        __nv_bfloat162 pair;
        uint32_t bits;
    } u = {__floats2bfloat162_rn(low, high)};
    return u.bits;
}

static __device__ __forceinline__ float low_half(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float high_half(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000);
}

static __device__ __forceinline__ uint4 load_vector(const bf16 *p, bool valid) {
    if (!valid)
        return uint4{0, 0, 0, 0};
    check_aligned<uint4>(p);
    return __ldg((const uint4 *)p);
}

/* Elements [at, at + 8) of m, which has `count`: 16 bytes, aligned. What is outside of m is not read. */
static __device__ __forceinline__ uint4 load_clamped(const bf16 *m, int at, int count) {
    union {
        uint4 vector;
        bf16 part[8];
    } u = {uint4{0, 0, 0, 0}};
    if (at >= 0 && at + 8 <= count)
        return load_vector(m + at, true);
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (at + k >= 0 && at + k < count)
            u.part[k] = m[at + k];
    return u.vector;
}

/* Copy M's rows of tiles [first, first + tiles) to shared memory as [16 tiles][16 KT + 8], zeros in the
 * padding. The 8 extra elements let ldmatrix read 8 rows without bank conflicts. All threads call it, and a
 * barrier must follow.
 *
 * Memory is read 16 bytes at a time, in its order and whatever M's alignment. The rows wanted are one run of
 * elements, or with BY_HEAD one run for each head. Divisions find the place of the first of 8 elements; the
 * others follow it. */
template <int KT>
__device__ __forceinline__ void stage_matrix(bf16 *shared, const bf16 *m, const struct head_rows &o,
                                             int first, int tiles) {
    constexpr int ROW = KT * 16 + 8;
    int H = o.heads, P = o.pseudo, I = H * P, base = first * 16;
    bool by_head = o.storage == BY_HEAD, diagonal = o.storage == DIAGONAL;
    for (int e = threadIdx.x; e < tiles * 16 * ROW / 8; e += blockDim.x)
        ((uint4 *)shared)[e] = uint4{0, 0, 0, 0};
    __syncthreads();
    int i_begin = base, i_end = min(I, base + tiles * 16);
    if (o.shift != IN_MEMORY) {
        i_begin = (first / o.tiles << o.shift) * H;
        i_end = min(P, ((first + tiles - 1) / o.tiles + 1) << o.shift) * H;
    }
    /* Of each run. */
    int begin = diagonal ? 0 : by_head ? i_begin : i_begin * H;
    int end = diagonal ? I : by_head ? i_end : i_end * H;
    int count = diagonal ? I : I * H, length = diagonal ? P : H;
    int lead = (int)((uintptr_t)m / sizeof(bf16) % 8), words = (end - begin + 7) / 8 + 1;
    auto first_of_word = [&](int e) { return ((lead + e / words * I + begin) & ~7) - lead + e % words * 8; };
    int e = threadIdx.x, all = (by_head ? H : 1) * words;
    int at = first_of_word(e);
    uint4 next = load_clamped(m, at, e < all ? count : 0);
    while (e < all) {
        uint4 now = next;
        int this_at = at, head = e / words, from = max(at, head * I + begin), to = head * I + end;
        e += blockDim.x;
        at = first_of_word(e);
        next = load_clamped(m, at, e < all ? count : 0);
        /* Element `from` is M[i,j], or of the diagonal R[head, rest]. */
        int line = from / length, rest = from % length;
        int p = line / H, h = line % H, row = row_position(o, p, h) - base;
        const uint32_t pairs[4] = {now.x, now.y, now.z, now.w};
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (this_at + k < from || this_at + k >= to)
                continue;
            int j = rest;
            if (by_head) {
                j = head;
                row = this_at + k - head * I - base;
            } else if (diagonal) {
                j = line;
                row = rest * H + line - base;
            }
            if (row >= 0 && row < tiles * 16)
                ((uint16_t *)shared)[row * ROW + j] = (uint16_t)(pairs[k / 2] >> k % 2 * 16);
            if (++rest == length) {
                rest = 0;
                line++;
                if (++h == H) {
                    h = 0;
                    p++;
                }
                row = row_position(o, p, h) - base;
            }
        }
    }
}

/* Operand A of a tile: [16 rows, 16 heads] as staged, or transposed, [16 heads, 16 rows]. */
template <int KT>
__device__ __forceinline__ void load_matrix(uint32_t (&a)[4], const bf16 *shared, int tile, int heads) {
    int lane = threadIdx.x % 32;
    ldmatrix<4, false>(a, shared + (tile * 16 + lane % 16) * (KT * 16 + 8) + heads * 16 + lane / 16 * 8);
}

template <int KT>
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&a)[4], const bf16 *shared, int tile,
                                                       int heads) {
    int lane = threadIdx.x % 32;
    ldmatrix<4, true>(a, shared + (tile * 16 + lane / 16 * 8 + lane % 8) * (KT * 16 + 8) + heads * 16 +
                             lane / 8 % 2 * 8);
}

/* Two rows of 8 columns, loaded across, as one register of B in each of 8 tiles: an element of the first row
 * in the low half, of the second row in the high half. */
static __device__ __forceinline__ void interleave_rows(uint32_t (&b)[8][2], int half, uint4 x, uint4 y) {
    const uint32_t low[4] = {x.x, x.y, x.z, x.w}, high[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        b[2 * w][half] = __byte_perm(low[w], high[w], 0x5410);
        b[2 * w + 1][half] = __byte_perm(low[w], high[w], 0x7632);
    }
}

/* Load heads across: in [H, d], at the lane's columns. All loads are issued before the first is used. */
template <int KT>
__device__ __forceinline__ void load_across(uint32_t (&b)[KT][8][2], const bf16 *in, int heads, int d,
                                            bool valid) {
    int t = threadIdx.x % 4;
    uint4 raw[KT][4];
#pragma unroll
    for (int k = 0; k < KT; k++)
#pragma unroll
        for (int q = 0; q < 4; q++) {
            int row = k * 16 + 2 * t + q / 2 * 8 + q % 2;
            raw[k][q] = load_vector(in + row * d, valid && row < heads);
        }
#pragma unroll
    for (int k = 0; k < KT; k++) {
        interleave_rows(b[k], 0, raw[k][0], raw[k][1]);
        interleave_rows(b[k], 1, raw[k][2], raw[k][3]);
    }
}

/* A single store of 16 bytes, which the compiler would be free to split if it were an assignment. .cg: cached
 * in the L2 only. */
static __device__ __forceinline__ void store_vector(bf16 *p, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    check_aligned<uint4>(p);
    __stcg((uint4 *)p, uint4{x, y, z, w});
}

/* Store row g + 8 r of a result that was contracted across: 8 neighbouring columns of each half. */
static __device__ __forceinline__ void store_across(const float (&sum)[8][4], int r, bf16 *p, int half) {
#pragma unroll
    for (int e = 0; e < 2; e++)
        store_vector(p + e * half, pack(sum[0][2 * r + e], sum[1][2 * r + e]),
                     pack(sum[2][2 * r + e], sum[3][2 * r + e]), pack(sum[4][2 * r + e], sum[5][2 * r + e]),
                     pack(sum[6][2 * r + e], sum[7][2 * r + e]));
}

/* Rows g and g + 8 of a tile, loaded along: [row][half]. */
typedef uint4 along_rows[2][2];

/* Load from big [I,d] of one token, at the lane's columns, the rows at these offsets (negative: padding). */
static __device__ __forceinline__ void load_along(along_rows &x, const bf16 *big, const int (&offsets)[2],
                                                  int half, bool valid) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bf16 *row = big + offsets[r];
        x[r][0] = load_vector(row, valid && offsets[r] >= 0);
        x[r][1] = load_vector(row + half, valid && offsets[r] >= 0);
    }
}

/* These rows as the operand A of step s: words 2 (s % 2) and the next, of half s / 2. */
static __device__ __forceinline__ void along_operand(uint32_t (&a)[4], const along_rows &x, int s) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint4 v = x[r][s / 2];
        a[r] = s % 2 ? v.z : v.x;
        a[2 + r] = s % 2 ? v.w : v.y;
    }
}

/* Load small [H,d] of one token along, as the operand B of every step: head 8 n + g in tile n. */
template <int NT>
__device__ __forceinline__ void load_heads_along(uint32_t (&b)[NT][4][2], const bf16 *small, int heads, int d,
                                                 bool valid) {
    int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        bool present = valid && n * 8 + g < heads;
        const bf16 *row = small + (n * 8 + g) * d;
        uint4 first = load_vector(row, present), second = load_vector(row + d / 2, present);
        b[n][0][0] = first.x, b[n][0][1] = first.y, b[n][1][0] = first.z, b[n][1][1] = first.w;
        b[n][2][0] = second.x, b[n][2][1] = second.y, b[n][3][0] = second.z, b[n][3][1] = second.w;
    }
}

/* Call f with KT, the number of tiles of 16 heads, as a constant. */
template <typename F> void by_head_tiles(int64_t heads, F f) {
    if (heads <= 16)
        f(std::integral_constant<int, 1>());
    else if (heads <= 32)
        f(std::integral_constant<int, 2>());
    else
        f(std::integral_constant<int, 4>());
}

/* ---- RoPE on tensor-core tiles ---- */

/* Cosines and sines of 8 columns. */
struct rotation {
    float cosine[8], sine[8];
};

/* From a row [2, d/2] of the table, at the lane's columns. */
static __device__ __forceinline__ void load_rotation(struct rotation &by, const float *row, int half) {
    load(row, by.cosine);
    load(row + half, by.sine);
}

/* Rotate row g + 8 r of a result that was contracted across. */
static __device__ __forceinline__ void rotate_across(float (&sum)[8][4], int r, const struct rotation &by) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float a = sum[j][2 * r], b = sum[j][2 * r + 1];
        sum[j][2 * r] = a * by.cosine[j] - b * by.sine[j];
        sum[j][2 * r + 1] = b * by.cosine[j] + a * by.sine[j];
    }
}

/* Rotate a row's 8 columns of either half back (the gradient of the rotation); the results are rounded to
 * bf16, as operands of the next products. */
static __device__ __forceinline__ void rotate_back(uint4 &first, uint4 &second, const struct rotation &by) {
    uint32_t *x = &first.x, *y = &second.x;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        float a0 = low_half(x[w]), a1 = high_half(x[w]), b0 = low_half(y[w]), b1 = high_half(y[w]);
        float c0 = by.cosine[2 * w], c1 = by.cosine[2 * w + 1], s0 = by.sine[2 * w], s1 = by.sine[2 * w + 1];
        x[w] = pack(a0 * c0 + b0 * s0, a1 * c1 + b1 * s1);
        y[w] = pack(b0 * c0 - a0 * s0, b1 * c1 - a1 * s1);
    }
}

#endif
