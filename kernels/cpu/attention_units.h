/* How one call of attention is cut into units of work for threads, and a thread's scratch memory. */
#ifndef IHA_KERNELS_CPU_ATTENTION_UNITS_H
#define IHA_KERNELS_CPU_ATTENTION_UNITS_H

#include "kernels/cpu/attention_pack.h"

/* Scores are in base 2: products of q and k times scale * log2 e. */
static const real LOG2E = (real)1.4426950408889634;

/* A unit is a group of consecutive tiles of one head: of queries in forward, of keys in backward. */
struct units {
    int64_t heads; /* of all sequences */
    int64_t tiles; /* of a head */
    int64_t group; /* tiles of a unit; the last unit of a head may have fewer */
    int64_t per_head, count;
};

/* heads: of q in forward, of k and v in backward. The tiles of a group share the packing of what they meet, so
 * groups are large, but fit into half of the L2 cache; and there are enough units to give every thread about the
 * same work. */
static inline struct units units_of(const struct device *dev, const struct attention_spec *s, int64_t heads) {
    struct units u = {.heads = s->batch * heads,
                      .tiles = (s->length + TILE - 1) / TILE,
                      .group = s->head_dim <= 64 ? 8 : 4};
    while (u.group > 1 && u.heads * ((u.tiles + u.group - 1) / u.group) < 8 * (int64_t)dev->threads)
        u.group /= 2;
    u.per_head = (u.tiles + u.group - 1) / u.group;
    u.count = u.heads * u.per_head;
    return u;
}

/* The next unit that no thread has taken. Units are handed out in order, which OpenMP's dynamic schedule does
 * not promise, and a unit of backward waits only for units before it: the first unfinished one never waits. */
static inline int64_t take_unit(int64_t *next) {
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
}

/* One head's tensors; forward has no gradients. */
struct head {
    struct head_rows q, k, v, o, d_o, dq, dk, dv;
    real *lse;      /* [S] */
    real *deltas;   /* [S] <dO, O> */
    real *dq_sums;  /* [S, d], or NULL: see attention_backward.c */
    int32_t *turns; /* [tiles] of queries: groups of keys that have added their part of dq */
};

/* The keys [begins[i], ends[i]) that query q0 + i sees, for TILE queries. Those past the last query repeat it,
 * so that both ends grow over the whole tile. */
static inline void visible_keys(const struct attention_mask *m, int64_t q0, int64_t rows, real_bits *begins,
                                real_bits *ends) {
    for (int64_t i = 0; i < TILE; i++) {
        int64_t begin, end;
        mask_keys(m, q0 + min64(i, rows - 1), &begin, &end);
        begins[i] = (real_bits)begin;
        ends[i] = (real_bits)end;
    }
}

/* A tile at the band's edges is computed in strips of STRIP rows, each with only the columns that it needs,
 * which saves nearly half of the work for narrow windows. */
enum { STRIP = 16 };

/* Bytes of attention_backward's scratch: of each thread, and of what threads share. */
size_t CPU(attention_backward_scratch)(const struct attention_spec *s, const struct units *u, size_t *shared);

void CPU(check_attention)(const char *op, const struct attention_spec *s, tensor q, tensor k, tensor v,
                          tensor segments, tensor o);

#endif
