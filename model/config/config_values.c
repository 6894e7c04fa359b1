/* Single values: text to checked value and back, the error messages for them, and the nearest legal name. */
#include "model/config/config_internal.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* Write the reason into `why` and return -1. */
static int explain(char why[MAX_WHY], const char *format, ...) __attribute__((format(printf, 2, 3)));
static int explain(char why[MAX_WHY], const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(why, MAX_WHY, format, args);
    va_end(args);
    return -1;
}

const char *quotable(const char *text, char out[MAX_QUOTE]) {
    size_t n = 0;
    for (; text[n] && n < MAX_QUOTE - 4; n++)
        out[n] = (unsigned char)text[n] < 32 || text[n] == 127 ? '?' : text[n];
    strcpy(out + n, text[n] ? "..." : "");
    return out;
}

/* ---- where a value was given ---- */

int fail_at(const struct draft *d, const struct config_row *row, const char *format, ...) {
    char where[MAX_WHERE], text[900], quote[MAX_QUOTE];
    int origin = row ? d->origin[row - config_rows] : 0;
    if (origin < 0)
        snprintf(where, sizeof where, "override '%s'", quotable(d->overrides[-origin - 1], quote));
    else if (origin > 0 && origin != WITHOUT_LINE)
        snprintf(where, sizeof where, "%s:%d", d->file, origin);
    else
        snprintf(where, sizeof where, "%s", d->file ? d->file : "configuration");
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return fail_user(d->error, "%s: %s", where, text);
}

/* ---- nearest names ---- */

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

static bool same_letter(char a, char b) {
    return !strncasecmp(&a, &b, 1);
}

/* The number of insertions, deletions, replacements and swaps of adjacent letters that turn a into b, ignoring
 * case (optimal string alignment). Both are shorter than MAX_NAME. */
enum { MAX_NAME = 64 };
static size_t edit_distance(const char *a, const char *b) {
    size_t rows[3][MAX_NAME + 1], *before = rows[0], *last = rows[1], *now = rows[2];
    size_t a_length = strlen(a), b_length = strlen(b);
    for (size_t j = 0; j <= b_length; j++)
        last[j] = j;
    for (size_t i = 1; i <= a_length; i++) {
        now[0] = i;
        for (size_t j = 1; j <= b_length; j++) {
            now[j] =
                min_size(last[j - 1] + !same_letter(a[i - 1], b[j - 1]), min_size(last[j], now[j - 1]) + 1);
            if (i > 1 && j > 1 && same_letter(a[i - 1], b[j - 2]) && same_letter(a[i - 2], b[j - 1]))
                now[j] = min_size(now[j], before[j - 2] + 1);
        }
        size_t *oldest = before;
        before = last;
        last = now;
        now = oldest;
    }
    return last[b_length];
}

const char *nearest_name(const char *word, const char *const *names) {
    size_t length = strlen(word);
    if (!length || length >= MAX_NAME)
        return NULL;
    /* Accept about one error in three letters. */
    size_t best_distance = (length + 2) / 3 + 1;
    const char *best = NULL;
    for (; *names; names++) {
        if (strlen(*names) >= MAX_NAME)
            continue;
        size_t distance = edit_distance(word, *names);
        if (distance < best_distance && distance < strlen(*names)) {
            best_distance = distance;
            best = *names;
        }
    }
    return best;
}

void did_you_mean(const char *word, const char *const *names, char out[96]) {
    const char *near = nearest_name(word, names);
    out[0] = 0;
    if (near)
        snprintf(out, 96, "; did you mean '%s'?", near);
}

/* ---- text to value ---- */

void real_text(double x, char text[32]) {
    if (fabs(x) < 1e15 && x == floor(x)) { /* 10000, not 1e+04 */
        snprintf(text, 32, "%.0f", x);
        return;
    }
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, 32, "%.*g", digits, x);
        if (strtod(text, NULL) == x)
            return;
    }
}

/* A bound, for a message; integers in full: 2147483647, not 2.1e9. */
static void bound_text(const struct config_row *row, double x, char text[32]) {
    if (row->kind == KIND_INTEGER)
        snprintf(text, 32, "%lld", (long long)x);
    else
        real_text(x, text);
}

static void range_text(const struct config_row *row, char text[160]) {
    char low[32], high[32];
    bound_text(row, row->min, low);
    bound_text(row, row->max, high);
    snprintf(text, 160, "%s from %s%s to %s%s%s%s", row->kind == KIND_INTEGER ? "a whole number" : "a number",
             low, row->open & EXCLUDES_MIN ? " (excluded)" : "", high,
             row->open & EXCLUDES_MAX ? " (excluded)" : "", row->zero ? ", or " : "",
             row->zero ? row->zero : "");
}

int check_range(const struct config_row *row, double x, char why[MAX_WHY]) {
    bool above = row->open & EXCLUDES_MIN ? x > row->min : x >= row->min;
    bool below = row->open & EXCLUDES_MAX ? x < row->max : x <= row->max;
    if (above && below) /* false for NaN */
        return 0;
    char range[160];
    range_text(row, range);
    return explain(why, "out of range; %s takes %s", row->name, range);
}

static int set_integer(void *target, const struct config_row *row, const char *text, char why[MAX_WHY]) {
    int64_t value = row->zero_value;
    if (!row->zero || strcmp(text, row->zero)) {
        const char *digits = text + (*text == '-');
        if (!*digits || digits[strspn(digits, "0123456789")]) {
            char range[160];
            range_text(row, range);
            return explain(why, "not a whole number; %s takes %s", row->name, range);
        }
        long long parsed = strtoll(text, NULL, 10);
        /* Above 2^63 strtoll returns LLONG_MAX, which every bound excludes. Compared as integers first, since
         * 2^53 + 1 as a double would be 2^53. */
        if (check_range(row, parsed > (long long)row->max ? (double)INFINITY : (double)parsed, why))
            return -1;
        value = parsed;
    }
    memcpy(target, &value, sizeof value);
    return 0;
}

static int set_real(void *target, const struct config_row *row, const char *text, char why[MAX_WHY]) {
    char *end;
    if (row->zero && !strcmp(text, row->zero)) {
        memset(target, 0, sizeof(double));
        return 0;
    }
    double value = strtod(text, &end);
    /* strtod alone would accept leading blanks, hexadecimals, "inf" and "nan". */
    if (end == text || *end || text[strspn(text, "0123456789+-.eE")]) {
        char range[160];
        range_text(row, range);
        return explain(why, "not a number; %s takes %s", row->name, range);
    }
    if (check_range(row, value, why))
        return -1;
    memcpy(target, &value, sizeof value);
    return 0;
}

static int set_bool(void *target, const struct config_row *row, const char *text, char why[MAX_WHY]) {
    bool value = !strcmp(text, "true");
    if (!value && strcmp(text, "false"))
        return explain(why, "not true or false; %s takes only these two values", row->name);
    memcpy(target, &value, sizeof value);
    return 0;
}

/* "a, b or c" */
static void list_names(const char *const *names, char out[160]) {
    size_t used = 0;
    for (int i = 0; names[i] && used < 160; i++)
        used += (size_t)snprintf(out + used, 160 - used, "%s%s",
                                 !i             ? ""
                                 : names[i + 1] ? ", "
                                                : " or ",
                                 names[i]);
}

/* The index of text among the names, or -1 and the reason in `why`. */
static int find_name(const struct config_row *row, const char *const *names, const char *text,
                     char why[MAX_WHY]) {
    for (int i = 0; names[i]; i++)
        if (!strcmp(text, names[i]))
            return i;
    char quote[MAX_QUOTE], hint[96], legal[160];
    did_you_mean(text, names, hint);
    list_names(names, legal);
    return explain(why, "unknown value '%s'%s%s %s takes %s", quotable(text, quote), hint, *hint ? "" : ";",
                   row->name, legal);
}

static bool is_quote(char c) {
    return c == '"' || c == '\'';
}

/* The text within one pair of quotes around it, in `buffer`, or the text itself. */
static const char *without_quotes(const char *text, char *buffer, size_t size) {
    size_t n = strlen(text);
    if (n < 2 || n > size || !is_quote(text[0]) || text[n - 1] != text[0] || memchr(text + 1, text[0], n - 2))
        return text;
    memcpy(buffer, text + 1, n - 2);
    buffer[n - 2] = 0;
    return buffer;
}

/* A directory as a glob(3) pattern that matches it alone. */
static void escape_glob(const char *text, char *out, size_t size) {
    size_t used = 0;
    for (; *text && used + 4 < size; text++) {
        bool special = strchr("*?[", *text) != NULL;
        used += (size_t)snprintf(out + used, size - used,
                                 special         ? "[%c]"
                                 : *text == '\\' ? "\\%c"
                                                 : "%c",
                                 *text);
    }
    out[used] = 0;
}

/* A path whose leading ~ stands for the home directory; is_glob: a pattern, as which the home directory is escaped. */
static int expand_home(const char *text, bool is_glob, char path[MAX_TEXT], char why[MAX_WHY]) {
    const char *home = getenv("HOME");
    char escaped[3 * MAX_TEXT + 4];
    if (text[1] && text[1] != '/')
        return explain(why, "~ is expanded only as ~/...; write the whole path, or ./%.40s", text);
    if (!home || home[0] != '/')
        return explain(why, "~ cannot be expanded, since HOME is not set; write the whole path");
    if (is_glob) {
        escape_glob(home, escaped, sizeof escaped);
        home = escaped;
    }
    if (snprintf(path, MAX_TEXT, "%s%s", home, text + 1) >= MAX_TEXT)
        return explain(why, "too long with %.60s for ~; at most %d bytes", home, MAX_TEXT - 1);
    return 0;
}

/* Every text is a path, a glob or a word such as "none". */
static int set_text(void *target, const struct config_row *row, const char *text, char why[MAX_WHY]) {
    char path[MAX_TEXT];
    if (!*text)
        return explain(why, "empty; give %s a value%s%s", row->name, row->zero ? " or write " : "",
                       row->zero ? row->zero : "");
    if (strlen(text) >= MAX_TEXT)
        return explain(why, "too long; %s takes at most %d bytes", row->name, MAX_TEXT - 1);
    /* Recorded in a checkpoint and read again, such a value would be another one. */
    if (is_quote(text[0]) || is_quote(text[strlen(text) - 1]))
        return explain(why,
                       "a quote is missing, or part of the value; write %s without quotes or in one pair",
                       row->name);
    if (text[0] == '~') {
        bool is_glob = strcmp(row->section, "data") == 0 && strcmp(row->name, "tokenizer") != 0;
        if (expand_home(text, is_glob, path, why) != 0)
            return -1;
        text = path;
    }
    memset(target, 0, MAX_TEXT);
    if (!row->zero || strcmp(text, row->zero))
        memcpy(target, text, strlen(text));
    return 0;
}

/* names separated by blanks, each optionally followed by *N */
static int set_pattern(struct draft *d, const struct config_row *row, const char *text, char why[MAX_WHY]) {
    int count = 0;
    text += strspn(text, " \t");
    if (!*text)
        return explain(why, "empty; %s takes layer types, such as iha_local*4 mha_global", row->name);
    while (*text) {
        char word[MAX_NAME] = "", quote[MAX_QUOTE];
        size_t length = strcspn(text, " \t");
        memcpy(word, text, min_size(length, sizeof word - 1));
        char *star = strchr(word, '*');
        long times = 1;
        if (star) {
            *star++ = 0;
            if (!*star || star[strspn(star, "0123456789")] || strlen(star) > 9 || (times = atol(star)) < 1)
                return explain(why, "'%s' is not a count; write the name alone, or name*N with N >= 1",
                               quotable(star, quote));
        }
        int type = find_name(row, config_layer_type_names, word, why);
        if (type < 0)
            return -1;
        if (times > MAX_LAYERS - count)
            return explain(why, "names more than %d layers", MAX_LAYERS);
        while (times--)
            d->pattern[count++] = (enum layer_type)type;
        text += length;
        text += strspn(text, " \t");
    }
    d->pattern_count = count;
    return 0;
}

int set_value(struct draft *d, const struct config_row *row, const char *text, char why[MAX_WHY]) {
    void *target = row_address(d->config, row);
    char buffer[MAX_TEXT + 2];
    text = without_quotes(text, buffer, sizeof buffer);
    switch (row->kind) {
    case KIND_INTEGER:
        return set_integer(target, row, text, why);
    case KIND_REAL:
        return set_real(target, row, text, why);
    case KIND_BOOL:
        return set_bool(target, row, text, why);
    case KIND_TEXT:
        return set_text(target, row, text, why);
    case KIND_PATTERN:
        return set_pattern(d, row, text, why);
    case KIND_ENUM:
        break;
    }
    int index = find_name(row, row->values, text, why);
    if (index < 0)
        return -1;
    memcpy(target, &(unsigned){(unsigned)index}, sizeof(unsigned));
    return 0;
}

/* ---- value to text ---- */

void value_text(const struct config *c, const struct config_row *row, char text[MAX_TEXT]) {
    const void *source = row_address(c, row);
    int64_t integer;
    double real;
    unsigned index;
    switch (row->kind) {
    case KIND_INTEGER:
        memcpy(&integer, source, sizeof integer);
        if (integer == row->zero_value && row->zero)
            snprintf(text, MAX_TEXT, "%s", row->zero);
        else
            snprintf(text, MAX_TEXT, "%lld", (long long)integer);
        break;
    case KIND_REAL:
        memcpy(&real, source, sizeof real);
        if (!(real > 0) && row->zero)
            snprintf(text, MAX_TEXT, "%s", row->zero);
        else
            real_text(real, text);
        break;
    case KIND_BOOL:
        snprintf(text, MAX_TEXT, "%s", *(const bool *)source ? "true" : "false");
        break;
    case KIND_ENUM:
        memcpy(&index, source, sizeof index);
        snprintf(text, MAX_TEXT, "%s", row->values[index]);
        break;
    case KIND_TEXT:
    case KIND_PATTERN:
        snprintf(text, MAX_TEXT, "%s",
                 *(const char *)source || !row->zero ? (const char *)source : row->zero);
        break;
    }
}

static void pattern_text(const struct model_config *m, char text[PATTERN_TEXT]) {
    size_t used = 0;
    text[0] = 0;
    for (int64_t layer = 0; layer < m->num_hidden_layers; layer++)
        used += (size_t)snprintf(text + used, PATTERN_TEXT - used, "%s%s", layer ? " " : "",
                                 layer_type_name(m->layer_types[layer]));
}

void config_visit(const struct config *c, void (*visit)(void *context, const char *key, const char *value),
                  void *context) {
    for (int i = 0; i < config_row_count; i++) {
        const struct config_row *row = &config_rows[i];
        char key[64], text[PATTERN_TEXT];
        snprintf(key, sizeof key, "%s.%s", row->section, row->name);
        if (row->kind == KIND_PATTERN)
            pattern_text(&c->model, text);
        else
            value_text(c, row, text);
        visit(context, key, text);
    }
}
