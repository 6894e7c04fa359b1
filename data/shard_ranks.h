/* The checks of shards before the first step, which the ranks of a run share. */
#ifndef IHA_DATA_SHARD_RANKS_H
#define IHA_DATA_SHARD_RANKS_H

#include "data/shard_list.h"
#include "data/shards.h"

/* Check a list of shards as shards_open() promises, and set all fields of its files and `sequences`. Collective over
 * `comm`: all ranks fail with the same error, the first in the order of files, or none does. */
int shard_ranks_check(struct shard_list *l, const struct shards_options *o, struct comm *comm,
                      uint64_t *fingerprint, struct error *e);

#endif
