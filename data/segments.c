#include "data/segments.h"

void segments_find(struct document_rule rule, const int32_t *tokens, const int32_t *targets, int64_t seq_len,
                   int32_t *segments) {
    int32_t first = 0;
    for (int64_t t = 0; t < seq_len; t++) {
        if (t > 0 && segment_begins(rule, tokens, targets, t))
            first = (int32_t)t;
        segments[t] = first;
    }
}
