/* One shard: its header, checks of the whole file and of what is read later. Used by shards.c. */
#ifndef IHA_DATA_SHARD_FILE_H
#define IHA_DATA_SHARD_FILE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "kernels/error.h"

enum { SHARD_BUFFER = 1 << 18 }; /* bytes read at a time while a file is checked */

struct shard {
    char *path;
    int fd;           /* -1: closed, and opened again when it is read */
    struct stat stat; /* when it was last found unchanged */
    int token_bytes;  /* 2 or 4 */
    int64_t tokens;
    int64_t first; /* number of its first sequence among all shards' */
    int64_t sequences;
    uint64_t edges; /* hash of its token count and its first and last tokens */
};

/* Check an open file whole; see shards_open. id_limit: every id must be below it; vocab_size names it in errors.
 * buffer: SHARD_BUFFER bytes. Fills all fields but path, fd and first, and adds the file to *fingerprint. */
int shard_check(struct shard *f, int64_t seq_len, int64_t vocab_size, int64_t id_limit, void *buffer,
                uint64_t *fingerprint, struct error *e);

/* Add 8 bytes to a fingerprint. */
uint64_t shard_absorb(uint64_t hash, uint64_t value);

/* Tokens [start, start + count), of token_bytes each, into `tokens`. EXIT_RUN: the file has changed, by its size, its
 * header, its first or last tokens, or an id that is not below id_limit; or it cannot be read. */
int shard_read(struct shard *f, int64_t start, int64_t count, int64_t id_limit, void *tokens,
               struct error *e);

#endif
