/* The CUDA runtime's calls that the backend makes: memory, queue, events, launches.
 *
 * There is one queue, whatever the streams: work is appended, and runs in its order at the next call that
 * waits. Device memory is one stretch of addresses that is only accessible while the queue runs. */
#include "tests/simt/internal.h"

#include <stdio.h>
#include <sys/mman.h>

#include <map>

#if defined __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

struct simt_gpu simt_gpu = {1, 3, (size_t)2 << 30};

enum { PAGE = 4096 };
static const size_t ARENA_BYTES = (size_t)16 << 30; /* of addresses */
static const size_t SHARED_LIMIT = 227 << 10;
static const size_t SHARED_DEFAULT = 48 << 10;

static struct {
    char *arena;
    size_t used;      /* bytes of the arena handed out; starts again when nothing is allocated */
    size_t allocated; /* bytes alive */
    std::map<char *, size_t> blocks;
    std::map<void *, size_t> pinned;
    std::vector<std::function<void()>> queue;
    bool running;
    std::map<const void *, size_t> shared_allowed;
    int64_t launches;
} R;

/* ---- device memory ---------------------------------------------------------------------------------------
 */

static void protect(int access) {
    size_t bytes = (R.used + PAGE - 1) / PAGE * PAGE;
    if (bytes > 0 && mprotect(R.arena, bytes, access) != 0)
        simt_fail("mprotect failed");
}

/* Scope in which device memory can be touched. */
struct device_access {
    bool outermost = !R.running;
    device_access() {
        if (outermost)
            protect(PROT_READ | PROT_WRITE);
        R.running = true;
    }
    ~device_access() {
        if (outermost) {
            protect(PROT_NONE);
            R.running = false;
        }
    }
};

static void check_sentinels() {
    for (const auto &[data, bytes] : R.blocks)
        if (!simt_guard_intact(data - SIMT_SENTINEL) || !simt_guard_intact(data + bytes))
            simt_fail("wrote beside an allocation of %zu bytes", bytes);
}

static void poison(char *data, size_t bytes, bool freed) {
    memset(data, 0xff, bytes);
#if defined __SANITIZE_ADDRESS__
    if (freed)
        __asan_poison_memory_region(data, bytes);
    else
        __asan_unpoison_memory_region(data, bytes);
#endif
    (void)freed;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    if (simt_gpu.count == 0)
        return cudaErrorNoDevice;
    if (!R.arena) {
        R.arena =
            (char *)mmap(nullptr, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (R.arena == MAP_FAILED)
            simt_fail("no addresses for device memory");
    }
    size_t rounded = (bytes + 255) / 256 * 256 + 2 * SIMT_SENTINEL;
    if (R.allocated + bytes > simt_gpu.memory || R.used + rounded > ARENA_BYTES)
        return cudaErrorMemoryAllocation;
    char *data = R.arena + R.used + SIMT_SENTINEL;
    R.used += rounded;
    R.allocated += bytes;
    device_access access;
#if defined __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(data - SIMT_SENTINEL, rounded);
#endif
    poison(data, bytes, false);
    simt_guard(data - SIMT_SENTINEL);
    simt_guard(data + bytes);
    R.blocks[data] = bytes;
    *out = data;
    return cudaSuccess;
}

static void run_queue();

cudaError_t cudaFree(void *data) {
    if (!data)
        return cudaSuccess;
    run_queue();
    auto found = R.blocks.find((char *)data);
    if (found == R.blocks.end())
        return cudaErrorInvalidValue;
    device_access access;
    check_sentinels();
    poison(found->first, found->second, true);
    R.allocated -= found->second;
    R.blocks.erase(found);
    if (R.blocks.empty()) {
        madvise(R.arena, R.used, MADV_DONTNEED);
        protect(PROT_NONE);
        R.used = 0;
    }
    return cudaSuccess;
}

void simt_check_device(const void *p, size_t bytes, const char *what) {
    auto next = R.blocks.upper_bound((char *)p);
    if (bytes > 0 && (next == R.blocks.begin() || (--next)->first + next->second < (const char *)p + bytes))
        simt_fail("%s: %p .. +%zu is not device memory", what, p, bytes);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = simt_gpu.memory;
    *available = simt_gpu.memory - R.allocated;
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t bytes) {
    *out = malloc(bytes);
    memset(*out, 0xff, bytes);
    R.pinned[*out] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *data) {
    run_queue();
    R.pinned.erase(data);
    free(data);
    return cudaSuccess;
}

int simt_allocations(void) {
    return (int)(R.blocks.size() + R.pinned.size());
}

/* ---- the queue -------------------------------------------------------------------------------------------
 */

void simt_enqueue(std::function<void()> work) {
    R.queue.push_back(std::move(work));
}

static void run_queue() {
    if (R.queue.empty() || R.running)
        return;
    device_access access;
    for (size_t i = 0; i < R.queue.size(); i++) {
        R.queue[i]();
        check_sentinels();
    }
    R.queue.clear();
}

cudaError_t simt_launch(const cudaLaunchConfig_t *config, const void *kernel, std::function<void()> thread) {
    dim3 grid = config->gridDim, block = config->blockDim;
    size_t shared = config->dynamicSmemBytes;
    auto allowed = R.shared_allowed.find(kernel);
    const char *name = simt_kernel_name;
    R.launches++;
    if (block.x * block.y * block.z > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        block.x == 0 || block.y == 0 || block.z == 0 || grid.y > 65535 || grid.z > 65535)
        simt_fail("a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads cannot be launched", grid.x, grid.y,
                  grid.z, block.x, block.y, block.z);
    if (shared > (allowed == R.shared_allowed.end() ? SHARED_DEFAULT : allowed->second))
        simt_fail("%zu bytes of shared memory are more than cudaFuncSetAttribute allowed", shared);
    simt_enqueue([=] {
        simt_kernel_name = name;
        simt_run_grid(grid, block, shared, thread);
    });
    return cudaSuccess;
}

int64_t simt_launches(void) {
    return R.launches;
}

bool simt_on_gpu(void) {
    return false;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if ((size_t)value > SHARED_LIMIT)
            return cudaErrorInvalidValue;
        R.shared_allowed[kernel] = (size_t)value;
    }
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int threads,
                                                          size_t shared) {
    int by_threads = 2048 / threads, by_shared = (int)(SHARED_LIMIT / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    if (from_device)
        simt_check_device(src, bytes, "cudaMemcpy");
    if (to_device)
        simt_check_device(dst, bytes, "cudaMemcpy");
    simt_enqueue([=] { memcpy(dst, src, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
    cudaMemcpyAsync(dst, src, bytes, kind, nullptr);
    run_queue();
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t) {
    simt_check_device(data, bytes, "cudaMemset");
    simt_enqueue([=] { memset(data, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemset(void *data, int value, size_t bytes) {
    return cudaMemsetAsync(data, value, bytes, nullptr);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = (cudaStream_t)malloc(1);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    run_queue();
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    run_queue();
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    run_queue();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = (cudaEvent_t)malloc(1);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, 0);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
    run_queue();
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 1;
    return cudaSuccess;
}

/* ---- the device ------------------------------------------------------------------------------------------
 */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = simt_gpu.count;
    return simt_gpu.count > 0 ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaSetDevice(int device) {
    return device < simt_gpu.count ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device >= simt_gpu.count)
        return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "NVIDIA H200");
    p->major = 9;
    p->multiProcessorCount = simt_gpu.sms;
    p->totalGlobalMem = simt_gpu.memory;
    p->sharedMemPerBlockOptin = SHARED_LIMIT;
    p->sharedMemPerBlock = SHARED_DEFAULT;
    p->l2CacheSize = 50 << 20;
    p->warpSize = 32;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation     ? "out of memory"
           : error == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for the runtime"
                                                  : "an error";
}
