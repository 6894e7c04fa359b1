#include "model/train/status.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "kernels/clock.h"

enum { BAR = 24, SHORTEST_BAR = 5, SMOOTH_STEPS = 20, FALLBACK_COLUMNS = 80 };

static bool is_set(const char *name) {
    const char *value = getenv(name);
    return value && *value;
}

/* The locale's encoding, as its name says: the program itself never changes its locale. */
static bool is_utf8(void) {
    const char *names[] = {"LC_ALL", "LC_CTYPE", "LANG"};
    for (int i = 0; i < 3; i++)
        if (is_set(names[i]))
            return strstr(getenv(names[i]), "UTF-8") || strstr(getenv(names[i]), "utf8");
    return false;
}

static void open_status(struct status *s) {
    const char *term = getenv("TERM");
    s->opened = true;
    s->terminal = isatty(STDERR_FILENO) && !(term && strcmp(term, "dumb") == 0);
    s->colour = s->terminal && !is_set("NO_COLOR");
    s->unicode = is_utf8();
}

static int terminal_columns(void) {
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : FALLBACK_COLUMNS;
}

static void format_rate(double rate, char out[32]) {
    if (rate < 1e4)
        snprintf(out, 32, "%.0f tok/s", rate);
    else
        snprintf(out, 32, rate < 1e6 ? "%.1fk tok/s" : "%.2fM tok/s", rate / (rate < 1e6 ? 1e3 : 1e6));
}

/* A part of the line. Parts of a high rank go first where the line is too long. */
struct part {
    int rank;
    char text[48];
};

enum { PARTS = 10 };

/* Fill the parts, in the order of the line; empty ones are not shown. */
static void fill_parts(const struct status *s, const struct step_record *r, struct part parts[PARTS]) {
    char left[32], rate[32];
    clock_format_duration(s->seconds_a_step * (double)(r->steps - r->step), left);
    format_rate(r->tokens_per_second, rate);
    memset(parts, 0, PARTS * sizeof *parts);
    for (int i = 0; i < PARTS; i++)
        parts[i].rank = (int[PARTS]){0, 7, 1, 6, 8, 3, 5, 2, 4, 1}[i];
    snprintf(parts[0].text, sizeof parts[0].text, "step %" PRId64 "/%" PRId64, r->step, r->steps);
    snprintf(parts[1].text, sizeof parts[1].text, "%3d%%", (int)(100 * r->step / r->steps));
    if (s->losses > 0)
        snprintf(parts[2].text, sizeof parts[2].text, "loss %.4f", s->loss);
    else
        snprintf(parts[2].text, sizeof parts[2].text, "loss none");
    snprintf(parts[3].text, sizeof parts[3].text, "lr %.2e", r->lr);
    snprintf(parts[4].text, sizeof parts[4].text, "norm %.2f", r->grad_norm);
    snprintf(parts[5].text, sizeof parts[5].text, "%s", rate);
    if (r->mfu > 0)
        snprintf(parts[6].text, sizeof parts[6].text, "mfu %.1f%%", 100 * r->mfu);
    snprintf(parts[7].text, sizeof parts[7].text, "%s left", left);
    if (r->until_evaluation > 0)
        snprintf(parts[8].text, sizeof parts[8].text, "eval in %" PRId64, r->until_evaluation);
    else if (r->until_evaluation == 0)
        snprintf(parts[8].text, sizeof parts[8].text, "eval now");
    snprintf(parts[9].text, sizeof parts[9].text, "%s",
             r->skipped       ? "SKIPPED"
             : r->targets > 0 ? ""
                              : "NO TARGETS");
}

static int columns_of(const struct part parts[PARTS]) {
    int columns = 0;
    for (int i = 0; i < PARTS; i++)
        columns += parts[i].text[0] ? (columns > 0 ? 2 : 0) + (int)strlen(parts[i].text) : 0;
    return columns;
}

/* Empty the part of the highest rank; false if only the first is left. */
static bool drop_part(struct part parts[PARTS]) {
    int worst = 0;
    for (int i = 1; i < PARTS; i++)
        if (parts[i].text[0] && (worst == 0 || parts[i].rank > parts[worst].rank))
            worst = i;
    parts[worst].text[worst == 0 ? strlen(parts[0].text) : 0] = '\0';
    return worst > 0;
}

int status_line(const struct status *s, const struct step_record *r, int columns, char out[STATUS_BYTES]) {
    struct part parts[PARTS];
    fill_parts(s, r, parts);
    while (columns > 0 && columns_of(parts) > columns && drop_part(parts)) {
    }
    int used = columns_of(parts), cells = columns - used - 2;
    cells = cells > BAR ? BAR : cells < SHORTEST_BAR || columns == 0 ? 0 : cells;
    char *p = out;
    for (int i = 0; i < PARTS; i++) {
        if (!parts[i].text[0])
            continue;
        p += sprintf(p, "%s%s", p == out ? "" : "  ", parts[i].text);
        for (int cell = 0; i == 0 && cell < cells; cell++) {
            bool done = cell < (int)(cells * r->step / r->steps);
            p += sprintf(p, "%s%s", cell == 0 ? "  " : "",
                         s->unicode ? (done ? "━" : "─") : (done ? "=" : "-"));
        }
    }
    used += cells > 0 ? cells + 2 : 0;
    if (columns > 0 && used > columns) /* only the first part, which is ASCII */
        out[used = columns] = '\0';
    return used;
}

/* Go back to the beginning of the line, and clear it. A terminal that has become narrower has wrapped it. */
static void clear_line(struct status *s, int columns) {
    int rows = s->shown > 0 ? (s->shown - 1) / columns : 0;
    if (rows > 0)
        fprintf(stderr, "\033[%dA", rows);
    fputs(rows > 0 ? "\r\033[J" : "\r\033[K", stderr);
}

/* The line with what is wrong in bold red, and the loss in bold. */
static void print_coloured(const char *line) {
    static const struct {
        const char *text, *escape;
    } marks[] = {{"SKIPPED", "\033[1;31m"}, {"NO TARGETS", "\033[1;31m"}};
    const char *loss = strstr(line, "loss ");
    for (const char *p = line; *p;) {
        size_t length = 0;
        const char *escape = NULL;
        for (int i = 0; i < 2; i++)
            if (strncmp(p, marks[i].text, strlen(marks[i].text)) == 0)
                length = strlen(marks[i].text), escape = marks[i].escape;
        if (p == loss)
            length = 5 + strcspn(p + 5, " "), escape = "\033[1m";
        if (strncmp(p, "━", strlen("━")) == 0)
            length = strlen("━"), escape = "\033[32m";
        if (escape)
            fprintf(stderr, "%s%.*s\033[0m", escape, (int)length, p);
        else
            fputc(*p, stderr);
        p += length ? length : 1;
    }
}

void status_step(struct status *s, const struct step_record *r) {
    double smooth = 0.05, t = clock_seconds();
    char line[STATUS_BYTES];
    if (!s->opened)
        open_status(s);
    s->seconds_a_step =
        s->seconds_a_step == 0 ? r->seconds : (1 - smooth) * s->seconds_a_step + smooth * r->seconds;
    if (r->targets > 0 && !r->skipped && isfinite(r->loss)) {
        s->losses += s->losses < SMOOTH_STEPS;
        s->loss += (r->loss - s->loss) / s->losses;
    }
    double interval = s->terminal ? 0.1 : 10;
    if (r->step < r->steps && s->last_shown > 0 && t - s->last_shown < interval)
        return;
    s->last_shown = t;
    if (!s->terminal) {
        status_line(s, r, 0, line);
        fprintf(stderr, "%s\n", line);
        return;
    }
    int columns = terminal_columns();
    clear_line(s, columns);
    /* A line that fills the last column would be wrapped by some terminals. */
    s->shown = status_line(s, r, columns > 1 ? columns - 1 : 1, line);
    if (s->colour)
        print_coloured(line);
    else
        fputs(line, stderr);
    fflush(stderr);
}

void status_break(struct status *s) {
    if (s->shown > 0)
        fputc('\n', stderr);
    s->shown = 0;
}
