/* Choices by timing: with a cuBLASLt whose products take the time that a test says, the fastest candidate is found
 * on a GPU whose clock rises slowly; and what was chosen is kept in a file for the next start. */
#include "tests/cuda/fixture.h"

#include <stdlib.h>
#include <unistd.h>

static char path[] = "/tmp/iha-plans-XXXXXX";

static struct device *open_with(const char *plan_file, bool deterministic) {
    struct device_options options = {
        .precision = DEVICE_BF16, .deterministic = deterministic, .plan_file = plan_file};
    return kernels_cuda()->open(&options, NULL);
}

/* Plans four products, as an operation of the model. Returns how many were computed meanwhile. */
static int plan_linear(struct device *dev, int64_t rows) {
    struct op_spec spec = {.kind = OP_LINEAR, .linear = {rows, 16, 32}};
    struct op_cost cost;
    int before = emulator_products.calls;
    assert_int_equal(kernels_cuda()->plan(dev, &spec, &cost, NULL), 0);
    return emulator_products.calls - before;
}

/* ---- a GPU in the emulator's place ---- */

static struct {
    double busy, cost[3]; /* seconds it has worked; of a product by candidate 1 and 2 at the full clock */
    int last, turns, disturbed;
    int every; /* so many products of candidate 1 take as long as a hundred; 0: none */
    int products[3];
} gpu;

/* The clock is at a fifth at first and at the full rate after 80 ms of work. */
static double seconds_of(const char *kernel, int candidate) {
    (void)kernel;
    if (candidate == 0)
        return 0;
    double ramp = gpu.busy < 0.08 ? gpu.busy / 0.08 : 1;
    double time = gpu.cost[candidate] / (0.2 + 0.8 * ramp);
    gpu.products[candidate]++;
    gpu.turns += candidate != gpu.last;
    gpu.last = candidate;
    if (candidate == 1 && gpu.every > 0 && gpu.products[1] % gpu.every == 0)
        time *= 100;
    gpu.busy += time;
    return time;
}

/* The candidate that linear's products use, of a cuBLASLt whose candidates take so many seconds. */
static int chosen_of(double first, double second, int disturbed_every) {
    memset(&gpu, 0, sizeof gpu);
    gpu.cost[1] = first;
    gpu.cost[2] = second;
    gpu.every = disturbed_every;
    emulator_seconds = seconds_of;
    const struct kernels *k = kernels_cuda();
    struct device *dev = open_with(NULL, false);
    plan_linear(dev, 8);
    void *memory = k->alloc(dev, 1 << 20, NULL), *workspace = k->alloc(dev, 64 << 20, NULL);
    k->set_workspace(dev, workspace, 64 << 20);
    tensor x = tensor_of(memory, DTYPE_BF16, 8, 16, 0, 0, 0),
           w = tensor_of(memory, DTYPE_BF16, 32, 16, 0, 0, 0);
    tensor y = tensor_of((char *)memory + 65536, DTYPE_BF16, 8, 32, 0, 0, 0);
    struct linear_spec spec = {8, 16, 32};
    k->linear(dev, &spec, x, w, tensor_none(), y);
    float values[8 * 32];
    k->download(dev, y, values, DTYPE_F32);
    k->release(dev, memory);
    k->release(dev, workspace);
    k->close(dev);
    emulator_seconds = NULL;
    return gpu.last;
}

static void skip_on_gpu(void) {
    if (emulator_on_gpu())
        skip();
}

static void the_fastest_is_chosen(void **state) {
    (void)state;
    skip_on_gpu();
    assert_int_equal(chosen_of(1e-3, 2e-3, 0), 1);
    assert_int_equal(chosen_of(2e-3, 1e-3, 0), 2);
    assert_int_equal(chosen_of(20e-6, 21e-6, 0), 1);
    /* 2 ms a round hide nothing that happens now and then. */
    assert_int_equal(chosen_of(20e-6, 22e-6, 701), 1);
}

/* A slightly slower candidate that is timed later, at a higher clock, is not preferred. */
static void the_clock_is_up_first(void **state) {
    (void)state;
    skip_on_gpu();
    assert_int_equal(chosen_of(1e-3, 1.01e-3, 0), 1);
    assert_true(gpu.busy > 0.1 + 4 * 3 * 2 * 2e-3);
    /* In turn: in each of three rounds of each of four products, both. */
    assert_true(gpu.turns >= 4 * 3 * 2 - 1);
    assert_int_equal(chosen_of(1.01e-3, 1e-3, 0), 2);
}

/* ---- the file ---- */

static char *read_file(size_t *length) {
    FILE *f = fopen(path, "r");
    char *text = calloc(1, 1 << 16);
    assert_non_null(f);
    *length = fread(text, 1, (1 << 16) - 1, f);
    fclose(f);
    return text;
}

static void write_file(const char *text, size_t length) {
    FILE *f = fopen(path, "w");
    assert_int_equal(fwrite(text, 1, length, f), length);
    fclose(f);
}

/* Start, plan, and end. Returns how many products were computed to choose. */
static int start(const char *plan_file, bool deterministic) {
    struct error e;
    const struct kernels *k = kernels_cuda();
    struct device *dev = open_with(plan_file, deterministic);
    memset(&gpu, 0, sizeof gpu);
    gpu.cost[1] = gpu.cost[2] = 0.05;
    emulator_seconds = seconds_of;
    int timed = plan_linear(dev, 8) + plan_linear(dev, 24);
    emulator_seconds = NULL;
    void *workspace = k->alloc(dev, 64 << 20, NULL);
    k->set_workspace(dev, workspace, 64 << 20);
    int before = emulator_products.calls;
    assert_int_equal(k->check_libraries(dev, &e), 0);
    assert_true(emulator_products.calls > before); /* a recorded algorithm is checked, too */
    k->release(dev, workspace);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
    return timed;
}

static void choices_are_kept(void **state) {
    (void)state;
    skip_on_gpu();
    size_t length, again;
    unlink(path);
    assert_true(start(path, false) > 0);
    char *text = read_file(&length);
    assert_non_null(strstr(text, "\nNVIDIA H200, sm_90, 3 SMs; cuBLASLt 130101; cuDNN "));
    assert_non_null(strstr(text, "\nmatmul nt 8 x 32 x 16, rows of 16 16 32, bf16 to bf16, bias = "));
    assert_non_null(strstr(text, "\nmatmul tn 32 x 16 x 24, rows of 32 16 16, bf16 to fp32 = "));
    assert_int_equal(start(path, false), 0);
    char *same = read_file(&again);
    assert_true(length == again && memcmp(text, same, length) == 0);
    free(same);
    free(text);
}

/* What computes wrong results is not kept: the next start chooses again. */
static void wrong_choices_are_not_kept(void **state) {
    (void)state;
    skip_on_gpu();
    const struct kernels *k = kernels_cuda();
    unlink(path);
    struct device *dev = open_with(path, false);
    memset(&gpu, 0, sizeof gpu);
    gpu.cost[1] = gpu.cost[2] = 0.05;
    emulator_seconds = seconds_of;
    plan_linear(dev, 8);
    emulator_seconds = NULL;
    void *workspace = k->alloc(dev, 64 << 20, NULL);
    k->set_workspace(dev, workspace, 64 << 20);
    struct error e;
    emulator_products = (struct emulator_products){PRODUCTS_WRONG, 0, 1, -1, 0, 0};
    assert_int_equal(k->check_libraries(dev, &e), -1);
    emulator_products = (struct emulator_products){PRODUCTS_RIGHT, 0, 1, -1, 0, 0};
    k->release(dev, workspace);
    k->close(dev);
    assert_int_equal(access(path, F_OK), -1);
}

static void nothing_is_kept_without_timing(void **state) {
    (void)state;
    skip_on_gpu();
    unlink(path);
    assert_int_equal(start(path, true), 0);
    assert_int_equal(access(path, F_OK), -1);
    assert_true(start(NULL, false) > 0);
}

/* Each byte changed, and each shorter file: it is replaced. An intact file without some choices is completed. */
static void damaged_files_are_ignored(void **state) {
    (void)state;
    skip_on_gpu();
    size_t length, again;
    unlink(path);
    start(path, false);
    char *text = read_file(&length);
    for (size_t at = 0; at < length; at += at < 30 || at > length - 30 ? 1 : 61) {
        text[at] ^= 1;
        write_file(text, length);
        text[at] ^= 1;
        if (start(path, false) == 0)
            fail_msg("byte %zu changed, and the file was used", at);
        write_file(text, at);
        if (start(path, false) == 0)
            fail_msg("%zu bytes, and the file was used", at);
    }
    char *whole = read_file(&again);
    assert_true(length == again && memcmp(text, whole, length) == 0);
    free(whole);
    free(text);
}

/* A folder in its place, and a folder that is not there: a warning. */
static void a_file_that_cannot_be_written(void **state) {
    (void)state;
    skip_on_gpu();
    assert_true(start("/tmp", false) > 0);
    assert_true(start("/nowhere/plans.txt", false) > 0);
    assert_int_equal(access("/tmp.tmp", F_OK), -1); /* what would be renamed to /tmp */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_fastest_is_chosen),      cmocka_unit_test(the_clock_is_up_first),
        cmocka_unit_test(choices_are_kept),           cmocka_unit_test(nothing_is_kept_without_timing),
        cmocka_unit_test(damaged_files_are_ignored),  cmocka_unit_test(a_file_that_cannot_be_written),
        cmocka_unit_test(wrong_choices_are_not_kept),
    };
    int file = mkstemp(path);
    if (file < 0)
        return 1;
    close(file);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return failed;
}
