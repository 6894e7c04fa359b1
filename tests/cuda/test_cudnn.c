/* cuDNN itself, planning for GPUs given by their properties alone: whether it takes the graphs of attention_cudnn.cpp, for
 * which shapes, and what workspace it wants. The library's own checks and heuristics run here and its kernels
 * are compiled; tests/cuda/emulator/fake_driver.c loads them, and nothing is launched. */
#include "tests/cuda/fixture.h"

#include "kernels/cuda/attention/attention_cudnn.h"
#include "kernels/estimate/estimate.h"

/* As cuDNN serializes them; sizes and limits are those of NVIDIA's tables of compute capabilities. */
#define DEVICE(NAME, VERSION, PROCESSORS, SHARED, L2, MEMORY)                                                \
    "{\"cudaDeviceId\":0,\"deviceVer\":" VERSION ",\"driverVer\":13000,\"deviceName\":\"NVIDIA " NAME        \
    "\",\"maxGridSize\":[2147483647,65535,65535],\"maxBlockSize\":[1024,1024,64],\"regsPerBlock\":65536,"    \
    "\"multiProcessorCount\":" PROCESSORS                                                                    \
    ",\"warpSize\":32,\"maxSharedMemoryPerBlock\":49152,\"maxSharedMemoryPerBlockOptin\":" SHARED            \
    ",\"reservedSharedMemoryPerBlock\":1024,\"maxRegistersPerSM\":65536,\"maxCtasPerSM\":32,"                \
    "\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":2048,\"pciDeviceId\":0,\"isTccDriver\":0,"              \
    "\"supportCoopLaunch\":1,\"smClockRateKHz\":1980000,\"memClockRateKHz\":3201000,\"l2CacheSize\":" L2     \
    ",\"totalGlobalMem\":" MEMORY "}"

static const struct gpu_properties {
    const char *name, *gpu, *json;
} H200 = {"H200", "h200", DEVICE("H200", "900", "132", "232448", "62914560", "150000000000")},
  A100 = {"A100", "a100", DEVICE("A100-SXM4-80GB", "800", "108", "166912", "41943040", "85000000000")};

static const struct gpu_properties *gpu; /* the one at hand */
static int opened;

struct attention_cudnn *__wrap_attention_cudnn_open(cudaStream_t stream, char why[ATTENTION_CUDNN_REASON]);
struct attention_cudnn *__wrap_attention_cudnn_open(cudaStream_t stream, char why[ATTENTION_CUDNN_REASON]) {
    (void)stream;
    opened++;
    return attention_cudnn_open_deviceless(gpu->json, why);
}

/* Every shape of configs/, and corners. Fields: batch, length S, heads, head_dim, pseudo, causal, token_mask,
 * window, scale, segmented, heads of keys and values (0: as many as heads). */
static const struct served {
    const char *of;
    struct attention_spec spec;
} SHAPES[] = {
    {"GPT-2 124M", {16, 1024, 12, 64, 1, true, false, 0, 0.125, false, 0, true}},
    {"its IHA layers, local", {16, 2048, 12, 64, 2, true, false, 256, 0.125, false, 0, false}},
    {"its IHA layers, global", {16, 4096, 12, 64, 4, true, false, 0, 0.125, false, 0, false}},
    {"bytes_small, MHA", {8, 512, 4, 64, 1, true, false, 0, 0.125, false, 0, false}},
    {"its IHA layers", {8, 1024, 4, 64, 2, true, false, 128, 0.125, false, 0, false}},
    {"quickstart, MHA", {8, 256, 4, 64, 1, true, false, 0, 0.125, false, 0, false}},
    {"its IHA layers", {8, 512, 4, 64, 2, true, false, 64, 0.125, false, 0, false}},
    {"llama 1B", {4, 4096, 32, 64, 1, true, false, 0, 0.125, false, 0, false}},
    {"8 heads of keys and values for 32", {4, 4096, 32, 64, 1, true, false, 0, 0.125, false, 8, true}},
    {"one for 6, IHA with a window", {2, 1024, 6, 64, 2, true, false, 128, 0.125, false, 1, false}},
    {"the paper's 2.4B, MHA", {1, 8192, 20, 128, 1, true, false, 0, 0.088, false, 0, false}},
    {"the paper's 2.4B, P = 2", {1, 16384, 20, 128, 2, true, false, 2048, 0.088, false, 0, false}},
    {"the paper's 2.4B, P = 4", {1, 32768, 20, 128, 4, true, false, 1024, 0.088, false, 0, false}},
    {"the paper's 2.4B, P = 20", {1, 163840, 20, 128, 20, true, false, 205, 0.088, false, 0, false}},
    {"not causal", {2, 256, 4, 64, 1, false, false, 0, 0.125, false, 0, true}},
    {"the smallest head, an odd length", {3, 77, 3, 8, 1, true, false, 0, 0.35, false, 0, true}},
    {"the largest head, a window", {1, 1024, 4, 256, 2, true, false, 300, 0.0625, false, 0, false}},
    {"a window of the query alone", {2, 100, 2, 24, 2, true, false, 1, 0.2, false, 0, false}},
};

static struct device *device_of(enum device_precision precision, bool deterministic) {
    struct error e = {0};
    struct device_options options = {.threads = 1, .precision = precision, .deterministic = deterministic};
    struct device *dev = kernels_cuda()->open(&options, &e);
    if (!dev)
        fail_msg("%s", e.text);
    return dev;
}

static struct op_cost planned(const struct kernels *k, struct device *dev, struct attention_spec spec) {
    struct error e = {0};
    struct op_spec op = {.kind = OP_ATTENTION, .attention = spec};
    struct op_cost cost = {0};
    if (k->plan(dev, &op, &cost, &e) != 0)
        fail_msg("%s", e.text);
    return cost;
}

static const char *server_of(struct device *dev, struct attention_spec spec) {
    size_t deterministic;
    return kernels_cuda()->attention_backend(dev, &spec, &deterministic);
}

/* cuDNN serves the shape, and wants the workspace that `info` counts. */
static void serves(const struct gpu_properties *on, const struct served *c, bool deterministic) {
    gpu = on;
    struct error e = {0};
    struct device *dev = device_of(DEVICE_BF16, deterministic);
    struct estimate_options options = {.gpu = gpu_spec(on->gpu),
                                       .link = link_spec("nvlink"),
                                       .ranks = 1,
                                       .precision = DEVICE_BF16,
                                       .deterministic = deterministic};
    struct device *estimate = estimate_open(&options, &e);
    assert_non_null(estimate);
    setenv("IHA_ATTENTION", "cudnn", 1); /* there is no GPU to time a narrow window on */
    struct op_cost real = planned(kernels_cuda(), dev, c->spec),
                   counted = planned(kernels_estimate(), estimate, c->spec);
    unsetenv("IHA_ATTENTION");
    if (strcmp(server_of(dev, c->spec), "cuDNN") != 0)
        fail_msg("%s, %s: served by %s", on->name, c->of, server_of(dev, c->spec));
    if (real.saved != counted.saved || real.workspace > counted.workspace ||
        counted.workspace > real.workspace + 4096)
        fail_msg("%s, %s: cuDNN wants %zu + %zu bytes, info counts %zu + %zu", on->name, c->of, real.saved,
                 real.workspace, counted.saved, counted.workspace);
    kernels_cuda()->close(dev);
    kernels_estimate()->close(estimate);
}

static void on_hopper(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
        serves(&H200, &SHAPES[i], false);
    assert_true(opened > 0);
}

static const struct served LARGE_HEAD = {"a head of 136",
                                         {1, 256, 2, 136, 1, true, false, 0, 0.086, false, 0, false}};

static void on_ampere(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i += 3)
        if (SHAPES[i].spec.head_dim <= 128)
            serves(&A100, &SHAPES[i], false);
    serves(&H200, &LARGE_HEAD, false);
    gpu = &A100;
    struct device *dev = device_of(DEVICE_BF16, false);
    planned(kernels_cuda(), dev, LARGE_HEAD.spec);
    assert_string_equal(server_of(dev, LARGE_HEAD.spec), "built-in kernels");
    kernels_cuda()->close(dev);
}

/* The square of the length, in whole tiles, that attention.cu announces. */
static void deterministic(void **state) {
    (void)state;
    static const struct served shapes[] = {
        {"whole tiles", {1, 1024, 12, 64, 1, true, false, 0, 0.125, false, 0, false}},
        {"an odd length", {2, 333, 3, 64, 1, true, false, 0, 0.125, false, 0, false}},
        {"a window", {1, 512, 3, 128, 2, true, false, 100, 0.088, false, 0, false}},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        serves(&H200, &shapes[i], true);
    serves(&A100, &shapes[1], true);
}

int main(void) {
    emulator_gpu.memory = (size_t)8 << 30;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(on_hopper),
        cmocka_unit_test(on_ampere),
        cmocka_unit_test(deterministic),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
