/* simplicial of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

enum { O = 3 };

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    EACH(r.k, b)
    run_forward(&r, b, NULL);
    round_plain(r.k, r.x[O]); /* what backward reads */
    EACH(r.k, b)
    run_backward(&r, b, NULL);
    run_expect_close(&r);
    run_expect_same(&r);
    done(r.k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("simplicial_fp32", OP_SIMPLICIAL, DEVICE_FP32, check),
        EVERY_CASE("simplicial_bf16", OP_SIMPLICIAL, DEVICE_BF16, check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
