/* Streams, events, captures and graphs of the emulator: they keep the order that CUDA promises
 * and no other, and refuse what CUDA refuses. Work here is copies and memsets of small buffers of bytes. */
#include "tests/cuda/death.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>

#include "tests/cuda/emulator/control.h"

enum { SEEDS = 12, N = 64, BUFFERS = 4 };

#define ok(call) assert_int_equal(call, cudaSuccess)

static struct {
    cudaStream_t s[3];
    cudaEvent_t e[3];
    unsigned char *d[BUFFERS]; /* [N], 0xff */
} T;

static int set_up(void **state) {
    (void)state;
    emulator_seed(0);
    for (int i = 0; i < 3; i++) {
        ok(cudaStreamCreateWithFlags(&T.s[i], cudaStreamNonBlocking));
        ok(cudaEventCreateWithFlags(&T.e[i], cudaEventDisableTiming));
    }
    for (int i = 0; i < BUFFERS; i++)
        ok(cudaMalloc((void **)&T.d[i], N));
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    for (int i = 0; i < BUFFERS; i++)
        ok(cudaFree(T.d[i]));
    for (int i = 0; i < 3; i++) {
        ok(cudaStreamDestroy(T.s[i]));
        ok(cudaEventDestroy(T.e[i]));
    }
    cudaGetLastError();
    return 0;
}

static void set(int buffer, int value, cudaStream_t s) {
    ok(cudaMemsetAsync(T.d[buffer], value, N, s));
}

static void copy(int to, int from, cudaStream_t s) {
    ok(cudaMemcpyAsync(T.d[to], T.d[from], N, cudaMemcpyDeviceToDevice, s));
}

/* The legacy stream waits for none of the others here: this is what lies there now. */
static int value(int buffer) {
    unsigned char host[N];
    ok(cudaMemcpy(host, T.d[buffer], N, cudaMemcpyDeviceToHost));
    for (int i = 1; i < N; i++)
        assert_int_equal(host[i], host[0]);
    return host[0];
}

/* ---- streams and events ---- */

static void one_stream(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        emulator_seed(seed);
        set(0, 1, T.s[0]);
        copy(1, 0, T.s[0]);
        set(0, 2, T.s[0]);
        ok(cudaStreamSynchronize(T.s[0]));
        assert_int_equal(value(0), 2);
        assert_int_equal(value(1), 1);
    }
}

/* Buffer 1 gets what the first stream set buffer 0 to, before it is set to something else. Returns how many
 * seeds see something wrong. */
static int hand_over(bool wait_for_value, bool wait_for_reader) {
    int wrong = 0;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        emulator_seed(seed);
        set(0, 0, NULL);
        set(1, 0, NULL);
        ok(cudaStreamSynchronize(NULL));
        set(0, 5, T.s[0]);
        ok(cudaEventRecord(T.e[0], T.s[0]));
        if (wait_for_value)
            ok(cudaStreamWaitEvent(T.s[1], T.e[0], 0));
        copy(1, 0, T.s[1]);
        ok(cudaEventRecord(T.e[1], T.s[1]));
        if (wait_for_reader)
            ok(cudaStreamWaitEvent(T.s[0], T.e[1], 0));
        set(0, 6, T.s[0]);
        ok(cudaStreamSynchronize(T.s[seed % 2]));
        ok(cudaDeviceSynchronize());
        assert_int_equal(value(0), 6);
        wrong += value(1) != 5;
    }
    return wrong;
}

static void events_order_streams(void **state) {
    (void)state;
    assert_int_equal(hand_over(true, true), 0);
}

static void missing_waits_show(void **state) {
    (void)state;
    assert_true(hand_over(false, true) > 0);
    assert_true(hand_over(true, false) > 0);
}

/* A wait is for the record that was the latest when it was called; recording again does not move it. */
static void waits_for_the_latest_record(void **state) {
    (void)state;
    set(0, 1, T.s[0]);
    ok(cudaEventRecord(T.e[0], T.s[0]));
    set(0, 2, T.s[0]);
    ok(cudaEventRecord(T.e[0], T.s[0]));
    ok(cudaStreamWaitEvent(T.s[1], T.e[0], 0));
    set(0, 3, T.s[0]);
    ok(cudaEventRecord(T.e[0], T.s[0]));
    copy(1, 0, T.s[1]);
    ok(cudaStreamSynchronize(T.s[1]));
    assert_int_equal(value(1), 2);
    assert_int_equal(cudaStreamQuery(T.s[0]), cudaErrorNotReady);
    ok(cudaEventSynchronize(T.e[0]));
    assert_int_equal(value(0), 3);
}

static void never_recorded(void **state) {
    (void)state;
    ok(cudaStreamWaitEvent(T.s[0], T.e[0], 0));
    ok(cudaEventQuery(T.e[0]));
    ok(cudaEventSynchronize(T.e[0]));
    ok(cudaStreamQuery(T.s[0]));
}

/* A host that only asks comes to an end too, and its question says how things were. */
static void queries(void **state) {
    (void)state;
    set(0, 1, T.s[0]);
    set(1, 1, T.s[0]);
    ok(cudaEventRecord(T.e[0], T.s[0]));
    set(2, 1, T.s[0]);
    assert_int_equal(cudaEventQuery(T.e[0]), cudaErrorNotReady);
    assert_int_equal(cudaGetLastError(), cudaErrorNotReady);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    int asked = 1;
    while (cudaEventQuery(T.e[0]) == cudaErrorNotReady)
        asked++;
    assert_int_equal(asked, 2);
    assert_int_equal(value(2), 0xff);
    assert_int_equal(cudaStreamQuery(T.s[0]), cudaErrorNotReady);
    assert_int_equal(cudaPeekAtLastError(), cudaErrorNotReady);
    ok(cudaStreamSynchronize(T.s[0]));
    ok(cudaStreamQuery(T.s[0]));
}

/* Even seeds leave undone what is not waited for; odd ones may do it at any time. */
static void lazy_and_eager(void **state) {
    (void)state;
    int done[2] = {0, 0};
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        emulator_seed(seed);
        set(0, 1, T.s[0]);
        ok(cudaEventRecord(T.e[0], T.s[0]));
        set(1, 1, T.s[1]);
        ok(cudaStreamSynchronize(T.s[1]));
        done[seed % 2] += cudaEventQuery(T.e[0]) == cudaSuccess;
        ok(cudaStreamSynchronize(T.s[0]));
    }
    assert_int_equal(done[0], 0);
    assert_true(done[1] > 0);
}

static void legacy_stream(void **state) {
    (void)state;
    cudaStream_t blocking;
    ok(cudaStreamCreateWithPriority(&blocking, cudaStreamDefault, -1));
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        emulator_seed(seed);
        set(0, 1, blocking);
        copy(1, 0, NULL); /* waits for it */
        copy(2, 1, blocking);
        set(1, 3, NULL);
        ok(cudaStreamSynchronize(NULL));
        assert_int_equal(value(1), 3);
        assert_int_equal(value(2), 1);
    }
    emulator_seed(0);
    set(0, 4, T.s[0]);
    assert_int_equal(value(0), 1);
    ok(cudaDeviceSynchronize());
    ok(cudaStreamDestroy(blocking));
}

static void destroy_stream(int unused) {
    (void)unused;
    set(0, 1, T.s[0]);
    cudaStreamDestroy(T.s[0]);
}

static void destroy_event(int unused) {
    (void)unused;
    set(0, 1, T.s[0]);
    cudaEventRecord(T.e[0], T.s[0]);
    cudaEventDestroy(T.e[0]);
}

static void use_destroyed(int which) {
    if (which == 0) {
        cudaStreamDestroy(T.s[0]);
        cudaMemsetAsync(T.d[0], 0, N, T.s[0]);
    } else {
        cudaEventDestroy(T.e[0]);
        cudaEventRecord(T.e[0], T.s[0]);
    }
}

static void destroyed_too_early(void **state) {
    (void)state;
    expect_death(destroy_stream, 0, "cudaStreamDestroy with work pending");
    expect_death(destroy_event, 0, "cudaEventDestroy of an event recorded after work that is pending");
    expect_death(use_destroyed, 0, "is not a stream");
    expect_death(use_destroyed, 1, "is not an event");
}

/* ---- capture ---- */

static void begin(void) {
    ok(cudaStreamBeginCapture(T.s[0], cudaStreamCaptureModeGlobal));
}

/* The capture has failed: its end says so, and the stream is as before. */
static void end_invalid(void) {
    cudaGraph_t graph;
    enum cudaStreamCaptureStatus status;
    ok(cudaStreamIsCapturing(T.s[0], &status));
    assert_int_equal(status, cudaStreamCaptureStatusInvalidated);
    assert_int_equal(cudaMemsetAsync(T.d[0], 0, N, T.s[0]), cudaErrorStreamCaptureInvalidated);
    assert_int_equal(cudaStreamEndCapture(T.s[0], &graph), cudaErrorStreamCaptureInvalidated);
    assert_null(graph);
    ok(cudaStreamIsCapturing(T.s[0], &status));
    assert_int_equal(status, cudaStreamCaptureStatusNone);
    ok(cudaStreamSynchronize(T.s[0]));
}

static void calls_that_end_a_capture(void **state) {
    (void)state;
    void *p;
    unsigned char host[N];
    ok(cudaEventRecord(T.e[0], T.s[1]));
    begin();
    assert_int_equal(cudaStreamSynchronize(T.s[0]), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaStreamQuery(T.s[0]), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaEventSynchronize(T.e[0]), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaEventQuery(T.e[0]), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaMalloc(&p, 4), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaFree(T.d[0]), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaMemcpyAsync(T.d[0], host, N, cudaMemcpyHostToDevice, T.s[0]),
                     cudaErrorStreamCaptureUnsupported);
    end_invalid();
    begin();
    assert_int_equal(cudaStreamWaitEvent(T.s[0], T.e[0], 0), cudaErrorStreamCaptureIsolation);
    end_invalid();
    begin();
    ok(cudaEventRecord(T.e[1], T.s[0]));
    assert_int_equal(cudaEventQuery(T.e[1]), cudaErrorCapturedEvent);
    end_invalid();
}

static void modes(void **state) {
    (void)state;
    void *p;
    cudaGraph_t graph;
    ok(cudaStreamBeginCapture(T.s[0], cudaStreamCaptureModeRelaxed));
    ok(cudaMalloc(&p, 4));
    ok(cudaFree(p));
    ok(cudaStreamEndCapture(T.s[0], &graph));
    ok(cudaGraphDestroy(graph));
    ok(cudaStreamBeginCapture(T.s[0], cudaStreamCaptureModeThreadLocal));
    assert_int_equal(cudaMalloc(&p, 4), cudaErrorStreamCaptureUnsupported);
    end_invalid();
    assert_int_equal(cudaStreamEndCapture(T.s[0], &graph), cudaErrorIllegalState);
    assert_int_equal(cudaStreamBeginCapture(NULL, cudaStreamCaptureModeRelaxed),
                     cudaErrorStreamCaptureUnsupported);
    begin();
    assert_int_equal(cudaStreamBeginCapture(T.s[0], cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
    ok(cudaStreamEndCapture(T.s[0], &graph));
    ok(cudaGraphDestroy(graph));
}

static void legacy_stream_during_capture(void **state) {
    (void)state;
    cudaStream_t blocking;
    cudaGraph_t graph;
    ok(cudaStreamCreate(&blocking));
    ok(cudaStreamBeginCapture(blocking, cudaStreamCaptureModeRelaxed));
    assert_int_equal(cudaMemsetAsync(T.d[0], 0, N, NULL), cudaErrorStreamCaptureImplicit);
    assert_int_equal(cudaStreamEndCapture(blocking, &graph), cudaErrorStreamCaptureInvalidated);
    ok(cudaStreamDestroy(blocking));
    begin();
    ok(cudaMemsetAsync(T.d[0], 0, N, NULL)); /* non-blocking streams have nothing to do with it */
    ok(cudaStreamEndCapture(T.s[0], &graph));
    ok(cudaGraphDestroy(graph));
}

/* A second stream joins by waiting for an event of the capture, and must be waited for in turn. */
static void forks(void **state) {
    (void)state;
    cudaGraph_t graph;
    enum cudaStreamCaptureStatus status;
    begin();
    ok(cudaEventRecord(T.e[0], T.s[0]));
    ok(cudaStreamWaitEvent(T.s[1], T.e[0], 0));
    ok(cudaStreamIsCapturing(T.s[1], &status));
    assert_int_equal(status, cudaStreamCaptureStatusActive);
    set(0, 1, T.s[1]);
    assert_int_equal(cudaStreamEndCapture(T.s[0], &graph), cudaErrorStreamCaptureUnjoined);
    assert_null(graph);
    ok(cudaStreamIsCapturing(T.s[1], &status));
    assert_int_equal(status, cudaStreamCaptureStatusNone);
    assert_int_equal(value(0), 0xff);

    begin();
    ok(cudaEventRecord(T.e[0], T.s[0]));
    ok(cudaStreamWaitEvent(T.s[1], T.e[0], 0));
    assert_int_equal(cudaStreamEndCapture(T.s[1], &graph), cudaErrorStreamCaptureUnmatched);
    end_invalid();

    begin();
    ok(cudaStreamBeginCapture(T.s[1], cudaStreamCaptureModeGlobal));
    ok(cudaEventRecord(T.e[0], T.s[0]));
    assert_int_equal(cudaStreamWaitEvent(T.s[1], T.e[0], 0), cudaErrorStreamCaptureMerge);
    assert_int_equal(cudaStreamEndCapture(T.s[1], &graph), cudaErrorStreamCaptureInvalidated);
    end_invalid();

    begin(); /* what was recorded in a capture means nothing after it */
    ok(cudaEventRecord(T.e[0], T.s[0]));
    ok(cudaStreamEndCapture(T.s[0], &graph));
    ok(cudaGraphDestroy(graph));
    assert_int_equal(cudaStreamWaitEvent(T.s[1], T.e[0], 0), cudaErrorCapturedEvent);
    assert_int_equal(cudaEventSynchronize(T.e[0]), cudaErrorCapturedEvent);
    ok(cudaEventRecord(T.e[0], T.s[0]));
    ok(cudaStreamWaitEvent(T.s[1], T.e[0], 0));
}

/* ---- graphs ---- */

/* 1 = 0 in one stream, 2 = 1 in another, 3 = 2 in the first again. */
static cudaGraphExec_t capture_chain(bool wait) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    begin();
    if (!wait) { /* the fork comes before what it should wait for */
        ok(cudaEventRecord(T.e[0], T.s[0]));
        copy(1, 0, T.s[0]);
    } else {
        copy(1, 0, T.s[0]);
        ok(cudaEventRecord(T.e[0], T.s[0]));
    }
    ok(cudaStreamWaitEvent(T.s[1], T.e[0], 0));
    copy(2, 1, T.s[1]);
    ok(cudaEventRecord(T.e[1], T.s[1]));
    ok(cudaStreamWaitEvent(T.s[0], T.e[1], 0));
    copy(3, 2, T.s[0]);
    ok(cudaStreamEndCapture(T.s[0], &graph));
    size_t nodes;
    ok(cudaGraphGetNodes(graph, NULL, &nodes));
    assert_int_equal(nodes, 3);
    ok(cudaGraphInstantiate(&exec, graph, 0));
    ok(cudaGraphDestroy(graph));
    return exec;
}

static void replay(void **state) {
    (void)state;
    cudaGraphExec_t chain = capture_chain(true);
    ok(cudaDeviceSynchronize());
    assert_int_equal(value(1), 0xff); /* nothing ran */
    ok(cudaGraphUpload(chain, T.s[2]));
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        emulator_seed(seed);
        for (int i = 1; i <= 3; i++) {
            set(0, (int)seed + i, T.s[2]);
            ok(cudaGraphLaunch(chain, T.s[2]));
            set(0, 99, T.s[2]);
            if (i == 2) { /* two launches without a wait in between */
                ok(cudaStreamSynchronize(T.s[2]));
                assert_int_equal(value(3), (int)seed + i);
                assert_int_equal(value(0), 99);
            }
        }
        ok(cudaStreamSynchronize(T.s[2]));
        assert_int_equal(value(3), (int)seed + 3);
    }
    ok(cudaGraphExecDestroy(chain));
}

static void missing_wait_in_a_graph_shows(void **state) {
    (void)state;
    cudaGraphExec_t chain = capture_chain(false);
    int wrong = 0;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        emulator_seed(seed);
        set(0, (int)seed, T.s[2]);
        ok(cudaGraphLaunch(chain, T.s[2]));
        ok(cudaStreamSynchronize(T.s[2]));
        wrong += value(3) != (int)seed;
    }
    assert_true(wrong > 0);
    ok(cudaGraphExecDestroy(chain));
}

/* A graph can tell the outside how far it is, and wait for the outside. */
static void external_events(void **state) {
    (void)state;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    begin();
    copy(1, 0, T.s[0]);
    ok(cudaEventRecordWithFlags(T.e[0], T.s[0], cudaEventRecordExternal));
    ok(cudaStreamWaitEvent(T.s[0], T.e[1], cudaEventWaitExternal));
    copy(2, 1, T.s[0]);
    ok(cudaStreamEndCapture(T.s[0], &graph));
    ok(cudaGraphInstantiate(&exec, graph, 0));
    ok(cudaGraphDestroy(graph));
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        emulator_seed(seed);
        set(0, 10 + (int)seed, T.s[0]);
        set(3, 0, T.s[1]);
        ok(cudaStreamSynchronize(T.s[1]));
        set(3, 20 + (int)seed, T.s[1]);
        ok(cudaEventRecord(T.e[1], T.s[1]));
        ok(cudaGraphLaunch(exec, T.s[0]));
        ok(cudaStreamWaitEvent(T.s[2], T.e[0], 0));
        copy(3, 1, T.s[2]); /* after the graph's first copy, which does not wait for T.s[1] */
        ok(cudaEventSynchronize(T.e[0]));
        assert_int_equal(value(1), 10 + (int)seed);
        ok(cudaStreamSynchronize(T.s[0]));
        ok(cudaEventQuery(T.e[1])); /* the graph has waited for it */
        assert_int_equal(value(2), 10 + (int)seed);
        ok(cudaStreamSynchronize(T.s[2]));
        ok(cudaDeviceSynchronize());
    }
    ok(cudaGraphExecDestroy(exec));
}

/* ---- the GPU as a thread ---- */

/* In a process of its own, as there is no way back. */
static void go_on_in_background(int seed) {
    emulator_seed((uint64_t)seed);
    emulator_background(200);
    alarm(60);
    set_up(NULL);
    cudaGraphExec_t chain = capture_chain(true);
    for (int i = 0; i < 100; i++) {
        set(0, i, T.s[2]);
        ok(cudaGraphLaunch(chain, T.s[2]));
        ok(cudaEventRecord(T.e[2], T.s[2]));
        ok(cudaStreamWaitEvent(T.s[1], T.e[2], 0));
        copy(1, 3, T.s[1]);
        ok(cudaEventRecord(T.e[1], T.s[1]));
        while (i % 3 == 0 && cudaEventQuery(T.e[1]) == cudaErrorNotReady)
            usleep(10);
        ok(cudaStreamSynchronize(T.s[1]));
        assert_int_equal(value(1), i);
    }
    ok(cudaGraphExecDestroy(chain));
    tear_down(NULL);
    fprintf(stderr, "all well\n");
    abort(); /* which is what expect_death wants to see */
}

static void background(void **state) {
    (void)state;
    for (int seed = 0; seed < 4; seed++)
        expect_death(go_on_in_background, seed, "all well");
}

int main(void) {
#define test(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        test(one_stream),
        test(events_order_streams),
        test(missing_waits_show),
        test(waits_for_the_latest_record),
        test(never_recorded),
        test(queries),
        test(lazy_and_eager),
        test(legacy_stream),
        test(destroyed_too_early),
        test(calls_that_end_a_capture),
        test(modes),
        test(legacy_stream_during_capture),
        test(forks),
        test(replay),
        test(missing_wait_in_a_graph_shows),
        test(external_events),
    };
    /* First, as the queue must not have been used before. */
    const struct CMUnitTest alone[] = {cmocka_unit_test(background)};
    int failed = cmocka_run_group_tests_name("background", alone, NULL, NULL);
    return failed + cmocka_run_group_tests_name("streams", tests, NULL, NULL);
}
