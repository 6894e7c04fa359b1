/* A file of ids: checked before a run, and read with pread.
 *
 * A run that reads a bad id three days in has lost three days. So before the first step ids are checked, whole up to a
 * limit and at places spread over the file beyond it. Checking runs at memory speed: one test per fixed-size block,
 * which the compiler turns into vector code, and a search for the bad id only in a block that fails it.
 *
 * A file may still change while a run reads it. Memory-mapped, a truncated file would end the process with
 * SIGBUS, so the files are read with pread; each read compares the file's size and modification time with
 * those at the start, and checks every id again. */
#include "data/shard_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "data/shards.h"
#include "kernels/hash.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "ids are read as they are, as little-endian");

enum { HEADER_BYTES = 1024, CHECK_BLOCK = 4096, SAMPLE_IDS = 1024 };
enum { MAGIC_U16 = 20240520, VERSION_U16 = 1, MAGIC_U32 = 20240801, VERSION_U32 = 7 };
enum { MAGIC_LABELS = 20261129, VERSION_LABELS = 1 };

struct shard_vocab shard_vocab(int64_t size) {
    return (struct shard_vocab){size, size <= INT32_MAX ? size : (int64_t)INT32_MAX + 1};
}

static const char *id_name(const struct shard_file *f) {
    return f->kind == SHARD_LABELS ? "label" : "token";
}

/* ---- opening ---- */

int shard_file_open(struct shard_file *f) {
    /* O_NONBLOCK: opening a FIFO would wait. */
    f->fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    return f->fd < 0 ? errno : 0;
}

int shard_file_open_or_fail(struct shard_file *f, struct error *e) {
    int err = shard_file_open(f);
    return err ? fail_run(e, "%s: cannot be opened: %s", f->path, strerror(err)) : 0;
}

void shard_file_close(struct shard_file *f) {
    if (f->fd >= 0)
        close(f->fd);
    f->fd = -1;
}

/* ---- reading a part of a file ---- */

/* Fewer bytes than asked for are an error: EXIT_RUN. */
static int read_part(const struct shard_file *f, int64_t offset, void *data, int64_t bytes, struct error *e) {
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

/* Ids [start, start + count), of 2 or 4 bytes each. */
static int read_raw(const struct shard_file *f, int64_t start, int64_t count, void *ids, struct error *e) {
    return read_part(f, HEADER_BYTES + start * f->id_bytes, ids, count * f->id_bytes, e);
}

static int64_t id_in(const struct shard_file *f, const void *ids, int64_t i) {
    if (f->kind == SHARD_LABELS)
        return ((const int32_t *)ids)[i];
    return f->id_bytes == 2 ? ((const uint16_t *)ids)[i] : ((const uint32_t *)ids)[i];
}

/* ---- ids outside the vocabulary ---- */

struct bad_id {
    int64_t position, id; /* position -1: none */
};

/* Constant trip counts: gcc -O2 vectorizes these two loops, and would not if the count were a variable. */
static bool block_below_u16(const uint16_t *x, int64_t limit) {
    uint16_t max = 0;
    for (int i = 0; i < CHECK_BLOCK; i++)
        max = x[i] > max ? x[i] : max;
    return max < limit;
}

/* Whether all x + offset <= last. For y < 2^31 and last < 2^31 the difference last - y has its top bit set exactly when
 * y > last; a larger y has it set itself. Plain SSE2 has a subtraction and an "or" for this, but no maximum. */
static bool block_within_u32(const uint32_t *x, uint32_t offset, uint32_t last) {
    uint32_t top_bits = 0;
    for (int i = 0; i < CHECK_BLOCK; i++) {
        uint32_t y = x[i] + offset;
        top_bits |= y | (last - y);
    }
    return top_bits >> 31 == 0;
}

/* False also for some good blocks of labels, where the vocabulary has almost 2^31 ids. */
static bool block_is_good(const struct shard_file *f, const void *ids, int64_t start, int64_t limit) {
    if (f->id_bytes == 2)
        return block_below_u16((const uint16_t *)ids + start, limit);
    uint32_t offset = f->kind == SHARD_LABELS ? -LABEL_PADDING : 0;
    int64_t last = limit - 1 + offset;
    return block_within_u32((const uint32_t *)ids + start, offset,
                            last < INT32_MAX ? (uint32_t)last : INT32_MAX);
}

static bool id_is_good(const struct shard_file *f, int64_t id, int64_t limit) {
    return id < limit && id >= (f->kind == SHARD_LABELS ? LABEL_PADDING : 0);
}

/* Index of the first bad one among `count` ids, or -1. */
static int64_t find_bad_id(const struct shard_file *f, const void *ids, int64_t count, int64_t limit) {
    if (f->id_bytes == 2 && limit > UINT16_MAX)
        return -1;
    int64_t i = 0;
    while (i < count) {
        if (count - i >= CHECK_BLOCK && block_is_good(f, ids, i, limit)) {
            i += CHECK_BLOCK;
            continue;
        }
        int64_t end = count - i < CHECK_BLOCK ? count : i + CHECK_BLOCK;
        for (; i < end; i++)
            if (!id_is_good(f, id_in(f, ids, i), limit))
                return i;
    }
    return -1;
}

static int fail_bad_id(const struct shard_file *f, struct bad_id bad, int64_t vocab_size, struct error *e) {
    if (f->kind == SHARD_LABELS)
        return fail_user(e,
                         "%s: label %" PRId64 " is %" PRId64 " but vocab_size is %" PRId64
                         ": a label is an id below it, %d (does not count) or %d (padding); raise "
                         "model.vocab_size or make the labels again",
                         f->path, bad.position, bad.id, vocab_size, LABEL_IGNORED, LABEL_PADDING);
    return fail_user(e,
                     "%s: token %" PRId64 " is id %" PRId64 " but vocab_size is %" PRId64
                     ": raise model.vocab_size or prepare the data with the model's tokenizer",
                     f->path, bad.position, bad.id, vocab_size);
}

/* Ids of 2 bytes at the end of `ids` [count] to ids of 4 bytes. Each is read before its place is written to. */
static void widen(int32_t *ids, int64_t count) {
    const char *raw = (const char *)ids + 2 * count;
    for (int64_t i = 0; i < count; i++) {
        uint16_t id;
        memcpy(&id, raw + 2 * i, sizeof id);
        ids[i] = id;
    }
}

/* Read ids [start, start + count). *bad: the first one outside the vocabulary. */
static int read_ids(const struct shard_file *f, int64_t start, int64_t count, int64_t limit, int32_t *ids,
                    struct bad_id *bad, struct error *e) {
    *bad = (struct bad_id){.position = -1};
    char *raw = (char *)ids + (4 - f->id_bytes) * count;
    if (read_raw(f, start, count, raw, e) != 0)
        return -1;
    int64_t found = find_bad_id(f, raw, count, limit);
    if (found >= 0)
        *bad = (struct bad_id){start + found, id_in(f, raw, found)};
    if (f->id_bytes == 2)
        widen(ids, count);
    return 0;
}

/* ---- hashes ---- */

uint64_t shard_absorb(uint64_t hash, uint64_t value) {
    return fnv1a(hash, &value, sizeof value);
}

uint64_t shard_absorb_edges(uint64_t hash, const struct shard_edges *edges) {
    for (int64_t i = 0; i < edges->count; i++)
        hash = shard_absorb(hash, (uint32_t)edges->first[i]);
    for (int64_t i = 0; i < edges->count; i++)
        hash = shard_absorb(hash, (uint32_t)edges->last[i]);
    return hash;
}

/* The ids at both ends, and at f->places places in between, added to *hash; a file that is short enough is read whole.
 * Ends early at an id outside the vocabulary. */
static int hash_places(const struct shard_file *f, int64_t limit, struct shard_edges *edges, uint64_t *hash,
                       struct bad_id *bad, struct error *e) {
    int32_t ids[SAMPLE_IDS];
    int64_t places = f->places, last_place = f->count > SAMPLE_IDS ? f->count - SAMPLE_IDS : 0;
    bool whole = f->count <= places * SAMPLE_IDS;
    if (whole)
        places = (f->count + SAMPLE_IDS - 1) / SAMPLE_IDS;
    *hash = shard_absorb(FNV1A_START, (uint64_t)f->count);
    for (int64_t p = 0; p < places; p++) {
        int64_t start = whole        ? p * SAMPLE_IDS
                        : places > 1 ? p * (last_place / (places - 1))
                                     : last_place / 2;
        int64_t count = f->count - start < SAMPLE_IDS ? f->count - start : SAMPLE_IDS;
        if (read_ids(f, start, count, limit, ids, bad, e) != 0)
            return -1;
        if (bad->position >= 0)
            return 0;
        *hash = fnv1a(*hash, ids, (size_t)count * sizeof *ids);
    }
    edges->count = f->count < SHARD_EDGE ? f->count : SHARD_EDGE;
    if (read_ids(f, 0, edges->count, limit, edges->first, bad, e) != 0 || bad->position >= 0 ||
        read_ids(f, f->count - edges->count, edges->count, limit, edges->last, bad, e) != 0)
        return bad->position >= 0 ? 0 : -1;
    *hash = shard_absorb_edges(*hash, edges);
    return 0;
}

/* ---- checking ---- */

enum { CHECK_BUFFER = 1 << 18 }; /* bytes read at a time */

static void count_labels(struct label_counts *counts, const int32_t *labels, int64_t count) {
    int64_t counted = 0, padding = 0;
    for (int64_t i = 0; i < count; i++) {
        counted += labels[i] >= 0;
        padding += labels[i] == LABEL_PADDING;
    }
    counts->counted += counted;
    counts->padding += padding;
}

int shard_file_check_ids(const struct shard_file *f, const struct shard_vocab *vocab, int64_t start,
                         int64_t count, struct label_counts *counts, struct error *e) {
    _Alignas(64) char buffer[CHECK_BUFFER];
    const int64_t piece = CHECK_BUFFER / f->id_bytes;
    for (int64_t i = start, end = start + count; i < end; i += piece) {
        int64_t n = end - i < piece ? end - i : piece;
        if (read_raw(f, i, n, buffer, e) != 0)
            return -1;
        int64_t bad = find_bad_id(f, buffer, n, vocab->limit);
        if (bad >= 0)
            return fail_bad_id(f, (struct bad_id){i + bad, id_in(f, buffer, bad)}, vocab->size, e);
        if (counts)
            count_labels(counts, (const int32_t *)buffer, n);
    }
    return 0;
}

static int check_magic(struct shard_file *f, const int32_t header[3], struct error *e) {
    int32_t version = VERSION_U16;
    f->id_bytes = 4;
    if (f->kind == SHARD_LABELS) {
        version = VERSION_LABELS;
        if (header[0] != MAGIC_LABELS)
            return fail_user(e,
                             "%s: not a file of labels: it starts with %" PRId32
                             " where %d is expected; make the labels again, or remove the file",
                             f->path, header[0], MAGIC_LABELS);
    } else if (header[0] == MAGIC_U32) {
        version = VERSION_U32;
    } else if (header[0] == MAGIC_U16) {
        f->id_bytes = 2;
    } else if (header[0] == MAGIC_LABELS) {
        return fail_user(e, "%s: these are labels, not tokens; point the glob at .bin files only", f->path);
    } else {
        return fail_user(e,
                         "%s: not a token shard: it starts with %" PRId32
                         " where %d (uint16) or %d (uint32) is "
                         "expected; point the glob at prepared .bin files only",
                         f->path, header[0], MAGIC_U16, MAGIC_U32);
    }
    if (header[1] == version)
        return 0;
    return fail_user(e, "%s: %s version %" PRId32 " where %d is expected; prepare it again", f->path,
                     f->kind == SHARD_LABELS ? "labels" : "shard", header[1], version);
}

static int check_header(struct shard_file *f, struct error *e) {
    int32_t header[3]; /* magic, version, count */
    if (read_part(f, 0, header, sizeof header, e) != 0 || check_magic(f, header, e) != 0)
        return -1;
    if (header[2] < 0)
        return fail_user(e, "%s: damaged: its header promises %" PRId32 " %ss; prepare it again", f->path,
                         header[2], id_name(f));
    f->count = header[2];
    return 0;
}

static int check_size(const struct shard_file *f, struct error *e) {
    int64_t promised = HEADER_BYTES + f->count * f->id_bytes;
    int64_t found = (int64_t)f->stat.st_size;
    if (found == promised)
        return 0;
    return fail_user(e,
                     "%s: %s: header promises %" PRId64 " %ss (%" PRId64 " bytes), the file has %" PRId64
                     "; prepare it again",
                     f->path, found < promised ? "truncated" : "too long", f->count, id_name(f), promised,
                     found);
}

int shard_file_check_header(struct shard_file *f, struct error *e) {
    if (fstat(f->fd, &f->stat))
        return fail_run(e, "%s: cannot be read: %s", f->path, strerror(errno));
    if (!S_ISREG(f->stat.st_mode))
        return fail_user(e, "%s: not a regular file; point the glob at prepared .bin files only", f->path);
    if (f->stat.st_size < HEADER_BYTES)
        return fail_user(e, "%s: truncated: %lld bytes cannot hold the %d-byte header; prepare it again",
                         f->path, (long long)f->stat.st_size, HEADER_BYTES);
    return check_header(f, e) != 0 || check_size(f, e) != 0 ? -1 : 0;
}

int shard_file_check_places(struct shard_file *f, const struct shard_vocab *vocab, int places,
                            struct shard_edges *edges, struct error *e) {
    struct bad_id bad;
    f->places = places;
    if (hash_places(f, vocab->limit, edges, &f->hash, &bad, e) != 0)
        return -1;
    return bad.position >= 0 ? fail_bad_id(f, bad, vocab->size, e) : 0;
}

/* ---- reading later ---- */

static bool same_version(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static int fail_changed(const struct shard_file *f, const char *how, struct error *e) {
    return fail_run(e,
                    "%s: the file has changed since the run began: %s; put it back, then start again to "
                    "resume from the last checkpoint",
                    f->path, how);
}

static int fail_bad_id_now(const struct shard_file *f, struct bad_id bad, struct error *e) {
    return fail_run(e,
                    "%s: %s %" PRId64 " is id %" PRId64 ", outside the vocabulary: it was not checked "
                    "when the run began, or the file has changed since; correct it (train_iha check reads "
                    "all), then start again to resume from the last checkpoint",
                    f->path, id_name(f), bad.position, bad.id);
}

/* A file with another modification time is accepted if its header, size and hash are what they were: it may have
 * been touched, or copied again. */
int shard_file_check_unchanged(struct shard_file *f, const struct shard_vocab *vocab, struct error *e) {
    struct stat now;
    struct shard_file again = *f;
    struct shard_edges edges;
    struct bad_id bad;
    struct error why = {0};
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
    int status = check_header(&again, &why);
    if (status != 0 && why.exit_code == EXIT_RUN) /* it could not be read */
        return fail_run(e, "%s", why.text);
    if (status != 0 || again.count != f->count || again.id_bytes != f->id_bytes)
        return fail_changed(f, "its header is different", e);
    if (hash_places(&again, vocab->limit, &edges, &again.hash, &bad, e) != 0)
        return -1;
    if (bad.position >= 0)
        return fail_bad_id_now(f, bad, e);
    if (again.hash != f->hash)
        return fail_changed(f,
                            f->kind == SHARD_LABELS ? "some of its labels are different"
                                                    : "some of its tokens are different",
                            e);
    f->stat = now;
    return 0;
}

int shard_file_read(struct shard_file *f, int64_t start, int64_t count, const struct shard_vocab *vocab,
                    int32_t *ids, struct error *e) {
    struct bad_id bad;
    if (shard_file_check_unchanged(f, vocab, e) != 0 ||
        read_ids(f, start, count, vocab->limit, ids, &bad, e) != 0)
        return -1;
    return bad.position < 0 ? 0 : fail_bad_id_now(f, bad, e);
}
