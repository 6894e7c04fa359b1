/* How tests, in C, control the emulator; see emulator.h. */
#ifndef IHA_TESTS_CUDA_EMULATOR_CONTROL_H
#define IHA_TESTS_CUDA_EMULATOR_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The GPUs that the program finds. */
struct emulator_gpu {
    int count; /* 0: none; then what the driver says, below */
    int sms;
    size_t memory;
    int driver;       /* the version of CUDA that it supports, 12020: 12.2; 0: there is none */
    int count_error;  /* of cudaGetDeviceCount; 0: as is usual for such a driver */
    int device_error; /* of cudaSetDevice */
};
extern struct emulator_gpu emulator_gpu;

/* The order of threads, blocks and ready work from here on: 0 ascending, 1 descending, others random. */
void emulator_seed(uint64_t seed);

/* From here on a thread of its own, in the GPU's place, runs what is queued while the host continues:
 * whatever is ready, in the seed's order, at times after a pause of up to `delay_us` microseconds (0: never).
 * This cannot be undone. Device memory is then not protected from the host. Call it before anything is
 * queued. */
void emulator_background(int delay_us);

/* Allocations not yet freed, on the device and of pinned host memory. */
int emulator_allocations(void);

/* Kernels launched so far, and graphs. */
int64_t emulator_launches(void);
int64_t emulator_graph_launches(void);

/* Let the launch of this number (from 0) never end, so that what follows on its stream never begins; -1:
 * none. */
void emulator_hang_launch(int64_t launch);

/* With more than so much work queued, the host waits, as it does when a GPU's queue is full. In the
 * background mode only; 0: no limit. */
void emulator_limit_queue(int64_t works);

/* Which call of CUDA graphs fails: "begin" or "end" of a capture, "instantiate", or an overlapping launch in
 * a capture, "overlap"; NULL: none. */
void emulator_refuse_graphs(const char *what);

/* Launches so far that may overlap with the kernel ahead of them. */
int64_t emulator_overlapping(void);

/* What is wrong with cuBLASLt's products: one of tiles x tiles equal parts of the row-major D (in the order
 * of its elements) is not written, or has 1 added; of sums beside a product, the one of this index has 1
 * added. Or, of products with GELU alone: that part is not written, is of x sigmoid(1.702 x) instead, or the
 * matrix written beside D has 1 added there. */
enum emulator_fault {
    PRODUCTS_RIGHT,
    PRODUCTS_UNWRITTEN,
    PRODUCTS_WRONG,
    PRODUCTS_WRONG_SUM,
    PRODUCTS_UNWRITTEN_GELU,
    PRODUCTS_WRONG_GELU,
    PRODUCTS_WRONG_AUX
};
struct emulator_products {
    enum emulator_fault fault;
    int tile, tiles;
    int only;         /* the one product that is wrong, as counted by `calls`; -1: all */
    int calls;        /* products so far */
    int64_t min_rows; /* algorithms support no D of fewer rows; 0: any */
};
extern struct emulator_products emulator_products;
/* cuBLASLt has no algorithm that sums beside a product, or that applies GELU to it. */
extern bool emulator_no_sums, emulator_no_gelu;

/* Bytes that kernels have asked for in advance (prefetch_l2 of kernels/cuda/mma.cuh). */
extern int64_t emulator_prefetched;

/* If set, events are as far apart as the work between them takes by this clock: the seconds of a kernel, or of
 * cuBLASLt's product ("cublasLtMatmul", or "cublasLtMatmul with GELU") by candidate 1 or 2 (0: a kernel). */
extern double (*emulator_seconds)(const char *kernel, int candidate);

/* Whether the program is linked with the real CUDA runtime (tests/gpu/); the above then does nothing. */
bool emulator_on_gpu(void);

#ifdef __cplusplus
}
#endif
#endif
