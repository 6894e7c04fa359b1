/* Capture of streams into graphs, and graphs: the rules of the CUDA runtime.
 *
 * Stricter than CUDA: an event that was never recorded cannot be waited for in a capture (like one recorded
 * outside), and during a capture in global mode no thread may query or wait for an event. A launched graph
 * keeps the order of each captured stream and of its events and no other: the rest runs in any order. A
 * graph's collectives run in the order in which they were captured. */
#include "tests/cuda/emulator/queue.h"

#include <algorithm>

struct CUgraphExec_st {
    std::vector<emulator_node> nodes;
    work last; /* of its latest launch */
};

static uint64_t captures; /* ever begun */
static int64_t launches;
static const char *refused = "";
static std::vector<emulator_capture *> &active = *new std::vector<emulator_capture *>();

/* ---- capture ---- */

cudaError_t emulator_capture_failed(emulator_capture *c, cudaError_t error) {
    c->invalid = true;
    return emulator_error(error);
}

cudaError_t emulator_check_unsafe() {
    cudaError_t error = cudaSuccess;
    for (emulator_capture *c : active)
        if (c->mode == cudaStreamCaptureModeGlobal ||
            (c->mode == cudaStreamCaptureModeThreadLocal && pthread_equal(c->thread, pthread_self())))
            error = emulator_capture_failed(c, cudaErrorStreamCaptureUnsupported);
    return error;
}

cudaError_t emulator_check_waits_for_all() {
    cudaError_t error = cudaSuccess;
    for (emulator_capture *c : active)
        error = emulator_capture_failed(c, cudaErrorStreamCaptureUnsupported);
    return error;
}

cudaError_t emulator_capture_node(cudaStream_t s, emulator_node node) {
    if (s->capture->invalid)
        return emulator_error(cudaErrorStreamCaptureInvalidated);
    std::vector<emulator_node> &nodes = s->capture->graph->nodes;
    node.after = s->last_nodes;
    s->last_nodes = {(int)nodes.size()};
    nodes.push_back(std::move(node));
    return cudaSuccess;
}

static void join(cudaStream_t s, const std::vector<int> &nodes) {
    for (int n : nodes)
        if (std::find(s->last_nodes.begin(), s->last_nodes.end(), n) == s->last_nodes.end())
            s->last_nodes.push_back(n);
}

/* The capture in which the event was recorded, if it has not ended. */
static emulator_capture *capture_of(cudaEvent_t e) {
    for (emulator_capture *c : active)
        if (c->number == e->capture)
            return c;
    return nullptr;
}

cudaError_t emulator_captured_event(cudaEvent_t e) {
    emulator_capture *from = capture_of(e);
    return from ? emulator_capture_failed(from, cudaErrorCapturedEvent)
                : emulator_error(cudaErrorCapturedEvent);
}

cudaError_t emulator_capture_wait(cudaStream_t s, cudaEvent_t e, unsigned flags) {
    emulator_capture *from = capture_of(e);
    if (s->capture && s->capture->invalid)
        return emulator_error(cudaErrorStreamCaptureInvalidated);
    if (s->capture && flags & cudaEventWaitExternal)
        return emulator_capture_node(s, {{}, nullptr, nullptr, e, {}});
    if (s->capture && !e->capture)
        return emulator_capture_failed(s->capture, cudaErrorStreamCaptureIsolation);
    if (s->capture && !from)
        return emulator_capture_failed(s->capture, cudaErrorCapturedEvent);
    if (s->capture && from != s->capture) {
        emulator_capture_failed(from, cudaErrorStreamCaptureMerge);
        return emulator_capture_failed(s->capture, cudaErrorStreamCaptureMerge);
    }
    if (!from || s == emulator_stream(nullptr))
        return emulator_captured_event(e);
    if (from->invalid)
        return emulator_error(cudaErrorStreamCaptureInvalidated);
    s->capture = from; /* waiting for a captured event makes the stream part of the capture */
    join(s, e->captured_nodes);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    emulator_lock lock;
    cudaStream_t s = emulator_stream(stream);
    if (s == emulator_stream(nullptr) || strcmp(refused, "begin") == 0)
        return emulator_error(cudaErrorStreamCaptureUnsupported);
    if (s->capture)
        return emulator_error(cudaErrorIllegalState);
    s->capture = new emulator_capture{++captures, new CUgraph_st(), s, mode, pthread_self(), false};
    s->last_nodes.clear();
    active.push_back(s->capture);
    return cudaSuccess;
}

/* Whether the last nodes of the stream in which the capture began depend on all other nodes. */
static bool joined(const CUgraph_st &graph, const std::vector<int> &last) {
    std::vector<bool> seen(graph.nodes.size());
    std::vector<int> open = last;
    size_t count = 0;
    while (!open.empty()) {
        size_t n = (size_t)open.back();
        open.pop_back();
        if (seen[n])
            continue;
        seen[n] = true;
        count++;
        open.insert(open.end(), graph.nodes[n].after.begin(), graph.nodes[n].after.end());
    }
    return count == graph.nodes.size();
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    emulator_lock lock;
    cudaStream_t s = emulator_stream(stream);
    emulator_capture *c = s->capture;
    *graph = nullptr;
    if (!c)
        return emulator_error(cudaErrorIllegalState);
    if (c->origin != s)
        return emulator_capture_failed(c, cudaErrorStreamCaptureUnmatched);
    if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self()))
        return emulator_capture_failed(c, cudaErrorStreamCaptureWrongThread);
    cudaError_t error = c->invalid                          ? cudaErrorStreamCaptureInvalidated
                        : !joined(*c->graph, s->last_nodes) ? cudaErrorStreamCaptureUnjoined
                        : strcmp(refused, "end") == 0       ? cudaErrorStreamCaptureUnsupported
                                                            : cudaSuccess;
    for (cudaStream_t other : emulator_streams())
        if (other->capture == c) {
            other->capture = nullptr;
            other->last_nodes.clear();
        }
    active.erase(std::find(active.begin(), active.end(), c));
    if (error == cudaSuccess)
        *graph = c->graph;
    else
        delete c->graph;
    delete c;
    return emulator_error(error);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    emulator_lock lock;
    emulator_capture *c = emulator_stream(stream)->capture;
    *status = !c           ? cudaStreamCaptureStatusNone
              : c->invalid ? cudaStreamCaptureStatusInvalidated
                           : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
    if (!graph)
        return emulator_error(cudaErrorInvalidValue);
    if (strcmp(refused, "instantiate") == 0)
        return emulator_error(cudaErrorNotSupported);
    emulator_lock lock;
    for (const emulator_node &node : graph->nodes)
        if (node.chain)
            node.chain->in_graphs++;
    *out = new CUgraphExec_st{graph->nodes, nullptr};
    return cudaSuccess;
}

int emulator_chain_in_graphs(const emulator_chain *chain) {
    emulator_lock lock;
    return chain->in_graphs;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (nodes)
        return emulator_error(cudaErrorNotSupported);
    *count = graph->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    emulator_lock lock;
    for (const emulator_node &node : exec->nodes)
        if (node.chain)
            node.chain->in_graphs--;
    delete exec; /* a running launch has copies of its nodes */
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    emulator_lock lock;
    cudaStream_t s = emulator_stream(stream);
    if (s->capture) /* graphs within graphs are not supported */
        return emulator_capture_failed(s->capture, cudaErrorNotSupported);
    cudaError_t error = emulator_check_legacy(s);
    if (error != cudaSuccess)
        return error;
    launches++;
    std::vector<work> before = emulator_dependencies(s), all;
    before.push_back(exec->last);
    work begin = emulator_add_work({}, before);
    for (const emulator_node &node : exec->nodes) {
        std::vector<work> after = {begin};
        for (int n : node.after)
            after.push_back(all[(size_t)n]);
        if (node.chain)
            after.push_back(node.chain->last);
        if (node.wait)
            after.push_back(emulator_event(node.wait)->recorded);
        all.push_back(emulator_add_work(node.run, after));
        if (node.chain)
            node.chain->last = all.back();
        if (node.record) {
            emulator_event(node.record)->recorded = all.back();
            node.record->capture = 0;
        }
    }
    all.push_back(begin);
    exec->last = s->tail = emulator_add_work({}, all);
    emulator_run_some(lock);
    return cudaSuccess;
}

int64_t emulator_graph_launches(void) {
    emulator_lock lock;
    return launches;
}

bool emulator_refuses(const char *what) {
    return strcmp(refused, what) == 0;
}

void emulator_refuse_graphs(const char *what) {
    refused = what ? what : "";
}
