#include "data/source.h"

#include <stdlib.h>
#include <string.h>

#include "data/shuffle.h"

struct source {
    char *glob;
    struct source_options options;
    struct shards *shards;
    struct packer *packer; /* fit */
    struct source_position position;
    int64_t block_sequences; /* fit: in the block drawn from last; 0: not known */
};

struct source *source_open(const char *glob, const struct source_options *o, struct error *e) {
    struct source *s = calloc(1, sizeof *s);
    if (!s || !(s->glob = strdup(glob))) {
        free(s);
        fail_run(e, "out of memory opening the shards of '%s'", glob);
        return NULL;
    }
    s->options = *o;
    /* With fit a shard may be shorter than a sequence. */
    const struct shards_options options = {
        .seq_len = o->fit ? 1 : o->seq_len, .vocab_size = o->vocab_size, .comm = o->comm};
    s->shards = shards_open(glob, &options, e);
    if (!s->shards) {
        source_close(s);
        return NULL;
    }
    return s;
}

void source_close(struct source *s) {
    if (!s)
        return;
    packer_close(s->packer);
    shards_close(s->shards);
    free(s->glob);
    free(s);
}

int source_set_documents(struct source *s, struct document_rule rule, struct error *e) {
    if (!s->options.fit)
        return 0;
    packer_close(s->packer);
    s->packer = packer_open(s->shards, rule, s->options.seq_len, e);
    return s->packer ? 0 : -1;
}

struct shards *source_shards(const struct source *s) {
    return s->shards;
}

struct packer *source_packer(const struct source *s) {
    return s->packer;
}

const char *source_glob(const struct source *s) {
    return s->glob;
}

/* ---- fit ---- */

static int64_t block_in_order(const struct source *s, const struct source_position *p) {
    if (!s->options.shuffle)
        return p->block;
    return shuffle_permute(p->block, packer_blocks(s->packer),
                           shuffle_key(s->options.seed, (uint64_t)p->epoch));
}

/* The offset-th of `count` sequences of a block. */
static int64_t sequence_in_order(const struct source *s, const struct source_position *p, int64_t block,
                                 int64_t count) {
    if (!s->options.shuffle)
        return p->offset;
    uint64_t epoch_key = shuffle_key(s->options.seed, (uint64_t)p->epoch);
    return shuffle_permute(p->offset, count, shuffle_key(epoch_key, (uint64_t)block + 1));
}

static void next_block(struct source *s) {
    struct source_position *p = &s->position;
    p->offset = 0;
    if (++p->block == packer_blocks(s->packer)) {
        p->block = 0;
        p->epoch++;
    }
}

/* Load the block of the next sequence. */
static int load_block(struct source *s, int64_t *block, int64_t *count, struct error *e) {
    for (int64_t empty = 0; empty <= packer_blocks(s->packer); empty++) {
        *block = block_in_order(s, &s->position);
        *count = packer_load(s->packer, *block, e);
        if (*count < 0)
            return -1;
        if (s->position.offset < *count)
            return 0;
        next_block(s);
    }
    return fail_user(e, "%s: no document has a target that counts; check the labels", s->glob);
}

static int draw_fit(struct source *s, int32_t *tokens, int32_t *targets, struct error *e) {
    int64_t block = 0, count = 0;
    if (load_block(s, &block, &count, e) != 0)
        return -1;
    if (tokens)
        packer_copy(s->packer, sequence_in_order(s, &s->position, block, count), tokens, targets);
    s->block_sequences = count;
    s->position.offset++;
    s->position.sequences++;
    return 0;
}

/* ---- both ---- */

int source_draw(struct source *s, int32_t *tokens, int32_t *targets, struct error *e) {
    if (s->options.fit)
        return draw_fit(s, tokens, targets, e);
    int64_t draw = s->position.sequences;
    if (tokens && shards_read(s->shards, shards_draw(s->shards, draw, s->options.shuffle, s->options.seed),
                              tokens, targets, e) != 0)
        return -1;
    s->position.sequences++;
    return 0;
}

struct source_position source_position(const struct source *s) {
    return s->position;
}

int source_set_position(struct source *s, struct source_position position, struct error *e) {
    bool possible = position.sequences >= 0;
    if (s->options.fit)
        possible = possible && position.epoch >= 0 && position.block >= 0 &&
                   position.block < packer_blocks(s->packer) && position.offset >= 0 &&
                   position.offset <= PACKING_BLOCK;
    if (!possible)
        return fail_user(
            e, "%s: the checkpoint's data position is impossible: the file trainer.json is damaged", s->glob);
    s->position = position;
    return 0;
}

int64_t source_epoch(const struct source *s) {
    int64_t drawn = s->position.sequences;
    if (s->options.fit)
        return s->position.epoch; /* load_block begins the next epoch, when it is drawn from */
    return drawn > 0 ? (drawn - 1) / shards_sequences(s->shards) : 0;
}

double source_epochs(const struct source *s) {
    const struct source_position *p = &s->position;
    if (!s->options.fit)
        return (double)p->sequences / (double)shards_sequences(s->shards);
    double drawn = s->block_sequences > 0 ? (double)p->offset / (double)s->block_sequences : 0;
    return (double)p->epoch + ((double)p->block + drawn) / (double)packer_blocks(s->packer);
}
