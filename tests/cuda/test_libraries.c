/* The check of libraries at the start. With a cuBLASLt that leaves a tile of a result unwritten or adds 1 to
 * it, it finds every such tile, in every product; right products pass, whatever their shape. And with a
 * cuDNN, made of the built-in kernels of another device, that leaves rows unwritten, gets some wrong, or has
 * another mask. */
#include "tests/cuda/fixture.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/cuda/attention/attention_cudnn.h"

enum { SCRATCH = 1 << 20 };

struct layer {
    int64_t rows, in, out;
    bool classifier;
    enum device_precision precision;
    size_t scratch;
};

/* The status of checking the products of one layer. *products: how many were computed. */
static int check(struct layer l, int *products, struct error *e) {
    const struct kernels *k = kernels_cuda();
    struct device_options options = {.precision = l.precision, .deterministic = true};
    struct device *dev = k->open(&options, e);
    assert_non_null(dev);
    struct op_spec linear = {.kind = OP_LINEAR, .linear = {l.rows, l.in, l.out}};
    struct op_spec head = {.kind = OP_CLASSIFIER, .classifier = {l.rows, l.in, l.out}};
    struct op_cost cost;
    assert_int_equal(k->plan(dev, l.classifier ? &head : &linear, &cost, e), 0);
    void *scratch = k->alloc(dev, l.scratch, e);
    int before = emulator_allocations(), start = emulator_products.calls;
    k->set_workspace(dev, scratch, l.scratch);
    int status = k->check_libraries(dev, e);
    *products = emulator_products.calls - start;
    if (status == 0) { /* nothing is checked twice, and the scratch memory is zero */
        assert_int_equal(k->check_libraries(dev, e), 0);
        assert_int_equal(emulator_products.calls - start, *products);
        char *bytes = malloc(l.scratch);
        k->download(dev, tensor_of(scratch, DTYPE_F32, (int64_t)l.scratch / 4, 0, 0, 0, 0), bytes, DTYPE_F32);
        for (size_t i = 0; i < l.scratch; i++)
            assert_int_equal(bytes[i], 0);
        free(bytes);
    }
    assert_int_equal(emulator_allocations(), before);
    k->release(dev, scratch);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
    return status;
}

/* From here on this product (-1: each) is wrong in this tile. */
static void break_products(enum emulator_fault fault, int tile, int tiles, int only, int64_t min_rows) {
    emulator_products = (struct emulator_products){fault, tile, tiles, only, 0, min_rows};
}

static const int64_t SHAPES[][3] = {{1, 8, 8},     {1, 48, 130},    {7, 1, 1},   {64, 40, 24},
                                    {300, 33, 65}, {1000, 16, 257}, {2, 700, 5}, {3, 5, 3000}};
enum { SHAPE_COUNT = sizeof SHAPES / sizeof *SHAPES };

/* Each of linear's four plans and of the classifier's three, written over and added to. */
static void right_products_pass(void **state) {
    (void)state;
    break_products(PRODUCTS_RIGHT, 0, 1, -1, 0);
    for (int i = 0; i < SHAPE_COUNT; i++)
        for (int classifier = 0; classifier < 2; classifier++)
            for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++) {
                struct error e;
                struct layer l = {SHAPES[i][0], SHAPES[i][1], SHAPES[i][2], classifier, precision, SCRATCH};
                int products;
                if (check(l, &products, &e) != 0)
                    fail_msg("%s", e.text);
                assert_int_equal(products, classifier ? 6 : 8);
            }
}

/* Each tile, in each product. */
static void wrong_tiles_are_found(void **state) {
    (void)state;
    for (enum emulator_fault fault = PRODUCTS_UNWRITTEN; fault <= PRODUCTS_WRONG; fault++)
        for (int classifier = 0; classifier < 2; classifier++)
            for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++)
                for (int tiles = 1; tiles <= 3; tiles += 2)
                    for (int tile = 0; tile < tiles * tiles; tile++)
                        for (int product = 0; product < (classifier ? 6 : 8); product++) {
                            /* What is added to is not unwritten, but has the wrong value. */
                            struct error e;
                            struct layer l = {33, 20, 48, classifier, precision, SCRATCH};
                            int products;
                            break_products(fault, tile, tiles, product, 0);
                            assert_int_equal(check(l, &products, &e), -1);
                            assert_int_equal(products, product + 1);
                            assert_int_equal(e.exit_code, EXIT_RUN);
                            if (!strstr(e.text, "cuBLASLt computes wrong matrix products on this GPU (") ||
                                !strstr(e.text, precision == DEVICE_BF16 ? "bf16" : "fp32"))
                                fail_msg("%s", e.text);
                        }
    break_products(PRODUCTS_RIGHT, 0, 1, -1, 0);
}

/* One tile of 64 x 64 of a large result: too small for a sample of so many rows to be there by chance. */
static void one_tile_of_many_is_found(void **state) {
    (void)state;
    for (int tile = 0; tile < 16; tile++) {
        struct error e;
        int products;
        struct layer l = {256, 8, 4096, false, DEVICE_BF16, 4 * SCRATCH};
        break_products(PRODUCTS_WRONG, tile * 67 % 256, 16, -1, 0);
        assert_int_equal(check(l, &products, &e), -1);
    }
    break_products(PRODUCTS_RIGHT, 0, 1, -1, 0);
}

/* Rows are capped, unless the algorithm does not take fewer; what does not fit into the workspace is checked
 * in part. */
static void sizes(void **state) {
    (void)state;
    struct error e;
    int products;
    struct layer l = {1000, 16, 4096, false, DEVICE_FP32, 5 * SCRATCH};
    break_products(PRODUCTS_WRONG, 3, 2, -1, 0);
    assert_int_equal(check(l, &products, &e), -1);
    assert_non_null(strstr(e.text, "4096 x 16 x 256 in fp32, A transposed")); /* dW, planned last */
    break_products(PRODUCTS_WRONG, 3, 2, -1, 4000);
    assert_int_equal(check(l, &products, &e), -1);
    assert_non_null(strstr(e.text, "4096 x 16 x 256"));
    l = (struct layer){5000, 16, 24, false, DEVICE_FP32, SCRATCH};
    break_products(PRODUCTS_WRONG, 3, 2, 2, 5000);
    assert_int_equal(check(l, &products, &e), -1);
    assert_non_null(strstr(e.text, "5000 x 16 x 24"));
    l = (struct layer){1000, 16, 4096, false, DEVICE_FP32, 4 * SCRATCH};
    break_products(PRODUCTS_WRONG, 3, 2, -1, 0);
    assert_int_equal(check(l, &products, &e), -1);
    assert_non_null(strstr(e.text, "2048 x 16 x 128"));
    break_products(PRODUCTS_RIGHT, 0, 1, -1, 0);
    assert_int_equal(check(l, &products, &e), 0);
    assert_int_equal(products, 8);
}

/* ---- cuDNN ---- */

/* The results' order in the faults. */
enum { O, DQ, DK, DV };

static struct {
    enum { RIGHT, UNWRITTEN_ROW, WRONG_ROW, WINDOW, NOT_CAUSAL, BACKWARD_SCALE } kind;
    int what;
    int64_t sequence, token, head; /* of the row */
} fault;
static int cudnn_calls;
static bool in_cudnn;

struct attention_cudnn {
    cudaStream_t stream;
    struct device *own; /* with the built-in kernels */
    void *workspace;
};

size_t attention_cudnn_version(void) {
    return 91900;
}

struct attention_cudnn *attention_cudnn_open(cudaStream_t stream, char why[ATTENTION_CUDNN_REASON]) {
    (void)why;
    struct attention_cudnn *a = calloc(1, sizeof *a);
    struct device_options options = {.precision = DEVICE_BF16, .deterministic = true};
    a->stream = stream;
    a->own = kernels_cuda()->open(&options, NULL);
    return a;
}

void attention_cudnn_close(struct attention_cudnn *a) {
    kernels_cuda()->release(a->own, a->workspace);
    kernels_cuda()->close(a->own);
    free(a);
}

static struct attention_spec spec_of(const struct attention_cudnn_shape *s, bool backward) {
    struct attention_spec spec = {.batch = s->batch,
                                  .length = s->length,
                                  .heads = s->heads,
                                  .head_dim = s->head_dim,
                                  .pseudo = 1,
                                  .causal = s->causal,
                                  .window = s->window,
                                  .scale = s->scale,
                                  .kv_heads = s->kv_heads};
    if (fault.kind == WINDOW)
        spec.window++;
    if (fault.kind == NOT_CAUSAL)
        spec.causal = false;
    if (fault.kind == BACKWARD_SCALE && backward)
        spec.scale *= 1.1;
    return spec;
}

static void plan_own(struct attention_cudnn *a, struct attention_spec spec) {
    const struct kernels *k = kernels_cuda();
    struct op_spec op = {.kind = OP_ATTENTION, .attention = spec};
    struct op_cost cost;
    setenv("IHA_ATTENTION", "own", 1);
    assert_int_equal(k->plan(a->own, &op, &cost, NULL), 0);
    unsetenv("IHA_ATTENTION");
    if (!a->workspace) /* large enough for all shapes here */
        k->set_workspace(a->own, a->workspace = k->alloc(a->own, 1 << 20, NULL), 1 << 20);
}

/* The graphs that were asked for: layouts, each once. */
static struct {
    struct attention_cudnn_layout layout;
    bool backward;
} graphs[8];
static int graph_count;

static void note_graph(const struct attention_cudnn_layout *l, bool backward) {
    size_t bytes = backward ? sizeof *l : offsetof(struct attention_cudnn_layout, d_o);
    for (int i = 0; i < graph_count; i++)
        if (graphs[i].backward == backward && memcmp(&graphs[i].layout, l, bytes) == 0)
            return;
    assert_true(graph_count < 8);
    graphs[graph_count].layout = *l;
    graphs[graph_count++].backward = backward;
}

int attention_cudnn_plan(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
                         const struct attention_cudnn_layout *l, bool backward, size_t *workspace,
                         char why[ATTENTION_CUDNN_REASON]) {
    (void)a, (void)s, (void)why;
    note_graph(l, backward);
    *workspace = 1000;
    return 0;
}

static tensor view_of(const void *data, const struct attention_cudnn_shape *s, int64_t heads,
                      struct attention_cudnn_strides t) {
    tensor x = tensor_of((void *)data, DTYPE_BF16, s->batch, s->length, heads, s->head_dim, 0);
    x.stride[0] = t.batch;
    x.stride[1] = t.token;
    x.stride[2] = t.head;
    return x;
}

static tensor view(const void *data, const struct attention_cudnn_shape *s,
                   struct attention_cudnn_strides t) {
    return view_of(data, s, s->heads, t);
}

static tensor view_kv(const void *data, const struct attention_cudnn_shape *s,
                      struct attention_cudnn_strides t) {
    return view_of(data, s, s->kv_heads, t);
}

static void break_row(struct attention_cudnn *a, tensor x, int what) {
    if (fault.what != what || (fault.kind != UNWRITTEN_ROW && fault.kind != WRONG_ROW))
        return;
    tensor row =
        tensor_select(tensor_select(tensor_select(x, 0, fault.sequence), 0, fault.token), 0, fault.head);
    float values[256];
    kernels_cuda()->download(a->own, row, values, DTYPE_F32);
    for (int64_t i = 0; i < row.shape[0]; i++)
        values[i] = fault.kind == UNWRITTEN_ROW ? NAN : values[i] + 0.5f;
    kernels_cuda()->upload(a->own, row, values, DTYPE_F32);
}

static void finish(struct attention_cudnn *a, tensor x) {
    float first;
    x = tensor_of(x.data, DTYPE_BF16, 1, 0, 0, 0, 0);
    kernels_cuda()->download(a->own, x, &first, DTYPE_F32); /* waits */
    in_cudnn = false;
}

int attention_cudnn_forward(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
                            const struct attention_cudnn_layout *l, const void *q, const void *k,
                            const void *v, void *o, void *statistics, void *workspace,
                            char why[ATTENTION_CUDNN_REASON]) {
    (void)workspace, (void)why;
    struct attention_spec spec = spec_of(s, false);
    cudnn_calls++;
    plan_own(a, spec);
    assert_int_equal(cudaStreamSynchronize(a->stream), cudaSuccess);
    in_cudnn = true;
    kernels_cuda()->attention(a->own, &spec, view(q, s, l->q), view_kv(k, s, l->k), view_kv(v, s, l->v),
                              tensor_none(), view(o, s, l->o), statistics);
    break_row(a, view(o, s, l->o), O);
    finish(a, view(o, s, l->o));
    return 0;
}

int attention_cudnn_backward(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
                             const struct attention_cudnn_layout *l, const void *q, const void *k,
                             const void *v, const void *o, const void *d_o, const void *statistics, void *dq,
                             void *dk, void *dv, void *workspace, char why[ATTENTION_CUDNN_REASON]) {
    (void)workspace, (void)why;
    struct attention_spec spec = spec_of(s, true);
    plan_own(a, spec);
    assert_int_equal(cudaStreamSynchronize(a->stream), cudaSuccess);
    in_cudnn = true;
    kernels_cuda()->attention_backward(a->own, &spec, view(q, s, l->q), view_kv(k, s, l->k),
                                       view_kv(v, s, l->v), tensor_none(), view(o, s, l->o),
                                       view(d_o, s, l->d_o), statistics, view(dq, s, l->dq),
                                       view_kv(dk, s, l->dk), view_kv(dv, s, l->dv));
    break_row(a, view(dq, s, l->dq), DQ);
    break_row(a, view_kv(dk, s, l->dk), DK);
    break_row(a, view_kv(dv, s, l->dv), DV);
    finish(a, view(dq, s, l->dq));
    return 0;
}

static int check_attention(struct attention_spec spec, struct error *e) {
    const struct kernels *k = kernels_cuda();
    struct device_options options = {.precision = DEVICE_BF16, .deterministic = true};
    struct device *dev = k->open(&options, e);
    struct op_spec op = {.kind = OP_ATTENTION, .attention = spec};
    struct op_cost cost;
    graph_count = 0;
    assert_int_equal(k->plan(dev, &op, &cost, e), 0);
    void *scratch = k->alloc(dev, SCRATCH, e);
    k->set_workspace(dev, scratch, SCRATCH);
    assert_int_equal(graph_count, 2); /* of a forward and a backward, which are those that run */
    cudnn_calls = 0;
    int status = k->check_libraries(dev, e);
    if (status == 0)
        assert_int_equal(cudnn_calls, 1);
    assert_int_equal(graph_count, 2);
    k->release(dev, scratch);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
    return status;
}

/* batch, length, heads, head_dim, pseudo, causal, token_mask, window, scale, segmented, kv_heads, packed */
static const struct attention_spec ATTENTIONS[] = {
    {2, 150, 3, 16, 1, true, false, 0, 0.25, false, 0, true},
    {1, 400, 1, 8, 2, true, false, 0, 0.35, false, 0, false},
    {1, 380, 2, 24, 2, true, false, 40, 0.2, false, 0, false},
    {2, 130, 2, 16, 1, false, false, 0, 0.25, false, 0, false},
    {1, 100, 1, 16, 2, true, false, 1, 0.25, false, 0, false},
    {2, 140, 4, 16, 1, true, false, 0, 0.25, false, 2, true},
    {1, 90, 3, 8, 2, true, false, 30, 0.3, false, 1, false},
};

static void right_attention_passes(void **state) {
    (void)state;
    struct error e;
    fault.kind = RIGHT;
    for (size_t i = 0; i < sizeof ATTENTIONS / sizeof *ATTENTIONS; i++)
        if (check_attention(ATTENTIONS[i], &e) != 0)
            fail_msg("%s", e.text);
}

static void expect_found(struct attention_spec spec, const char *text) {
    struct error e = {0};
    assert_int_equal(check_attention(spec, &e), -1);
    assert_int_equal(e.exit_code, EXIT_RUN);
    if (!strstr(e.text, "cuDNN computes wrong attention on this GPU (") || !strstr(e.text, text))
        fail_msg("expected \"%s\": %s", text, e.text);
    fault.kind = RIGHT;
}

static void wrong_attention_is_found(void **state) {
    (void)state;
    static const char *const names[] = {": o of", ": dq of", ": dk of", ": dv of"};
    struct attention_spec plain = ATTENTIONS[0], window = ATTENTIONS[2];
    for (fault.what = O; fault.what <= DV; fault.what++) {
        fault.kind = UNWRITTEN_ROW; /* anywhere */
        fault.sequence = 1;
        fault.token = 149;
        fault.head = 2;
        expect_found(plain, names[fault.what]);
        fault.kind = WRONG_ROW; /* in what is compared */
        fault.sequence = 0;
        fault.token = 131;
        fault.head = 1;
        expect_found(plain, names[fault.what]);
    }
    fault.kind = WINDOW;
    expect_found(window, ": o of");
    fault.kind = NOT_CAUSAL;
    expect_found(plain, ": o of");
    fault.kind = BACKWARD_SCALE;
    expect_found(plain, ": d");
}

/* ---- cuDNN or the built-in kernels ---- */

static double kernel_seconds[2]; /* of a kernel of this program, and of one in cuDNN's place */

static double seconds_of(const char *kernel, int candidate) {
    (void)kernel, (void)candidate;
    return kernel_seconds[in_cudnn];
}

/* What serves the shape where kernels take so long; cuDNN's calls, to choose, in *calls. */
static const char *server_of(struct attention_spec spec, double own, double cudnn, bool deterministic,
                             const char *plan_file, int *calls) {
    const struct kernels *k = kernels_cuda();
    struct device_options options = {
        .precision = DEVICE_BF16, .deterministic = deterministic, .plan_file = plan_file};
    struct error e = {0};
    struct device *dev = k->open(&options, &e);
    struct op_spec op = {.kind = OP_ATTENTION, .attention = spec};
    struct op_cost cost;
    size_t bytes;
    kernel_seconds[0] = own;
    kernel_seconds[1] = cudnn;
    emulator_seconds = seconds_of;
    cudnn_calls = 0;
    assert_int_equal(k->plan(dev, &op, &cost, &e), 0);
    emulator_seconds = NULL;
    *calls = cudnn_calls;
    const char *server = k->attention_backend(dev, &spec, &bytes);
    void *scratch = k->alloc(dev, SCRATCH, &e);
    k->set_workspace(dev, scratch, SCRATCH);
    assert_int_equal(k->check_libraries(dev, &e), 0);
    k->release(dev, scratch);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
    return server;
}

/* In a narrow window the faster one serves, and serves the next start too. */
static void the_faster_attention_serves(void **state) {
    (void)state;
    struct attention_spec narrow = ATTENTIONS[2], wide = ATTENTIONS[1], packed = ATTENTIONS[5];
    char path[] = "/tmp/iha-plans-XXXXXX";
    int calls, file = mkstemp(path);
    fault.kind = RIGHT;
    packed.window = 30;
    assert_string_equal(server_of(narrow, 1e-3, 1e-4, false, NULL, &calls), "cuDNN");
    assert_true(calls > 3);
    assert_string_equal(server_of(narrow, 1e-4, 1e-3, false, NULL, &calls), "built-in kernels");
    assert_string_equal(server_of(packed, 1e-4, 1e-3, false, NULL, &calls), "built-in kernels");
    assert_string_equal(server_of(narrow, 1e-4, 1e-3, true, NULL, &calls), "cuDNN");
    assert_int_equal(calls, 0);
    assert_string_equal(server_of(wide, 1e-4, 1e-3, false, NULL, &calls), "cuDNN");
    assert_int_equal(calls, 0);
    unlink(path);
    assert_string_equal(server_of(narrow, 1e-4, 1e-3, false, path, &calls), "built-in kernels");
    assert_true(calls > 3);
    assert_string_equal(server_of(narrow, 1e-3, 1e-4, false, path, &calls), "built-in kernels");
    assert_int_equal(calls, 0);
    unlink(path);
    close(file);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(right_products_pass),         cmocka_unit_test(wrong_tiles_are_found),
        cmocka_unit_test(one_tile_of_many_is_found),   cmocka_unit_test(sizes),
        cmocka_unit_test(right_attention_passes),      cmocka_unit_test(wrong_attention_is_found),
        cmocka_unit_test(the_faster_attention_serves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
