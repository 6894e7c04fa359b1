/* Unicode as the tokenizers library knows it, whatever versions of PCRE2 and utf8proc are installed: UTF-8,
 * categories, normal forms, lower case.
 *
 * The library carries its own tables: Unicode 16 in its regular expressions, 9 in its normal forms, the
 * newest for lower case. The differences stand in tokenizer_unicode_tables.def. */
#include "data/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

struct range {
    uint32_t first, last;
};
struct substitute {
    uint32_t first, last, code;
};
struct lower_range {
    uint32_t first, last;
    int32_t distance;
};

#include "data/tokenizer_unicode_tables.def"

#define COUNT(table) (sizeof(table) / sizeof *(table))

/* ---- UTF-8 ---- */

uint32_t utf8_next(const char *bytes, size_t length, int *used) {
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char c = (unsigned char)bytes[0];
    int size = c < 0x80 ? 1 : c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
    uint32_t code = size == 1 ? c : size ? c & (0x7fu >> size) : 0;
    *used = 1;
    if (size == 0 || (size_t)size > length)
        return UINT32_MAX;
    for (int i = 1; i < size; i++) {
        if (((unsigned char)bytes[i] & 0xc0) != 0x80)
            return UINT32_MAX;
        code = code << 6 | ((unsigned char)bytes[i] & 0x3f);
    }
    if (code < smallest[size] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        return UINT32_MAX;
    *used = size;
    return code;
}

int utf8_put(uint32_t code, char out[4]) {
    return (int)utf8proc_encode_char((utf8proc_int32_t)code, (utf8proc_uint8_t *)out);
}

bool is_utf8(const char *text, size_t length) {
    int used;
    for (size_t i = 0; i < length; i += (size_t)used)
        if (utf8_next(text + i, length - i, &used) == UINT32_MAX)
            return false;
    return true;
}

/* Unicode's White_Space. */
bool is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000;
}

size_t spaces_after(const char *text, size_t length) {
    size_t i = 0;
    int used;
    while (i < length && is_space(utf8_next(text + i, length - i, &used)))
        i += (size_t)used;
    return i;
}

/* Where the code point before `end` starts. */
size_t step_back(const char *text, size_t end) {
    size_t i = end - 1;
    while (i > 0 && ((unsigned char)text[i] & 0xc0) == 0x80)
        i--;
    return i;
}

/* From `end` back, and no further than `limit`. */
size_t start_of_spaces_before(const char *text, size_t limit, size_t end) {
    int used;
    while (end > limit) {
        size_t start = step_back(text, end);
        if (!is_space(utf8_next(text + start, end - start, &used)))
            break;
        end = start;
    }
    return end;
}

/* ---- what a regular expression sees ---- */

/* PCRE2's \s counts U+180E as a space, as Unicode did until 6.3; U+2060 is another format character. */
static uint32_t substitute_of(uint32_t code) {
    size_t low = 0, high = COUNT(substitutes);
    if (code == 0x180e)
        return 0x2060;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (code > substitutes[middle].last)
            low = middle + 1;
        else if (code < substitutes[middle].first)
            high = middle;
        else
            return substitutes[middle].code;
    }
    return code;
}

static bool named_alike(const struct code_ranges *named, uint32_t a, uint32_t b) {
    for (size_t i = 0; i < named->count; i++) {
        const uint32_t *range = named->ranges[i];
        if ((a >= range[0] && a <= range[1]) != (b >= range[0] && b <= range[1]))
            return false;
    }
    return true;
}

/* The code point that a pattern is shown: one of the category that the library has for it, as long in UTF-8.
 * Not where the pattern itself names code points and would tell the two apart. */
static uint32_t code_for_regex(const struct code_ranges *named, uint32_t code) {
    if (!(substitute_blocks[code >> 13] >> (code >> 8 & 31) & 1)) /* most text */
        return code;
    uint32_t other = substitute_of(code);
    return other == code || named_alike(named, code, other) ? other : code;
}

int clean_text(const struct code_ranges *named, const char *text, size_t length, char **clean) {
    int used;
    *clean = NULL;
    for (size_t i = 0; i < length; i += (size_t)used) {
        used = 1;
        if ((unsigned char)text[i] < 0x80)
            continue;
        uint32_t code = utf8_next(text + i, length - i, &used);
        uint32_t shown = code == UINT32_MAX ? 1 : code_for_regex(named, code);
        if (shown == code)
            continue;
        if (!*clean) {
            *clean = malloc(length);
            if (!*clean)
                return -1;
            memcpy(*clean, text, length);
        }
        utf8_put(shown, *clean + i);
    }
    return 0;
}

/* ---- normal forms ---- */

static bool is_inert(uint32_t code) {
    size_t low = 0, high = COUNT(inert_ranges);
    if (code < inert_ranges[0].first)
        return false;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (code > inert_ranges[middle].last)
            low = middle + 1;
        else if (code < inert_ranges[middle].first)
            high = middle;
        else
            return true;
    }
    return false;
}

static int append_normal(struct text *out, const char *bytes, size_t length, int options) {
    utf8proc_uint8_t *normal = NULL;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)bytes, (utf8proc_ssize_t)length, &normal,
                                      (utf8proc_option_t)options);
    int rc = n < 0 ? -1 : text_append(out, (const char *)normal, (size_t)n);
    free(normal);
    return rc;
}

/* Code points below this stay as they are in this form, and do not combine with what precedes. */
static uint32_t settled_below(enum normal_form form) {
    return form == FORM_NFC ? 0x300 : 0x80;
}

int append_form(struct text *out, const char *bytes, size_t length, enum normal_form form) {
    static const int options[] = {
        [FORM_NFC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE,
        [FORM_NFD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE,
        [FORM_NFKC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
        [FORM_NFKD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT,
    };
    uint32_t below = settled_below(form);
    size_t done = 0, start = 0; /* [start, i): a stretch to normalize, if it has an unsettled code point */
    bool unsettled = false;
    int used;
    for (size_t i = 0; i <= length; i += (size_t)used) {
        uint32_t code = i < length ? utf8_next(bytes + i, length - i, &used) : UINT32_MAX;
        bool boundary = code == UINT32_MAX || is_inert(code);
        if (!boundary && code >= below) {
            unsettled = true;
            continue;
        }
        if (unsettled && (text_append(out, bytes + done, start - done) ||
                          append_normal(out, bytes + start, i - start, options[form])))
            return -1;
        if (unsettled)
            done = i;
        unsettled = false;
        if (i == length)
            break;
        start = boundary ? i + (size_t)used : i; /* a settled one may be the base of what follows */
    }
    return text_append(out, bytes + done, length - done);
}

/* ---- lower case ---- */

static uint32_t lower_of(uint32_t code) {
    for (size_t i = 0; code >= 0x1c89 && i < COUNT(lower_ranges); i++)
        if (code >= lower_ranges[i].first && code <= lower_ranges[i].last)
            return code + (uint32_t)lower_ranges[i].distance;
    return (uint32_t)utf8proc_tolower((utf8proc_int32_t)code);
}

int append_lower(struct text *out, const char *bytes, size_t length) {
    int used;
    for (size_t i = 0; i < length; i += (size_t)used) {
        char lower[4];
        uint32_t code = utf8_next(bytes + i, length - i, &used);
        int rc;
        if (code == UINT32_MAX)
            rc = text_append(out, bytes + i, 1);
        else if (code == 0x130) /* the only one with two */
            rc = text_append(out, "i\xcc\x87", 3);
        else if (code < 0x80)
            rc = text_append(out, (const char[]){(char)(code >= 'A' && code <= 'Z' ? code + 32 : code)}, 1);
        else
            rc = text_append(out, lower, (size_t)utf8_put(lower_of(code), lower));
        if (rc)
            return -1;
    }
    return 0;
}

/* ---- growing text ---- */

int text_append(struct text *t, const char *bytes, size_t length) {
    if (!t->bytes || length > t->capacity - t->length) {
        size_t capacity = 2 * (t->length + length) + 64;
        char *more = realloc(t->bytes, capacity);
        if (!more)
            return -1;
        t->bytes = more;
        t->capacity = capacity;
    }
    if (length)
        memcpy(t->bytes + t->length, bytes, length);
    t->length += length;
    return 0;
}
