/* The CUDA runtime's calls that the backend makes: memory, copies, launches, the device. Streams and events
 * are in streams.cc. Device memory is one range of addresses that is only accessible while the queue runs. */
#include "tests/cuda/emulator/queue.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda_profiler_api.h>

#include <map>
#include <vector>

#if defined __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

struct emulator_gpu emulator_gpu = {1, 3, (size_t)2 << 30, 13000, 0, 0};

enum { PAGE = 4096 };
static const size_t ARENA_BYTES = (size_t)16 << 30; /* of addresses */
static const size_t SHARED_LIMIT = 227 << 10;
static const size_t SHARED_DEFAULT = 48 << 10;
/* The part of it that a kernel's static variables may take: dynamic memory begins after them, aligned to
 * 1024. */
static const size_t SHARED_STATIC = 1 << 10;

static struct runtime {
    char *arena;
    size_t used;      /* bytes of the arena given out; 0 again when nothing is allocated */
    size_t allocated; /* bytes in live allocations */
    std::map<char *, size_t> blocks;
    std::map<void *, size_t> pinned;
    int open; /* nested emulator_open_memory(); 0: device memory is protected */
    std::map<const void *, size_t> shared_allowed;
    int64_t launches, overlapping, hanging = -1;
    int device;
} &R = *new struct runtime();

/* ---- device memory ---- */

static void protect(int access) {
    size_t bytes = (R.used + PAGE - 1) / PAGE * PAGE;
    if (bytes > 0 && mprotect(R.arena, bytes, access) != 0)
        emulator_fail("mprotect failed");
}

void emulator_open_memory() {
    if (R.open++ == 0)
        protect(PROT_READ | PROT_WRITE);
}

void emulator_close_memory() {
    if (--R.open == 0)
        protect(PROT_NONE);
}

static void check_sentinels() {
    for (const auto &[data, bytes] : R.blocks)
        if (!emulator_sentinel_intact(data - EMULATOR_SENTINEL) || !emulator_sentinel_intact(data + bytes))
            emulator_fail("wrote beside an allocation of %zu bytes", bytes);
}

void emulator_check_sentinels() {
    emulator_lock lock;
    check_sentinels();
}

/* Fill device memory that is open. Large stretches of 0 and of 0xff (NaN) are mapped, to be copied on write: so
 * only the pages that are touched take time, and most of a workspace is not. */
static void fill(char *data, int value, size_t bytes) {
    static const size_t CHUNK = 2 << 20;
    static const int ones = [] {
        int file = memfd_create("iha-emulator", MFD_CLOEXEC);
        std::vector<char> content(CHUNK, (char)0xff);
        if (file < 0 || write(file, content.data(), CHUNK) != (ssize_t)CHUNK)
            emulator_fail("memfd_create failed");
        return file;
    }();
    char *end = data + bytes, *page = data + (PAGE - (uintptr_t)data % PAGE) % PAGE;
    if (bytes >= CHUNK + PAGE && (value == 0 || value == 0xff)) {
        memset(data, value, (size_t)(page - data));
        int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE | (value == 0 ? MAP_ANONYMOUS : 0);
        for (data = page; (size_t)(end - data) >= CHUNK; data += CHUNK)
            if (mmap(data, CHUNK, PROT_READ | PROT_WRITE, flags, value == 0 ? -1 : ones, 0) == MAP_FAILED)
                emulator_fail("cannot map device memory");
    }
    memset(data, value, (size_t)(end - data));
}

static void poison(char *data, size_t bytes, bool freed) {
    fill(data, 0xff, bytes);
#if defined __SANITIZE_ADDRESS__
    if (freed)
        __asan_poison_memory_region(data, bytes);
    else
        __asan_unpoison_memory_region(data, bytes);
#endif
    (void)freed;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    emulator_lock lock;
    if (emulator_gpu.count == 0)
        return emulator_error(cudaErrorNoDevice);
    cudaError_t error = emulator_check_unsafe();
    if (error != cudaSuccess)
        return error;
    if (!R.arena) {
        R.arena =
            (char *)mmap(nullptr, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (R.arena == MAP_FAILED)
            emulator_fail("no addresses for device memory");
    }
    size_t rounded = (bytes + 255) / 256 * 256 + 2 * EMULATOR_SENTINEL;
    if (R.allocated + bytes > emulator_gpu.memory || R.used + rounded > ARENA_BYTES)
        return emulator_error(cudaErrorMemoryAllocation);
    char *data = R.arena + R.used + EMULATOR_SENTINEL;
    R.used += rounded;
    R.allocated += bytes;
    R.open++;
    protect(PROT_READ | PROT_WRITE); /* includes the new addresses, even if memory was open before */
#if defined __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(data - EMULATOR_SENTINEL, rounded);
#endif
    poison(data, bytes, false);
    emulator_write_sentinel(data - EMULATOR_SENTINEL);
    emulator_write_sentinel(data + bytes);
    R.blocks[data] = bytes;
    emulator_close_memory();
    *out = data;
    return cudaSuccess;
}

/* Memory that is freed may be in use by anything queued. */
static cudaError_t wait_before_freeing(emulator_lock &lock) {
    cudaError_t error = emulator_check_unsafe();
    if (error == cudaSuccess)
        emulator_wait_for_all(lock);
    return error;
}

cudaError_t cudaFree(void *data) {
    if (!data)
        return cudaSuccess;
    emulator_lock lock;
    cudaError_t error = wait_before_freeing(lock);
    if (error != cudaSuccess)
        return error;
    auto found = R.blocks.find((char *)data);
    if (found == R.blocks.end())
        return emulator_error(cudaErrorInvalidValue);
    emulator_open_memory();
    check_sentinels();
    poison(found->first, found->second, true);
    R.allocated -= found->second;
    R.blocks.erase(found);
    emulator_close_memory();
    if (R.blocks.empty()) {
        madvise(R.arena, R.used, MADV_DONTNEED);
        protect(PROT_NONE);
        R.used = 0;
    }
    return cudaSuccess;
}

void emulator_check_device(const void *p, size_t bytes, const char *what) {
    emulator_lock lock;
    auto next = R.blocks.upper_bound((char *)p);
    if (bytes > 0 && (next == R.blocks.begin() || (--next)->first + next->second < (const char *)p + bytes))
        emulator_fail("%s: %p .. +%zu is not device memory", what, p, bytes);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    emulator_lock lock;
    *total = emulator_gpu.memory;
    *available = emulator_gpu.memory - R.allocated;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
    emulator_lock lock;
    cudaError_t error = emulator_check_unsafe();
    if (error != cudaSuccess)
        return error;
    *out = malloc(bytes);
    memset(*out, 0xff, bytes);
    R.pinned[*out] = bytes;
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t bytes) {
    return cudaHostAlloc(out, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *data) {
    emulator_lock lock;
    cudaError_t error = wait_before_freeing(lock);
    if (error != cudaSuccess)
        return error;
    if (R.pinned.erase(data) == 0)
        return emulator_error(cudaErrorInvalidValue);
    free(data);
    return cudaSuccess;
}

static bool pinned(const void *p, size_t bytes) {
    auto next = R.pinned.upper_bound((void *)p);
    return next != R.pinned.begin() && (char *)(--next)->first + next->second >= (const char *)p + bytes;
}

int emulator_allocations(void) {
    emulator_lock lock;
    return (int)(R.blocks.size() + R.pinned.size());
}

/* ---- launches and copies ---- */

cudaError_t emulator_launch(const cudaLaunchConfig_t *config, const void *kernel,
                            std::function<void()> thread) {
    dim3 grid = config->gridDim, block = config->blockDim;
    size_t shared = config->dynamicSmemBytes, most = SHARED_DEFAULT - SHARED_STATIC;
    const char *name = emulator_kernel_name;
    bool hangs;
    {
        emulator_lock lock;
        auto allowed = R.shared_allowed.find(kernel);
        if (allowed != R.shared_allowed.end())
            most = allowed->second;
        hangs = R.launches++ == R.hanging;
    }
    if (block.x * block.y * block.z > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        block.x == 0 || block.y == 0 || block.z == 0 || grid.y > 65535 || grid.z > 65535)
        emulator_fail("a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads cannot be launched", grid.x,
                      grid.y, grid.z, block.x, block.y, block.z);
    bool overlaps = false;
    for (unsigned i = 0; i < config->numAttrs; i++)
        overlaps |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                    config->attrs[i].val.programmaticStreamSerializationAllowed;
    if (overlaps) {
        emulator_lock lock;
        R.overlapping++;
        emulator_capture *capture = emulator_stream(config->stream)->capture;
        if (capture && emulator_refuses("overlap"))
            return emulator_capture_failed(capture, cudaErrorInvalidResourceHandle);
    }
    if (shared > most)
        emulator_fail("%zu bytes of shared memory are more than cudaFuncSetAttribute allowed", shared);
    if (hangs)
        return emulator_enqueue_steps(
            config->stream, [] { return false; }, nullptr);
    return emulator_enqueue(config->stream, [=] {
        int64_t before = emulator_waited,
                threads = (int64_t)grid.x * grid.y * grid.z * block.x * block.y * block.z;
        emulator_running_name = name;
        emulator_pass_time(name, 0);
        emulator_run_grid(grid, block, shared, thread);
        if (overlaps && emulator_waited - before != threads)
            emulator_fail("%lld of %lld threads waited for the kernel before",
                          (long long)(emulator_waited - before), (long long)threads);
    });
}

int64_t emulator_launches(void) {
    emulator_lock lock;
    return R.launches;
}

int64_t emulator_overlapping(void) {
    emulator_lock lock;
    return R.overlapping;
}

void emulator_hang_launch(int64_t launch) {
    R.hanging = launch;
}

bool emulator_on_gpu(void) {
    return false;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if ((size_t)value > SHARED_LIMIT)
            return emulator_error(cudaErrorInvalidValue);
        emulator_lock lock;
        R.shared_allowed[kernel] = (size_t)value;
    }
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
    *a = {};
    a->ptxVersion = a->binaryVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int threads,
                                                          size_t shared) {
    int by_threads = 2048 / threads, by_shared = (int)(SHARED_LIMIT / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return cudaSuccess;
}

/* A captured copy runs whenever its graph does, so its host memory must stay valid: only pinned memory is
 * accepted here. */
static cudaError_t check_host_memory(const void *host, size_t bytes, cudaStream_t stream) {
    emulator_lock lock;
    emulator_capture *capture = emulator_stream(stream)->capture;
    if (capture && !pinned(host, bytes))
        return emulator_capture_failed(capture, cudaErrorStreamCaptureUnsupported);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    cudaError_t error = cudaSuccess;
    if (from_device)
        emulator_check_device(src, bytes, "cudaMemcpy");
    else
        error = check_host_memory(src, bytes, stream);
    if (to_device)
        emulator_check_device(dst, bytes, "cudaMemcpy");
    else
        error = check_host_memory(dst, bytes, stream);
    if (error != cudaSuccess)
        return error;
    return emulator_enqueue(stream, [=] {
        emulator_running_name = "cudaMemcpy";
        memmove(dst, src, bytes);
    });
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
    {
        emulator_lock lock;
        cudaError_t error = emulator_check_unsafe();
        if (error != cudaSuccess)
            return error;
    }
    cudaError_t error = cudaMemcpyAsync(dst, src, bytes, kind, nullptr);
    return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t stream) {
    emulator_check_device(data, bytes, "cudaMemset");
    return emulator_enqueue(stream, [=] {
        emulator_running_name = "cudaMemset";
        fill((char *)data, value, bytes);
    });
}

cudaError_t cudaMemset(void *data, int value, size_t bytes) {
    return cudaMemsetAsync(data, value, bytes, nullptr);
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = emulator_gpu.count;
    if (emulator_gpu.count_error)
        return emulator_error((cudaError_t)emulator_gpu.count_error);
    return emulator_gpu.count > 0         ? cudaSuccess
           : emulator_gpu.driver >= 13000 ? cudaErrorNoDevice
                                          : cudaErrorInsufficientDriver;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = emulator_gpu.driver;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emulator_gpu.count)
        return emulator_error(cudaErrorInvalidDevice);
    if (emulator_gpu.device_error)
        return emulator_error((cudaError_t)emulator_gpu.device_error);
    R.device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = R.device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device >= emulator_gpu.count)
        return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "NVIDIA H200");
    p->uuid.bytes[0] = (char)(device + 1);
    p->pciBusID = device + 1;
    p->major = 9;
    p->multiProcessorCount = emulator_gpu.sms;
    p->totalGlobalMem = emulator_gpu.memory;
    p->sharedMemPerBlockOptin = SHARED_LIMIT;
    p->sharedMemPerBlock = SHARED_DEFAULT;
    p->l2CacheSize = 50 << 20;
    p->warpSize = 32;
    return cudaSuccess;
}

cudaError_t cudaProfilerStart() {
    return cudaSuccess;
}

cudaError_t cudaProfilerStop() {
    return cudaSuccess;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
#define ERROR(name, text)                                                                                    \
    { name, #name, text }
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for the runtime"),
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR(cudaErrorSystemNotReady, "system not yet initialized"),
    ERROR(cudaErrorDevicesUnavailable, "CUDA-capable device(s) is/are busy or unavailable"),
    ERROR(cudaErrorNotReady, "device not ready"),
    ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    ERROR(cudaErrorNotSupported, "operation not supported"),
    ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    ERROR(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    ERROR(cudaErrorStreamCaptureImplicit,
          "operation would make the legacy stream depend on a capturing blocking stream"),
    ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR(cudaErrorStreamCaptureWrongThread,
          "attempt to terminate a thread-local capture sequence from another thread"),
#undef ERROR
};

const char *cudaGetErrorName(cudaError_t error) {
    for (const auto &known : errors)
        if (known.error == error)
            return known.name;
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error) {
    for (const auto &known : errors)
        if (known.error == error)
            return known.text;
    return "unrecognized error code";
}
