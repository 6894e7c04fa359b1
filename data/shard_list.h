/* The shards that a glob matches, and the labels beside them. */
#ifndef IHA_DATA_SHARD_LIST_H
#define IHA_DATA_SHARD_LIST_H

#include "data/shard_file.h"

struct shard {
    struct shard_file tokens, labels; /* labels.path is NULL: there are none */
    int64_t first;                    /* number of its first sequence among all shards' */
    int64_t sequences;
};

struct shard_list {
    struct shard *shards; /* sorted by name */
    int count;
};

/* Finds the files and opens none; of a shard_file path, kind and fd (-1) are set. EXIT_USER: there are none, or a folder
 * on the way may not be listed or searched, so that files may be missing from the list. To be freed also after a
 * failure. */
int shard_list_find(struct shard_list *l, const char *pattern, struct error *e);
void shard_list_free(struct shard_list *l);

/* EXIT_USER: a shard's labels, both headers checked, are not as many as its tokens. */
int shard_check_label_count(const struct shard *s, struct error *e);

/* EXIT_USER: some shards have labels and others have none. */
int shard_list_check_labels(const struct shard_list *l, struct error *e);

#endif
