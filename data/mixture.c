#include "data/mixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Weights become whole numbers, so that choices are the same on any machine. */
static const double WEIGHT_SCALE = 1 << 30;

static bool is_blank(char c) {
    return c == ' ' || c == '\t';
}

/* The length of a number and the blanks behind it at the start of text, or 0. */
static size_t weight_length(const char *text) {
    size_t sign = *text == '-' || *text == '+', n = sign + strspn(text + sign, "0123456789.eE+-");
    if (!strpbrk(text, "0123456789") || strpbrk(text, "0123456789") >= text + n || !is_blank(text[n]))
        return 0;
    return n + strspn(text + n, " \t");
}

bool mixture_is(const char *text) {
    return weight_length(text) > 0;
}

/* The comma, or the end of the text, that ends the item that begins here. */
static const char *item_end(const char *text) {
    for (; *text; text++)
        if (*text == ',' && (is_blank(text[1]) || weight_length(text + 1)))
            break;
    return text;
}

/* A glob whose leading ~/ stands for the home directory, which is taken literally. */
static int copy_glob(char out[MAX_GLOB], const char *glob, size_t length, struct error *e) {
    const char *home = length > 1 && glob[0] == '~' && glob[1] == '/' ? getenv("HOME") : NULL;
    size_t used = 0, skip = home ? 1 : 0;
    for (; home && *home && used < MAX_GLOB; home++) {
        const char *format = *home == '\\' ? "\\%c" : strchr("*?[", *home) ? "[%c]" : "%c";
        used += (size_t)snprintf(out + used, MAX_GLOB - used, format, *home);
    }
    if (used + length - skip >= MAX_GLOB)
        return fail_user(e, "data.train: a path of more than %d bytes; give a shorter one", MAX_GLOB - 1);
    memcpy(out + used, glob + skip, length - skip);
    out[used + length - skip] = '\0';
    return 0;
}

/* The item [text, end), whose weight goes to *weight. */
static int parse_item(struct mixture *m, const char *text, const char *end, double *weight, struct error *e) {
    while (text < end && is_blank(*text))
        text++;
    while (end > text && is_blank(end[-1]))
        end--;
    int length = (int)(end - text);
    size_t skip = weight_length(text);
    char *number_end;
    *weight = strtod(text, &number_end);
    if (skip == 0 || (int)skip >= length || !is_blank(*number_end))
        return fail_user(
            e,
            "data.train: '%.*s' is not a weight and a glob; a mixture is written as WEIGHT GLOB, "
            "WEIGHT GLOB, ...",
            length < 200 ? length : 200, text);
    if (!isfinite(*weight) || !(*weight > 0))
        return fail_user(e, "data.train: the weight of '%.*s' must be above 0", length < 200 ? length : 200,
                         text);
    if (m->count == MAX_SOURCES)
        return fail_user(e, "data.train: a mixture of more than %d sources; leave some out", MAX_SOURCES);
    return copy_glob(m->globs[m->count++], text + skip, (size_t)length - skip, e);
}

static void set_shares(struct mixture *m, const double *weights) {
    double sum = 0;
    for (int i = 0; i < m->count; i++)
        sum += weights[i] / m->count; /* divided, since weights may be as large as doubles */
    for (int i = 0; i < m->count; i++) {
        m->weights[i] = llround(weights[i] / sum / m->count * WEIGHT_SCALE);
        m->weights[i] = m->weights[i] < 1 ? 1 : m->weights[i];
        m->total_weight += m->weights[i];
    }
}

int mixture_parse(struct mixture *m, const char *text, struct error *e) {
    double weights[MAX_SOURCES + 1] = {1};
    memset(m, 0, sizeof *m);
    if (!mixture_is(text)) {
        m->count = 1;
        snprintf(m->globs[0], MAX_GLOB, "%s", text);
        set_shares(m, weights);
        return 0;
    }
    for (;;) {
        const char *end = item_end(text);
        if (parse_item(m, text, end, &weights[m->count], e) != 0)
            return -1;
        if (!*end)
            break;
        text = end + 1;
    }
    set_shares(m, weights);
    return 0;
}

int mixture_choose(const struct mixture *m, const int64_t *drawn) {
    __int128 largest = 0;
    int64_t next = 1;
    int chosen = 0;
    for (int i = 0; i < m->count; i++)
        next += drawn[i];
    for (int i = 0; i < m->count; i++) {
        __int128 deficit = (__int128)m->weights[i] * next - (__int128)drawn[i] * m->total_weight;
        if (i == 0 || deficit > largest) {
            largest = deficit;
            chosen = i;
        }
    }
    return chosen;
}
