/* The normalizer of a tokenizer.json: steps that rewrite the text, one after the other, before it is cut.
 *
 * Unicode's normal forms, lower case, text put in front, text replaced, spaces stripped from the ends. Bytes
 * that are no UTF-8 pass through. */
#define _GNU_SOURCE /* memmem */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

/* ---- loading ---- */

static int wrong(const char *path, const char *what, struct error *e) {
    return fail_user(e, "%s: the normalizer's %s; is this a tokenizer.json?", path, what);
}

static struct normal_step *add_step(struct tokenizer *t, enum normal_kind kind) {
    if (t->step_count == MAX_STEPS) {
        refuse_to_encode(t, "its normalizer has more than %d steps", MAX_STEPS);
        return NULL;
    }
    struct normal_step *step = &t->steps[t->step_count++];
    *step = (struct normal_step){.kind = kind};
    return step;
}

static int copy_text(char **copy, const char *text, const char *path, struct error *e) {
    *copy = strdup(text);
    return *copy ? 0 : fail_run(e, "%s: out of memory", path);
}

static int load_prepend(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    const char *text = NULL;
    if (json_text(node, "prepend", &text, path, e))
        return -1;
    if (!text)
        return wrong(path, "Prepend has no \"prepend\"", e);
    struct normal_step *step = add_step(t, NORMAL_PREPEND);
    return step ? copy_text(&step->content, text, path, e) : 0;
}

static int load_replace(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    const cJSON *pattern = json_member(node, "pattern");
    const char *regex = NULL, *string = NULL, *content = NULL;
    char message[REGEX_MESSAGE];
    if (!cJSON_IsObject(pattern))
        return wrong(path, "Replace has no \"pattern\"", e);
    if (json_text(pattern, "Regex", &regex, path, e) || json_text(pattern, "String", &string, path, e) ||
        json_text(node, "content", &content, path, e))
        return -1;
    if ((regex == NULL) == (string == NULL) || !content)
        return wrong(path, "Replace needs a \"Regex\" or a \"String\", and \"content\"", e);
    if (string && !*string)
        return refuse_to_encode(t, "its normalizer replaces an empty string");
    struct normal_step *step = add_step(t, NORMAL_REPLACE);
    if (!step)
        return 0;
    if (regex && !(step->regex = regex_compile(regex, &t->named, message)))
        refuse_to_encode(t, "its normalizer's pattern %s", message);
    if (string && copy_text(&step->pattern, string, path, e))
        return -1;
    return copy_text(&step->content, content, path, e);
}

static int load_strip(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    bool left, right;
    if (json_bool(node, "strip_left", true, &left, path, e) ||
        json_bool(node, "strip_right", true, &right, path, e))
        return -1;
    struct normal_step *step = add_step(t, NORMAL_STRIP);
    if (step) {
        step->left = left;
        step->right = right;
    }
    return 0;
}

static int load_node(struct tokenizer *t, const cJSON *node, const char *path, struct error *e);

static int load_sequence(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    const cJSON *list = json_member(node, "normalizers");
    int rc = 0;
    if (!cJSON_IsArray(list))
        return wrong(path, "Sequence has no list of \"normalizers\"", e);
    for (const cJSON *item = list->child; item && rc == 0; item = item->next)
        rc = load_node(t, item, path, e);
    return rc;
}

static int load_node(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    static const char *const forms[] = {
        [FORM_NFC] = "NFC", [FORM_NFD] = "NFD", [FORM_NFKC] = "NFKC", [FORM_NFKD] = "NFKD"};
    const char *type = NULL;
    if (!cJSON_IsObject(node) || json_text(node, "type", &type, path, e) || !type)
        return wrong(path, "steps must be objects with a \"type\"", e);
    for (int i = 0; i < 4; i++) {
        if (strcmp(type, forms[i]) == 0) {
            struct normal_step *step = add_step(t, NORMAL_FORM);
            if (step)
                step->form = (enum normal_form)i;
            return 0;
        }
    }
    if (strcmp(type, "Lowercase") == 0) {
        add_step(t, NORMAL_LOWER);
        return 0;
    }
    if (strcmp(type, "Sequence") == 0) /* its depth is bounded by the parser's */
        return load_sequence(t, node, path, e);
    if (strcmp(type, "Prepend") == 0)
        return load_prepend(t, node, path, e);
    if (strcmp(type, "Replace") == 0)
        return load_replace(t, node, path, e);
    if (strcmp(type, "Strip") == 0)
        return load_strip(t, node, path, e);
    return refuse_to_encode(t, "its normalizer has a step of a type that is not supported, %.40s", type);
}

int normalizer_load(struct tokenizer *t, const cJSON *node, const char *path, struct error *e) {
    return node ? load_node(t, node, path, e) : 0;
}

void normalizer_free(struct tokenizer *t) {
    for (int i = 0; i < t->step_count; i++) {
        pcre2_code_free(t->steps[i].regex);
        free(t->steps[i].pattern);
        free(t->steps[i].content);
    }
}

/* ---- replacing ---- */

static int replace_string(const struct normal_step *step, const struct text *in, struct text *out,
                          bool *moved) {
    size_t done = 0, length = strlen(step->pattern), content = strlen(step->content);
    const char *found;
    while ((found = memmem(in->bytes + done, in->length - done, step->pattern, length))) {
        size_t at = (size_t)(found - in->bytes);
        *moved |= at == 0 && content == 0;
        if (text_append(out, in->bytes + done, at - done) || text_append(out, step->content, content))
            return -1;
        done = at + length;
    }
    return text_append(out, in->bytes + done, in->length - done);
}

struct matching {
    pcre2_match_data *match;
    pcre2_match_context *limits;
    char *clean;
};

static int replace_matches(const struct normal_step *step, const struct matching *m, const struct text *in,
                           struct text *out, bool *moved, struct error *e) {
    const char *subject = m->clean ? m->clean : in->bytes;
    size_t done = 0, last_end = SIZE_MAX, start = 0, end = 0, content = strlen(step->content);
    int found;
    while ((found = regex_next(step->regex, subject, in->length, last_end, m->match, m->limits,
                               "normalizer's pattern", &start, &end, e)) > 0) {
        *moved |= start == 0 && end > 0 && content == 0;
        if (text_append(out, in->bytes + done, start - done) || text_append(out, step->content, content))
            return fail_run(e, "out of memory for %zu bytes of text", in->length);
        done = last_end = end;
    }
    if (found < 0)
        return -1;
    return text_append(out, in->bytes + done, in->length - done)
               ? fail_run(e, "out of memory for %zu bytes of text", in->length)
               : 0;
}

static int replace_regex(const struct tokenizer *t, const struct normal_step *step, const struct text *in,
                         struct text *out, bool *moved, struct error *e) {
    struct matching m = {pcre2_match_data_create(1, NULL), pcre2_match_context_create(NULL), NULL};
    int rc;
    if (!m.match || !m.limits || clean_text(&t->named, in->bytes, in->length, &m.clean)) {
        rc = fail_run(e, "out of memory for matching");
    } else {
        pcre2_set_heap_limit(m.limits, HEAP_LIMIT_KIB);
        rc = replace_matches(step, &m, in, out, moved, e);
    }
    free(m.clean);
    pcre2_match_data_free(m.match);
    pcre2_match_context_free(m.limits);
    return rc;
}

/* ---- one step after the other ---- */

static int strip(const struct normal_step *step, const struct text *in, bool continues, struct text *out,
                 bool *moved) {
    size_t start = step->left && !continues ? spaces_after(in->bytes, in->length) : 0;
    size_t end = step->right ? start_of_spaces_before(in->bytes, start, in->length) : in->length;
    *moved |= start > 0;
    return text_append(out, in->bytes + start, end - start);
}

static int run_step(const struct tokenizer *t, const struct normal_step *step, const struct text *in,
                    bool continues, struct text *out, bool *moved, struct error *e) {
    int rc = 0;
    switch (step->kind) {
    case NORMAL_FORM:
        rc = append_form(out, in->bytes, in->length, step->form);
        break;
    case NORMAL_LOWER:
        rc = append_lower(out, in->bytes, in->length);
        break;
    case NORMAL_PREPEND:
        rc = (in->length && !continues && text_append(out, step->content, strlen(step->content))) ||
             text_append(out, in->bytes, in->length);
        break;
    case NORMAL_REPLACE:
        if (step->regex)
            return replace_regex(t, step, in, out, moved, e);
        rc = replace_string(step, in, out, moved);
        break;
    case NORMAL_STRIP:
        rc = strip(step, in, continues, out, moved);
        break;
    }
    return rc ? fail_run(e, "out of memory for %zu bytes of text", in->length) : 0;
}

int normalize_text(const struct tokenizer *t, const char *bytes, size_t length, bool continues,
                   struct text *out, bool *moved, struct error *e) {
    struct text in = {.bytes = (char *)bytes, .length = length};
    *moved = false;
    *out = (struct text){0};
    for (int i = 0; i < t->step_count; i++) {
        *out = (struct text){0};
        int rc = text_append(out, "", 0) ? fail_run(e, "out of memory for %zu bytes of text", in.length)
                                         : run_step(t, &t->steps[i], &in, continues, out, moved, e);
        if (i > 0)
            free(in.bytes);
        if (rc) {
            free(out->bytes);
            *out = (struct text){0};
            return -1;
        }
        in = *out;
    }
    return 0;
}
