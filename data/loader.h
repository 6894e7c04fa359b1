/* The sequences that a run reads: one glob or several with weights (mixture.h), cut or packed into sequences (source.h),
 * and the segments in them (segments.h).
 *
 * The sequences of a step depend on the seed and the step alone, never on the number of ranks. For training a thread
 * reads ahead (read_ahead.h). */
#ifndef IHA_DATA_LOADER_H
#define IHA_DATA_LOADER_H

#include <stdio.h>

#include "data/mixture.h"
#include "data/segments.h"

struct loader_options {
    const char *data; /* a glob, or a mixture of several */
    int64_t seq_len, vocab_size;
    bool fit; /* whole documents are packed into sequences; false: a stream of tokens is cut */
    bool shuffle;
    uint64_t seed;
    bool segments;     /* wanted */
    struct comm *comm; /* the ranks that open the data together, and share the checking; NULL: one rank */
};

struct loader;

/* Collective over o->comm. Errors: those of mixture_parse and shards_open. */
struct loader *loader_open(const struct loader_options *o, struct error *e);
void loader_close(struct loader *l);

/* Where documents begin. Needed before sequences are read, with `fit` or segments. */
int loader_set_documents(struct loader *l, struct document_rule rule, struct error *e);

int64_t loader_tokens(const struct loader *l); /* over all sources, as the headers count them */
int loader_files(const struct loader *l);
int loader_globs(const struct loader *l, const char *globs[MAX_SOURCES]); /* returns how many */
bool loader_has_labels(const struct loader *l);                           /* or one of its sources */

/* A fingerprint of the data and, of several sources, of their weights. */
void loader_fingerprint(const struct loader *l, char out[17]);

/* ---- in file order, for evaluation; one source ---- */

/* *sequences: how many there are, but no more than `limit`. With fit this packs the blocks once. */
int loader_count(struct loader *l, int64_t limit, int64_t *sequences, struct error *e);

/* Sequence i: tokens, targets and, if wanted, segments, each [seq_len]. Errors: those of shards_read. */
int loader_read(struct loader *l, int64_t i, int32_t *tokens, int32_t *targets, int32_t *segments,
                struct error *e);

/* ---- in the order of training ---- */

/* Where a run is in its data, for a checkpoint. Empty for one source in a stream, where the number of sequences says it
 * all. */
enum { LOADER_POSITION = 4 * MAX_SOURCES };
struct loader_position {
    int count;
    int64_t values[LOADER_POSITION]; /* sequences, epoch, block and offset of each source */
};

/* What a rank reads of each step: micro_batch sequences per pass, the ranks one after the other. */
struct loader_share {
    int rank, ranks;
    int64_t micro_batch, passes;
};

/* Start to read `steps` steps from a position: `sequences` have been drawn over all ranks. EXIT_USER: the position is
 * not one of this data; EXIT_RUN: no memory, or no thread. */
int loader_start(struct loader *l, const struct loader_share *share, int64_t steps, int64_t sequences,
                 const struct loader_position *position, struct error *e);

/* This rank's sequences of one step, [passes, micro_batch, seq_len] each, valid until the next call. */
struct loader_step {
    const int32_t *tokens, *targets;
    const int32_t *segments;         /* NULL unless wanted */
    struct loader_position position; /* after this step */
};

/* Errors, of the step that they concern: those of source_draw. */
int loader_next(struct loader *l, struct loader_step *step, struct error *e);

/* ---- what a user is told ---- */

/* Whether the step that loader_next returned last is the first to draw from another epoch of a source, of several
 * sources or with fit. loader_print_epochs prints a line for each of them. */
bool loader_epoch_began(const struct loader *l);
void loader_print_epochs(struct loader *l, FILE *out, int64_t step);

/* A line about several sources: their shares and epochs, up to the step that loader_next returned last. */
void loader_print_sources(const struct loader *l, FILE *out);

/* A line about packing: the shares of padding and of cropped tokens in the blocks that were read for the steps that
 * loader_next has returned, or that loader_count has counted; or nothing if the last line said the same. */
void loader_print_packing(struct loader *l, FILE *out);

#endif
