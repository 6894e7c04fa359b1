/* Who owns what when several ranks train one model (ZeRO, Rajbhandari et al. 2020).
 *
 * The flat buffer is cut into units, in the order backward finishes them from last to first: the embeddings,
 * each layer, the head. A unit is cut into buckets, which travel as a whole, and every bucket into equal
 * shares, one a rank: rank r owns share r of every bucket. A bucket has at most BUCKET_ELEMENTS, so that the
 * first leaves early, or SHARE_ELEMENTS for each rank where that is more: what a message costs before its
 * first byte moves grows with the ranks. Units begin at multiples
 * of 64 W elements (params.c sees to it), so that shares are equal and aligned.
 *
 *   stage 0  every rank holds and updates everything
 *   stage 1  moments (and master_weights) of its own shares only
 *   stage 2  gradients too; whole ones exist only for the unit that backward is at, and the one before
 *
 * A rank's shares, put end to end, are its shard: the share at [begin, end) of the flat buffer lies at
 * bucket begin / W of the shard. */
#ifndef IHA_MODEL_PARTITION_H
#define IHA_MODEL_PARTITION_H

#include "kernels/kernels.h"
#include "model/params.h"

enum {
    BUCKET_ELEMENTS = 4 << 20,
    SHARE_ELEMENTS = 1 << 19,
    MAX_BUCKETS = 1 << 16 /* about: beyond, they are larger */
};

struct bucket {
    int64_t begin, end; /* elements of the flat buffer */
    int unit;
};

/* What this rank updates: one share, or all of the buffer where there is nothing to share. */
struct share {
    int64_t begin, end; /* elements of the flat buffer */
    int64_t shard;      /* where begin lies in the buffers of moments */
    struct param_group *groups;
    int group_count; /* relative to begin */
};

struct partition {
    int rank, ranks, zero_stage;
    int unit_count;             /* these two are those of params.h, which must outlive the partition */
    const int64_t *unit_offset; /* [unit_count + 1] */
    struct bucket *buckets;
    int bucket_count;
    int *first_bucket;       /* [unit_count + 1]: unit u is buckets [first_bucket[u], first_bucket[u+1]) */
    int64_t bucket_elements; /* of the longest */
    struct share *own;       /* [bucket_count] this rank's share of each bucket */
    struct share *updated;   /* what it updates: `own`, or one share of everything */
    int own_count, updated_count;
    int64_t moment_elements;       /* of each moment's buffer */
    int64_t gradient_elements;     /* of all gradient buffers together */
    int64_t gradient_shard_at;     /* stage 2: where the reduced shard begins in them */
    int64_t *unit_gradient_offset; /* [unit_count] where a unit's whole gradient begins in them */
};

/* groups cover the flat buffer. EXIT_RUN when out of memory. */
int partition_create(struct partition *p, const struct params *params, const struct param_group *groups,
                     int group_count, int rank, int ranks, int zero_stage, struct error *e);
void partition_free(struct partition *p);

/* Where the gradient of an element of the flat buffer, which is of this unit, lies in the gradient buffers. */
static inline int64_t gradient_offset(const struct partition *p, int unit, int64_t element) {
    return p->unit_gradient_offset[unit] + element - p->unit_offset[unit];
}

#endif
