/* What config*.c share among themselves: a row of the table of keys, and a configuration in the making
 * that remembers where each value was given, so that an error can point there. Not for other files. */
#ifndef IHA_MODEL_CONFIG_CONFIG_INTERNAL_H
#define IHA_MODEL_CONFIG_CONFIG_INTERNAL_H

#include <stddef.h>

#include "model/config/config.h"

enum row_kind { KIND_INTEGER, KIND_REAL, KIND_BOOL, KIND_ENUM, KIND_TEXT, KIND_PATTERN };
enum { EXCLUDES_MIN = 1, EXCLUDES_MAX = 2 }; /* for `open`: the bound itself is not a legal value */
enum { MAX_ROWS = 96, MAX_WHERE = 512, MAX_WHY = 512, PATTERN_TEXT = MAX_LAYERS * 12 };

/* One key. An array of them in config.c says everything there is to know about the keys. */
struct config_row {
    const char *section, *name;
    const char *initial;       /* the default as a user would write it; NULL: required, or derived */
    const char *derived;       /* the default as --help shows it, when it depends on other keys */
    const char *zero;          /* the word that stands for 0 or for an empty text: "auto", "all", "none" */
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

/* A configuration in the making. origin[row]: 0 nobody gave it; n > 0 line n of the file; n < 0 the
 * override with index -n - 1; WITHOUT_LINE: the file, which has no line numbers to offer (JSON). */
enum { WITHOUT_LINE = 1 << 30 };
struct draft {
    struct config *config;
    struct error *error;
    const char *file; /* NULL: overrides alone */
    char *const *overrides;
    int origin[MAX_ROWS];
    int pattern_count; /* of layer_pattern as given; it meets num_hidden_layers in finish_model */
    enum layer_type pattern[MAX_LAYERS];
};

/* Fill the draft's error with "<where the key was given>: <text>" and return -1. A row of NULL or one
 * nobody gave points at the file as a whole. */
int fail_at(const struct draft *d, const struct config_row *row, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Text -> value of one key, into d->config (a pattern: into d->pattern). Returns -1 and says why, without
 * saying where, if the text is not a legal value. */
int set_value(struct draft *d, const struct config_row *row, const char *text, char why[MAX_WHY]);

/* Is x a legal number for this row? If not, say why and return -1. */
int check_range(const struct config_row *row, double x, char why[MAX_WHY]);

/* Value -> text: the inverse of set_value, for every kind but KIND_PATTERN. */
void value_text(const struct config *c, const struct config_row *row, char text[MAX_TEXT]);

/* The shortest decimal that reads back as exactly x. */
void real_text(double x, char text[32]);

/* Where a key lives in a configuration. */
static inline void *row_address(const struct config *c, const struct config_row *row) {
    return (char *)(uintptr_t)c + row->offset;
}

/* Text from outside, made fit for a one-line message: cut at 60 bytes, control characters replaced. */
enum { MAX_QUOTE = 64 };
const char *quotable(const char *text, char out[MAX_QUOTE]);

/* "; did you mean 'X'?", or "" when no name in the list is near enough. */
void did_you_mean(const char *word, const char *const *names, char out[96]);

/* Every required key given? An error names all that are not. */
int check_required(const struct draft *d);

/* Fill the model's defaults that depend on other keys (seq_len, in tokens, for those of them that need
 * it) and check the relations between its keys. Every single value has been checked already. */
int finish_model(struct draft *d, int64_t seq_len);

/* The same for [train]: batch_tokens over `ranks`, min_lr, warm-up, and sizes no machine can hold. */
int finish_train(struct draft *d, int ranks);
int check_widths(const struct draft *d);

/* Relations across sections: sequences fit the model's positions, the tokenizer its vocabulary. */
int check_positions(const struct draft *d, int64_t seq_len);
int check_tokenizer(const struct draft *d);

#endif
