/* cuDNN's fused attention behind plain C functions on raw pointers. What implements them,
 * attention_cudnn.cpp, is the one file that knows cuDNN, and is left out of builds without it: then these
 * functions are NULL.
 *
 * Shapes: q, k, v, o and their gradients are bf16 [B,S,H,d] with any strides but d's, which is 1, each at a
 * multiple of 16 bytes; `statistics` is the log-sum-exp of each query's scores, float [B,H,S]. Forward and
 * backward are two graphs, built by the plan and kept until close: the calls after it allocate no device
 * memory. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_CUDNN_H
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_CUDNN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cudnn_attention; /* a handle of the library, and the graphs built so far */

struct cudnn_attention_shape {
    int64_t batch, length, heads, head_dim;
    int64_t window;     /* with causal: how many keys a query sees, its own included; 0: all before it */
    bool causal;        /* query s sees keys up to s */
    bool deterministic; /* backward gives the same bits in every run */
    double scale;       /* of the scores */
};

/* Strides in elements. */
struct cudnn_attention_strides {
    int64_t batch, token, head;
};

struct cudnn_attention_layout {
    struct cudnn_attention_strides q, k, v, o, d_o, dq, dk, dv;
};

enum { CUDNN_ATTENTION_REASON = 256 };

/* NULL, and why, when the library does not start. */
__attribute__((weak)) struct cudnn_attention *cudnn_attention_open(cudaStream_t stream,
                                                                   char why[CUDNN_ATTENTION_REASON]);
/* The same for a GPU that is not there, described by cuDNN's JSON of a device's properties: plans are made,
 * with the kernels compiled and the workspaces of that GPU, and can't run. */
__attribute__((weak)) struct cudnn_attention *
cudnn_attention_open_described(const char *json, char why[CUDNN_ATTENTION_REASON]);
__attribute__((weak)) void cudnn_attention_close(struct cudnn_attention *);

/* Build one direction's graph, unless it is there: a second or so. 0, with the bytes it needs as workspace;
 * or -1 and why, when the library does not support it. Forward looks at the layout of q, k, v and o alone. */
__attribute__((weak)) int cudnn_attention_plan(struct cudnn_attention *, const struct cudnn_attention_shape *,
                                               const struct cudnn_attention_layout *, bool backward,
                                               size_t *workspace, char why[CUDNN_ATTENTION_REASON]);

/* Queue one direction of what was planned. 0, or -1 and why. */
__attribute__((weak)) int cudnn_attention_forward(struct cudnn_attention *,
                                                  const struct cudnn_attention_shape *,
                                                  const struct cudnn_attention_layout *, const void *q,
                                                  const void *k, const void *v, void *o, void *statistics,
                                                  void *workspace, char why[CUDNN_ATTENTION_REASON]);
__attribute__((weak)) int
cudnn_attention_backward(struct cudnn_attention *, const struct cudnn_attention_shape *,
                         const struct cudnn_attention_layout *, const void *q, const void *k, const void *v,
                         const void *o, const void *d_o, const void *statistics, void *dq, void *dk, void *dv,
                         void *workspace, char why[CUDNN_ATTENTION_REASON]);

/* The library's version as it numbers itself: 91900 is 9.19.0. */
__attribute__((weak)) size_t cudnn_attention_version(void);

#ifdef __cplusplus
}
#endif
#endif
