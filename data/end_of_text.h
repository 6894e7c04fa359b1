/* Which ids end a text: where documents end in shards, and where generation stops. */
#ifndef IHA_DATA_END_OF_TEXT_H
#define IHA_DATA_END_OF_TEXT_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/error.h"

enum { MAX_END_IDS = 64 };

struct end_ids {
    int32_t ids[MAX_END_IDS];
    int count;
};

void end_ids_add(struct end_ids *ends, int32_t id); /* once; beyond MAX_END_IDS it is left out */
bool end_ids_has(const struct end_ids *ends, int32_t id);

/* Adds the eos_token_id, one or a list, of the generation_config.json in `folder`. A file that is not there
 * is no error; one that is damaged, or names an id of no token, is (EXIT_USER). */
int read_generation_config(const char *folder, int64_t vocab_size, struct end_ids *ends, struct error *e);

/* The content of a generation_config.json with these ids, malloc'd; NULL: no memory. A text begins after the first one
 * (bos_token_id), which is also for programs that pad (pad_token_id). */
char *end_ids_json(const struct end_ids *ends);

#endif
