/* Kernels for tests/cuda/test_emulator.c: a correct one of each kind that the emulator supports, and faulty
 * ones that it must report. */
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/mma.cuh"
#include "tests/cuda/samples.h"

/* The default stream, on which launches overlap, is all that a launch needs. */
static struct device queue = {.overlaps_launches = true};

static float *device_floats(int64_t n) {
    float *p;
    cuda_check(cudaMalloc((void **)&p, (size_t)n * sizeof *p));
    return p;
}

/* Run kernel(out, argument) and fetch out [n]. */
template <auto kernel>
static void sample(dim3 grid, dim3 block, size_t shared, float *host, int64_t n, int argument) {
    float *out = device_floats(n);
    launch<kernel>(&queue, grid, block, shared, out, argument);
    cuda_check(cudaMemcpy(host, out, (size_t)n * sizeof *out, cudaMemcpyDeviceToHost));
    cuda_check(cudaFree(out));
}

/* out[i] = 255 - i, reversed through shared memory; faulty without the barrier. */
static __global__ void reverse(float *out, int barrier) {
    wait_for_previous();
    __shared__ float s[256];
    s[threadIdx.x] = (float)threadIdx.x;
    if (barrier)
        __syncthreads();
    out[threadIdx.x] = s[255 - threadIdx.x];
}

void sample_reverse(float *out, int barrier) {
    sample<reverse>(1, 256, 0, out, 256, barrier);
}

/* Three rounds through one buffer: faulty without the second barrier, which keeps round r + 1 from writing
 * what others still read in round r. */
static __global__ void rotate(float *out, int second_barrier) {
    wait_for_previous();
    float *s = dynamic_shared<float>(), x = (float)threadIdx.x;
    for (int round = 0; round < 3; round++) {
        s[threadIdx.x] = x;
        __syncthreads();
        x = s[(threadIdx.x + 1) % blockDim.x];
        if (second_barrier)
            __syncthreads();
    }
    out[threadIdx.x] = x;
}

void sample_rotate(float *out, int second_barrier) {
    sample<rotate>(1, 64, 64 * sizeof(float), out, 64, second_barrier);
}

/* Reads shared memory that was not written. */
static __global__ void uninitialised(float *out, int) {
    wait_for_previous();
    __shared__ float s[32];
    out[threadIdx.x] = s[threadIdx.x] + dynamic_shared<float>()[threadIdx.x];
}

void sample_uninitialised(float *out) {
    sample<uninitialised>(1, 32, 32 * sizeof(float), out, 32, 0);
}

int64_t sample_large_block(void) {
    static const size_t BYTES = (5 << 20) + 100, BEGIN = 4001, CLEARED = (5 << 20) - 9000;
    static unsigned char host[BYTES];
    unsigned char *block;
    int64_t wrong = 0;
    for (int again = 0; again < 2; again++) { /* the second time at addresses that were used */
        cuda_check(cudaMalloc((void **)&block, BYTES));
        for (int cleared = 0; cleared < 2; cleared++) {
            if (cleared)
                cuda_check(cudaMemset(block + BEGIN, 0, CLEARED));
            cuda_check(cudaMemcpy(host, block, BYTES, cudaMemcpyDeviceToHost));
            for (size_t i = 0; i < BYTES; i++)
                wrong += host[i] != (cleared && i >= BEGIN && i < BEGIN + CLEARED ? 0 : 0xff);
        }
        cuda_check(cudaFree(block));
    }
    return wrong;
}

static __global__ void write_at(float *out, int at) {
    wait_for_previous();
    if (threadIdx.x == 0)
        out[at] = 1;
}

void sample_write_at(int at) {
    float out[10];
    sample<write_at>(2, 32, 0, out, 10, at);
}

/* Threads from `waiting` on do not wait for the kernel before. */
static __global__ void early(float *out, int waiting) {
    if ((int)threadIdx.x < waiting)
        wait_for_previous();
    out[threadIdx.x] = 1;
}

void sample_early(int waiting) {
    float out[64];
    sample<early>(1, 64, 0, out, 64, waiting);
}

static __global__ void read_at(float *out, int at) {
    wait_for_previous();
    out[threadIdx.x] = out[at];
}

void sample_read_at(int at) {
    float out[10];
    sample<read_at>(1, 10, 0, out, 10, at);
}

static __global__ void write_shared(float *out, int at) {
    wait_for_previous();
    dynamic_shared<float>()[at] = 1;
    out[0] = 1;
}

void sample_write_shared(int at) {
    float out;
    sample<write_shared>(1, 1, 16 * sizeof(float), &out, 1, at);
}

static __global__ void divergent(float *out, int kind) {
    wait_for_previous();
    if (kind == 0 && threadIdx.x == 7)
        return;
    if (kind == 1 && threadIdx.x == 7)
        __syncthreads();
    else if (kind < 2)
        __syncthreads();
    if (kind == 2 && threadIdx.x != 7)
        __syncwarp();
    if (kind == 3)
        warp_sum(threadIdx.x < 32 ? 1.0f : 2.0f); /* of a block that ends within a warp */
    out[threadIdx.x] = 1;
}

void sample_divergent(int kind) {
    float out[48];
    sample<divergent>(1, kind == 3 ? 48 : 32, 0, out, 48, kind);
}

void sample_host_access(void) {
    volatile float *p = device_floats(4);
    p[0] = 1;
}

/* Warp operations, one result after another. */
static __global__ void warps(float *out, int) {
    wait_for_previous();
    unsigned lane = threadIdx.x;
    float x = (float)lane;
    float results[] = {__shfl_sync(0xffffffff, x, 5),
                       __shfl_xor_sync(0xffffffff, x, 3),
                       __shfl_up_sync(0xffffffff, x, 2),
                       __shfl_down_sync(0xffffffff, x, 2),
                       __shfl_down_sync(0xffffffff, x, 2, 8),
                       warp_sum(x),
                       warp_max(x),
                       (float)__popc(__ballot_sync(0xffffffff, lane % 3 == 0)),
                       (float)__reduce_max_sync(0xffffffff, (int)lane),
                       block_sum<32>(x)};
    for (int i = 0; i < SAMPLE_WARP_RESULTS; i++)
        out[i * 32 + lane] = results[i];
}

void sample_warps(float *out) {
    sample<warps>(1, 32, 0, out, SAMPLE_WARP_RESULTS * 32, 0);
}

static __global__ void atomics(float *out, int n) {
    wait_for_previous();
    __shared__ int count;
    if (threadIdx.x == 0)
        count = 0;
    __syncthreads();
    atomicAdd(&count, 1);
    float sum = block_sum<128>((float)threadIdx.x), threads = block_sum<128>(1.0f);
    float total = (float)count * (float)n + sum * threads;
    if (threads != 128 || __syncthreads_count(total == (float)count * (float)n + 127 * 64 * 128) != 128)
        total = -1;
    if (threadIdx.x == 0)
        out[blockIdx.x] = total;
}

void sample_atomics(float *out) {
    sample<atomics>(4, 128, 0, out, 4, 10000);
}

/* D = A B for A [16,16] by rows, B [16,8] by rows, loaded with ldmatrix from shared memory that cp.async
 * filled. Faulty without the wait. */
static __global__ void matmul(float *d, int wait) {
    wait_for_previous();
    bf16 *a = dynamic_shared<bf16>(), *b = a + 256;
    const bf16 *in = (const bf16 *)(d + 128);
    int lane = (int)threadIdx.x;
    for (int i = lane; i < (256 + 128) / 8; i += 32)
        cp_async<16>(a + i * 8, in + i * 8);
    cp_async_commit();
    if (wait)
        cp_async_wait<0>();
    __syncwarp();
    uint32_t fragment_a[4], fragment_b[2];
    ldmatrix<4, false>(fragment_a, a + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix<2, true>(fragment_b, b + lane % 16 * 8);
    float sum[4] = {0, 0, 0, 0};
    mma_m16n8k16(sum, fragment_a, fragment_b);
    for (int r = 0; r < 4; r++)
        d[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[r];
    cp_async_wait<0>();
}

void sample_matmul(const float *a, const float *b, float *d, int wait) {
    bf16 in[256 + 128];
    for (int i = 0; i < 256 + 128; i++)
        in[i] = __float2bfloat16_rn(i < 256 ? a[i] : b[i - 256]);
    float *p = device_floats(128 + 192);
    cuda_check(cudaMemcpy(p + 128, in, sizeof in, cudaMemcpyHostToDevice));
    launch<matmul>(&queue, 1, 32, sizeof in, p, wait);
    cuda_check(cudaMemcpy(d, p, 128 * sizeof *d, cudaMemcpyDeviceToHost));
    cuda_check(cudaFree(p));
}
