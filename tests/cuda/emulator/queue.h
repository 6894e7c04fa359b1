/* The queue of the emulated GPU: work, and the work that it has to run after. Streams (streams.cc) and graphs
 * (graphs.cc) add work to it; queue.cc runs it.
 *
 * Functions here are called with the emulator's lock held (struct emulator_lock); the work itself runs
 * without it. */
#ifndef IHA_TESTS_CUDA_EMULATOR_QUEUE_H
#define IHA_TESTS_CUDA_EMULATOR_QUEUE_H

#include "tests/cuda/emulator/internal.h"

#include <memory>
#include <mutex>

/* ---- work ---- */

struct emulator_work {
    uint64_t number;   /* in the order of queueing */
    emulator_step run; /* empty: a point in a stream, done as soon as all of `after` is */
    std::vector<std::shared_ptr<emulator_work>> after, then; /* dependencies and dependents; until done */
    int missing;                                             /* of `after`, those not done */
    bool done, started, needed /* the host waits for it */;
    double done_at; /* seconds */
};
typedef std::shared_ptr<emulator_work> work;

extern std::mutex emulator_mutex;

struct emulator_lock : std::unique_lock<std::mutex> {
    emulator_lock() : std::unique_lock<std::mutex>(emulator_mutex) {}
};

/* Queue work to run when all of `after` (nulls and finished work do not count) is done. */
work emulator_add_work(emulator_step run, const std::vector<work> &after);

/* Nulls count as done. */
bool emulator_done(const work &w);

/* Wait until w, or everything, is done. */
void emulator_wait_for(emulator_lock &lock, const work &w);
void emulator_wait_for_all(emulator_lock &lock);

/* Whether w is done. After answering, this may run some work, so that polling ends. */
bool emulator_poll(emulator_lock &lock, const work &w);

/* Wait while the queue is full (emulator_limit_queue). */
void emulator_wait_for_space(emulator_lock &lock);

/* Called after something was queued: odd seeds may run some of it. */
void emulator_run_some(emulator_lock &lock);

/* An error of a call, kept for cudaGetLastError. */
cudaError_t emulator_error(cudaError_t error);

/* ---- streams, events, graphs ---- */

struct emulator_capture;

struct CUstream_st {
    bool blocking; /* waits for the legacy stream, and it for this one */
    int priority;
    work tail;                   /* the last work queued */
    emulator_capture *capture;   /* what it is captured by, or NULL */
    std::vector<int> last_nodes; /* of the capture: what its next node depends on */
};

struct CUevent_st {
    work recorded;                   /* NULL: never */
    uint64_t capture;                /* the number of the capture it was last recorded in, or 0 */
    std::vector<int> captured_nodes; /* the nodes that it stands for there */
};

/* A node of a graph: work, or an event that is recorded or waited for when the graph runs. */
struct emulator_node {
    emulator_step run;
    emulator_chain *chain;
    cudaEvent_t record, wait;
    std::vector<int> after;
};

struct CUgraph_st {
    std::vector<emulator_node> nodes; /* each depends on earlier ones only */
};

struct emulator_capture {
    uint64_t number;
    cudaGraph_t graph;
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    pthread_t thread;
    bool invalid;
};

/* The stream of a handle; NULL is the legacy stream. Aborts if the handle is not valid. */
cudaStream_t emulator_stream(cudaStream_t handle);
cudaEvent_t emulator_event(cudaEvent_t handle);

/* Streams alive, the legacy one included. */
const std::vector<cudaStream_t> &emulator_streams();

/* What new work in a stream depends on: its tail, and what the legacy stream's rules add. */
std::vector<work> emulator_dependencies(cudaStream_t stream);

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

/* Whether emulator_refuse_graphs() has named this. */
bool emulator_refuses(const char *what);

/* cudaErrorStreamCaptureUnsupported, with the captures invalidated, if a capture's mode forbids this thread
 * calls that cannot be captured. */
cudaError_t emulator_check_unsafe();

/* The same for calls that wait for all streams, which no mode allows. */
cudaError_t emulator_check_waits_for_all();

#endif
