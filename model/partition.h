/* Which rank owns which parameters when several ranks train one model (ZeRO, Rajbhandari et al. 2020).
 *
 * The flat buffer is divided into units (params.h), a unit into buckets, and a bucket into W equal shards:
 * rank r owns shard r of every bucket. A bucket is reduced and gathered as a whole, by one collective. It has
 * at most as many elements as the backend's collectives want (kernels.h: message_elements), or SHARD_ELEMENTS per
 * rank where that is more: the latency of a collective grows with the number of ranks. Units begin at multiples of 64 W
 * elements (params.c), so shards are of one size and aligned.
 *
 *   stage 0  every rank holds and updates everything
 *   stage 1  moments, and master weights, of the rank's own shards only
 *   stage 2  gradients too: unsharded ones exist only for the unit backward is at and the one before it
 *
 * Buffers that hold only a rank's own shards have them one after the other: the shard of a bucket that begins
 * at element b of the flat buffer begins at element b / W of those. Second moments are without what Muon updates:
 * the other groups of the rank's updates, one after the other. */
#ifndef IHA_MODEL_PARTITION_H
#define IHA_MODEL_PARTITION_H

#include "kernels/kernels.h"
#include "model/params.h"

enum {
    SHARD_ELEMENTS = 1 << 19,
    MAX_BUCKETS = 1 << 16 /* about; where there would be more, buckets are larger */
};

struct bucket {
    int64_t begin, end; /* elements of the flat buffer */
    int unit;
};

/* A range of the flat buffer that this rank updates: its shard of one bucket, or in stage 0 all of it. */
struct shard {
    int64_t begin, end;   /* elements of the flat buffer */
    int64_t local_offset; /* of begin in this rank's moments and separate master weights */
    struct param_group *groups, *muon_groups; /* relative to begin: AdamW's, Muon's; one block of memory */
    int group_count, muon_count;
    int64_t second_offset; /* of the first of `groups` in this rank's second moments; the others follow it */
};

struct partition {
    int rank, ranks, zero_stage;
    int unit_count;             /* these two are those of struct params, which must outlive the partition */
    const int64_t *unit_offset; /* [unit_count + 1] */
    struct bucket *buckets;
    int bucket_count;
    int64_t bucket_elements; /* of the largest */
    int *first_bucket;       /* [unit_count + 1]: unit u is buckets [first_bucket[u], first_bucket[u+1]) */
    struct shard *shards;    /* [bucket_count] this rank's shard of each bucket */
    struct shard *updates;   /* [update_count] what it updates: `shards`, or in stage 0 the whole buffer */
    int update_count;
    int64_t moment_elements;       /* of the buffer of first moments (of Muon: momentum) */
    int64_t second_elements;       /* of the buffer of second moments, which only AdamW's parameters have */
    int64_t gradient_elements;     /* of the gradient buffer */
    int64_t *unit_gradient_offset; /* [unit_count] where a unit's unsharded gradient begins in it */
    int64_t gradient_shard_offset; /* stage 2: where this rank's reduced shards begin in it */
};

/* groups cover the flat buffer; bucket_elements: of a bucket, at most. EXIT_RUN when out of memory. */
int partition_create(struct partition *p, const struct params *params, const struct param_group *groups,
                     int group_count, int rank, int ranks, int zero_stage, int64_t bucket_elements,
                     struct error *e);
void partition_free(struct partition *p);

/* Where the unsharded gradient of an element of the flat buffer, which is of this unit, is in the gradient
 * buffer. */
static inline int64_t gradient_offset(const struct partition *p, int unit, int64_t element) {
    return p->unit_gradient_offset[unit] + element - p->unit_offset[unit];
}

#endif
