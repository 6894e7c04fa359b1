/* Token shards in llm.c's format, and which sequences a step reads.
 *
 * A shard is a 1,024-byte header of 256 little-endian int32 (magic, version, token count, zeros), then
 * the tokens: 20240520/1 as uint16, 20240801/7 as uint32. It holds floor((n-1)/T) sequences: sequence i
 * is tokens [i*T, (i+1)*T), its targets the same shifted by one. */
#ifndef IHA_DATA_SHARDS_H
#define IHA_DATA_SHARDS_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/error.h"

struct shards;

/* Open every file the glob matches, in name order, and check each whole: magic, version, size against the
 * count, every id < vocab_size, at least one sequence of seq_len. Prints nothing. Returns NULL with an
 * EXIT_USER error naming the file (and, for a bad id, its position), or the folder that cannot be listed. */
struct shards *shards_open(const char *glob, int64_t seq_len, int64_t vocab_size, struct error *e);
void shards_close(struct shards *s);

int64_t shards_sequences(const struct shards *s); /* over all files */
int64_t shards_tokens(const struct shards *s);    /* as the headers count them */
int shards_files(const struct shards *s);

/* Sequence i in file order: tokens[seq_len] and targets[seq_len], every id checked again. EXIT_RUN: the file
 * cannot be read, or has changed since shards_open: its size, its header, its first or last tokens, or an id of
 * this sequence that is outside the vocabulary. Not for several threads at once. */
int shards_read(struct shards *s, int64_t i, int32_t *tokens, int32_t *targets, struct error *e);

/* The sequence that the g-th draw of a training run reads (g counts from 0 over all steps and ranks).
 * Every epoch of shards_sequences() draws visits each sequence once; shuffled, epoch e has its own
 * permutation, a function of (seed, e) alone, computed in place (no table). */
int64_t shards_draw(const struct shards *s, int64_t g, bool shuffle, uint64_t seed);

/* A fingerprint of the data (file count, each file's token count and its first and last tokens), as 16 hex
 * digits: a resumed run is refused when it changed. The files' paths do not count. */
void shards_fingerprint(const struct shards *s, char out[17]);

#endif
