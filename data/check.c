/* Two passes over the files of a list: first every header, then all ids. For the second, files are cut into pieces of
 * a few megabytes, so that all threads have work where there is only one file. */
#include "data/check.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/dataset.h"
#include "data/parallel.h"
#include "data/range.h"
#include "data/shard_list.h"
#include "kernels/clock.h"

enum { PIECE_BYTES = 1 << 23 };
enum { MIN_THREADS = 8 }; /* also on few cores: they wait for the disk */

struct file_check {
    struct shard_file *f;
    bool bad;
    int64_t first_piece;  /* number of its first piece among all files' */
    int64_t pieces_left;  /* until its ids are checked */
    int64_t failed_piece; /* the first of its pieces with a bad id, INT64_MAX: none */
    struct error error;   /* of that piece */
    struct label_counts counts;
};

struct check {
    struct shard_list list;
    struct shard_vocab vocab;
    struct file_check
        *files; /* [2 * list.count], tokens and labels of each shard; f->path is NULL: no labels */
    int64_t pieces, bytes;
    pthread_mutex_t lock; /* of all that changes during the second pass */
    int64_t bytes_done;
    int problems; /* lines that have been printed */
    bool terminal, line_open;
    double start, last_shown;
};

/* ---- what is printed on the way ---- */

static void end_status_line(struct check *c) {
    if (c->line_open)
        fputc('\n', stderr);
    c->line_open = false;
}

static void report(struct check *c, const struct error *e) {
    end_status_line(c);
    fprintf(stderr, "train_iha: %s\n", e->text);
    c->problems++;
}

/* On a terminal one line, rewritten in place; elsewhere a new line every 10 seconds. */
static void show_progress(struct check *c) {
    double now = clock_seconds(), interval = c->terminal ? 0.2 : 10;
    if (now - c->last_shown < interval)
        return;
    c->last_shown = now;
    double rate = (double)c->bytes_done / (now - c->start);
    char left[32];
    clock_format_duration((double)(c->bytes - c->bytes_done) / rate, left);
    fprintf(stderr, "%schecked %.1f of %.1f GB  %3.0f%%  %.2f GB/s  %s left%s", c->terminal ? "\r\033[K" : "",
            (double)c->bytes_done / 1e9, (double)c->bytes / 1e9,
            100 * (double)c->bytes_done / (double)c->bytes, rate / 1e9, left, c->terminal ? "" : "\n");
    fflush(stderr);
    c->line_open = c->terminal;
}

/* ---- headers ---- */

static int check_header(void *context, int64_t i, struct error *e) {
    struct check *c = context;
    struct file_check *file = &c->files[i];
    (void)e;
    if (!file->f->path)
        return 0;
    file->bad = shard_file_open_or_fail(file->f, &file->error) != 0 ||
                shard_file_check_header(file->f, &file->error) != 0;
    shard_file_close(file->f);
    return 0;
}

/* After the headers: that labels and tokens belong together. */
static void check_shard(struct check *c, int shard) {
    struct file_check *tokens = &c->files[2 * shard], *labels = tokens + 1;
    if (!tokens->bad && tokens->f->count < 2)
        tokens->bad = fail_user(&tokens->error, "%s: %" PRId64 " tokens hold no sequence; leave the file out",
                                tokens->f->path, tokens->f->count) != 0;
    if (labels->f->path && !tokens->bad && !labels->bad)
        labels->bad = shard_check_label_count(&c->list.shards[shard], &labels->error) != 0;
    for (struct file_check *file = tokens; file <= labels; file++)
        if (file->bad)
            report(c, &file->error);
}

/* ---- ids ---- */

static void cut_into_pieces(struct check *c) {
    for (int i = 0; i < 2 * c->list.count; i++) {
        struct file_check *file = &c->files[i];
        int64_t bytes = file->f->path && !file->bad ? file->f->count * file->f->id_bytes : 0;
        file->failed_piece = INT64_MAX;
        file->first_piece = c->pieces;
        file->pieces_left = (bytes + PIECE_BYTES - 1) / PIECE_BYTES;
        c->pieces += file->pieces_left;
        c->bytes += bytes;
    }
}

static struct file_check *file_of_piece(const struct check *c, int64_t piece) {
    return &c->files[range_find(&c->files->first_piece, sizeof *c->files, 2 * c->list.count, piece)];
}

static int check_ids(const struct check *c, const struct shard_file *f, int64_t start, int64_t count,
                     struct label_counts *counts, struct error *e) {
    struct shard_file mine = *f; /* with a descriptor of this thread's own */
    if (shard_file_open_or_fail(&mine, e) != 0)
        return -1;
    int status = shard_file_check_ids(&mine, &c->vocab, start, count, counts, e);
    shard_file_close(&mine);
    return status;
}

/* A file's first bad id is reported, so a piece is left out only after an earlier one. */
static int check_piece(void *context, int64_t piece, struct error *e) {
    struct check *c = context;
    struct file_check *file = file_of_piece(c, piece);
    struct label_counts counts = {0};
    int64_t ids = PIECE_BYTES / file->f->id_bytes, start = (piece - file->first_piece) * ids;
    int64_t count = file->f->count - start < ids ? file->f->count - start : ids;
    pthread_mutex_lock(&c->lock);
    bool needed = piece < file->failed_piece;
    pthread_mutex_unlock(&c->lock);
    int status =
        needed ? check_ids(c, file->f, start, count, file->f->kind == SHARD_LABELS ? &counts : NULL, e) : 0;
    pthread_mutex_lock(&c->lock);
    if (status != 0 && piece < file->failed_piece) {
        file->bad = true;
        file->failed_piece = piece;
        file->error = *e;
    }
    file->counts.counted += counts.counted;
    file->counts.padding += counts.padding;
    c->bytes_done += count * file->f->id_bytes;
    if (--file->pieces_left == 0 && file->bad)
        report(c, &file->error);
    show_progress(c);
    pthread_mutex_unlock(&c->lock);
    return 0;
}

/* ---- the command ---- */

static void check_dataset(struct check *c, const char *glob) {
    struct end_ids ends;
    struct error e = {0};
    int64_t separator = -1;
    if (dataset_end_ids(&glob, 1, NULL, NULL, 0, c->vocab.size, &separator, &ends, &e) != 0)
        report(c, &e);
}

static void print_summary(const struct check *c, FILE *out) {
    int64_t tokens = 0, labels = 0, good = 0;
    struct label_counts counts = {0};
    for (int i = 0; i < c->list.count; i++) {
        const struct file_check *file = &c->files[2 * i];
        if (file[0].bad || file[1].bad)
            continue;
        good++;
        tokens += file[0].f->count;
        labels += file[1].f->path ? file[1].f->count : 0;
        counts.counted += file[1].counts.counted;
        counts.padding += file[1].counts.padding;
    }
    fprintf(out, "%" PRId64 " of %d shards are good: %" PRId64 " tokens, all ids below %" PRId64 "\n", good,
            c->list.count, tokens, c->vocab.size);
    if (labels > 0)
        fprintf(out,
                "labels: %" PRId64 " count (%.1f%%), %" PRId64 " are padding, %" PRId64 " do not count\n",
                counts.counted, 100 * (double)counts.counted / (double)labels, counts.padding,
                labels - counts.counted - counts.padding);
}

static int check_list(struct check *c, FILE *out, const char *glob, struct error *e) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int threads = cores > MIN_THREADS ? (int)cores : MIN_THREADS, files = 2 * c->list.count;
    struct error labels = {0};
    c->files = calloc((size_t)files, sizeof *c->files);
    if (!c->files)
        return fail_run(e, "out of memory for a list of %d shards", c->list.count);
    for (int i = 0; i < files; i++)
        c->files[i].f = i % 2 ? &c->list.shards[i / 2].labels : &c->list.shards[i / 2].tokens;
    check_dataset(c, glob);
    if (shard_list_check_labels(&c->list, &labels) != 0)
        report(c, &labels);
    parallel_for(threads, files, check_header, c, NULL);
    for (int i = 0; i < c->list.count; i++)
        check_shard(c, i);
    cut_into_pieces(c);
    c->start = c->last_shown = clock_seconds();
    parallel_for(threads, c->pieces, check_piece, c, NULL);
    end_status_line(c);
    print_summary(c, out);
    return c->problems ? fail_user(e, "check: %d problem%s in the data of '%s'; see above", c->problems,
                                   c->problems > 1 ? "s" : "", glob)
                       : 0;
}

int check_data(FILE *out, const char *glob, int64_t vocab_size, struct error *e) {
    struct check c = {.vocab = shard_vocab(vocab_size), .terminal = isatty(STDERR_FILENO)};
    pthread_mutex_init(&c.lock, NULL);
    int status = shard_list_find(&c.list, glob, e);
    if (status == 0)
        status = check_list(&c, out, glob, e);
    pthread_mutex_destroy(&c.lock);
    shard_list_free(&c.list);
    free(c.files);
    return status;
}
