/* The table of keys as Markdown: the generated part of docs/configuration.md (`make docs`). */
#include "model/config/config_internal.h"

#include <string.h>

/* Help texts hold characters that Markdown reads as markup; a line break becomes a space. */
static void print_escaped(FILE *out, const char *text) {
    for (; *text; text++)
        if (*text == '\n')
            fputc(' ', out);
        else
            fprintf(out, "%s%c", strchr("|*_<", *text) ? "\\" : "", *text);
}

static void bound_text(const struct config_row *row, double bound, char text[32]) {
    if (row->kind == KIND_INTEGER)
        snprintf(text, 32, "%lld", (long long)bound);
    else
        real_text(bound, text);
}

/* Upper limits beyond this only keep sizes from overflowing, and are left out. */
static const double LARGEST_SHOWN = 65536;

static void print_range(FILE *out, const struct config_row *row) {
    char low[32], high[32];
    bound_text(row, row->min, low);
    bound_text(row, row->max, high);
    fprintf(out, "%s %s %s", row->kind == KIND_INTEGER ? "integer" : "number",
            row->open & EXCLUDES_MIN ? ">" : "≥", low);
    if (row->max <= LARGEST_SHOWN)
        fprintf(out, ", %s %s", row->open & EXCLUDES_MAX ? "<" : "≤", high);
    if (row->zero)
        fprintf(out, ", or `%s`", row->zero);
}

static void print_type(FILE *out, const struct config_row *row) {
    switch (row->kind) {
    case KIND_INTEGER:
    case KIND_REAL:
        print_range(out, row);
        break;
    case KIND_BOOL:
        fputs("`true`, `false`", out);
        break;
    case KIND_ENUM:
        for (int i = 0; row->values[i]; i++)
            fprintf(out, "%s`%s`", i ? ", " : "", row->values[i]);
        break;
    case KIND_TEXT:
        fprintf(out, "text%s%s%s", row->zero ? ", or `" : "", row->zero ? row->zero : "",
                row->zero ? "`" : "");
        break;
    case KIND_PATTERN:
        fputs("layer types, each with an optional `*N`", out);
        break;
    }
}

static void print_default(FILE *out, const struct config_row *row) {
    if (row_is_required(row))
        fputs("required", out);
    else
        fprintf(out, "`%s`", row->derived ? row->derived : row->initial);
}

/* Data is compared by fingerprint, so its path may change. */
static const char *on_resume(const struct config_row *row) {
    if (!strcmp(row->section, "data") && row->kind == KIND_TEXT)
        return "path may change";
    return row->may_change ? "may change" : "fixed";
}

void config_print_markdown(FILE *out) {
    const char *section = "";
    for (int i = 0; i < config_row_count; i++) {
        const struct config_row *row = &config_rows[i];
        if (strcmp(section, row->section))
            fprintf(out,
                    "\n## [%s]\n\n| key | values | default | on resume | meaning |\n|---|---|---|---|---|\n",
                    row->section);
        section = row->section;
        fprintf(out, "| `%s` | ", row->name);
        print_type(out, row);
        fputs(" | ", out);
        print_default(out, row);
        fprintf(out, " | %s | ", on_resume(row));
        print_escaped(out, row->help);
        fputs(" |\n", out);
    }
}
