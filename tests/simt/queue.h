/* The queue of the harness's GPU: work, and what it has to come after. Streams (simt_streams.cc) and graphs
 * (simt_graphs.cc) put work into it; simt_queue.cc runs it.
 *
 * Functions here are called with the harness's lock held, which a simt_lock takes; the work itself runs
 * without it. */
#ifndef IHA_SIMT_QUEUE_H
#define IHA_SIMT_QUEUE_H

#include "tests/simt/internal.h"

#include <memory>
#include <mutex>

/* ---- work ------------------------------------------------------------------------------------------------
 */

struct simt_work {
    uint64_t number; /* in the order of queueing */
    simt_step run;   /* empty: a mark in a stream, done as soon as what it comes after is */
    std::vector<std::shared_ptr<simt_work>> after, then; /* until done */
    int missing;                                         /* of `after`, those not done */
    bool done, started, needed /* by a host that waits */;
    double done_at; /* seconds */
};
typedef std::shared_ptr<simt_work> work;

extern std::mutex simt_mutex;

struct simt_lock : std::unique_lock<std::mutex> {
    simt_lock() : std::unique_lock<std::mutex>(simt_mutex) {}
};

/* Queue work to run when all of `after` (nulls and finished work do not count) is done. */
work simt_add(simt_step run, const std::vector<work> &after);

/* Nulls count as done. */
bool simt_done(const work &w);

/* Return when w, or everything, is done. */
void simt_force(simt_lock &lock, const work &w);
void simt_force_all(simt_lock &lock);

/* The host asks whether w is done. It answers as things stand, and then a GPU may have gone on a little, so
 * that asking again and again comes to an end. */
bool simt_poll(simt_lock &lock, const work &w);

/* Wait until the queue takes more. */
void simt_room(simt_lock &lock);

/* Something was queued: seeds that are eager may run some of it. */
void simt_queued(simt_lock &lock);

/* An error of a call, kept for cudaGetLastError. */
cudaError_t simt_error(cudaError_t error);

/* ---- streams, events, graphs -----------------------------------------------------------------------------
 */

struct simt_capture;

struct CUstream_st {
    bool blocking; /* waits for the legacy stream, and it for this one */
    int priority;
    work tail;                   /* the last work queued */
    simt_capture *capture;       /* what it is captured by, or NULL */
    std::vector<int> last_nodes; /* of the capture: what its next node comes after */
};

struct CUevent_st {
    work recorded;                   /* NULL: never */
    uint64_t capture;                /* the number of the capture it was last recorded in, or 0 */
    std::vector<int> captured_nodes; /* there: what was recorded */
};

/* A node of a graph: work, or an event that is recorded or waited for when the graph runs. */
struct simt_node {
    simt_step run;
    simt_chain *chain;
    cudaEvent_t record, wait;
    std::vector<int> after;
};

struct CUgraph_st {
    std::vector<simt_node> nodes; /* each comes after earlier ones alone */
};

struct simt_capture {
    uint64_t number;
    cudaGraph_t graph;
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    pthread_t thread;
    bool invalid;
};

/* The stream of a handle; NULL is the legacy stream. Aborts where there is none. */
cudaStream_t simt_stream(cudaStream_t handle);
cudaEvent_t simt_event(cudaEvent_t handle);

/* Streams alive, the legacy one included. */
const std::vector<cudaStream_t> &simt_streams();

/* What new work in a stream comes after: its tail, and what the legacy stream makes it wait for. */
std::vector<work> simt_before(cudaStream_t stream);

/* Add a node to the graph that captures the stream. */
cudaError_t simt_capture_node(cudaStream_t stream, simt_node node);

/* The legacy stream may not be used while a stream that it synchronizes with is captured. */
cudaError_t simt_check_legacy(cudaStream_t stream);

/* cudaStreamWaitEvent where the stream is captured, or the event was recorded in a capture. */
cudaError_t simt_capture_wait(cudaStream_t stream, cudaEvent_t event, unsigned flags);

/* cudaErrorCapturedEvent, for calls from outside the capture the event was recorded in. */
cudaError_t simt_captured_event(cudaEvent_t event);

/* Invalidates the capture and returns the error. */
cudaError_t simt_capture_failed(simt_capture *capture, cudaError_t error);

/* cudaErrorStreamCaptureUnsupported, with the captures invalidated, where one forbids this thread calls that
 * a graph does not see. */
cudaError_t simt_check_unsafe();

/* The same for calls that wait for everything, which no mode allows. */
cudaError_t simt_check_waits_for_all();

#endif
