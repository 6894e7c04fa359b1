/* The files of a glob, their sequences, and the order of training. shard_file.c reads and checks one file.
 *
 * The order of training is a pure function of (seed, draw): a Feistel network permutes [0, 4^k) without a
 * table, and walking its cycle until it lands below N restricts that permutation to [0, N) (Black and
 * Rogaway, "Ciphers with arbitrary finite domains", 2002). Nothing needs to be saved in a checkpoint. */
#include "data/shards.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "data/shard_file.h"
#include "data/shard_glob.h"
#include "kernels/hash.h"

enum { FEISTEL_ROUNDS = 8 };
enum { MIN_OPEN = 4, MAX_OPEN = 4096 };
enum { PLACES = 64 };

struct shard {
    struct shard_file tokens, labels; /* labels.path is NULL: there are none */
    int64_t first;                    /* number of its first sequence among all shards' */
    int64_t sequences;
};

struct shards {
    struct shard *files;
    int count;
    int64_t seq_len;
    struct shard_vocab vocab;
    bool have_labels;
    int64_t sequences;
    int64_t tokens;
    uint64_t fingerprint;
    int open_count, open_limit; /* files whose descriptor is open */
    int next_to_close;
    int32_t *sequence; /* [seq_len + 1] */
    void *buffer;      /* SHARD_BUFFER bytes */
};

/* ---- descriptors ---- */

static void close_file(struct shards *s, struct shard_file *f) {
    if (f->fd < 0)
        return;
    shard_file_close(f);
    s->open_count--;
}

/* Close one file, in turn. */
static void close_next(struct shards *s) {
    struct shard_file *f;
    do {
        struct shard *shard = &s->files[s->next_to_close / 2];
        f = s->next_to_close % 2 ? &shard->labels : &shard->tokens;
        s->next_to_close = (s->next_to_close + 1) % (2 * s->count);
    } while (f->fd < 0);
    close_file(s, f);
}

/* Open a file's descriptor, and close another's if too many are open. 0, or the errno. */
static int open_file(struct shards *s, struct shard_file *f) {
    int err;
    while (s->open_count >= s->open_limit)
        close_next(s);
    while ((err = shard_file_open(f)) != 0) {
        if ((err != EMFILE && err != ENFILE) || s->open_count == 0)
            return err;
        close_next(s);
    }
    s->open_count++;
    return 0;
}

/* How many descriptors to keep open: half of those the process may have. */
static int descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur / 2 > MAX_OPEN)
        return MAX_OPEN;
    return limit.rlim_cur / 2 < MIN_OPEN ? MIN_OPEN : (int)(limit.rlim_cur / 2);
}

/* ---- opening and closing ---- */

static int open_and_check(struct shards *s, struct shard_file *f, struct shard_edges *edges,
                          struct error *e) {
    int err = open_file(s, f);
    if (err)
        return fail_user(e, "%s: cannot be opened: %s", f->path, strerror(err));
    int status = shard_file_check(f, &s->vocab, INT64_MAX, PLACES, edges, s->buffer, e);
    close_file(s, f);
    return status;
}

/* Set the path of the labels beside a shard, if there are any. */
static int find_labels(struct shard *f, struct error *e) {
    static const char bin[] = ".bin", labels[] = ".labels";
    size_t length = strlen(f->tokens.path), stem = length - strlen(bin);
    struct stat st;
    if (length < strlen(bin) || strcmp(f->tokens.path + stem, bin) != 0)
        return 0;
    char *path = malloc(stem + sizeof labels);
    if (!path)
        return fail_run(e, "out of memory for a file name");
    memcpy(path, f->tokens.path, stem);
    memcpy(path + stem, labels, sizeof labels);
    if (lstat(path, &st) == 0)
        f->labels.path = path;
    else
        free(path);
    return 0;
}

static int open_shard(struct shards *s, struct shard *f, struct error *e) {
    struct shard_edges edges;
    if (open_and_check(s, &f->tokens, &edges, e) != 0)
        return -1;
    f->sequences = f->tokens.count > 0 ? (f->tokens.count - 1) / s->seq_len : 0;
    if (f->sequences == 0)
        return fail_user(e,
                         "%s: %" PRId64 " tokens hold no sequence of %" PRId64
                         " (and one more, the last target); lower train.seq_len or leave the file out",
                         f->tokens.path, f->tokens.count, s->seq_len);
    s->fingerprint = shard_absorb(s->fingerprint, (uint64_t)f->tokens.count);
    s->fingerprint = shard_absorb_edges(s->fingerprint, &edges);
    if (!f->labels.path)
        return 0;
    if (open_and_check(s, &f->labels, &edges, e) != 0)
        return -1;
    if (f->labels.count != f->tokens.count)
        return fail_user(e, "%s: %" PRId64 " labels for the %" PRId64 " tokens of %s; make the labels again",
                         f->labels.path, f->labels.count, f->tokens.count, f->tokens.path);
    s->fingerprint = shard_absorb(s->fingerprint, f->labels.hash);
    return 0;
}

static int open_all(struct shards *s, const glob_t *paths, struct error *e) {
    s->files = calloc(paths->gl_pathc, sizeof *s->files);
    s->sequence = malloc((size_t)(s->seq_len + 1) * sizeof *s->sequence);
    s->buffer = malloc(SHARD_BUFFER);
    if (!s->files || !s->sequence || !s->buffer)
        return fail_run(e, "out of memory for a list of %zu shards", paths->gl_pathc);
    s->open_limit = descriptor_limit();
    s->fingerprint = shard_absorb(FNV1A_START, (uint64_t)paths->gl_pathc);
    for (size_t i = 0; i < paths->gl_pathc; i++) {
        struct shard *f = &s->files[s->count++];
        f->tokens = (struct shard_file){.kind = SHARD_TOKENS, .fd = -1};
        f->labels = (struct shard_file){.kind = SHARD_LABELS, .fd = -1};
        if (!(f->tokens.path = strdup(paths->gl_pathv[i])))
            return fail_run(e, "out of memory for a list of %zu shards", paths->gl_pathc);
        if (find_labels(f, e) != 0)
            return -1;
        bool labelled = f->labels.path;
        if (i > 0 && labelled != s->have_labels)
            return fail_user(e,
                             "%s has labels and %s has none: make labels for all shards of the glob, or "
                             "remove those there are",
                             s->files[labelled ? i : i - 1].tokens.path,
                             s->files[labelled ? i - 1 : i].tokens.path);
        s->have_labels = labelled;
    }
    for (int i = 0; i < s->count; i++) {
        struct shard *f = &s->files[i];
        if (open_shard(s, f, e) != 0)
            return -1;
        f->first = s->sequences;
        s->sequences += f->sequences;
        s->tokens += f->tokens.count;
    }
    return 0;
}

static struct shards *open_glob(const char *pattern, const struct shards_options *o, struct error *e) {
    glob_t paths = {0};
    struct shards *s = NULL;
    if (o->seq_len < 1 || o->vocab_size < 1) {
        fail_user(e, "shards need seq_len and vocab_size of 1 or more, not %" PRId64 " and %" PRId64,
                  o->seq_len, o->vocab_size);
        return NULL;
    }
    if (shard_glob(pattern, &paths, e)) {
        globfree(&paths);
        return NULL;
    }
    s = calloc(1, sizeof *s);
    if (!s) {
        fail_run(e, "out of memory opening the shards of '%s'", pattern);
    } else {
        s->seq_len = o->seq_len;
        s->vocab = shard_vocab(o->vocab_size);
        if (open_all(s, &paths, e)) {
            shards_close(s);
            s = NULL;
        }
    }
    globfree(&paths);
    return s;
}

/* All ranks have the same files. */
static int check_same_data(const struct shards *s, struct comm *comm, struct error *e) {
    uint64_t rank0;
    memcpy(&rank0, comm_all_gather_small(comm, &s->fingerprint, sizeof s->fingerprint), sizeof rank0);
    int status = 0;
    if (s->fingerprint != rank0)
        status = fail_user(e, "its training or validation data differs from rank 0's; all hosts must have "
                              "the same shards");
    return comm_agree(comm, status, e);
}

struct shards *shards_open(const char *pattern, const struct shards_options *o, struct error *e) {
    struct comm *comm = o->comm ? o->comm : comm_single();
    struct error own = {0};
    struct shards *s = open_glob(pattern, o, &own);
    if (comm_agree(comm, s ? 0 : -1, &own) == 0 && check_same_data(s, comm, &own) == 0)
        return s;
    if (e)
        *e = own;
    shards_close(s);
    return NULL;
}

void shards_close(struct shards *s) {
    if (!s)
        return;
    for (int i = 0; i < s->count; i++) {
        close_file(s, &s->files[i].tokens);
        close_file(s, &s->files[i].labels);
        free(s->files[i].tokens.path);
        free(s->files[i].labels.path);
    }
    free(s->files);
    free(s->sequence);
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

int64_t shards_file_tokens(const struct shards *s, int file) {
    return s->files[file].tokens.count;
}

bool shards_have_labels(const struct shards *s) {
    return s->have_labels;
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
    if (s->have_labels)
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
    struct shard *f = &s->files[file];
    if (read_file(s, &f->tokens, start, count, tokens, e) != 0)
        return -1;
    return labels ? read_file(s, &f->labels, start, count, labels, e) : 0;
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
