/* embed: the sum of token and position vectors, and the scatter of its gradient. */
#include "kernels/cpu/cpu.h"

void CPU(embed)(struct device *dev, const struct embed_spec *s, tensor tokens, tensor w, tensor pos,
                tensor positions, int64_t first, tensor x) {
    (void)dev;
    int64_t C = s->hidden;
    check_i32("embed", "tokens", tokens, s->batch, s->tokens);
    if (positions.data)
        check_i32("embed", "positions", positions, s->batch, s->tokens);
    check_elem("embed", "W", w, s->vocab, C, 0, 0, 0);
    check_elem("embed", "x", x, s->batch * s->tokens, C, 0, 0, 0);
    const int32_t *ids = tokens.data, *position = positions.data;
    const elem *table = w.data, *pos_table = pos.data;
    elem *out = x.data;
#pragma omp parallel for
    for (int64_t n = 0; n < s->batch * s->tokens; n++) {
        memcpy(out + n * C, table + ids[n] * C, (size_t)C * sizeof(elem));
        if (!pos_table)
            continue;
        const elem *p = pos_table + (position ? position[n] : first + n % s->tokens) * C;
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
            out[n * C + c] = to_elem(from_elem(out[n * C + c]) + from_elem(p[c]));
    }
}

/* Tokens and positions repeat, so threads that divide the tokens would add to the same rows. Instead each
 * takes a strip of columns for all tokens, in order: the same bits for any number of threads. A strip is at
 * most two cache lines of floats. */
void CPU(embed_backward)(struct device *dev, const struct embed_spec *s, tensor tokens, tensor positions,
                         tensor dx, tensor dw, tensor dpos) {
    enum { STRIP = 32 };
    int64_t C = s->hidden, strip = columns_per_thread(dev, C, STRIP);
    check_i32("embed_backward", "tokens", tokens, s->batch, s->tokens);
    if (positions.data)
        check_i32("embed_backward", "positions", positions, s->batch, s->tokens);
    check_elem("embed_backward", "dx", dx, s->batch * s->tokens, C, 0, 0, 0);
    check_real("embed_backward", "dW", dw, s->vocab, C, 0, 0, 0);
    const int32_t *ids = tokens.data, *position = positions.data;
    const elem *grad = dx.data;
    real *table = dw.data, *pos_table = dpos.data;
#pragma omp parallel for
    for (int64_t begin = 0; begin < C; begin += strip) {
        int64_t end = min64(begin + strip, C);
        for (int64_t n = 0; n < s->batch * s->tokens; n++) {
            real *row = table + ids[n] * C;
#pragma omp simd
            for (int64_t c = begin; c < end; c++)
                row[c] += from_elem(grad[n * C + c]);
            if (!pos_table)
                continue;
            real *p = pos_table + (position ? position[n] : n % s->tokens) * C;
#pragma omp simd
            for (int64_t c = begin; c < end; c++)
                p[c] += from_elem(grad[n * C + c]);
        }
    }
}
