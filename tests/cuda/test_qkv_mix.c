/* qkv_mix of the CUDA backend, forward and backward, in the harness of tests/cuda/emulator/. */
#include "tests/cuda/fixture.h"

static const struct mix_case {
    struct qkv_mix_spec s;
    int64_t first;
} CASES[] = {
    /* batch, tokens, heads, head_dim, pseudo; mixed, rope, rope_virtual; first */
    {{2, 5, 3, 6, 2, true, true, true}, 0}, /* a head dim that tensor cores do not take */
    {{1, 20, 5, 10, 3, true, true, false}, 0},
    {{2, 3, 2, 8, 4, true, false, true}, 0},
    {{1, 3, 2, 7, 2, true, false, true}, 0},   /* an odd one */
    {{1, 4, 4, 16, 1, true, true, true}, 3},   /* smallest tile: 8 columns a half */
    {{2, 11, 3, 32, 5, true, true, true}, 7},  /* odd heads, five pseudo-heads in two chunks */
    {{1, 37, 12, 64, 2, true, true, true}, 0}, /* GPT-2 */
    {{2, 3, 12, 64, 2, true, true, false}, 2},
    {{1, 3, 16, 64, 4, true, true, true}, 0},
    {{1, 2, 7, 96, 3, true, true, true}, 1},   /* a group of columns that is half full */
    {{1, 13, 5, 128, 9, true, true, true}, 0}, /* two warps to a team */
    {{1, 5, 20, 16, 20, true, true, true}, 0}, /* the 2.4B model's heads with P = H */
    {{1, 3, 17, 32, 3, true, false, false}, 0},
    {{1, 2, 33, 16, 2, true, true, true}, 0},  /* four tiles of heads */
    {{1, 2, 64, 16, 5, true, true, true}, 0},  /* forward: in tiles; backward: too many rows */
    {{1, 1, 64, 16, 12, true, true, true}, 0}, /* more alphas than shared memory holds at once */
    {{1, 3, 20, 64, 20, true, true, false}, 0},
    {{1, 1, 65, 16, 1, true, true, true}, 0}, /* too many heads */
    {{1, 1, 1, 64, 1, true, true, true}, 100},
    {{2, 5, 3, 6, 1, false, true, true}, 4}, /* rotation alone */
    {{2, 7, 3, 48, 1, false, true, true}, 4},
    {{1, 5, 2, 64, 1, false, true, false}, 0},
    {{1, 3, 2, 9, 1, false, false, false}, 0},
};

static void forward(struct backend *b, const struct qkv_mix_spec *s, int64_t first, struct operand qkv,
                    struct operand alpha[3], struct operand table, struct operand out[3]) {
    b->k->qkv_mix(b->dev, s, on(qkv, b), on(alpha[0], b), on(alpha[1], b), on(alpha[2], b), on(table, b),
                  first, on(out[0], b), on(out[1], b), on(out[2], b));
}

static void backward(struct backend *b, const struct qkv_mix_spec *s, struct operand dout[3],
                     struct operand qkv, struct operand alpha[3], struct operand table, struct operand dqkv,
                     struct operand dalpha[3], bool accumulate) {
    b->k->qkv_mix_backward(b->dev, s, on(dout[0], b), on(dout[1], b), on(dout[2], b), on(qkv, b),
                           on(alpha[0], b), on(alpha[1], b), on(alpha[2], b), on(table, b), on(dqkv, b),
                           on(dalpha[0], b), on(dalpha[1], b), on(dalpha[2], b), accumulate);
}

/* In bf16 dalpha's factors are bf16, as in every computation whose matrix products take bf16: the gradient
 * that was rotated back is rounded. So the plain computation's is, too: it gets gradients that have been
 * rotated back and rounded already, and does not rotate. dqkv is compared without that indulgence. */
static void plain_backward(struct backends *k, const struct qkv_mix_spec *s, struct operand dout[3],
                           struct operand qkv, struct operand alpha[3], struct operand table,
                           struct operand dqkv, struct operand dalpha[3], bool accumulate) {
    struct backend *b = &k->each[PLAIN];
    int64_t H = s->heads, d = s->head_dim, half = d / 2, P = s->pseudo, S = s->tokens * P;
    struct operand unused = output(k, k->compute, s->batch, s->tokens, 3, H, d), ignored[3], rotated[3];
    double *angles = values_on(&k->each[EXACT], table);
    for (int w = 0; w < 3; w++) {
        ignored[w] = output(k, DTYPE_F32, P, H, H, 0, 0);
        rotated[w] = output(k, k->compute, s->batch, S, H, d, 0);
        double *x = values_on(b, dout[w]);
        for (int64_t i = 0; w < 2 && i < s->batch * S * H; i++) {
            const double *at = angles + (s->rope_virtual ? i / H % S : i / H % S / P) * d;
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
    struct qkv_mix_spec unrotated = *s;
    unrotated.rope = false;
    backward(b, &unrotated, rotated, qkv, alpha, absent(), unused, dalpha, accumulate);
    backward(b, s, dout, qkv, alpha, table, dqkv, ignored, false);
}

static void check(enum device_precision precision, struct mix_case c, bool accumulate) {
    struct backends *k = backends(precision);
    struct qkv_mix_spec s = c.s;
    int64_t B = s.batch, T = s.tokens, H = s.heads, d = s.head_dim, P = s.pseudo, S = T * P;
    int64_t positions = (c.first + T) * P;
    struct operand qkv = input(k, k->compute, B, T, 3, H, d), dqkv = output(k, k->compute, B, T, 3, H, d);
    struct operand table = s.rope ? output(k, DTYPE_F32, positions, 2, d / 2, 0, 0) : absent();
    struct operand alpha[3], dalpha[3], out[3], dout[3];
    for (int w = 0; w < 3; w++) {
        out[w] = output(k, k->compute, B, S, H, d, 0);
        dout[w] = input(k, k->compute, B, S, H, d, 0);
        alpha[w] = dalpha[w] = absent();
        if (!s.mixed)
            continue;
        alpha[w] = input(k, k->compute, P, H, H, 0, 0);
        dalpha[w] = accumulate ? input(k, DTYPE_F32, P, H, H, 0, 0) : output(k, DTYPE_F32, P, H, H, 0, 0);
    }
    char name[160];
    snprintf(name, sizeof name, "qkv_mix%s B=%d T=%d H=%d d=%d P=%d", precision == DEVICE_BF16 ? " bf16" : "",
             (int)B, (int)T, (int)H, (int)d, (int)P);
    plan(k, (struct op_spec){.kind = OP_QKV_MIX, .qkv_mix = s});
    bool rounds = precision == DEVICE_BF16 && s.mixed && s.rope;
    EACH(k, b) {
        if (s.rope)
            b->k->rope_table(b->dev, on(table, b), 100);
        forward(b, &s, c.first, qkv, alpha, table, out);
        if (b->which != PLAIN || !rounds)
            backward(b, &s, dout, qkv, alpha, table, dqkv, dalpha, accumulate);
    }
    if (rounds)
        plain_backward(k, &s, dout, qkv, alpha, table, dqkv, dalpha, accumulate);
    const char *outs[] = {"q", "k", "v"}, *dalphas[] = {"dalpha_q", "dalpha_k", "dalpha_v"};
    for (int w = 0; w < 3; w++)
        expect_close(name, outs[w], k, out[w]);
    expect_close(name, "dqkv", k, dqkv);
    for (int w = 0; s.mixed && w < 3; w++)
        expect_close(name, dalphas[w], k, dalpha[w]);

    /* Again, in another order of threads and blocks: backwards, in which a warp runs ahead of the others. */
    struct backend *cuda = &k->each[CUDA];
    double *before[7] = {values_on(cuda, dqkv)};
    for (int w = 0; w < 3; w++) {
        before[1 + w] = values_on(cuda, out[w]);
        before[4 + w] = s.mixed && !accumulate ? values_on(cuda, dalpha[w]) : NULL;
    }
    emulator_seed(1);
    forward(cuda, &s, c.first, qkv, alpha, table, out);
    backward(cuda, &s, dout, qkv, alpha, table, dqkv, dalpha, accumulate);
    expect_same(name, "dqkv", k, dqkv, before[0]);
    for (int w = 0; w < 3; w++) {
        expect_same(name, outs[w], k, out[w], before[1 + w]);
        if (before[4 + w])
            expect_same(name, dalphas[w], k, dalpha[w], before[4 + w]);
    }
    done(k);
}

static void check_all(enum device_precision precision) {
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        emulator_seed(i);
        check(precision, CASES[i], i % 3 == 2);
    }
}

static void mix_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

static void mix_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mix_fp32),
        cmocka_unit_test(mix_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
