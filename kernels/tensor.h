/* Tensors: views of memory (address, type, shape, strides) that own nothing and are passed by value. */
#ifndef IHA_KERNELS_TENSOR_H
#define IHA_KERNELS_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dtype { DTYPE_F32, DTYPE_F64, DTYPE_BF16, DTYPE_I32 };
enum { TENSOR_MAX_DIMS = 5 };

typedef struct tensor {
    void *data; /* NULL: absent */
    enum dtype dtype;
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t stride[TENSOR_MAX_DIMS]; /* in elements */
} tensor;

static inline size_t dtype_bytes(enum dtype t) {
    return t == DTYPE_F64 ? 8 : t == DTYPE_BF16 ? 2 : 4;
}

static inline tensor tensor_none(void) {
    return (tensor){0};
}

/* A contiguous view of 1 to 5 dimensions; zeros after the last one. */
static inline tensor tensor_of(void *data, enum dtype dtype, int64_t s0, int64_t s1, int64_t s2, int64_t s3,
                               int64_t s4) {
    tensor t = {.data = data, .dtype = dtype, .shape = {s0, s1, s2, s3, s4}};
    while (t.ndim < TENSOR_MAX_DIMS && t.shape[t.ndim] > 0)
        t.ndim++;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        t.stride[i] = stride;
        stride *= t.shape[i];
    }
    return t;
}

static inline int64_t tensor_count(tensor t) {
    int64_t n = t.ndim > 0;
    for (int i = 0; i < t.ndim; i++)
        n *= t.shape[i];
    return n;
}

static inline bool tensor_contiguous(tensor t) {
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        if (t.shape[i] != 1 && t.stride[i] != stride)
            return false;
        stride *= t.shape[i];
    }
    return true;
}

/* t[..., index, ...] along `dim`, which is removed. */
static inline tensor tensor_select(tensor t, int dim, int64_t index) {
    t.data = t.data ? (char *)t.data + (size_t)(index * t.stride[dim]) * dtype_bytes(t.dtype) : NULL;
    for (int i = dim; i + 1 < t.ndim; i++) {
        t.shape[i] = t.shape[i + 1];
        t.stride[i] = t.stride[i + 1];
    }
    t.ndim--;
    return t;
}

/* `count` entries of the dimension `dim`, from `begin`. */
static inline tensor tensor_part(tensor t, int dim, int64_t begin, int64_t count) {
    t.data = t.data ? (char *)t.data + (size_t)(begin * t.stride[dim]) * dtype_bytes(t.dtype) : NULL;
    t.shape[dim] = count;
    return t;
}

/* `count` entries of the first dimension, from `begin`. */
static inline tensor tensor_rows(tensor t, int64_t begin, int64_t count) {
    t.data = (char *)t.data + (size_t)(begin * t.stride[0]) * dtype_bytes(t.dtype);
    t.shape[0] = count;
    return t;
}

#endif
