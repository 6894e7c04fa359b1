/* GPUs and links: the figures that estimates are made of, in one table (hardware.c), each with its source.
 * None was measured with this program; a measurement replaces its row. */
#ifndef IHA_KERNELS_ESTIMATE_HARDWARE_H
#define IHA_KERNELS_ESTIMATE_HARDWARE_H

#include <stdbool.h>
#include <stdint.h>

/* FLOP/s of attention, counting visible pairs only and backward as 2.5 times the forward. */
struct attention_rate {
    double forward, backward;
};

struct gpu_spec {
    const char *name;
    double peak;                        /* dense bf16, FLOP/s: the denominator of MFU */
    double matmul;                      /* FLOP/s of large products */
    struct attention_rate wide, narrow; /* cuDNN, head_dim over 64, and up to 64 */
    struct attention_rate builtin;      /* the built-in kernels, where cuDNN is not used */
    double talking;                     /* FLOP/s of attention with talking heads, both ways */
    int64_t cudnn_head_dim;             /* the largest that cuDNN's backward supports */
    int cudnn_scratch;                  /* workspace of its non-deterministic backward, in fp32 copies of q */
    bool cudnn_nan;          /* not used for lengths of 64 modulo 128 (kernels/cuda/attention/attention.cu) */
    double window;           /* factor on `wide` for windows; `narrow` was measured with one */
    double copy;             /* bytes/s, read and written together */
    double mixing;           /* factor on `copy` for mixing and collapse ... */
    double mixing_matmul;    /* ... and on `matmul`: small matrices, padded */
    bool fused_gelu;         /* products with GELU in them are faster than a pass of its own */
    double launch;           /* s from one kernel's end to the next one's full speed */
    double memory, reserved; /* bytes in all, and what context, libraries and NCCL use */
    double nvlink;           /* bytes/s, one GPU, one direction */
};

/* A protocol of NCCL's rings: the attained fraction of the bandwidth, seconds to start and for each step. */
struct ring_protocol {
    double attained, base, step, step_between_nodes;
};

enum { NODE_GPUS = 8, PROTOCOLS = 2 };

struct link_spec {
    const char *name;
    double network;          /* bytes/s, one GPU, one direction, between nodes; 0: one node only */
    double nvlink_attained;  /* fraction of the nominal bandwidth that collectives get ... */
    double network_attained; /* ... within a node and between nodes */
    struct ring_protocol protocols[PROTOCOLS]; /* the faster one is used for each message */
    double all_reduce_base, all_reduce_step, all_reduce_step_between_nodes; /* of a few bytes, over a tree */
};

/* By name; NULL when there is none. Names end with NULL. */
const struct gpu_spec *gpu_spec(const char *name);
const struct link_spec *link_spec(const char *name);
extern const char *const gpu_names[], *const link_names[];

/* Seconds of one reduce-scatter or all-gather of `bytes` (the whole buffer) among W = `ranks` in n nodes of
 * up to NODE_GPUS:
 *   (W-1)/W * bytes / bandwidth + base + (W-n) * step + (n-1) * step_between_nodes
 * Every rank sends all but its own share around a ring. NCCL lays out as many rings as a node has network
 * adapters (one a GPU here), so that all of them carry traffic: between nodes the bandwidth is the smaller of
 * one GPU's NVLink and of all of a node's adapters together. */
double collective_seconds(const struct gpu_spec *g, const struct link_spec *l, int ranks, double bytes);

/* Of an all-reduce of a few numbers: up and down a tree. */
double all_reduce_seconds(const struct link_spec *l, int ranks);

#endif
