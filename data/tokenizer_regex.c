/* Regular expressions of a tokenizer.json, as the tokenizers library reads them, on PCRE2.
 *
 * The library runs them on Oniguruma in Ruby's syntax. A pattern is rewritten for PCRE2 so that every version
 * from 10.40 on matches the same: what ignores case is spelled out letter by letter ((?i:'s) becomes
 * '[sS\x{17f}]), since versions disagree on properties inside (?i:); a script is named as one (\p{Han} means
 * script extensions to PCRE2). A pattern with anything that the two engines, or two versions, may read
 * differently is refused. Categories of characters follow the library's Unicode: see tokenizer_unicode.c. */
#include "data/tokenizer_internal.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEPTH = 200 }; /* PCRE2 itself stops at 250 */

/* Options of a group, and of what stands in it. */
struct group {
    bool ignores_case, in_lookbehind, is_lookaround, is_nested; /* nested: in a group inside a lookbehind */
};

struct translator {
    const char *pattern;
    struct text out;
    struct code_ranges *named;
    struct group groups[MAX_DEPTH];
    int depth;
    char last_letter; /* the letter just before, where case is ignored; 0: none */
    bool failed;      /* out of memory */
};

static struct group *here(struct translator *t) {
    return &t->groups[t->depth];
}

static void emit(struct translator *t, const char *bytes, size_t length) {
    t->failed |= text_append(&t->out, bytes, length) != 0;
}

static void emit_text(struct translator *t, const char *text) {
    emit(t, text, strlen(text));
}

/* Code points of which one is named in the pattern, and another may not stand in for it. */
static void name_range(struct translator *t, uint32_t first, uint32_t last) {
    if (last >= 0x80)
        t->failed |= code_ranges_add(t->named, first, last) != 0;
}

/* ---- escapes ---- */

/* Categories and scripts, with the names that Oniguruma has for them in lower case, and PCRE2's. */
static const struct property {
    const char *name, *pcre2;
} properties[] = {
    {"l", "L"},
    {"letter", "L"},
    {"lu", "Lu"},
    {"uppercaseletter", "Lu"},
    {"ll", "Ll"},
    {"lowercaseletter", "Ll"},
    {"lt", "Lt"},
    {"titlecaseletter", "Lt"},
    {"lm", "Lm"},
    {"modifierletter", "Lm"},
    {"lo", "Lo"},
    {"otherletter", "Lo"},
    {"m", "M"},
    {"mark", "M"},
    {"mn", "Mn"},
    {"nonspacingmark", "Mn"},
    {"mc", "Mc"},
    {"spacingmark", "Mc"},
    {"me", "Me"},
    {"enclosingmark", "Me"},
    {"n", "N"},
    {"number", "N"},
    {"nd", "Nd"},
    {"decimalnumber", "Nd"},
    {"nl", "Nl"},
    {"letternumber", "Nl"},
    {"no", "No"},
    {"othernumber", "No"},
    {"p", "P"},
    {"punctuation", "P"},
    {"pc", "Pc"},
    {"connectorpunctuation", "Pc"},
    {"pd", "Pd"},
    {"dashpunctuation", "Pd"},
    {"ps", "Ps"},
    {"openpunctuation", "Ps"},
    {"pe", "Pe"},
    {"closepunctuation", "Pe"},
    {"pi", "Pi"},
    {"initialpunctuation", "Pi"},
    {"pf", "Pf"},
    {"finalpunctuation", "Pf"},
    {"po", "Po"},
    {"otherpunctuation", "Po"},
    {"s", "S"},
    {"symbol", "S"},
    {"sm", "Sm"},
    {"mathsymbol", "Sm"},
    {"sc", "Sc"},
    {"currencysymbol", "Sc"},
    {"sk", "Sk"},
    {"modifiersymbol", "Sk"},
    {"so", "So"},
    {"othersymbol", "So"},
    {"z", "Z"},
    {"separator", "Z"},
    {"zs", "Zs"},
    {"spaceseparator", "Zs"},
    {"zl", "Zl"},
    {"lineseparator", "Zl"},
    {"zp", "Zp"},
    {"paragraphseparator", "Zp"},
    {"c", "C"},
    {"other", "C"},
    {"cc", "Cc"},
    {"control", "Cc"},
    {"cf", "Cf"},
    {"format", "Cf"},
    {"cn", "Cn"},
    {"unassigned", "Cn"},
    {"co", "Co"},
    {"privateuse", "Co"},
    {"han", "sc:Han"},
    {"hiragana", "sc:Hiragana"},
    {"latin", "sc:Latin"},
    {"katakana", "sc:Katakana"},
    {"greek", "sc:Greek"},
    {"cyrillic", "sc:Cyrillic"},
    {"hangul", "sc:Hangul"},
    {"arabic", "sc:Arabic"},
    {"hebrew", "sc:Hebrew"},
    {"devanagari", "sc:Devanagari"},
    {"thai", "sc:Thai"},
};

static const char *find_property(const char *name) {
    for (size_t i = 0; i < sizeof properties / sizeof *properties; i++)
        if (strcmp(properties[i].name, name) == 0)
            return properties[i].pcre2;
    return NULL;
}

/* \p{...} (p stands on its backslash). Where case is ignored, a class with letters or marks in it would grow
 * by what the library folds into them. Returns the end, or NULL. */
static const char *translate_property(struct translator *t, const char *p, bool in_class) {
    bool negated = p[1] == 'P';
    char name[32];
    size_t n = 0;
    const char *c = p + 3;
    if (p[2] != '{')
        return NULL;
    if (*c == '^') {
        negated = !negated;
        c++;
    }
    for (; *c != '}'; c++) {
        if (*c == 0 || n == sizeof name - 1)
            return NULL;
        if (*c != ' ' && *c != '-' && *c != '_')
            name[n++] = (char)tolower((unsigned char)*c);
    }
    name[n] = 0;
    const char *property = find_property(name);
    if (!property || (in_class && here(t)->ignores_case && (negated || !strchr("NPSZ", *property))))
        return NULL;
    /* As a class where it is none: PCRE2 takes \P{L}?\P{N} for things that exclude each other. */
    bool as_class = negated && !in_class;
    emit_text(t, as_class ? "[^\\p{" : negated ? "\\P{" : "\\p{");
    emit_text(t, property);
    emit_text(t, as_class ? "}]" : "}");
    return c + 1;
}

/* \x41 or \x{41} (p stands on its backslash): the value to *code, and the end, or NULL. Oniguruma takes \x80
 * to \xff for single bytes. */
static const char *read_hex(const char *p, uint32_t *code) {
    bool braces = p[2] == '{';
    const char *digits = p + 2 + braces, *c = digits;
    for (*code = 0; isxdigit((unsigned char)*c) && c - digits < (braces ? 6 : 2); c++)
        *code = *code * 16 + (uint32_t)(isdigit((unsigned char)*c) ? *c - '0' : (*c | 32) - 'a' + 10);
    if (braces)
        return c > digits && *c == '}' && *code <= 0x10ffff ? c + 1 : NULL;
    return c - digits == 2 && *code < 0x80 ? c : NULL;
}

/* A character or an escape for one (p stands on it): its code point to *code, and its end, or NULL. */
static const char *read_character(const char *p, uint32_t *code) {
    static const char letters[] = "nrtf", values[] = "\n\r\t\f";
    const char *letter;
    int used;
    if (*p != '\\') {
        *code = utf8_next(p, strnlen(p, 4), &used);
        return *code == UINT32_MAX ? NULL : p + used;
    }
    if (p[1] == 'x')
        return read_hex(p, code);
    letter = p[1] ? strchr(letters, p[1]) : NULL;
    *code = letter ? (uint32_t)values[letter - letters] : (unsigned char)p[1];
    return letter || ispunct((unsigned char)p[1]) || p[1] == ' ' ? p + 2 : NULL;
}

/* ---- characters ---- */

static void emit_code(struct translator *t, uint32_t code) {
    char text[16];
    snprintf(text, sizeof text, "\\x{%x}", code);
    emit_text(t, text);
}

static bool is_letter(uint32_t code) {
    return code < 0x80 && isalpha((int)code);
}

/* The other characters that a letter is equal to when case is ignored. */
static void emit_other_cases(struct translator *t, uint32_t letter) {
    emit_code(t, letter ^ 32);
    if ((letter | 32) == 'k')
        emit_code(t, 0x212a); /* the sign for Kelvin */
    if ((letter | 32) == 's')
        emit_code(t, 0x17f); /* the long s */
}

/* Pairs that the library also finds in one character (the German sharp s, ligatures). */
static bool folds_together(char a, char b) {
    return (a == 's' && (b == 's' || b == 't')) || (a == 'f' && (b == 'f' || b == 'i' || b == 'l'));
}

static const char *translate_character(struct translator *t, const char *p) {
    uint32_t code;
    const char *end = read_character(p, &code);
    char letter = 0;
    if (!end)
        return NULL;
    name_range(t, code, code);
    if (!here(t)->ignores_case) {
        emit(t, p, (size_t)(end - p));
        return end;
    }
    if (code >= 0x80)
        return NULL;
    if (!is_letter(code)) {
        emit(t, p, (size_t)(end - p));
    } else {
        letter = (char)(code | 32);
        if (folds_together(t->last_letter, letter))
            return NULL;
        emit_text(t, "[");
        emit_code(t, code);
        emit_other_cases(t, code);
        emit_text(t, "]");
    }
    t->last_letter = letter;
    return end;
}

static const char *translate_escape(struct translator *t, const char *p) {
    if (p[1] == 'p' || p[1] == 'P')
        return translate_property(t, p, false);
    if (p[1] && strchr("dDsSAz", p[1])) {
        emit(t, p, 2);
        return p + 2;
    }
    return translate_character(t, p);
}

/* ---- classes ---- */

/* One item of a class: a property, a shorthand, a character or a range (p stands on it). */
static const char *translate_item(struct translator *t, const char *p) {
    uint32_t first, last;
    const char *end;
    if (*p == '\\' && (p[1] == 'p' || p[1] == 'P'))
        return translate_property(t, p, true);
    if (*p == '\\' && p[1] && strchr("dDsS", p[1])) {
        if ((p[2] == '-' && p[3] != ']') || (here(t)->ignores_case && (p[1] == 'S' || p[1] == 'D')))
            return NULL;
        emit(t, p, 2);
        return p + 2;
    }
    if (*p == '[' || (p[0] == '&' && p[1] == '&') || !(end = read_character(p, &first)))
        return NULL; /* Ruby nests classes and intersects them */
    last = first;
    if (*end == '-' && end[1] && end[1] != ']') {
        if (first == '-' || end[1] == '[' || !(end = read_character(end + 1, &last)) || last < first)
            return NULL;
    }
    name_range(t, first, last);
    emit_code(t, first);
    if (last > first) {
        emit_text(t, "-");
        emit_code(t, last);
    }
    if (here(t)->ignores_case) {
        if (last >= 0x80)
            return NULL;
        for (uint32_t c = first; c <= last; c++)
            if (is_letter(c))
                emit_other_cases(t, c);
    }
    return end;
}

/* p stands on the bracket. */
static const char *translate_class(struct translator *t, const char *p) {
    emit_text(t, "[");
    if (*++p == '^') {
        emit_text(t, "^");
        p++;
    }
    if (*p == ']')
        return NULL;
    while (p && *p != ']')
        p = *p ? translate_item(t, p) : NULL;
    emit_text(t, "]");
    return p ? p + 1 : NULL;
}

/* ---- groups and counts ---- */

/* Groups and lookarounds are alike, options are not: Ruby's m is Perl's s, and its (?i) ends elsewhere. */
static const char *translate_group(struct translator *t, const char *p) {
    struct group inner = *here(t);
    const char *open = "(";
    int length = 1;
    inner.is_nested = inner.in_lookbehind;
    inner.is_lookaround = false;
    if (p == t->pattern && strncmp(p, "(?i)", 4) == 0) {
        here(t)->ignores_case = true;
        return p + 4;
    }
    if (strncmp(p, "(?i:", 4) == 0) {
        inner.ignores_case = true;
        open = "(?:";
        length = 4;
    } else if (strncmp(p, "(?<=", 4) == 0 || strncmp(p, "(?<!", 4) == 0) {
        inner.in_lookbehind = inner.is_lookaround = true;
        open = p[3] == '=' ? "(?<=" : "(?<!";
        length = 4;
    } else if (p[1] == '?') {
        if (!p[2] || !strchr(":=!>", p[2]))
            return NULL;
        inner.is_lookaround = p[2] == '=' || p[2] == '!';
        open = p[2] == ':' ? "(?:" : p[2] == '=' ? "(?=" : p[2] == '!' ? "(?!" : "(?>";
        length = 3;
    } else if (p[1] == '*') {
        return NULL;
    }
    if (t->depth + 1 == MAX_DEPTH)
        return NULL;
    t->groups[++t->depth] = inner;
    emit_text(t, open);
    return p + length;
}

static const char *end_group(struct translator *t, const char *p) {
    if (t->depth == 0)
        return NULL;
    bool is_lookaround = t->groups[t->depth--].is_lookaround;
    if (is_lookaround && p[1] && strchr("*+?{", p[1]))
        return NULL;
    emit_text(t, ")");
    return p + 1;
}

/* Ruby has neither {n,m}+ nor a lazy {n}?, and reads {,m} as PCRE2 does not. */
static const char *translate_count(struct translator *t, const char *p) {
    const char *end = p + 1 + strspn(p + 1, "0123456789,");
    if (p[1] == ',' || end == p + 1 || *end != '}')
        return NULL;
    bool fixed = !memchr(p, ',', (size_t)(end - p));
    if (end[1] == '+' || (fixed && end[1] == '?') || (!fixed && here(t)->in_lookbehind))
        return NULL;
    emit(t, p, (size_t)(end + 1 - p));
    return end + 1;
}

/* ---- all of it ---- */

/* One element; its end, or NULL when the engines may read it differently. A lookbehind must have one length,
 * or several only at its top: PCRE2 takes others from 10.43 on. */
static const char *translate_next(struct translator *t, const char *p) {
    if (*p == '\\')
        return translate_escape(t, p);
    if (*p == '[')
        return translate_class(t, p);
    if (*p == '(')
        return translate_group(t, p);
    if (*p == ')')
        return end_group(t, p);
    if (*p == '{')
        return translate_count(t, p);
    if (!strchr("*+?|.^$", *p))
        return translate_character(t, p);
    if ((strchr("*+?", *p) && here(t)->in_lookbehind) || (*p == '|' && here(t)->is_nested))
        return NULL;
    emit(t, p, 1);
    if (*p == '|')
        t->last_letter = 0;
    return p + 1;
}

static const char *translate(struct translator *t) {
    const char *p = t->pattern;
    while (*p && !t->failed) {
        const char *end = translate_next(t, p);
        if (!end)
            return p;
        p = end;
    }
    emit(t, "", 1);
    return NULL;
}

static pcre2_code *compile(const char *pattern, uint32_t options, char message[REGEX_MESSAGE]) {
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    int code = 0;
    PCRE2_SIZE offset = 0;
    if (!context) {
        strcpy(message, "out of memory");
        return NULL;
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_code *regex = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                      options | PCRE2_UTF | PCRE2_NO_START_OPTIMIZE, &code, &offset, context);
    pcre2_compile_context_free(context);
    if (!regex) {
        int n = snprintf(message, REGEX_MESSAGE, "does not compile: ");
        pcre2_get_error_message(code, (PCRE2_UCHAR *)message + n, (PCRE2_SIZE)(REGEX_MESSAGE - n));
    } else {
        pcre2_jit_compile(regex, PCRE2_JIT_COMPLETE); /* without it, slower and the same */
    }
    return regex;
}

pcre2_code *regex_compile(const char *pattern, struct code_ranges *named, char message[REGEX_MESSAGE]) {
    struct translator t = {.pattern = pattern, .named = named};
    pcre2_code *regex = NULL;
    const char *foreign = translate(&t);
    if (foreign)
        snprintf(message, REGEX_MESSAGE, "has something at byte %d that is not supported here",
                 (int)(foreign - pattern));
    else if (t.failed)
        strcpy(message, "out of memory");
    else
        regex = compile(t.out.bytes, PCRE2_UCP | PCRE2_MULTILINE, message); /* as Ruby has ^ and $ */
    free(t.out.bytes);
    return regex;
}

pcre2_code *regex_compile_literal(const char *text, struct code_ranges *named, char message[REGEX_MESSAGE]) {
    int used;
    size_t length = strlen(text);
    for (size_t i = 0; i < length; i += (size_t)used) {
        uint32_t code = utf8_next(text + i, length - i, &used);
        if (code >= 0x80 && code != UINT32_MAX && code_ranges_add(named, code, code)) {
            strcpy(message, "out of memory");
            return NULL;
        }
    }
    return compile(text, PCRE2_LITERAL, message);
}

pcre2_code *regex_compile_pcre2(const char *pattern, char message[REGEX_MESSAGE]) {
    return compile(pattern, PCRE2_UCP, message);
}

int code_ranges_add(struct code_ranges *r, uint32_t first, uint32_t last) {
    if (r->count == r->capacity) {
        size_t capacity = r->capacity ? 2 * r->capacity : 16;
        uint32_t(*more)[2] = realloc(r->ranges, capacity * sizeof *more);
        if (!more)
            return -1;
        r->ranges = more;
        r->capacity = capacity;
    }
    r->ranges[r->count][0] = first;
    r->ranges[r->count++][1] = last;
    return 0;
}
