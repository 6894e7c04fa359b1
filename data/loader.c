#include "data/loader.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "data/read_ahead.h"
#include "data/shuffle.h"
#include "data/source.h"
#include "kernels/hash.h"

/* Steps to read ahead: as many as fit into so many bytes, within limits. */
enum { AHEAD_BYTES = 64 << 20, MIN_SLOTS = 2, MAX_SLOTS = 32 };

/* How far the sources are after a step. */
struct progress {
    int64_t epochs[MAX_SOURCES]; /* of the sequence drawn last */
    double epochs_drawn[MAX_SOURCES];
    int64_t sequences[MAX_SOURCES];
    struct packing_stats packing; /* of all sources */
};

struct loader {
    struct loader_options options;
    struct document_rule rule;
    struct mixture mixture;
    struct source *sources[MAX_SOURCES];

    /* in file order: the number of sequences in the first counted_blocks blocks, fit */
    int64_t *counts;
    int64_t counted_blocks, counted_sequences;

    /* in the order of training; the thread uses the sources */
    struct loader_share share;
    struct read_ahead *ahead;
    int slots;
    int32_t *buffer; /* [slots] of tokens, targets and segments */
    struct slot {
        struct loader_position position;
        struct progress progress;
    } * after;                           /* [slots] */
    struct progress now;                 /* after the step given out last */
    int64_t printed_epochs[MAX_SOURCES]; /* that lines have named */
    int64_t printed_packed;              /* tokens in the blocks that the last line about packing covers */
};

/* ---- opening and closing ---- */

static int open_sources(struct loader *l, struct error *e) {
    const struct loader_options *o = &l->options;
    if (mixture_parse(&l->mixture, o->data, e) != 0)
        return -1;
    for (int i = 0; i < l->mixture.count; i++) {
        struct source_options source = {.seq_len = o->seq_len,
                                        .vocab_size = o->vocab_size,
                                        .fit = o->fit,
                                        .shuffle = o->shuffle,
                                        .comm = o->comm,
                                        .seed = i == 0 ? o->seed
                                                       : shuffle_key(o->seed, UINT64_MAX - (uint64_t)i)};
        if (!(l->sources[i] = source_open(l->mixture.globs[i], &source, e)))
            return -1;
    }
    return 0;
}

struct loader *loader_open(const struct loader_options *o, struct error *e) {
    struct loader *l = calloc(1, sizeof *l);
    if (!l) {
        fail_run(e, "out of memory opening the shards of '%s'", o->data);
        return NULL;
    }
    l->options = *o;
    l->rule.separator = -1;
    if (open_sources(l, e) != 0) {
        loader_close(l);
        return NULL;
    }
    l->options.data = NULL; /* the caller's */
    return l;
}

void loader_close(struct loader *l) {
    if (!l)
        return;
    read_ahead_stop(l->ahead);
    for (int i = 0; i < l->mixture.count; i++)
        source_close(l->sources[i]);
    free(l->counts);
    free(l->buffer);
    free(l->after);
    free(l);
}

int loader_set_documents(struct loader *l, struct document_rule rule, struct error *e) {
    l->rule = rule;
    for (int i = 0; i < l->mixture.count; i++)
        if (source_set_documents(l->sources[i], rule, e) != 0)
            return -1;
    return 0;
}

int64_t loader_tokens(const struct loader *l) {
    int64_t tokens = 0;
    for (int i = 0; i < l->mixture.count; i++)
        tokens += shards_tokens(source_shards(l->sources[i]));
    return tokens;
}

int loader_files(const struct loader *l) {
    int files = 0;
    for (int i = 0; i < l->mixture.count; i++)
        files += shards_files(source_shards(l->sources[i]));
    return files;
}

int loader_globs(const struct loader *l, const char *globs[MAX_SOURCES]) {
    for (int i = 0; i < l->mixture.count; i++)
        globs[i] = l->mixture.globs[i];
    return l->mixture.count;
}

bool loader_has_labels(const struct loader *l) {
    for (int i = 0; i < l->mixture.count; i++)
        if (shards_have_labels(source_shards(l->sources[i])))
            return true;
    return false;
}

void loader_fingerprint(const struct loader *l, char out[17]) {
    uint64_t hash = FNV1A_START;
    shards_fingerprint(source_shards(l->sources[0]), out);
    if (l->mixture.count == 1)
        return;
    for (int i = 0; i < l->mixture.count; i++) {
        shards_fingerprint(source_shards(l->sources[i]), out);
        hash = fnv1a(hash, out, 16);
        hash = fnv1a(hash, &l->mixture.weights[i], sizeof l->mixture.weights[i]);
    }
    snprintf(out, 17, "%016" PRIx64, hash);
}

static void find_segments(const struct loader *l, const int32_t *tokens, const int32_t *targets,
                          int32_t *segments) {
    if (l->options.segments)
        segments_find(l->rule, tokens, targets, l->options.seq_len, segments);
}

/* ---- in file order ---- */

/* Pack the next block that was not counted yet. */
static int count_block(struct loader *l, struct packer *p, struct error *e) {
    if (!l->counts && !(l->counts = malloc((size_t)packer_blocks(p) * sizeof *l->counts)))
        return fail_run(e, "out of memory for the sequences of %" PRId64 " blocks", packer_blocks(p));
    int64_t count = packer_load(p, l->counted_blocks, e);
    if (count < 0)
        return -1;
    l->counts[l->counted_blocks++] = count;
    l->counted_sequences += count;
    return 0;
}

int loader_count(struct loader *l, int64_t limit, int64_t *sequences, struct error *e) {
    struct packer *p = source_packer(l->sources[0]);
    while (p && l->counted_sequences < limit && l->counted_blocks < packer_blocks(p))
        if (count_block(l, p, e) != 0)
            return -1;
    *sequences = p ? l->counted_sequences : shards_sequences(source_shards(l->sources[0]));
    *sequences = *sequences < limit ? *sequences : limit;
    return 0;
}

static int read_packed(struct loader *l, int64_t i, int32_t *tokens, int32_t *targets, struct error *e) {
    struct packer *p = source_packer(l->sources[0]);
    int64_t block = 0, first = 0;
    while (first + l->counts[block] <= i)
        first += l->counts[block++];
    if (packer_load(p, block, e) < 0)
        return -1;
    packer_copy(p, i - first, tokens, targets);
    return 0;
}

int loader_read(struct loader *l, int64_t i, int32_t *tokens, int32_t *targets, int32_t *segments,
                struct error *e) {
    int status = l->options.fit ? read_packed(l, i, tokens, targets, e)
                                : shards_read(source_shards(l->sources[0]), i, tokens, targets, e);
    if (status == 0)
        find_segments(l, tokens, targets, segments);
    return status;
}

/* ---- in the order of training: the position ---- */

static bool needs_position(const struct loader *l) {
    return l->options.fit || l->mixture.count > 1;
}

static void get_position(const struct loader *l, struct loader_position *position) {
    position->count = 0;
    for (int i = 0; i < l->mixture.count && needs_position(l); i++) {
        struct source_position p = source_position(l->sources[i]);
        memcpy(position->values + position->count, &p, sizeof p);
        position->count += 4;
    }
}
_Static_assert(sizeof(struct source_position) == 4 * sizeof(int64_t), "four values for each source");

static int set_position(struct loader *l, int64_t sequences, const struct loader_position *position,
                        struct error *e) {
    struct source_position p = {.sequences = sequences};
    int64_t sum = 0;
    if (!needs_position(l) || sequences == 0)
        return source_set_position(l->sources[0], p, e);
    if (position->count != 4 * l->mixture.count)
        return fail_user(e,
                         "the checkpoint records no position for %d source%s of data; change data.train and "
                         "data.packing back, or set another run.dir",
                         l->mixture.count, l->mixture.count == 1 ? "" : "s");
    for (int i = 0; i < l->mixture.count; i++) {
        memcpy(&p, position->values + 4 * i, sizeof p);
        if (source_set_position(l->sources[i], p, e) != 0)
            return -1;
        sum += p.sequences;
    }
    return sum == sequences
               ? 0
               : fail_user(e,
                           "the checkpoint's data position counts %" PRId64
                           " sequences, and the checkpoint %" PRId64 ": the file trainer.json is damaged",
                           sum, sequences);
}

static void get_progress(const struct loader *l, struct progress *progress) {
    memset(progress, 0, sizeof *progress);
    for (int i = 0; i < l->mixture.count; i++) {
        const struct packer *packer = source_packer(l->sources[i]);
        progress->epochs[i] = source_epoch(l->sources[i]);
        progress->epochs_drawn[i] = source_epochs(l->sources[i]);
        progress->sequences[i] = source_position(l->sources[i]).sequences;
        if (!packer)
            continue;
        const struct packing_stats *from = packer_stats(packer);
        struct packing_stats *to = &progress->packing;
        to->tokens += from->tokens;
        to->sequences += from->sequences;
        to->packed_tokens += from->packed_tokens;
        to->documents += from->documents;
        to->cropped += from->cropped;
        to->left_out += from->left_out;
        to->left_out_tokens += from->left_out_tokens;
    }
}

/* ---- in the order of training: steps ---- */

static int64_t share_tokens(const struct loader *l) {
    return l->share.passes * l->share.micro_batch * l->options.seq_len;
}

static int arrays(const struct loader *l) {
    return l->options.segments ? 3 : 2;
}

static struct loader_step step_in_slot(const struct loader *l, int slot) {
    int64_t n = share_tokens(l);
    int32_t *first = l->buffer + slot * arrays(l) * n;
    return (struct loader_step){first, first + n, l->options.segments ? first + 2 * n : NULL, {0}};
}

/* Draw a sequence; `at` is its place in this rank's share, or -1 if it is another rank's. */
static int draw(struct loader *l, int slot, int64_t at, struct error *e) {
    int64_t drawn[MAX_SOURCES] = {0}, T = l->options.seq_len, n = share_tokens(l);
    for (int i = 0; i < l->mixture.count; i++)
        drawn[i] = source_position(l->sources[i]).sequences;
    struct source *s = l->sources[mixture_choose(&l->mixture, drawn)];
    if (at < 0)
        return source_draw(s, NULL, NULL, e);
    int32_t *tokens = l->buffer + slot * arrays(l) * n + at * T;
    if (source_draw(s, tokens, tokens + n, e) != 0)
        return -1;
    find_segments(l, tokens, tokens + n, l->options.segments ? tokens + 2 * n : NULL);
    return 0;
}

static int read_step(void *context, int slot, struct error *e) {
    struct loader *l = context;
    int64_t B = l->share.micro_batch;
    for (int64_t pass = 0; pass < l->share.passes; pass++)
        for (int64_t i = 0; i < l->share.ranks * B; i++) {
            int64_t b = i - l->share.rank * B;
            if (draw(l, slot, b >= 0 && b < B ? pass * B + b : -1, e) != 0)
                return -1;
        }
    get_position(l, &l->after[slot].position);
    get_progress(l, &l->after[slot].progress);
    return 0;
}

static int count_slots(const struct loader *l, int64_t steps) {
    int64_t fit = AHEAD_BYTES / (arrays(l) * share_tokens(l) * (int64_t)sizeof(int32_t));
    fit = fit < MIN_SLOTS ? MIN_SLOTS : fit > MAX_SLOTS ? MAX_SLOTS : fit;
    return (int)(fit < steps ? fit : steps);
}

int loader_start(struct loader *l, const struct loader_share *share, int64_t steps, int64_t sequences,
                 const struct loader_position *position, struct error *e) {
    l->share = *share;
    if (set_position(l, sequences, position, e) != 0)
        return -1;
    get_progress(l, &l->now);
    memcpy(l->printed_epochs, l->now.epochs, sizeof l->printed_epochs);
    l->slots = count_slots(l, steps);
    l->buffer = malloc((size_t)(l->slots * arrays(l) * share_tokens(l)) * sizeof *l->buffer);
    l->after = malloc((size_t)l->slots * sizeof *l->after);
    if (!l->buffer || !l->after)
        return fail_run(e, "out of memory for %d step%s of data", l->slots, l->slots == 1 ? "" : "s");
    l->ahead = read_ahead_start(l->slots, steps, read_step, l, e);
    return l->ahead ? 0 : -1;
}

int loader_next(struct loader *l, struct loader_step *step, struct error *e) {
    int slot = read_ahead_next(l->ahead, e);
    if (slot < 0)
        return -1;
    *step = step_in_slot(l, slot);
    step->position = l->after[slot].position;
    l->now = l->after[slot].progress;
    return 0;
}

/* ---- lines for the user ---- */

bool loader_epoch_began(const struct loader *l) {
    for (int i = 0; i < l->mixture.count && needs_position(l); i++)
        if (l->now.epochs[i] > l->printed_epochs[i])
            return true;
    return false;
}

void loader_print_epochs(struct loader *l, FILE *out, int64_t step) {
    for (int i = 0; i < l->mixture.count && needs_position(l); i++) {
        if (l->now.epochs[i] > l->printed_epochs[i])
            fprintf(out, "step %" PRId64 ": epoch %" PRId64 " of %s begins\n", step, l->now.epochs[i] + 1,
                    source_glob(l->sources[i]));
        l->printed_epochs[i] = l->now.epochs[i];
    }
}

void loader_print_sources(const struct loader *l, FILE *out) {
    int64_t total = 0;
    for (int i = 0; i < l->mixture.count; i++)
        total += l->now.sequences[i];
    for (int i = 0; i < l->mixture.count && l->mixture.count > 1 && total > 0; i++)
        fprintf(out, "%s %s: %.2f %% of the sequences, %.2f epochs", i == 0 ? "data:" : ";",
                source_glob(l->sources[i]), 100 * (double)l->now.sequences[i] / (double)total,
                l->now.epochs_drawn[i]);
    if (l->mixture.count > 1 && total > 0)
        fputc('\n', out);
}

void loader_print_packing(struct loader *l, FILE *out) {
    struct progress now = l->now;
    const struct packing_stats *p = &now.packing;
    if (!l->ahead)
        get_progress(l, &now);
    if (!l->options.fit || p->tokens == l->printed_packed || p->sequences == 0)
        return;
    l->printed_packed = p->tokens;
    double room = (double)(p->sequences * l->options.seq_len), packed = (double)p->packed_tokens;
    double cropped = (double)(p->tokens - p->packed_tokens - p->left_out_tokens);
    fprintf(out,
            "packing: %" PRId64 " documents in %" PRId64 " sequences, %.2f %% padding; %" PRId64
            " documents are longer than a sequence, and %.2f %% of the tokens are cropped",
            p->documents, p->sequences, 100 * (room - packed) / room, p->cropped,
            cropped > 0 ? 100 * cropped / (double)p->tokens : 0.0);
    if (p->left_out > 0)
        fprintf(out, "; %" PRId64 " have no target that counts, and are left out", p->left_out);
    fputc('\n', out);
}
