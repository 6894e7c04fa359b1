/* Whether launches may overlap (programmatic dependent launch): on Hopper and later, where the code was
 * compiled for that and a driver accepts such launches, also in CUDA graphs. IHA_OVERLAP=off in the
 * environment turns it off. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.cuh"

static __global__ void nothing() {
    wait_for_previous();
}

/* Code for an older architecture has no instruction to wait with. */
static bool compiled_with_wait() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, (const void *)nothing) == cudaSuccess &&
           attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
}

static cudaError_t two_launches(cudaStream_t stream) {
    cudaError_t status = try_launch<nothing>(stream, true, 1, 1, 0);
    return status == cudaSuccess ? try_launch<nothing>(stream, true, 1, 1, 0) : status;
}

/* Two launches as a graph, which is not run. */
static cudaError_t try_graph(cudaStream_t stream) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    cudaError_t status = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess)
        return status;
    status = two_launches(stream);
    cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    if (status == cudaSuccess)
        status = ended;
    if (status == cudaSuccess)
        status = cudaGraphInstantiate(&exec, graph, 0);
    if (exec)
        cuda_check(cudaGraphExecDestroy(exec));
    if (graph)
        cuda_check(cudaGraphDestroy(graph));
    return status;
}

bool cuda_launches_can_overlap(const struct device *dev, int major, bool graphs) {
    const char *wanted = getenv("IHA_OVERLAP");
    if (major < 9 || (wanted && strcmp(wanted, "off") == 0) || !compiled_with_wait())
        return false;
    bool works = two_launches(dev->stream) == cudaSuccess &&
                 cudaStreamSynchronize(dev->stream) == cudaSuccess &&
                 (!graphs || try_graph(dev->stream) == cudaSuccess);
    cudaGetLastError(); /* a refusal is no error */
    return works;
}
