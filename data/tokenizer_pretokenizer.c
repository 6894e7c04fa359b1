/* The pre-tokenizer of a tokenizer.json: steps that cut the text into pieces, which are merged one by one.
 *
 * Where it ends in ByteLevel, a piece goes to the merges as bytes, otherwise as characters. */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

/* GPT-2's pattern, which "ByteLevel" stands for. */
#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* What Rust's regex calls \w, which decides whether an added token stands alone, and what "Whitespace" keeps
 * together: Alphabetic, marks, decimal digits, connectors and joiners. PCRE2's \w is narrower. */
#define WORD_CHARACTERS                                                                                      \
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{200c}\\x{200d}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}"            \
    "\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"

/* ---- stages ---- */

static struct stage *add_stage(struct tokenizer *t) {
    if (t->stage_count == MAX_STAGES) {
        refuse_to_encode(t, "its pre-tokenizer has more than %d steps", MAX_STAGES);
        return NULL;
    }
    struct stage *stage = &t->stages[t->stage_count++];
    *stage = (struct stage){0};
    return stage;
}

/* Takes ownership of `regex`. NULL: the pattern was refused, with this message. */
static int add_regex(struct tokenizer *t, pcre2_code *regex, const char *message,
                     enum split_behavior behavior, bool invert) {
    if (!regex)
        return refuse_to_encode(t, "its split pattern %s", message);
    struct stage *stage = add_stage(t);
    if (!stage)
        pcre2_code_free(regex);
    else
        *stage = (struct stage){.kind = STAGE_SPLIT, .regex = regex, .behavior = behavior, .invert = invert};
    return 0;
}

static int add_pcre2(struct tokenizer *t, const char *pattern, enum split_behavior behavior, bool invert) {
    char message[REGEX_MESSAGE] = "";
    return add_regex(t, regex_compile_pcre2(pattern, message), message, behavior, invert);
}

static int add_literal(struct tokenizer *t, const char *text, enum split_behavior behavior, bool invert) {
    char message[REGEX_MESSAGE] = "";
    return add_regex(t, regex_compile_literal(text, &t->named, message), message, behavior, invert);
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
    t->bpe.byte_level = true;
    struct stage *stage = prefix ? add_stage(t) : NULL;
    if (stage)
        stage->kind = STAGE_SPACE;
    return regex ? add_pcre2(t, GPT2_PATTERN, SPLIT_ISOLATED, false) : 0;
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
    char message[REGEX_MESSAGE] = "";
    if (!cJSON_IsObject(pattern))
        return wrong(path, "Split has no \"pattern\"", e);
    if (json_text(pattern, "Regex", &regex, path, e) || json_text(pattern, "String", &string, path, e) ||
        load_behavior(node, &behavior, path, e) || json_bool(node, "invert", false, &invert, path, e))
        return -1;
    if ((regex == NULL) == (string == NULL))
        return wrong(path, "Split needs a \"Regex\" or a \"String\"", e);
    if (string && !*string)
        return refuse_to_encode(t, "its pre-tokenizer splits at an empty string");
    if (string)
        return add_literal(t, string, behavior, invert);
    return add_regex(t, regex_compile(regex, &t->named, message), message, behavior, invert);
}

static int load_digits(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    bool individual = false;
    if (json_bool(node, "individual_digits", false, &individual, path, e))
        return -1;
    return add_pcre2(t, "\\p{N}", individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS, false);
}

/* One character of the file's, as UTF-8. */
static int load_character(const cJSON *node, const char *name, char out[8], const char *path,
                          struct error *e) {
    const char *text = NULL;
    int used = 0;
    if (json_text(node, name, &text, path, e))
        return -1;
    if (!text || !*text || utf8_next(text, strlen(text), &used) == UINT32_MAX || text[used])
        return fail_user(e, "%s: \"%s\" must be one character; is this a tokenizer.json?", path, name);
    memcpy(out, text, (size_t)used + 1);
    return 0;
}

static int load_delimiter(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    char delimiter[8];
    return load_character(node, "delimiter", delimiter, path, e)
               ? -1
               : add_literal(t, delimiter, SPLIT_REMOVED, false);
}

int prepend_scheme_load(const cJSON *node, enum prepend_scheme *scheme, const char *path, struct error *e) {
    const char *name = NULL;
    bool prefix;
    if (json_text(node, "prepend_scheme", &name, path, e) ||
        json_bool(node, "add_prefix_space", true, &prefix, path, e))
        return -1;
    *scheme = !prefix || (name && strcmp(name, "never") == 0) ? PREPEND_NEVER
              : name && strcmp(name, "first") == 0            ? PREPEND_FIRST
                                                              : PREPEND_ALWAYS;
    if (name && strcmp(name, "always") && strcmp(name, "first") && strcmp(name, "never"))
        return fail_user(e, "%s: Metaspace has no known \"prepend_scheme\"; is this a tokenizer.json?", path);
    return 0;
}

static int load_metaspace(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    struct stage stage = {.kind = STAGE_METASPACE};
    uint32_t code;
    int used;
    if (load_character(node, "replacement", stage.replacement, path, e) ||
        prepend_scheme_load(node, &stage.prepend, path, e) ||
        json_bool(node, "split", true, &stage.cuts, path, e))
        return -1;
    code = utf8_next(stage.replacement, strlen(stage.replacement), &used);
    if (code >= 0x80 && code_ranges_add(&t->named, code, code))
        return fail_run(e, "%s: out of memory", path);
    struct stage *added = add_stage(t);
    if (added)
        *added = stage;
    return 0;
}

static int load_node(struct tokenizer *t, const cJSON *node, const char *path, struct error *e);

static int load_sequence(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    const cJSON *list = json_member(node, "pretokenizers");
    int rc = 0;
    if (!cJSON_IsArray(list))
        return wrong(path, "Sequence has no list of \"pretokenizers\"", e);
    for (const cJSON *item = list->child; item && rc == 0; item = item->next)
        rc = load_node(t, item, path, e);
    return rc;
}

static int load_node(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    const char *type = NULL;
    if (!cJSON_IsObject(node) || json_text(node, "type", &type, path, e) || !type)
        return wrong(path, "steps must be objects with a \"type\"", e);
    if (strcmp(type, "Sequence") == 0) /* its depth is bounded by the parser's */
        return load_sequence(t, node, path, e);
    if (t->bpe.byte_level) /* a later step would see byte characters instead of text */
        return refuse_to_encode(t, "its pre-tokenizer has a step after ByteLevel");
    if (strcmp(type, "ByteLevel") == 0)
        return load_byte_level(t, node, path, e);
    if (strcmp(type, "Split") == 0)
        return load_split(t, node, path, e);
    if (strcmp(type, "Digits") == 0)
        return load_digits(t, node, path, e);
    if (strcmp(type, "Metaspace") == 0)
        return load_metaspace(t, node, path, e);
    if (strcmp(type, "Whitespace") == 0)
        return add_pcre2(t, "[" WORD_CHARACTERS "]+|[^\\s" WORD_CHARACTERS "]+", SPLIT_REMOVED, true);
    if (strcmp(type, "WhitespaceSplit") == 0)
        return add_pcre2(t, "\\s", SPLIT_REMOVED, false);
    if (strcmp(type, "CharDelimiterSplit") == 0)
        return load_delimiter(t, node, path, e);
    return refuse_to_encode(t, "its pre-tokenizer has a step of a type that is not supported, %.40s", type);
}

int pre_tokenizer_load(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    char message[REGEX_MESSAGE];
    if (node && load_node(t, node, path, e))
        return -1;
    t->word = regex_compile_pcre2("[" WORD_CHARACTERS "]", message);
    if (!t->word)
        return fail_run(e, "%s: the pattern of word characters %s", path, message);
    return 0;
}

void pre_tokenizer_free(struct tokenizer *t) {
    for (int i = 0; i < t->stage_count; i++)
        pcre2_code_free(t->stages[i].regex);
    pcre2_code_free(t->word);
    free(t->named.ranges);
}
