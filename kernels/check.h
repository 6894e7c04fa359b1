/* Checks that every backend makes of an operation's arguments. A violation is a bug in this program, not in
 * the user's input: print the operation's name and the tensor, and abort. */
#ifndef IHA_KERNELS_CHECK_H
#define IHA_KERNELS_CHECK_H

#include "kernels/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* t is present, of that type and of shape [s0, s1, ...] (0 ends the list), and its last dimension is
 * contiguous. */
void check_shape(const char *op, const char *what, tensor t, enum dtype dtype, int64_t s0, int64_t s1,
                 int64_t s2, int64_t s3, int64_t s4);

/* t is present, contiguous and aligned to its type. */
void check_contiguous(const char *op, const char *what, tensor t);

/* The heads of each token of t [B,T,H,d] are contiguous, and so many elements apart from those of the next that the
 * batch is one run of tokens: t is contiguous, or some of the heads of a packed tensor. */
void check_token_rows(const char *op, const char *what, tensor t);

/* The rows of t [rows, ...] are `stride` elements apart. */
void check_row_stride(const char *op, const char *what, tensor t, int64_t stride);

/* Returns `workspace`, which has `has` bytes, if that is at least `needs`. */
void *check_workspace(const char *op, void *workspace, size_t has, size_t needs);

#ifdef __cplusplus
}
#endif
#endif
