/* A file of choices that were made by timing, so that the next start of a run makes the same ones at once.
 *
 * Each rank has a file of its own. It is a text:
 *
 *   iha.c plans 1
 *   NVIDIA H200, sm_90, 132 SMs; cuBLASLt 130101; cuDNN 91900
 *   <what was chosen> = <the choice>
 *   ...
 *   checksum <64 bits, of all lines before>
 *
 * A file of another GPU or of other libraries, and a damaged one, is ignored and replaced. */
#ifndef IHA_KERNELS_CUDA_PLAN_FILE_H
#define IHA_KERNELS_CUDA_PLAN_FILE_H

#include "kernels/cuda/cuda.h"

/* Read the file, if there is one. path: NULL: nothing is kept, and NULL is returned. */
struct plan_file *plan_file_open(const char *path, const char *machine);
/* What was chosen, or NULL. Valid until something is added. file: may be NULL. */
const char *plan_file_find(const struct plan_file *file, const char *what);
/* Neither text has a line break, `what` no " = ". Replaces an older choice. file: may be NULL. */
void plan_file_add(struct plan_file *file, const char *what, const char *choice);
/* Write it, if something was added since. A failure is a warning: only time is lost. */
void plan_file_save(struct plan_file *file);
void plan_file_close(struct plan_file *file);

#endif
