/* Shared by the files of the CPU backend: the device, scratch memory, shape checks, and declarations of the
 * operations. What they compute is described in kernels/ops.def. CPU(name): see real.h. */
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
    struct gemm_library *library; /* bf16: the products that oneDNN has built (gemm_bf16.c) */
    bool uses_pairs;          /* bf16: vdpbf16ps is as fast as a multiply-add in fp32; see LEAVE_TO_PAIRS */
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

/* check_shape for activations and parameters, for gradients of parameters, and for token ids. */
static inline void check_elem(const char *op, const char *what, tensor t, int64_t s0, int64_t s1, int64_t s2,
                              int64_t s3, int64_t s4) {
    check_shape(op, what, t, ELEM_DTYPE, s0, s1, s2, s3, s4);
}

static inline void check_real(const char *op, const char *what, tensor t, int64_t s0, int64_t s1, int64_t s2,
                              int64_t s3, int64_t s4) {
    check_shape(op, what, t, REAL_DTYPE, s0, s1, s2, s3, s4);
}

static inline void check_i32(const char *op, const char *what, tensor t, int64_t s0, int64_t s1) {
    check_shape(op, what, t, DTYPE_I32, s0, s1, 0, 0, 0);
}

/* A matrix product C[m,n] = op(A) op(B) (+ bias [n]) (+ C), row-major; transposed operands are stored [k,m]
 * and [n,k]. Sums are reals. */
struct gemm {
    bool transpose_a, transpose_b;
    int64_t m, n, k, lda, ldb, ldc;
    bool accumulate, bias;
};

/* A product of reals: C = op(A) op(B) + beta C. In all builds, since bf16's reals are those of fp32. */
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
          const real *b, int64_t ldb, real beta, real *c, int64_t ldc);

/* Build what the product needs. to_real: C is of reals, not of elements. *workspace is raised to the bytes of
 * scratch that it takes. */
int CPU(gemm_plan)(struct device *dev, const struct gemm *g, bool to_real, size_t *workspace,
                   struct error *e);
/* Build what a product needs that was not planned, for a check: -1 and *e where computing it would abort. */
int CPU(gemm_build)(struct device *dev, const struct gemm *g, bool to_real, struct error *e);
/* Compute it. used: bytes at the beginning of the workspace that the caller uses itself. */
void CPU(gemm)(struct device *dev, const struct gemm *g, const elem *a, const elem *b, const elem *bias,
               elem *c, size_t used);
void CPU(gemm_real)(struct device *dev, const struct gemm *g, const elem *a, const elem *b, real *c,
                    size_t used);
/* After a check of products: free what was built for those that were not planned, and clear the scratch memory,
 * which is memory that must begin with zeros. */
void CPU(gemm_end_check)(struct device *dev);
void CPU(gemm_free)(struct device *dev);

/* "by AMX": for the device's description. */
const char *cpu_bf16_how(void);
/* Whether the processor has vdpbf16ps. */
bool cpu_bf16_has_pairs(void);
/* Whether it also takes no longer than a multiply-add in fp32. */
bool cpu_bf16_pairs_are_fast(void);

/* plan_product: add the shape to the list of products to check. check_libraries: check those on the list that
 * were not checked yet (check_products.c). */
void CPU(plan_product)(struct device *dev, int64_t rows, int64_t in, int64_t out);
int CPU(check_libraries)(struct device *dev, struct error *e);

/* Store parameter j of the range that begins at element `first` of the flat buffer, from its master weight. p: NULL
 * where forward reads the master weights themselves, as always in fp32. */
static inline void store_rounded(elem *p, real master, uint32_t updates, int64_t first, int64_t j) {
#ifdef KERNELS_BF16
    if (p)
        p[j] = (elem){round_stochastic(master, updates, (uint64_t)(first + j))};
#else
    (void)p, (void)master, (void)updates, (void)first, (void)j;
#endif
}

static inline real dot_elems(const elem *a, const elem *b, int64_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += from_elem(a[i]) * from_elem(b[i]);
    return sum;
}

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
extern int64_t CPU(attention_tiles_visited);

/* Checks of attention's operands, whatever computes it. */
void CPU(check_attention)(const char *op, const struct attention_spec *s, tensor q, tensor k, tensor v,
                          tensor segments, tensor o);

/* cache[b, (first + i) mod capacity] = x[b,i] for the spec.length tokens of x; capacity is cache.shape[1]. */
void CPU(append_to_cache)(const struct attention_spec *s, tensor x, tensor cache, int64_t first);

/* The memory of each operation, for plan(). */
struct op_cost CPU(norm_plan)(const struct device *dev, const struct norm_spec *s);
struct op_cost CPU(qk_norm_plan)(const struct device *dev, const struct qk_norm_spec *s);
struct op_cost CPU(qkv_mix_plan)(const struct device *dev, const struct qkv_mix_spec *s);
struct op_cost CPU(attention_plan)(const struct device *dev, const struct attention_spec *s);
struct op_cost CPU(talking_plan)(const struct device *dev, const struct attention_spec *s);
struct op_cost CPU(simplicial_plan)(const struct device *dev, const struct attention_spec *s);
struct op_cost CPU(decode_plan)(const struct device *dev, const struct attention_spec *s);
struct op_cost CPU(collapse_plan)(const struct device *dev, const struct collapse_spec *s);
struct op_cost CPU(fold_plan)(const struct device *dev, const struct fold_spec *s);
struct op_cost CPU(diff_combine_plan)(const struct device *dev, const struct diff_combine_spec *s);
int CPU(linear_plan)(struct device *dev, const struct linear_spec *s, struct op_cost *cost, struct error *e);
int CPU(classifier_plan)(struct device *dev, const struct classifier_spec *s, struct op_cost *cost,
                         struct error *e);
int CPU(orthogonalize_plan)(struct device *dev, const struct orthogonalize_spec *s, struct op_cost *cost,
                            struct error *e);

/* The operations: CPU(embed), CPU(embed_backward), ... */
#define OP(name, parameters, arguments) op_##name CPU(name);
#include "kernels/ops.def"

/* In bf16 attention, qkv_mix and collapse are built twice (real.h). The build that converts to fp32 begins each of
 * them with this, which leaves the work to the other where that is faster. Mixing reads rows where they are, which
 * takes whole pairs: an even head_dim. */
#if defined KERNELS_BF16 && !defined KERNELS_PAIRS && defined __x86_64__
#define LEAVE_TO_PAIRS(dev, head_dim, call)                                                                  \
    do {                                                                                                     \
        if ((dev)->uses_pairs && (head_dim) % 2 == 0)                                                        \
            return cpu_pairs_##call;                                                                         \
    } while (0)
struct op_cost cpu_pairs_qkv_mix_plan(const struct device *dev, const struct qkv_mix_spec *s);
struct op_cost cpu_pairs_attention_plan(const struct device *dev, const struct attention_spec *s);
struct op_cost cpu_pairs_collapse_plan(const struct device *dev, const struct collapse_spec *s);
op_attention cpu_pairs_attention;
op_attention_backward cpu_pairs_attention_backward;
op_qkv_mix cpu_pairs_qkv_mix;
op_qkv_mix_backward cpu_pairs_qkv_mix_backward;
op_collapse cpu_pairs_collapse;
op_collapse_backward cpu_pairs_collapse_backward;
#else
#define LEAVE_TO_PAIRS(dev, head_dim, call) (void)0
#endif

#endif
