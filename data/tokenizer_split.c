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
static int split_at_added(struct encoding *x, int k, struct slice text);

static bool at_start(const struct encoding *x, struct slice text) {
    return text.bytes == x->start;
}

/* A text that a step has rewritten goes on to `next`, cleaned for regular expressions. */
static int continue_with(struct encoding *x, const struct text *text, bool starts,
                         int (*next)(struct encoding *x, int k, struct slice text), int k) {
    const char *before = x->start;
    char *clean;
    if (text->length == 0)
        return 0;
    if (clean_text(&x->t->named, text->bytes, text->length, &clean))
        return fail_run(x->e, "out of memory for %zu bytes of text", text->length);
    x->start = starts ? text->bytes : NULL;
    int rc = next(x, k, (struct slice){text->bytes, clean ? clean : text->bytes, text->length});
    x->start = before;
    free(clean);
    return rc;
}

/* What is left between the tokens of added[0] is normalized before those of added[1] are looked for. */
static int normalize_rest(struct encoding *x, struct slice text) {
    struct text normal;
    bool moved;
    if (x->t->step_count == 0)
        return split_at_added(x, 1, text);
    if (normalize_text(x->t, text.bytes, text.length, x->place == TEXT_CONTINUES, &normal, &moved, x->e))
        return -1;
    int rc = continue_with(x, &normal, at_start(x, text) && !moved, split_at_added, 1);
    free(normal.bytes);
    return rc;
}

static int encode_rest(struct encoding *x, int k, struct slice text) {
    return k == 0 ? normalize_rest(x, text) : run_stage(x, 0, text);
}

/* Takes the tokens of added[k] out of the text; the rest is normalized, or goes to the pre-tokenizer. */
static int split_at_added(struct encoding *x, int k, struct slice text) {
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
        if ((x->plain && token->special) || (token->single_word && !stands_alone(x, text, start, end)))
            continue;
        if (token->lstrip) /* what the token before has not taken */
            start = start_of_spaces_before(text.clean, done, start);
        if (token->rstrip) {
            if (end >= spaces_end)
                spaces_end = end + spaces_after(text.clean + end, text.length - end);
            end = spaces_end;
        }
        if (start > done && encode_rest(x, k, cut(text, done, start)))
            return -1;
        if (push_id(x, token->id))
            return -1;
        done = end;
    }
    return done < text.length ? encode_rest(x, k, cut(text, done, text.length)) : 0;
}

int encode_text(struct encoding *x, struct slice text) {
    x->start = x->place == TEXT_BEGINS ? text.bytes : NULL;
    return split_at_added(x, 0, text);
}

/* ---- the pre-tokenizer at work ---- */

static int prepend_space(struct encoding *x, int k, struct slice text) {
    if (text.bytes[0] == ' ' || x->place == TEXT_CONTINUES)
        return run_stage(x, k + 1, text);
    char *copy = malloc(2 * (text.length + 1));
    if (!copy)
        return fail_run(x->e, "out of memory for %zu bytes of text", text.length);
    char *clean = copy + text.length + 1;
    *copy = *clean = ' ';
    memcpy(copy + 1, text.bytes, text.length);
    memcpy(clean + 1, text.clean, text.length);
    const char *before = x->start;
    x->start = at_start(x, text) ? copy : NULL;
    int rc = run_stage(x, k + 1, (struct slice){copy, clean, text.length + 1});
    x->start = before;
    free(copy);
    return rc;
}

/* Each piece begins with a replacement, but for the first, which may not. */
static int cut_at_replacements(struct encoding *x, int k, struct slice text) {
    const char *replacement = x->t->stages[k].replacement;
    size_t length = strlen(replacement), start = 0;
    for (size_t i = 1; x->t->stages[k].cuts && i + length <= text.length; i++) {
        if (memcmp(text.bytes + i, replacement, length) != 0)
            continue;
        if (run_stage(x, k + 1, cut(text, start, i)))
            return -1;
        start = i;
        i += length - 1;
    }
    return run_stage(x, k + 1, cut(text, start, text.length));
}

static int write_metaspace(const struct stage *stage, struct slice text, bool prepends, struct text *out) {
    size_t length = strlen(stage->replacement);
    bool starts_with_one = text.bytes[0] == ' ' ||
                           (text.length >= length && memcmp(text.bytes, stage->replacement, length) == 0);
    if (prepends && !starts_with_one && text_append(out, stage->replacement, length))
        return -1;
    for (size_t i = 0, done = 0; i <= text.length; i++) {
        if (i < text.length && text.bytes[i] != ' ')
            continue;
        if (text_append(out, text.bytes + done, i - done) ||
            (i < text.length && text_append(out, stage->replacement, length)))
            return -1;
        done = i + 1;
    }
    return 0;
}

static int run_metaspace(struct encoding *x, int k, struct slice text) {
    const struct stage *stage = &x->t->stages[k];
    bool prepends = stage->prepend == PREPEND_FIRST
                        ? at_start(x, text)
                        : stage->prepend == PREPEND_ALWAYS && x->place != TEXT_CONTINUES;
    struct text out = {0};
    int rc = write_metaspace(stage, text, prepends, &out)
                 ? fail_run(x->e, "out of memory for %zu bytes of text", text.length)
                 : continue_with(x, &out, at_start(x, text), cut_at_replacements, k);
    free(out.bytes);
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

/* The next match at or after `from`; otherwise as regex_next. */
static int regex_match(const pcre2_code *regex, const char *text, size_t length, size_t from,
                       pcre2_match_data *match, pcre2_match_context *limits, const char *what, size_t *start,
                       size_t *end, struct error *e) {
    PCRE2_SPTR subject = (PCRE2_SPTR)text;
    int rc = pcre2_match(regex, subject, length, from, PCRE2_NO_UTF_CHECK, match, limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its stack on the heap */
        rc = pcre2_match(regex, subject, length, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, match, limits);
    if (rc == PCRE2_ERROR_NOMATCH)
        return 0;
    const PCRE2_SIZE *offsets = pcre2_get_ovector_pointer(match);
    if (rc < 0 || offsets[0] < from || offsets[1] < offsets[0])
        return fail_user(
            e, "the tokenizer's %s failed on this text (PCRE2 error %d); encode it in smaller parts", what,
            rc);
    *start = offsets[0];
    *end = offsets[1];
    return 1;
}

int regex_next(const pcre2_code *regex, const char *text, size_t length, size_t last_end,
               pcre2_match_data *match, pcre2_match_context *limits, const char *what, size_t *start,
               size_t *end, struct error *e) {
    size_t from = last_end == SIZE_MAX ? 0 : last_end;
    while (from <= length) {
        int found = regex_match(regex, text, length, from, match, limits, what, start, end, e), used = 1;
        if (found <= 0 || *start < *end || *end != last_end)
            return found;
        if (from < length) /* an empty match directly after a match: look one character further */
            utf8_next(text + from, length - from, &used);
        from += (size_t)used;
    }
    return 0;
}

static int split_text(struct encoding *x, int k, struct slice text) {
    struct cutter c = {.x = x, .k = k, .text = text};
    size_t done = 0, last_end = SIZE_MAX, start = 0, end = 0;
    int found;
    while ((found = regex_next(x->t->stages[k].regex, text.clean, text.length, last_end, x->match, x->limits,
                               "split pattern", &start, &end, x->e)) > 0) {
        if ((done < start && add_stretch(&c, done, start, false)) || add_stretch(&c, start, end, true))
            return -1;
        done = last_end = end;
    }
    if (found < 0 || (done < text.length && add_stretch(&c, done, text.length, false)))
        return -1;
    return pass_on(&c);
}

static int run_stage(struct encoding *x, int k, struct slice text) {
    if (k == x->t->stage_count)
        return encode_piece(x, text.bytes, text.length);
    switch (x->t->stages[k].kind) {
    case STAGE_SPACE:
        return prepend_space(x, k, text);
    case STAGE_METASPACE:
        return run_metaspace(x, k, text);
    default:
        return split_text(x, k, text);
    }
}
