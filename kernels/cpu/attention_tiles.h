/* The tiles of scores that attention computes: those with at least one visible pair of query and key. */
#ifndef IHA_KERNELS_CPU_ATTENTION_TILES_H
#define IHA_KERNELS_CPU_ATTENTION_TILES_H

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/scratch.h"

/* Queries and keys of a tile. 64 x 64 scores in fp32 are 16 KiB: they stay in the L1 cache, together with the
 * rows that they are multiplied with. */
enum { TILE = 64 };

/* Which keys the queries of one sequence see. Both ends of a query's keys grow with the query, and every
 * query sees the key at its own index; so consecutive queries see one interval, and so do the queries that
 * see consecutive keys. */
struct attention_mask {
    const struct attention_spec *spec;
    const int32_t *first, *last; /* [T] each token's segment: its first token, one past its last; or NULL */
};

/* The mask of sequence b. segments: [2,B,T], read if the spec is segmented. */
static inline struct attention_mask mask_of_sequence(const struct attention_spec *s, tensor segments,
                                                     int64_t b) {
    int64_t tokens = s->length / s->pseudo;
    const int32_t *all = segments.data;
    return s->segmented ? (struct attention_mask){s, all + b * tokens, all + (s->batch + b) * tokens}
                        : (struct attention_mask){s, NULL, NULL};
}

static inline void mask_keys(const struct attention_mask *m, int64_t query, int64_t *begin, int64_t *end) {
    const struct attention_spec *s = m->spec;
    if (!m->first)
        return attention_keys(s, query, s->length, begin, end);
    int64_t token = query / s->pseudo;
    attention_segment_keys(s, query, m->first[token], m->last[token], begin, end);
}

/* Tiles of keys for the `rows` queries from q0: those starting at *begin, *begin + TILE, ... below *end. */
static inline void tiles_of_queries(const struct attention_mask *m, int64_t q0, int64_t rows, int64_t *begin,
                                    int64_t *end) {
    int64_t unused;
    mask_keys(m, q0, begin, &unused);
    mask_keys(m, q0 + rows - 1, &unused, end);
    *begin -= *begin % TILE;
}

/* Tiles of queries that see any of the `count` keys from k0. */
static inline void tiles_of_keys(const struct attention_mask *m, int64_t k0, int64_t count, int64_t *begin,
                                 int64_t *end) {
    const struct attention_spec *s = m->spec;
    int64_t last_key = k0 + count - 1, P = s->pseudo;
    int64_t first = m->first ? m->first[k0 / P] * P : 0,
            last = m->last ? m->last[last_key / P] * P : s->length;
    *begin = !s->causal ? first : s->token_mask ? k0 - k0 % P : k0;
    *begin -= *begin % TILE;
    *end = s->window > 0 ? min64(last, last_key + s->window) : last;
}

#endif
