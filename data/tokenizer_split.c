/* Text to pieces, as the tokenizers library cuts it: first out come the added tokens (<|endoftext|>), then
 * the pre-tokenizer's steps cut what is left, and every piece goes to the merges on its own.
 *
 * Nothing is stored between steps: each piece runs through the remaining steps before the next is cut. */
#include "data/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- added tokens ---- */

/* A trie slot's rank is the node it leads to, its id the index of the token that ends there. */
int added_set_put(struct added_set *set, const char *text, const struct added_token *token) {
    uint32_t node = 0;
    for (const char *c = text; *c; c++) {
        const struct pair_slot *step = pair_map_get(&set->trie, node, (unsigned char)*c);
        uint32_t next = step ? step->rank : ++set->nodes;
        int32_t ends = step ? step->id : -1;
        if (!c[1])
            ends = (int32_t)set->count;
        if (pair_map_put(&set->trie, node, (unsigned char)*c, next, ends))
            return -1;
        node = next;
    }
    struct added_token *more = realloc(set->tokens, (set->count + 1) * sizeof *more);
    if (!more)
        return -1;
    set->tokens = more;
    set->tokens[set->count++] = *token;
    set->starts[(unsigned char)*text] = true;
    return 0;
}

void added_set_free(struct added_set *set) {
    pair_map_free(&set->trie);
    free(set->tokens);
}

/* The longest token that starts right here, or NULL. */
static const struct added_token *longest_at(const struct added_set *set, const char *text, size_t length,
                                            size_t *matched) {
    const struct added_token *found = NULL;
    uint32_t node = 0;
    if (!set->starts[(unsigned char)*text])
        return NULL;
    for (size_t i = 0; i < length; i++) {
        const struct pair_slot *step = pair_map_get(&set->trie, node, (unsigned char)text[i]);
        if (!step)
            break;
        if (step->id >= 0) {
            found = &set->tokens[step->id];
            *matched = i + 1;
        }
        node = step->rank;
    }
    return found;
}

/* Unicode's White_Space. */
static bool is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000;
}

static size_t spaces_after(const char *text, size_t length) {
    size_t i = 0;
    int used;
    while (i < length && is_space(utf8_next(text + i, length - i, &used)))
        i += (size_t)used;
    return i;
}

/* Where the code point before `end` starts. */
static size_t step_back(const char *text, size_t end) {
    size_t i = end - 1;
    while (i > 0 && ((unsigned char)text[i] & 0xc0) == 0x80)
        i--;
    return i;
}

/* From `end` back, and no further than `limit`. */
static size_t start_of_spaces_before(const char *text, size_t limit, size_t end) {
    int used;
    while (end > limit) {
        size_t start = step_back(text, end);
        if (!is_space(utf8_next(text + start, end - start, &used)))
            break;
        end = start;
    }
    return end;
}

static bool is_word(struct encoding *x, const char *text, size_t length) {
    return pcre2_match(x->t->word, (PCRE2_SPTR)text, length, 0, PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, x->match,
                       x->limits) > 0;
}

static bool stands_alone(struct encoding *x, struct slice text, size_t start, size_t end) {
    size_t before = start > 0 ? step_back(text.clean, start) : 0;
    return (start == 0 || !is_word(x, text.clean + before, start - before)) &&
           (end == text.length || !is_word(x, text.clean + end, text.length - end));
}

static struct slice cut(struct slice text, size_t start, size_t end) {
    return (struct slice){text.bytes + start, text.clean + start, end - start};
}

static int run_stage(struct encoding *x, int k, struct slice text);

/* Takes the tokens of added[k] out of the text, and gives the rest to the next set, or the pre-tokenizer. */
static int split_at_added(struct encoding *x, int k, struct slice text) {
    if (k == 2)
        return run_stage(x, 0, text);
    const struct added_set *set = &x->t->added[k];
    size_t done = 0, at = set->count ? 0 : text.length, matched = 0;
    size_t spaces_end = 0; /* of those last looked at: tokens that are spaces may stand among them */
    while (at < text.length) {
        const struct added_token *token = longest_at(set, text.bytes + at, text.length - at, &matched);
        if (!token) {
            at++;
            continue;
        }
        size_t start = at, end = at + matched;
        at = end;
        if (token->single_word && !stands_alone(x, text, start, end))
            continue;
        if (token->lstrip) /* what the token before has not taken */
            start = start_of_spaces_before(text.clean, done, start);
        if (token->rstrip) {
            if (end >= spaces_end)
                spaces_end = end + spaces_after(text.clean + end, text.length - end);
            end = spaces_end;
        }
        if (start > done && split_at_added(x, k + 1, cut(text, done, start)))
            return -1;
        if (push_id(x, token->id))
            return -1;
        done = end;
    }
    return done < text.length ? split_at_added(x, k + 1, cut(text, done, text.length)) : 0;
}

int encode_text(struct encoding *x, struct slice text) {
    return split_at_added(x, 0, text);
}

/* ---- the pre-tokenizer at work ---- */

static int prepend_space(struct encoding *x, int k, struct slice text) {
    if (text.bytes[0] == ' ')
        return run_stage(x, k + 1, text);
    char *copy = malloc(2 * (text.length + 1));
    if (!copy)
        return fail_run(x->e, "out of memory for %zu bytes of text", text.length);
    char *clean = copy + text.length + 1;
    *copy = *clean = ' ';
    memcpy(copy + 1, text.bytes, text.length);
    memcpy(clean + 1, text.clean, text.length);
    int rc = run_stage(x, k + 1, (struct slice){copy, clean, text.length + 1});
    free(copy);
    return rc;
}

/* A step cuts its text into stretches that match and stretches between; the behavior says which of them
 * join the one before. Only that one needs remembering. */
struct cutter {
    struct encoding *x;
    int k;
    struct slice text;
    size_t start, end; /* the stretch not yet passed on */
    bool pending, matches;
};

static bool joins(enum split_behavior behavior, bool previous, bool current) {
    switch (behavior) {
    case SPLIT_CONTIGUOUS:
        return previous == current;
    case SPLIT_WITH_PREVIOUS:
        return current && !previous;
    case SPLIT_WITH_NEXT:
        return previous && !current;
    default:
        return false;
    }
}

static int pass_on(struct cutter *c) {
    const struct stage *stage = &c->x->t->stages[c->k];
    bool removed = stage->behavior == SPLIT_REMOVED && c->matches;
    if (!c->pending || removed || c->start == c->end)
        return 0;
    return run_stage(c->x, c->k + 1, cut(c->text, c->start, c->end));
}

static int add_stretch(struct cutter *c, size_t start, size_t end, bool matches) {
    const struct stage *stage = &c->x->t->stages[c->k];
    matches ^= stage->invert;
    if (c->pending && joins(stage->behavior, c->matches, matches)) {
        c->end = end;
    } else {
        if (pass_on(c))
            return -1;
        c->start = start;
        c->end = end;
    }
    c->pending = true;
    c->matches = matches;
    return 0;
}

/* The next match at or after `from`: 1 found, 0 none, -1 an error. */
static int next_match(struct encoding *x, const struct stage *stage, struct slice text, size_t from,
                      size_t *start, size_t *end) {
    PCRE2_SPTR subject = (PCRE2_SPTR)text.clean;
    int rc = pcre2_match(stage->regex, subject, text.length, from, PCRE2_NO_UTF_CHECK, x->match, x->limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its stack on the heap */
        rc = pcre2_match(stage->regex, subject, text.length, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         x->match, x->limits);
    if (rc == PCRE2_ERROR_NOMATCH)
        return 0;
    const PCRE2_SIZE *offsets = pcre2_get_ovector_pointer(x->match);
    if (rc < 0 || offsets[0] < from || offsets[1] < offsets[0])
        return fail_user(
            x->e,
            "the tokenizer's split pattern cannot cope with this text (PCRE2 error %d); encode it in "
            "smaller parts",
            rc);
    *start = offsets[0];
    *end = offsets[1];
    return 1;
}

static int split_text(struct encoding *x, int k, struct slice text) {
    struct cutter c = {.x = x, .k = k, .text = text};
    size_t from = 0, done = 0, last_end = SIZE_MAX, start = 0, end = 0;
    while (from <= text.length) {
        int found = next_match(x, &x->t->stages[k], text, from, &start, &end);
        if (found < 0)
            return -1;
        if (!found)
            break;
        if (start == end && end == last_end) { /* no empty match right after a match: look one further */
            int used = 1;
            if (from < text.length)
                utf8_next(text.clean + from, text.length - from, &used);
            from += (size_t)used;
            continue;
        }
        if ((done < start && add_stretch(&c, done, start, false)) || add_stretch(&c, start, end, true))
            return -1;
        from = done = last_end = end;
    }
    if (done < text.length && add_stretch(&c, done, text.length, false))
        return -1;
    return pass_on(&c);
}

static int run_stage(struct encoding *x, int k, struct slice text) {
    if (k == x->t->stage_count)
        return encode_piece(x, text.bytes, text.length);
    return x->t->stages[k].regex ? split_text(x, k, text) : prepend_space(x, k, text);
}
