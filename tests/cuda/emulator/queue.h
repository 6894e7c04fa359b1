/* The queue of the harness's GPU: work, and what it has to come after. Streams (emulator_streams.cc) and graphs
 * (emulator_graphs.cc) put work into it; emulator_queue.cc runs it.
 *
 * Functions here are called with the harness's lock held, which a emulator_lock takes; the work itself runs
 * without it. */
#ifndef IHA_TESTS_CUDA_EMULATOR_QUEUE_H
#define IHA_TESTS_CUDA_EMULATOR_QUEUE_H

#include "tests/cuda/emulator/internal.h"

#include <memory>
#include <mutex>

/* ---- work ---- */

struct emulator_work {
    uint64_t number;   /* in the order of queueing */
    emulator_step run; /* empty: a mark in a stream, done as soon as what it comes after is */
    std::vector<std::shared_ptr<emulator_work>> after, then; /* until done */
    int missing;                                             /* of `after`, those not done */
    bool done, started, needed /* by a host that waits */;
    double done_at; /* seconds */
};
typedef std::shared_ptr<emulator_work> work;

extern std::mutex emulator_mutex;

struct emulator_lock : std::unique_lock<std::mutex> {
    emulator_lock() : std::unique_lock<std::mutex>(emulator_mutex) {}
};

/* Queue work to run when all of `after` (nulls and finished work do not count) is done. */
work emulator_add(emulator_step run, const std::vector<work> &after);

/* Nulls count as done. */
bool emulator_done(const work &w);

/* Return when w, or everything, is done. */
void emulator_force(emulator_lock &lock, const work &w);
void emulator_force_all(emulator_lock &lock);

/* The host asks whether w is done. It answers as things stand, and then a GPU may have gone on a little, so
 * that asking again and again comes to an end. */
bool emulator_poll(emulator_lock &lock, const work &w);

/* Wait until the queue takes more. */
void emulator_room(emulator_lock &lock);

/* Something was queued: seeds that are eager may run some of it. */
void emulator_queued(emulator_lock &lock);

/* An error of a call, kept for cudaGetLastError. */
cudaError_t emulator_error(cudaError_t error);

/* ---- streams, events, graphs ---- */

struct emulator_capture;

struct CUstream_st {
    bool blocking; /* waits for the legacy stream, and it for this one */
    int priority;
    work tail;                   /* the last work queued */
    emulator_capture *capture;   /* what it is captured by, or NULL */
    std::vector<int> last_nodes; /* of the capture: what its next node comes after */
};

struct CUevent_st {
    work recorded;                   /* NULL: never */
    uint64_t capture;                /* the number of the capture it was last recorded in, or 0 */
    std::vector<int> captured_nodes; /* there: what was recorded */
};

/* A node of a graph: work, or an event that is recorded or waited for when the graph runs. */
struct emulator_node {
    emulator_step run;
    emulator_chain *chain;
    cudaEvent_t record, wait;
    std::vector<int> after;
};

struct CUgraph_st {
    std::vector<emulator_node> nodes; /* each comes after earlier ones alone */
};

struct emulator_capture {
    uint64_t number;
    cudaGraph_t graph;
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    pthread_t thread;
    bool invalid;
};

/* The stream of a handle; NULL is the legacy stream. Aborts where there is none. */
cudaStream_t emulator_stream(cudaStream_t handle);
cudaEvent_t emulator_event(cudaEvent_t handle);

/* Streams alive, the legacy one included. */
const std::vector<cudaStream_t> &emulator_streams();

/* What new work in a stream comes after: its tail, and what the legacy stream makes it wait for. */
std::vector<work> emulator_before(cudaStream_t stream);

/* Add a node to the graph that captures the stream. */
cudaError_t emulator_capture_node(cudaStream_t stream, emulator_node node);

/* The legacy stream may not be used while a stream that it synchronizes with is captured. */
cudaError_t emulator_check_legacy(cudaStream_t stream);

/* cudaStreamWaitEvent where the stream is captured, or the event was recorded in a capture. */
cudaError_t emulator_capture_wait(cudaStream_t stream, cudaEvent_t event, unsigned flags);

/* cudaErrorCapturedEvent, for calls from outside the capture the event was recorded in. */
cudaError_t emulator_captured_event(cudaEvent_t event);

/* Invalidates the capture and returns the error. */
cudaError_t emulator_capture_failed(emulator_capture *capture, cudaError_t error);

/* cudaErrorStreamCaptureUnsupported, with the captures invalidated, where one forbids this thread calls that
 * a graph does not see. */
cudaError_t emulator_check_unsafe();

/* The same for calls that wait for everything, which no mode allows. */
cudaError_t emulator_check_waits_for_all();

#endif
