/* collapse: mixes pseudo-heads back into heads (paper: step 6), full (R [H,P,H]) or per head (R [H,P]). */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/head_mix.h"

/* Elements of R. */
static int64_t matrix_reals(const struct collapse_spec *s) {
    return s->heads * s->pseudo * (s->per_head ? 1 : s->heads);
}

/* Whether elements have to be converted. */
static bool converts(void) {
    return sizeof(elem) < sizeof(real);
}

static int64_t partial_reals(const struct collapse_spec *s) {
    return round_up(matrix_reals(s), 16);
}

/* Scratch of one thread: a partial dR; where elements have to be converted, also a block of tokens of the output's
 * gradient, of o and of its gradient. In whole cache lines, so that threads do not write to the same one. */
static int64_t thread_reals(const struct device *dev, const struct collapse_spec *s) {
    int64_t block = mix_tokens(dev, s->batch * s->tokens, s->heads, s->head_dim);
    int64_t rows = block * (1 + 2 * s->pseudo) * s->heads;
    return partial_reals(s) + (converts() ? round_up(rows * s->head_dim, 16) : 0);
}

struct op_cost CPU(collapse_plan)(const struct device *dev, const struct collapse_spec *s) {
    int64_t reals = (converts() ? partial_reals(s) : 0) + dev->threads * thread_reals(dev, s);
    return (struct op_cost){.workspace = (size_t)reals * sizeof(real)};
}

/* R as reals. *scratch moves past what is converted, to the threads' parts. */
static const real *read_matrix(const struct collapse_spec *s, tensor r, real **scratch) {
    const real *matrix = read_elems(r.data, matrix_reals(s), *scratch);
    *scratch += converts() ? partial_reals(s) : 0;
    return matrix;
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

void CPU(collapse)(struct device *dev, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    check_collapse("collapse", s, o, r, out);
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H, N = s->batch * s->tokens;
    bool stream = !converts() && mix_streams(out.data, N * H * d, d);
    real *scratch = cpu_workspace(dev, CPU(collapse_plan)(dev, s).workspace, "collapse");
    const real *matrix = read_matrix(s, r, &scratch);
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = scratch + omp_get_thread_num() * thread_reals(dev, s) + partial_reals(s);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const elem *o_n = (elem *)o.data + n * PH * d, *next = o_n + PH * d;
            elem *out_n = (elem *)out.data + n * H * d;
            const real *from = read_elems(o_n, PH * d, mine);
            real *to = elems_buffer(out_n, mine + PH * d);
            struct mix_memory memory = {.stream = stream,
                                        .write = stream || converts() ? NULL : to + H * d,
                                        .at = {(const char *)next, (const char *)next},
                                        .bytes = {PH * d * (int64_t)sizeof(elem)}};
            if (s->per_head)
                collapse_per_head(s, from, matrix, to);
            else
                head_mix(H, PH, d, matrix, PH, 1, from, NULL, to, &memory);
            write_elems(out_n, H * d, to);
        }
        vstream_end();
    }
}

static void collapse_backward_block(const struct collapse_spec *s, int64_t count, const real *dout,
                                    const real *o, const real *r, bool stream, real *d_o, real *dr) {
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H;
    for (int64_t t = 0; t < count; t++) {
        const real *next = dout + (t + 1) * H * d, *other = o + t * PH * d;
        real *to = d_o + t * PH * d;
        struct mix_memory memory = {.stream = stream,
                                    .write = stream ? NULL : to + H * d,
                                    .at = {(const char *)other, (const char *)next},
                                    .bytes = {PH * d * (int64_t)sizeof(real), H * d * (int64_t)sizeof(real)}};
        if (s->per_head)
            collapse_per_head_backward(s, dout + t * H * d, other, r, to, dr);
        else
            head_mix(PH, H, d, r, 1, PH, dout + t * H * d, NULL, to, &memory);
    }
    if (!s->per_head)
        head_outer(H, PH, d, count, dout, H * d, o, PH * d, dr, (const char *)dout, 0, 0);
}

void CPU(collapse_backward)(struct device *dev, const struct collapse_spec *s, tensor dout, tensor o,
                            tensor r, tensor d_o, tensor dr, bool accumulate) {
    check_collapse("collapse_backward", s, o, r, dout);
    check_contiguous("collapse_backward", "do", d_o);
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H, N = s->batch * s->tokens;
    int64_t stride = thread_reals(dev, s), block = mix_tokens(dev, N, H, d);
    bool stream = !converts() && mix_streams(d_o.data, N * PH * d, d);
    real *scratch = cpu_workspace(dev, CPU(collapse_plan)(dev, s).workspace, "collapse_backward");
    const real *matrix = read_matrix(s, r, &scratch);
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = scratch + omp_get_thread_num() * stride, *converted = mine + partial_reals(s);
        memset(mine, 0, (size_t)partial_reals(s) * sizeof(real));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += block) {
            int64_t count = min64(block, N - n);
            elem *to = (elem *)d_o.data + n * PH * d;
            const real *g = read_elems((elem *)dout.data + n * H * d, count * H * d, converted);
            const real *from =
                read_elems((elem *)o.data + n * PH * d, count * PH * d, converted + block * H * d);
            real *result = elems_buffer(to, converted + block * (H + PH) * d);
            collapse_backward_block(s, count, g, from, matrix, stream, result, mine);
            write_elems(to, count * PH * d, result);
        }
        vstream_end();
    }
    sum_partials(scratch, dev->threads, stride, matrix_reals(s), dr.data, accumulate);
}
