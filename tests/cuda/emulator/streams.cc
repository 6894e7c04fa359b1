/* Streams and events of the CUDA runtime: a stream is a chain of work, an event a point in one. */
#include "tests/cuda/emulator/queue.h"

#include <algorithm>

static struct handles {
    cudaStream_t legacy;
    std::vector<cudaStream_t> streams;
    std::vector<cudaEvent_t> events;
} &H = *new struct handles();

static cudaError_t last_error = cudaSuccess;

cudaError_t emulator_error(cudaError_t error) {
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

cudaError_t cudaGetLastError() {
    emulator_lock lock;
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() {
    emulator_lock lock;
    return last_error;
}

/* ---- streams ---- */

static cudaStream_t create_stream(bool blocking, int priority) {
    cudaStream_t s = new CUstream_st();
    s->blocking = blocking;
    s->priority = priority;
    H.streams.push_back(s);
    return s;
}

const std::vector<cudaStream_t> &emulator_streams() {
    if (!H.legacy)
        H.legacy = create_stream(false, 0);
    return H.streams;
}

cudaStream_t emulator_stream(cudaStream_t handle) {
    const auto &alive = emulator_streams();
    if (!handle || handle == cudaStreamLegacy)
        return H.legacy;
    if (std::find(alive.begin(), alive.end(), handle) == alive.end())
        emulator_fail("%p is not a stream, or no longer one", (void *)handle);
    return handle;
}

std::vector<work> emulator_dependencies(cudaStream_t s) {
    std::vector<work> before = {s->tail};
    for (cudaStream_t other : emulator_streams())
        if ((s == H.legacy && other->blocking) || (other == H.legacy && s->blocking))
            before.push_back(other->tail);
    return before;
}

cudaError_t emulator_check_legacy(cudaStream_t s) {
    for (cudaStream_t other : emulator_streams())
        if (s == H.legacy && other->blocking && other->capture)
            return emulator_capture_failed(other->capture, cudaErrorStreamCaptureImplicit);
    return cudaSuccess;
}

cudaError_t emulator_enqueue_steps(cudaStream_t handle, emulator_step step, emulator_chain *chain) {
    emulator_lock lock;
    cudaStream_t s = emulator_stream(handle);
    if (s->capture)
        return emulator_capture_node(s, {std::move(step), chain, nullptr, nullptr, {}});
    cudaError_t error = emulator_check_legacy(s);
    if (error != cudaSuccess)
        return error;
    emulator_wait_for_space(lock);
    std::vector<work> before = emulator_dependencies(s);
    if (chain)
        before.push_back(chain->last);
    s->tail = emulator_add_work(std::move(step), before);
    if (chain)
        chain->last = s->tail;
    emulator_run_some(lock);
    return cudaSuccess;
}

cudaError_t emulator_enqueue(cudaStream_t stream, std::function<void()> run) {
    return emulator_enqueue_steps(
        stream,
        [run = std::move(run)] {
            run();
            return true;
        },
        nullptr);
}

void emulator_wait_chain(emulator_chain *chain) {
    emulator_lock lock;
    emulator_wait_for(lock, chain->last);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    emulator_lock lock;
    *stream = create_stream(!(flags & cudaStreamNonBlocking), priority);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

/* Stricter than CUDA, where pending work still completes: not waiting for it is most likely a mistake. */
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    emulator_lock lock;
    cudaStream_t s = emulator_stream(handle);
    if (s == H.legacy)
        return emulator_error(cudaErrorInvalidResourceHandle);
    if (s->capture)
        emulator_fail("cudaStreamDestroy of a stream that is being captured");
    if (!emulator_done(s->tail))
        emulator_fail("cudaStreamDestroy with work pending that nobody waited for");
    H.streams.erase(std::find(H.streams.begin(), H.streams.end(), s));
    delete s;
    return cudaSuccess;
}

/* The stream that a call queries or waits for, which must not be capturing. */
static cudaError_t waitable_stream(cudaStream_t handle, cudaStream_t *s) {
    *s = emulator_stream(handle);
    if ((*s)->capture)
        return emulator_capture_failed((*s)->capture, cudaErrorStreamCaptureUnsupported);
    return emulator_check_legacy(*s);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    emulator_lock lock;
    cudaStream_t s;
    cudaError_t error = waitable_stream(handle, &s);
    if (error != cudaSuccess)
        return error;
    for (const work &before : emulator_dependencies(s))
        emulator_wait_for(lock, before);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    emulator_lock lock;
    cudaStream_t s;
    cudaError_t error = waitable_stream(handle, &s);
    if (error != cudaSuccess)
        return error;
    for (const work &before : emulator_dependencies(s))
        if (!emulator_poll(lock, before))
            return emulator_error(cudaErrorNotReady);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    emulator_lock lock;
    cudaError_t error = emulator_check_waits_for_all();
    if (error == cudaSuccess)
        emulator_wait_for_all(lock);
    return error;
}

/* ---- events ---- */

cudaEvent_t emulator_event(cudaEvent_t handle) {
    if (std::find(H.events.begin(), H.events.end(), handle) == H.events.end())
        emulator_fail("%p is not an event, or no longer one", (void *)handle);
    return handle;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    emulator_lock lock;
    *event = new CUevent_st();
    H.events.push_back(*event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    emulator_lock lock;
    cudaEvent_t e = emulator_event(handle);
    if (!emulator_done(e->recorded))
        emulator_fail(
            "cudaEventDestroy of an event recorded after work that is pending, and nobody waited for it");
    H.events.erase(std::find(H.events.begin(), H.events.end(), e));
    delete e;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned flags) {
    emulator_lock lock;
    cudaStream_t s = emulator_stream(stream);
    cudaEvent_t e = emulator_event(handle);
    if (s->capture && flags & cudaEventRecordExternal)
        return emulator_capture_node(s, {{}, nullptr, e, nullptr, {}});
    if (s->capture) {
        if (s->capture->invalid)
            return emulator_error(cudaErrorStreamCaptureInvalidated);
        e->recorded = nullptr;
        e->capture = s->capture->number;
        e->captured_nodes = s->last_nodes;
        return cudaSuccess;
    }
    cudaError_t error = emulator_check_legacy(s);
    if (error != cudaSuccess)
        return error;
    e->capture = 0;
    e->recorded = s->tail = emulator_add_work({}, emulator_dependencies(s));
    emulator_run_some(lock);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned flags) {
    emulator_lock lock;
    cudaStream_t s = emulator_stream(stream);
    cudaEvent_t e = emulator_event(handle);
    if (s->capture || e->capture)
        return emulator_capture_wait(s, e, flags);
    cudaError_t error = emulator_check_legacy(s);
    if (error != cudaSuccess || emulator_done(e->recorded))
        return error;
    std::vector<work> before = emulator_dependencies(s);
    before.push_back(e->recorded);
    s->tail = emulator_add_work({}, before);
    emulator_run_some(lock);
    return cudaSuccess;
}

/* Whether a call may query or wait for the event: not if it was recorded in a capture. */
static cudaError_t check_event(cudaEvent_t e) {
    return e->capture ? emulator_captured_event(e) : emulator_check_unsafe();
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    emulator_lock lock;
    cudaEvent_t e = emulator_event(handle);
    cudaError_t error = check_event(e);
    if (error == cudaSuccess && !emulator_poll(lock, e->recorded))
        error = emulator_error(cudaErrorNotReady);
    return error;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    emulator_lock lock;
    cudaEvent_t e = emulator_event(handle);
    cudaError_t error = check_event(e);
    if (error == cudaSuccess)
        emulator_wait_for(lock, e->recorded);
    return error;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    emulator_lock lock;
    cudaEvent_t a = emulator_event(from), b = emulator_event(to);
    if (!a->recorded || !b->recorded)
        return emulator_error(cudaErrorInvalidResourceHandle);
    if (!emulator_done(a->recorded) || !emulator_done(b->recorded))
        return emulator_error(cudaErrorNotReady);
    *ms = (float)(1e3 * (b->recorded->done_at - a->recorded->done_at));
    return cudaSuccess;
}
