/* data.packing = fit: whole documents packed into sequences.
 *
 * A shard is divided into blocks of 2^20 tokens. A document belongs to the block in which it begins. A block's documents
 * are packed by best fit, longest first: each goes to the sequence with the least room that holds it, or to a new one.
 * A document longer than a sequence is cropped to its first seq_len tokens. A document none of whose targets counts is
 * left out, and so is padding. What remains of a sequence is padding: the separator, with target LABEL_PADDING. A block's
 * sequences depend on the shard alone. */
#ifndef IHA_DATA_PACKING_H
#define IHA_DATA_PACKING_H

#include "data/segments.h"

enum { PACKING_BLOCK = 1 << 20 }; /* tokens */

struct packer;

/* What became of the blocks that were packed. Tokens that are neither packed nor left out were cropped, up to the ends
 * of documents that reach into the next block. */
struct packing_stats {
    int64_t tokens;                    /* in the blocks */
    int64_t sequences, packed_tokens;  /* packed_tokens / (sequences * seq_len) is not padding */
    int64_t documents, cropped;        /* packed, and how many of them are longer than a sequence */
    int64_t left_out, left_out_tokens; /* documents none of whose targets counts, and padding */
};

/* s stays the caller's. NULL: out of memory. */
struct packer *packer_open(struct shards *s, struct document_rule rule, int64_t seq_len, struct error *e);
void packer_close(struct packer *p);

int64_t packer_blocks(const struct packer *p); /* over all files, in file order */

/* The number of sequences of a block, which is read and packed unless it was the last one; or -1. Errors: those of
 * shards_read. */
int64_t packer_load(struct packer *p, int64_t block, struct error *e);

/* Sequence i of the loaded block, in the order in which the first documents of its sequences begin. */
void packer_copy(const struct packer *p, int64_t i, int32_t *tokens, int32_t *targets);

/* Sums over all blocks that were packed, again when packed again. */
const struct packing_stats *packer_stats(const struct packer *p);

#endif
