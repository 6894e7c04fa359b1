/* Attention of several heads of queries to one of keys, of the CUDA backend against the CPU backend. All other cases of
 * attention: test_attention.c. */
#include "tests/cuda/op_run.h"

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("attention_fp32", OP_ATTENTION, DEVICE_FP32, check_case),
        EVERY_CASE("attention_bf16", OP_ATTENTION, DEVICE_BF16, check_case),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
