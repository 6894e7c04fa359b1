/* The decoder of a tokenizer.json: the text that each token adds to a sequence.
 *
 * The library runs a decoder over a whole sequence; generation writes tokens as they come. So each step is
 * applied to every token once, when the file is read, in two forms: at the start of a sequence and after
 * another token. What still depends on the sequence is small enough to keep while writing: a space that comes
 * only before a next token, and spaces stripped from the front. Other decoders are refused.
 *
 * One difference stays: bytes that are no UTF-8 come out as they are, where the library writes U+FFFD. */
#define _GNU_SOURCE /* memmem */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct decoder_step {
    enum decoder_kind {
        DECODE_JOIN,       /* no decoder at all: a space between tokens */
        DECODE_BYTE_LEVEL, /* the byte alphabet to bytes */
        DECODE_FALLBACK,   /* <0x0A> to a byte */
        DECODE_METASPACE,
        DECODE_SUFFIX, /* BPEDecoder: </w> to a space, but for the last token */
        DECODE_WORDPIECE,
        DECODE_REPLACE,
        DECODE_STRIP,
    } kind;
    char *pattern,
        *content;      /* what is replaced, and by what; the suffix; WordPiece's prefix; what is stripped */
    pcre2_code *regex; /* DECODE_REPLACE: instead of a pattern as it stands */
    bool flag;         /* DECODE_METASPACE: drops those of the first token; DECODE_WORDPIECE: cleans up */
    int start, stop;   /* DECODE_STRIP */
};

struct decoder_steps {
    const char *path;
    struct decoder_step steps[MAX_STEPS];
    int count;
    bool fused, has_bytes, ended; /* while loading: what a further step would see */
    struct code_ranges named;
};

struct loading {
    struct tokenizer *t;
    struct decoder_steps *d;
    struct error *e;
};

/* ---- loading ---- */

static int wrong(const struct loading *l, const char *what) {
    return fail_user(l->e, "%s: the decoder's %s; is this a tokenizer.json?", l->d->path, what);
}

static int refuse(const struct loading *l, const char *what) {
    return fail_user(l->e, "%s: its decoder cannot be applied token by token: %.80s", l->d->path, what);
}

static int out_of_memory(const struct loading *l) {
    return fail_run(l->e, "%s: out of memory", l->d->path);
}

static int add(const struct loading *l, struct decoder_step step, const char *pattern, const char *content) {
    struct decoder_steps *d = l->d;
    if (d->ended)
        return refuse(l, "it has a step after BPEDecoder");
    if (d->count == MAX_STEPS)
        return refuse(l, "it has too many steps");
    struct decoder_step *added = &d->steps[d->count++];
    *added = step;
    if ((pattern && !(added->pattern = strdup(pattern))) || (content && !(added->content = strdup(content))))
        return out_of_memory(l);
    return 0;
}

static int load_text(const struct loading *l, const cJSON *node, const char *name, const char **out) {
    if (json_text(node, name, out, l->d->path, l->e))
        return -1;
    return *out ? 0 : wrong(l, "step lacks a text");
}

/* After Fuse only what looks at single ASCII characters may come: those no two tokens share. */
static int load_replace(const struct loading *l, const cJSON *node) {
    const cJSON *pattern = json_member(node, "pattern");
    const char *regex = NULL, *string = NULL, *content = NULL;
    char message[REGEX_MESSAGE];
    if (!cJSON_IsObject(pattern))
        return wrong(l, "Replace has no \"pattern\"");
    if (json_text(pattern, "Regex", &regex, l->d->path, l->e) ||
        json_text(pattern, "String", &string, l->d->path, l->e) || load_text(l, node, "content", &content))
        return -1;
    if ((regex == NULL) == (string == NULL) || (string && !*string))
        return wrong(l, "Replace needs a \"Regex\" or a \"String\"");
    if (l->d->has_bytes || (l->d->fused && (!string || string[1] || (unsigned char)*string >= 0x80)))
        return refuse(l, "Replace comes after tokens were put together");
    if (add(l, (struct decoder_step){.kind = DECODE_REPLACE}, string, content))
        return -1;
    struct decoder_step *step = &l->d->steps[l->d->count - 1];
    if (regex && !(step->regex = regex_compile(regex, &l->d->named, message)))
        return fail_user(l->e, "%s: the pattern of its decoder %s", l->d->path, message);
    return 0;
}

static int load_count(const struct loading *l, const cJSON *node, const char *name, int *out) {
    const cJSON *item = json_member(node, name);
    *out = cJSON_IsNumber(item) ? item->valueint : -1;
    return *out < 0 || *out > 1000 ? wrong(l, "Strip has no \"start\" and \"stop\"") : 0;
}

static int load_strip(const struct loading *l, const cJSON *node) {
    struct decoder_step step = {.kind = DECODE_STRIP};
    const char *content = NULL;
    int used = 0;
    if (load_text(l, node, "content", &content) || load_count(l, node, "start", &step.start) ||
        load_count(l, node, "stop", &step.stop))
        return -1;
    if (!*content || utf8_next(content, strlen(content), &used) == UINT32_MAX || content[used])
        return wrong(l, "Strip must have one character as its content");
    if (!l->d->fused)
        return l->d->has_bytes ? refuse(l, "Strip comes after ByteFallback and not after Fuse")
                               : add(l, step, content, NULL);
    if (step.stop > 0 || l->t->decoder.strip_count)
        return refuse(l, "Strip takes from the end");
    memcpy(l->t->decoder.strip, content, strlen(content) + 1);
    l->t->decoder.strip_count = step.start;
    return 0;
}

static int load_metaspace(const struct loading *l, const cJSON *node) {
    const char *replacement = NULL;
    enum prepend_scheme scheme;
    if (prepend_scheme_load(node, &scheme, l->d->path, l->e))
        return -1;
    if (json_text(node, "replacement", &replacement, l->d->path, l->e))
        return -1;
    if (l->d->fused || l->d->has_bytes)
        return refuse(l, "Metaspace comes after tokens were put together");
    return add(l, (struct decoder_step){.kind = DECODE_METASPACE, .flag = scheme != PREPEND_NEVER},
               replacement && *replacement ? replacement : "\xe2\x96\x81", " ");
}

static int load_suffix(const struct loading *l, const cJSON *node) {
    const char *suffix = NULL;
    if (json_text(node, "suffix", &suffix, l->d->path, l->e))
        return -1;
    if (!suffix || !*suffix)
        return wrong(l, "BPEDecoder has no \"suffix\"");
    if (l->d->fused || l->d->has_bytes)
        return refuse(l, "BPEDecoder comes after tokens were put together");
    return add(l, (struct decoder_step){.kind = DECODE_SUFFIX}, suffix, NULL);
}

static int load_wordpiece(const struct loading *l, const cJSON *node) {
    const char *prefix = NULL;
    struct decoder_step step = {.kind = DECODE_WORDPIECE};
    if (json_text(node, "prefix", &prefix, l->d->path, l->e) ||
        json_bool(node, "cleanup", true, &step.flag, l->d->path, l->e))
        return -1;
    if (l->d->fused || l->d->has_bytes)
        return refuse(l, "WordPiece comes after tokens were put together");
    return add(l, step, prefix ? prefix : "##", NULL);
}

static int load_node(const struct loading *l, const cJSON *node);

static int load_sequence(const struct loading *l, const cJSON *node) {
    const cJSON *list = json_member(node, "decoders");
    int rc = 0;
    if (!cJSON_IsArray(list))
        return wrong(l, "Sequence has no list of \"decoders\"");
    for (const cJSON *item = list->child; item && rc == 0; item = item->next)
        rc = load_node(l, item);
    return rc;
}

static int load_node(const struct loading *l, const cJSON *node) {
    struct decoder_steps *d = l->d;
    const char *type = NULL;
    int rc;
    if (!cJSON_IsObject(node) || json_text(node, "type", &type, d->path, l->e) || !type)
        return wrong(l, "steps must be objects with a \"type\"");
    if (strcmp(type, "Sequence") == 0) /* its depth is bounded by the parser's */
        return load_sequence(l, node);
    if (strcmp(type, "Fuse") == 0) {
        d->fused = true;
        return 0;
    }
    if (strcmp(type, "Replace") == 0)
        return load_replace(l, node);
    if (strcmp(type, "Strip") == 0)
        return load_strip(l, node);
    if (strcmp(type, "Metaspace") == 0)
        return load_metaspace(l, node);
    if (strcmp(type, "WordPiece") == 0)
        return load_wordpiece(l, node);
    if (strcmp(type, "BPEDecoder") == 0) {
        rc = load_suffix(l, node);
        d->ended = true;
        return rc;
    }
    if (strcmp(type, "ByteLevel") != 0 && strcmp(type, "ByteFallback") != 0)
        return refuse(l, type);
    if (d->fused)
        return refuse(l, "bytes come after tokens were put together");
    bool byte_level = strcmp(type, "ByteLevel") == 0;
    rc = add(l, (struct decoder_step){.kind = byte_level ? DECODE_BYTE_LEVEL : DECODE_FALLBACK}, NULL, NULL);
    d->has_bytes = true;
    d->fused |= byte_level;
    return rc;
}

struct decoder_steps *token_decoder_load(struct tokenizer *t, const cJSON *node, const char *path,
                                         struct error *e) {
    struct decoder_steps *d = calloc(1, sizeof *d);
    struct loading l = {t, d, e};
    if (!d) {
        fail_run(e, "%s: out of memory", path);
        return NULL;
    }
    d->path = path;
    if ((node ? load_node(&l, node) : add(&l, (struct decoder_step){.kind = DECODE_JOIN}, NULL, NULL)) == 0)
        return d;
    token_decoder_free(d);
    return NULL;
}

void token_decoder_free(struct decoder_steps *d) {
    if (!d)
        return;
    for (int i = 0; i < d->count; i++) {
        pcre2_code_free(d->steps[i].regex);
        free(d->steps[i].pattern);
        free(d->steps[i].content);
    }
    free(d->named.ranges);
    free(d);
}

bool token_decoder_knows_begin(const struct decoder_steps *d) {
    for (int i = 0; i < d->count; i++) {
        enum decoder_kind kind = d->steps[i].kind;
        if (kind == DECODE_JOIN || kind == DECODE_WORDPIECE || (kind == DECODE_METASPACE && d->steps[i].flag))
            return true;
    }
    return false;
}

/* ---- one token ---- */

enum { ERROR_SET = -2 }; /* what a step returns that has said why it failed; without memory it is -1 */

static int replace_all(struct text *out, const struct text *in, const char *pattern, const char *content) {
    size_t done = 0, length = strlen(pattern);
    const char *found;
    while ((found = memmem(in->bytes + done, in->length - done, pattern, length))) {
        size_t at = (size_t)(found - in->bytes);
        if (text_append(out, in->bytes + done, at - done) || text_append(out, content, strlen(content)))
            return -1;
        done = at + length;
    }
    return text_append(out, in->bytes + done, in->length - done);
}

static int hex_digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

static int run_fallback(struct text *out, const struct text *in) {
    const char *text = in->bytes;
    if (in->length != 6 || memcmp(text, "<0x", 3) != 0 || hex_digit(text[3]) < 0 || hex_digit(text[4]) < 0 ||
        text[5] != '>')
        return text_append(out, text, in->length);
    char byte = (char)(hex_digit(text[3]) << 4 | hex_digit(text[4]));
    return text_append(out, &byte, 1);
}

static int run_byte_level(struct text *out, const struct text *in) {
    char *bytes = malloc(in->length + 1);
    if (!bytes)
        return -1;
    int64_t n = bytes_of_token(in->bytes, in->length, bytes);
    int rc = n >= 0 ? text_append(out, bytes, (size_t)n) : text_append(out, in->bytes, in->length);
    free(bytes);
    return rc;
}

/* What English puts without a space, one after the other. */
static int clean_up(struct text *out) {
    static const char *const rules[][2] = {
        {" .", "."},   {" ?", "?"},           {" !", "!"},   {" ,", ","},     {" ' ", "'"},   {" n't", "n't"},
        {" 'm", "'m"}, {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        struct text next = {0};
        int rc = replace_all(&next, out, rules[i][0], rules[i][1]);
        free(out->bytes);
        *out = next;
        if (rc)
            return -1;
    }
    return 0;
}

static int run_wordpiece(const struct decoder_step *step, struct text *out, const struct text *in,
                         bool begins) {
    size_t prefix = strlen(step->pattern);
    bool continues = in->length >= prefix && memcmp(in->bytes, step->pattern, prefix) == 0;
    int rc = begins      ? text_append(out, in->bytes, in->length)
             : continues ? text_append(out, in->bytes + prefix, in->length - prefix)
                         : text_append(out, " ", 1) || text_append(out, in->bytes, in->length);
    return rc || (step->flag && clean_up(out));
}

static int run_strip(const struct decoder_step *step, struct text *out, const struct text *in) {
    size_t n = strlen(step->pattern), start = 0, end = in->length;
    for (int i = 0; i < step->start && end - start >= n && memcmp(in->bytes + start, step->pattern, n) == 0;
         i++)
        start += n;
    for (int i = 0; i < step->stop && end - start >= n && memcmp(in->bytes + end - n, step->pattern, n) == 0;
         i++)
        end -= n;
    return text_append(out, in->bytes + start, end - start);
}

static int replace_matches(const struct decoder_steps *d, const struct decoder_step *step, struct text *out,
                           const struct text *in, struct error *e) {
    struct tokenizer with_step = {.step_count = 1, .named = d->named};
    struct text replaced;
    bool moved;
    with_step.steps[0] =
        (struct normal_step){.kind = NORMAL_REPLACE, .regex = step->regex, .content = step->content};
    if (normalize_text(&with_step, in->bytes, in->length, false, &replaced, &moved, e))
        return ERROR_SET;
    int rc = text_append(out, replaced.bytes, replaced.length);
    free(replaced.bytes);
    return rc;
}

/* BPEDecoder replaces its suffix wherever it stands; here it may stand at the end alone. */
static int run_suffix(const struct decoder_steps *d, const struct decoder_step *step, struct text *out,
                      const struct text *in, bool *space_after, struct error *e) {
    size_t length = strlen(step->pattern);
    const char *found = memmem(in->bytes, in->length, step->pattern, length);
    *space_after = found != NULL;
    if (found && (size_t)(found - in->bytes) + length != in->length)
        return fail_user(e, "%s: its decoder cannot be applied token by token: a token has %.20s inside",
                         d->path, step->pattern)
                   ? ERROR_SET
                   : 0;
    return text_append(out, in->bytes, in->length - (found ? length : 0));
}

static int run_step(const struct decoder_steps *d, const struct decoder_step *step, struct text *out,
                    const struct text *in, bool begins, bool *space_after, struct error *e) {
    switch (step->kind) {
    case DECODE_JOIN:
        return (!begins && text_append(out, " ", 1)) || text_append(out, in->bytes, in->length);
    case DECODE_BYTE_LEVEL:
        return run_byte_level(out, in);
    case DECODE_FALLBACK:
        return run_fallback(out, in);
    case DECODE_METASPACE:
        return replace_all(out, in, step->pattern, begins && step->flag ? "" : " ");
    case DECODE_SUFFIX:
        return run_suffix(d, step, out, in, space_after, e);
    case DECODE_WORDPIECE:
        return run_wordpiece(step, out, in, begins);
    case DECODE_STRIP:
        return run_strip(step, out, in);
    default:
        return step->regex ? replace_matches(d, step, out, in, e)
                           : replace_all(out, in, step->pattern, step->content);
    }
}

int token_decoder_text(const struct decoder_steps *d, const char *token, bool begins, struct text *out,
                       bool *space_after, struct error *e) {
    struct text in = {0};
    int rc = text_append(&in, token, strlen(token));
    *space_after = false;
    for (int i = 0; i < d->count && rc == 0; i++) {
        struct text next = {0};
        rc = text_append(&next, "", 0);
        if (rc == 0)
            rc = run_step(d, &d->steps[i], &next, &in, begins, space_after, e);
        free(in.bytes);
        in = next;
    }
    if (rc == 0)
        rc = text_append(out, in.bytes, in.length);
    free(in.bytes);
    if (rc && rc != ERROR_SET)
        return fail_run(e, "%s: out of memory", d->path);
    return rc ? -1 : 0;
}
