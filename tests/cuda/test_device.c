/* The CUDA backend's device: opening, memory, transfers, the rope table. */
#include <driver_types.h>

#include "tests/cuda/fixture.h"

static struct device *open_cuda(enum device_precision precision, struct error *e) {
    struct device_options options = {.precision = precision};
    return kernels_cuda()->open(&options, e);
}

/* Where the GPU is a real one, it is neither this one nor absent. */
static void skip_on_gpu(void) {
    if (emulator_on_gpu())
        skip();
}

static void no_gpu(void **state) {
    (void)state;
    skip_on_gpu();
    struct emulator_gpu kept = emulator_gpu;
    emulator_gpu.count = 0;
    struct error e = {0};
    assert_int_equal(cuda_devices(NULL), 0);
    assert_null(open_cuda(DEVICE_BF16, &e));
    assert_int_equal(e.exit_code, EXIT_USER);
    assert_non_null(strstr(e.text, "no GPU"));
    emulator_gpu = kept;
    assert_int_equal(cuda_devices(NULL), 1);
}

/* An error of CUDA is told, with what to do; that there is no GPU, or no driver, is no error. */
static void unusable_gpus(void **state) {
    (void)state;
    skip_on_gpu();
    static const struct {
        int count, driver, count_error, device_error;
        const char *text; /* NULL: none from cuda_devices() */
        const char *open;
    } cases[] = {
        {0, 13000, 0, 0, NULL, "no GPU"},
        {0, 0, 0, 0, NULL, "no GPU"},
        {0, 12020, 0, 0, "CUDA up to 12.2, and this program was built with CUDA 13.0", "CUDA up to 12.2"},
        {0, 13000, cudaErrorSystemNotReady, 0, "(cudaErrorSystemNotReady); start nvidia-fabricmanager",
         "fabricmanager"},
        {0, 13000, cudaErrorUnknown, 0, "see nvidia-smi and dmesg", "see nvidia-smi and dmesg"},
        {2, 13000, 0, cudaErrorDevicesUnavailable, NULL,
         "GPU 0 cannot be used: CUDA-capable device(s) is/are busy or unavailable "
         "(cudaErrorDevicesUnavailable); "
         "another process"},
    };
    struct emulator_gpu kept = emulator_gpu;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error why, e;
        emulator_gpu.count = cases[i].count;
        emulator_gpu.driver = cases[i].driver;
        emulator_gpu.count_error = cases[i].count_error;
        emulator_gpu.device_error = cases[i].device_error;
        assert_int_equal(cuda_devices(&why), cases[i].count);
        if (cases[i].text ? !strstr(why.text, cases[i].text) : why.text[0] != 0)
            fail_msg("case %zu: %s", i, why.text);
        assert_null(open_cuda(DEVICE_BF16, &e));
        assert_int_equal(e.exit_code, EXIT_USER);
        if (!strstr(e.text, cases[i].open) || strncmp(e.text, "system.device = cuda: ", 22) != 0)
            fail_msg("case %zu: %s", i, e.text);
    }
    emulator_gpu = kept;
}

static void describes_itself(void **state) {
    (void)state;
    skip_on_gpu();
    const struct kernels *k = kernels_cuda();
    struct device *dev = open_cuda(DEVICE_BF16, NULL);
    assert_string_equal(k->describe(dev), "cuda: NVIDIA H200, sm_90, 3 SMs, 2 GiB");
    assert_true(k->peak_flops(dev) == 989e12);
    struct device_dtypes t = k->dtypes(dev);
    assert_true(t.compute == DTYPE_BF16 && t.gradient == DTYPE_F32 && t.master == DTYPE_F32);
    k->close(dev);
    dev = open_cuda(DEVICE_FP32, NULL);
    assert_true(k->peak_flops(dev) == 0);
    assert_true(k->dtypes(dev).compute == DTYPE_F32);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
}

static void memory(void **state) {
    (void)state;
    const struct kernels *k = kernels_cuda();
    struct device *dev = open_cuda(DEVICE_FP32, NULL);
    struct error e = {0};
    size_t before = k->memory_available(dev);
    assert_null(k->alloc(dev, before + 1, &e));
    assert_int_equal(e.exit_code, EXIT_USER);
    assert_non_null(
        strstr(e.text, emulator_on_gpu() ? "GB on the GPU" : "cannot allocate 2.15 GB on the GPU"));
    void *data = k->alloc(dev, 4000, &e);
    if (!emulator_on_gpu()) /* others may be using it, and it gives out pages */
        assert_int_equal(before - k->memory_available(dev), 4000);
    tensor t = tensor_of(data, DTYPE_F32, 1000, 0, 0, 0, 0);
    float values[1000];
    k->download(dev, t, values, DTYPE_F32);
    for (int i = 0; i < 1000; i++)
        assert_true(values[i] == 0);
    for (int i = 0; i < 1000; i++)
        values[i] = (float)i;
    k->upload(dev, t, values, DTYPE_F32);
    k->zero(dev, data, 2000);
    k->download(dev, t, values, DTYPE_F32);
    for (int i = 0; i < 1000; i++)
        assert_true(values[i] == (i < 500 ? 0 : (float)i));
    k->release(dev, data);
    k->release(dev, NULL);
    k->close(dev);
}

/* Launches that may overlap in one more of step_begin: in a call of its own and in a graph. */
static int64_t overlapping_launches(void) {
    const struct kernels *k = kernels_cuda();
    struct device_options options = {.precision = DEVICE_BF16, .graphs = true};
    struct error e = {0};
    struct device *dev = k->open(&options, &e);
    if (!dev)
        fail_msg("%s", e.text);
    struct step_state *state = k->alloc(dev, sizeof *state, &e), host;
    int64_t before = emulator_overlapping();
    for (int step = 1; step <= 3; step++) {
        if (!k->graph_replay(dev, 0)) {
            k->graph_begin(dev, 0);
            k->step_begin(dev, state, 7, 0.5);
            if (!k->graph_end(dev, 0))
                k->step_begin(dev, state, 7, 0.5);
        }
        k->step_read(dev, state, &host);
        assert_int_equal(host.step, 7);
    }
    int64_t overlapping = emulator_overlapping() - before;
    k->release(dev, state);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
    return overlapping;
}

/* Where a driver refuses them, also only in graphs, and where they are turned off, launches do not overlap. */
static void launches_overlap_where_they_can(void **state) {
    (void)state;
    skip_on_gpu();
    assert_int_equal(overlapping_launches(), 2); /* and the third is the graph's */
    emulator_refuse_graphs("overlap");
    assert_int_equal(overlapping_launches(), 0);
    emulator_refuse_graphs(NULL);
    setenv("IHA_OVERLAP", "off", 1);
    assert_int_equal(overlapping_launches(), 0);
    unsetenv("IHA_OVERLAP");
}

/* Every pair of types, there and back; and more than the pinned buffers hold, whose source the caller may
 * change at once. */
static void transfers(void **state) {
    (void)state;
    const struct kernels *k = kernels_cuda();
    struct device *dev = open_cuda(DEVICE_BF16, NULL);
    const enum dtype types[] = {DTYPE_F32, DTYPE_F64, DTYPE_BF16, DTYPE_I32};
    enum { N = 300 };
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            double numbers[N], back[N];
            char host[N * 8];
            void *data = k->alloc(dev, N * dtype_bytes(types[i]), NULL);
            void *other = k->alloc(dev, N * dtype_bytes(types[j]), NULL);
            tensor t = tensor_of(data, types[i], N, 0, 0, 0, 0),
                   u = tensor_of(other, types[j], N, 0, 0, 0, 0);
            for (int n = 0; n < N; n++)
                numbers[n] = (n - 150) * (types[i] == DTYPE_I32 || types[j] == DTYPE_I32 ? 1 : 1.0078125);
            k->upload(dev, t, numbers, DTYPE_F64);
            k->download(dev, t, host, types[j]);
            k->upload(dev, u, host, types[j]);
            k->download(dev, u, back, DTYPE_F64);
            for (int n = 0; n < N; n++)
                assert_true(back[n] == round_to(types[j], round_to(types[i], numbers[n])));
            k->release(dev, data);
            k->release(dev, other);
        }
    enum { LARGE = 9000001 };
    float *values = malloc(LARGE * sizeof *values);
    for (int i = 0; i < LARGE; i++)
        values[i] = (float)(i % 251);
    void *data = k->alloc(dev, LARGE * 2, NULL);
    tensor t = tensor_of(data, DTYPE_BF16, LARGE, 0, 0, 0, 0);
    k->upload(dev, t, values, DTYPE_F32);
    memset(values, 0, LARGE * sizeof *values);
    k->download(dev, t, values, DTYPE_F32);
    for (int i = 0; i < LARGE; i++)
        if (values[i] != (float)(i % 251))
            fail_msg("element %d is %g", i, (double)values[i]);
    free(values);
    k->release(dev, data);
    k->close(dev);
}

static void count_idle(void *context) {
    ++*(int *)context;
}

/* The host goes on while the queue is behind: tokens and targets of several passes, each in buffers of their
 * own, without waiting once. */
static void uploads_run_ahead(void **state) {
    (void)state;
    enum { UPLOADS = 14, N = 1000, ORDERS = 8 };
    const struct kernels *k = kernels_cuda();
    for (int order = 0; order < ORDERS; order++) {
        struct device *dev = open_cuda(DEVICE_BF16, NULL);
        int32_t values[N], back[N];
        tensor t[UPLOADS];
        int waited = 0;
        emulator_seed((uint64_t)order);
        k->set_progress_callback(dev, count_idle, &waited);
        for (int u = 0; u < UPLOADS; u++)
            t[u] = tensor_of(k->alloc(dev, sizeof values, NULL), DTYPE_I32, N, 0, 0, 0, 0);
        for (int u = 0; u < UPLOADS; u++) {
            for (int i = 0; i < N; i++)
                values[i] = i * 31 + u;
            k->upload(dev, t[u], values, DTYPE_I32);
        }
        assert_int_equal(waited, 0);
        for (int u = 0; u < UPLOADS; u++) {
            k->download(dev, t[u], back, DTYPE_I32);
            for (int i = 0; i < N; i++)
                assert_int_equal(back[i], i * 31 + u);
            k->release(dev, t[u].data);
        }
        k->close(dev);
    }
}

static void rope_table(void **state) {
    (void)state;
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++) {
        struct backends *k = backends((enum device_precision)precision);
        struct operand table = output(k, DTYPE_F32, 200, 2, 24, 0, 0);
        EACH(k, b)
        b->k->rope_table(b->dev, &(const struct rope_spec){.theta = 10000}, on(table, b));
        expect_close("rope_table", "table", k, table);
        const struct rope_spec scaled = {10000, true, 8, 1, 4, 64};
        EACH(k, b)
        b->k->rope_table(b->dev, &scaled, on(table, b));
        expect_close("rope_table", "scaled", k, table);
        done(k);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_gpu),           cmocka_unit_test(unusable_gpus),
        cmocka_unit_test(describes_itself), cmocka_unit_test(memory),
        cmocka_unit_test(transfers),        cmocka_unit_test(uploads_run_ahead),
        cmocka_unit_test(rope_table),       cmocka_unit_test(launches_overlap_where_they_can),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
