/* Reading a configuration: defaults, then the INI file, then the overrides of the command line.
 *
 * inih splits lines into names and values, but its treatment of comments, indented lines and long lines
 * depends on how it was built, and it accepts some malformed lines. So it reads through read_line below, which
 * strips and counts the lines and stops at the first malformed one. */
#include "model/config/config_internal.h"

#include <errno.h>
#include <ini.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* The row of a key given at `where`, or NULL with the draft's error filled. */
static const struct config_row *look_up(const struct draft *d, const char *where, const char *section,
                                        const char *name) {
    const struct config_row *row = find_row(section, name);
    if (row)
        return row;
    const char *names[MAX_ROWS + 1], *elsewhere = NULL;
    int count = 0;
    for (int i = 0; i < config_row_count; i++)
        if (!strcmp(config_rows[i].section, section))
            names[count++] = config_rows[i].name;
        else if (!strcmp(config_rows[i].name, name))
            elsewhere = config_rows[i].section;
    names[count] = NULL;
    char quote[MAX_QUOTE], hint[96];
    did_you_mean(name, names, hint);
    if (elsewhere)
        snprintf(hint, sizeof hint, "; it belongs in [%s]", elsewhere);
    fail_user(d->error, "%s: unknown key '%s' in [%s]%s", where, quotable(name, quote), section,
              *hint ? hint : "; train_iha --help lists all keys");
    return NULL;
}

static bool is_section(const char *name) {
    for (const char *const *s = config_sections; *s; s++)
        if (!strcmp(*s, name))
            return true;
    return false;
}

static int fail_section(const struct draft *d, const char *where, const char *name) {
    char quote[MAX_QUOTE], hint[96];
    did_you_mean(name, config_sections, hint);
    return fail_user(d->error, "%s: unknown section '%s'%s", where, quotable(name, quote),
                     *hint ? hint : "; the sections are model, train, system, data, eval and run");
}

/* ---- the file ---- */

/* Debian's inih lets a program raise its limit of 200 bytes a line. Other builds do not have these three
 * variables (hence weak), and there a longer line is an error. */
extern bool ini_use_stack __attribute__((weak));
extern int ini_max_line __attribute__((weak)), ini_initial_alloc __attribute__((weak));
enum { LONGEST_LINE = 4096 };

struct reader {
    struct draft *draft;
    FILE *file;
    int line;     /* number of the line inih is looking at */
    bool failed;  /* the draft's error is filled; stop reading */
    char *quoted; /* the value of the line, if it is in quotes: inih would cut it at a blank and ';' */
    char *buffer; /* of getline */
    size_t capacity;
};

static int fail_line(struct reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fail_line(struct reader *r, const char *format, ...) {
    char text[900];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    r->failed = true;
    return fail_user(r->draft->error, "%s:%d: %s", r->draft->file, r->line, text);
}

/* The value of a line if it begins with a quote that is closed, or NULL. */
static char *quoted_value(char *line) {
    char *value = strchr(line, '=');
    if (!value || *line == '#' || *line == ';' || *line == '[')
        return NULL;
    value += 1 + strspn(value + 1, " \t");
    return (*value == '"' || *value == '\'') && strchr(value + 1, *value) ? value : NULL;
}

/* Cut the comment and the blanks around what is left. A comment starts the line or follows a blank, so a
 * path may hold a '#' or ';' of its own, and a path in quotes also one that follows a blank. */
static char *strip(char *line) {
    static const char blanks[] = " \t\r\n";
    line += strspn(line, blanks);
    char *quoted = quoted_value(line);
    for (char *p = quoted ? strchr(quoted + 1, *quoted) : line; *p; p++)
        if ((*p == '#' || *p == ';') && (p == line || strchr(blanks, p[-1]))) {
            *p = 0;
            break;
        }
    size_t n = strlen(line);
    while (n && strchr(blanks, line[n - 1]))
        line[--n] = 0;
    return line;
}

/* Check that inih will split a stripped line as the user meant it. */
static int check_line(struct reader *r, char *line, size_t capacity) {
    char quote[MAX_QUOTE];
    size_t n = strlen(line);
    if (n + 2 > capacity)
        return fail_line(r,
                         "line of %zu bytes; the limit is %zu: shorten it, or give the value as an override "
                         "section.key=value",
                         n, capacity - 2);
    if (*line == '[') {
        if (n < 2 || strchr(line, ']') != line + n - 1)
            return fail_line(r, "'%s' is not a section; write [name]", quotable(line, quote));
        line[n - 1] = 0;
        bool known = is_section(line + 1);
        if (!known) {
            char where[MAX_WHERE];
            snprintf(where, sizeof where, "%s:%d", r->draft->file, r->line);
            r->failed = true;
            return fail_section(r->draft, where, line + 1);
        }
        line[n - 1] = ']';
    } else if (n && (!strchr(line, '=') || *line == '=')) {
        return fail_line(r, "'%s' is neither [section] nor key = value nor a # comment",
                         quotable(line, quote));
    }
    return 0;
}

/* inih's fgets: the next line, clean, into out; NULL at the end or after an error. */
static char *read_line(char *out, int capacity, void *stream) {
    struct reader *r = stream;
    if (r->failed)
        return NULL;
    errno = 0;
    ssize_t n = getline(&r->buffer, &r->capacity, r->file);
    if (n < 0) {
        if (!feof(r->file)) { /* not ferror(), which out of memory does not set everywhere */
            fail_at(r->draft, NULL, "%s", strerror(errno));
            r->failed = true;
        }
        return NULL;
    }
    r->line++;
    if (strlen(r->buffer) != (size_t)n) {
        fail_line(r, "contains a zero byte: not a text file");
        return NULL;
    }
    bool has_bom = r->line == 1 && !strncmp(r->buffer, "\xEF\xBB\xBF", 3); /* UTF-8 byte order mark */
    char *line = strip(r->buffer + (has_bom ? 3 : 0));
    if (check_line(r, line, (size_t)capacity))
        return NULL;
    r->quoted = quoted_value(line);
    snprintf(out, (size_t)capacity, "%s\n", line);
    return out;
}

/* inih's handler: one key = value. Returns 0 for an error, as inih requires. */
static int set_key(void *user, const char *section, const char *name, const char *text) {
    struct reader *r = user;
    struct draft *d = r->draft;
    char where[MAX_WHERE], why[MAX_WHY], quote[MAX_QUOTE];
    if (r->failed)
        return 0;
    if (!*section) {
        fail_line(r, "key '%s' before any section; put it under [model], [train], [system], [data] or [run]",
                  quotable(name, quote));
        return 0;
    }
    snprintf(where, sizeof where, "%s:%d", d->file, r->line);
    const struct config_row *row = look_up(d, where, section, name);
    if (!row) {
        r->failed = true;
        return 0;
    }
    int *origin = &d->origin[row - config_rows];
    if (*origin) {
        fail_line(r, "'%s' was already set on line %d; keep one of the two", name, *origin);
        return 0;
    }
    *origin = r->line;
    text = r->quoted ? r->quoted : text;
    if (set_value(d, row, text, why)) {
        fail_line(r, "%s = %s: %s", name, quotable(text, quote), why);
        return 0;
    }
    return 1;
}

static int read_file(struct draft *d) {
    struct reader r = {.draft = d, .file = fopen(d->file, "r")};
    if (!r.file)
        return fail_at(d, NULL, "%s", strerror(errno));
    if (&ini_use_stack && &ini_max_line && &ini_initial_alloc) {
        ini_use_stack = false;
        ini_max_line = ini_initial_alloc = LONGEST_LINE;
    }
    /* The stream and the handler share one reader, because the handler needs the line number. */
    int status = ini_parse_stream(read_line, &r, set_key, &r);
    if (status && !r.failed)
        status > 0 ? fail_line(&r, "not a valid INI line") : fail_run(d->error, "%s: out of memory", d->file);
    fclose(r.file);
    free(r.buffer);
    return status || r.failed ? -1 : 0;
}

/* ---- overrides ---- */

/* An argument without a section: it may be a key's bare name. */
static int fail_bare_key(const struct draft *d, const char *where, const char *key) {
    for (int i = 0; i < config_row_count; i++)
        if (!strcmp(config_rows[i].name, key))
            return fail_user(d->error, "%s: expected section.key=value; did you mean '%s.%s=...'?", where,
                             config_rows[i].section, key);
    return fail_user(d->error, "%s: expected section.key=value, such as train.lr=3e-4", where);
}

static int apply_override(struct draft *d, int index, bool model_is_given) {
    const char *text = d->overrides[index], *equals = strchr(text, '='), *dot = strchr(text, '.');
    char where[MAX_WHERE], quote[MAX_QUOTE], key[MAX_QUOTE] = "", section[MAX_QUOTE] = "", why[MAX_WHY];
    snprintf(where, sizeof where, "override '%s'", quotable(text, quote));
    if (equals)
        snprintf(key, sizeof key, "%.*s", (int)(equals - text), text);
    if (!equals || !dot || dot > equals)
        return fail_bare_key(d, where, equals ? key : text);
    snprintf(section, sizeof section, "%.*s", (int)(dot - text), text);
    snprintf(key, sizeof key, "%.*s", (int)(equals - dot - 1), dot + 1);
    if (!is_section(section))
        return fail_section(d, where, section);
    if (model_is_given && !strcmp(section, "model"))
        return fail_user(d->error, "%s: the model comes from the checkpoint and cannot be overridden", where);
    const struct config_row *row = look_up(d, where, section, key);
    if (!row)
        return -1;
    d->origin[row - config_rows] = -index - 1;
    if (set_value(d, row, equals + 1, why))
        return fail_user(d->error, "%s: %s", where, why);
    return 0;
}

/* ---- defaults, then the file, then the overrides ---- */

void config_defaults(struct config *c) {
    memset(c, 0, sizeof *c);
    struct draft d = {.config = c};
    char why[MAX_WHY];
    for (int i = 0; i < config_row_count; i++)
        if (config_rows[i].initial)
            set_value(&d, &config_rows[i], config_rows[i].initial, why);
    for (int layer = 0; layer < MAX_LAYERS; layer++)
        c->model.layer_types[layer] = d.pattern[layer % d.pattern_count];
}

int config_load(struct config *c, const char *path, int count, char *const *overrides, int ranks,
                struct error *e) {
    struct draft d = {.config = c, .error = e, .file = path, .overrides = overrides};
    if (ranks < 1 || ranks > 1 << 22)
        return fail_user(e, "%d ranks: the number must be from 1 to %d", ranks, 1 << 22);
    config_defaults(c);
    if (path && read_file(&d))
        return -1;
    for (int i = 0; i < count; i++)
        if (apply_override(&d, i, false))
            return -1;
    if (check_required(&d) || derive_from_size(&d, ranks) || finish_model(&d, c->train.seq_len) ||
        check_positions(&d, c->train.seq_len) || finish_train(&d, ranks) || check_tokenizer(&d) ||
        check_separator(&d))
        return -1;
    return 0;
}

int config_override(struct config *c, int count, char *const *overrides, struct error *e) {
    struct draft d = {.config = c, .error = e, .overrides = overrides};
    for (int i = 0; i < count; i++)
        if (apply_override(&d, i, true))
            return -1;
    if (check_positions(&d, c->train.seq_len) || check_tokenizer(&d) || check_separator(&d) ||
        check_widths(&d))
        return -1;
    return 0;
}
