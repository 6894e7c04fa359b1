/* With N ranks, file i is opened by rank i % N. It checks the file and sends the others what they need in order to read
 * it, so that a run on hundreds of ranks does not read every file hundreds of times before it starts. All that every
 * rank does with every file is stat(). Where size and modification time are not those that the other rank found, the
 * hosts have copies of their own, and the rank compares header and samples too. */
#include "data/shard_ranks.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "data/parallel.h"
#include "kernels/hash.h"

enum { MAX_THREADS = 8, FILES_PER_THREAD = 4 };
enum { ALL_PLACES = 4096, MIN_PLACES = 4, MAX_PLACES = 64 }; /* in all files together; in one file */

/* What the rank that checked a file sends the others. */
struct file_record {
    struct timespec modified;
    int64_t size, count;
    int64_t id_bytes, places;
    uint64_t hash;
    struct shard_edges edges;
};

struct shard_record {
    struct file_record tokens, labels;
};

struct checks {
    struct shard_list *list;
    const struct shards_options *o;
    struct comm *comm;
    struct shard_vocab vocab;
    int64_t whole_bytes;          /* of all files */
    int places;                   /* of each file */
    int64_t *offset;              /* of each shard: bytes of the files before it */
    struct shard_record *records; /* of the shards that this rank checks */
    bool *differs; /* its size or modification time here is not that on the rank that checked it */
};

static int threads_for(int64_t files) {
    int64_t threads = files / FILES_PER_THREAD;
    return threads < 1 ? 1 : threads < MAX_THREADS ? (int)threads : MAX_THREADS;
}

/* The rank that checks shard i, and how many shards a rank checks at most. */
static int owner_of(const struct checks *c, int64_t i) {
    return (int)(i % c->comm->ranks);
}

static int64_t rounds(const struct checks *c) {
    return (c->list->count + c->comm->ranks - 1) / c->comm->ranks;
}

/* ---- on every rank: sizes ---- */

static int stat_file(struct shard_file *f, struct error *e) {
    if (!f->path || stat(f->path, &f->stat) == 0)
        return 0;
    return fail_user(e, "%s: cannot be opened: %s", f->path, strerror(errno));
}

static int stat_shard(void *context, int64_t i, struct error *e) {
    struct checks *c = context;
    struct shard *s = &c->list->shards[i];
    return stat_file(&s->tokens, e) != 0 ? -1 : stat_file(&s->labels, e);
}

static int allocate(struct checks *c, struct error *e) {
    c->offset = calloc((size_t)c->list->count, sizeof *c->offset);
    c->records = calloc((size_t)rounds(c), sizeof *c->records);
    c->differs = calloc((size_t)c->list->count, sizeof *c->differs);
    if (!c->offset || !c->records || !c->differs)
        return fail_run(e, "out of memory for a list of %d shards", c->list->count);
    return 0;
}

/* A hash of how many files there are, and of their sizes. */
static uint64_t find_sizes(struct checks *c) {
    uint64_t hash = shard_absorb(FNV1A_START, (uint64_t)c->list->count);
    int64_t bytes = 0;
    for (int i = 0; i < c->list->count; i++) {
        const struct shard *s = &c->list->shards[i];
        int64_t labels = s->labels.path ? s->labels.stat.st_size : 0;
        c->offset[i] = bytes;
        bytes += s->tokens.stat.st_size + labels;
        hash = shard_absorb(shard_absorb(hash, (uint64_t)s->tokens.stat.st_size), (uint64_t)labels);
    }
    return hash;
}

static int check_sizes(struct checks *c, struct error *e) {
    int status = allocate(c, e);
    if (status == 0 && (parallel_for(threads_for(c->list->count), c->list->count, stat_shard, c, e) >= 0 ||
                        shard_list_check_labels(c->list, e) != 0))
        status = -1;
    if (comm_agree(c->comm, status, e) != 0)
        return -1;
    uint64_t own = find_sizes(c), rank0;
    memcpy(&rank0, comm_all_gather_small(c->comm, &own, sizeof own), sizeof rank0);
    if (own != rank0)
        status = fail_user(e, "its training or validation data differs from rank 0's: a different number "
                              "of files or different sizes; all hosts must have the same shards");
    return comm_agree(c->comm, status, e);
}

/* ---- on one rank each: contents ---- */

static int check_open_file(const struct checks *c, struct shard_file *f, int64_t whole_bytes,
                           struct shard_edges *edges, struct error *e) {
    if (shard_file_check_header(f, e) != 0)
        return -1;
    int64_t whole = whole_bytes / f->id_bytes;
    if (shard_file_check_ids(f, &c->vocab, 0, whole < f->count ? whole : f->count, NULL, e) != 0)
        return -1;
    return shard_file_check_places(f, &c->vocab, c->places, edges, e);
}

/* What cannot be read on this rank's host may be readable on others: name the rank. Before the first step all is the
 * user's to mend. */
static void name_rank(const struct checks *c, struct error *e) {
    struct error on_rank;
    if (e->exit_code == EXIT_RUN && c->comm->ranks > 1) {
        fail_user(&on_rank, "rank %d: %.1000s", c->comm->rank, e->text);
        *e = on_rank;
    }
    e->exit_code = EXIT_USER;
}

static int check_file(const struct checks *c, struct shard_file *f, int64_t offset, struct file_record *r,
                      struct error *e) {
    int64_t whole_bytes = c->whole_bytes > offset ? c->whole_bytes - offset : 0;
    int status = shard_file_open_or_fail(f, e);
    if (status == 0) {
        status = check_open_file(c, f, whole_bytes, &r->edges, e);
        shard_file_close(f);
    }
    if (status != 0)
        name_rank(c, e);
    r->modified = f->stat.st_mtim;
    r->size = f->stat.st_size;
    r->count = f->count;
    r->id_bytes = f->id_bytes;
    r->places = f->places;
    r->hash = f->hash;
    return status;
}

/* round: of the shards that this rank checks. */
static int check_shard(void *context, int64_t round, struct error *e) {
    struct checks *c = context;
    int64_t i = round * c->comm->ranks + c->comm->rank;
    struct shard *s = &c->list->shards[i];
    struct shard_record *r = &c->records[round];
    if (check_file(c, &s->tokens, c->offset[i], &r->tokens, e) != 0)
        return -1;
    if (s->tokens.count <= c->o->seq_len)
        return fail_user(e,
                         "%s: %" PRId64 " tokens hold no sequence of %" PRId64
                         " (and one more, the last target); lower train.seq_len or leave the file out",
                         s->tokens.path, s->tokens.count, c->o->seq_len);
    if (!s->labels.path)
        return 0;
    if (check_file(c, &s->labels, c->offset[i] + r->tokens.size, &r->labels, e) != 0)
        return -1;
    return shard_check_label_count(s, e);
}

/* 0 where `failed` is -1 on all ranks; else *e is the error of the rank with the lowest one. */
static int agree_on_first(struct comm *comm, int64_t failed, struct error *e) {
    struct report {
        int64_t failed;
        struct error error;
    } mine = {.failed = failed};
    _Static_assert(sizeof(struct report) <= COMM_SMALL_BYTES, "");
    if (failed >= 0)
        mine.error = *e;
    const struct report *all = comm_all_gather_small(comm, &mine, sizeof mine);
    int first = -1;
    for (int r = 0; r < comm->ranks; r++)
        if (all[r].failed >= 0 && (first < 0 || all[r].failed < all[first].failed))
            first = r;
    if (first < 0)
        return 0;
    *e = all[first].error;
    return -1;
}

static int check_contents(struct checks *c, struct error *e) {
    int ranks = c->comm->ranks, rank = c->comm->rank;
    int64_t mine = (c->list->count + ranks - 1 - rank) / ranks;
    int64_t failed = parallel_for(threads_for(mine), mine, check_shard, c, e);
    return agree_on_first(c->comm, failed < 0 ? -1 : failed * ranks + rank, e);
}

/* ---- on every rank: the files that other ranks have checked ---- */

static void take_file(struct shard_file *f, const struct file_record *r, bool *differs) {
    f->count = r->count;
    f->id_bytes = (int)r->id_bytes;
    f->places = (int)r->places;
    f->hash = r->hash;
    *differs |= f->stat.st_size != r->size || f->stat.st_mtim.tv_sec != r->modified.tv_sec ||
                f->stat.st_mtim.tv_nsec != r->modified.tv_nsec;
}

static void take_shard(struct checks *c, int64_t i, const struct shard_record *r, uint64_t *fingerprint) {
    struct shard *s = &c->list->shards[i];
    if (owner_of(c, i) != c->comm->rank)
        take_file(&s->tokens, &r->tokens, &c->differs[i]);
    s->sequences = (s->tokens.count - 1) / c->o->seq_len;
    *fingerprint = shard_absorb(*fingerprint, (uint64_t)r->tokens.count);
    *fingerprint = shard_absorb_edges(*fingerprint, &r->tokens.edges);
    if (!s->labels.path)
        return;
    if (owner_of(c, i) != c->comm->rank)
        take_file(&s->labels, &r->labels, &c->differs[i]);
    *fingerprint = shard_absorb(*fingerprint, r->labels.hash);
}

/* Each round all ranks send one record, so that the records of all files need not be in memory at once. */
static int exchange_records(struct checks *c, uint64_t *fingerprint, struct error *e) {
    int ranks = c->comm->ranks;
    struct shard_record *all = calloc((size_t)ranks, sizeof *all);
    if (comm_agree(c->comm, all ? 0 : fail_run(e, "out of memory for the shards of %d ranks", ranks), e) !=
        0) {
        free(all);
        return -1;
    }
    *fingerprint = shard_absorb(FNV1A_START, (uint64_t)c->list->count);
    for (int64_t round = 0; round < rounds(c); round++) {
        c->comm->ops->all_gather_host(c->comm, &c->records[round], all, sizeof *all);
        for (int r = 0; r < ranks && round * ranks + r < c->list->count; r++)
            take_shard(c, round * ranks + r, &all[r], fingerprint);
    }
    free(all);
    return 0;
}

static int compare_file(const struct checks *c, struct shard_file *f, int owner, struct error *e) {
    if (!f->path)
        return 0;
    if (shard_file_open_or_fail(f, e) != 0) {
        e->exit_code = EXIT_USER;
        return -1;
    }
    f->stat.st_mtim = (struct timespec){0}; /* not what it was: to be compared by its contents */
    int status = shard_file_check_unchanged(f, &c->vocab, e);
    shard_file_close(f);
    return status == 0 ? 0
                       : fail_user(e,
                                   "its training or validation data differs from rank %d's: %.500s; all "
                                   "hosts must have the same shards",
                                   owner, f->path);
}

static int compare_shard(void *context, int64_t i, struct error *e) {
    struct checks *c = context;
    struct shard *s = &c->list->shards[i];
    if (!c->differs[i])
        return 0;
    return compare_file(c, &s->tokens, owner_of(c, i), e) != 0
               ? -1
               : compare_file(c, &s->labels, owner_of(c, i), e);
}

int shard_ranks_check(struct shard_list *l, const struct shards_options *o, struct comm *comm,
                      uint64_t *fingerprint, struct error *e) {
    struct checks c = {.list = l, .o = o, .comm = comm, .vocab = shard_vocab(o->vocab_size)};
    int64_t files = l->count;
    for (int i = 0; i < l->count; i++)
        files += l->shards[i].labels.path != NULL;
    int64_t places = ALL_PLACES / files;
    c.places = (int)(places < MIN_PLACES ? MIN_PLACES : places > MAX_PLACES ? MAX_PLACES : places);
    c.whole_bytes = o->whole_bytes > 0 ? o->whole_bytes : SHARDS_WHOLE_BYTES;
    int status = -1;
    if (check_sizes(&c, e) == 0 && check_contents(&c, e) == 0 && exchange_records(&c, fingerprint, e) == 0) {
        int64_t failed = parallel_for(threads_for(l->count), l->count, compare_shard, &c, e);
        status = comm_agree(comm, failed < 0 ? 0 : -1, e);
    }
    free(c.offset);
    free(c.records);
    free(c.differs);
    return status;
}
