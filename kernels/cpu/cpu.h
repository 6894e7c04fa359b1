/* Shared by the files of the CPU backend: the device, scratch memory, shape checks, and declarations of the
 * operations. What they compute is described in kernels/ops.def. */
#ifndef IHA_KERNELS_CPU_CPU_H
#define IHA_KERNELS_CPU_CPU_H

#include <omp.h>

#include "kernels/check.h"
#include "kernels/cpu/real.h"
#include "kernels/kernels.h"

/* The shapes of a linear layer's products: y = x W^T with x [rows,in], W [out,in]. */
struct product {
    int64_t rows, in, out;
};

struct device {
    int threads;
    int local_ranks; /* on this machine */
    char *workspace;
    size_t workspace_bytes;
    char description[256];
    void (*progress_callback)(void *context);
    void *progress_context;
    struct trace *trace; /* NULL: not recording */
    double trace_start;
    struct product *products; /* planned; the first products_checked have been checked */
    int product_count, products_checked;
    struct step_state posted; /* operations are synchronous here, so one is enough */
};

/* To be called at the start of an operation that may take long. */
static inline void call_progress_callback(const struct device *dev) {
    if (dev->progress_callback)
        dev->progress_callback(dev->progress_context);
}

/* Free bytes of the machine, or of the container or job if that is less: this rank's share, or all if dev is
 * NULL. */
size_t cpu_memory_available(struct device *dev);

/* Start the team of threads that every operation and library uses: `requested` of them, or if 0 for this
 * rank's part of the processors that affinity, CPU quota and OMP_NUM_THREADS leave. Returns its size, and in
 * `note` what limited it (text for the device's description, or empty). -1 and an EXIT_USER error: that many
 * threads cannot be started, or their stacks are too small. With several ranks it is collective. */
int cpu_set_threads(int requested, struct comm *comm, char note[96], struct error *e);

/* The first bytes of the workspace, for the running operation until it returns. */
void *cpu_workspace(struct device *dev, size_t bytes, const char *op);

/* check_shape for the backend's number type, and for token ids. */
void check_real(const char *op, const char *what, tensor t, int64_t s0, int64_t s1, int64_t s2, int64_t s3,
                int64_t s4);
void check_i32(const char *op, const char *what, tensor t, int64_t s0, int64_t s1);

/* C[m,n] = op(A) op(B) + beta C, row-major; transposed operands are stored [k,m] and [n,k]. */
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
          const real *b, int64_t ldb, real beta, real *c, int64_t ldc);

/* plan_product: add the shape to the list of products to check. cpu_check_libraries: check those on the list
 * that were not checked yet (check_products.c). */
void plan_product(struct device *dev, int64_t rows, int64_t in, int64_t out);
int cpu_check_libraries(struct device *dev, struct error *e);

/* out[i] (+)= sum over p < parts of partials[p*stride + i]. Adds the threads' partial gradients in a fixed
 * order, so that two runs give the same bits. */
void sum_partials(const real *partials, int parts, int64_t stride, int64_t n, real *out, bool accumulate);

/* Columns that one thread takes at a time where threads divide the columns of an array: at most `most`, fewer if some
 * of the threads would have nothing, and at least a cache line of them. */
static inline int64_t columns_per_thread(const struct device *dev, int64_t columns, int64_t most) {
    const int64_t line = 64 / (int64_t)sizeof(real);
    return min64(most, round_up((columns + dev->threads - 1) / dev->threads, line));
}

/* Tiles of scores that attention has computed since the program started, so that a test can check that tiles
 * outside the mask's band are skipped. */
extern int64_t attention_tiles_visited;

/* The memory of each operation, for plan(). */
struct op_cost norm_plan(const struct device *dev, const struct norm_spec *s);
struct op_cost qkv_mix_plan(const struct device *dev, const struct qkv_mix_spec *s);
struct op_cost attention_plan(const struct device *dev, const struct attention_spec *s);
struct op_cost collapse_plan(const struct device *dev, const struct collapse_spec *s);
struct op_cost fold_plan(const struct device *dev, const struct fold_spec *s);
struct op_cost classifier_plan(const struct device *dev, const struct classifier_spec *s);
struct op_cost orthogonalize_plan(const struct orthogonalize_spec *s);

/* The operations: cpu_embed, cpu_embed_backward, ... */
#define OP(name, parameters, arguments) op_##name cpu_##name;
#include "kernels/ops.def"

#endif
