/* The pre-tokenizer of a tokenizer.json: a list of steps, each a regular expression or a space put in front.
 *
 * The tokenizers library runs its expressions on Oniguruma in Ruby's syntax, this file on PCRE2 with Unicode
 * properties. The two agree on everything that published byte-level tokenizers use; a pattern with something
 * on which they may not (find_foreign) is refused rather than read differently. Their one difference in \s,
 * U+180E, is taken out of the text that the expressions see (clean_text in tokenizer.c). What remains are
 * characters newer than the installed PCRE2's Unicode (14 in 10.42), which count as no letters here. */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <string.h>

/* GPT-2's pattern, which "ByteLevel" stands for. */
#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* What Rust's regex calls \w, which decides whether an added token stands alone: Alphabetic, marks, decimal
 * digits, connectors and joiners. PCRE2's \w is narrower. */
#define WORD_PATTERN                                                                                         \
    "[\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{200c}\\x{200d}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}"           \
    "\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}]"

/* ---- where Oniguruma and PCRE2 part ---- */

/* The end of an escape that both read alike (p stands on its backslash), or NULL. */
static const char *end_of_escape(const char *p) {
    char c = p[1];
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (c == 0 || (letter && !strchr("dDsSpPnrtfxAz", c)))
        return NULL;
    if ((c == 'p' || c == 'P' || c == 'x') && p[2] == '{')
        return strchr(p, '}') ? strchr(p, '}') + 1 : NULL;
    return p + 2;
}

/* The end of a character class (p stands on its bracket), or NULL: Ruby nests classes and intersects them. */
static const char *end_of_class(const char *p) {
    p += p[1] == '^' ? 2 : 1;
    for (bool first = true; *p; first = false) {
        if (*p == ']' && !first)
            return p + 1;
        if (*p == '[' || (p[0] == '&' && p[1] == '&') || (*p == ']' && first))
            return NULL;
        p = *p == '\\' ? end_of_escape(p) : p + 1;
        if (!p)
            return NULL;
    }
    return NULL;
}

/* Ruby has neither {n,m}+ nor a lazy {n}?, and reads {,m} as PCRE2 does not. */
static const char *end_of_count(const char *p) {
    const char *end = p + 1 + strspn(p + 1, "0123456789,");
    if (p[1] == ',' || end == p + 1 || *end != '}')
        return NULL;
    bool fixed = !memchr(p, ',', (size_t)(end - p));
    return end[1] == '+' || (fixed && end[1] == '?') ? NULL : end + 1;
}

/* Groups and lookarounds are alike, options are not: Ruby's m is Perl's s, and its (?i) ends elsewhere. */
static const char *end_of_group_start(const char *pattern, const char *p) {
    if (p[1] != '?')
        return p[1] == '*' ? NULL : p + 1;
    if (strncmp(p, "(?i:", 4) == 0 || (p == pattern && strncmp(p, "(?i)", 4) == 0))
        return p + 4;
    if (strncmp(p, "(?<=", 4) == 0 || strncmp(p, "(?<!", 4) == 0)
        return p + 4;
    return p[2] && strchr(":=!>", p[2]) ? p + 3 : NULL;
}

/* The first place of a pattern that the two may read differently, or NULL. */
static const char *find_foreign(const char *pattern) {
    for (const char *p = pattern, *end; *p; p = end) {
        switch (*p) {
        case '\\':
            end = end_of_escape(p);
            break;
        case '[':
            end = end_of_class(p);
            break;
        case '{':
            end = end_of_count(p);
            break;
        case '(':
            end = end_of_group_start(pattern, p);
            break;
        default:
            end = p + 1;
        }
        if (!end)
            return p;
    }
    return NULL;
}

/* ---- stages ---- */

/* As Ruby has it, ^ and $ match at every line. */
static pcre2_code *compile(const char *pattern, bool literal, char message[160]) {
    uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE);
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    int code = 0;
    PCRE2_SIZE offset = 0;
    if (!context) {
        strcpy(message, "out of memory");
        return NULL;
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_code *regex =
        pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, options, &code, &offset, context);
    pcre2_compile_context_free(context);
    if (!regex)
        pcre2_get_error_message(code, (PCRE2_UCHAR *)message, 160);
    else
        pcre2_jit_compile(regex, PCRE2_JIT_COMPLETE); /* without it, slower and the same */
    return regex;
}

static struct stage *add_stage(struct tokenizer *t) {
    if (t->stage_count == MAX_STAGES) {
        refuse_to_encode(t, "its pre-tokenizer has more than %d steps", MAX_STAGES);
        return NULL;
    }
    struct stage *stage = &t->stages[t->stage_count++];
    *stage = (struct stage){0};
    return stage;
}

static int add_split(struct tokenizer *t, const char *pattern, bool literal, enum split_behavior behavior,
                     bool invert) {
    char message[160];
    const char *foreign = literal ? NULL : find_foreign(pattern);
    if (foreign)
        return refuse_to_encode(t, "byte %d of its split pattern starts something not supported here",
                                (int)(foreign - pattern));
    pcre2_code *regex = compile(pattern, literal, message);
    if (!regex)
        return refuse_to_encode(t, "its split pattern does not compile: %s", message);
    struct stage *stage = add_stage(t);
    if (!stage)
        pcre2_code_free(regex);
    else
        *stage = (struct stage){regex, behavior, invert};
    return 0;
}

/* ---- the file ---- */

static int wrong(const char *path, const char *what, struct error *e) {
    return fail_user(e, "%s: the pre_tokenizer's %s; is this a tokenizer.json?", path, what);
}

static int load_byte_level(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    bool prefix = true, regex = true;
    if (json_bool(node, "add_prefix_space", true, &prefix, path, e) ||
        json_bool(node, "use_regex", true, &regex, path, e))
        return -1;
    if (prefix)
        add_stage(t);
    return regex ? add_split(t, GPT2_PATTERN, false, SPLIT_ISOLATED, false) : 0;
}

static int load_behavior(const cJSON *node, enum split_behavior *out, const char *path, struct error *e) {
    static const char *const names[] = {[SPLIT_ISOLATED] = "Isolated",
                                        [SPLIT_REMOVED] = "Removed",
                                        [SPLIT_CONTIGUOUS] = "Contiguous",
                                        [SPLIT_WITH_PREVIOUS] = "MergedWithPrevious",
                                        [SPLIT_WITH_NEXT] = "MergedWithNext"};
    const char *name;
    if (json_text(node, "behavior", &name, path, e))
        return -1;
    for (int i = 0; name && i < 5; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (enum split_behavior)i;
            return 0;
        }
    }
    return wrong(path, "Split has no known \"behavior\"", e);
}

static int load_split(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    const cJSON *pattern = json_member(node, "pattern");
    const char *regex = NULL, *string = NULL;
    enum split_behavior behavior = SPLIT_ISOLATED;
    bool invert = false;
    if (!cJSON_IsObject(pattern))
        return wrong(path, "Split has no \"pattern\"", e);
    if (json_text(pattern, "Regex", &regex, path, e) || json_text(pattern, "String", &string, path, e) ||
        load_behavior(node, &behavior, path, e) || json_bool(node, "invert", false, &invert, path, e))
        return -1;
    if ((regex == NULL) == (string == NULL))
        return wrong(path, "Split needs a \"Regex\" or a \"String\"", e);
    if (string && !*string)
        return refuse_to_encode(t, "its pre-tokenizer splits at an empty string");
    return add_split(t, regex ? regex : string, string != NULL, behavior, invert);
}

static int load_digits(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    bool individual = false;
    if (json_bool(node, "individual_digits", false, &individual, path, e))
        return -1;
    return add_split(t, "\\p{N}", false, individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS, false);
}

static int load_node(struct tokenizer *t, const cJSON *node, bool *byte_level, const char *path,
                     struct error *e);

static int load_sequence(struct tokenizer *t, const cJSON *node, bool *byte_level, const char *path,
                         struct error *e) {
    const cJSON *list = json_member(node, "pretokenizers");
    int rc = 0;
    if (!cJSON_IsArray(list))
        return wrong(path, "Sequence has no list of \"pretokenizers\"", e);
    for (const cJSON *item = list->child; item && rc == 0; item = item->next)
        rc = load_node(t, item, byte_level, path, e);
    return rc;
}

static int load_node(struct tokenizer *t, const cJSON *node, bool *byte_level, const char *path,
                     struct error *e) {
    const char *type = NULL;
    if (!cJSON_IsObject(node) || json_text(node, "type", &type, path, e) || !type)
        return wrong(path, "steps must be objects with a \"type\"", e);
    if (strcmp(type, "Sequence") == 0) /* its depth is bounded by the parser's */
        return load_sequence(t, node, byte_level, path, e);
    if (*byte_level) /* a later step would see byte characters instead of text */
        return refuse_to_encode(t, "its pre-tokenizer goes on after ByteLevel");
    if (strcmp(type, "ByteLevel") == 0) {
        *byte_level = true;
        return load_byte_level(t, node, path, e);
    }
    if (strcmp(type, "Split") == 0)
        return load_split(t, node, path, e);
    if (strcmp(type, "Digits") == 0)
        return load_digits(t, node, path, e);
    return refuse_to_encode(t, "its pre-tokenizer has a step of a type that is not supported, %.40s", type);
}

int pre_tokenizer_load(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    char message[160];
    bool byte_level = false;
    if (node && load_node(t, node, &byte_level, path, e))
        return -1;
    if (!byte_level)
        refuse_to_encode(t, "it is not byte-level: its pre-tokenizer has no ByteLevel step");
    t->word = compile(WORD_PATTERN, false, message);
    if (!t->word)
        return fail_run(e, "%s: the pattern of word characters does not compile: %s", path, message);
    return 0;
}

void pre_tokenizer_free(struct tokenizer *t) {
    for (int i = 0; i < t->stage_count; i++)
        pcre2_code_free(t->stages[i].regex);
    pcre2_code_free(t->word);
}
