/* Token shards: checked whole before a run, and read sequence by sequence with pread.
 *
 * A run that reads a bad id three days in has lost three days, so shards_open looks at every token before
 * the first step. It does so at memory speed: one test per fixed-size block, which the compiler turns into
 * vector code, and a search for the culprit only in a block that fails it.
 *
 * A file may still change while a run reads it. Memory-mapped, a truncated file would end the process with
 * SIGBUS, so the files are read with pread; each read compares the file's size and modification time with
 * those at the start, and checks every id again.
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

#include "kernels/hash.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are read as they are, as little-endian");

enum { HEADER_BYTES = 1024, MAGIC_U16 = 20240520, VERSION_U16 = 1, MAGIC_U32 = 20240801, VERSION_U32 = 7 };
enum { CHECK_BLOCK = 4096, FINGERPRINT_TOKENS = 256, FEISTEL_ROUNDS = 8 };
enum { READ_BYTES = 1 << 18 }; /* bytes read at a time while a file is checked */
enum { MIN_OPEN = 4, MAX_OPEN = 256 };

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
    void *buffer; /* READ_BYTES, or a sequence and one more token */
};

/* ---- reading a part of a file ---- */

/* Fewer bytes than asked for are an error: EXIT_RUN. */
static int read_part(const struct shard *f, int64_t offset, void *data, int64_t bytes, struct error *e) {
    int64_t done = 0;
    while (done < bytes) {
        ssize_t n = pread(f->fd, (char *)data + done, (size_t)(bytes - done), offset + done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail_run(e, "%s: cannot be read: %s; check the disk and its file system, then start again",
                            f->path, strerror(errno));
        if (n == 0)
            return fail_run(e,
                            "%s: it ends at byte %" PRId64 ", and had %lld when it was opened: the file has "
                            "changed; put it back, then start again",
                            f->path, offset + done, (long long)f->stat.st_size);
        done += n;
    }
    return 0;
}

static int64_t token_offset(const struct shard *f, int64_t i) {
    return HEADER_BYTES + i * f->token_bytes;
}

/* Tokens [start, start + count), of 2 or 4 bytes each. */
static int read_tokens(const struct shard *f, int64_t start, int64_t count, void *tokens, struct error *e) {
    return read_part(f, token_offset(f, start), tokens, count * f->token_bytes, e);
}

static uint32_t token_in(const struct shard *f, const void *tokens, int64_t i) {
    return f->token_bytes == 2 ? ((const uint16_t *)tokens)[i] : ((const uint32_t *)tokens)[i];
}

/* ---- what a file's edges say ---- */

/* Eight bytes, whatever the width of the tokens. */
static uint64_t absorb(uint64_t hash, uint64_t value) {
    return fnv1a(hash, &value, sizeof value);
}

struct edges {
    uint32_t first[FINGERPRINT_TOKENS], last[FINGERPRINT_TOKENS]; /* they overlap in a short file */
    int64_t count;                                                /* of each */
};

static int read_edges(const struct shard *f, struct edges *edges, struct error *e) {
    uint32_t raw[FINGERPRINT_TOKENS];
    edges->count = f->tokens < FINGERPRINT_TOKENS ? f->tokens : FINGERPRINT_TOKENS;
    if (read_tokens(f, 0, edges->count, raw, e) != 0)
        return -1;
    for (int64_t i = 0; i < edges->count; i++)
        edges->first[i] = token_in(f, raw, i);
    if (read_tokens(f, f->tokens - edges->count, edges->count, raw, e) != 0)
        return -1;
    for (int64_t i = 0; i < edges->count; i++)
        edges->last[i] = token_in(f, raw, i);
    return 0;
}

static uint64_t absorb_shard(uint64_t hash, const struct shard *f, const struct edges *edges) {
    hash = absorb(hash, (uint64_t)f->tokens);
    for (int64_t i = 0; i < edges->count; i++)
        hash = absorb(hash, edges->first[i]);
    for (int64_t i = 0; i < edges->count; i++)
        hash = absorb(hash, edges->last[i]);
    return hash;
}

/* ---- checking ---- */

/* Constant trip counts: gcc -O2 vectorizes these two loops, and would not if the count were a variable. */
static bool block_below_u16(const uint16_t *x, int64_t limit) {
    uint16_t max = 0;
    for (int i = 0; i < CHECK_BLOCK; i++)
        max = x[i] > max ? x[i] : max;
    return max < limit;
}

/* For x < 2^31 and last < 2^31 the difference last - x has its top bit set exactly when x > last; a larger x
 * has it set itself. Plain SSE2 has a subtraction and an "or" for this, but no maximum. */
static bool block_below_u32(const uint32_t *x, int64_t limit) {
    uint32_t last = (uint32_t)(limit - 1), top_bits = 0;
    for (int i = 0; i < CHECK_BLOCK; i++)
        top_bits |= x[i] | (last - x[i]);
    return top_bits >> 31 == 0;
}

static bool block_is_good(const struct shard *f, const void *tokens, int64_t start, int64_t limit) {
    if (f->token_bytes == 2)
        return block_below_u16((const uint16_t *)tokens + start, limit);
    return block_below_u32((const uint32_t *)tokens + start, limit);
}

/* Index of the first id >= limit among `count` tokens, or -1. */
static int64_t find_bad_token(const struct shard *f, const void *tokens, int64_t count, int64_t limit) {
    if (f->token_bytes == 2 && limit > UINT16_MAX)
        return -1;
    int64_t i = 0;
    while (i < count) {
        if (count - i >= CHECK_BLOCK && block_is_good(f, tokens, i, limit)) {
            i += CHECK_BLOCK;
            continue;
        }
        int64_t end = count - i < CHECK_BLOCK ? count : i + CHECK_BLOCK;
        for (; i < end; i++)
            if (token_in(f, tokens, i) >= limit)
                return i;
    }
    return -1;
}

/* Check every id of a file, which is read into `buffer` piece by piece. */
static int check_ids(const struct shard *f, int64_t vocab_size, int64_t limit, void *buffer,
                     struct error *e) {
    const int64_t piece = READ_BYTES / f->token_bytes;
    for (int64_t i = 0; i < f->tokens; i += piece) {
        int64_t count = f->tokens - i < piece ? f->tokens - i : piece;
        if (read_tokens(f, i, count, buffer, e) != 0)
            return -1;
        int64_t bad = find_bad_token(f, buffer, count, limit);
        if (bad >= 0)
            return fail_user(e,
                             "%s: token %" PRId64 " is id %" PRIu32 " but vocab_size is %" PRId64
                             ": raise model.vocab_size or prepare the data with the model's tokenizer",
                             f->path, i + bad, token_in(f, buffer, bad), vocab_size);
    }
    return 0;
}

static int check_header(struct shard *f, struct error *e) {
    int32_t header[3]; /* magic, version, token count */
    if (read_part(f, 0, header, sizeof header, e) != 0)
        return -1;
    bool wide = header[0] == MAGIC_U32;
    if (!wide && header[0] != MAGIC_U16)
        return fail_user(e,
                         "%s: not a token shard: it starts with %" PRId32
                         " where %d (uint16) or %d (uint32) is "
                         "expected; point the glob at prepared .bin files only",
                         f->path, header[0], MAGIC_U16, MAGIC_U32);
    if (header[1] != (wide ? VERSION_U32 : VERSION_U16))
        return fail_user(e, "%s: shard version %" PRId32 " where %d is expected; prepare it again", f->path,
                         header[1], wide ? VERSION_U32 : VERSION_U16);
    if (header[2] < 0)
        return fail_user(e, "%s: damaged: its header promises %" PRId32 " tokens; prepare it again", f->path,
                         header[2]);
    f->token_bytes = wide ? 4 : 2;
    f->tokens = header[2];
    return 0;
}

static int check_size(const struct shard *f, struct error *e) {
    int64_t promised = HEADER_BYTES + f->tokens * f->token_bytes;
    int64_t found = (int64_t)f->stat.st_size;
    if (found == promised)
        return 0;
    return fail_user(e,
                     "%s: %s: header promises %" PRId64 " tokens (%" PRId64 " bytes), the file has %" PRId64
                     "; prepare it again",
                     f->path, found < promised ? "truncated" : "too long", f->tokens, promised, found);
}

static int check_shard(struct shards *s, struct shard *f, int64_t vocab_size, struct error *e) {
    struct edges edges;
    if (check_header(f, e) || check_size(f, e))
        return -1;
    f->sequences = f->tokens > 0 ? (f->tokens - 1) / s->seq_len : 0;
    if (f->sequences == 0)
        return fail_user(e,
                         "%s: %" PRId64 " tokens hold no sequence of %" PRId64
                         " (and one more, the last target); lower train.seq_len or leave the file out",
                         f->path, f->tokens, s->seq_len);
    if (check_ids(f, vocab_size, s->id_limit, s->buffer, e) || read_edges(f, &edges, e))
        return -1;
    f->edges = absorb_shard(FNV1A_START, f, &edges);
    s->fingerprint = absorb_shard(s->fingerprint, f, &edges);
    return 0;
}

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
    do {
        f->fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us */
        if (f->fd >= 0)
            break;
        if ((errno != EMFILE && errno != ENFILE) || s->open_count == 0)
            return errno;
        close_next(s);
    } while (true);
    s->open_count++;
    return 0;
}

static int open_shard(struct shards *s, struct shard *f, int64_t vocab_size, struct error *e) {
    int err = open_file(s, f);
    if (err)
        return fail_user(e, "%s: cannot be opened: %s", f->path, strerror(err));
    if (fstat(f->fd, &f->stat))
        return fail_user(e, "%s: cannot be read: %s", f->path, strerror(errno));
    if (!S_ISREG(f->stat.st_mode))
        return fail_user(e, "%s: not a regular file; point the glob at prepared .bin files only", f->path);
    if (f->stat.st_size < HEADER_BYTES)
        return fail_user(e, "%s: truncated: %lld bytes cannot hold the %d-byte header; prepare it again",
                         f->path, (long long)f->stat.st_size, HEADER_BYTES);
    if (check_shard(s, f, vocab_size, e) != 0) {
        if (e)
            e->exit_code = EXIT_USER; /* before the first step, also where the file cannot be read */
        return -1;
    }
    return 0;
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
    s->buffer = malloc((size_t)(sequence_bytes > READ_BYTES ? sequence_bytes : READ_BYTES));
    if (!s->files || !s->buffer)
        return fail_run(e, "out of memory for a list of %zu shards", paths->gl_pathc);
    s->open_limit = descriptor_limit();
    s->fingerprint = absorb(FNV1A_START, (uint64_t)paths->gl_pathc);
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
    if (unlisted.error_number || error_number == ENOENT || error_number == ENOTDIR)
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

static bool same_version(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static int fail_changed(const struct shard *f, const char *how, struct error *e) {
    return fail_run(e,
                    "%s: the file has changed since the run began: %s; put it back, then start again to "
                    "resume from the last checkpoint",
                    f->path, how);
}

/* A file with another modification time is accepted if its header, size and edges are what they were: it may have
 * been touched, or copied again. */
static int check_unchanged(struct shard *f, struct error *e) {
    struct stat now;
    struct shard again = *f;
    struct edges edges;
    if (fstat(f->fd, &now) != 0)
        return fail_run(e, "%s: cannot be read: %s; check the disk and its file system, then start again",
                        f->path, strerror(errno));
    if (same_version(&now, &f->stat))
        return 0;
    if (now.st_size != f->stat.st_size) {
        char how[96];
        snprintf(how, sizeof how, "it has %lld bytes and had %lld", (long long)now.st_size,
                 (long long)f->stat.st_size);
        return fail_changed(f, how, e);
    }
    if (check_header(&again, NULL) != 0 || again.tokens != f->tokens || again.token_bytes != f->token_bytes)
        return fail_changed(f, "its header is another one", e);
    if (read_edges(f, &edges, e) != 0)
        return -1;
    if (absorb_shard(FNV1A_START, f, &edges) != f->edges)
        return fail_changed(f, "its first or last tokens are others", e);
    f->stat = now;
    return 0;
}

static int fail_bad_token(const struct shard *f, int64_t position, uint32_t id, struct error *e) {
    char how[96];
    snprintf(how, sizeof how, "token %" PRId64 " is id %" PRIu32 ", outside the vocabulary", position, id);
    return fail_changed(f, how, e);
}

int shards_read(struct shards *s, int64_t i, int32_t *tokens, int32_t *targets, struct error *e) {
    struct shard *f = shard_of_sequence(s, i);
    int64_t start = (i - f->first) * s->seq_len, T = s->seq_len;
    int err = f->fd < 0 ? open_file(s, f) : 0;
    if (err)
        return fail_run(e, "%s: cannot be opened again: %s; put it back, then start again", f->path,
                        strerror(err));
    if (check_unchanged(f, e) != 0 || read_tokens(f, start, T + 1, s->buffer, e) != 0)
        return -1;
    int64_t bad = find_bad_token(f, s->buffer, T + 1, s->id_limit);
    if (bad >= 0)
        return fail_bad_token(f, start + bad, token_in(f, s->buffer, bad), e);
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
