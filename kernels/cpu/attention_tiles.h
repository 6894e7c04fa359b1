/* Which tiles of the score matrix attention visits: those that hold at least one visible pair. */
#ifndef IHA_KERNELS_CPU_ATTENTION_TILES_H
#define IHA_KERNELS_CPU_ATTENTION_TILES_H

#include "kernels/cpu/cpu.h"

enum { TILE = 64 }; /* queries and keys a tile */

/* Tiles of keys for the `rows` queries from q0: those starting at *begin, *begin + TILE, ... below *end.
 * Both ends of a query's keys grow with the query, so the first query has the first key and the last the
 * last. */
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
