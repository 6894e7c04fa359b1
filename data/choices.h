/* Choices, which data/prepare.py --choices makes: a context and several endings, one of them the right one.
 *
 * NAME.choices is a header of 256 little-endian int32 (20261130, 1, items, the id that a document begins after), then for
 * each item: label, number of endings, length of the context, its ids; and for each ending its length in tokens, its
 * length in characters, and its ids. */
#ifndef IHA_DATA_CHOICES_H
#define IHA_DATA_CHOICES_H

#include <stdint.h>

#include "kernels/error.h"

enum { MAX_ENDINGS = 64, MAX_CHOICE_SETS = 64, MAX_CHOICE_NAME = 64 };

struct choice_item {
    int32_t label, endings;
    const int32_t *context, *ids[MAX_ENDINGS];
    int32_t context_length, lengths[MAX_ENDINGS]; /* tokens */
    int32_t characters[MAX_ENDINGS];
};

struct choice_set {
    char name[MAX_CHOICE_NAME]; /* the file's, without .choices */
    int64_t items;
    int32_t start; /* the id that a document begins after */
    int32_t *words;
    int64_t *offsets; /* [items] in words */
};

/* Read the files that a glob matches, in name order, and check them whole: labels and lengths, ids below vocab_size,
 * endings of at most seq_len tokens. Returns how many, at most MAX_CHOICE_SETS; -1 and EXIT_USER errors name the file and
 * the item. The first `count` of sets are to be closed. */
int choices_open(const char *pattern, int64_t vocab_size, int64_t seq_len,
                 struct choice_set sets[MAX_CHOICE_SETS], struct error *e);
void choices_close(struct choice_set *sets, int count);

/* The pointers are valid until choices_close. */
void choices_get(const struct choice_set *set, int64_t i, struct choice_item *item);

#endif
