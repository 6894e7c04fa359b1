/* qkv_mix: mixes heads into pseudo-heads, interleaves these into the virtual sequence, and rotates q and k
 * (paper: steps 2-4).
 *
 * Virtual token t*P + p of head h is row p*H + h of token t, so [T, P*H, d] is [S, H, d] and interleaving
 * needs no copy. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/head_mix.h"
#include "kernels/cpu/rope.h"
#include "kernels/cpu/scratch.h"

/* The head of a row of qkv at which q, k or v begins. */
static int64_t first_head(const struct qkv_mix_spec *s, int w) {
    return w == 0 ? 0 : s->heads + (w - 1) * mix_kv_heads(s);
}

/* Pseudo-heads in all: rows of one token of q, k or v after mixing. k and v have at most as many as q. */
static int64_t rows_out(const struct qkv_mix_spec *s, int w) {
    return s->pseudo * mix_heads_of(s, w);
}

/* Elements of one alpha, or reals of its gradient. */
static int64_t alpha_stride(const struct qkv_mix_spec *s) {
    return s->pseudo * s->heads * s->heads;
}

/* Reals of the three alphas, or of their partial gradients. */
static int64_t alpha_reals(const struct qkv_mix_spec *s) {
    return s->mixed ? round_up(3 * alpha_stride(s), 16) : 0;
}

/* Scratch of one thread. I: pseudo-heads of q; W: words of a head's row; `block` tokens are taken at a time in backward. */
struct scratch {
    real *dalpha; /* [3] partial sums */
    word *rows;   /* rows [block, I, W] of the gradients of q, k or v, rotated back */
    word *in;     /* rows [block, H, W] of the heads, where elements have to be converted */
    word *pairs;  /* pairs [I, d] of one token, where words are not reals */
    real *heads;  /* [H, d] of one token, before rotation or rounding */
    real *row;    /* [d] */
};

static size_t layout_scratch(const struct device *dev, const struct qkv_mix_spec *s, char *base,
                             struct scratch *w) {
    int64_t block = s->mixed ? mix_tokens(dev, s->batch * s->tokens, s->heads, s->pseudo, s->head_dim) : 0;
    int64_t H = s->heads, I = rows_out(s, 0), d = s->head_dim, W = words_of(d);
    struct part parts[] = {{&w->dalpha, alpha_reals(s)},
                           {&w->rows, block * I * W},
                           {&w->in, WORDS_CONVERT ? block * H * W : 0},
                           {&w->pairs, PAIR > 1 ? words_of(I) * d : 0},
                           {&w->heads, H * d},
                           {&w->row, d}};
    return lay_out(parts, sizeof parts / sizeof *parts, base);
}

/* For the three alphas where they are not used as they are stored. */
static size_t shared_bytes(const struct qkv_mix_spec *s) {
    return sizeof(elem) < sizeof(real) ? (size_t)alpha_reals(s) * sizeof(real) : 0;
}

struct op_cost CPU(qkv_mix_plan)(const struct device *dev, const struct qkv_mix_spec *s) {
    LEAVE_TO_PAIRS(dev, s->head_dim, qkv_mix_plan(dev, s));
    struct scratch unused;
    size_t each = layout_scratch(dev, s, NULL, &unused);
    return (struct op_cost){.workspace = shared_bytes(s) + (size_t)dev->threads * each};
}

/* The three alphas as operands, for forward or (transposed) for backward. */
static void read_alphas(const struct qkv_mix_spec *s, tensor q, tensor k, tensor v, bool transposed,
                        char *shared, const word *alpha[3]) {
    const elem *from[3] = {q.data, k.data, v.data};
    for (int w = 0; w < 3; w++)
        alpha[w] = mix_matrix(from[w], rows_out(s, w), mix_heads_of(s, w), transposed,
                              (word *)shared + w * alpha_stride(s));
}

void CPU(rope_table)(struct device *dev, const struct rope_spec *s, tensor table) {
    (void)dev;
    int64_t half = table.shape[2];
    real *out = table.data;
#pragma omp parallel for
    for (int64_t position = 0; position < table.shape[0]; position++)
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)position * rope_frequency(s, i, half);
            out[position * 2 * half + i] = (real)cos(angle);
            out[position * 2 * half + half + i] = (real)sin(angle);
        }
}

/* Rotate the `heads` rows of pseudo-head p of the token at position `token`; sign -1 rotates back. */
static void rotate_heads(const struct qkv_mix_spec *s, int64_t heads, const real *x, tensor table,
                         int64_t token, int64_t p, real sign, bool stream, real *out) {
    int64_t d = s->head_dim, position = s->rope_virtual ? token * s->pseudo + p : token;
    const real *row = (real *)table.data + position * d;
    for (int64_t h = 0; h < heads; h++)
        rope_rotate(x + h * d, row, d, sign, stream, out + h * d);
}

/* The position of token n of the batch. positions: [B,T] or NULL. */
static int64_t position_of(const struct qkv_mix_spec *s, const int32_t *positions, int64_t first, int64_t n) {
    return positions ? positions[n] : first + n % s->tokens;
}

static void check_mix(const char *op, const struct qkv_mix_spec *s, tensor qkv, tensor positions, tensor q,
                      tensor k, tensor v) {
    int64_t B = s->batch, S = s->tokens * s->pseudo, d = s->head_dim;
    check_elem(op, "qkv", qkv, B, s->tokens, mix_row_heads(s), d, 0);
    const char *names[3] = {"q", "k", "v"};
    tensor outs[3] = {q, k, v};
    for (int i = 0; i < 3; i++) {
        check_elem(op, names[i], outs[i], B, S, mix_heads_of(s, i), d, 0);
        if (s->mixed)
            check_contiguous(op, names[i], outs[i]);
        else
            check_token_rows(op, names[i], outs[i]);
    }
    check_contiguous(op, "qkv", qkv);
    if (positions.data)
        check_i32(op, "positions", positions, B, s->tokens);
}

/* A thread's part of an operation's scratch memory. */
static struct scratch scratch_of(const struct device *dev, const struct qkv_mix_spec *s, char *shared,
                                 int thread) {
    struct scratch w;
    size_t each = layout_scratch(dev, s, NULL, &w);
    layout_scratch(dev, s, shared + shared_bytes(s) + (size_t)thread * each, &w);
    return w;
}

/* Without alphas: parts = rotate(packed), or with `back` packed = rotate back(parts). parts: q, k and v, or the heads
 * of packed themselves. */
static void rotate_tokens(struct device *dev, const struct qkv_mix_spec *s, tensor packed,
                          const tensor parts[3], tensor table, const int32_t *positions, int64_t first,
                          bool back, const char *op) {
    int64_t d = s->head_dim, N = s->batch * s->tokens, row = mix_row_heads(s);
    char *shared = cpu_workspace(dev, CPU(qkv_mix_plan)(dev, s).workspace, op);
#pragma omp parallel num_threads(dev->threads)
    {
        real *converted = scratch_of(dev, s, shared, omp_get_thread_num()).heads;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int w = 0; w < 3; w++) {
                int64_t H = mix_heads_of(s, w);
                elem *whole = (elem *)packed.data + (n * row + first_head(s, w)) * d;
                elem *part = (elem *)parts[w].data + n * parts[w].stride[1];
                elem *from = back ? part : whole, *to = back ? whole : part;
                if (!s->rope || w == 2) {
                    if (from != to)
                        memcpy(to, from, (size_t)(H * d) * sizeof(elem));
                    continue;
                }
                real *result = elems_buffer(to, converted);
                rotate_heads(s, H, read_elems(from, H * d, converted), table,
                             position_of(s, positions, first, n), 0, back ? -1 : 1, false, result);
                write_elems(to, H * d, result);
            }
    }
}

/* One token of q, k or v. The H heads of a pseudo-head are rotated while they are in the L1 cache. in: pairs [H, d];
 * next: the next token's heads. */
static void mix_token(const struct qkv_mix_spec *s, int64_t H, const word *in, const word *alpha,
                      bool rotated, tensor table, int64_t position, bool stream, const elem *next,
                      real *heads, elem *out) {
    int64_t P = s->pseudo, d = s->head_dim, J = words_of(H), bytes = H * d * (int64_t)sizeof(elem) / P;
    for (int64_t p = 0; p < P; p++) {
        elem *to = out + p * H * d;
        real *result = elems_buffer(to, heads);
        real *product = rotated ? heads : result;
        struct mix_memory memory = {.stream = stream && !rotated,
                                    .write = mix_write(stream, product, to, H * d),
                                    .at = {(const char *)next + bytes * p, (const char *)next},
                                    .bytes = {bytes}};
        head_mix(H, J, d, alpha + p * H * J, J, 1, in, product, &memory);
        if (rotated)
            rotate_heads(s, H, heads, table, position, p, 1, stream, result);
        write_elems(to, H * d, result);
    }
}

void CPU(qkv_mix)(struct device *dev, const struct qkv_mix_spec *s, tensor qkv, tensor alpha_q,
                  tensor alpha_k, tensor alpha_v, tensor table, tensor positions, int64_t first, tensor q,
                  tensor k, tensor v) {
    LEAVE_TO_PAIRS(dev, s->head_dim,
                   qkv_mix(dev, s, qkv, alpha_q, alpha_k, alpha_v, table, positions, first, q, k, v));
    check_mix("qkv_mix", s, qkv, positions, q, k, v);
    if (!s->mixed) {
        rotate_tokens(dev, s, qkv, (tensor[]){q, k, v}, table, positions.data, first, false, "qkv_mix");
        return;
    }
    int64_t d = s->head_dim, N = s->batch * s->tokens, row = mix_row_heads(s), I = s->pseudo * row;
    elem *out[3] = {q.data, k.data, v.data};
    bool stream = mix_streams(q.data, N * I * d, d) && mix_streams(k.data, N * I * d, d) &&
                  mix_streams(v.data, N * I * d, d);
    const word *alpha[3];
    char *shared = cpu_workspace(dev, CPU(qkv_mix_plan)(dev, s).workspace, "qkv_mix");
    read_alphas(s, alpha_q, alpha_k, alpha_v, false, shared, alpha);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch scratch = scratch_of(dev, s, shared, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int w = 0; w < 3; w++) {
                int64_t H = mix_heads_of(s, w);
                const elem *from = (elem *)qkv.data + (n * row + first_head(s, w)) * d;
                const word *in = rows_to_pairs(rows_as_words(from, H, d, scratch.in), H, d, scratch.pairs);
                mix_token(s, H, in, alpha[w], s->rope && w < 2, table,
                          position_of(s, positions.data, first, n), stream, from + row * d, scratch.heads,
                          out[w] + n * rows_out(s, w) * d);
            }
        vstream_end();
    }
}

/* The gradients of one token's pseudo-heads [P*H, d] rotated back, as rows. */
static void rotate_back(const struct qkv_mix_spec *s, int64_t H, const elem *dout, tensor table,
                        int64_t token, real *row, word *out) {
    int64_t d = s->head_dim, W = words_of(d);
    for (int64_t p = 0; p < s->pseudo; p++)
        for (int64_t h = p * H; h < (p + 1) * H; h++) {
            real *result = words_buffer(out + h * W, row);
            rotate_heads(s, 1, read_elems(dout + h * d, d, row), table, token, p, -1, false, result);
            write_words(out + h * W, d, result);
        }
}

/* Gradients of one of q, k, v with respect to the mixing. */
struct mix_gradients {
    int64_t H;
    bool rotated, stream;
    const word *alpha; /* transposed */
    const elem *dout, *in;
    elem *din;
    const elem *next; /* what of dout comes after this block */
    real *dalpha;
};

/* `count` tokens from n: rotate the gradient back, then both gradients of the mixing. Each brings half of `next` into the
 * cache. */
static void mix_backward_block(const struct qkv_mix_spec *s, const struct mix_gradients *g, int64_t n,
                               int64_t count, tensor table, const int32_t *positions,
                               const struct scratch *w) {
    int64_t H = g->H, d = s->head_dim, W = words_of(d), I = s->pseudo * H, stride = mix_row_heads(s) * d;
    int64_t bytes = I * d * (int64_t)sizeof(elem), half = bytes / 2;
    const word *dout = g->rotated ? w->rows : rows_as_words(g->dout, count * I, d, w->rows);
    const word *heads = WORDS_CONVERT ? w->in : (const word *)g->in;
    for (int64_t t = 0; t < count; t++) {
        const elem *in = g->in + t * stride;
        if (g->rotated)
            rotate_back(s, H, g->dout + t * I * d, table, position_of(s, positions, 0, n + t), w->row,
                        w->rows + t * I * W);
        if (WORDS_CONVERT)
            rows_as_words(in, H, d, w->in + t * H * W);
        elem *to = g->din + t * stride;
        real *result = elems_buffer(to, w->heads);
        struct mix_memory memory = {.stream = g->stream,
                                    .write = mix_write(g->stream, result, to, stride),
                                    .at = {(const char *)(g->next + t * I * d), (const char *)in},
                                    .bytes = {half, H * d * (int64_t)sizeof(elem)}};
        head_mix(H, words_of(I), d, g->alpha, 1, H, rows_to_pairs(dout + t * I * W, I, d, w->pairs), result,
                 &memory);
        write_elems(to, H * d, result);
    }
    head_outer(I, H, W, count, dout, I * W, heads, WORDS_CONVERT ? H * W : stride / PAIR, g->dalpha,
               (const char *)g->next + half, bytes, bytes - half);
}

void CPU(qkv_mix_backward)(struct device *dev, const struct qkv_mix_spec *s, tensor dq, tensor dk, tensor dv,
                           tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor table,
                           tensor positions, tensor dqkv, tensor dalpha_q, tensor dalpha_k, tensor dalpha_v,
                           bool accumulate) {
    LEAVE_TO_PAIRS(dev, s->head_dim,
                   qkv_mix_backward(dev, s, dq, dk, dv, qkv, alpha_q, alpha_k, alpha_v, table, positions,
                                    dqkv, dalpha_q, dalpha_k, dalpha_v, accumulate));
    check_mix("qkv_mix_backward", s, s->mixed ? qkv : dqkv, positions, dq, dk, dv);
    if (!s->mixed) {
        rotate_tokens(dev, s, dqkv, (tensor[]){dq, dk, dv}, table, positions.data, 0, true,
                      "qkv_mix_backward");
        return;
    }
    int64_t d = s->head_dim, N = s->batch * s->tokens, row = mix_row_heads(s), matrix = alpha_stride(s);
    int64_t block = mix_tokens(dev, N, s->heads, s->pseudo, d);
    bool stream = mix_streams(dqkv.data, N * row * d, d);
    const word *alpha[3];
    const elem *dout[3] = {dq.data, dk.data, dv.data};
    char *shared = cpu_workspace(dev, CPU(qkv_mix_plan)(dev, s).workspace, "qkv_mix_backward");
    read_alphas(s, alpha_q, alpha_k, alpha_v, true, shared, alpha);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch scratch = scratch_of(dev, s, shared, omp_get_thread_num());
        memset(scratch.dalpha, 0, (size_t)(3 * matrix) * sizeof(real));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += block)
            for (int w = 0; w < 3; w++) {
                int64_t at = (n * row + first_head(s, w)) * d, ahead = w < 2 ? n : n + block;
                struct mix_gradients g = {.H = mix_heads_of(s, w),
                                          .rotated = s->rope && w < 2,
                                          .stream = stream,
                                          .alpha = alpha[w],
                                          .dout = dout[w] + n * rows_out(s, w) * d,
                                          .in = (elem *)qkv.data + at,
                                          .din = (elem *)dqkv.data + at,
                                          .next = dout[(w + 1) % 3] + ahead * rows_out(s, (w + 1) % 3) * d,
                                          .dalpha = scratch.dalpha + w * matrix};
                mix_backward_block(s, &g, n, min64(block, N - n), table, positions.data, &scratch);
            }
        vstream_end();
    }
    struct scratch first = scratch_of(dev, s, shared, 0);
    int64_t stride = (int64_t)(layout_scratch(dev, s, NULL, &(struct scratch){0}) / sizeof(real));
    real *dalphas[3] = {dalpha_q.data, dalpha_k.data, dalpha_v.data};
    for (int w = 0; w < 3; w++)
        sum_partials(first.dalpha + w * matrix, dev->threads, stride, rows_out(s, w) * mix_heads_of(s, w),
                     dalphas[w], accumulate);
}
