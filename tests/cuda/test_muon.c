/* Muon's operations of the CUDA backend against the CPU backend. */
#include "tests/cuda/muon_check.h"

static void orthogonalize(void **unused) {
    (void)unused;
    static const int64_t shapes[][2] = {{1, 9}, {16, 40}, {40, 16}, {24, 24}, {7, 13}};
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            emulator_seed(i);
            check_orthogonalize((enum device_precision)precision, shapes[i][0], shapes[i][1],
                                i == 3 ? 1e-25 : 1);
        }
}

static void zeros_stay_zeros(void **unused) {
    (void)unused;
    struct backends *k = backends(DEVICE_BF16);
    struct orthogonalize_spec spec = {4, 6};
    struct operand state = muon_state(k, 0), x = scaled_input(k, DTYPE_F32, 0, 0, 4, 6, 0, 0, 0);
    plan(k, (struct op_spec){.kind = OP_ORTHOGONALIZE, .orthogonalize = spec});
    k->each[CUDA].k->orthogonalize(k->each[CUDA].dev, &spec, on(x, &k->each[CUDA]),
                                   on(state, &k->each[CUDA]).data);
    double *values = values_on(&k->each[CUDA], x);
    for (int i = 0; i < 24; i++)
        assert_true(values[i] == 0);
    free(values);
    done(k);
}

static void momentum_and_update(void **unused) {
    (void)unused;
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++)
        for (int skip = 0; skip < 2; skip++) {
            emulator_seed(4);
            check_muon((enum device_precision)precision, 0, 64, 0, skip);
            check_muon((enum device_precision)precision, 4, 4100, 4, skip);
            check_muon((enum device_precision)precision, 3, 77, 5, skip);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(orthogonalize),
        cmocka_unit_test(zeros_stay_zeros),
        cmocka_unit_test(momentum_and_update),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
