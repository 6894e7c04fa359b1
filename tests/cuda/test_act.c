/* mlp_act of the CUDA backend, forward and backward, in the harness of tests/cuda/emulator/. */
#include "tests/cuda/fixture.h"

static const struct act_case {
    int64_t rows, hidden;
} CASES[] = {{1, 1}, {1, 7}, {3, 8}, {5, 129}, {7, 1024}, {2, 4100}};

static void check(enum device_precision precision, enum act_type type, struct act_case c) {
    struct backends *k = backends(precision);
    struct act_spec s = {type, c.rows, c.hidden};
    bool gated = type == ACT_SWIGLU;
    struct operand u = scaled_input(k, k->compute, 4, 0, c.rows, c.hidden, 0, 0, 0);
    struct operand gate = gated ? scaled_input(k, k->compute, 4, 0, c.rows, c.hidden, 0, 0, 0) : absent();
    struct operand out = output(k, k->compute, c.rows, c.hidden, 0, 0, 0);
    struct operand dout = input(k, k->compute, c.rows, c.hidden, 0, 0, 0);
    struct operand du = output(k, k->compute, c.rows, c.hidden, 0, 0, 0);
    struct operand dgate = gated ? output(k, k->compute, c.rows, c.hidden, 0, 0, 0) : absent();
    EACH(k, b) {
        b->k->mlp_act(b->dev, &s, on(u, b), on(gate, b), on(out, b));
        b->k->mlp_act_backward(b->dev, &s, on(dout, b), on(u, b), on(gate, b), on(du, b), on(dgate, b));
    }
    expect_close("mlp_act", "out", k, out);
    expect_close("mlp_act", "du", k, du);
    if (gated)
        expect_close("mlp_act", "dgate", k, dgate);
    /* In place, as the model calls it: du over dout, dgate over gate. */
    EACH(k, b)
    b->k->mlp_act_backward(b->dev, &s, on(dout, b), on(u, b), on(gate, b), on(dout, b), on(gate, b));
    expect_close("mlp_act, in place", "du", k, dout);
    if (gated)
        expect_close("mlp_act, in place", "dgate", k, gate);
    done(k);
}

static void check_all(enum device_precision precision) {
    for (int type = ACT_GELU_TANH; type <= ACT_SWIGLU; type++)
        for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
            emulator_seed(i);
            check(precision, (enum act_type)type, CASES[i]);
        }
}

static void act_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

static void act_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(act_fp32),
        cmocka_unit_test(act_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
