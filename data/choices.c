#include "data/choices.h"

#include <errno.h>
#include <glob.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER_WORDS = 256, MAGIC = 20261130, VERSION = 1 };
#define MOST_WORDS ((int64_t)1 << 30)

struct reader {
    const char *path;
    int64_t item, at, count; /* words */
    const int32_t *words;
    int64_t vocab_size, seq_len;
    struct error *e;
};

static int fail_item(const struct reader *r, const char *what) {
    return fail_user(r->e, "%s: item %lld: %s; prepare the choices again", r->path, (long long)r->item, what);
}

/* The next word, from low to high. */
static int next_word(struct reader *r, int64_t low, int64_t high, const char *what, int32_t *word) {
    if (r->at >= r->count)
        return fail_item(r, "the file ends within it");
    *word = r->words[r->at++];
    return *word < low || *word > high ? fail_item(r, what) : 0;
}

static int skip_ids(struct reader *r, int32_t length) {
    if (length > r->count - r->at)
        return fail_item(r, "the file ends within it");
    for (int32_t i = 0; i < length; i++, r->at++)
        if (r->words[r->at] < 0 || r->words[r->at] >= r->vocab_size)
            return fail_user(r->e,
                             "%s: item %lld: token id %d, but model.vocab_size is %lld: these choices were "
                             "made with another tokenizer",
                             r->path, (long long)r->item, r->words[r->at], (long long)r->vocab_size);
    return 0;
}

static int check_item(struct reader *r) {
    int32_t label = 0, endings = 0, length = 0;
    if (next_word(r, 0, MAX_ENDINGS - 1, "its label is out of range", &label) != 0 ||
        next_word(r, 2, MAX_ENDINGS, "it must have 2 to 64 endings", &endings) != 0)
        return -1;
    if (label >= endings)
        return fail_item(r, "its label is out of range");
    if (next_word(r, 0, MOST_WORDS, "a length is out of range", &length) != 0 || skip_ids(r, length) != 0)
        return -1;
    for (int32_t i = 0; i < endings; i++) {
        int32_t characters = 0;
        if (next_word(r, 1, MOST_WORDS, "an ending is empty", &length) != 0 ||
            next_word(r, 1, MOST_WORDS, "an ending is empty", &characters) != 0 || skip_ids(r, length) != 0)
            return -1;
        if (length > r->seq_len)
            return fail_user(
                r->e,
                "%s: item %lld: an ending has %d tokens, and train.seq_len is %lld; raise it, or "
                "leave the item out",
                r->path, (long long)r->item, length, (long long)r->seq_len);
    }
    return 0;
}

/* The words of a file in *words, which the caller frees; how many, or -1. */
static int64_t read_words(const char *path, int32_t **words, struct error *e) {
    FILE *f = fopen(path, "rb");
    int64_t size = -1;
    if (f && fseeko(f, 0, SEEK_END) == 0)
        size = ftello(f);
    if (size < 0) {
        fail_user(e, "%s: cannot read: %s", path, strerror(errno));
    } else if (size % 4 != 0 || size < HEADER_WORDS * 4 || size / 4 > MOST_WORDS) {
        size = fail_user(e, "%s: %lld bytes: not a file of choices; data/prepare.py --choices makes them",
                         path, (long long)size);
    } else if (!(*words = malloc((size_t)size))) {
        size = fail_run(e, "%s: out of memory", path);
    } else if (fseeko(f, 0, SEEK_SET) != 0 || fread(*words, 4, (size_t)size / 4, f) != (size_t)size / 4) {
        size = fail_run(e, "%s: cannot read: %s", path, strerror(errno));
    }
    if (f)
        fclose(f);
    return size < 0 ? -1 : size / 4;
}

static int open_set(const char *path, int64_t vocab_size, int64_t seq_len, struct choice_set *set,
                    struct error *e) {
    struct reader r = {
        .path = path, .at = HEADER_WORDS, .vocab_size = vocab_size, .seq_len = seq_len, .e = e};
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    size_t length = strcspn(name, ".");
    if ((r.count = read_words(path, &set->words, e)) < 0)
        return -1;
    r.words = set->words;
    snprintf(set->name, sizeof set->name, "%.*s", (int)length, name);
    for (char *c = set->name; *c; c++) /* it stands in metrics.jsonl */
        if (*c == '"' || *c == '\\' || (unsigned char)*c < 32)
            *c = '_';
    if (r.words[0] != MAGIC || r.words[1] != VERSION || r.words[2] < 1)
        return fail_user(e, "%s: not a file of choices; data/prepare.py --choices makes them", path);
    set->items = r.words[2];
    set->start = r.words[3];
    if (set->start < 0 || set->start >= vocab_size)
        return fail_user(
            e,
            "%s: documents begin after id %d, but model.vocab_size is %lld: these choices were made "
            "with another tokenizer",
            path, set->start, (long long)vocab_size);
    if (!(set->offsets = malloc((size_t)set->items * sizeof *set->offsets)))
        return fail_run(e, "%s: out of memory", path);
    for (r.item = 0; r.item < set->items; r.item++) {
        set->offsets[r.item] = r.at;
        if (check_item(&r) != 0)
            return -1;
    }
    return r.at == r.count
               ? 0
               : fail_user(e, "%s: it does not end after its last item; prepare the choices again", path);
}

int choices_open(const char *pattern, int64_t vocab_size, int64_t seq_len,
                 struct choice_set sets[MAX_CHOICE_SETS], struct error *e) {
    glob_t found;
    int count = 0, status = 0;
    memset(sets, 0, MAX_CHOICE_SETS * sizeof *sets);
    if (glob(pattern, 0, NULL, &found) != 0)
        return fail_user(e, "eval.tasks = %s: no such file; data/prepare.py --choices makes them", pattern);
    if (found.gl_pathc > MAX_CHOICE_SETS)
        status = fail_user(e, "eval.tasks = %s: %zu files, and at most %d are evaluated; name fewer", pattern,
                           found.gl_pathc, MAX_CHOICE_SETS);
    for (size_t i = 0; i < found.gl_pathc && status == 0; i++) {
        status = open_set(found.gl_pathv[i], vocab_size, seq_len, &sets[count++], e);
        for (int other = 0; other < count - 1 && status == 0; other++)
            if (strcmp(sets[other].name, sets[count - 1].name) == 0)
                status = fail_user(e, "%s: another file of eval.tasks is named %s too; rename one",
                                   found.gl_pathv[i], sets[other].name);
    }
    globfree(&found);
    if (status != 0)
        choices_close(sets, count);
    return status != 0 ? -1 : count;
}

void choices_close(struct choice_set *sets, int count) {
    for (int i = 0; i < count; i++) {
        free(sets[i].words);
        free(sets[i].offsets);
        sets[i] = (struct choice_set){0};
    }
}

void choices_get(const struct choice_set *set, int64_t i, struct choice_item *item) {
    const int32_t *p = set->words + set->offsets[i];
    item->label = *p++;
    item->endings = *p++;
    item->context_length = *p++;
    item->context = p;
    p += item->context_length;
    for (int32_t k = 0; k < item->endings; k++) {
        item->lengths[k] = *p++;
        item->characters[k] = *p++;
        item->ids[k] = p;
        p += item->lengths[k];
    }
}
