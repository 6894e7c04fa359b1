/* What a deterministic run on a GPU announces: what computes attention, and the memory it takes; and what cuDNN
 * is left out for. The cuDNN here only plans: these functions replace the library's. */
#include "tests/cuda/fixture.h"

#include "kernels/cuda/attention/attention_cudnn.h"
#include "model/info/info.h"
#include "tests/lib/model_configs.h"

static size_t version = 91900;
static size_t planned_for_determinism; /* the most bytes that a plan was asked to be deterministic for */

size_t attention_cudnn_version(void) {
    return version;
}

struct attention_cudnn *attention_cudnn_open(cudaStream_t stream, char why[ATTENTION_CUDNN_REASON]) {
    static char handle;
    (void)stream, (void)why;
    return (struct attention_cudnn *)&handle;
}

void attention_cudnn_close(struct attention_cudnn *c) {
    (void)c;
}

int attention_cudnn_plan(struct attention_cudnn *c, const struct attention_cudnn_shape *s,
                         const struct attention_cudnn_layout *layout, bool backward, size_t *workspace,
                         char why[ATTENTION_CUDNN_REASON]) {
    (void)c, (void)layout, (void)why;
    *workspace = 0;
    if (backward && s->deterministic)
        *workspace = (size_t)(2 * s->batch * s->heads * s->length * s->length);
    if (*workspace > planned_for_determinism)
        planned_for_determinism = *workspace;
    return 0;
}

/* Of a model of MHA and IHA layers, whose IHA layers have twice the tokens. */
static char *announced(struct model_config *c, enum device_precision precision, bool deterministic,
                       int64_t tokens, const struct kernels *k) {
    static char text[1024];
    struct error e = {0};
    struct model m;
    struct device_options options = {.threads = 1, .precision = precision, .deterministic = deterministic};
    struct model_options shape = {.shape = {2, tokens, RECOMPUTE_NONE, true}};
    struct device *dev = k->open(&options, &e);
    struct kernels unchecked = *k; /* cuDNN's plans here cannot run */
    unchecked.check_libraries = NULL;
    planned_for_determinism = 0;
    text[0] = 0;
    if (!dev || model_create(&m, c, &unchecked, dev, &shape, &e) != 0)
        fail_msg("%s", e.text);
    FILE *out = fmemopen(text, sizeof text, "w");
    info_print_determinism(out, &m);
    fclose(out);
    assert_true(m.plan.workspace >= planned_for_determinism);
    model_free(&m);
    k->close(dev);
    return text;
}

static struct model_config config(int64_t tokens) {
    struct model_config c = plain_config();
    c.max_position_embeddings = tokens;
    c.num_pseudo_heads = 2;
    c.num_attention_heads = 4;
    c.head_dim = 8;
    c.iha_mask = MASK_FLAT;
    for (int layer = 0; layer < c.num_hidden_layers; layer++)
        c.layer_types[layer] = layer == 0 ? LAYER_MHA_GLOBAL : LAYER_IHA_GLOBAL;
    return c;
}

/* 2 B H S^2 bytes: 2 * 2 * 4 * 128^2 is 0.26 MB, four times as much for IHA. */
static void by_cudnn(void **state) {
    (void)state;
    struct model_config c = config(128);
    assert_string_equal(announced(&c, DEVICE_BF16, true, 128, kernels_cuda()),
                        "deterministic: attention of mha_global layers by cuDNN with 0.3 MB, of iha_global "
                        "layers by cuDNN with 1.0 MB; 1.0 MB of the workspace are for that\n");
    assert_int_equal(planned_for_determinism, 2 * 2 * 4 * 256 * 256);
}

/* IHA layers would want more than the limit of 256 MiB. */
static void too_long_for_cudnn(void **state) {
    (void)state;
    struct model_config c = config(2048);
    assert_string_equal(announced(&c, DEVICE_BF16, true, 2048, kernels_cuda()),
                        "deterministic: attention of mha_global layers by cuDNN with 67.1 MB, of iha_global "
                        "layers by cuDNN with 268.4 MB; 268.4 MB of the workspace are for that\n");
    c = config(2176);
    assert_string_equal(announced(&c, DEVICE_BF16, true, 2176, kernels_cuda()),
                        "deterministic: attention of mha_global layers by cuDNN with 75.8 MB, of iha_global "
                        "layers by built-in kernels; 75.8 MB of the workspace are for that\n");
}

static void by_own_kernels(void **state) {
    (void)state;
    struct model_config c = config(128);
    assert_string_equal(
        announced(&c, DEVICE_FP32, true, 128, kernels_cuda()),
        "deterministic: attention of mha_global layers by built-in kernels, of iha_global layers by "
        "built-in kernels; 0.0 MB of the workspace are for that\n");
}

static void no_price(void **state) {
    (void)state;
    struct model_config c = config(128);
    assert_string_equal(
        announced(&c, DEVICE_BF16, false, 128, kernels_cuda()),
        "deterministic: attention of mha_global layers by cuDNN, of iha_global layers by cuDNN; "
        "0.0 MB of the workspace are for that\n");
    assert_string_equal(announced(&c, DEVICE_FP32, true, 128, kernels_cpu()), "");
}

/* cuDNN has nothing for them. */
static void layers_without_cudnn(void **state) {
    (void)state;
    struct model_config c = config(128);
    c.layer_types[0] = LAYER_TALKING_GLOBAL;
    for (int layer = 1; layer < c.num_hidden_layers; layer++)
        c.layer_types[layer] = LAYER_SIMPLICIAL_GLOBAL;
    assert_string_equal(announced(&c, DEVICE_BF16, true, 128, kernels_cuda()),
                        "deterministic: attention of talking_global layers by built-in kernels, of "
                        "simplicial_global layers by built-in kernels; 0.0 MB of the workspace are for that\n");
    assert_int_equal(planned_for_determinism, 0);
}

/* Which of these lengths cuDNN computes, as a string of c (cuDNN) and o (built-in kernels). */
static const char *served(size_t cudnn, bool graphs, bool segmented) {
    static const int64_t lengths[] = {128, 130, 256, 300};
    static char text[5];
    const struct kernels *k = kernels_cuda();
    struct device_options options = {.precision = DEVICE_BF16, .graphs = graphs};
    struct device *dev = k->open(&options, NULL);
    version = cudnn;
    for (int i = 0; i < 4; i++) {
        struct op_cost cost;
        size_t bytes;
        struct op_spec s = {.kind = OP_ATTENTION,
                            .attention = {1, lengths[i], 2, 8, 1, true, false, 0, 1, segmented}};
        assert_int_equal(k->plan(dev, &s, &cost, NULL), 0);
        text[i] = strcmp(k->attention_backend(dev, &s.attention, &bytes), "cuDNN") == 0 ? 'c' : 'o';
    }
    k->close(dev);
    version = 91900;
    return text;
}

/* What cuDNN up to 9.15.0 does for lengths off 128 cannot be kept as a graph. */
static void old_cudnn_in_graphs(void **state) {
    (void)state;
    assert_string_equal(served(91500, true, false), "coco");
    assert_string_equal(served(91500, false, false), "cccc");
    assert_string_equal(served(91501, true, false), "cccc");
}

/* How many segments a batch has would be part of its plans. */
static void segments_by_own_kernels(void **state) {
    (void)state;
    assert_string_equal(served(91900, true, true), "oooo");
    assert_string_equal(served(91900, false, true), "oooo");
}

int main(void) {
    emulator_gpu.memory = (size_t)8 << 30;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(by_cudnn),
        cmocka_unit_test(too_long_for_cudnn),
        cmocka_unit_test(by_own_kernels),
        cmocka_unit_test(layers_without_cudnn),
        cmocka_unit_test(no_price),
        cmocka_unit_test(old_cudnn_in_graphs),
        cmocka_unit_test(segments_by_own_kernels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
