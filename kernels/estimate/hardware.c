#include "kernels/estimate/hardware.h"

#include <math.h>
#include <string.h>

#define MICRO 1e-6

/* clang-format off */
/* Sources of the figures:
 *   peak, memory, nvlink, bandwidth of the memory: NVIDIA's data sheets of the SXM parts, dense
 *   matmul    H200: 790 TFLOP/s measured elsewhere at 8192^3 on random data, 0.80 of the peak. The others:
 *             the same fraction of their peak.
 *   copy      H200: 4.3 TB/s measured elsewhere, 0.90 of 4.8. The others: the same fraction of 3.35 and 2.04.
 *   wide      H200: cuDNN 9.19, causal, d = 128, S = 8192, NVIDIA's own figures. H100: the same chip with
 *             other memory, which does not limit attention. A100: FlashAttention-2's paper (arXiv 2307.08691)
 *             reaches 73 % and 63 % of the peak without a mask; 0.85 of that for a causal one.
 *   narrow    H200: the same figures at d = 64, window 1024. A100: 0.6 of `wide`, as on the H200.
 *   builtin   a guess: mma.sync reaches about two thirds of Hopper's peak and all of Ampere's, half of
 *             which is softmax and masks
 *   talking   a guess: a fifth of `builtin`: tiles go through shared memory, and since they are split into two bf16
 *             most products take two or three instructions
 *   cudnn     cuDNN 9.19's answers to queries (tests/cuda/test_cudnn.c)
 *   window    a guess: tiles of 128 keys that lie half outside at both edges
 *   mixing    0.85 is the target for our kernels (make bench-gpu); the factor on matmul is a guess
 *   fused_gelu  faster on an H100 and slower on an RTX 4090, without Hopper's kernels, by llm.c's pull requests 591
 *             and 653; the same on an H200 and an RTX 5090 by sglang's 34350. A100: a guess
 *   launch    a guess for a queue that is never empty: the end of one kernel and the start of the next
 *   reserved  a guess: 0.5 GB of context and libraries, 1.5 GB of NCCL's buffers and fragments */
/* clang-format on */
static const struct gpu_spec gpus[] = {
    {.name = "h200",
     .peak = 989e12,
     .matmul = 790e12,
     .wide = {644e12, 541e12},
     .narrow = {349e12, 300e12},
     .builtin = {280e12, 220e12},
     .talking = 56e12,
     .cudnn_head_dim = 256,
     .cudnn_scratch = 1,
     .cudnn_nan = true,
     .window = 0.85,
     .copy = 4.3e12,
     .mixing = 0.85,
     .mixing_matmul = 0.25,
     .fused_gelu = true,
     .launch = 2 * MICRO,
     .memory = 141e9,
     .reserved = 2e9,
     .nvlink = 450e9},
    {.name = "h100",
     .peak = 989e12,
     .matmul = 790e12,
     .wide = {644e12, 541e12},
     .narrow = {349e12, 300e12},
     .builtin = {280e12, 220e12},
     .talking = 56e12,
     .cudnn_head_dim = 256,
     .cudnn_scratch = 1,
     .cudnn_nan = true,
     .window = 0.85,
     .copy = 3.0e12,
     .mixing = 0.85,
     .mixing_matmul = 0.25,
     .fused_gelu = true,
     .launch = 2 * MICRO,
     .memory = 80e9,
     .reserved = 2e9,
     .nvlink = 450e9},
    {.name = "a100",
     .peak = 312e12,
     .matmul = 250e12,
     .wide = {193e12, 167e12},
     .narrow = {116e12, 100e12},
     .builtin = {130e12, 100e12},
     .talking = 26e12,
     .cudnn_head_dim = 128,
     .cudnn_scratch = 2,
     .cudnn_nan = false,
     .window = 0.85,
     .copy = 1.83e12,
     .mixing = 0.85,
     .mixing_matmul = 0.25,
     .fused_gelu = false,
     .launch = 2 * MICRO,
     .memory = 80e9,
     .reserved = 2e9,
     .nvlink = 300e9},
};

/* Latencies are NCCL's own model of itself (src/graph/tuning.cc: rings, protocols Simple and LL128, which
 * carries 120 bytes in 128; trees in LL). Attained fractions: 235 of 300 GB/s is where NCCL's model caps an
 * A100, and about 360 of 450 GB/s is what nccl-tests are reported to show on Hopper; between nodes 0.9 is a
 * guess. */
#define NCCL_LATENCIES                                                                                       \
    .protocols = {{1, 8.4 * MICRO, 3.4 * MICRO, 14 * MICRO}, {0.92, 14 * MICRO, 1.9 * MICRO, 4 * MICRO}},    \
    .all_reduce_base = 6.8 * MICRO, .all_reduce_step = 0.6 * MICRO,                                          \
    .all_reduce_step_between_nodes = 5 * MICRO
static const struct link_spec links[] = {
    {.name = "nvlink", .network = 0, .nvlink_attained = 0.8, .network_attained = 0, NCCL_LATENCIES},
    {.name = "ib400", .network = 50e9, .nvlink_attained = 0.8, .network_attained = 0.9, NCCL_LATENCIES},
};

const char *const gpu_names[] = {"h200", "h100", "a100", NULL};
const char *const link_names[] = {"nvlink", "ib400", NULL};

const struct gpu_spec *gpu_spec(const char *name) {
    for (size_t i = 0; i < sizeof gpus / sizeof *gpus; i++)
        if (strcmp(gpus[i].name, name) == 0)
            return &gpus[i];
    return NULL;
}

const struct link_spec *link_spec(const char *name) {
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (strcmp(links[i].name, name) == 0)
            return &links[i];
    return NULL;
}

static int nodes_of(int ranks) {
    return (ranks + NODE_GPUS - 1) / NODE_GPUS;
}

double collective_seconds(const struct gpu_spec *g, const struct link_spec *l, int ranks, double bytes) {
    int nodes = nodes_of(ranks);
    double bandwidth = g->nvlink * l->nvlink_attained, best = INFINITY;
    if (ranks == 1)
        return 0;
    if (nodes > 1)
        bandwidth = fmin(bandwidth, NODE_GPUS * l->network * l->network_attained);
    for (int i = 0; i < PROTOCOLS; i++) {
        const struct ring_protocol *p = &l->protocols[i];
        double moving = (double)(ranks - 1) / ranks * bytes / (bandwidth * p->attained);
        best = fmin(best, moving + p->base + (ranks - nodes) * p->step + (nodes - 1) * p->step_between_nodes);
    }
    return best;
}

double all_reduce_seconds(const struct link_spec *l, int ranks) {
    int nodes = nodes_of(ranks), inside = ranks < NODE_GPUS ? ranks : NODE_GPUS;
    if (ranks == 1)
        return 0;
    return l->all_reduce_base +
           2 * ((inside - 1) * l->all_reduce_step + log2(nodes) * l->all_reduce_step_between_nodes);
}
