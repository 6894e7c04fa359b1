/* The shards that a glob matches. */
#ifndef IHA_DATA_SHARD_GLOB_H
#define IHA_DATA_SHARD_GLOB_H

#include <glob.h>

#include "kernels/error.h"

/* The files that the pattern matches, sorted by name; globfree(paths) after success and failure. EXIT_USER: there are
 * none, or a folder on the way may not be listed or searched, so that files may be missing from the list. */
int shard_glob(const char *pattern, glob_t *paths, struct error *e);

#endif
