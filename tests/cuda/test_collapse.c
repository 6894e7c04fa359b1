/* collapse of the CUDA backend, forward and backward, in the harness of tests/cuda/emulator/. */
#include "tests/cuda/fixture.h"

static const struct collapse_spec CASES[] = {
    /* batch, tokens, heads, head_dim, pseudo, per head */
    {2, 5, 3, 6, 2, false}, /* head dims that tensor cores do not take */
    {1, 19, 5, 9, 3, false},    {2, 5, 3, 6, 2, true},
    {1, 1, 1, 16, 1, false},                               /* smallest tile: 8 columns a half */
    {2, 11, 3, 32, 5, false},   {1, 37, 12, 64, 2, false}, /* GPT-2 */
    {2, 3, 12, 64, 2, true},    {1, 3, 16, 64, 4, false},
    {1, 2, 7, 96, 3, false},                               /* a group of columns that is half full */
    {1, 13, 5, 128, 15, false},                            /* two warps to a team */
    {1, 2, 5, 128, 15, true},   {1, 5, 20, 16, 20, false}, /* the 2.4B model's heads with P = H */
    {1, 3, 17, 32, 3, false},   {1, 2, 33, 16, 2, false},  /* four tiles of heads */
    {1, 2, 40, 32, 5, true},    {1, 2, 64, 16, 5, false},  /* forward: in tiles; backward: too many rows */
    {1, 1, 64, 16, 26, false},                             /* more of R than shared memory holds */
    {1, 3, 20, 64, 20, false},  {1, 1, 65, 16, 1, false},  /* too many heads */
};

static void forward(struct backend *b, const struct collapse_spec *s, struct operand o, struct operand r,
                    struct operand out) {
    b->k->collapse(b->dev, s, on(o, b), on(r, b), on(out, b));
}

static void backward(struct backend *b, const struct collapse_spec *s, struct operand dout, struct operand o,
                     struct operand r, struct operand d_o, struct operand dr, bool accumulate) {
    b->k->collapse_backward(b->dev, s, on(dout, b), on(o, b), on(r, b), on(d_o, b), on(dr, b), accumulate);
}

static void check(enum device_precision precision, struct collapse_spec s, bool accumulate) {
    struct backends *k = backends(precision);
    int64_t B = s.batch, T = s.tokens, H = s.heads, d = s.head_dim, P = s.pseudo, last = s.per_head ? 0 : H;
    struct operand o = input(k, k->compute, B, T * P, H, d, 0), out = output(k, k->compute, B, T, H, d, 0);
    struct operand r = input(k, k->compute, H, P, last, 0, 0), dout = input(k, k->compute, B, T, H, d, 0);
    struct operand d_o = output(k, k->compute, B, T * P, H, d, 0);
    struct operand dr =
        accumulate ? input(k, DTYPE_F32, H, P, last, 0, 0) : output(k, DTYPE_F32, H, P, last, 0, 0);
    char name[160];
    snprintf(name, sizeof name, "collapse%s%s B=%d T=%d H=%d d=%d P=%d", s.per_head ? " per head" : "",
             precision == DEVICE_BF16 ? " bf16" : "", (int)B, (int)T, (int)H, (int)d, (int)P);
    plan(k, (struct op_spec){.kind = OP_COLLAPSE, .collapse = s});
    EACH(k, b) {
        forward(b, &s, o, r, out);
        backward(b, &s, dout, o, r, d_o, dr, accumulate);
    }
    expect_close(name, "out", k, out);
    expect_close(name, "do", k, d_o);
    expect_close(name, "dR", k, dr);

    /* Again, in another order of threads and blocks: backwards, in which a warp runs ahead of the others. */
    struct backend *cuda = &k->each[CUDA];
    double *before[] = {values_on(cuda, out), values_on(cuda, d_o), values_on(cuda, dr)};
    emulator_seed(1);
    forward(cuda, &s, o, r, out);
    backward(cuda, &s, dout, o, r, d_o, dr, accumulate);
    expect_same(name, "out", k, out, before[0]);
    expect_same(name, "do", k, d_o, before[1]);
    if (!accumulate)
        expect_same(name, "dR", k, dr, before[2]);
    else
        free(before[2]);
    done(k);
}

static void check_all(enum device_precision precision) {
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        emulator_seed(i);
        check(precision, CASES[i], i % 3 == 2);
    }
}

static void collapse_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

static void collapse_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(collapse_fp32),
        cmocka_unit_test(collapse_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
