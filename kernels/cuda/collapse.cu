/* collapse: pseudo-heads back to heads (paper: step 6), full (R [H,P,H]) or per head (R [H,P]).
 *
 *   forward   out[n,h,:] = sum_{p,g} R[h,p,g] o[n,p,g,:]           per head: g = h only
 *   backward  do[n,p,g,:] = sum_h R[h,p,g] dout[n,h,:];  dR[h,p,g] (+)= sum_n <dout[n,h,:], o[n,p,g,:]>
 *
 * o [N,P,H,d], out [N,H,d], N = B T tokens. Forward is the contract of head_mix.cuh; backward is expand and
 * outer in one pass, and a small launch that sums the blocks' dR. R per head is computed as a full R with
 * zeros: memory bandwidth is the limit, and the zeros are never read from memory. Elements moved: forward (P
 * + 1) H d a token, backward (2 P + 1) H d (dout is read twice, the second time from a cache). */
#include "kernels/cuda/head_mix_plain.cuh"

/* ---- forward ---- */

enum { COLLAPSE_WARPS = 8, COLLAPSE_BLOCKS_PER_SM = 2 };
constexpr size_t STAGED_R = 96 << 10; /* bytes of R in shared memory, if it is taken in parts */

struct collapse_job {
    const bf16 *o, *r;
    bf16 *out;
    struct head_rows rows;
    int count, d;
    int staged; /* tiles of R in shared memory at once */
};

/* Grid: (blocks that share the tokens, parts of the heads: with more than 32 heads two blocks compute half of
 * them each, and both read o). A warp takes a group of columns of one token, loads its pseudo-heads across
 * and sums; AHEAD tiles of 16 are always in flight, also from one token to the next, which is prefetched into
 * the L2. Shared memory: R as [16 tiles][16 KT + 8], or unless WHOLE as many tiles as there is room for, a
 * multiple of AHEAD: then warps take them in turn together, and every group of columns reads all of R again,
 * from the L2. */
template <int KT, int HEAD_TILES, int AHEAD, bool WHOLE>
static __global__ void __launch_bounds__(32 * COLLAPSE_WARPS, 2) collapse_tiles(struct collapse_job job) {
    wait_for_previous();
    const struct head_rows &o = job.rows;
    int d = job.d, half = d / 2, H = o.heads, I = H * o.pseudo, head_tile = blockIdx.y * HEAD_TILES;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bf16 *r = dynamic_shared<bf16>();
    if (WHOLE) {
        stage_matrix<KT>(r, job.r, o, 0, o.tiles);
        __syncthreads();
    }
    int64_t token = (int64_t)I * d;
    auto load_tile = [&](uint4(&x)[4], const bf16 *rows, int tile, bool valid) {
        const bf16 *in = rows + tile * 16 * d;
        int left = valid ? I - tile * 16 - 2 * t : 0;
        x[0] = load_vector(in, 0 < left);
        x[1] = load_vector(in + d, 1 < left);
        x[2] = load_vector(in + 8 * d, 8 < left);
        x[3] = load_vector(in + 9 * d, 9 < left);
    };

    int warp = warp_number(), n = blockIdx.x * COLLAPSE_WARPS + warp, stride = gridDim.x * COLLAPSE_WARPS,
        group = 0;
    const bf16 *in = job.o + 2 * t * d + g % 2 * half + g / 2 * 8, *rows = in + n * token;
    bool present = n < job.count && g / 2 * 8 < half;
    uint4 next[AHEAD][4];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        load_tile(next[k], rows, k, present);
    /* Unless WHOLE the same number of iterations in all warps, since there are barriers inside. */
    while (n - (WHOLE ? 0 : warp) < job.count) {
        bool exists = WHOLE || n < job.count;
        int staged_end = 0, staged_begin = 0, column = group + t * 8;
        bf16 *out = job.out + (int64_t)n * H * d + column;
        if (group == 0 && lane == 0 && head_tile == 0 && n + stride < job.count)
            prefetch_l2(job.o + (n + stride) * token, (uint32_t)(token * sizeof(bf16)));
        /* The next group of columns, or token; its first tiles are loaded while this one is summed. */
        group += GROUP;
        if (group >= half) {
            group = 0;
            n += stride;
        }
        const bf16 *next_rows = in + n * token + group;
        bool next_present = n < job.count && group + g / 2 * 8 < half;
        float sum[HEAD_TILES][8][4] = {};
        for (int first = 0; first < o.tiles; first += AHEAD) {
            if (!WHOLE && first == staged_end) {
                staged_begin = first;
                staged_end = min(first + job.staged, o.tiles);
                __syncthreads(); /* all warps have used the tiles before */
                stage_matrix<KT>(r, job.r, o, first, staged_end - first);
                __syncthreads();
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                int tile = first + k;
                bool more = first + AHEAD < o.tiles;
                uint32_t b[8][2];
                interleave_rows(b, 0, next[k][0], next[k][1]);
                interleave_rows(b, 1, next[k][2], next[k][3]);
                load_tile(next[k], more ? rows : next_rows, more ? tile + AHEAD : k,
                          more ? present : next_present);
                if (tile >= o.tiles)
                    continue;
#pragma unroll
                for (int m = 0; m < HEAD_TILES; m++) {
                    uint32_t a[4];
                    load_matrix_transposed<KT>(a, r, tile - staged_begin, head_tile + m);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        mma_m16n8k16(sum[m][j], a, b[j]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < HEAD_TILES; m++)
#pragma unroll
            for (int row = 0; row < 2; row++) {
                int h = (head_tile + m) * 16 + g + 8 * row;
                if (exists && h < H && column < half)
                    store_across(sum[m], row, out + h * d, half);
            }
        rows = next_rows;
        present = next_present;
    }
}

template <int KT> static size_t staged_bytes(int tiles) {
    return (size_t)tiles * 16 * (KT * 16 + 8) * sizeof(bf16);
}

template <int KT> static void launch_collapse(struct device *dev, struct collapse_job job) {
    constexpr int HEAD_TILES = KT == 1 ? 1 : 2, PARTS = KT / HEAD_TILES, AHEAD = KT == 1 ? 2 : 1;
    int64_t blocks = ceil_div(job.count, COLLAPSE_WARPS);
    int64_t most = ceil_div((int64_t)dev->sm_count * COLLAPSE_BLOCKS_PER_SM, PARTS);
    dim3 grid((unsigned)(blocks < most ? blocks : most), PARTS);
    if (staged_bytes<KT>(job.rows.tiles) <= dev->shared_limit) {
        launch<collapse_tiles<KT, HEAD_TILES, AHEAD, true>>(dev, grid, 32 * COLLAPSE_WARPS,
                                                            staged_bytes<KT>(job.rows.tiles), job);
        return;
    }
    size_t room = dev->shared_limit < STAGED_R ? dev->shared_limit : STAGED_R;
    job.staged = (int)(room / staged_bytes<KT>(AHEAD)) * AHEAD;
    launch<collapse_tiles<KT, HEAD_TILES, AHEAD, false>>(dev, grid, 32 * COLLAPSE_WARPS,
                                                         staged_bytes<KT>(job.staged), job);
}

/* ---- backward ---- */

struct collapse_backward_job {
    const bf16 *dout, *o, *r;
    bf16 *d_o;
    float *partial; /* [blocks][team_warps][SUMS] */
    struct head_rows rows;
    int count, d;
    int first_tile, tiles; /* the group of rows */
    int team_warps, teams;
};

/* Bytes of shared memory: R; afterwards the same space is used to add up the block's sums of dR. */
template <int KT> static size_t collapse_backward_shared(int tiles, int team_warps, int teams) {
    size_t sums = teams > 1 ? (size_t)teams * team_warps * outer_size<KT>::SUMS * sizeof(float) : 0;
    return staged_bytes<KT>(tiles) > sums ? staged_bytes<KT>(tiles) : sums;
}

/* Grid: blocks that share the tokens. All have the same group of rows, which is all of them unless registers hold too
 * few. A warp of a team has up to TILES tiles of pseudo-heads. It adds the outer product of their rows of o and of dout's
 * heads, both loaded along; then it loads dout's heads across, and computes and stores one tile of do after another.
 * The rows of its next token are prefetched into the L2. Warps do not wait for each other. */
template <int KT>
static __global__ void __launch_bounds__(32 * outer_size<KT>::MAX_WARPS, 1)
    collapse_backward_tiles(struct collapse_backward_job job) {
    wait_for_previous();
    typedef outer_size<KT> size;
    constexpr int TILES = size::TILES, NT = size::HEAD_TILES;
    const struct head_rows &o = job.rows;
    int d = job.d, half = d / 2, H = o.heads, I = H * o.pseudo;
    int warp = warp_number(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int team = warp / job.team_warps;
    const struct tile_share share = tile_share(job.tiles, job.team_warps, warp % job.team_warps);
    int first_tile = job.first_tile + share.first, tiles = share.count;
    int left = I - first_tile * 16 - g; /* rows of M from the lane's first row on */
    bf16 *r = dynamic_shared<bf16>();
    stage_matrix<KT>(r, job.r, o, job.first_tile, job.tiles);
    __syncthreads();

    float outer_sum[TILES][NT][4] = {};
    int stride = gridDim.x * job.teams, own_rows = min(tiles * 16, I - first_tile * 16);
    for (int n = blockIdx.x * job.teams + team; n < job.count; n += stride) {
        if (lane == 0 && n + stride < job.count) {
            if (own_rows > 0)
                prefetch_l2(job.o + ((int64_t)(n + stride) * I + first_tile * 16) * d,
                            (uint32_t)(own_rows * d * sizeof(bf16)));
            if (warp % job.team_warps == 0)
                prefetch_l2(job.dout + (int64_t)(n + stride) * H * d, (uint32_t)(H * d * sizeof(bf16)));
        }
        for (int group = 0; group < half; group += GROUP) {
            int across = group + g / 2 * 8, column = group + t * 8;
            bool present = column < half;
            const bf16 *dout = job.dout + (int64_t)n * H * d;
            int64_t rows = ((int64_t)n * I + first_tile * 16 + g) * d + column;
            {
                uint32_t heads_along[NT][4][2];
                load_heads_along(heads_along, dout + column, H, d, present);
#pragma unroll
                for (int k = 0; k < TILES; k++)
                    if (k < tiles) {
                        const int offsets[2] = {k * 16 < left ? k * 16 * d : -1,
                                                k * 16 + 8 < left ? (k * 16 + 8) * d : -1};
                        along_rows x;
                        load_along(x, job.o + rows, offsets, half, present);
                        add_outer(outer_sum[k], x, heads_along, H);
                    }
            }
            uint32_t b[KT][8][2];
            load_across(b, dout + g % 2 * half + across, H, d, across < half);
            bf16 *to = job.d_o + rows;
#pragma unroll 1
            for (int k = 0; k < tiles; k++) {
                float sum[8][4] = {};
#pragma unroll
                for (int m = 0; m < KT; m++) {
                    uint32_t a[4];
                    load_matrix<KT>(a, r, share.first + k, m);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        mma_m16n8k16(sum[j], a, b[m][j]);
                }
#pragma unroll
                for (int row = 0; row < 2; row++, to += 8 * d)
                    if (present && k * 16 + 8 * row < left)
                        store_across(sum, row, to, half);
            }
        }
    }
    store_outer(outer_sum, (float *)r, job.partial + (int64_t)blockIdx.x * job.team_warps * size::SUMS,
                job.teams, job.team_warps);
}

/* Choose the grid. False: this shape needs more shared memory than the device has. */
template <int KT>
static bool collapse_backward_grid(const struct device *dev, const struct head_rows &o, int64_t count,
                                   struct outer_grid *grid) {
    return outer_grid<KT>(dev, o, count, 1, collapse_backward_shared<KT>, grid);
}

template <int KT>
static void launch_collapse_backward(struct device *dev, struct collapse_backward_job job,
                                     struct outer_grid grid, struct head_gradients to, bool accumulate) {
    typedef outer_size<KT> size;
    int all = job.rows.tiles;
    job.partial =
        (float *)cuda_workspace(dev, grid.blocks * grid.elements * sizeof(float), "collapse_backward");
    job.team_warps = grid.team_warps;
    job.teams = grid.teams;
    for (int first = 0; first < all; first += grid.group_tiles) {
        job.first_tile = first;
        job.tiles = (int)min64(grid.group_tiles, all - first);
        launch<collapse_backward_tiles<KT>>(
            dev, grid.blocks, grid.threads(),
            collapse_backward_shared<KT>(grid.group_tiles, grid.team_warps, grid.teams), job);
        launch<sum_outer<size::TILES, size::HEAD_TILES>>(
            dev, (unsigned)(grid.elements / 32), 32 * SUM_SLICES, 0, job.partial, grid.blocks,
            (int)grid.elements, job.rows, outer_tiles{first, job.tiles, grid.team_warps}, to, accumulate);
    }
}

/* ---- operations ---- */

static int64_t tokens_of(const struct collapse_spec *s) {
    return s->batch * s->tokens;
}

static struct head_rows rows_of(const struct collapse_spec *s) {
    return memory_order(s->per_head ? DIAGONAL : BY_HEAD, s->heads, s->pseudo);
}

int cuda_collapse_plan(struct device *dev, const struct collapse_spec *s, struct op_cost *cost,
                       struct error *e) {
    (void)e;
    struct head_rows o = rows_of(s);
    size_t bytes = plain_workspace(dev, o, tokens_of(s), 1);
    bool planned = false;
    if (tensor_core_shape(cuda_compute(dev), s->heads, s->head_dim))
        by_head_tiles(s->heads, [&](auto kt) {
            struct outer_grid grid;
            planned = collapse_backward_grid<decltype(kt)::value>(dev, o, tokens_of(s), &grid);
            if (planned && grid.blocks * grid.elements * sizeof(float) > bytes)
                bytes = grid.blocks * grid.elements * sizeof(float);
        });
    if (!planned && cuda_compute(dev) == DTYPE_BF16)
        announce_plain("collapse", s->heads, s->head_dim);
    cost->workspace = bytes;
    return 0;
}

static void check_collapse(const struct device *dev, const char *op, const struct collapse_spec *s, tensor o,
                           tensor r, enum dtype r_type, tensor out) {
    int64_t B = s->batch, T = s->tokens, H = s->heads, P = s->pseudo, d = s->head_dim;
    check_shape(op, "o", o, cuda_compute(dev), B, T * P, H, d);
    check_shape(op, "R", r, r_type, H, P, s->per_head ? 0 : H);
    check_shape(op, "out", out, cuda_compute(dev), B, T, H, d);
    check_contiguous(op, "o", o);
    check_contiguous(op, "R", r);
    check_contiguous(op, "out", out);
}

void cuda_collapse(struct device *dev, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    check_collapse(dev, "collapse", s, o, r, cuda_compute(dev), out);
    struct head_rows rows = rows_of(s);
    int64_t n = tokens_of(s), H = s->heads, d = s->head_dim;
    if (tensor_core_shape(o.dtype, H, d) && aligned16({o.data, out.data})) {
        struct collapse_job job = {
            (const bf16 *)o.data, (const bf16 *)r.data, (bf16 *)out.data, rows, (int)n, (int)d, 0};
        by_head_tiles(H, [&](auto kt) { launch_collapse<decltype(kt)::value>(dev, job); });
        return;
    }
    by_dtype(o.dtype, [&](auto number) {
        using T = decltype(number);
        launch<plain_contract<T>>(dev, plain_blocks(dev, ceil_div(n * H * d, PLAIN_THREADS)), PLAIN_THREADS,
                                  0, (const T *)o.data, (const T *)r.data, rows, (T *)out.data, n, (int)d);
    });
}

void cuda_collapse_backward(struct device *dev, const struct collapse_spec *s, tensor dout, tensor o,
                            tensor r, tensor d_o, tensor dr, bool accumulate) {
    const char *op = "collapse_backward";
    check_collapse(dev, op, s, o, r, cuda_compute(dev), dout);
    check_collapse(dev, op, s, d_o, dr, DTYPE_F32, dout);
    struct head_rows rows = rows_of(s);
    struct head_gradients to = {{(float *)dr.data, NULL, NULL}};
    int64_t n = tokens_of(s), H = s->heads, d = s->head_dim;
    bool done = false;
    if (tensor_core_shape(o.dtype, H, d) && aligned16({o.data, dout.data, d_o.data})) {
        struct collapse_backward_job job = {};
        job.dout = (const bf16 *)dout.data;
        job.o = (const bf16 *)o.data;
        job.r = (const bf16 *)r.data;
        job.d_o = (bf16 *)d_o.data;
        job.rows = rows;
        job.count = (int)n;
        job.d = (int)d;
        by_head_tiles(H, [&](auto kt) {
            constexpr int KT = decltype(kt)::value;
            struct outer_grid grid;
            if ((done = collapse_backward_grid<KT>(dev, rows, n, &grid)))
                launch_collapse_backward<KT>(dev, job, grid, to, accumulate);
        });
    }
    if (done)
        return;
    by_dtype(o.dtype, [&](auto number) {
        using T = decltype(number);
        launch<plain_expand<T>>(dev, plain_blocks(dev, ceil_div(n * s->pseudo * H * d, PLAIN_THREADS)),
                                PLAIN_THREADS, 0, (const T *)dout.data, H * d, (const T *)r.data, rows,
                                rope_rows(), (T *)d_o.data, n, (int)d);
        struct plain_backward_job<T> job = {};
        job.of[0] = {(const T *)o.data, (const T *)dout.data, (const T *)r.data, NULL, rope_rows()};
        job.o = rows;
        job.count = n;
        job.stride = H * d;
        job.d = (int)d;
        launch_plain_backward(dev, job, 1, to, accumulate, op);
    });
}
