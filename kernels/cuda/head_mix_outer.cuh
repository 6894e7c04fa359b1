/* The outer product of head mixing, dM[i,j] = sum_n <big[n,i,:], small[n,j,:]>, on tensor cores; notation as
 * in head_mix.cuh.
 *
 * A warp keeps the sums of its TILES tiles of rows in registers over all tokens that it processes. A team of
 * warps has all rows. A block has one team or more, each on different tokens; their sums are added up in
 * shared memory, and the blocks' sums in a second kernel. All sums are taken in a fixed order. */
#ifndef IHA_KERNELS_CUDA_HEAD_MIX_OUTER_CUH
#define IHA_KERNELS_CUDA_HEAD_MIX_OUTER_CUH

#include "kernels/cuda/head_mix.cuh"

template <int KT> struct outer_size {
    /* Up to 16 heads 128 registers a thread are enough and 16 warps fit an SM; with more heads, 8 warps with
     * 255 registers each do. */
    static constexpr int TILES = KT == 4 ? 2 : 4, HEAD_TILES = 2 * KT, MAX_WARPS = KT == 1 ? 16 : 8;
    static constexpr int SUMS = TILES * HEAD_TILES * 4 * 32; /* of a warp: [registers][lanes] */
};

/* The tiles of one warp of a team, which shares `tiles` tiles evenly: five tiles are three and two for two warps. */
struct tile_share {
    int first, count;
};
static __host__ __device__ __forceinline__ struct tile_share tile_share(int tiles, int team_warps,
                                                                        int member) {
    int least = tiles / team_warps, more = tiles % team_warps;
    return {member * least + (member < more ? member : more), least + (member < more)};
}

/* Add the outer product of a tile of 16 rows and the heads: sum[n] is the tile of heads 8 n to 8 n + 7. */
template <int NT>
__device__ __forceinline__ void add_outer(float (&sum)[NT][4], const along_rows &x,
                                          const uint32_t (&heads_along)[NT][4][2], int heads) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
        uint32_t a[4];
        along_operand(a, x, s);
#pragma unroll
        for (int n = 0; n < NT; n++)
            if (n * 8 < heads)
                mma_m16n8k16(sum[n], a, heads_along[n][s]);
    }
}

/* Write the block's sums, over its teams, to partial [team_warps][SUMS]. `shared` has room for all warps'
 * sums if there is more than one team. All threads call it. */
template <int TILES, int NT>
__device__ __forceinline__ void store_outer(const float (&sum)[TILES][NT][4], float *shared, float *partial,
                                            int teams, int team_warps) {
    constexpr int SUMS = TILES * NT * 4 * 32;
    float *warp_sums = (teams > 1 ? shared : partial) + (threadIdx.x / 32) * SUMS + threadIdx.x % 32;
    __syncthreads(); /* all threads have read what `shared` held before */
#pragma unroll
    for (int k = 0; k < TILES; k++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                warp_sums[((k * NT + n) * 4 + r) * 32] = sum[k][n][r];
    if (teams == 1)
        return;
    __syncthreads();
    for (int e = threadIdx.x; e < team_warps * SUMS; e += blockDim.x) {
        float total = shared[e];
        for (int team = 1; team < teams; team++)
            total += shared[team * team_warps * SUMS + e];
        partial[e] = total;
    }
}

/* The last step: dm (+)= the sum of `parts` partial sums [parts][gridDim.y][elements]: eight sums over every
 * eighth part, in order, then over these eight. TILES, NT: the layout in which store_outer() wrote them;
 * TILES = 0: [I,H]. Bytes: parts elements gridDim.y 4. Grid: (elements / 32, tensors). */
enum { SUM_SLICES = 8 };
struct head_gradients {
    float *dm[3];
};
/* The tiles of rows of which a team of warps has the sums. */
struct outer_tiles {
    int first, count, team_warps;
};

template <int TILES, int NT>
static __global__ void __launch_bounds__(32 * SUM_SLICES)
    sum_outer(const float *partial, int parts, int elements, struct head_rows o, struct outer_tiles in,
              struct head_gradients to, bool accumulate) {
    wait_for_previous();
    __shared__ float slices[SUM_SLICES][32];
    int lane = threadIdx.x % 32, slice = threadIdx.x / 32, e = blockIdx.x * 32 + lane;
    int i, j;
    if constexpr (TILES == 0) {
        i = e / o.heads;
        j = e % o.heads;
    } else {
        int r = e / 32 % 4, n = e / 128 % NT, slot = e / (128 * NT), k = slot % TILES;
        struct tile_share share = tile_share(in.count, in.team_warps, slot / TILES);
        i = k < share.count ? row_index(o, in.first + share.first + k, lane / 4 + r / 2 * 8) : -1;
        j = n * 8 + lane % 4 * 2 + r % 2;
    }
    int64_t offset = e < elements && i >= 0 && j < o.heads ? weight_offset(o, i, j) : -1;
    float sum = 0;
    if (offset >= 0)
#pragma unroll 4
        for (int part = slice; part < parts; part += SUM_SLICES)
            sum += partial[((int64_t)part * gridDim.y + blockIdx.y) * elements + e];
    slices[slice][lane] = sum;
    __syncthreads();
    if (slice > 0 || offset < 0)
        return;
#pragma unroll
    for (int s = 1; s < SUM_SLICES; s++)
        sum += slices[s][lane];
    float *out = (blockIdx.y == 0 ? to.dm[0] : blockIdx.y == 1 ? to.dm[1] : to.dm[2]) + offset;
    *out = accumulate ? *out + sum : sum;
}

/* How many blocks, and teams in each. Where a block's registers or shared memory cannot hold the sums of all rows, the
 * rows are taken in groups of tiles, one launch after the other. */
struct outer_grid {
    int team_warps, teams, blocks;
    int groups, group_tiles; /* the last group may have fewer */
    int64_t elements;
    int threads() const {
        return teams * team_warps * 32;
    }
};

/* Choose the grid for `count` tokens. shared(tiles, team_warps, teams): the bytes of shared memory that a block needs.
 * False: the device has too little for even a few tiles. */
template <int KT, typename F>
bool outer_grid(const struct device *dev, const struct head_rows &o, int64_t count, int tensors, F shared,
                struct outer_grid *grid) {
    typedef outer_size<KT> size;
    int all = o.tiles * o.chunks, groups = (int)ceil_div(all, size::TILES * size::MAX_WARPS), tiles, warps,
        teams;
    for (;; groups++) {
        tiles = (int)ceil_div(all, groups);
        warps = (int)ceil_div(tiles, size::TILES);
        teams = warps < 8 ? 8 / warps : 1;
        while (teams > 1 && shared(tiles, warps, teams) > dev->shared_limit)
            teams--;
        if (shared(tiles, warps, teams) <= dev->shared_limit)
            break;
        if (warps <= 2) /* groups have two warps at least, which add up their parts of dq */
            return false;
    }
    *grid = {warps, teams, 0, (int)ceil_div(all, tiles), tiles, (int64_t)warps * size::SUMS};
    int per_sm = size::MAX_WARPS * 32 / grid->threads();
    int64_t most = (int64_t)dev->sm_count * (per_sm > 1 ? per_sm : 1) / tensors;
    int64_t blocks = ceil_div(count, teams);
    grid->blocks = (int)(blocks < most ? blocks : most > 0 ? most : 1);
    return true;
}

#endif
