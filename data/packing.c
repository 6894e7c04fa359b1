#include "data/packing.h"

#include <stdlib.h>
#include <string.h>

#include "data/range.h"

struct document {
    int32_t start, length; /* in the window */
    int32_t sequence;
    int32_t next; /* of the same sequence; -1: none */
};

struct packer {
    struct shards *shards;
    struct document_rule rule;
    int64_t seq_len;
    int files;
    int64_t *first_block; /* [files + 1] of each file */
    int64_t loaded;       /* block; -1: none */

    /* the loaded block */
    int32_t *tokens, *targets; /* [2 + PACKING_BLOCK + seq_len] its window of the file */
    struct document *documents;
    int32_t document_count, sequence_count;
    int32_t *first, *last; /* [PACKING_BLOCK] documents of each sequence */
    int32_t *room;         /* [PACKING_BLOCK] tokens free in each sequence */
    int32_t *below;        /* [PACKING_BLOCK] next sequence with the same room, or -1 */

    int32_t *order;     /* [PACKING_BLOCK] documents, longest first */
    int32_t *by_size;   /* [seq_len + 1] the first sequence with so much room */
    uint64_t *has_room; /* bit r: there is such a sequence */
    struct packing_stats stats;
};

/* ---- opening and closing ---- */

static int count_blocks(struct packer *p, struct error *e) {
    p->files = shards_files(p->shards);
    p->first_block = calloc((size_t)p->files + 1, sizeof *p->first_block);
    if (!p->first_block)
        return fail_run(e, "out of memory for a list of %d shards", p->files);
    for (int i = 0; i < p->files; i++)
        p->first_block[i + 1] =
            p->first_block[i] + (shards_file_tokens(p->shards, i) + PACKING_BLOCK - 1) / PACKING_BLOCK;
    return 0;
}

static int allocate(struct packer *p, struct error *e) {
    size_t window = 2 + PACKING_BLOCK + (size_t)p->seq_len, sizes = (size_t)p->seq_len + 1;
    p->tokens = malloc(window * sizeof *p->tokens);
    p->targets = malloc(window * sizeof *p->targets);
    p->documents = malloc(PACKING_BLOCK * sizeof *p->documents);
    p->first = malloc(PACKING_BLOCK * sizeof *p->first);
    p->last = malloc(PACKING_BLOCK * sizeof *p->last);
    p->room = malloc(PACKING_BLOCK * sizeof *p->room);
    p->below = malloc(PACKING_BLOCK * sizeof *p->below);
    p->order = malloc(PACKING_BLOCK * sizeof *p->order);
    p->by_size = malloc(sizes * sizeof *p->by_size);
    p->has_room = calloc(sizes / 64 + 1, sizeof *p->has_room);
    if (p->tokens && p->targets && p->documents && p->first && p->last && p->room && p->below && p->order &&
        p->by_size && p->has_room)
        return 0;
    return fail_run(e, "out of memory for packing documents into sequences");
}

struct packer *packer_open(struct shards *s, struct document_rule rule, int64_t seq_len, struct error *e) {
    struct packer *p = calloc(1, sizeof *p);
    if (!p) {
        fail_run(e, "out of memory for packing documents into sequences");
        return NULL;
    }
    *p = (struct packer){.shards = s, .rule = rule, .seq_len = seq_len, .loaded = -1};
    if (count_blocks(p, e) != 0 || allocate(p, e) != 0) {
        packer_close(p);
        return NULL;
    }
    return p;
}

void packer_close(struct packer *p) {
    if (!p)
        return;
    free(p->first_block);
    free(p->tokens);
    free(p->targets);
    free(p->documents);
    free(p->first);
    free(p->last);
    free(p->room);
    free(p->below);
    free(p->order);
    free(p->by_size);
    free(p->has_room);
    free(p);
}

int64_t packer_blocks(const struct packer *p) {
    return p->first_block[p->files];
}

const struct packing_stats *packer_stats(const struct packer *p) {
    return &p->stats;
}

/* ---- finding a block's documents ---- */

static bool is_trained_on(const struct packer *p, int64_t start, int64_t length) {
    for (int64_t i = start; i < start + length; i++)
        if (p->targets[i] >= 0)
            return true;
    return false;
}

/* The segment [start, end) of the window, of which `inside` tokens are in the block. */
static void add_document(struct packer *p, int64_t start, int64_t end, int64_t inside) {
    int64_t length = end - start < p->seq_len ? end - start : p->seq_len;
    if (!is_trained_on(p, start, length)) {
        p->stats.left_out += p->targets[start] != LABEL_PADDING;
        p->stats.left_out_tokens += inside;
        return;
    }
    p->documents[p->document_count++] = (struct document){(int32_t)start, (int32_t)length, -1, -1};
    p->stats.documents++;
    p->stats.cropped += end - start > p->seq_len;
    p->stats.packed_tokens += length;
}

/* The window holds `count` tokens: the block is [begin, end) of it, and the first token of the file is at 0 if
 * begin = 0. */
static void find_documents(struct packer *p, int64_t begin, int64_t end, int64_t count) {
    int64_t start = begin == 0 ? 0 : -1; /* of the current document; -1: it belongs to an earlier block */
    p->document_count = 0;
    for (int64_t i = begin > 0 ? begin : 1; i < count; i++) {
        if (!segment_begins(p->rule, p->tokens, p->targets, i))
            continue;
        if (start >= 0)
            add_document(p, start, i, (i < end ? i : end) - start);
        start = i;
        if (i >= end)
            return;
    }
    if (start >= 0)
        add_document(p, start, count, end - start);
}

/* ---- best fit ---- */

/* The least room of at least `length` that some sequence has, or -1. */
static int64_t find_room(const struct packer *p, int64_t length) {
    int64_t words = p->seq_len / 64 + 1, w = length / 64;
    uint64_t bits = p->has_room[w] & ~UINT64_C(0) << (length % 64);
    while (bits == 0 && ++w < words)
        bits = p->has_room[w];
    return bits == 0 ? -1 : w * 64 + __builtin_ctzll(bits);
}

static void push_room(struct packer *p, int32_t sequence) {
    int32_t room = p->room[sequence];
    if (room == 0)
        return;
    bool is_first = !(p->has_room[room / 64] >> (room % 64) & 1);
    p->below[sequence] = is_first ? -1 : p->by_size[room];
    p->by_size[room] = sequence;
    p->has_room[room / 64] |= UINT64_C(1) << (room % 64);
}

static int32_t pop_room(struct packer *p, int64_t room) {
    int32_t sequence = p->by_size[room];
    if (p->below[sequence] < 0)
        p->has_room[room / 64] &= ~(UINT64_C(1) << (room % 64));
    else
        p->by_size[room] = p->below[sequence];
    return sequence;
}

/* Document numbers into p->order: longest first, in file order among equals. */
static void sort_by_length(struct packer *p) {
    int32_t *position = p->by_size, next = 0;
    memset(position, 0, ((size_t)p->seq_len + 1) * sizeof *position);
    for (int32_t i = 0; i < p->document_count; i++)
        position[p->documents[i].length]++;
    for (int64_t n = p->seq_len; n > 0; n--) {
        int32_t count = position[n];
        position[n] = next;
        next += count;
    }
    for (int32_t i = 0; i < p->document_count; i++)
        p->order[position[p->documents[i].length]++] = i;
}

/* Choose a sequence for every document. */
static void fit_documents(struct packer *p) {
    sort_by_length(p);
    memset(p->has_room, 0, ((size_t)p->seq_len / 64 + 1) * sizeof *p->has_room);
    p->sequence_count = 0;
    for (int32_t i = 0; i < p->document_count; i++) {
        struct document *d = &p->documents[p->order[i]];
        int64_t room = find_room(p, d->length);
        d->sequence = room < 0 ? p->sequence_count++ : pop_room(p, room);
        p->room[d->sequence] = (int32_t)(room < 0 ? p->seq_len : room) - d->length;
        push_room(p, d->sequence);
    }
}

/* Number the sequences by their first documents, and link each one's documents in file order. */
static void link_documents(struct packer *p) {
    int32_t *number = p->below, count = 0;
    for (int32_t i = 0; i < p->sequence_count; i++)
        number[i] = -1;
    for (int32_t i = 0; i < p->document_count; i++) {
        struct document *d = &p->documents[i];
        bool is_first = number[d->sequence] < 0;
        if (is_first)
            number[d->sequence] = count++;
        int32_t sequence = number[d->sequence];
        if (is_first)
            p->first[sequence] = i;
        else
            p->documents[p->last[sequence]].next = i;
        p->last[sequence] = i;
        d->next = -1;
    }
}

/* ---- blocks ---- */

static int file_of_block(const struct packer *p, int64_t block) {
    return (int)range_find(p->first_block, sizeof *p->first_block, p->files, block);
}

/* Tokens [begin, end) of a file of `tokens`, and their targets: the labels, or the next tokens. The last token of a file
 * without labels has no target that counts. */
static int read_window(struct packer *p, int file, int64_t begin, int64_t end, int64_t tokens,
                       struct error *e) {
    int64_t count = end - begin;
    if (shards_have_labels(p->shards))
        return shards_read_range(p->shards, file, begin, count, p->tokens, p->targets, e);
    if (shards_read_range(p->shards, file, begin, count + (end < tokens), p->tokens, NULL, e) != 0)
        return -1;
    memcpy(p->targets, p->tokens + 1, (size_t)(count - 1) * sizeof *p->targets);
    p->targets[count - 1] = end < tokens ? p->tokens[count] : LABEL_IGNORED;
    return 0;
}

int64_t packer_load(struct packer *p, int64_t block, struct error *e) {
    if (block == p->loaded)
        return p->sequence_count;
    int file = file_of_block(p, block);
    int64_t tokens = shards_file_tokens(p->shards, file);
    int64_t begin = (block - p->first_block[file]) * PACKING_BLOCK;
    int64_t end = begin + PACKING_BLOCK < tokens ? begin + PACKING_BLOCK : tokens;
    int64_t window_begin = begin > 0 ? begin - 1 : 0; /* the token before decides whether a document begins */
    int64_t window_end = end + p->seq_len < tokens ? end + p->seq_len : tokens;
    p->loaded = -1;
    if (read_window(p, file, window_begin, window_end, tokens, e) != 0)
        return -1;
    find_documents(p, begin - window_begin, end - window_begin, window_end - window_begin);
    fit_documents(p);
    link_documents(p);
    p->stats.tokens += end - begin;
    p->stats.sequences += p->sequence_count;
    p->loaded = block;
    return p->sequence_count;
}

void packer_copy(const struct packer *p, int64_t i, int32_t *tokens, int32_t *targets) {
    int64_t used = 0;
    for (int32_t d = p->first[i]; d >= 0; d = p->documents[d].next) {
        int32_t start = p->documents[d].start, length = p->documents[d].length;
        memcpy(tokens + used, p->tokens + start, (size_t)length * sizeof *tokens);
        memcpy(targets + used, p->targets + start, (size_t)length * sizeof *targets);
        used += length;
    }
    for (; used < p->seq_len; used++) {
        tokens[used] = p->rule.separator;
        targets[used] = LABEL_PADDING;
    }
}
