/* The benchmark's table: rows of text, kept until the end. */
#ifndef IHA_TESTS_BENCH_BENCH_TABLE_H
#define IHA_TESTS_BENCH_BENCH_TABLE_H

#include <stdarg.h>
#include <stdio.h>

#include "tests/bench/bench_measure.h"

enum { TABLE_ROWS = 96, CELL = 160 };

struct row {
    char what[CELL]; /* was measured */
    char took[CELL]; /* median (min-max) */
    char rate[CELL];
    char compared[CELL]; /* the ceiling, floor or plan it is compared with */
    char ratio[CELL];
};

struct table {
    int count;
    struct row rows[TABLE_ROWS];
};

/* Fill one cell. */
static inline void cell(char out[CELL], const char *format, ...) __attribute__((format(printf, 2, 3)));
static inline void cell(char out[CELL], const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(out, CELL, format, args);
    va_end(args);
}

/* A new row named by the format; the other cells are a dash until filled. */
static inline struct row *table_row(struct table *t, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static inline struct row *table_row(struct table *t, const char *format, ...) {
    static struct row overflow;
    struct row *r = t->count < TABLE_ROWS ? &t->rows[t->count++] : &overflow;
    va_list args;
    va_start(args, format);
    vsnprintf(r->what, CELL, format, args);
    va_end(args);
    cell(r->took, "–");
    cell(r->rate, "–");
    cell(r->compared, "–");
    cell(r->ratio, "–");
    return r;
}

/* "12.3 ms (12.1–12.9)", or in seconds from one second on. */
static inline void cell_seconds(char out[CELL], struct summary s) {
    double unit = s.median >= 1 ? 1 : 1e3;
    int digits = s.median * unit < 1 ? 3 : s.median * unit < 100 ? 2 : 0;
    cell(out, "%.*f %s (%.*f–%.*f)", digits, s.median * unit, unit > 1 ? "ms" : "s", digits, s.min * unit,
         digits, s.max * unit);
}

/* The row as a line of progress. */
static inline void row_progress(const struct row *r) {
    fprintf(stderr, "%s: %s; %s; compared with %s; ratio %s\n", r->what, r->took, r->rate, r->compared,
            r->ratio);
}

static inline void row_print(FILE *out, const struct row *r) {
    fprintf(out, "| %s | %s | %s | %s | %s |\n", r->what, r->took, r->rate, r->compared, r->ratio);
}

static inline void table_print_head(FILE *out) {
    fprintf(out, "| what | median (min–max) | rate | compared with | ratio |\n|---|---|---|---|---|\n");
}

static inline void table_print(FILE *out, const struct table *t) {
    for (int i = 0; i < t->count; i++)
        row_print(out, &t->rows[i]);
}

#endif
