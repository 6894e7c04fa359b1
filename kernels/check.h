/* What every backend checks of its arguments before it computes. A violation is a mistake in this program,
 * not in what the user gave: it prints the operation's name and the tensor, and aborts. */
#ifndef IHA_KERNELS_CHECK_H
#define IHA_KERNELS_CHECK_H

#include "kernels/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* t is there, of that type, [s0, s1, ...] (0 ends the list), with contiguous rows. */
void check_shape(const char *op, const char *what, tensor t, enum dtype dtype, int64_t s0, int64_t s1,
                 int64_t s2, int64_t s3, int64_t s4);

/* t is there, without gaps, and aligned to its type. */
void check_contiguous(const char *op, const char *what, tensor t);

/* The workspace, of which an operation that needs so many bytes planned for has enough. */
void *check_workspace(const char *op, void *workspace, size_t has, size_t needs);

#ifdef __cplusplus
}
#endif
#endif
