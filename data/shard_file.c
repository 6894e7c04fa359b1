/* A token shard: checked whole before a run, and read with pread.
 *
 * A run that reads a bad id three days in has lost three days, so every token is looked at before the first
 * step. It does so at memory speed: one test per fixed-size block, which the compiler turns into vector code,
 * and a search for the bad id only in a block that fails it.
 *
 * A file may still change while a run reads it. Memory-mapped, a truncated file would end the process with
 * SIGBUS, so the files are read with pread; each read compares the file's size and modification time with
 * those at the start, and checks every id again. */
#include "data/shard_file.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kernels/hash.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are read as they are, as little-endian");

enum { HEADER_BYTES = 1024, MAGIC_U16 = 20240520, VERSION_U16 = 1, MAGIC_U32 = 20240801, VERSION_U32 = 7 };
enum { CHECK_BLOCK = 4096, FINGERPRINT_TOKENS = 256 };

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

uint64_t shard_absorb(uint64_t hash, uint64_t value) {
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
    hash = shard_absorb(hash, (uint64_t)f->tokens);
    for (int64_t i = 0; i < edges->count; i++)
        hash = shard_absorb(hash, edges->first[i]);
    for (int64_t i = 0; i < edges->count; i++)
        hash = shard_absorb(hash, edges->last[i]);
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
    const int64_t piece = SHARD_BUFFER / f->token_bytes;
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

static int check_whole(struct shard *f, int64_t seq_len, int64_t vocab_size, int64_t id_limit, void *buffer,
                       uint64_t *fingerprint, struct error *e) {
    struct edges edges;
    if (check_header(f, e) || check_size(f, e))
        return -1;
    f->sequences = f->tokens > 0 ? (f->tokens - 1) / seq_len : 0;
    if (f->sequences == 0)
        return fail_user(e,
                         "%s: %" PRId64 " tokens hold no sequence of %" PRId64
                         " (and one more, the last target); lower train.seq_len or leave the file out",
                         f->path, f->tokens, seq_len);
    if (check_ids(f, vocab_size, id_limit, buffer, e) || read_edges(f, &edges, e))
        return -1;
    f->edges = absorb_shard(FNV1A_START, f, &edges);
    *fingerprint = absorb_shard(*fingerprint, f, &edges);
    return 0;
}

int shard_check(struct shard *f, int64_t seq_len, int64_t vocab_size, int64_t id_limit, void *buffer,
                uint64_t *fingerprint, struct error *e) {
    if (fstat(f->fd, &f->stat))
        return fail_user(e, "%s: cannot be read: %s", f->path, strerror(errno));
    if (!S_ISREG(f->stat.st_mode))
        return fail_user(e, "%s: not a regular file; point the glob at prepared .bin files only", f->path);
    if (f->stat.st_size < HEADER_BYTES)
        return fail_user(e, "%s: truncated: %lld bytes cannot hold the %d-byte header; prepare it again",
                         f->path, (long long)f->stat.st_size, HEADER_BYTES);
    if (check_whole(f, seq_len, vocab_size, id_limit, buffer, fingerprint, e) != 0) {
        if (e)
            e->exit_code = EXIT_USER; /* before the first step, also where the file cannot be read */
        return -1;
    }
    return 0;
}

/* ---- reading later ---- */

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
    int status = check_header(&again, e);
    if (status != 0 && e->exit_code == EXIT_RUN) /* it could not be read */
        return -1;
    if (status != 0 || again.tokens != f->tokens || again.token_bytes != f->token_bytes)
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

int shard_read(struct shard *f, int64_t start, int64_t count, int64_t id_limit, void *tokens,
               struct error *e) {
    if (check_unchanged(f, e) != 0 || read_tokens(f, start, count, tokens, e) != 0)
        return -1;
    int64_t bad = find_bad_token(f, tokens, count, id_limit);
    return bad < 0 ? 0 : fail_bad_token(f, start + bad, token_in(f, tokens, bad), e);
}
