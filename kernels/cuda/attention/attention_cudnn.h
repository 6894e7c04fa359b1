/* cuDNN's fused attention behind plain C functions on raw pointers. attention_cudnn.cpp implements them and
 * is the only file that uses cuDNN. Builds without cuDNN leave it out; these weak functions are then NULL.
 *
 * Shapes: q, k, v, o and their gradients are bf16 [B,S,H,d], k and v with kv_heads heads, with any strides but d's,
 * which is 1, each at a multiple of 16 bytes; `statistics` is the log-sum-exp of each query's scores, float [B,H,S].
 * Forward and backward are two cuDNN graphs, built by the plan and kept until close; running them allocates no
 * device memory. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_CUDNN_H
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_CUDNN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

struct attention_cudnn; /* a handle of the library, and the graphs built so far */

struct attention_cudnn_shape {
    int64_t batch, length, heads, head_dim;
    int64_t window;     /* with causal: keys that a query sees, its own position included; 0: no limit */
    bool causal;        /* query s sees keys up to s */
    bool deterministic; /* backward is bit-identical from run to run */
    double scale;       /* of the scores */
    int64_t kv_heads;   /* of k and v, a divisor of heads */
};

/* Strides in elements. */
struct attention_cudnn_strides {
    int64_t batch, token, head;
};

struct attention_cudnn_layout {
    struct attention_cudnn_strides q, k, v, o, d_o, dq, dk, dv;
};

enum { ATTENTION_CUDNN_REASON = 256 };

/* NULL, and why, when cuDNN cannot be initialized. */
__attribute__((weak)) struct attention_cudnn *attention_cudnn_open(cudaStream_t stream,
                                                                   char why[ATTENTION_CUDNN_REASON]);
/* The same without a device (cuDNN's deviceless mode): `json` holds a GPU's properties as cuDNN serializes
 * them. Plans are built and kernels compiled for that GPU, but cannot run. */
__attribute__((weak)) struct attention_cudnn *
attention_cudnn_open_deviceless(const char *json, char why[ATTENTION_CUDNN_REASON]);
__attribute__((weak)) void attention_cudnn_close(struct attention_cudnn *);

/* Build one direction's graph, unless it was built before; takes about a second. 0, with the bytes it needs
 * as workspace; or -1 and why, when cuDNN does not support it. Forward uses the layout of q, k, v, o only. */
__attribute__((weak)) int attention_cudnn_plan(struct attention_cudnn *, const struct attention_cudnn_shape *,
                                               const struct attention_cudnn_layout *, bool backward,
                                               size_t *workspace, char why[ATTENTION_CUDNN_REASON]);

/* Queue one direction of a planned shape on the stream. 0, or -1 and why. */
__attribute__((weak)) int attention_cudnn_forward(struct attention_cudnn *,
                                                  const struct attention_cudnn_shape *,
                                                  const struct attention_cudnn_layout *, const void *q,
                                                  const void *k, const void *v, void *o, void *statistics,
                                                  void *workspace, char why[ATTENTION_CUDNN_REASON]);
__attribute__((weak)) int
attention_cudnn_backward(struct attention_cudnn *, const struct attention_cudnn_shape *,
                         const struct attention_cudnn_layout *, const void *q, const void *k, const void *v,
                         const void *o, const void *d_o, const void *statistics, void *dq, void *dk, void *dv,
                         void *workspace, char why[ATTENTION_CUDNN_REASON]);

/* cuDNN's version number: 91900 is 9.19.0. */
__attribute__((weak)) size_t attention_cudnn_version(void);

#ifdef __cplusplus
}
#endif
#endif
