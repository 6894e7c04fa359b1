/* diff_combine of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("diff_combine_fp32", OP_DIFF_COMBINE, DEVICE_FP32, check_case),
        EVERY_CASE("diff_combine_bf16", OP_DIFF_COMBINE, DEVICE_BF16, check_case),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
