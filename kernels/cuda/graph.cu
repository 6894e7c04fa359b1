/* Runs of operations kept as CUDA graphs.
 *
 * The first time a run is queued as it is: libraries choose and connect then. The second time it is captured,
 * and from then on replayed. Where the driver cannot capture or keep it, it is queued operation by operation
 * for good, and a line says so; a library that refuses to be captured ends the program, with advice. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

struct graph {
    bool seen;
    cudaGraphExec_t exec; /* NULL: not captured yet */
};

struct graph *graphs_create(void) {
    return (struct graph *)calloc(GRAPHS, sizeof(struct graph));
}

void graphs_free(struct graph *graphs) {
    for (int id = 0; graphs && id < GRAPHS; id++)
        if (graphs[id].exec)
            cuda_check(cudaGraphExecDestroy(graphs[id].exec));
    free(graphs);
}

bool cuda_graph_replay(struct device *dev, int id) {
    if (!dev->graphs || !dev->graphs[id].exec)
        return false;
    cuda_check(cudaGraphLaunch(dev->graphs[id].exec, dev->stream));
    return true;
}

/* For good: without them from here on. */
static void do_without(struct device *dev, cudaError_t why) {
    fprintf(stderr,
            "CUDA graphs cannot be used here (%s): operations are queued one by one; system.graph = off "
            "does so from the start\n",
            cudaGetErrorName(why));
    cudaGetLastError();
    graphs_free(dev->graphs);
    dev->graphs = NULL;
}

void cuda_graph_begin(struct device *dev, int id) {
    if (!dev->graphs || !dev->graphs[id].seen)
        return;
    /* Of this thread: what the thread that saves does meanwhile is no part of it. */
    cudaError_t status = cudaStreamBeginCapture(dev->stream, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess)
        do_without(dev, status);
}

bool cuda_graph_end(struct device *dev, int id) {
    cudaGraph_t graph = NULL;
    if (!dev->graphs)
        return true;
    if (!dev->graphs[id].seen) {
        dev->graphs[id].seen = true;
        return true;
    }
    cudaError_t status = cudaStreamEndCapture(dev->stream, &graph);
    if (status == cudaSuccess)
        status = cudaGraphInstantiate(&dev->graphs[id].exec, graph, 0);
    if (graph)
        cuda_check(cudaGraphDestroy(graph));
    if (status == cudaSuccess) {
        cuda_check(cudaGraphLaunch(dev->graphs[id].exec, dev->stream));
        return true;
    }
    do_without(dev, status);
    return false;
}
