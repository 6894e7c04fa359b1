/* What the harness's own files share. */
#ifndef IHA_SIMT_INTERNAL_H
#define IHA_SIMT_INTERNAL_H

#include "tests/simt/simt.h"

#include <vector>

/* Run one launch now, block after block. */
void simt_run_grid(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()> &thread);

/* Indices 0..n-1 in the order that the seed asks for. */
std::vector<int64_t> simt_order(int64_t n);

/* Bytes beside an allocation that nobody may write; under AddressSanitizer, nor read. */
enum { SIMT_SENTINEL = 256 };
void simt_guard(void *p);
void simt_unguard(void *p);
bool simt_guard_intact(const void *p);

/* Append to the queue, which runs at the next synchronization. */
void simt_enqueue(std::function<void()> work);

/* Abort unless [p, p + bytes) lies within one live allocation of the device. */
void simt_check_device(const void *p, size_t bytes, const char *what);

#endif
