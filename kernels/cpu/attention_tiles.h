/* The tiles of scores that attention computes: those with at least one visible pair of query and key. */
#ifndef IHA_KERNELS_CPU_ATTENTION_TILES_H
#define IHA_KERNELS_CPU_ATTENTION_TILES_H

#include "kernels/cpu/cpu.h"

/* Queries and keys of a tile. 64 x 64 scores in fp32 are 16 KiB: they stay in the L1 cache, together with the
 * rows that they are multiplied with. */
enum { TILE = 64 };

/* Tiles of keys for the `rows` queries from q0: those starting at *begin, *begin + TILE, ... below *end.
 * Both ends of a query's keys grow with the query, so the first query sees the first key and the last query
 * the last. */
static inline void tiles_of_queries(const struct attention_spec *s, int64_t q0, int64_t rows, int64_t *begin,
                                    int64_t *end) {
    int64_t unused;
    attention_keys(s, q0, s->length, begin, &unused);
    attention_keys(s, q0 + rows - 1, s->length, &unused, end);
    *begin -= *begin % TILE;
}

/* Tiles of queries that see any of the `count` keys from k0. */
static inline void tiles_of_keys(const struct attention_spec *s, int64_t k0, int64_t count, int64_t *begin,
                                 int64_t *end) {
    *begin = !s->causal ? 0 : s->token_mask ? k0 - k0 % s->pseudo : k0;
    *begin -= *begin % TILE;
    *end = s->window > 0 ? min64(s->length, k0 + count - 1 + s->window) : s->length;
}

#endif
