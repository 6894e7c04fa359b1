/* Token shards in llm.c's format, their labels, and which sequences a step reads.
 *
 * A shard is a 1,024-byte header of 256 little-endian int32 (magic, version, token count, zeros), then
 * the tokens: 20240520/1 as uint16, 20240801/7 as uint32. It holds floor((n-1)/T) sequences: sequence i
 * is tokens [i*T, (i+1)*T), its targets the same shifted by one.
 *
 * Beside NAME.bin there may be NAME.labels: the same header with 20261129/1, then an int32 for each token, the id to
 * predict at that position, LABEL_IGNORED or LABEL_PADDING. Then these are the targets. */
#ifndef IHA_DATA_SHARDS_H
#define IHA_DATA_SHARDS_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/comm.h"
#include "kernels/error.h"

enum { LABEL_IGNORED = -1, LABEL_PADDING = -2 };

struct shards;

struct shards_options {
    int64_t seq_len;    /* T */
    int64_t vocab_size; /* ids must be below it */
    struct comm
        *comm; /* the ranks that open the same shards together, and share the checking; NULL: one rank */
    int64_t
        whole_bytes; /* ids are checked whole in the first so many bytes of all files; 0: SHARDS_WHOLE_BYTES */
};
#define SHARDS_WHOLE_BYTES INT64_C(1000000000)

/* Open every file the glob matches, in name order, with their labels, and check before the first step: magic, version,
 * size against the count, at least one sequence of seq_len, labels for all shards or for none, and every id in the
 * first whole_bytes; beyond them only ids at places spread over each file. Prints nothing. Collective over o->comm:
 * all ranks fail with the same error or none does. Returns NULL with an EXIT_USER error naming the file (and, for a bad
 * id, its position), or the folder that cannot be listed. */
struct shards *shards_open(const char *glob, const struct shards_options *o, struct error *e);
void shards_close(struct shards *s);

int64_t shards_sequences(const struct shards *s); /* over all files */
int64_t shards_tokens(const struct shards *s);    /* as the headers count them */
int shards_files(const struct shards *s);
int64_t shards_file_tokens(const struct shards *s, int file);
bool shards_have_labels(const struct shards *s);

/* Sequence i in file order: tokens[seq_len] and targets[seq_len] (the labels where there are any, otherwise the next
 * tokens), every id checked again. EXIT_RUN: the file cannot be read, or has changed since shards_open: its size, its
 * header, its first or last tokens or some in between, or an id of this sequence that is outside the vocabulary. Not for
 * several threads at once. */
int shards_read(struct shards *s, int64_t i, int32_t *tokens, int32_t *targets, struct error *e);

/* Tokens [start, start + count) of a file, and their labels unless `labels` is NULL (without shards_have_labels it must
 * be). Checks, errors and threads as for shards_read. */
int shards_read_range(struct shards *s, int file, int64_t start, int64_t count, int32_t *tokens,
                      int32_t *labels, struct error *e);

/* The sequence that the g-th draw of a training run reads (g counts from 0 over all steps and ranks).
 * Every epoch of shards_sequences() draws visits each sequence once; shuffled, epoch e has its own
 * permutation, a function of (seed, e) alone, computed in place (no table). */
int64_t shards_draw(const struct shards *s, int64_t g, bool shuffle, uint64_t seed);

/* A fingerprint of the data (file count, each file's token count and its first and last tokens, and of labels also some
 * in between), as 16 hex digits: a resumed run is refused when it changed. The files' paths do not count. */
void shards_fingerprint(const struct shards *s, char out[17]);

#endif
