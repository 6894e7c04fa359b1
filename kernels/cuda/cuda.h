/* What the files of the CUDA backend share on the host: the device, error checks, launches, shape checks, and
 * the operations that cuda.cu puts into the table. Public contracts are in kernels/kernels.h; what kernels
 * themselves share is in cuda.cuh.
 *
 * To write a kernel: give it a file of its own and declare its host functions below. The kernel is a static
 * __global__ template over the type of its tensors (float or bf16), loads and stores 16 bytes a thread with
 * load()/store() of cuda.cuh, computes in fp32, and has a comment with shapes, equation and bytes moved. The
 * operation checks shapes, picks the type with by_dtype(), and calls
 *
 *     launch<kernel<T>>(dev, grid, threads, shared_bytes, arguments...);
 *
 * which queues it on dev->stream. Dynamic shared memory is accessed with dynamic_shared<T>(). Tensor cores
 * and cp.async are used through mma.cuh only. A kernel's first statement is wait_for_previous() of cuda.cuh.
 * Operations do not allocate, read back or wait; scratch memory comes from cuda_workspace(), and the
 * operation's plan says how much. Results must not depend on the order in which blocks run: no float atomics.
 * Sources must also compile with g++ for tests/cuda/emulator/, which runs them on a CPU: no thread may return
 * before its block's last barrier, and kernels are not launched with <<<>>>. */
#ifndef IHA_KERNELS_CUDA_CUDA_H
#define IHA_KERNELS_CUDA_CUDA_H

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

#include <initializer_list>
#include <type_traits>

#include "kernels/check.h"
#include "kernels/kernels.h"

typedef __nv_bfloat16 bf16;

struct matmul_plan;     /* matmul.cu */
struct staging;         /* transfer.cu */
struct attention_plans; /* attention.cu */
struct graph;           /* graph.cu */
struct plan_file;       /* plan_file.cu */

/* A step's state, copied to pinned host memory; the host reads it up to RUN_AHEAD steps late. */
enum { RUN_AHEAD = 1, POSTED_STEPS = RUN_AHEAD + 1 };
struct posted_step {
    struct step_state *state;
    cudaEvent_t done;
};

struct device {
    int index;   /* among the GPUs of this machine */
    int sharers; /* ranks on this GPU, known once the communicator is open */
    cudaStream_t stream;
    cublasLtHandle_t blas;
    char *workspace;
    size_t workspace_bytes;
    char *scratch; /* SCRATCH_BYTES for operations without a plan: the optimizer's */
    int sm_count;
    bool overlaps_launches; /* see try_launch() */
    size_t memory;          /* bytes the GPU has */
    size_t shared_limit;    /* bytes of dynamic shared memory a block may have */
    enum device_precision precision;
    bool deterministic;
    struct matmul_plan *matmuls; /* built so far */
    struct plan_file *plan_file; /* of choices; NULL: none are kept */
    double timed_at;             /* clock_seconds() when something was last timed; 0: never */
    struct attention_plans *attentions;
    struct staging *staging;
    struct graph *graphs; /* [GRAPHS]; NULL: CUDA graphs are off */
    struct trace *trace;  /* NULL: not tracing */
    void (*progress_callback)(void *context);
    void *progress_context;
    pthread_t progress_thread; /* the thread that set it */
    struct posted_step posted[POSTED_STEPS];
    int64_t posts, collects;
    char name[256], description[320];
};

enum { SCRATCH_BYTES = 64 << 10 };

/* Print what failed, where, and what to do, and abort. */
#define cuda_check(call) cuda_check_status((call), #call, __FILE__, __LINE__)
#define cublas_check(call) cublas_check_status((call), #call, __FILE__, __LINE__)
void cuda_check_status(cudaError_t status, const char *call, const char *file, int line);
void cublas_check_status(cublasStatus_t status, const char *call, const char *file, int line);

/* The type of the device's activations and parameters. */
static inline enum dtype cuda_compute(const struct device *dev) {
    return dev->precision == DEVICE_BF16 ? DTYPE_BF16 : DTYPE_F32;
}

/* The first `bytes` of the workspace, for the running operation; aborts if it is smaller. */
void *cuda_workspace(struct device *dev, size_t bytes, const char *op);

/* As in kernels/check.h; the zeros that end a shape may be left out. */
extern "C" void check_shape(const char *op, const char *what, tensor t, enum dtype dtype, int64_t s0,
                            int64_t s1 = 0, int64_t s2 = 0, int64_t s3 = 0, int64_t s4 = 0);

static __host__ __device__ inline int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t ceil_div(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

static inline int64_t round_up(int64_t n, int64_t to) {
    return ceil_div(n, to) * to;
}

/* Whether all these addresses allow 16-byte accesses. */
static inline bool aligned16(std::initializer_list<const void *> addresses) {
    for (const void *p : addresses)
        if ((uintptr_t)p % 16 != 0)
            return false;
    return true;
}

/* Wait until the event is reached, calling the progress callback meanwhile. */
void cuda_host_wait(struct device *dev, cudaEvent_t event);
/* Wait until everything queued so far is done, likewise. */
void cuda_await_queue(struct device *dev);

bool cuda_launches_can_overlap(const struct device *, int major, bool graphs);

/* Queue a kernel. A block may use 48 KiB of shared memory, its static variables included, without asking;
 * from 32 KiB of dynamic shared memory on, the first launch asks for what it needs. overlapping: programmatic
 * dependent launch; the kernel may be set up while the one ahead of it ends, for which it waits itself
 * (wait_for_previous() of cuda.cuh). */
template <auto kernel, typename... A>
cudaError_t try_launch(cudaStream_t stream, bool overlapping, dim3 grid, dim3 block, size_t shared,
                       A... args) {
    static size_t allowed = 32 << 10;
    if (shared > allowed) {
        cuda_check(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)shared));
        allowed = shared;
    }
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = overlapping ? 1 : 0;
#ifdef CUDA_EMULATOR
    emulator_kernel_name = __PRETTY_FUNCTION__;
#endif
    return cudaLaunchKernelEx(&config, kernel, args...);
}

template <auto kernel, typename... A>
void launch_as(cudaStream_t stream, bool overlapping, dim3 grid, dim3 block, size_t shared, A... args) {
    cuda_check_status(try_launch<kernel>(stream, overlapping, grid, block, shared, args...),
                      __PRETTY_FUNCTION__, __FILE__, __LINE__);
}

/* On a stream of communication, between copies and NCCL's kernels, where overlapping would gain nothing. */
template <auto kernel, typename... A>
void launch_on(cudaStream_t stream, dim3 grid, dim3 block, size_t shared, A... args) {
    launch_as<kernel>(stream, false, grid, block, shared, args...);
}

template <auto kernel, typename... A>
void launch(struct device *dev, dim3 grid, dim3 block, size_t shared, A... args) {
    launch_as<kernel>(dev->stream, dev->overlaps_launches, grid, block, shared, args...);
}

/* Call f with a value of the C++ type that `dtype` names. */
template <typename F> void by_dtype(enum dtype dtype, F f) {
    if (dtype == DTYPE_BF16)
        f(bf16());
    else
        f(float());
}

/* What each operation's plan says; see kernels.h. */
int cuda_embed_plan(struct device *, const struct embed_spec *, struct op_cost *, struct error *);
int cuda_norm_plan(struct device *, const struct norm_spec *, struct op_cost *, struct error *);
int cuda_linear_plan(struct device *, const struct op_spec *, struct op_cost *, struct error *);
int cuda_linear_act_plan(struct device *, const struct op_spec *, struct error *);
int cuda_classifier_plan(struct device *, const struct classifier_spec *, struct op_cost *, struct error *);
int cuda_qk_norm_plan(struct device *, const struct qk_norm_spec *, struct op_cost *, struct error *);
int cuda_qkv_mix_plan(struct device *, const struct qkv_mix_spec *, struct op_cost *, struct error *);
int cuda_collapse_plan(struct device *, const struct collapse_spec *, struct op_cost *, struct error *);
int cuda_attention_plan(struct device *, const struct attention_spec *, struct op_cost *, struct error *);
void attention_plans_free(struct attention_plans *);
const char *cuda_attention_backend(struct device *, const struct attention_spec *, size_t *deterministic);
int cuda_orthogonalize_plan(struct device *, const struct orthogonalize_spec *, struct op_cost *,
                            struct error *);
int cuda_talking_plan(struct device *, const struct attention_spec *, struct op_cost *, struct error *);
int cuda_simplicial_plan(struct device *, const struct attention_spec *, struct op_cost *, struct error *);
/* k and v [B,n,G,d] to their ring buffers [B,capacity,G,d], token first + i at index (first + i) mod capacity. */
void cuda_append_to_cache(struct device *, const struct attention_spec *, tensor k, tensor v, tensor cache_k,
                          tensor cache_v, int64_t first);
int cuda_diff_combine_plan(struct device *, const struct diff_combine_spec *, struct op_cost *,
                           struct error *);
int cuda_decode_plan(struct device *, const struct attention_spec *, struct op_cost *, struct error *);

/* The epilogue of a product, with a second matrix `aux` [m,n] of C's type:
 *   MATMUL_GELU           aux = op(A) op(B) (+ bias),  C = gelu_tanh(aux)
 *   MATMUL_GELU_BACKWARD  C = op(A) op(B) * gelu_tanh'(aux) */
enum matmul_epilogue { MATMUL_PLAIN, MATMUL_GELU, MATMUL_GELU_BACKWARD };

/* C[m,n] = op(A) op(B) (+ C) (+ bias [n]), row-major; transposed operands are stored as [k,m] and [n,k]. A
 * and B are of type `in`, C and bias of type `out`. Uses the workspace's first MATMUL_WORKSPACE bytes. */
struct matmul {
    bool transpose_a, transpose_b;
    int64_t m, n, k, lda, ldb, ldc;
    enum dtype in, out;
    bool bias;
    bool row_sums; /* also the sums of op(A)'s rows, [m] of type `out`, written where a bias would be read */
    enum matmul_epilogue epilogue;
    int64_t ldaux; /* multiples of 8, which cuBLASLt requires; aux is at a multiple of 16 bytes */
};
constexpr size_t MATMUL_WORKSPACE = 32 << 20;
/* Choose the algorithm by timing, or as the plan file says; a shape that was not planned uses cuBLASLt's first
 * choice. accumulate: whether most calls add to C. */
void plan_matmul(struct device *, struct matmul, bool accumulate = false);
/* The same, but false where cuBLASLt has no algorithm. */
bool plan_matmul_if_supported(struct device *, struct matmul, bool accumulate);
/* Whether it was planned, and not rejected since. */
bool matmul_is_planned(struct device *, struct matmul);
void reject_matmul(struct device *, struct matmul);
bool matmul_is_rejected(struct device *, struct matmul);
/* bias: read, or with row_sums written; otherwise NULL. aux: of an epilogue that has it. */
void run_matmul(struct device *, struct matmul, const void *a, const void *b, const void *bias,
                bool accumulate, void *c, const void *aux = NULL);
void matmul_plans_free(struct matmul_plan *);

/* Compare what the libraries compute for the plans made so far, each once, with plain computation: -1 and an
 * EXIT_RUN error if it is wrong. The workspace is the scratch memory; it is zero afterwards. */
int cuda_check_libraries(struct device *, struct error *);
int check_matmuls(struct device *, struct error *);    /* check_matmul.cu */
int check_attentions(struct device *, struct error *); /* attention.cu */

/* out[i] (+)= the sum over p < parts of partials[p n + i], in a fixed order: adds up the partial sums of a
 * gradient that blocks have written. out F32 [n]. Several in one launch: partials [sums, parts, n]. */
struct partial_sum {
    float *out; /* NULL: there is no such sum, nor its partials */
    bool accumulate;
};
constexpr int MAX_PARTIAL_SUMS = 3;
void sum_partials(struct device *, const float *partials, int parts, int64_t n,
                  std::initializer_list<struct partial_sum> sums);

void cuda_upload(struct device *, tensor dst, const void *host, enum dtype host_dtype);
void cuda_download(struct device *, tensor src, void *host, enum dtype host_dtype);
/* Copy a few bytes of device memory, unconverted, after everything queued so far; waits for them. */
void cuda_read(struct device *, const void *src, void *host, size_t bytes);
struct staging *staging_create(void);
struct comm *cuda_open_comm(struct device *, struct comm *ranks, enum comm_backend how, struct error *e);
size_t cuda_staging_bytes(struct device *, int64_t elements, int ranks, enum dtype dtype, enum dtype wire);
void cuda_range_begin(struct device *, const char *name, int index);
void cuda_range_end(struct device *);
void cuda_trace_begin(struct device *);
struct trace *cuda_trace_end(struct device *);
struct graph *graphs_create(void);
void graphs_free(struct graph *);
bool cuda_graph_replay(struct device *, int id);
void cuda_graph_begin(struct device *, int id);
bool cuda_graph_end(struct device *, int id);
void staging_free(struct staging *);

/* The operations: cuda_embed, cuda_embed_backward, ... */
#define OP(name, parameters, arguments) op_##name cuda_##name;
#include "kernels/ops.def"

#endif
