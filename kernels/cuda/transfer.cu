/* Copies from host to device and back, through pinned buffers, with conversion on the host.
 *
 * An upload returns as soon as its last piece is in a pinned buffer: the copy is asynchronous, and a buffer
 * is written again only when its own copy is done. Copies are queued behind the kernels of their step, so
 * with few buffers the host would wait for earlier passes; SLOTS buffers hold what a step or more uploads. */
#include "kernels/cuda/cuda.h"

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

template <typename To, typename From> static To convert_number(From x) {
    return (To)x;
}

template <> bf16 convert_number<bf16, float>(float x) {
    return __float2bfloat16_rn(x);
}

template <> bf16 convert_number<bf16, double>(double x) {
    return __double2bfloat16(x);
}

template <> bf16 convert_number<bf16, int32_t>(int32_t x) {
    return __float2bfloat16_rn((float)x);
}

template <> float convert_number<float, bf16>(bf16 x) {
    return __bfloat162float(x);
}

template <> double convert_number<double, bf16>(bf16 x) {
    return __bfloat162float(x);
}

template <> int32_t convert_number<int32_t, bf16>(bf16 x) {
    return (int32_t)__bfloat162float(x);
}

template <typename To, typename From> static void convert_run(void *dst, const void *src, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        ((To *)dst)[i] = convert_number<To>(((const From *)src)[i]);
}

template <typename To> static void convert_from(void *dst, const void *src, enum dtype from, int64_t n) {
    switch (from) {
    case DTYPE_F32:
        return convert_run<To, float>(dst, src, n);
    case DTYPE_F64:
        return convert_run<To, double>(dst, src, n);
    case DTYPE_BF16:
        return convert_run<To, bf16>(dst, src, n);
    case DTYPE_I32:
        return convert_run<To, int32_t>(dst, src, n);
    }
}

static void convert(void *dst, enum dtype to, const void *src, enum dtype from, int64_t n) {
    if (to == from) {
        memcpy(dst, src, (size_t)n * dtype_bytes(to));
        return;
    }
    switch (to) {
    case DTYPE_F32:
        return convert_from<float>(dst, src, from, n);
    case DTYPE_F64:
        return convert_from<double>(dst, src, from, n);
    case DTYPE_BF16:
        return convert_from<bf16>(dst, src, from, n);
    case DTYPE_I32:
        return convert_from<int32_t>(dst, src, from, n);
    }
}

/* ---- copies ---- */

void cuda_upload(struct device *dev, tensor dst, const void *host, enum dtype host_dtype) {
    check_contiguous("upload", "destination", dst);
    struct staging *s = dev->staging;
    int64_t total = tensor_count(dst), each = SLOT_BYTES / (int64_t)dtype_bytes(dst.dtype);
    for (int64_t begin = 0; begin < total; begin += each) {
        int64_t n = total - begin < each ? total - begin : each;
        int slot = s->next;
        s->next = (slot + 1) % SLOTS;
        cuda_host_wait(dev, s->done[slot]);
        convert(s->slot[slot], dst.dtype, (const char *)host + begin * (int64_t)dtype_bytes(host_dtype),
                host_dtype, n);
        cuda_check(cudaMemcpyAsync((char *)dst.data + begin * (int64_t)dtype_bytes(dst.dtype), s->slot[slot],
                                   (size_t)n * dtype_bytes(dst.dtype), cudaMemcpyHostToDevice, dev->stream));
        cuda_check(cudaEventRecord(s->done[slot], dev->stream));
    }
}

/* Copy `bytes` at src to a pinned buffer, behind everything queued so far; wait, and return the buffer. */
static const char *copy_to_pinned(struct device *dev, const void *src, size_t bytes) {
    struct staging *s = dev->staging;
    cuda_check(cudaSetDevice(dev->index)); /* per thread: the checkpoint thread calls this too */
    cuda_host_wait(dev, s->done[0]);       /* until the buffer is free */
    cuda_check(cudaMemcpyAsync(s->slot[0], src, bytes, cudaMemcpyDeviceToHost, dev->stream));
    cuda_check(cudaEventRecord(s->done[0], dev->stream));
    cuda_host_wait(dev, s->done[0]);
    return s->slot[0];
}

void cuda_download(struct device *dev, tensor src, void *host, enum dtype host_dtype) {
    check_contiguous("download", "source", src);
    int64_t from = (int64_t)dtype_bytes(src.dtype), to = (int64_t)dtype_bytes(host_dtype);
    int64_t total = tensor_count(src), each = SLOT_BYTES / from;
    for (int64_t begin = 0; begin < total; begin += each) {
        int64_t n = total - begin < each ? total - begin : each;
        const char *values = copy_to_pinned(dev, (const char *)src.data + begin * from, (size_t)(n * from));
        convert((char *)host + begin * to, host_dtype, values, src.dtype, n);
    }
}

void cuda_read(struct device *dev, const void *src, void *host, size_t bytes) {
    memcpy(host, copy_to_pinned(dev, src, bytes), bytes);
}
