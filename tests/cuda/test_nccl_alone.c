/* The communicator over NCCL with one rank: every collective runs, with itself as the only peer, where there
 * is but one GPU. On a real GPU that is all of the library that can be reached. */
#include "tests/cuda/fixture.h"

#include "kernels/comm.h"

/* NULL where the program is built without NCCL. */
__attribute__((weak)) struct comm *comm_nccl_open(struct device *dev, struct comm *ranks, struct error *e);

enum { N = 5000 + 3 };

struct alone {
    const struct kernels *k;
    struct device *dev;
    struct comm *c;
    tensor buffer, piece;
    float before[N], old[N]; /* what they hold */
};

static tensor floats(struct alone *a, float *values) {
    struct error e = {0};
    tensor t = tensor_of(a->k->alloc(a->dev, N * sizeof *values, &e), DTYPE_F32, N, 0, 0, 0, 0);
    if (!t.data)
        fail_msg("%s", e.text);
    for (int i = 0; i < N; i++)
        values[i] = (float)fixture_noise();
    a->k->upload(a->dev, t, values, DTYPE_F32);
    return t;
}

static void open_alone(struct alone *a, bool deterministic, bool graphs, enum dtype wire) {
    struct error e = {0};
    struct device_options options = {
        .precision = DEVICE_BF16, .deterministic = deterministic, .graphs = graphs};
    if (!comm_nccl_open)
        skip();
    a->k = kernels_cuda();
    a->dev = a->k->open(&options, &e);
    if (!a->dev)
        fail_msg("%s", e.text);
    comm_set_timeout(comm_single(), 60);
    a->c = comm_nccl_open(a->dev, comm_single(), &e);
    if (!a->c || a->c->ops->reserve(a->c, N, DTYPE_F32, wire, &e) != 0)
        fail_msg("%s", e.text);
    assert_string_equal(a->c->ops->name, "NCCL");
    a->buffer = floats(a, a->before);
    a->piece = floats(a, a->old);
}

static void close_alone(struct alone *a) {
    a->k->release(a->dev, a->buffer.data);
    a->k->release(a->dev, a->piece.data);
    a->c->ops->close(a->c);
    a->k->close(a->dev);
    assert_int_equal(emulator_allocations(), 0);
}

static void expect(struct alone *a, tensor t, const float *want, const char *what) {
    static float got[N];
    a->k->download(a->dev, t, got, DTYPE_F32);
    for (int i = 0; i < N; i++)
        if (got[i] != want[i])
            fail_msg("%s: element %d is %.9g and not %.9g", what, i, (double)got[i], (double)want[i]);
}

/* A rank's own part is never rounded. */
static void reduce_scatter(void **state) {
    (void)state;
    static struct alone a;
    for (int way = 0; way < 3; way++)
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            static float want[N];
            open_alone(&a, way == 1, false, way == 2 ? DTYPE_BF16 : DTYPE_F32);
            for (int i = 0; i < N; i++)
                want[i] = accumulate ? a.old[i] + a.before[i] : a.before[i];
            comm_event event = a.c->ops->reduce_scatter(a.c, a.buffer, a.piece, accumulate);
            a.c->ops->progress(a.c);
            a.c->ops->wait(a.c, event);
            expect(&a, a.piece, want, "reduce_scatter");
            expect(&a, a.buffer, a.before, "reduce_scatter's buffer");
            /* In its own place, as gradients are. */
            a.c->ops->wait(a.c, a.c->ops->reduce_scatter(a.c, a.buffer, a.buffer, false));
            expect(&a, a.buffer, a.before, "reduce_scatter in place");
            close_alone(&a);
        }
}

static void all_gather(void **state) {
    (void)state;
    static struct alone a;
    open_alone(&a, false, false, DTYPE_F32);
    comm_event event = a.c->ops->all_gather(a.c, a.buffer);
    a.c->ops->wait(a.c, event);
    expect(&a, a.buffer, a.before, "all_gather");
    close_alone(&a);
}

/* Those of a group start together, with the values that the device has computed until its end; what does not fit
 * into one starts before. */
static void group(void **state) {
    (void)state;
    static struct alone a;
    enum { MANY = 70 };
    open_alone(&a, false, false, DTYPE_F32);
    for (int count = 0; count <= MANY; count += count < 3 ? 1 : MANY - 3) {
        comm_event events[MANY];
        int64_t before = emulator_launches();
        a.c->ops->group_begin(a.c);
        for (int i = 0; i < count; i++) {
            events[i] = a.c->ops->all_gather(a.c, i % 2 ? a.piece : a.buffer);
            a.k->upload(a.dev, i % 2 ? a.piece : a.buffer, i % 2 ? a.old : a.before, DTYPE_F32);
        }
        a.c->ops->group_end(a.c);
        if (!emulator_on_gpu()) /* a kernel before each collective and one after it */
            assert_int_equal(emulator_launches() - before, count == 0 ? 0 : count > 64 ? 4 : 2);
        for (int i = 0; i < count; i++)
            a.c->ops->wait(a.c, events[i]);
        a.c->ops->progress(a.c);
        expect(&a, a.buffer, a.before, "all_gather in a group");
        expect(&a, a.piece, a.old, "all_gather in a group");
    }
    /* A collective of another kind starts what was put off. */
    a.c->ops->group_begin(a.c);
    comm_event first = a.c->ops->all_gather(a.c, a.buffer);
    comm_event second = a.c->ops->reduce_scatter(a.c, a.piece, a.piece, false);
    assert_true(second > first);
    a.c->ops->group_end(a.c);
    a.c->ops->wait(a.c, first);
    expect(&a, a.buffer, a.before, "all_gather");
    close_alone(&a);
}

/* More collectives than there are events, then a sum, which the device's queue waits for by itself. */
static void all_reduce(void **state) {
    (void)state;
    static struct alone a;
    enum { COUNT = 3, MANY = 1100 };
    const double given[COUNT] = {1.5, -2, 1e300};
    double got[COUNT];
    struct error e = {0};
    open_alone(&a, false, false, DTYPE_F32);
    tensor values = tensor_of(a.k->alloc(a.dev, sizeof given, &e), DTYPE_F64, COUNT, 0, 0, 0, 0);
    a.k->upload(a.dev, values, given, DTYPE_F64);
    for (int i = 0; i < MANY; i++)
        a.c->ops->all_reduce(a.c, values.data, COUNT);
    a.c->ops->progress(a.c);
    a.k->download(a.dev, values, got, DTYPE_F64);
    assert_memory_equal(got, given, sizeof given);
    a.k->release(a.dev, values.data);
    close_alone(&a);
}

/* Its collectives only join the queue, so that a pass may be kept as a graph. */
static void in_a_graph(void **state) {
    (void)state;
    static struct alone a;
    static float want[N];
    open_alone(&a, false, true, DTYPE_F32);
    assert_true(a.c->ops->queued);
    memcpy(want, a.old, sizeof want);
    enum { TIMES = 4 };
    for (int i = 0; i < TIMES; i++) {
        if (!a.k->graph_replay(a.dev, 0))
            do {
                a.k->graph_begin(a.dev, 0);
                a.c->ops->wait(a.c, a.c->ops->reduce_scatter(a.c, a.buffer, a.piece, true));
            } while (!a.k->graph_end(a.dev, 0));
        for (int j = 0; j < N; j++)
            want[j] += a.before[j];
    }
    assert_true(a.k->graph_replay(a.dev, 0)); /* it was kept */
    for (int j = 0; j < N; j++)
        want[j] += a.before[j];
    expect(&a, a.piece, want, "reduce_scatter in a graph");
    close_alone(&a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reduce_scatter), cmocka_unit_test(all_gather), cmocka_unit_test(group),
        cmocka_unit_test(all_reduce),     cmocka_unit_test(in_a_graph),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
