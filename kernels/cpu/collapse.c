/* collapse: mixes pseudo-heads back into heads (paper: step 6), full (R [H,P,H]) or per head (R [H,P]). */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/head_mix.h"
#include "kernels/cpu/scratch.h"

/* Elements of R. */
static int64_t matrix_reals(const struct collapse_spec *s) {
    return s->heads * s->pseudo * (s->per_head ? 1 : s->heads);
}

/* Scratch of one thread; W: words of a head's row. Full mixing takes `block` tokens at a time in backward. */
struct scratch {
    real *dr;          /* partial sums */
    word *dout, *o;    /* rows [block, H, W], [block, P*H, W], where elements have to be converted */
    word *pairs;       /* pairs [P*H, d] of one token, where words are not reals */
    real *result;      /* [P*H, d] of one token, before rounding */
    real *in, *dheads; /* [P*H, d], [H, d] of one token, for mixing per head */
};

static size_t layout_scratch(const struct device *dev, const struct collapse_spec *s, char *base,
                             struct scratch *w) {
    int64_t H = s->heads, PH = s->pseudo * H, d = s->head_dim;
    int64_t rows = WORDS_CONVERT && !s->per_head
                       ? mix_tokens(dev, s->batch * s->tokens, H, s->pseudo, d) * words_of(d)
                       : 0;
    struct part parts[] = {{&w->dr, matrix_reals(s)},
                           {&w->dout, rows * H},
                           {&w->o, rows * PH},
                           {&w->pairs, PAIR > 1 && !s->per_head ? words_of(PH) * d : 0},
                           {&w->result, PH * d},
                           {&w->in, s->per_head ? PH * d : 0},
                           {&w->dheads, s->per_head ? H * d : 0}};
    return lay_out(parts, sizeof parts / sizeof *parts, base);
}

/* For R where it is not used as it is stored. */
static size_t shared_bytes(const struct collapse_spec *s) {
    return sizeof(elem) < sizeof(real) ? (size_t)round_up(matrix_reals(s), 16) * sizeof(real) : 0;
}

struct op_cost CPU(collapse_plan)(const struct device *dev, const struct collapse_spec *s) {
    LEAVE_TO_PAIRS(dev, s->head_dim, collapse_plan(dev, s));
    struct scratch unused;
    size_t each = layout_scratch(dev, s, NULL, &unused);
    return (struct op_cost){.workspace = shared_bytes(s) + (size_t)dev->threads * each};
}

static void check_collapse(const char *op, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    check_elem(op, "o", o, s->batch, s->tokens * s->pseudo, s->heads, s->head_dim, 0);
    check_contiguous(op, "o", o);
    check_contiguous(op, "R", r);
    check_contiguous(op, "out", out);
    if (tensor_count(r) != matrix_reals(s))
        check_elem(op, "R", r, s->heads, s->pseudo, s->per_head ? 0 : s->heads, 0, 0);
}

/* out[h,:] = sum_p R[h,p] o[p,h,:], for one token. */
static void collapse_per_head(const struct collapse_spec *s, const real *o, const real *r, real *out) {
    int64_t H = s->heads, d = s->head_dim;
    for (int64_t h = 0; h < H; h++) {
        real *to = out + h * d;
        memset(to, 0, (size_t)d * sizeof(real));
        for (int64_t p = 0; p < s->pseudo; p++) {
            real weight = r[h * s->pseudo + p];
            const real *from = o + (p * H + h) * d;
#pragma omp simd
            for (int64_t c = 0; c < d; c++)
                to[c] += weight * from[c];
        }
    }
}

static void collapse_per_head_backward(const struct collapse_spec *s, const real *dout, const real *o,
                                       const real *r, real *d_o, real *dr) {
    int64_t H = s->heads, d = s->head_dim;
    for (int64_t h = 0; h < H; h++)
        for (int64_t p = 0; p < s->pseudo; p++) {
            real weight = r[h * s->pseudo + p], dot = 0;
            const real *g = dout + h * d, *from = o + (p * H + h) * d;
            real *to = d_o + (p * H + h) * d;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < d; c++) {
                dot += g[c] * from[c];
                to[c] = weight * g[c];
            }
            dr[h * s->pseudo + p] += dot;
        }
}

/* A thread's part of an operation's scratch memory. */
static struct scratch scratch_of(const struct device *dev, const struct collapse_spec *s, char *shared,
                                 int thread) {
    struct scratch w;
    size_t each = layout_scratch(dev, s, NULL, &w);
    layout_scratch(dev, s, shared + shared_bytes(s) + (size_t)thread * each, &w);
    return w;
}

void CPU(collapse)(struct device *dev, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    LEAVE_TO_PAIRS(dev, s->head_dim, collapse(dev, s, o, r, out));
    check_collapse("collapse", s, o, r, out);
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H, N = s->batch * s->tokens, J = words_of(PH);
    bool stream = mix_streams(out.data, N * H * d, d);
    char *shared = cpu_workspace(dev, CPU(collapse_plan)(dev, s).workspace, "collapse");
    const real *weights = s->per_head ? read_elems(r.data, matrix_reals(s), (real *)shared) : NULL;
    const word *matrix = s->per_head ? NULL : mix_matrix(r.data, H, PH, false, (word *)shared);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w = scratch_of(dev, s, shared, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const elem *from = (elem *)o.data + n * PH * d, *next = from + PH * d;
            elem *to = (elem *)out.data + n * H * d;
            real *result = elems_buffer(to, w.result);
            struct mix_memory memory = {.stream = stream,
                                        .write = mix_write(stream, result, to, H * d),
                                        .at = {(const char *)next, (const char *)next},
                                        .bytes = {PH * d * (int64_t)sizeof(elem)}};
            if (s->per_head)
                collapse_per_head(s, read_elems(from, PH * d, w.in), weights, result);
            else
                head_mix(H, J, d, matrix, J, 1,
                         rows_to_pairs(rows_as_words(from, PH, d, w.o), PH, d, w.pairs), result, &memory);
            write_elems(to, H * d, result);
        }
        vstream_end();
    }
}

/* `count` tokens, of each the gradient of o, then dR of all. */
static void collapse_backward_block(const struct collapse_spec *s, int64_t count, const elem *dout,
                                    const elem *o, const word *r, bool stream, elem *d_o,
                                    const struct scratch *w) {
    int64_t H = s->heads, d = s->head_dim, W = words_of(d), PH = s->pseudo * H;
    const word *heads = rows_as_words(dout, count * H, d, w->dout),
               *pseudo = rows_as_words(o, count * PH, d, w->o);
    for (int64_t t = 0; t < count; t++) {
        elem *to = d_o + t * PH * d;
        real *result = elems_buffer(to, w->result);
        struct mix_memory memory = {
            .stream = stream,
            .write = mix_write(stream, result, to, H * d),
            .at = {(const char *)(o + t * PH * d), (const char *)(dout + (t + 1) * H * d)},
            .bytes = {PH * d * (int64_t)sizeof(elem), H * d * (int64_t)sizeof(elem)}};
        head_mix(PH, words_of(H), d, r, 1, PH, rows_to_pairs(heads + t * H * W, H, d, w->pairs), result,
                 &memory);
        write_elems(to, PH * d, result);
    }
    head_outer(H, PH, W, count, heads, H * W, pseudo, PH * W, w->dr, (const char *)dout, 0, 0);
}

void CPU(collapse_backward)(struct device *dev, const struct collapse_spec *s, tensor dout, tensor o,
                            tensor r, tensor d_o, tensor dr, bool accumulate) {
    LEAVE_TO_PAIRS(dev, s->head_dim, collapse_backward(dev, s, dout, o, r, d_o, dr, accumulate));
    check_collapse("collapse_backward", s, o, r, dout);
    check_contiguous("collapse_backward", "do", d_o);
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H, N = s->batch * s->tokens;
    int64_t block = s->per_head ? 1 : mix_tokens(dev, N, H, s->pseudo, d);
    bool stream = mix_streams(d_o.data, N * PH * d, d);
    char *shared = cpu_workspace(dev, CPU(collapse_plan)(dev, s).workspace, "collapse_backward");
    const real *weights = s->per_head ? read_elems(r.data, matrix_reals(s), (real *)shared) : NULL;
    const word *matrix = s->per_head ? NULL : mix_matrix(r.data, H, PH, true, (word *)shared);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w = scratch_of(dev, s, shared, omp_get_thread_num());
        memset(w.dr, 0, (size_t)matrix_reals(s) * sizeof(real));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += block) {
            const elem *g = (elem *)dout.data + n * H * d, *from = (elem *)o.data + n * PH * d;
            elem *to = (elem *)d_o.data + n * PH * d;
            if (s->per_head) {
                real *result = elems_buffer(to, w.result);
                collapse_per_head_backward(s, read_elems(g, H * d, w.dheads), read_elems(from, PH * d, w.in),
                                           weights, result, w.dr);
                write_elems(to, PH * d, result);
            } else {
                collapse_backward_block(s, min64(block, N - n), g, from, matrix, stream, to, &w);
            }
        }
        vstream_end();
    }
    int64_t stride = (int64_t)(layout_scratch(dev, s, NULL, &(struct scratch){0}) / sizeof(real));
    sum_partials(scratch_of(dev, s, shared, 0).dr, dev->threads, stride, matrix_reals(s), dr.data,
                 accumulate);
}
