/* One glob of training data: its sequences in the order of training, epoch after epoch.
 *
 * stream: sequence i of a shard is its tokens [i*T, (i+1)*T), and an epoch is a permutation of all sequences. fit
 * (packing.h): an epoch is a permutation of the blocks, and of the sequences in each. */
#ifndef IHA_DATA_SOURCE_H
#define IHA_DATA_SOURCE_H

#include "data/packing.h"

struct source_options {
    int64_t seq_len, vocab_size;
    bool fit;
    bool shuffle; /* false: file order */
    uint64_t seed;
    struct comm *comm; /* the ranks that open it together; NULL: one rank */
};

/* What the next sequence is. */
struct source_position {
    int64_t sequences; /* drawn so far */
    int64_t epoch, block,
        offset; /* fit: the block's number in the epoch's order, and sequences drawn from it */
};

struct source;

/* Errors: those of shards_open. */
struct source *source_open(const char *glob, const struct source_options *o, struct error *e);
void source_close(struct source *s);

/* Where documents begin; before anything is read with fit. */
int source_set_documents(struct source *s, struct document_rule rule, struct error *e);

struct shards *source_shards(const struct source *s);
struct packer *source_packer(const struct source *s); /* NULL: stream */
const char *source_glob(const struct source *s);

/* Draw a sequence: tokens[seq_len] and targets[seq_len], or nothing if tokens is NULL. fit: every block is read. Errors:
 * those of shards_read; EXIT_USER: fit, and no document of the whole epoch has a target that counts. */
int source_draw(struct source *s, int32_t *tokens, int32_t *targets, struct error *e);

struct source_position source_position(const struct source *s);

/* EXIT_USER: such a position cannot be; it comes from a checkpoint. */
int source_set_position(struct source *s, struct source_position position, struct error *e);

/* The epoch, from 0, of the sequence drawn last; 0 before the first. And how many epochs have been drawn. */
int64_t source_epoch(const struct source *s);
double source_epochs(const struct source *s);

#endif
