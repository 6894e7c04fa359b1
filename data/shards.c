/* Token shards: memory-mapped files, checked once and whole, then read without another thought.
 *
 * A run that reads a bad id three days in has lost three days, so shards_open looks at every token before
 * the first step. It does so at memory speed: one test per fixed-size block, which the compiler turns into
 * vector code, and a search for the culprit only in a block that fails it.
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
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/hash.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are read in place, as little-endian");

enum { HEADER_BYTES = 1024, MAGIC_U16 = 20240520, VERSION_U16 = 1, MAGIC_U32 = 20240801, VERSION_U32 = 7 };
enum { CHECK_BLOCK = 4096, FINGERPRINT_TOKENS = 256, FEISTEL_ROUNDS = 8 };

struct shard {
    unsigned char *map; /* the whole file, header included */
    size_t bytes;
    int token_bytes; /* 2 or 4 */
    int64_t tokens;
    int64_t first; /* number of its first sequence among all shards' */
    int64_t sequences;
};

struct shards {
    struct shard *files;
    int count;
    int64_t seq_len;
    int64_t sequences;
    int64_t tokens;
};

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

static uint32_t token_at(const struct shard *f, int64_t i) {
    const void *tokens = f->map + HEADER_BYTES;
    return f->token_bytes == 2 ? ((const uint16_t *)tokens)[i] : ((const uint32_t *)tokens)[i];
}

static bool block_is_good(const struct shard *f, int64_t start, int64_t limit) {
    const void *tokens = f->map + HEADER_BYTES;
    if (f->token_bytes == 2)
        return block_below_u16((const uint16_t *)tokens + start, limit);
    return block_below_u32((const uint32_t *)tokens + start, limit);
}

/* Position of the first id >= limit, or -1. */
static int64_t find_bad_token(const struct shard *f, int64_t limit) {
    if (f->token_bytes == 2 && limit > UINT16_MAX)
        return -1;
    int64_t i = 0;
    while (i < f->tokens) {
        if (f->tokens - i >= CHECK_BLOCK && block_is_good(f, i, limit)) {
            i += CHECK_BLOCK;
            continue;
        }
        int64_t end = f->tokens - i < CHECK_BLOCK ? f->tokens : i + CHECK_BLOCK;
        for (; i < end; i++)
            if (token_at(f, i) >= limit)
                return i;
    }
    return -1;
}

static int check_header(struct shard *f, const char *path, struct error *e) {
    int32_t header[3]; /* magic, version, token count */
    memcpy(header, f->map, sizeof header);
    bool wide = header[0] == MAGIC_U32;
    if (!wide && header[0] != MAGIC_U16)
        return fail_user(e,
                         "%s: not a token shard: it starts with %" PRId32
                         " where %d (uint16) or %d (uint32) is "
                         "expected; point the glob at prepared .bin files only",
                         path, header[0], MAGIC_U16, MAGIC_U32);
    if (header[1] != (wide ? VERSION_U32 : VERSION_U16))
        return fail_user(e, "%s: shard version %" PRId32 " where %d is expected; prepare it again", path,
                         header[1], wide ? VERSION_U32 : VERSION_U16);
    if (header[2] < 0)
        return fail_user(e, "%s: damaged: its header promises %" PRId32 " tokens; prepare it again", path,
                         header[2]);
    f->token_bytes = wide ? 4 : 2;
    f->tokens = header[2];
    return 0;
}

static int check_size(const struct shard *f, const char *path, struct error *e) {
    int64_t promised = HEADER_BYTES + f->tokens * f->token_bytes;
    int64_t found = (int64_t)f->bytes;
    if (found == promised)
        return 0;
    return fail_user(e,
                     "%s: %s: header promises %" PRId64 " tokens (%" PRId64 " bytes), the file has %" PRId64
                     "; prepare it again",
                     path, found < promised ? "truncated" : "too long", f->tokens, promised, found);
}

static int check_shard(struct shard *f, const char *path, int64_t seq_len, int64_t vocab_size,
                       struct error *e) {
    if (check_header(f, path, e) || check_size(f, path, e))
        return -1;
    f->sequences = f->tokens > 0 ? (f->tokens - 1) / seq_len : 0;
    if (f->sequences == 0)
        return fail_user(e,
                         "%s: %" PRId64 " tokens hold no sequence of %" PRId64
                         " (and one more, the last target); lower train.seq_len or leave the file out",
                         path, f->tokens, seq_len);
    /* Ids become int32, whatever vocab_size claims. */
    int64_t limit = vocab_size <= INT32_MAX ? vocab_size : (int64_t)INT32_MAX + 1;
    int64_t bad = find_bad_token(f, limit);
    if (bad >= 0)
        return fail_user(e,
                         "%s: token %" PRId64 " is id %" PRIu32 " but vocab_size is %" PRId64
                         ": raise model.vocab_size or prepare the data with the model's tokenizer",
                         path, bad, token_at(f, bad), vocab_size);
    return 0;
}

/* ---- opening and closing ---- */

static int map_file(struct shard *f, int fd, const char *path, struct error *e) {
    struct stat st;
    if (fstat(fd, &st))
        return fail_user(e, "%s: cannot be read: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fail_user(e, "%s: not a regular file; point the glob at prepared .bin files only", path);
    if (st.st_size < HEADER_BYTES)
        return fail_user(e, "%s: truncated: %lld bytes cannot hold the %d-byte header; prepare it again",
                         path, (long long)st.st_size, HEADER_BYTES);
    void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return fail_user(e, "%s: cannot be mapped into memory: %s", path, strerror(errno));
    madvise(map, (size_t)st.st_size, MADV_WILLNEED); /* only a hint */
    f->map = map;
    f->bytes = (size_t)st.st_size;
    return 0;
}

static int open_shard(struct shard *f, const char *path, int64_t seq_len, int64_t vocab_size,
                      struct error *e) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us */
    if (fd < 0)
        return fail_user(e, "%s: cannot be opened: %s", path, strerror(errno));
    int rc = map_file(f, fd, path, e);
    close(fd); /* the mapping stays */
    return rc ? rc : check_shard(f, path, seq_len, vocab_size, e);
}

static int open_all(struct shards *s, const glob_t *paths, int64_t vocab_size, struct error *e) {
    s->files = calloc(paths->gl_pathc, sizeof *s->files);
    if (!s->files)
        return fail_run(e, "out of memory for a list of %zu shards", paths->gl_pathc);
    for (size_t i = 0; i < paths->gl_pathc; i++) {
        struct shard *f = &s->files[s->count++];
        if (open_shard(f, paths->gl_pathv[i], s->seq_len, vocab_size, e))
            return -1;
        f->first = s->sequences;
        s->sequences += f->sequences;
        s->tokens += f->tokens;
    }
    return 0;
}

static int find_files(const char *pattern, glob_t *paths, struct error *e) {
    switch (glob(pattern, 0, NULL, paths)) { /* sorted by name */
    case 0:
        return 0;
    case GLOB_NOMATCH:
        return fail_user(
            e, "no file matches '%s': check the path, or make shards of a text with data/prepare.py",
            pattern);
    default:
        return fail_user(e, "the files of '%s' could not be listed: %s", pattern, strerror(errno));
    }
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
    for (int i = 0; i < s->count; i++)
        if (s->files[i].map)
            munmap(s->files[i].map, s->files[i].bytes);
    free(s->files);
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

static const struct shard *shard_of_sequence(const struct shards *s, int64_t i) {
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

static void copy_tokens(const struct shard *f, int64_t start, int64_t count, int32_t *out) {
    if (f->token_bytes == 2) {
        const uint16_t *x = (const uint16_t *)(const void *)(f->map + HEADER_BYTES) + start;
        for (int64_t i = 0; i < count; i++)
            out[i] = x[i];
    } else {
        memcpy(out, f->map + HEADER_BYTES + 4 * start, (size_t)count * 4);
    }
}

void shards_read(const struct shards *s, int64_t i, int32_t *tokens, int32_t *targets) {
    const struct shard *f = shard_of_sequence(s, i);
    int64_t start = (i - f->first) * s->seq_len;
    copy_tokens(f, start, s->seq_len, tokens);
    copy_tokens(f, start + 1, s->seq_len, targets);
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

/* Eight bytes, whatever the width of the tokens. */
static uint64_t absorb(uint64_t hash, uint64_t value) {
    return fnv1a(hash, &value, sizeof value);
}

static uint64_t absorb_shard(uint64_t hash, const struct shard *f) {
    int64_t edge = f->tokens < FINGERPRINT_TOKENS ? f->tokens : FINGERPRINT_TOKENS;
    hash = absorb(hash, (uint64_t)f->tokens);
    for (int64_t i = 0; i < edge; i++)
        hash = absorb(hash, token_at(f, i));
    for (int64_t i = f->tokens - edge; i < f->tokens; i++)
        hash = absorb(hash, token_at(f, i));
    return hash;
}

void shards_fingerprint(const struct shards *s, char out[17]) {
    uint64_t hash = absorb(FNV1A_START, (uint64_t)s->count);
    for (int i = 0; i < s->count; i++)
        hash = absorb_shard(hash, &s->files[i]);
    snprintf(out, 17, "%016" PRIx64, hash);
}
