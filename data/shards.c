/* The files of a glob, their sequences, and the order of training. shard_file.c reads and checks one file, shuffle.c
 * permutes the sequences. */
#include "data/shards.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "data/range.h"
#include "data/shard_list.h"
#include "data/shard_ranks.h"
#include "data/shuffle.h"
#include "kernels/hash.h"

enum { MIN_OPEN = 4, MAX_OPEN = 4096 };

struct shards {
    struct shard_list list;
    int64_t seq_len;
    struct shard_vocab vocab;
    int64_t sequences;
    int64_t tokens;
    uint64_t fingerprint;
    int open_count; /* files whose descriptor is open */
    int next_to_close;
    int32_t *sequence; /* [seq_len + 1] */
};

/* ---- descriptors ---- */

static _Atomic int sets_open; /* of shards */

/* How many descriptors one set of shards may keep open: all sets together half of those the process may have. */
static int descriptor_limit(void) {
    struct rlimit limit;
    rlim_t all = MAX_OPEN;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur / 2 < all)
        all = limit.rlim_cur / 2;
    int share = (int)all / (sets_open > 0 ? sets_open : 1);
    return share < MIN_OPEN ? MIN_OPEN : share;
}

/* Close one file, in turn. */
static void close_next(struct shards *s) {
    struct shard_file *f;
    do {
        struct shard *shard = &s->list.shards[s->next_to_close / 2];
        f = s->next_to_close % 2 ? &shard->labels : &shard->tokens;
        s->next_to_close = (s->next_to_close + 1) % (2 * s->list.count);
    } while (f->fd < 0);
    shard_file_close(f);
    s->open_count--;
}

/* Open a file's descriptor, and close another's if too many are open. 0, or the errno. */
static int open_file(struct shards *s, struct shard_file *f) {
    int err, limit = descriptor_limit();
    while (s->open_count >= limit)
        close_next(s);
    while ((err = shard_file_open(f)) != 0) {
        if ((err != EMFILE && err != ENFILE) || s->open_count == 0)
            return err;
        close_next(s);
    }
    s->open_count++;
    return 0;
}

/* ---- opening and closing ---- */

/* What a rank does alone: find the files and allocate. */
static struct shards *find_shards(const char *pattern, const struct shards_options *o, struct error *e) {
    if (o->seq_len < 1 || o->vocab_size < 1) {
        fail_user(e, "shards need seq_len and vocab_size of 1 or more, not %" PRId64 " and %" PRId64,
                  o->seq_len, o->vocab_size);
        return NULL;
    }
    struct shards *s = calloc(1, sizeof *s);
    if (s) {
        sets_open++;
        s->seq_len = o->seq_len;
        s->vocab = shard_vocab(o->vocab_size);
        s->sequence = malloc((size_t)(o->seq_len + 1) * sizeof *s->sequence);
    }
    if (!s || !s->sequence)
        fail_run(e, "out of memory opening the shards of '%s'", pattern);
    else if (shard_list_find(&s->list, pattern, e) == 0)
        return s;
    shards_close(s);
    return NULL;
}

struct shards *shards_open(const char *pattern, const struct shards_options *o, struct error *e) {
    struct comm *comm = o->comm ? o->comm : comm_single();
    struct error own = {0};
    struct shards *s = find_shards(pattern, o, &own);
    if (comm_agree(comm, s ? 0 : -1, &own) != 0 ||
        shard_ranks_check(&s->list, o, comm, &s->fingerprint, &own) != 0) {
        if (e)
            *e = own;
        shards_close(s);
        return NULL;
    }
    for (int i = 0; i < s->list.count; i++) {
        struct shard *f = &s->list.shards[i];
        f->first = s->sequences;
        s->sequences += f->sequences;
        s->tokens += f->tokens.count;
    }
    return s;
}

void shards_close(struct shards *s) {
    if (!s)
        return;
    sets_open--;
    shard_list_free(&s->list);
    free(s->sequence);
    free(s);
}

int64_t shards_sequences(const struct shards *s) {
    return s->sequences;
}

int64_t shards_tokens(const struct shards *s) {
    return s->tokens;
}

int shards_files(const struct shards *s) {
    return s->list.count;
}

int64_t shards_file_tokens(const struct shards *s, int file) {
    return s->list.shards[file].tokens.count;
}

bool shards_have_labels(const struct shards *s) {
    return s->list.shards[0].labels.path;
}

/* ---- reading ---- */

static struct shard *shard_of_sequence(const struct shards *s, int64_t i) {
    return &s->list.shards[range_find(&s->list.shards->first, sizeof *s->list.shards, s->list.count, i)];
}

static int read_file(struct shards *s, struct shard_file *f, int64_t start, int64_t count, int32_t *ids,
                     struct error *e) {
    int err = f->fd < 0 ? open_file(s, f) : 0;
    if (err)
        return fail_run(e, "%s: cannot be opened again: %s; put it back, then start again", f->path,
                        strerror(err));
    return shard_file_read(f, start, count, &s->vocab, ids, e);
}

int shards_read(struct shards *s, int64_t i, int32_t *tokens, int32_t *targets, struct error *e) {
    struct shard *f = shard_of_sequence(s, i);
    int64_t start = (i - f->first) * s->seq_len, T = s->seq_len;
    if (f->labels.path)
        return read_file(s, &f->tokens, start, T, tokens, e) != 0 ||
                       read_file(s, &f->labels, start, T, targets, e) != 0
                   ? -1
                   : 0;
    if (read_file(s, &f->tokens, start, T + 1, s->sequence, e) != 0)
        return -1;
    memcpy(tokens, s->sequence, (size_t)T * sizeof *tokens);
    memcpy(targets, s->sequence + 1, (size_t)T * sizeof *targets);
    return 0;
}

int shards_read_range(struct shards *s, int file, int64_t start, int64_t count, int32_t *tokens,
                      int32_t *labels, struct error *e) {
    struct shard *f = &s->list.shards[file];
    if (read_file(s, &f->tokens, start, count, tokens, e) != 0)
        return -1;
    return labels ? read_file(s, &f->labels, start, count, labels, e) : 0;
}

/* ---- the order of training ---- */

int64_t shards_draw(const struct shards *s, int64_t g, bool shuffle, uint64_t seed) {
    int64_t epoch = g / s->sequences, position = g % s->sequences;
    if (!shuffle)
        return position;
    return shuffle_permute(position, s->sequences, shuffle_key(seed, (uint64_t)epoch));
}

/* ---- the fingerprint ---- */

void shards_fingerprint(const struct shards *s, char out[17]) {
    snprintf(out, 17, "%016" PRIx64, s->fingerprint);
}
