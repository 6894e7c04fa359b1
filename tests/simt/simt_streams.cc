/* Streams and events of the CUDA runtime: each stream is a chain of work, an event a place in one. */
#include "tests/simt/queue.h"

#include <algorithm>

static struct handles {
    cudaStream_t legacy;
    std::vector<cudaStream_t> streams;
    std::vector<cudaEvent_t> events;
} &H = *new struct handles();

static cudaError_t last_error = cudaSuccess;

cudaError_t simt_error(cudaError_t error) {
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

cudaError_t cudaGetLastError() {
    simt_lock lock;
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() {
    simt_lock lock;
    return last_error;
}

/* ---- streams ---------------------------------------------------------------------------------------------
 */

static cudaStream_t create_stream(bool blocking, int priority) {
    cudaStream_t s = new CUstream_st();
    s->blocking = blocking;
    s->priority = priority;
    H.streams.push_back(s);
    return s;
}

const std::vector<cudaStream_t> &simt_streams() {
    if (!H.legacy)
        H.legacy = create_stream(false, 0);
    return H.streams;
}

cudaStream_t simt_stream(cudaStream_t handle) {
    const auto &alive = simt_streams();
    if (!handle || handle == cudaStreamLegacy)
        return H.legacy;
    if (std::find(alive.begin(), alive.end(), handle) == alive.end())
        simt_fail("%p is not a stream, or no longer one", (void *)handle);
    return handle;
}

std::vector<work> simt_before(cudaStream_t s) {
    std::vector<work> before = {s->tail};
    for (cudaStream_t other : simt_streams())
        if ((s == H.legacy && other->blocking) || (other == H.legacy && s->blocking))
            before.push_back(other->tail);
    return before;
}

cudaError_t simt_check_legacy(cudaStream_t s) {
    for (cudaStream_t other : simt_streams())
        if (s == H.legacy && other->blocking && other->capture)
            return simt_capture_failed(other->capture, cudaErrorStreamCaptureImplicit);
    return cudaSuccess;
}

cudaError_t simt_enqueue_steps(cudaStream_t handle, simt_step step, simt_chain *chain) {
    simt_lock lock;
    cudaStream_t s = simt_stream(handle);
    if (s->capture)
        return simt_capture_node(s, {std::move(step), chain, nullptr, nullptr, {}});
    cudaError_t error = simt_check_legacy(s);
    if (error != cudaSuccess)
        return error;
    simt_room(lock);
    std::vector<work> before = simt_before(s);
    if (chain)
        before.push_back(chain->last);
    s->tail = simt_add(std::move(step), before);
    if (chain)
        chain->last = s->tail;
    simt_queued(lock);
    return cudaSuccess;
}

cudaError_t simt_enqueue(cudaStream_t stream, std::function<void()> run) {
    return simt_enqueue_steps(
        stream,
        [run = std::move(run)] {
            run();
            return true;
        },
        nullptr);
}

void simt_wait_chain(simt_chain *chain) {
    simt_lock lock;
    simt_force(lock, chain->last);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    simt_lock lock;
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

/* CUDA lets what is pending end by itself; whoever does not wait for it here most likely forgot to. */
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    simt_lock lock;
    cudaStream_t s = simt_stream(handle);
    if (s == H.legacy)
        return simt_error(cudaErrorInvalidResourceHandle);
    if (s->capture)
        simt_fail("cudaStreamDestroy of a stream that is being captured");
    if (!simt_done(s->tail))
        simt_fail("cudaStreamDestroy with work pending that nobody waited for");
    H.streams.erase(std::find(H.streams.begin(), H.streams.end(), s));
    delete s;
    return cudaSuccess;
}

/* The stream whose work a call asks about or waits for: not one that is being captured. */
static cudaError_t waitable(cudaStream_t handle, cudaStream_t *s) {
    *s = simt_stream(handle);
    if ((*s)->capture)
        return simt_capture_failed((*s)->capture, cudaErrorStreamCaptureUnsupported);
    return simt_check_legacy(*s);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    simt_lock lock;
    cudaStream_t s;
    cudaError_t error = waitable(handle, &s);
    if (error != cudaSuccess)
        return error;
    for (const work &before : simt_before(s))
        simt_force(lock, before);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    simt_lock lock;
    cudaStream_t s;
    cudaError_t error = waitable(handle, &s);
    if (error != cudaSuccess)
        return error;
    for (const work &before : simt_before(s))
        if (!simt_poll(lock, before))
            return simt_error(cudaErrorNotReady);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    simt_lock lock;
    cudaError_t error = simt_check_waits_for_all();
    if (error == cudaSuccess)
        simt_force_all(lock);
    return error;
}

/* ---- events ----------------------------------------------------------------------------------------------
 */

cudaEvent_t simt_event(cudaEvent_t handle) {
    if (std::find(H.events.begin(), H.events.end(), handle) == H.events.end())
        simt_fail("%p is not an event, or no longer one", (void *)handle);
    return handle;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    simt_lock lock;
    *event = new CUevent_st();
    H.events.push_back(*event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    simt_lock lock;
    cudaEvent_t e = simt_event(handle);
    if (!simt_done(e->recorded))
        simt_fail(
            "cudaEventDestroy of an event recorded after work that is pending, and nobody waited for it");
    H.events.erase(std::find(H.events.begin(), H.events.end(), e));
    delete e;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned flags) {
    simt_lock lock;
    cudaStream_t s = simt_stream(stream);
    cudaEvent_t e = simt_event(handle);
    if (s->capture && flags & cudaEventRecordExternal)
        return simt_capture_node(s, {{}, nullptr, e, nullptr, {}});
    if (s->capture) {
        if (s->capture->invalid)
            return simt_error(cudaErrorStreamCaptureInvalidated);
        e->recorded = nullptr;
        e->capture = s->capture->number;
        e->captured_nodes = s->last_nodes;
        return cudaSuccess;
    }
    cudaError_t error = simt_check_legacy(s);
    if (error != cudaSuccess)
        return error;
    e->capture = 0;
    e->recorded = s->tail = simt_add({}, simt_before(s));
    simt_queued(lock);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned flags) {
    simt_lock lock;
    cudaStream_t s = simt_stream(stream);
    cudaEvent_t e = simt_event(handle);
    if (s->capture || e->capture)
        return simt_capture_wait(s, e, flags);
    cudaError_t error = simt_check_legacy(s);
    if (error != cudaSuccess || simt_done(e->recorded))
        return error;
    std::vector<work> before = simt_before(s);
    before.push_back(e->recorded);
    s->tail = simt_add({}, before);
    simt_queued(lock);
    return cudaSuccess;
}

/* The event that a call asks about or waits for: not one recorded in a capture. */
static cudaError_t known(cudaEvent_t e) {
    return e->capture ? simt_captured_event(e) : simt_check_unsafe();
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    simt_lock lock;
    cudaEvent_t e = simt_event(handle);
    cudaError_t error = known(e);
    if (error == cudaSuccess && !simt_poll(lock, e->recorded))
        error = simt_error(cudaErrorNotReady);
    return error;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    simt_lock lock;
    cudaEvent_t e = simt_event(handle);
    cudaError_t error = known(e);
    if (error == cudaSuccess)
        simt_force(lock, e->recorded);
    return error;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    simt_lock lock;
    cudaEvent_t a = simt_event(from), b = simt_event(to);
    if (!a->recorded || !b->recorded)
        return simt_error(cudaErrorInvalidResourceHandle);
    if (!simt_done(a->recorded) || !simt_done(b->recorded))
        return simt_error(cudaErrorNotReady);
    *ms = (float)(1e3 * (b->recorded->done_at - a->recorded->done_at));
    return cudaSuccess;
}
