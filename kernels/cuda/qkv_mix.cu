/* qkv_mix: pseudo-heads out of heads, interleaved into the virtual sequence, and rotated (paper: steps 2-4).
 *
 *   forward   q~[n,p,h,:] = rotate(sum_m alpha_q[p,h,m] q[n,m,:]), likewise k~, and v~ without rotation
 *   backward  u = rotate back(dq~[n,p,h,:]);  dq[n,m,:] = sum_{p,h} alpha_q[p,h,m] u[p,h,:];
 *             dalpha_q[p,h,m] (+)= sum_n <u[p,h,:], q[n,m,:]>;  likewise for k and v
 *
 * qkv [N,3,H,d], q~, k~, v~ [N,P,H,d], N = B T tokens; [N,P,H,d] is [B,S,H,d], so interleaving moves nothing.
 * Forward is one launch, the expand of head_mix.cuh; backward is one pass over the gradients, contract and
 * outer, and a small launch that sums the blocks' dalpha. Each number is read or written once, 2 bytes in
 * bf16: forward 3 (1 + P) H d numbers a token, backward 3 (2 + P) H d; besides the table's angles, P d floats
 * a token, which all of a batch and all heads of q and k share. */
#include "kernels/cuda/head_mix_plain.cuh"

/* ---- rotation alone: P = 1 without alphas
 * ------------------------------------------------------------------
 */

enum { ROTATE_THREADS = 256 };

template <typename T> struct rotate_job {
    T *qkv;    /* [N,3,H,d] */
    T *out[3]; /* [N,H,d] */
    struct rope_rows rope;
    int64_t count;
    int heads, d;
};

/* out = rotate(qkv), or back into qkv = rotate back(out); V columns and their partners a thread. Bytes: 6 N H
 * d numbers. */
template <typename T, int V, bool BACK>
static __global__ void __launch_bounds__(ROTATE_THREADS) rotate_heads(struct rotate_job<T> job) {
    int d = job.d, half = (d + 1) / 2, vectors = (half + V - 1) / V;
    int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= job.count * 3 * job.heads * vectors)
        return;
    int c = (int)(e % vectors) * V, h = (int)(e / vectors % job.heads);
    int64_t n = e / vectors / job.heads / 3;
    int w = (int)(e / vectors / job.heads % 3);
    bool two = V > 1 || c + half < d;
    T *packed = job.qkv + ((n * 3 + w) * job.heads + h) * d + c;
    T *apart = (w == 0 ? job.out[0] : w == 1 ? job.out[1] : job.out[2]) + (n * job.heads + h) * d + c;
    const T *from = BACK ? apart : packed;
    T *to = BACK ? packed : apart;
    float x[V], y[V] = {}, cosine[V], sine[V];
    load(from, x);
    if (two)
        load(from + half, y);
    if (job.rope.table && w < 2) {
        const float *row = rope_token(job.rope, (int)n, 1, d) + c;
        load(row, cosine);
        load(row + half, sine);
#pragma unroll
        for (int k = 0; k < V; k++) {
            float a = x[k], b = y[k], s = BACK ? -sine[k] : sine[k];
            x[k] = a * cosine[k] - b * s;
            y[k] = b * cosine[k] + a * s;
        }
    }
    store(to, x);
    if (two)
        store(to + half, y);
}

template <bool BACK>
static void rotate_only(struct device *dev, const struct qkv_mix_spec *s, struct rope_rows rope, tensor qkv,
                        tensor q, tensor k, tensor v) {
    by_dtype(qkv.dtype, [&](auto number) {
        using T = decltype(number);
        struct rotate_job<T> job = {
            (T *)qkv.data, {(T *)q.data, (T *)k.data, (T *)v.data}, rope, s->batch * s->tokens, (int)s->heads,
                (int)s->head_dim
        };
        int64_t half = (s->head_dim + 1) / 2, heads = job.count * 3 * s->heads;
        if (s->head_dim % (2 * VECTOR<T>) == 0 && aligned16({qkv.data, q.data, k.data, v.data, rope.table}))
            launch<rotate_heads<T, VECTOR<T>, BACK>>(dev, ceil_div(heads * half / VECTOR<T>, ROTATE_THREADS),
                                                     ROTATE_THREADS, 0, job);
        else
            launch<rotate_heads<T, 1, BACK>>(dev, ceil_div(heads * half, ROTATE_THREADS), ROTATE_THREADS, 0,
                                             job);
    });
}

/* ---- forward
 * -----------------------------------------------------------------------------------------------
 */

enum { MIX_WARPS = 8, MIX_BLOCKS_PER_SM = 2, MIX_SHARED = 96 << 10 };

struct mix_job {
    const bf16 *qkv, *alpha[3];
    bf16 *out[3];
    struct rope_rows rope;
    struct head_rows o;
    int count, d; /* tokens */
    int chunks;   /* of a block */
};

/* Grid: (blocks that share the tokens, 3 tensors, parts of the chunks). A warp takes a group of columns of
 * one token, loads its heads across, and lets one tile of 16 pseudo-heads after another out. Nothing is
 * staged but alpha, so warps never wait for each other; 16 of them on an SM hide what each waits for. Shared
 * memory: 16 rows a tile of alpha, 16 KT + 8 numbers each. */
template <int KT>
static __global__ void __launch_bounds__(32 * MIX_WARPS, KT == 4 ? 1 : 2) mix_tiles(struct mix_job job) {
    const struct head_rows &o = job.o;
    int w = blockIdx.y, d = job.d, half = d / 2;
    int begin = blockIdx.z * job.chunks, end = min(begin + job.chunks, o.chunks);
    bf16 *alpha = dynamic_shared<bf16>();
    stage_matrix<KT>(alpha,
                     w == 0   ? job.alpha[0]
                     : w == 1 ? job.alpha[1]
                              : job.alpha[2],
                     o, begin * o.tiles, (end - begin) * o.tiles);
    __syncthreads();
    bf16 *out = w == 0 ? job.out[0] : w == 1 ? job.out[1] : job.out[2];
    bool rotate = job.rope.table && w < 2;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, step = rope_step(job.rope, d);
    for (int n = blockIdx.x * MIX_WARPS + warp_number(); n < job.count; n += gridDim.x * MIX_WARPS) {
        const bf16 *in = job.qkv + ((int64_t)n * 3 + w) * o.heads * d + g % 2 * half;
        bf16 *out_token = out + (int64_t)n * o.pseudo * o.heads * d;
        const float *angles = rotate ? rope_token(job.rope, n, o.pseudo, d) : NULL;
        for (int group = 0; group < half; group += GROUP) {
            int in_column = group + g / 2 * 8, column = group + t * 8;
            uint32_t b[KT][8][2];
            load_across(b, in + in_column, o.heads, d, in_column < half);
            for (int chunk = begin; chunk < end; chunk++) {
                int p = row_pseudo(o, chunk, g);
                bool there = p < o.pseudo && column < half;
                struct rotation angle;
                if (rotate && there)
                    load_rotation(angle, angles + p * step + column, half);
                for (int tile = 0; tile < o.tiles; tile++) {
                    float sum[8][4] = {};
#pragma unroll
                    for (int k = 0; k < KT; k++) {
                        uint32_t a[4];
                        load_matrix<KT>(a, alpha, (chunk - begin) * o.tiles + tile, k);
#pragma unroll
                        for (int j = 0; j < 8; j++)
                            mma_m16n8k16(sum[j], a, b[k][j]);
                    }
                    if (rotate && there) {
                        rotate_across(sum, 0, angle);
                        rotate_across(sum, 1, angle);
                    }
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        int h = row_head(o, tile, g + 8 * r);
                        bf16 *to = out_token + (p * o.heads + h) * d + column;
                        if (there && h < o.heads)
                            store_across(sum, r, to, half);
                    }
                }
            }
        }
    }
}

/* Chunks of rows whose weights fit into shared memory at once. */
static int chunks_at_once(const struct device *dev, const struct head_rows &o, size_t row_bytes) {
    size_t limit = dev->shared_limit;
    if (limit > MIX_SHARED)
        limit = MIX_SHARED;
    size_t chunks = limit / (o.tiles * 16 * row_bytes);
    return (int)(chunks < (size_t)o.chunks ? chunks : (size_t)o.chunks);
}

template <int KT> static void launch_mix_tiles(struct device *dev, struct mix_job job) {
    size_t row_bytes = (KT * 16 + 8) * sizeof(bf16);
    job.chunks = chunks_at_once(dev, job.o, row_bytes);
    int parts = (int)ceil_div(job.o.chunks, job.chunks);
    int64_t blocks = ceil_div(job.count, MIX_WARPS);
    int64_t most = ceil_div((int64_t)dev->sm_count * MIX_BLOCKS_PER_SM, 3 * parts);
    launch<mix_tiles<KT>>(dev, dim3((unsigned)(blocks < most ? blocks : most), 3, parts), 32 * MIX_WARPS,
                          job.chunks * job.o.tiles * 16 * row_bytes, job);
}

/* ---- backward
 * ----------------------------------------------------------------------------------------------
 */

struct mix_backward_job {
    const bf16 *dout[3], *qkv, *alpha[3];
    bf16 *dqkv;
    float *partial; /* [blocks][3][team_warps][SUMS] */
    struct rope_rows rope;
    struct head_rows o;
    int count, d;
    int team_warps, teams;
};

/* Where a row of dout is in its token, i d, or negative in the padding, and its pseudo-head. */
struct row_place {
    int at, pseudo;
};

/* Bytes of shared memory: where the rows are, alpha, each warp's rows, and where a team has more than one
 * warp its partial sums of dq, 16 rows of all heads at a time; rows and sums also serve to sum dalpha. */
template <int KT> static size_t mix_backward_shared(const struct head_rows &o, int team_warps, int teams) {
    size_t warps = (size_t)team_warps * teams;
    size_t rows = warps * outer_size<KT>::TILES * 16 * STAGED * sizeof(bf16);
    size_t sums = team_warps > 1 ? warps * 16 * 2 * GROUP * sizeof(float) : 0;
    size_t last = teams > 1 ? warps * outer_size<KT>::SUMS * sizeof(float) : 0;
    size_t row = sizeof(struct row_place) + (KT * 16 + 8) * sizeof(bf16);
    return (size_t)o.tiles * o.chunks * 16 * row + (rows + sums > last ? rows + sums : last);
}

/* Grid: (blocks, 3 tensors). A warp of a team owns up to TILES tiles of pseudo-heads: loads their rows of a
 * group of columns along, rotates them back, stages them, adds their outer product with q's heads, then
 * contracts the staged rows with alpha. The next rows are loaded as soon as there are registers for them. A
 * team of one has dq then; otherwise the warps' parts of dq meet in shared memory. */
template <int KT>
static __global__ void __launch_bounds__(32 * outer_size<KT>::MAX_WARPS, 1)
    mix_backward_tiles(struct mix_backward_job job) {
    typedef outer_size<KT> size;
    /* AHEAD: tiles that a warp has under way, with fewer warps two. */
    constexpr int TILES = size::TILES, NT = size::HEAD_TILES, AHEAD = KT == 2 ? 2 : 1;
    const struct head_rows &o = job.o;
    int w = blockIdx.y, d = job.d, half = d / 2, H = o.heads, all_tiles = o.tiles * o.chunks;
    int warp = warp_number(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int team = warp / job.team_warps, member = warp % job.team_warps;
    int tiles = min(TILES, all_tiles - member * TILES), rounds = (tiles + AHEAD - 1) / AHEAD * AHEAD;
    struct row_place *place = dynamic_shared<struct row_place>();
    bf16 *alpha = (bf16 *)(place + all_tiles * 16), *rows = alpha + all_tiles * 16 * (KT * 16 + 8);
    float2 *sums = (float2 *)(rows + job.team_warps * job.teams * TILES * 16 * STAGED);
    bf16 *mine = rows + warp * TILES * 16 * STAGED;
    stage_matrix<KT>(alpha, w == 0 ? job.alpha[0] : w == 1 ? job.alpha[1] : job.alpha[2], o, 0, all_tiles);
    for (int row = threadIdx.x; row < all_tiles * 16; row += blockDim.x) {
        int i = row_index(o, row / 16, row % 16);
        place[row] = {i >= 0 ? i * d : -1, i >= 0 ? i / H : 0};
    }
    __syncthreads();

    place += member * TILES * 16 + g;
    const bf16 *dout = w == 0 ? job.dout[0] : w == 1 ? job.dout[1] : job.dout[2];
    bool rotate = job.rope.table && w < 2;
    auto load_rows = [&](along_rows &x, int n, int group, int k) {
        const bf16 *big = dout + (int64_t)n * o.pseudo * H * d + group + t * 8;
        bool padding = AHEAD > 1 && k >= tiles;
        const struct row_place *row = place + (padding ? 0 : k * 16);
        const int at[2] = {row[0].at, row[8].at};
        load_along(x, big, at, half, n < job.count && group + t * 8 < half && !padding);
    };

    float outer_sum[TILES][NT][4] = {};
    int step = rope_step(job.rope, d), stride = gridDim.x * job.teams, first = blockIdx.x * job.teams,
        group = 0;
    along_rows next[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        load_rows(next[k], first + team, group, k);
    while (first < job.count) { /* as many times in all warps */
        int n = first + team, column = group + t * 8, this_group = group;
        bool there = n < job.count && column < half;
        int64_t heads_at = ((int64_t)n * 3 + w) * H * d + column;
        uint32_t heads_along[NT][4][2];
        load_heads_along(heads_along, job.qkv + heads_at, H, d, there);
        const float *angles = rotate ? rope_token(job.rope, n, o.pseudo, d) + column : NULL;
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
            if (rotate && there && k < tiles) {
                struct rotation angle; /* from L1 for each tile: no registers to keep it */
                load_rotation(angle, angles + place[k * 16].pseudo * step, half);
                unrotate(x[0][0], x[0][1], angle);
                unrotate(x[1][0], x[1][1], angle);
            }
            bool more = k + AHEAD < rounds;
            load_rows(ahead, more ? n : first + team, more ? this_group : group,
                      more ? k + AHEAD : k + AHEAD - rounds);
            if (k >= tiles)
                break;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t *row = (uint32_t *)(mine + (k * 16 + g + 8 * r) * STAGED) + t;
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
        __syncwarp();
#pragma unroll
        for (int m = 0; m < KT; m++) {
            float sum[8][4] = {};
#pragma unroll
            for (int k = 0; k < TILES; k++)
                if (k < tiles) {
                    uint32_t a[4];
                    load_matrix_transposed<KT>(a, alpha, member * TILES + k, m);
#pragma unroll
                    for (int j = 0; j < 8; j += 2) {
                        uint32_t b[4];
                        ldmatrix<4, true>(b, mine + (k * 16 + lane % 16) * STAGED + (j + lane / 16) * 8);
                        mma_m16n8k16(sum[j], a, {b[0], b[1]});
                        mma_m16n8k16(sum[j + 1], a, {b[2], b[3]});
                    }
                }
            if (job.team_warps == 1) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int h = m * 16 + g + 8 * r;
                    if (!there || h >= H)
                        continue;
                    bf16 *to = job.dqkv + heads_at + h * d;
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        store_vector(to + e * half, pack(sum[4 * e][2 * r], sum[4 * e][2 * r + 1]),
                                     pack(sum[4 * e + 1][2 * r], sum[4 * e + 1][2 * r + 1]),
                                     pack(sum[4 * e + 2][2 * r], sum[4 * e + 2][2 * r + 1]),
                                     pack(sum[4 * e + 3][2 * r], sum[4 * e + 3][2 * r + 1]));
                }
            } else if (m * 16 < H) {
                /* [warp][row r, half e, word][lane]: a lane's four words are a store of 16 bytes. */
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        sums[(warp * 16 + r * 8 + j) * 32 + lane] = {sum[j][2 * r], sum[j][2 * r + 1]};
                __syncthreads();
                for (int unit = member * 32 + lane; unit < 4 * 32; unit += job.team_warps * 32) {
                    int r = unit / 64, e = unit / 32 % 2, h = m * 16 + g + 8 * r;
                    if (!there || h >= H)
                        continue;
                    float2 total[4] = {};
                    for (int other = 0; other < job.team_warps; other++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float2 part =
                                sums[((team * job.team_warps + other) * 16 + unit / 32 * 4 + j) * 32 + lane];
                            total[j].x += part.x;
                            total[j].y += part.y;
                        }
                    store_vector(job.dqkv + heads_at + h * d + e * half, pack(total[0].x, total[0].y),
                                 pack(total[1].x, total[1].y), pack(total[2].x, total[2].y),
                                 pack(total[3].x, total[3].y));
                }
                __syncthreads();
            }
        }
        __syncwarp(); /* the staged rows have been read */
    }
    store_outer(outer_sum, (float *)rows,
                job.partial + ((int64_t)blockIdx.x * 3 + w) * job.team_warps * size::SUMS, job.teams,
                job.team_warps);
}

/* False where it does not fit the device. */
template <int KT>
static bool mix_backward_grid(const struct device *dev, const struct head_rows &o, int64_t count,
                              struct outer_grid *grid) {
    return outer_grid<KT>(dev, o, count, 3, grid) &&
           mix_backward_shared<KT>(o, grid->team_warps, grid->teams) <= dev->shared_limit;
}

template <int KT>
static void launch_mix_backward(struct device *dev, struct mix_backward_job job, struct outer_grid grid,
                                struct head_gradients to, bool accumulate) {
    typedef outer_size<KT> size;
    job.partial =
        (float *)cuda_workspace(dev, grid.blocks * 3 * grid.elements * sizeof(float), "qkv_mix_backward");
    job.team_warps = grid.team_warps;
    job.teams = grid.teams;
    launch<mix_backward_tiles<KT>>(dev, dim3(grid.blocks, 3), grid.threads(),
                                   mix_backward_shared<KT>(job.o, grid.team_warps, grid.teams), job);
    launch<sum_outer<size::TILES, size::HEAD_TILES>>(dev, dim3((unsigned)(grid.elements / 32), 3),
                                                     32 * SUM_SLICES, 0, job.partial, grid.blocks,
                                                     (int)grid.elements, job.o, to, accumulate);
}

/* ---- operations
 * --------------------------------------------------------------------------------------------
 */

static int64_t tokens_of(const struct qkv_mix_spec *s) {
    return s->batch * s->tokens;
}

int cuda_qkv_mix_plan(struct device *dev, const struct qkv_mix_spec *s, struct op_cost *cost,
                      struct error *e) {
    (void)e;
    if (!s->mixed)
        return 0;
    struct head_rows o = pseudo_order(BY_PSEUDO_HEAD, s->heads, s->pseudo);
    size_t bytes = plain_workspace(dev, o, tokens_of(s), 3);
    if (tensor_core_shape(cuda_compute(dev), s->heads, s->head_dim))
        by_head_tiles(s->heads, [&](auto kt) {
            struct outer_grid grid;
            if (mix_backward_grid<decltype(kt)::value>(dev, o, tokens_of(s), &grid) &&
                grid.blocks * 3 * grid.elements * sizeof(float) > bytes)
                bytes = grid.blocks * 3 * grid.elements * sizeof(float);
        });
    cost->workspace = bytes;
    return 0;
}

/* Shapes, and where the angles are. */
static struct rope_rows check_mix(const struct device *dev, const char *op, const struct qkv_mix_spec *s,
                                  tensor qkv, tensor q, tensor k, tensor v, tensor aq, tensor ak, tensor av,
                                  tensor table, int64_t first) {
    int64_t B = s->batch, H = s->heads, P = s->pseudo, d = s->head_dim;
    enum dtype type = cuda_compute(dev);
    const tensor outs[3] = {q, k, v}, alphas[3] = {aq, ak, av};
    const char *names[3] = {"q", "k", "v"}, *alpha_names[3] = {"alpha_q", "alpha_k", "alpha_v"};
    check_shape(op, "qkv", qkv, type, B, s->tokens, 3, H, d);
    check_contiguous(op, "qkv", qkv);
    for (int i = 0; i < 3; i++) {
        check_shape(op, names[i], outs[i], type, B, s->tokens * (s->mixed ? P : 1), H, d);
        check_contiguous(op, names[i], outs[i]);
        if (s->mixed) {
            check_shape(op, alpha_names[i], alphas[i], type, P, H, H);
            check_contiguous(op, alpha_names[i], alphas[i]);
        }
    }
    struct rope_rows rope = {NULL, (int)s->tokens, first, s->rope_virtual};
    if (s->rope) {
        int64_t positions = (first + s->tokens) * (s->rope_virtual ? P : 1);
        if (positions < table.shape[0])
            positions = table.shape[0];
        check_shape(op, "table", table, DTYPE_F32, positions, 2, (d + 1) / 2); /* no odd d */
        check_contiguous(op, "table", table);
        rope.table = (const float *)table.data;
    }
    return rope;
}

void cuda_qkv_mix(struct device *dev, const struct qkv_mix_spec *s, tensor qkv, tensor alpha_q,
                  tensor alpha_k, tensor alpha_v, tensor table, int64_t first, tensor q, tensor k, tensor v) {
    struct rope_rows rope =
        check_mix(dev, "qkv_mix", s, qkv, q, k, v, alpha_q, alpha_k, alpha_v, table, first);
    if (!s->mixed) {
        rotate_only<false>(dev, s, rope, qkv, q, k, v);
        return;
    }
    struct head_rows o = pseudo_order(BY_PSEUDO_HEAD, s->heads, s->pseudo);
    int64_t H = s->heads, d = s->head_dim, n = tokens_of(s);
    if (tensor_core_shape(qkv.dtype, H, d) && aligned16({qkv.data, q.data, k.data, v.data, rope.table})) {
        struct mix_job job = {
            (const bf16 *)qkv.data,
            {(const bf16 *)alpha_q.data, (const bf16 *)alpha_k.data, (const bf16 *)alpha_v.data},
            {(bf16 *)q.data, (bf16 *)k.data, (bf16 *)v.data},
            rope,
            o,
            (int)n,
            (int)d,
            0};
        by_head_tiles(H, [&](auto kt) { launch_mix_tiles<decltype(kt)::value>(dev, job); });
        return;
    }
    by_dtype(qkv.dtype, [&](auto number) {
        using T = decltype(number);
        const tensor alpha[3] = {alpha_q, alpha_k, alpha_v}, out[3] = {q, k, v};
        for (int w = 0; w < 3; w++) {
            struct rope_rows angles = rope;
            if (w == 2)
                angles.table = NULL;
            launch<plain_expand<T>>(dev, plain_blocks(dev, ceil_div(n * s->pseudo * H * d, PLAIN_THREADS)),
                                    PLAIN_THREADS, 0, (const T *)qkv.data + w * H * d, 3 * H * d,
                                    (const T *)alpha[w].data, o, angles, (T *)out[w].data, n, (int)d);
        }
    });
}

void cuda_qkv_mix_backward(struct device *dev, const struct qkv_mix_spec *s, tensor dq, tensor dk, tensor dv,
                           tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor table,
                           tensor dqkv, tensor dalpha_q, tensor dalpha_k, tensor dalpha_v, bool accumulate) {
    const char *op = "qkv_mix_backward";
    struct rope_rows rope = check_mix(dev, op, s, dqkv, dq, dk, dv, alpha_q, alpha_k, alpha_v, table, 0);
    if (!s->mixed) {
        rotate_only<true>(dev, s, rope, dqkv, dq, dk, dv);
        return;
    }
    int64_t H = s->heads, d = s->head_dim, n = tokens_of(s);
    check_shape(op, "qkv", qkv, cuda_compute(dev), s->batch, s->tokens, 3, H, d);
    check_contiguous(op, "qkv", qkv);
    const tensor alpha[3] = {alpha_q, alpha_k, alpha_v}, dout[3] = {dq, dk, dv};
    const tensor dalpha[3] = {dalpha_q, dalpha_k, dalpha_v};
    struct head_gradients to;
    for (int w = 0; w < 3; w++) {
        check_shape(op, "dalpha", dalpha[w], DTYPE_F32, s->pseudo, H, H);
        check_contiguous(op, "dalpha", dalpha[w]);
        to.dm[w] = (float *)dalpha[w].data;
    }
    struct head_rows o = pseudo_order(BY_PSEUDO_HEAD, H, s->pseudo);
    bool done = false;
    if (tensor_core_shape(qkv.dtype, H, d) &&
        aligned16({qkv.data, dqkv.data, dq.data, dk.data, dv.data, rope.table})) {
        struct mix_backward_job job = {
            {(const bf16 *)dq.data, (const bf16 *)dk.data, (const bf16 *)dv.data},
            (const bf16 *)qkv.data,
            {(const bf16 *)alpha_q.data, (const bf16 *)alpha_k.data, (const bf16 *)alpha_v.data},
            (bf16 *)dqkv.data,
            NULL,
            rope,
            o,
            (int)n,
            (int)d,
            0,
            0};
        by_head_tiles(H, [&](auto kt) {
            constexpr int KT = decltype(kt)::value;
            struct outer_grid grid;
            if ((done = mix_backward_grid<KT>(dev, o, n, &grid)))
                launch_mix_backward<KT>(dev, job, grid, to, accumulate);
        });
    }
    if (done)
        return;
    by_dtype(qkv.dtype, [&](auto number) {
        using T = decltype(number);
        struct plain_backward_job<T> job = {};
        for (int w = 0; w < 3; w++) {
            struct rope_rows angles = rope;
            if (w == 2)
                angles.table = NULL;
            job.of[w] = {(const T *)dout[w].data, (const T *)qkv.data + w * H * d, (const T *)alpha[w].data,
                         (T *)dqkv.data + w * H * d, angles};
        }
        job.o = o;
        job.count = n;
        job.stride = 3 * H * d;
        job.d = (int)d;
        launch_plain_backward(dev, job, 3, to, accumulate, op);
    });
}
