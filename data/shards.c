/* The files of a glob, their sequences, and the order of training. shard_file.c reads and checks one file.
 *
 * The order of training is a pure function of (seed, draw): a Feistel network permutes [0, 4^k) without a
 * table, and walking its cycle until it lands below N restricts that permutation to [0, N) (Black and
 * Rogaway, "Ciphers with arbitrary finite domains", 2002). Nothing needs to be saved in a checkpoint. */
#include "data/shards.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/shard_file.h"
#include "kernels/hash.h"

enum { FEISTEL_ROUNDS = 8 };
enum { MIN_OPEN = 4, MAX_OPEN = 256 };

struct shards {
    struct shard *files;
    int count;
    int64_t seq_len;
    int64_t id_limit;
    int64_t sequences;
    int64_t tokens;
    uint64_t fingerprint;
    int open_count, open_limit; /* files whose descriptor is open */
    int next_to_close;
    void *buffer; /* SHARD_BUFFER, or a sequence and one more token */
};

/* ---- opening and closing ---- */

static void close_file(struct shards *s, struct shard *f) {
    if (f->fd < 0)
        return;
    close(f->fd);
    f->fd = -1;
    s->open_count--;
}

/* Close one file, in turn. */
static void close_next(struct shards *s) {
    struct shard *f;
    do {
        f = &s->files[s->next_to_close];
        s->next_to_close = (s->next_to_close + 1) % s->count;
    } while (f->fd < 0);
    close_file(s, f);
}

/* Open a file's descriptor, and close another's if too many are open. 0, or the errno. */
static int open_file(struct shards *s, struct shard *f) {
    while (s->open_count >= s->open_limit)
        close_next(s);
    /* O_NONBLOCK: opening a FIFO would wait. */
    while ((f->fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) < 0) {
        if ((errno != EMFILE && errno != ENFILE) || s->open_count == 0)
            return errno;
        close_next(s);
    }
    s->open_count++;
    return 0;
}

static int open_shard(struct shards *s, struct shard *f, int64_t vocab_size, struct error *e) {
    int err = open_file(s, f);
    if (err)
        return fail_user(e, "%s: cannot be opened: %s", f->path, strerror(err));
    return shard_check(f, s->seq_len, vocab_size, s->id_limit, s->buffer, &s->fingerprint, e);
}

/* How many descriptors to keep open: an eighth of those the process may have. */
static int descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur / 8 > MAX_OPEN)
        return MAX_OPEN;
    return limit.rlim_cur / 8 < MIN_OPEN ? MIN_OPEN : (int)(limit.rlim_cur / 8);
}

static int open_all(struct shards *s, const glob_t *paths, int64_t vocab_size, struct error *e) {
    int64_t sequence_bytes = 4 * (s->seq_len + 1);
    s->files = calloc(paths->gl_pathc, sizeof *s->files);
    s->buffer = malloc((size_t)(sequence_bytes > SHARD_BUFFER ? sequence_bytes : SHARD_BUFFER));
    if (!s->files || !s->buffer)
        return fail_run(e, "out of memory for a list of %zu shards", paths->gl_pathc);
    s->open_limit = descriptor_limit();
    s->fingerprint = shard_absorb(FNV1A_START, (uint64_t)paths->gl_pathc);
    for (size_t i = 0; i < paths->gl_pathc; i++) {
        struct shard *f = &s->files[s->count++];
        f->fd = -1;
        if (!(f->path = strdup(paths->gl_pathv[i])))
            return fail_run(e, "out of memory for a list of %zu shards", paths->gl_pathc);
        if (open_shard(s, f, vocab_size, e) != 0)
            return -1;
        f->first = s->sequences;
        s->sequences += f->sequences;
        s->tokens += f->tokens;
    }
    return 0;
}

/* ---- finding the files ---- */

/* glob's callback has no context: the first directory that it could not list. */
static struct {
    int error_number; /* 0: none */
    char path[512];
} unlisted;

static int note_unlisted(const char *path, int error_number) {
    const char *name = strrchr(path, '/');
    bool lost_and_found =
        strcmp(name ? name + 1 : path, "lost+found") == 0; /* at the root of a file system, root's */
    if (unlisted.error_number || error_number == ENOENT || error_number == ENOTDIR || lost_and_found)
        return 0;
    unlisted.error_number = error_number;
    snprintf(unlisted.path, sizeof unlisted.path, "%s", path);
    return 0;
}

static int fail_no_match(const char *pattern, struct error *e) {
    char folder[512], relative[600] = "";
    struct stat st;
    /* A path without wildcards is not listed but looked up, and glob does not tell why that failed. */
    if (stat(pattern, &st) != 0 && errno != ENOENT && errno != ENOTDIR)
        return fail_user(e, "%s: cannot be opened: %s; check its permissions and those of its folders",
                         pattern, strerror(errno));
    if (pattern[0] != '/' && getcwd(folder, sizeof folder))
        snprintf(relative, sizeof relative, " relative to the current directory %s", folder);
    return fail_user(e,
                     "no file matches '%s'%s: check the path, or make shards of a text with data/prepare.py",
                     pattern, relative);
}

static int find_files(const char *pattern, glob_t *paths, struct error *e) {
    unlisted.error_number = 0;
    int status = glob(pattern, 0, note_unlisted, paths); /* sorted by name */
    if (status == GLOB_NOSPACE)
        return fail_run(e, "out of memory listing the files of '%s'", pattern);
    /* Files may be missing from the list even where others match. */
    if (unlisted.error_number)
        return fail_user(e, "the files of '%s' could not be listed: %s: %s; check its permissions", pattern,
                         unlisted.path, strerror(unlisted.error_number));
    if (status == 0)
        return 0;
    return status == GLOB_NOMATCH ? fail_no_match(pattern, e)
                                  : fail_user(e, "the files of '%s' could not be listed", pattern);
}

struct shards *shards_open(const char *pattern, int64_t seq_len, int64_t vocab_size, struct error *e) {
    glob_t paths = {0};
    struct shards *s = NULL;
    if (seq_len < 1 || vocab_size < 1) {
        fail_user(e, "shards need seq_len and vocab_size of 1 or more, not %" PRId64 " and %" PRId64, seq_len,
                  vocab_size);
        return NULL;
    }
    if (find_files(pattern, &paths, e)) {
        globfree(&paths);
        return NULL;
    }
    s = calloc(1, sizeof *s);
    if (!s) {
        fail_run(e, "out of memory opening the shards of '%s'", pattern);
    } else {
        s->seq_len = seq_len;
        /* Ids become int32, whatever vocab_size claims. */
        s->id_limit = vocab_size <= INT32_MAX ? vocab_size : (int64_t)INT32_MAX + 1;
        if (open_all(s, &paths, vocab_size, e)) {
            shards_close(s);
            s = NULL;
        }
    }
    globfree(&paths);
    return s;
}

void shards_close(struct shards *s) {
    if (!s)
        return;
    for (int i = 0; i < s->count; i++) {
        close_file(s, &s->files[i]);
        free(s->files[i].path);
    }
    free(s->files);
    free(s->buffer);
    free(s);
}

int64_t shards_sequences(const struct shards *s) {
    return s->sequences;
}

int64_t shards_tokens(const struct shards *s) {
    return s->tokens;
}

int shards_files(const struct shards *s) {
    return s->count;
}

/* ---- reading ---- */

static struct shard *shard_of_sequence(const struct shards *s, int64_t i) {
    int low = 0, high = s->count; /* files[low].first <= i < files[high].first */
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (s->files[middle].first <= i)
            low = middle;
        else
            high = middle;
    }
    return &s->files[low];
}

int shards_read(struct shards *s, int64_t i, int32_t *tokens, int32_t *targets, struct error *e) {
    struct shard *f = shard_of_sequence(s, i);
    int64_t start = (i - f->first) * s->seq_len, T = s->seq_len;
    int err = f->fd < 0 ? open_file(s, f) : 0;
    if (err)
        return fail_run(e, "%s: cannot be opened again: %s; put it back, then start again", f->path,
                        strerror(err));
    if (shard_read(f, start, T + 1, s->id_limit, s->buffer, e) != 0)
        return -1;
    if (f->token_bytes == 2) {
        const uint16_t *x = s->buffer;
        for (int64_t k = 0; k < T; k++) {
            tokens[k] = x[k];
            targets[k] = x[k + 1];
        }
    } else {
        memcpy(tokens, s->buffer, (size_t)T * 4);
        memcpy(targets, (const uint32_t *)s->buffer + 1, (size_t)T * 4);
    }
    return 0;
}

/* ---- the order of training ---- */

/* The finalizer of splitmix64 (Steele, Lea, Flood, 2014). */
static uint64_t mix(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* A permutation of [0, 4^half_bits). */
static uint64_t feistel(uint64_t x, int half_bits, uint64_t key) {
    uint64_t mask = (UINT64_C(1) << half_bits) - 1;
    uint64_t left = x >> half_bits, right = x & mask;
    for (uint64_t round = 0; round < FEISTEL_ROUNDS; round++) {
        uint64_t next = left ^ (mix(key ^ mix(right ^ (round << 56))) & mask);
        left = right;
        right = next;
    }
    return left << half_bits | right;
}

/* A permutation of [0, n); the domain is less than 4n, so the walk takes fewer than 4 steps on average. */
static int64_t permute(int64_t x, int64_t n, uint64_t key) {
    int half_bits = 1;
    while ((UINT64_C(1) << (2 * half_bits)) < (uint64_t)n)
        half_bits++;
    uint64_t y = (uint64_t)x;
    do
        y = feistel(y, half_bits, key);
    while (y >= (uint64_t)n);
    return (int64_t)y;
}

int64_t shards_draw(const struct shards *s, int64_t g, bool shuffle, uint64_t seed) {
    int64_t epoch = g / s->sequences, position = g % s->sequences;
    if (!shuffle)
        return position;
    return permute(position, s->sequences, mix(mix(seed) + (uint64_t)epoch));
}

/* ---- the fingerprint ---- */

void shards_fingerprint(const struct shards *s, char out[17]) {
    snprintf(out, 17, "%016" PRIx64, s->fingerprint);
}
