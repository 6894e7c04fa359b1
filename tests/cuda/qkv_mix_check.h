/* qkv_mix in bf16, run on the backends that are compared. */
#ifndef IHA_TESTS_CUDA_QKV_MIX_CHECK_H
#define IHA_TESTS_CUDA_QKV_MIX_CHECK_H

#include "tests/cuda/op_run.h"

enum { QKV, ALPHA, TABLE = 4, OUT, DOUT = 8, DQKV = 11, DALPHA, POSITIONS_OF = 15 };

/* In bf16 dalpha's factors are bf16, as in every computation whose matrix products take bf16: the gradient
 * that was rotated back is rounded. So the plain computation's is, too: it gets gradients that have been
 * rotated back and rounded already, and does not rotate. dqkv is compared without that rounding. */
static inline void plain_mix_backward(struct op_run *r) {
    struct backends *k = r->k;
    struct backend *b = &k->each[PLAIN];
    const struct qkv_mix_spec *s = &r->spec.qkv_mix;
    int64_t d = s->head_dim, half = d / 2, P = s->pseudo, S = s->tokens * P;
    struct operand unused = output(k, k->compute, s->batch, s->tokens, mix_row_heads(s), d, 0), ignored[3],
                   rotated[3];
    double *angles = values_on(&k->each[EXACT], r->x[TABLE]);
    double *positions = r->info[POSITIONS_OF].name ? values_on(&k->each[EXACT], r->x[POSITIONS_OF]) : NULL;
    for (int w = 0; w < 3; w++) {
        int64_t H = w == 0 ? s->heads : mix_kv_heads(s);
        ignored[w] = output(k, DTYPE_F32, P, H, H, 0, 0);
        rotated[w] = output(k, k->compute, s->batch, S, H, d, 0);
        double *x = values_on(b, r->x[DOUT + w]);
        for (int64_t i = 0; w < 2 && i < s->batch * S * H; i++) {
            int64_t n = i / H / P, p = i / H % P; /* token of the batch, pseudo-head */
            int64_t position = positions ? (int64_t)positions[n] : n % s->tokens;
            const double *at = angles + (s->rope_virtual ? position * P + p : position) * d;
            for (double *pair = x + i * d; pair < x + i * d + half; pair++, at++) {
                double first = pair[0], second = pair[half];
                pair[0] = round_to(k->compute, first * at[0] + second * at[half]);
                pair[half] = round_to(k->compute, second * at[0] - first * at[half]);
            }
        }
        b->k->upload(b->dev, on(rotated[w], b), x, DTYPE_F64);
        free(x);
    }
    free(angles);
    free(positions);
    tensor t[OP_OPERANDS];
    struct op_case unrotated = *r->c, overwriting = *r->c;
    unrotated.spec.qkv_mix.rope = false;
    overwriting.options &= ~(unsigned)ACCUMULATE;
    run_tensors(r, b, t);
    for (int w = 0; w < 3; w++)
        t[DOUT + w] = on(rotated[w], b);
    t[DQKV] = on(unused, b);
    op_backward(b->k, b->dev, &unrotated, t, b->saved, NULL);
    run_tensors(r, b, t);
    for (int w = 0; w < 3; w++)
        t[DALPHA + w] = on(ignored[w], b);
    op_backward(b->k, b->dev, &overwriting, t, b->saved, NULL);
}

/* rounds: what was rotated back is rounded to bf16. */
static inline void run_mix(struct op_run *r, bool rounds) {
    rounds = rounds && r->spec.qkv_mix.mixed && r->spec.qkv_mix.rope;
    EACH(r->k, b) {
        run_forward(r, b, NULL);
        if (b->which != PLAIN || !rounds)
            run_backward(r, b, NULL);
    }
    if (rounds)
        plain_mix_backward(r);
}

#endif
