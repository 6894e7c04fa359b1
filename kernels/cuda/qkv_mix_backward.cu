/* qkv_mix, backward (equations in qkv_mix.cu): one pass over the gradients computes dqkv, contract, and each
 * block's part of dalpha, outer; a small launch sums the blocks' parts.
 *
 * A block's registers hold the sums of 1024 rows of dalpha (up to 16 heads), 512 (32) or 256 (64). More rows, as with
 * P = H = 24, are taken in groups, one pass after the other: each adds its part of dqkv to that of the groups before
 * it, kept in fp32 in the workspace. To bound the workspace, all groups of some tokens come before the next tokens. */
#include "kernels/cuda/qkv_mix.cuh"

struct mix_backward_job {
    const bf16 *dout[3], *qkv, *alpha[3];
    bf16 *dqkv;
    float *partial; /* [blocks][tensors][team_warps][SUMS] */
    struct rope_rows rope;
    struct head_rows o;
    int begin, end, d; /* tokens */
    /* The group of rows, and the sum of dqkv over the groups before it: [end - begin][tensors][H,d]. */
    int first_tile, tiles;
    float *sum;
    bool first_group, last_group;
    int64_t stride; /* of a row of qkv and dqkv, which are at their first tensor */
    int tensors, rotated;
    int team_warps, teams;
};

/* A row of dout: its offset within its token, i d, or negative in the padding; and its pseudo-head. */
struct row_source {
    int offset, pseudo;
};

/* Bytes of shared memory: the rows' offsets; alpha; each warp's staged rows; and where a team has more than
 * one warp, its partial sums of dq, for 16 heads at a time. The space of rows and sums is used again to sum
 * dalpha at the end. */
template <int KT> static size_t mix_backward_shared(int tiles, int team_warps, int teams) {
    size_t warps = (size_t)team_warps * teams;
    size_t rows = warps * outer_size<KT>::TILES * 16 * STAGED * sizeof(bf16);
    size_t sums = team_warps > 1 ? warps * 16 * 2 * GROUP * sizeof(float) : 0;
    size_t last = teams > 1 ? warps * outer_size<KT>::SUMS * sizeof(float) : 0;
    size_t row = sizeof(struct row_source) + (KT * 16 + 8) * sizeof(bf16);
    return (size_t)tiles * 16 * row + (rows + sums > last ? rows + sums : last);
}

/* Grid: (blocks, tensors). A warp of a team has up to TILES tiles of pseudo-heads. It loads their rows of a
 * group of columns along, rotates them back, stages them in shared memory, and adds their outer product with
 * q's heads; then it contracts the staged rows with alpha. The next rows are loaded as soon as there are
 * registers for them, from the L2, into which they were prefetched. If a team is a single warp, the result is
 * dq; otherwise the warps' parts of dq are added up in shared memory. GROUPED: a launch has some of the rows,
 * and a team has two warps or more. */
template <int KT, bool GROUPED>
static __global__ void __launch_bounds__(32 * outer_size<KT>::MAX_WARPS, 1)
    mix_backward_tiles(struct mix_backward_job job) {
    wait_for_previous();
    typedef outer_size<KT> size;
    /* AHEAD: tiles that a warp has in flight; two where only 8 warps share an SM and there are registers. */
    constexpr int TILES = size::TILES, NT = size::HEAD_TILES, AHEAD = KT == 2 ? 2 : 1;
    const struct head_rows &o = job.o;
    int w = blockIdx.y, d = job.d, half = d / 2, H = o.heads, all_tiles = job.tiles;
    int warp = warp_number(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int team = warp / job.team_warps, member = warp % job.team_warps;
    const struct tile_share share = tile_share(all_tiles, job.team_warps, member);
    int tiles = share.count, rounds = (tiles + AHEAD - 1) / AHEAD * AHEAD;
    struct row_source *source = dynamic_shared<struct row_source>();
    bf16 *alpha = (bf16 *)(source + all_tiles * 16), *rows = alpha + all_tiles * 16 * (KT * 16 + 8);
    float2 *sums = (float2 *)(rows + job.team_warps * job.teams * TILES * 16 * STAGED);
    bf16 *staged = rows + warp * TILES * 16 * STAGED;
    stage_matrix<KT>(alpha,
                     w == 0   ? job.alpha[0]
                     : w == 1 ? job.alpha[1]
                              : job.alpha[2],
                     o, job.first_tile, all_tiles);
    for (int row = threadIdx.x; row < all_tiles * 16; row += blockDim.x) {
        int i = row_index(o, job.first_tile + row / 16, row % 16);
        source[row] = {i >= 0 ? i * d : -1, i >= 0 ? i / H : 0};
    }
    __syncthreads();

    source += share.first * 16 + g;
    alpha += share.first * 16 * (KT * 16 + 8);
    const bf16 *dout = w == 0 ? job.dout[0] : w == 1 ? job.dout[1] : job.dout[2];
    bool rotate = job.rope.table && w < job.rotated;
    auto load_rows = [&](along_rows &x, int n, int group, int k) {
        const bf16 *big = dout + (int64_t)n * o.pseudo * H * d + group + t * 8;
        bool padding = AHEAD > 1 ? k >= tiles : tiles == 0; /* a warp may have no tile of the last group */
        const struct row_source *row = source + (padding ? 0 : k * 16);
        const int offsets[2] = {row[0].offset, row[8].offset};
        load_along(x, big, offsets, half, n < job.end && group + t * 8 < half && !padding);
    };

    float outer_sum[TILES][NT][4] = {};
    int step = rope_step(job.rope, d), stride = gridDim.x * job.teams,
        first = (GROUPED ? job.begin : 0) + blockIdx.x * job.teams, group = 0;
    along_rows next[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        load_rows(next[k], first + team, group, k);
    while (first <
           job.end) { /* the same number of iterations in all warps, since there are barriers inside */
        int n = first + team, column = group + t * 8, this_group = group;
        bool present = n < job.end && column < half;
        int64_t heads_offset = n * job.stride + w * H * d + column;
        uint32_t heads_along[NT][4][2];
        load_heads_along(heads_along, job.qkv + heads_offset, H, d, present);
        const float *angles = rotate && present ? rope_token(job.rope, n, o.pseudo, d) + column : NULL;
        if (!GROUPED && group == 0 && member == 0 && lane == 0 && n + stride < job.end) {
            uint32_t heads = (uint32_t)(H * d * sizeof(bf16));
            prefetch_l2(dout + (int64_t)(n + stride) * o.pseudo * H * d, (uint32_t)o.pseudo * heads);
            prefetch_l2(job.qkv + (n + stride) * job.stride + w * H * d, heads);
        }
        group += GROUP;
        if (group >= half) {
            group = 0;
            first += stride;
        }
#pragma unroll
        for (int k = 0; k < TILES; k++) {
            if (k >= rounds)
                break;
            along_rows &ahead = next[k % AHEAD];
            along_rows x = {{ahead[0][0], ahead[0][1]}, {ahead[1][0], ahead[1][1]}};
            if (rotate && present && k < tiles) {
                struct rotation angle; /* read again for each tile, from the L1: no registers to hold it */
                load_rotation(angle, angles + source[k * 16].pseudo * step, half);
                rotate_back(x[0][0], x[0][1], angle);
                rotate_back(x[1][0], x[1][1], angle);
            }
            bool more = k + AHEAD < rounds;
            load_rows(ahead, more ? n : first + team, more ? this_group : group,
                      more ? k + AHEAD : k + AHEAD - rounds);
            if (k >= tiles)
                break;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t *row = (uint32_t *)(staged + (k * 16 + g + 8 * r) * STAGED) + t;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    row[(e * 4 + 0) * 4] = x[r][e].x;
                    row[(e * 4 + 1) * 4] = x[r][e].y;
                    row[(e * 4 + 2) * 4] = x[r][e].z;
                    row[(e * 4 + 3) * 4] = x[r][e].w;
                }
            }
            add_outer(outer_sum[k], x, heads_along, H);
        }
        __syncwarp(); /* the warp's rows are staged; only the warp itself reads them */
#pragma unroll
        for (int m = 0; m < KT; m++) {
            float sum[8][4] = {};
#pragma unroll
            for (int k = 0; k < TILES; k++)
                if (k < tiles) {
                    uint32_t a[4];
                    load_matrix_transposed<KT>(a, alpha, k, m);
#pragma unroll
                    for (int j = 0; j < 8; j += 2) {
                        uint32_t b[4];
                        ldmatrix<4, true>(b, staged + (k * 16 + lane % 16) * STAGED + (j + lane / 16) * 8);
                        mma_m16n8k16(sum[j], a, {b[0], b[1]});
                        mma_m16n8k16(sum[j + 1], a, {b[2], b[3]});
                    }
                }
            if (!GROUPED && job.team_warps == 1) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int h = m * 16 + g + 8 * r;
                    if (!present || h >= H)
                        continue;
                    bf16 *to = job.dqkv + heads_offset + h * d;
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        store_vector(to + e * half, pack(sum[4 * e][2 * r], sum[4 * e][2 * r + 1]),
                                     pack(sum[4 * e + 1][2 * r], sum[4 * e + 1][2 * r + 1]),
                                     pack(sum[4 * e + 2][2 * r], sum[4 * e + 2][2 * r + 1]),
                                     pack(sum[4 * e + 3][2 * r], sum[4 * e + 3][2 * r + 1]));
                }
            } else if (m * 16 < H) {
                /* sums [warp][row r, half e, word][lane]: four words of a lane are one store of 16 bytes. */
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        sums[(warp * 16 + r * 8 + j) * 32 + lane] = {sum[j][2 * r], sum[j][2 * r + 1]};
                __syncthreads();
                for (int unit = member * 32 + lane; unit < 4 * 32; unit += job.team_warps * 32) {
                    int r = unit / 64, e = unit / 32 % 2, h = m * 16 + g + 8 * r;
                    if (!present || h >= H)
                        continue;
                    float2 total[4] = {};
                    float *kept = NULL;
                    if constexpr (GROUPED) {
                        kept = job.sum + (((int64_t)(n - job.begin) * job.tensors + w) * H + h) * d + column +
                               e * half;
                        if (!job.first_group)
                            load(kept, *reinterpret_cast<float(*)[8]>(total));
                    }
                    for (int other = 0; other < job.team_warps; other++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float2 part =
                                sums[((team * job.team_warps + other) * 16 + unit / 32 * 4 + j) * 32 + lane];
                            total[j].x += part.x;
                            total[j].y += part.y;
                        }
                    if (GROUPED && !job.last_group) {
                        store(kept, *reinterpret_cast<float(*)[8]>(total));
                        continue;
                    }
                    store_vector(job.dqkv + heads_offset + h * d + e * half, pack(total[0].x, total[0].y),
                                 pack(total[1].x, total[1].y), pack(total[2].x, total[2].y),
                                 pack(total[3].x, total[3].y));
                }
                __syncthreads();
            }
        }
        __syncwarp(); /* all lanes have read the staged rows */
    }
    store_outer(outer_sum, (float *)rows,
                job.partial + ((int64_t)blockIdx.x * gridDim.y + w) * job.team_warps * size::SUMS, job.teams,
                job.team_warps);
}

/* The grid; the tokens that all groups of rows take before the next tokens; and the workspace. */
struct mix_backward_plan {
    struct outer_grid grid;
    int64_t tokens;
    size_t partial_bytes, sum_bytes;
};

/* What dqkv's fp32 sums may take of the workspace: up to 1/1024 of the GPU's memory. */
constexpr int64_t MAX_SUM_BYTES = 64 << 20;

/* False: this shape needs more shared memory than the device has. */
template <int KT>
static bool mix_backward_plan(const struct device *dev, const struct head_rows &o, int64_t count, int tensors,
                              int64_t d, struct mix_backward_plan *plan) {
    struct outer_grid *grid = &plan->grid;
    if (!outer_grid<KT>(dev, o, count, tensors, mix_backward_shared<KT>, grid))
        return false;
    plan->tokens = count;
    plan->sum_bytes = 0;
    if (grid->groups > 1) {
        int64_t token = (int64_t)tensors * o.heads * d * (int64_t)sizeof(float);
        int64_t most = min64(MAX_SUM_BYTES, (int64_t)dev->memory / 1024) / token;
        plan->tokens = ceil_div(count, ceil_div(count, most > 0 ? most : 1));
        plan->sum_bytes = (size_t)(plan->tokens * token);
        grid->blocks = (int)min64(grid->blocks, ceil_div(plan->tokens, grid->teams));
    }
    plan->partial_bytes = (size_t)(grid->blocks * tensors * grid->elements) * sizeof(float);
    return true;
}

template <int KT>
static void launch_mix_backward(struct device *dev, struct mix_backward_job job,
                                struct mix_backward_plan plan, struct head_gradients to, bool accumulate) {
    typedef outer_size<KT> size;
    const struct outer_grid &grid = plan.grid;
    int all = job.o.tiles * job.o.chunks;
    int64_t count = job.end;
    job.partial = (float *)cuda_workspace(dev, plan.partial_bytes + plan.sum_bytes, "qkv_mix_backward");
    job.sum = job.partial + plan.partial_bytes / sizeof(float);
    job.team_warps = grid.team_warps;
    job.teams = grid.teams;
    size_t shared = mix_backward_shared<KT>(grid.group_tiles, grid.team_warps, grid.teams);
    dim3 blocks(grid.blocks, job.tensors);
    for (int64_t begin = 0; begin < count; begin += plan.tokens)
        for (int first = 0; first < all; first += grid.group_tiles) {
            job.begin = (int)begin;
            job.end = (int)min64(begin + plan.tokens, count);
            job.first_tile = first;
            job.tiles = (int)min64(grid.group_tiles, all - first);
            job.first_group = first == 0;
            job.last_group = first + job.tiles == all;
            if (grid.groups > 1)
                launch<mix_backward_tiles<KT, true>>(dev, blocks, grid.threads(), shared, job);
            else
                launch<mix_backward_tiles<KT, false>>(dev, blocks, grid.threads(), shared, job);
            launch<sum_outer<size::TILES, size::HEAD_TILES>>(
                dev, dim3((unsigned)(grid.elements / 32), job.tensors), 32 * SUM_SLICES, 0, job.partial,
                grid.blocks, (int)grid.elements, job.o, outer_tiles{first, job.tiles, grid.team_warps}, to,
                accumulate || begin > 0);
        }
}

/* ---- the operation ---- */

static size_t part_workspace(const struct device *dev, const struct qkv_mix_spec *s, struct mix_part part) {
    struct head_rows o = pseudo_order(BY_PSEUDO_HEAD, part.heads, s->pseudo);
    int64_t n = qkv_mix_tokens(s);
    size_t bytes = plain_workspace(dev, o, n, part.tensors);
    bool planned = false;
    if (tensor_core_shape(cuda_compute(dev), part.heads, s->head_dim))
        by_head_tiles(part.heads, [&](auto kt) {
            struct mix_backward_plan plan;
            planned = mix_backward_plan<decltype(kt)::value>(dev, o, n, part.tensors, s->head_dim, &plan);
            if (planned && plan.partial_bytes + plan.sum_bytes > bytes)
                bytes = plan.partial_bytes + plan.sum_bytes;
        });
    if (!planned && cuda_compute(dev) == DTYPE_BF16)
        announce_plain("qkv_mix", part.heads, s->head_dim);
    return bytes;
}

size_t qkv_mix_backward_workspace(const struct device *dev, const struct qkv_mix_spec *s) {
    struct mix_part parts[2];
    size_t bytes = 0;
    for (int i = 0, count = mix_parts(s, parts); i < count; i++) {
        size_t one = part_workspace(dev, s, parts[i]);
        bytes = one > bytes ? one : bytes;
    }
    return bytes;
}

/* What backward reads and writes. */
struct mix_gradients {
    tensor dout[3], alpha[3], dalpha[3], qkv, dqkv;
    bool accumulate;
};

static void mix_part_backward(struct device *dev, const struct qkv_mix_spec *s, struct mix_part part,
                              struct rope_rows rope, const struct mix_gradients &x) {
    int64_t H = part.heads, d = s->head_dim, n = qkv_mix_tokens(s), stride = mix_row_heads(s) * d;
    struct head_rows o = pseudo_order(BY_PSEUDO_HEAD, H, s->pseudo);
    struct head_gradients to = {};
    for (int w = 0; w < part.tensors; w++)
        to.dm[w] = (float *)x.dalpha[part.first + w].data;
    bool done = false;
    if (tensor_core_shape(x.qkv.dtype, H, d) &&
        aligned16({x.qkv.data, x.dqkv.data, x.dout[0].data, x.dout[1].data, x.dout[2].data, rope.table})) {
        struct mix_backward_job job = {};
        for (int w = 0; w < part.tensors; w++) {
            job.dout[w] = (const bf16 *)x.dout[part.first + w].data;
            job.alpha[w] = (const bf16 *)x.alpha[part.first + w].data;
        }
        job.qkv = (const bf16 *)x.qkv.data + part.offset;
        job.dqkv = (bf16 *)x.dqkv.data + part.offset;
        job.rope = rope;
        job.o = o;
        job.end = (int)n;
        job.d = (int)d;
        job.stride = stride;
        job.tensors = part.tensors;
        job.rotated = part.rotated;
        by_head_tiles(H, [&](auto kt) {
            constexpr int KT = decltype(kt)::value;
            struct mix_backward_plan plan;
            if ((done = mix_backward_plan<KT>(dev, o, n, part.tensors, d, &plan)))
                launch_mix_backward<KT>(dev, job, plan, to, x.accumulate);
        });
    }
    if (done)
        return;
    by_dtype(x.qkv.dtype, [&](auto number) {
        using T = decltype(number);
        struct plain_backward_job<T> job = {};
        for (int w = 0; w < part.tensors; w++) {
            struct rope_rows angles = rope;
            int64_t at = part.offset + w * H * d;
            if (w >= part.rotated)
                angles.table = NULL;
            job.of[w] = {(const T *)x.dout[part.first + w].data, (const T *)x.qkv.data + at,
                         (const T *)x.alpha[part.first + w].data, (T *)x.dqkv.data + at, angles};
        }
        job.o = o;
        job.count = n;
        job.stride = stride;
        job.d = (int)d;
        launch_plain_backward(dev, job, part.tensors, to, x.accumulate, "qkv_mix_backward");
    });
}

void cuda_qkv_mix_backward(struct device *dev, const struct qkv_mix_spec *s, tensor dq, tensor dk, tensor dv,
                           tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor table,
                           tensor positions, tensor dqkv, tensor dalpha_q, tensor dalpha_k, tensor dalpha_v,
                           bool accumulate) {
    const char *op = "qkv_mix_backward";
    struct rope_rows rope =
        check_qkv_mix(dev, op, s, dqkv, dq, dk, dv, alpha_q, alpha_k, alpha_v, table, positions, 0);
    if (!s->mixed) {
        rope_rotate(dev, s, rope, dqkv, dq, dk, dv, true);
        return;
    }
    check_shape(op, "qkv", qkv, cuda_compute(dev), s->batch, s->tokens, mix_row_heads(s), s->head_dim);
    check_contiguous(op, "qkv", qkv);
    const struct mix_gradients x = {
        {dq, dk, dv}, {alpha_q, alpha_k, alpha_v}, {dalpha_q, dalpha_k, dalpha_v}, qkv, dqkv, accumulate};
    for (int w = 0; w < 3; w++) {
        int64_t H = mix_heads_of(s, w);
        check_shape(op, "dalpha", x.dalpha[w], DTYPE_F32, s->pseudo, H, H);
        check_contiguous(op, "dalpha", x.dalpha[w]);
    }
    struct mix_part parts[2];
    for (int i = 0, count = mix_parts(s, parts); i < count; i++)
        mix_part_backward(dev, s, parts[i], rope, x);
}
