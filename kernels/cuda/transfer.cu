/* Copies from host to device and back, through pinned buffers. Where types differ, a kernel converts: the GPU reads
 * and writes pinned memory itself, and the host only copies.
 *
 * An upload returns as soon as its last piece is in a pinned buffer: the copy is asynchronous, and a buffer
 * is written again only when its own copy is done. Copies are queued behind the kernels of their step, so
 * with few buffers the host would wait for earlier passes; SLOTS buffers hold what a step or more uploads. */
#include "kernels/cuda/cuda.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS = 16, SLOT_BYTES = 1 << 20 };

struct staging {
    char *slot[SLOTS];
    cudaEvent_t done[SLOTS];
    int next;
};

struct staging *staging_create(void) {
    struct staging *s = (struct staging *)calloc(1, sizeof *s);
    for (int i = 0; s && i < SLOTS; i++) {
        cuda_check(cudaMallocHost((void **)&s->slot[i], SLOT_BYTES));
        cuda_check(cudaEventCreateWithFlags(&s->done[i], cudaEventDisableTiming));
    }
    return s;
}

void staging_free(struct staging *s) {
    for (int i = 0; i < SLOTS; i++) {
        cuda_check(cudaEventDestroy(s->done[i]));
        cuda_check(cudaFreeHost(s->slot[i]));
    }
    free(s);
}

/* ---- conversion ---- */

enum { THREADS = 256, MOST_BLOCKS = 1024 };

template <typename To, typename From> static __device__ __forceinline__ To convert_number(From x) {
    if constexpr (std::is_same_v<From, bf16>)
        return convert_number<To>(__bfloat162float(x));
    else if constexpr (std::is_same_v<To, bf16> && std::is_same_v<From, double>)
        return __double2bfloat16(x);
    else if constexpr (std::is_same_v<To, bf16>)
        return __float2bfloat16_rn((float)x);
    else
        return (To)x;
}

/* to [n] = from [n]; one of them is pinned host memory, so that the bus bounds it. */
template <typename To, typename From>
static __global__ void __launch_bounds__(THREADS) convert_all(To *to, const From *from, int64_t n) {
    wait_for_previous();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        to[i] = convert_number<To>(from[i]);
}

template <typename F> static void by_any_dtype(enum dtype dtype, F f) {
    switch (dtype) {
    case DTYPE_F32:
        return f(float());
    case DTYPE_F64:
        return f(double());
    case DTYPE_BF16:
        return f(bf16());
    case DTYPE_I32:
        return f(int32_t());
    }
}

/* Queue a copy of n elements between device and pinned memory. */
static void copy_converted(struct device *dev, void *to, enum dtype to_dtype, const void *from,
                           enum dtype from_dtype, int64_t n, cudaMemcpyKind kind) {
    if (to_dtype == from_dtype) {
        cuda_check(cudaMemcpyAsync(to, from, (size_t)n * dtype_bytes(to_dtype), kind, dev->stream));
        return;
    }
    unsigned blocks = (unsigned)min64(ceil_div(n, THREADS), MOST_BLOCKS);
    by_any_dtype(to_dtype, [&](auto x) {
        by_any_dtype(from_dtype, [&](auto y) {
            using To = decltype(x);
            using From = decltype(y);
            if constexpr (!std::is_same_v<To, From>)
                launch<convert_all<To, From>>(dev, blocks, THREADS, 0, (To *)to, (const From *)from, n);
        });
    });
}

/* ---- copies ---- */

/* Elements of a piece, which fits into a buffer in either type. */
static int64_t elements_of_a_piece(enum dtype x, enum dtype y) {
    size_t bytes = dtype_bytes(x) > dtype_bytes(y) ? dtype_bytes(x) : dtype_bytes(y);
    return SLOT_BYTES / (int64_t)bytes;
}

void cuda_upload(struct device *dev, tensor dst, const void *host, enum dtype host_dtype) {
    check_contiguous("upload", "destination", dst);
    struct staging *s = dev->staging;
    int64_t from = (int64_t)dtype_bytes(host_dtype), to = (int64_t)dtype_bytes(dst.dtype);
    int64_t total = tensor_count(dst), each = elements_of_a_piece(dst.dtype, host_dtype);
    for (int64_t begin = 0; begin < total; begin += each) {
        int64_t n = total - begin < each ? total - begin : each;
        int slot = s->next;
        s->next = (slot + 1) % SLOTS;
        cuda_host_wait(dev, s->done[slot]);
        memcpy(s->slot[slot], (const char *)host + begin * from, (size_t)(n * from));
        copy_converted(dev, (char *)dst.data + begin * to, dst.dtype, s->slot[slot], host_dtype, n,
                       cudaMemcpyHostToDevice);
        cuda_check(cudaEventRecord(s->done[slot], dev->stream));
    }
}

/* Take the first buffer for what is copied to the host, once it is free. */
static char *pinned_buffer(struct device *dev) {
    cuda_check(cudaSetDevice(dev->index)); /* per thread: the checkpoint thread calls this too */
    cuda_host_wait(dev, dev->staging->done[0]);
    return dev->staging->slot[0];
}

static void await_copy(struct device *dev) {
    cuda_check(cudaEventRecord(dev->staging->done[0], dev->stream));
    cuda_host_wait(dev, dev->staging->done[0]);
}

void cuda_download(struct device *dev, tensor src, void *host, enum dtype host_dtype) {
    check_contiguous("download", "source", src);
    int64_t from = (int64_t)dtype_bytes(src.dtype), to = (int64_t)dtype_bytes(host_dtype);
    int64_t total = tensor_count(src), each = elements_of_a_piece(src.dtype, host_dtype);
    for (int64_t begin = 0; begin < total; begin += each) {
        int64_t n = total - begin < each ? total - begin : each;
        char *pinned = pinned_buffer(dev);
        copy_converted(dev, pinned, host_dtype, (const char *)src.data + begin * from, src.dtype, n,
                       cudaMemcpyDeviceToHost);
        await_copy(dev);
        memcpy((char *)host + begin * to, pinned, (size_t)(n * to));
    }
}

void cuda_read(struct device *dev, const void *src, void *host, size_t bytes) {
    char *pinned = pinned_buffer(dev);
    cuda_check(cudaMemcpyAsync(pinned, src, bytes, cudaMemcpyDeviceToHost, dev->stream));
    await_copy(dev);
    memcpy(host, pinned, bytes);
}
