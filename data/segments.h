/* Where documents begin and end among tokens: data.segments, data.separator and data.separator_at. */
#ifndef IHA_DATA_SEGMENTS_H
#define IHA_DATA_SEGMENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "data/shards.h"

struct document_rule {
    int32_t separator; /* -1: not known, and nothing separates documents */
    bool at_start;     /* a document begins with the separator; false: it ends with it */
};

/* Whether a segment begins at token i > 0. Each run of padding is one segment. */
static inline bool segment_begins(struct document_rule rule, const int32_t *tokens, const int32_t *targets,
                                  int64_t i) {
    bool padding = targets[i] == LABEL_PADDING;
    if (padding != (targets[i - 1] == LABEL_PADDING))
        return true;
    return !padding && rule.separator >= 0 && tokens[rule.at_start ? i : i - 1] == rule.separator;
}

/* segments[t]: index of the first token of token t's segment, in a sequence of seq_len tokens, whose start begins
 * one. */
void segments_find(struct document_rule rule, const int32_t *tokens, const int32_t *targets, int64_t seq_len,
                   int32_t *segments);

#endif
