/* Shared by the files of this folder only: a row of the table of keys, and a configuration being read, which
 * records where each value was given, so that errors can name the place. */
#ifndef IHA_MODEL_CONFIG_CONFIG_INTERNAL_H
#define IHA_MODEL_CONFIG_CONFIG_INTERNAL_H

#include <stddef.h>

#include "model/config/config.h"

enum row_kind { KIND_INTEGER, KIND_REAL, KIND_BOOL, KIND_ENUM, KIND_TEXT, KIND_PATTERN };
enum { EXCLUDES_MIN = 1, EXCLUDES_MAX = 2 }; /* for `open`: the bound itself is not a legal value */
enum { MAX_ROWS = 96, MAX_WHERE = 512, MAX_WHY = 512, PATTERN_TEXT = MAX_LAYERS * 12 };

/* One key; the table is config_rows in config.c. */
struct config_row {
    const char *section, *name;
    const char *initial;       /* the default as a user would write it; NULL: required, or derived */
    const char *derived;       /* the default as --help shows it, when it depends on other keys */
    const char *zero;          /* the word for 0 or an empty text: "auto", "all", "none" */
    int64_t zero_value;        /* what that word stands for where 0 is a value of its own */
    const char *const *values; /* KIND_ENUM: names in the order of the enum, NULL-terminated */
    const char *help;
    double min, max; /* numbers; every bound is exact in a double */
    size_t offset;   /* into struct config; unused for KIND_PATTERN */
    enum row_kind kind;
    unsigned open;
    bool may_change; /* on resume */
};

extern const struct config_row config_rows[];
extern const int config_row_count;
extern const char *const config_sections[];         /* NULL-terminated, in table order */
extern const char *const config_layer_type_names[]; /* NULL-terminated, in the order of the enum */

static inline bool row_is_required(const struct config_row *row) {
    return !row->initial && !row->derived;
}

/* The row of a key, or NULL. */
const struct config_row *find_row(const char *section, const char *name);

/* A configuration being read. origin[row]: 0: not given; n > 0: line n of the file; n < 0: the override with
 * index -n - 1; WITHOUT_LINE: a file without line numbers (JSON). */
enum { WITHOUT_LINE = 1 << 30 };
struct draft {
    struct config *config;
    struct error *error;
    const char *file; /* NULL: overrides alone */
    char *const *overrides;
    int origin[MAX_ROWS];
    int pattern_count; /* of layer_pattern as given; finish_model repeats it over num_hidden_layers */
    enum layer_type pattern[MAX_LAYERS];
};

/* Fill the draft's error with "<where the key was given>: <text>" and return -1. A row that is NULL or was not
 * given names the file as a whole. */
int fail_at(const struct draft *d, const struct config_row *row, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Text -> value of one key, into d->config (a pattern: into d->pattern). If the text is not a legal value,
 * returns -1 and the reason in `why`. */
int set_value(struct draft *d, const struct config_row *row, const char *text, char why[MAX_WHY]);

/* 0 if x is in the range of this row, else -1 and the reason in `why`. */
int check_range(const struct config_row *row, double x, char why[MAX_WHY]);

/* Value -> text: the inverse of set_value, for every kind but KIND_PATTERN. */
void value_text(const struct config *c, const struct config_row *row, char text[MAX_TEXT]);

/* The shortest decimal that reads back as exactly x. */
void real_text(double x, char text[32]);

/* The field of a key in a configuration. */
static inline void *row_address(const struct config *c, const struct config_row *row) {
    return (char *)(uintptr_t)c + row->offset;
}

/* User-supplied text for a one-line message: cut at 60 bytes, control characters replaced. */
enum { MAX_QUOTE = 64 };
const char *quotable(const char *text, char out[MAX_QUOTE]);

/* "; did you mean 'X'?", or "" when no name in the list is close. */
void did_you_mean(const char *word, const char *const *names, char out[96]);

/* Fill what model.size derives, before finish_model. size_derives: whether this key is then not required. */
int derive_from_size(struct draft *d, int ranks);
bool size_derives(const struct draft *d, const struct config_row *row);

/* Check that all required keys were given; the error names those that were not. */
int check_required(const struct draft *d);

/* Fill the model's defaults that depend on other keys (some need seq_len, in tokens) and check
 * the relations between its keys. Single values have been checked before. */
int finish_model(struct draft *d, int64_t seq_len);

/* The same for [train]: batch_tokens over `ranks`, min_lr, warm-up, and the largest sizes. */
int finish_train(struct draft *d, int ranks);
int check_widths(const struct draft *d);

/* Relations across sections: seq_len fits the model's positions, the tokenizer fits vocab_size. */
int check_positions(const struct draft *d, int64_t seq_len);
int check_tokenizer(const struct draft *d);
int check_separator(const struct draft *d);

#endif
