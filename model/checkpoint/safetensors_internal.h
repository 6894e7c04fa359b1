/* Shared by the reader (safetensors.c) and the writer (safetensors_write.c). */
#ifndef IHA_MODEL_CHECKPOINT_SAFETENSORS_INTERNAL_H
#define IHA_MODEL_CHECKPOINT_SAFETENSORS_INTERNAL_H

#include "model/checkpoint/safetensors.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are little-endian and used in place");
_Static_assert(sizeof(size_t) == 8, "offsets are 64-bit");

enum { ST_LENGTH_BYTES = 8, ST_DTYPES = ST_U8 + 1 };
#define ST_METADATA "__metadata__" /* the one header entry that is no tensor */

struct safetensors_dtype_row {
    const char *name;
    int bytes;
};
extern const struct safetensors_dtype_row safetensors_dtypes[ST_DTYPES];

/* Bytes of a tensor of this dtype and shape; -1 for a negative size, or if the product overflows. Zero sizes count
 * as one in the overflow check, so that the sizes can be multiplied in any order. */
int safetensors_shape_bytes(const struct safetensors_entry *t, size_t *bytes);

/* Comparison for qsort and bsearch. */
int safetensors_by_name(const void *a, const void *b);

#endif
