/* Sequences of operations captured as CUDA graphs, numbered 0 to GRAPHS - 1.
 *
 * The first time a sequence is queued operation by operation: libraries choose algorithms and connect then.
 * The second time it is captured, and from then on replayed. Where the driver cannot capture or instantiate
 * it, graphs are turned off with a line on stderr; a library that does not support capture ends the program
 * with a message. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

struct graph {
    bool ran;             /* once, uncaptured */
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

/* From here on, operations are queued one by one. */
static void disable_graphs(struct device *dev, cudaError_t why) {
    fprintf(stderr,
            "CUDA graphs cannot be used here (%s): operations are queued one by one; system.graph = off "
            "does so from the start\n",
            cudaGetErrorName(why));
    cudaGetLastError();
    graphs_free(dev->graphs);
    dev->graphs = NULL;
}

void cuda_graph_begin(struct device *dev, int id) {
    if (!dev->graphs || !dev->graphs[id].ran)
        return;
    /* Thread-local: calls of the checkpoint thread must not end up in the graph or invalidate it. */
    cudaError_t status = cudaStreamBeginCapture(dev->stream, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess)
        disable_graphs(dev, status);
}

bool cuda_graph_end(struct device *dev, int id) {
    cudaGraph_t graph = NULL;
    if (!dev->graphs)
        return true;
    if (!dev->graphs[id].ran) {
        dev->graphs[id].ran = true;
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
    disable_graphs(dev, status);
    return false;
}
