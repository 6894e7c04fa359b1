#include "kernels/check.h"

#include <stdio.h>
#include <stdlib.h>

static _Noreturn void abort_bad_tensor(const char *op, const char *what, tensor t) {
    fprintf(stderr, "%s: wrong shape, strides, alignment or type for %s: dtype %d, at %p, [", op, what,
            (int)t.dtype, t.data);
    for (int i = 0; i < t.ndim; i++)
        fprintf(stderr, "%s%lld (stride %lld)", i ? ", " : "", (long long)t.shape[i], (long long)t.stride[i]);
    fprintf(stderr, "]\n");
    abort();
}

void check_shape(const char *op, const char *what, tensor t, enum dtype dtype, int64_t s0, int64_t s1,
                 int64_t s2, int64_t s3, int64_t s4) {
    const int64_t expected[TENSOR_MAX_DIMS] = {s0, s1, s2, s3, s4};
    int ndim = 0;
    while (ndim < TENSOR_MAX_DIMS && expected[ndim] > 0)
        ndim++;
    bool ok =
        t.data && t.dtype == dtype && t.ndim == ndim && (t.stride[ndim - 1] == 1 || t.shape[ndim - 1] == 1);
    for (int i = 0; ok && i < ndim; i++)
        ok = t.shape[i] == expected[i];
    if (!ok)
        abort_bad_tensor(op, what, t);
}

void check_contiguous(const char *op, const char *what, tensor t) {
    if (!t.data || !tensor_contiguous(t) || (uintptr_t)t.data % dtype_bytes(t.dtype) != 0)
        abort_bad_tensor(op, what, t);
}

void check_row_stride(const char *op, const char *what, tensor t, int64_t stride) {
    if (t.shape[0] > 1 && t.stride[0] != stride)
        abort_bad_tensor(op, what, t);
}

void check_token_rows(const char *op, const char *what, tensor t) {
    check_contiguous(op, what, tensor_select(tensor_select(t, 0, 0), 0, 0));
    if (t.shape[0] > 1 && t.stride[0] != t.shape[1] * t.stride[1])
        abort_bad_tensor(op, what, t);
}

void *check_workspace(const char *op, void *workspace, size_t has, size_t needs) {
    if (needs > has) {
        fprintf(stderr, "%s: needs %zu bytes of workspace, has %zu: it was not planned\n", op, needs, has);
        abort();
    }
    return workspace;
}
