/* What matmul.cu shares with the check of its products (check_matmul.cu): the plans. */
#ifndef IHA_KERNELS_CUDA_MATMUL_H
#define IHA_KERNELS_CUDA_MATMUL_H

#include "kernels/cuda/cuda.h"

struct matmul_plan {
    struct matmul_plan *next;
    struct matmul shape;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c; /* of our A, B and C */
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace_bytes;
    bool checked;  /* by check_matmuls() */
    bool rejected; /* something else is used in its place */
};

/* The memory of a product's operands, each rounded up to 256 bytes. */
struct matmul_bytes {
    size_t a, b, c, bias, aux;
};
struct matmul_bytes matmul_bytes(const struct matmul *);

/* Fill *resized with a plan for another m, n or k that uses p's algorithm; false if cuBLASLt does not support
 * that. To be freed with matmul_descriptors_free(). */
bool resize_matmul(struct device *, const struct matmul_plan *p, const struct matmul *shape,
                   struct matmul_plan *resized);
void run_planned_matmul(struct device *, const struct matmul_plan *, const void *a, const void *b,
                        const void *bias, bool accumulate, void *c, const void *aux, void *workspace);
void matmul_descriptors_free(struct matmul_plan *);

#endif
