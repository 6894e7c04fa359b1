/* What the files of the CPU backend share: the device, scratch memory, shape checks, and the operations that
 * cpu.c gathers into the table. Public contracts are in kernels/kernels.h. */
#ifndef IHA_KERNELS_CPU_CPU_H
#define IHA_KERNELS_CPU_CPU_H

#include <omp.h>

#include "kernels/check.h"
#include "kernels/cpu/real.h"
#include "kernels/kernels.h"

struct device {
    int threads;
    int sharers; /* ranks on this machine */
    char *workspace;
    size_t workspace_bytes;
    char description[256];
    void (*progress_callback)(void *context);
    void *progress_context;
    struct trace *trace; /* NULL: nobody looks */
    double trace_began;
    struct step_state posted; /* nothing is queued here, so one is enough */
};

/* To be called where an operation begins that may take long. */
static inline void call_progress(const struct device *dev) {
    if (dev->progress_callback)
        dev->progress_callback(dev->progress_context);
}

/* Bytes the machine, and the containers around this process, still have: this rank's share of them, or all
 * when dev is NULL. */
size_t cpu_memory_available(struct device *dev);

/* Choose the number of threads (0: this rank's part of the processors) and where they run. */
int cpu_place_threads(int threads, struct comm *comm);

/* The workspace's first bytes, which the running operation may use until it returns. */
void *cpu_workspace(struct device *dev, size_t bytes, const char *op);

/* check_shape for the backend's number type, and for token ids. */
void check_real(const char *op, const char *what, tensor t, int64_t s0, int64_t s1, int64_t s2, int64_t s3,
                int64_t s4);
void check_i32(const char *op, const char *what, tensor t, int64_t s0, int64_t s1);

/* C[m,n] = op(A) op(B) + beta C, row-major; transposed operands are stored [k,m] and [n,k]. */
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
          const real *b, int64_t ldb, real beta, real *c, int64_t ldc);

/* out[i] (+)= the sum over parts of shares[part*stride + i], in their order: how threads' partial gradients
 * meet, always in the same way. */
void sum_shares(const real *shares, int parts, int64_t stride, int64_t n, real *out, bool accumulate);

/* Tiles of scores that attention has computed since the program began: what a test counts to see that
 * blocks outside the band are never visited. */
extern int64_t attention_tiles_visited;

/* What each operation's plan says; see kernels.h. */
struct op_cost norm_plan(const struct device *dev, const struct norm_spec *s);
struct op_cost qkv_mix_plan(const struct device *dev, const struct qkv_mix_spec *s);
struct op_cost attention_plan(const struct device *dev, const struct attention_spec *s);
struct op_cost collapse_plan(const struct device *dev, const struct collapse_spec *s);
struct op_cost classifier_plan(const struct device *dev, const struct classifier_spec *s);

/* The operations: cpu_embed, cpu_embed_backward, ... */
#define OP(name, parameters, arguments) op_##name cpu_##name;
#include "kernels/ops.def"

#endif
