/* embed: looks up token and position embeddings; backward adds their gradients to the tables' rows.
 *
 * Tokens repeat, so several rows of dx are added to one row of dW. To add them in a fixed order, backward
 * sorts the rows n of the batch by token (stably: rows of a token stay in the order of n), cuts the sorted
 * list into chunks of CHUNK rows, and gives each chunk to one block, which sums its runs of equal tokens. A
 * run within one chunk is added to dW directly. A run that crosses chunks leaves partial sums, which the
 * block of the run's first chunk adds up in a second kernel. So every block has the same work, however often
 * a token occurs. Given positions, which repeat within a sequence, are treated in the same way as tokens;
 * without them dpos[t] is the sum over the batch.
 *
 * The sort counts tokens (integer atomics, whose order does not change a sum), scans the counts, scatters
 * rows into their token's slots in any order, and then ranks each row among those of its token. */
#include "kernels/cuda/cuda.cuh"

enum { THREADS = 256, CHUNK = 32, SCAN_THREADS = 1024 };

/* x[n,:] = W[tokens[n],:] + pos[positions[n],:], or without positions pos[first + n mod tokens,:]. Threads run
 * along the N C elements, V at a time.
 * Bytes moved: 2 N C elements, and the part of pos that is not in the L2. */
template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    embed_forward(const int32_t *ids, const T *w, const T *pos, const int32_t *positions, int64_t first, T *x,
                  int64_t rows, int64_t tokens, int words) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, n = i / words;
    int c = (int)(i - n * words) * V;
    if (n >= rows)
        return;
    int64_t C = (int64_t)words * V;
    word_of<V, T> row = load_word<V>(w + ids[n] * C + c);
    if (pos) {
        float values[V], position[V];
        unpack<V, T>(row, values);
        load(pos + (positions ? positions[n] : first + n % tokens) * C + c, position);
#pragma unroll
        for (int j = 0; j < V; j++)
            values[j] += position[j];
        row = pack<V, T>(values);
    }
    store_word<V>(x + n * C + c, row);
}

/* ---- the sort ---- */

static __global__ void __launch_bounds__(THREADS)
    count_tokens(const int32_t *ids, int64_t rows, int32_t *counts) {
    wait_for_previous();
    int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (n < rows)
        atomicAdd(&counts[ids[n]], 1);
}

/* An exclusive scan: begin[v] = next[v] = how many rows have a token less than v; begin[vocab] = all rows.
 * One block, SCAN_THREADS counts at a time: scans of warps by shuffles, then over the warps' totals. */
static __global__ void __launch_bounds__(SCAN_THREADS)
    scan_counts(const int32_t *counts, int64_t vocab, int32_t *begin, int32_t *next) {
    wait_for_previous();
    __shared__ int32_t warps[SCAN_THREADS / 32];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int32_t before = 0; /* the sum of earlier iterations */
    for (int64_t base = 0; base < vocab; base += SCAN_THREADS) {
        int64_t v = base + threadIdx.x;
        int32_t count = v < vocab ? counts[v] : 0, sum = count;
        for (int by = 1; by < 32; by *= 2) {
            int32_t other = __shfl_up_sync(0xffffffff, sum, (unsigned)by);
            if (lane >= by)
                sum += other;
        }
        if (lane == 31)
            warps[warp] = sum;
        __syncthreads();
        int32_t total = 0, earlier = 0;
        for (int i = 0; i < SCAN_THREADS / 32; i++) {
            earlier += i < warp ? warps[i] : 0;
            total += warps[i];
        }
        if (v < vocab)
            begin[v] = next[v] = before + earlier + sum - count;
        before += total;
        __syncthreads(); /* all threads have read `warps` before it is written again */
    }
    if (threadIdx.x == 0)
        begin[vocab] = before;
}

/* Write each row's number to a slot of its token, in any order. */
static __global__ void __launch_bounds__(THREADS)
    scatter_rows(const int32_t *ids, int64_t rows, int32_t *next, int32_t *scattered) {
    wait_for_previous();
    int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (n < rows)
        scattered[atomicAdd(&next[ids[n]], 1)] = (int32_t)n;
}

/* sorted: rows by token, then by n. A row's rank is the number of its token's rows before it, counted here,
 * so that the result does not depend on the order in which the atomics ran. */
static __global__ void __launch_bounds__(THREADS)
    rank_rows(const int32_t *ids, int64_t rows, const int32_t *begin, const int32_t *scattered,
              int32_t *sorted) {
    wait_for_previous();
    int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (n >= rows)
        return;
    int32_t from = begin[ids[n]], to = begin[ids[n] + 1], rank = 0;
#pragma unroll 8
    for (int32_t i = from; i < to; i++)
        rank += scattered[i] < n;
    sorted[from + rank] = (int32_t)n;
}

/* ---- the sums ---- */

/* Block (chunk, columns): dW[token,:] += the sum of each run of equal tokens in the chunk. The first run may
 * have begun in an earlier chunk and the last may continue in the next: their sums go to edges [chunks, 2,
 * C], first and last (a chunk that is one run from end to end leaves it in the first only). Bytes moved: N C
 * elements, and 8 C for every run. */
template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    sum_runs(const int32_t *ids, const int32_t *sorted, int64_t rows, const T *dx, float *dw, float *edges,
             int64_t C) {
    wait_for_previous();
    __shared__ int32_t row[CHUNK], token[CHUNK + 2]; /* token[i]: of slot i - 1, one more at either end */
    int64_t base = (int64_t)blockIdx.x * CHUNK;
    int count = (int)min64(rows - base, CHUNK);
    for (int i = (int)threadIdx.x; i < count + 2; i += (int)blockDim.x) {
        int64_t slot = base + i - 1;
        int32_t n = slot >= 0 && slot < rows ? sorted[slot] : -1;
        token[i] = n >= 0 ? ids[n] : -1;
        if (i >= 1 && i <= count)
            row[i - 1] = n;
    }
    __syncthreads();
    int64_t c = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (c >= C)
        return;
    float sum[V] = {};
    bool whole = true; /* the run began in this chunk */
    int done = 0;
    while (done < count) {
        float values[4][V]; /* loads in flight at once */
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (done + k < count)
                load(dx + row[done + k] * C + c, values[k]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int i = done + k;
            if (i >= count)
                break;
            if (i == 0)
                whole = token[0] != token[1];
#pragma unroll
            for (int j = 0; j < V; j++)
                sum[j] += values[k][j];
            bool ends = token[i + 2] != token[i + 1];
            if (!ends && i + 1 < count)
                continue;
            if (whole && ends) {
                float *to = dw + token[i + 1] * C + c, before[V];
                load(to, before);
#pragma unroll
                for (int j = 0; j < V; j++)
                    sum[j] += before[j];
                store(to, sum);
            } else {
                store(edges + ((int64_t)blockIdx.x * 2 + (whole ? 1 : 0)) * C + c, sum);
            }
#pragma unroll
            for (int j = 0; j < V; j++)
                sum[j] = 0;
            whole = true;
        }
        done += 4;
    }
}

/* Block (chunk, columns): if a run begins in this chunk and continues in the next, add up its pieces in order
 * and add them to dW. */
template <int V>
static __global__ void __launch_bounds__(THREADS)
    sum_edges(const int32_t *ids, const int32_t *sorted, int64_t rows, const int32_t *begin,
              const float *edges, float *dw, int64_t C) {
    wait_for_previous();
    int64_t chunk = blockIdx.x, last = (chunk + 1) * CHUNK - 1;
    int64_t c = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (last + 1 >= rows || c >= C)
        return;
    int32_t token = ids[sorted[last]];
    int64_t from = begin[token], to = begin[token + 1]; /* the run's slots */
    if (to == last + 1 || from < chunk * CHUNK)
        return;
    float sum[V], piece[V];
    load(edges + (chunk * 2 + 1) * C + c, sum);
#pragma unroll 4
    for (int64_t i = chunk + 1; i * CHUNK < to; i++) {
        load(edges + i * 2 * C + c, piece);
#pragma unroll
        for (int j = 0; j < V; j++)
            sum[j] += piece[j];
    }
    load(dw + token * C + c, piece);
#pragma unroll
    for (int j = 0; j < V; j++)
        sum[j] += piece[j];
    store(dw + token * C + c, sum);
}

/* Without positions: dpos[t,:] += sum over b of dx[b,t,:]. Bytes moved: N C elements. */
template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    sum_positions(const T *dx, float *dpos, int64_t batch, int64_t elements /* tokens C */) {
    wait_for_previous();
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (i >= elements)
        return;
    float sum[V], values[V];
    load(dpos + i, sum);
#pragma unroll 4
    for (int64_t b = 0; b < batch; b++) {
        load(dx + b * elements + i, values);
#pragma unroll
        for (int j = 0; j < V; j++)
            sum[j] += values[j];
    }
    store(dpos + i, sum);
}

/* ---- launches ---- */

/* Backward's workspace: the sort's integers and the partial sums of runs that cross chunks. Rows are sorted by
 * token, below V, or by position, below T. */
struct sort_space {
    int32_t *counts, *begin, *next; /* [M], [M + 1], [M] with M = max(V, T) */
    int32_t *scattered, *sorted;    /* [N] */
    float *edges;                   /* [chunks, 2, C] */
    size_t bytes;
};

static struct sort_space workspace_layout(const struct embed_spec *s, char *base) {
    int64_t N = s->batch * s->tokens, rows = round_up(N, 64);
    int64_t M = round_up((s->vocab > s->tokens ? s->vocab : s->tokens) + 1, 64);
    struct sort_space space;
    space.counts = (int32_t *)base;
    space.begin = space.counts + M;
    space.next = space.begin + M;
    space.scattered = space.next + M;
    space.sorted = space.scattered + rows;
    space.edges = (float *)(space.sorted + rows);
    space.bytes = (size_t)(3 * M + 2 * rows) * sizeof(int32_t) +
                  (size_t)(ceil_div(N, CHUNK) * 2 * s->hidden) * sizeof(float);
    return space;
}

int cuda_embed_plan(struct device *dev, const struct embed_spec *s, struct op_cost *cost, struct error *e) {
    (void)dev;
    (void)e;
    cost->workspace = workspace_layout(s, NULL).bytes;
    return 0;
}

static void check(struct device *dev, const struct embed_spec *s, const char *op, tensor tokens,
                  tensor positions, const char *name, tensor x) {
    check_shape(op, "tokens", tokens, DTYPE_I32, s->batch, s->tokens);
    check_contiguous(op, "tokens", tokens);
    if (positions.data) {
        check_shape(op, "positions", positions, DTYPE_I32, s->batch, s->tokens);
        check_contiguous(op, "positions", positions);
    }
    check_shape(op, name, x, cuda_compute(dev), s->batch * s->tokens, s->hidden);
    check_contiguous(op, name, x);
}

static void check_table(const char *op, const char *what, tensor t, enum dtype dtype, int64_t rows,
                        int64_t C) {
    check_shape(op, what, t, dtype, rows, C);
    check_contiguous(op, what, t);
}

void cuda_embed(struct device *dev, const struct embed_spec *s, tensor tokens, tensor w, tensor pos,
                tensor positions, int64_t first, tensor x) {
    int64_t N = s->batch * s->tokens, C = s->hidden;
    check(dev, s, "embed", tokens, positions, "x", x);
    check_table("embed", "W", w, x.dtype, s->vocab, C);
    if (pos.data)
        check_table("embed", "pos", pos, x.dtype, pos.shape[0], C);
    by_dtype(x.dtype, [&](auto number) {
        using T = decltype(number);
        by_width<T>(C, aligned16({w.data, pos.data, x.data}), [&](auto width) {
            constexpr int V = decltype(width)::value;
            launch<embed_forward<T, V>>(dev, ceil_div(N * (C / V), THREADS), THREADS, 0,
                                        (const int32_t *)tokens.data, (const T *)w.data, (const T *)pos.data,
                                        (const int32_t *)positions.data, first, (T *)x.data, N, s->tokens,
                                        (int)(C / V));
        });
    });
}

/* Sort the rows by id, which are below `count`. */
static void sort_rows(struct device *dev, const struct embed_spec *s, const int32_t *ids, int64_t count,
                      struct sort_space space) {
    int64_t N = s->batch * s->tokens, blocks = ceil_div(N, THREADS);
    cuda_check(cudaMemsetAsync(space.counts, 0, (size_t)count * sizeof(int32_t), dev->stream));
    launch<count_tokens>(dev, blocks, THREADS, 0, ids, N, space.counts);
    launch<scan_counts>(dev, 1, SCAN_THREADS, 0, space.counts, count, space.begin, space.next);
    launch<scatter_rows>(dev, blocks, THREADS, 0, ids, N, space.next, space.scattered);
    launch<rank_rows>(dev, blocks, THREADS, 0, ids, N, space.begin, space.scattered, space.sorted);
}

/* table[ids[n],:] += dx[n,:], in the order of n; ids are below `count`. */
template <typename T, int V>
static void add_rows(struct device *dev, const struct embed_spec *s, const int32_t *ids, int64_t count,
                     const T *dx, float *table, struct sort_space space) {
    int64_t N = s->batch * s->tokens, C = s->hidden;
    int threads = (int)min64(round_up(C / V, 32), THREADS);
    dim3 grid((unsigned)ceil_div(N, CHUNK), (unsigned)ceil_div(C, threads * V));
    sort_rows(dev, s, ids, count, space);
    launch<sum_runs<T, V>>(dev, grid, threads, 0, ids, (const int32_t *)space.sorted, N, dx, table,
                           space.edges, C);
    launch<sum_edges<V>>(dev, grid, threads, 0, ids, (const int32_t *)space.sorted, N,
                         (const int32_t *)space.begin, (const float *)space.edges, table, C);
}

void cuda_embed_backward(struct device *dev, const struct embed_spec *s, tensor tokens, tensor positions,
                         tensor dx, tensor dw, tensor dpos) {
    int64_t C = s->hidden;
    check(dev, s, "embed_backward", tokens, positions, "dx", dx);
    check_table("embed_backward", "dW", dw, DTYPE_F32, s->vocab, C);
    if (dpos.data)
        check_table("embed_backward", "dpos", dpos, DTYPE_F32, dpos.shape[0], C);
    struct sort_space space =
        workspace_layout(s, (char *)cuda_workspace(dev, workspace_layout(s, NULL).bytes, "embed_backward"));
    by_dtype(dx.dtype, [&](auto number) {
        using T = decltype(number);
        by_width<T>(C, aligned16({dx.data, dw.data, dpos.data}), [&](auto width) {
            constexpr int V = decltype(width)::value;
            add_rows<T, V>(dev, s, (const int32_t *)tokens.data, s->vocab, (const T *)dx.data,
                           (float *)dw.data, space);
            if (dpos.data && positions.data)
                add_rows<T, V>(dev, s, (const int32_t *)positions.data, s->tokens, (const T *)dx.data,
                               (float *)dpos.data, space);
            else if (dpos.data)
                launch<sum_positions<T, V>>(dev, ceil_div(s->tokens * C, THREADS * V), THREADS, 0,
                                            (const T *)dx.data, (float *)dpos.data, s->batch, s->tokens * C);
        });
    });
}
