/* The CUDA backend's device: error checks, opening, waiting, memory, plans, and the table of operations. */
#include "kernels/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cuda/attention/attention_cudnn.h"
#include "kernels/cuda/plan_file.h"

/* ---- checks ---- */

static const char *hint_for(cudaError_t status) {
    switch (status) {
    case cudaErrorMemoryAllocation:
        return "lower train.micro_batch or set system.recompute = full";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
        return "the binary was not built for this GPU; rebuild it here with make";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
        return "this kernel or an earlier one failed; run with CUDA_LAUNCH_BLOCKING=1 or under "
               "compute-sanitizer to see which";
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorStreamCaptureIsolation:
        return "this driver cannot capture these operations in a CUDA graph; set system.graph = off";
    default:
        return "check the GPU with nvidia-smi and dmesg";
    }
}

void cuda_check_status(cudaError_t status, const char *call, const char *file, int line) {
    if (status == cudaSuccess)
        return;
    fprintf(stderr, "%s:%d: CUDA: %s (%s) in %s; %s\n", file, line, cudaGetErrorString(status),
            cudaGetErrorName(status), call, hint_for(status));
    abort();
}

void cublas_check_status(cublasStatus_t status, const char *call, const char *file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS)
        return;
    fprintf(stderr,
            "%s:%d: cuBLASLt: status %d in %s; CUBLASLT_LOG_LEVEL=2 shows why; if CUDA graphs "
            "cause it, set system.graph = off\n",
            file, line, (int)status, call);
    abort();
}

/* ---- the device ---- */

static const char *opening_hint(cudaError_t status) {
    switch (status) {
    case cudaErrorSystemDriverMismatch:
        return "the driver was updated and not loaded yet; restart the machine";
    case cudaErrorCompatNotSupportedOnDevice:
        return "remove CUDA's compat folder from LD_LIBRARY_PATH, or update the driver";
    case cudaErrorSystemNotReady:
        return "start nvidia-fabricmanager, which GPUs that are connected by NVSwitch need";
    case cudaErrorStubLibrary:
        return "remove the toolkit's folder lib64/stubs from LD_LIBRARY_PATH";
    case cudaErrorDevicesUnavailable:
        return "another process may have the GPU for itself; see nvidia-smi";
    default:
        return "see nvidia-smi and dmesg";
    }
}

/* The same error code stands for no driver and for one that is too old. */
static void explain(cudaError_t status, struct error *why) {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess)
        driver = 0;
    if (status == cudaErrorNoDevice || (status == cudaErrorInsufficientDriver && driver == 0))
        return;
    if (status == cudaErrorInsufficientDriver)
        fail_user(
            why,
            "the NVIDIA driver is too old: it supports CUDA up to %d.%d, and this program was built with "
            "CUDA %d.%d; update the driver, or build with a toolkit of CUDA %d",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10, driver / 1000);
    else
        fail_user(why, "CUDA cannot use the GPU: %s (%s); %s", cudaGetErrorString(status),
                  cudaGetErrorName(status), opening_hint(status));
}

int cuda_devices(struct error *why) {
    int count = 0;
    struct error unused;
    why = why ? why : &unused;
    *why = {};
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess)
        return count;
    cudaGetLastError(); /* clear it */
    explain(status, why);
    return 0;
}

/* The choices of an earlier start. With system.deterministic nothing is chosen by timing. */
static struct plan_file *open_plan_file(const struct cudaDeviceProp *p,
                                        const struct device_options *options) {
    char machine[512];
    snprintf(machine, sizeof machine, "%s, sm_%d%d, %d SMs; cuBLASLt %zu; cuDNN %zu", p->name, p->major,
             p->minor, p->multiProcessorCount, cublasLtGetVersion(),
             attention_cudnn_version ? attention_cudnn_version() : 0);
    return options->deterministic ? NULL : plan_file_open(options->plan_file, machine);
}

static struct device *open_device(const struct device_options *options, struct error *e) {
    struct error why;
    int count = cuda_devices(&why);
    if (count == 0) {
        fail_user(e, "system.device = cuda: %s",
                  why.text[0] ? why.text
                              : "no GPU, or no driver for it, was found; nvidia-smi should list one");
        return NULL;
    }
    int device;
    struct cudaDeviceProp p;
    /* One rank per GPU; with more ranks than GPUs, several share one. */
    device = options->comm ? options->comm->local_rank % count : 0;
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) {
        fail_user(e, "system.device = cuda: GPU %d cannot be used: %s (%s); %s", device,
                  cudaGetErrorString(status), cudaGetErrorName(status), opening_hint(status));
        return NULL;
    }
    cuda_check(cudaGetDeviceProperties(&p, device));
    if (p.major < 8) {
        fail_user(e, "system.device = cuda: %s has compute capability %d.%d; 8.0 (Ampere) or later is needed",
                  p.name, p.major, p.minor);
        return NULL;
    }
    struct device *dev = (struct device *)calloc(1, sizeof *dev);
    if (!dev) {
        fail_user(e, "out of memory opening the GPU");
        return NULL;
    }
    dev->index = device;
    dev->sharers = 1;
    dev->sm_count = p.multiProcessorCount;
    dev->memory = p.totalGlobalMem;
    dev->shared_limit = p.sharedMemPerBlockOptin;
    dev->precision = options->precision;
    dev->deterministic = options->deterministic;
    snprintf(dev->name, sizeof dev->name, "%s", p.name);
    snprintf(dev->description, sizeof dev->description, "cuda: %s, sm_%d%d, %d SMs, %.0f GiB", p.name,
             p.major, p.minor, p.multiProcessorCount, (double)p.totalGlobalMem / (1 << 30));
    cuda_check(cudaStreamCreateWithFlags(&dev->stream, cudaStreamNonBlocking));
    dev->overlaps_launches = cuda_launches_can_overlap(dev, p.major, options->graphs);
    cublas_check(cublasLtCreate(&dev->blas));
    dev->plan_file = open_plan_file(&p, options);
    cuda_check(cudaMalloc((void **)&dev->scratch, SCRATCH_BYTES));
    dev->staging = staging_create();
    dev->graphs = options->graphs ? graphs_create() : NULL;
    for (struct posted_step &step : dev->posted) {
        cuda_check(cudaMallocHost((void **)&step.state, sizeof *step.state));
        cuda_check(cudaEventCreateWithFlags(&step.done, cudaEventDisableTiming));
    }
    return dev;
}

static void close_device(struct device *dev) {
    cuda_check(cudaStreamSynchronize(dev->stream));
    attention_plans_free(dev->attentions);
    staging_free(dev->staging);
    graphs_free(dev->graphs);
    matmul_plans_free(dev->matmuls);
    plan_file_close(dev->plan_file);
    for (struct posted_step &step : dev->posted) {
        cuda_check(cudaEventDestroy(step.done));
        cuda_check(cudaFreeHost(step.state));
    }
    cuda_check(cudaFree(dev->scratch));
    cublas_check(cublasLtDestroy(dev->blas));
    cuda_check(cudaStreamDestroy(dev->stream));
    free(dev);
}

static const char *describe(struct device *dev) {
    return dev->description;
}

/* Gradients are kept in fp32 also where activations are bf16: many micro-batches are summed into them. */
static struct device_dtypes dtypes(struct device *dev) {
    return (struct device_dtypes){cuda_compute(dev), DTYPE_F32, DTYPE_F32};
}

static double peak_flops(struct device *dev) {
    /* Dense bf16 with fp32 accumulation, from the vendor's datasheets; the first name that fits counts. */
    static const struct {
        const char *name;
        double peak;
    } table[] = {
        {"H200", 989e12},       {"GH200", 989e12},   {"H100 PCIe", 756e12},    {"H100 NVL", 835e12},
        {"H100", 989e12},       {"H800", 989e12},    {"B200", 2250e12},        {"A100", 312e12},
        {"A800", 312e12},       {"A40", 149.7e12},   {"A10", 125e12},          {"L40S", 362e12},
        {"L40", 181e12},        {"L4", 121e12},      {"RTX 6000 Ada", 364e12}, {"RTX A6000", 154.8e12},
        {"RTX 4090", 165.2e12}, {"RTX 3090", 71e12},
    };
    if (dev->precision != DEVICE_BF16)
        return 0;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (strstr(dev->name, table[i].name))
            return table[i].peak;
    return 0;
}

static void set_progress_callback(struct device *dev, void (*call)(void *), void *context) {
    dev->progress_callback = call;
    dev->progress_context = context;
    dev->progress_thread = pthread_self();
}

void cuda_host_wait(struct device *dev, cudaEvent_t event) {
    /* The callback communicates, which only the thread that set it may do; others just wait. */
    if (!dev->progress_callback || !pthread_equal(dev->progress_thread, pthread_self())) {
        cuda_check(cudaEventSynchronize(event));
        return;
    }
    cudaError_t status;
    for (int polls = 0; (status = cudaEventQuery(event)) == cudaErrorNotReady; polls++) {
        struct timespec pause = {0, 50000};
        dev->progress_callback(dev->progress_context);
        if (polls > 100) /* short waits are polled without a pause */
            nanosleep(&pause, NULL);
    }
    cuda_check(status);
}

void cuda_await_queue(struct device *dev) {
    cudaEvent_t event;
    cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    cuda_check(cudaEventRecord(event, dev->stream));
    cuda_host_wait(dev, event);
    cuda_check(cudaEventDestroy(event));
}

/* ---- memory ---- */

static void *alloc_zeroed(struct device *dev, size_t bytes, struct error *e) {
    void *data = NULL;
    if (bytes == 0)
        bytes = 1;
    cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        fail_user(e,
                  "cannot allocate %.2f GB on the GPU; make train.micro_batch, train.seq_len or the model "
                  "smaller, or set system.recompute = full",
                  (double)bytes / 1e9);
        return NULL;
    }
    cuda_check(status);
    cuda_check(cudaMemsetAsync(data, 0, bytes, dev->stream));
    return data;
}

static void release(struct device *dev, void *data) {
    (void)dev;
    cuda_check(cudaFree(data));
}

static size_t memory_available(struct device *dev) {
    size_t available, total;
    cuda_check(cudaMemGetInfo(&available, &total));
    /* At most an equal share: how much other ranks have allocated by now depends on timing. */
    size_t share = total / (size_t)dev->sharers;
    return dev->sharers == 1 || available < share ? available : share;
}

static void zero(struct device *dev, void *data, size_t bytes) {
    cuda_check(cudaMemsetAsync(data, 0, bytes, dev->stream));
}

static void copy(struct device *dev, void *to, const void *from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, dev->stream));
}

/* ---- plans ---- */

static int plan(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e) {
    *cost = (struct op_cost){0, 0};
    switch (spec->kind) {
    case OP_EMBED:
        return cuda_embed_plan(dev, &spec->embed, cost, e);
    case OP_NORM:
        return cuda_norm_plan(dev, &spec->norm, cost, e);
    case OP_LINEAR:
        return cuda_linear_plan(dev, spec, cost, e) != 0 ? -1 : cuda_linear_act_plan(dev, spec, e);
    case OP_QKV_MIX:
        return cuda_qkv_mix_plan(dev, &spec->qkv_mix, cost, e);
    case OP_ATTENTION:
        return cuda_attention_plan(dev, &spec->attention, cost, e);
    case OP_TALKING:
        return cuda_talking_plan(dev, &spec->attention, cost, e);
    case OP_SIMPLICIAL:
        return cuda_simplicial_plan(dev, &spec->attention, cost, e);
    case OP_COLLAPSE:
        return cuda_collapse_plan(dev, &spec->collapse, cost, e);
    case OP_CLASSIFIER:
        return cuda_classifier_plan(dev, &spec->classifier, cost, e);
    case OP_DECODE:
        return cuda_decode_plan(dev, &spec->attention, cost, e);
    case OP_ORTHOGONALIZE:
        return cuda_orthogonalize_plan(dev, &spec->orthogonalize, cost, e);
    case OP_DIFF_COMBINE:
        return cuda_diff_combine_plan(dev, &spec->diff_combine, cost, e);
    case OP_QK_NORM:
        return cuda_qk_norm_plan(dev, &spec->qk_norm, cost, e);
    case OP_FOLD:
    case OP_ACT:
        break;
    }
    return 0;
}

static void set_workspace(struct device *dev, void *data, size_t bytes) {
    dev->workspace = (char *)data;
    dev->workspace_bytes = bytes;
}

int cuda_check_libraries(struct device *dev, struct error *e) {
    if (check_matmuls(dev, e) != 0 || check_attentions(dev, e) != 0)
        return -1;
    plan_file_save(dev->plan_file); /* everything has been planned, and computes what it should */
    return 0;
}

void *cuda_workspace(struct device *dev, size_t bytes, const char *op) {
    return check_workspace(op, dev->workspace, dev->workspace_bytes, bytes);
}

/* 64 MiB of gradients, which NVLink moves in about 0.3 ms: ten times the latency of a collective. */
enum { MESSAGE_ELEMENTS = 16 << 20 };

const struct kernels *kernels_cuda(void) {
    static const struct kernels table = {
        .name = "cuda",
        .open = open_device,
        .close = close_device,
        .describe = describe,
        .dtypes = dtypes,
        .peak_flops = peak_flops,
        .open_comm = cuda_open_comm,
        .staging_bytes = cuda_staging_bytes,
        .set_progress_callback = set_progress_callback,
        .alloc = alloc_zeroed,
        .release = release,
        .memory_available = memory_available,
        .zero = zero,
        .copy = copy,
        .upload = cuda_upload,
        .download = cuda_download,
        .graph_replay = cuda_graph_replay,
        .graph_begin = cuda_graph_begin,
        .graph_end = cuda_graph_end,
        .range_begin = cuda_range_begin,
        .range_end = cuda_range_end,
        .trace_begin = cuda_trace_begin,
        .trace_end = cuda_trace_end,
        .plan = plan,
        .check_libraries = cuda_check_libraries,
        .set_workspace = set_workspace,
        .attention_backend = cuda_attention_backend,
        .message_elements = MESSAGE_ELEMENTS,
        .run_ahead = RUN_AHEAD,
#define OP(name, parameters, arguments) .name = cuda_##name,
#include "kernels/ops.def"
    };
    return &table;
}
