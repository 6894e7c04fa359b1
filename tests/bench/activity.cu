/* When the GPU computes and when it is idle, from CUPTI's activity records; without CUPTI, nothing is
 * recorded. */
#include "tests/bench/timing.h"

#include "kernels/cuda/cuda.h"

#ifdef HAVE_CUPTI
#include <cupti.h>

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <utility>
#include <vector>

typedef std::pair<uint64_t, uint64_t> span; /* start and end, ns */
static std::vector<span> spans;

/* By value: the records are packed. */
static void add_span(uint64_t start, uint64_t end) {
    spans.emplace_back(start, end);
}

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *bytes, size_t *records) {
    *bytes = 4 << 20;
    *records = 0;
    *buffer = (uint8_t *)aligned_alloc(8, *bytes);
}

/* Its start and end. */
static void add_record(CUpti_Activity *record) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
        CUpti_ActivityKernel9 *k = (CUpti_ActivityKernel9 *)record;
        add_span(k->start, k->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        CUpti_ActivityMemcpy5 *c = (CUpti_ActivityMemcpy5 *)record;
        add_span(c->start, c->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        CUpti_ActivityMemset4 *s = (CUpti_ActivityMemset4 *)record;
        add_span(s->start, s->end);
    }
}

static void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t *buffer, size_t, size_t valid) {
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS)
        add_record(record);
    free(buffer);
}

static const CUpti_ActivityKind KINDS[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY,
                                           CUPTI_ACTIVITY_KIND_MEMSET};

/* Some machines forbid the use of CUPTI; then nothing is recorded. */
bool activity_available(void) {
    static int available = -1;
    if (available < 0) {
        available = cuptiActivityRegisterCallbacks(give_buffer, take_buffer) == CUPTI_SUCCESS &&
                    cuptiActivityEnable(KINDS[0]) == CUPTI_SUCCESS;
        if (available)
            cuptiActivityDisable(KINDS[0]);
    }
    return available > 0;
}

void activity_start(void) {
    cuda_check(cudaDeviceSynchronize());
    cuptiActivityFlushAll(1);
    spans.clear();
    for (CUpti_ActivityKind kind : KINDS)
        cuptiActivityEnable(kind);
}

struct activity activity_stop(struct device *dev) {
    struct activity t = {0, 0, 0};
    cuda_check(cudaStreamSynchronize(dev->stream));
    for (CUpti_ActivityKind kind : KINDS)
        cuptiActivityDisable(kind);
    cuptiActivityFlushAll(1);
    std::sort(spans.begin(), spans.end());
    uint64_t until = 0;
    for (const span &s : spans) {
        uint64_t from = std::max(s.first, until);
        if (s.second > from)
            t.busy += 1e-9 * (double)(s.second - from);
        until = std::max(until, s.second);
    }
    t.count = (int64_t)spans.size();
    if (t.count > 0)
        t.duration = 1e-9 * (double)(until - spans.front().first);
    return t;
}

#else

bool activity_available(void) {
    return false;
}

void activity_start(void) {}

struct activity activity_stop(struct device *) {
    return {0, 0, 0};
}

#endif
