/* Attention of several heads of queries to one of keys, of the CUDA backend against the CPU backend. All other cases of
 * attention: test_attention.c. */
#include "tests/cuda/op_run.h"

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_both(&r);
    run_expect_close(&r);
    run_expect_same(&r);
    done(r.k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("attention_fp32", OP_ATTENTION, DEVICE_FP32, check),
        EVERY_CASE("attention_bf16", OP_ATTENTION, DEVICE_BF16, check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
