/* One file of ids, the tokens of a shard or their labels: checks before a run, and reads during it. Used by shards.c
 * and check.c. */
#ifndef IHA_DATA_SHARD_FILE_H
#define IHA_DATA_SHARD_FILE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "kernels/error.h"

enum { SHARD_EDGE = 256 }; /* ids at each end of a file that a fingerprint covers */

enum shard_kind { SHARD_TOKENS, SHARD_LABELS };

/* Ids are below `limit`; labels may also be LABEL_IGNORED or LABEL_PADDING. */
struct shard_vocab {
    int64_t size;  /* as the user gave it, for messages */
    int64_t limit; /* at most 2^31, since ids become int32 */
};
struct shard_vocab shard_vocab(int64_t size);

struct shard_file {
    char *path;
    enum shard_kind kind;
    int fd;           /* -1: closed */
    struct stat stat; /* when it was last found unchanged */
    int id_bytes;     /* 2 or 4 */
    int64_t count;    /* ids */
    int places;       /* spread over the file, whose ids are part of the hash */
    uint64_t hash;    /* of the count, the ids at these places and the edges */
};

/* The first and last ids; they overlap in a short file. */
struct shard_edges {
    int64_t count; /* of each */
    int32_t first[SHARD_EDGE], last[SHARD_EDGE];
};

struct label_counts {
    int64_t counted, padding; /* labels >= 0; labels LABEL_PADDING */
};

/* 0, or the errno. */
int shard_file_open(struct shard_file *f);
int shard_file_open_or_fail(struct shard_file *f, struct error *e); /* EXIT_RUN: it cannot be opened */
void shard_file_close(struct shard_file *f);

/* Checks of an open file before a run. EXIT_USER: what is wrong with it; EXIT_RUN: it cannot be read. */

/* Type, magic, version, and size against the count; sets stat, id_bytes and count. */
int shard_file_check_header(struct shard_file *f, struct error *e);
/* Ids [start, start + count). Labels are added to *counts, unless it is NULL. */
int shard_file_check_ids(const struct shard_file *f, const struct shard_vocab *vocab, int64_t start,
                         int64_t count, struct label_counts *counts, struct error *e);
/* The ids at `places` places spread over the file, and the edges; sets places, hash and *edges. */
int shard_file_check_places(struct shard_file *f, const struct shard_vocab *vocab, int places,
                            struct shard_edges *edges, struct error *e);

/* Ids [start, start + count) into `ids`. The file is open. EXIT_RUN: it has changed, by its size, its header, one of the
 * hashed ids, or an id outside the vocabulary; or it cannot be read. */
int shard_file_read(struct shard_file *f, int64_t start, int64_t count, const struct shard_vocab *vocab,
                    int32_t *ids, struct error *e);

/* Whether an open file is still the one that the other fields describe, as shard_file_read() finds out. */
int shard_file_check_unchanged(struct shard_file *f, const struct shard_vocab *vocab, struct error *e);

/* Add 8 bytes, or edges, to a fingerprint. */
uint64_t shard_absorb(uint64_t hash, uint64_t value);
uint64_t shard_absorb_edges(uint64_t hash, const struct shard_edges *edges);

#endif
