/* model.size: one number from which the sizes of the model and the settings of its training follow. Every key that is
 * given keeps its value; the others are derived so that all parameters, embeddings included, come to `size`.
 *
 *   shape        about 64 units of width per layer, as in GPT-2 124M: of the depths whose best width comes within 5 %
 *                of the size, the one nearest to that; heads of 64, or of 32 below a width of 256
 *   lr           6e-4 (N / 124M)^-0.4, at most 3e-3: GPT-3's rates within a third from 125M to 13B
 *   batch        2^19 (N / 124M)^0.4 tokens, to the next power of two
 *   warm-up      3 % of the steps, at most 1000 */
#include "model/config/config_internal.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/params.h"

static const double TOLERANCE = 1.2, GOOD = 1.05, ASPECT = 64;
enum { MAX_DEPTH = 128, PASS_TOKENS = 16384, MAX_WARMUP = 1000 };

static const char *const derived_keys[] = {"model.hidden_size",
                                           "model.num_hidden_layers",
                                           "model.num_attention_heads",
                                           "model.head_dim",
                                           "model.intermediate_size",
                                           "train.seq_len",
                                           "train.micro_batch",
                                           "train.batch_tokens",
                                           "train.lr",
                                           "train.warmup_steps",
                                           NULL};

static const struct config_row *row_of(const char *key) {
    const char *dot = strchr(key, '.');
    char section[16];
    snprintf(section, sizeof section, "%.*s", (int)(dot - key), key);
    return find_row(section, dot + 1);
}

static bool given(const struct draft *d, const char *key) {
    return d->origin[row_of(key) - config_rows] != 0;
}

bool size_derives(const struct draft *d, const struct config_row *row) {
    for (int i = 0; derived_keys[i] && d->config->size[0]; i++)
        if (row_of(derived_keys[i]) == row)
            return true;
    return false;
}

/* ---- reading ---- */

/* "124M", or "depth=12". -1: neither. */
static int parse_size(const char *text, double *params, int64_t *depth) {
    char *end;
    *params = 0;
    *depth = 0;
    if (strncmp(text, "depth=", 6) == 0) {
        *depth = strtoll(text + 6, &end, 10);
        return end > text + 6 && !*end && *depth >= 1 && *depth <= MAX_LAYERS ? 0 : -1;
    }
    *params = strtod(text, &end);
    double unit = *end == 'K' || *end == 'k' ? 1e3 : *end == 'M' || *end == 'm' ? 1e6 : 1e9;
    bool has_unit = *end && strchr("KkMmBb", *end) && !end[1];
    *params *= unit;
    return end > text && has_unit && isfinite(*params) && *params >= 1000 && *params <= 1e12 ? 0 : -1;
}

/* ---- the shape ---- */

static bool is_gated(const struct model_config *m) {
    return m->activation == ACTIVATION_SWIGLU;
}

/* The i-th width, i from 0, that goes with the heads. */
static int64_t width_at(const struct draft *d, int64_t i) {
    const struct model_config *m = &d->config->model;
    if (given(d, "model.num_attention_heads"))
        return (i + 1) * (m->head_dim ? 64 : 8 * m->num_attention_heads);
    if (m->head_dim)
        return (i + 1) * m->head_dim;
    return i < 8 ? 32 * (i + 1) : 64 * (i - 3);
}

/* *m with the given depth and width, and what follows from them. */
static void set_shape(const struct draft *d, struct model_config *m, int64_t depth, int64_t width) {
    m->num_hidden_layers = depth;
    m->hidden_size = width;
    int64_t head = m->head_dim ? m->head_dim : width >= 256 ? 64 : 32;
    if (!given(d, "model.num_attention_heads"))
        m->num_attention_heads = width / head > 0 ? width / head : 1;
    while (!given(d, "model.num_attention_heads") && !m->head_dim && m->num_attention_heads > 1 &&
           width % (2 * m->num_attention_heads) != 0) /* RoPE needs pairs */
        m->num_attention_heads--;
    if (!m->head_dim && width % m->num_attention_heads == 0) /* otherwise finish_model refuses it */
        m->head_dim = width / m->num_attention_heads;
    if (!m->intermediate_size) /* three matrices of 8/3 are as large as two of 4 */
        m->intermediate_size = is_gated(m) ? (8 * width / 3 + 32) / 64 * 64 : 4 * width;
    if (!m->intermediate_size)
        m->intermediate_size = 64;
    if (!m->max_position_embeddings)
        m->max_position_embeddings = d->config->train.seq_len;
    for (int64_t layer = 0; layer < depth; layer++)
        if (d->pattern_count)
            m->layer_types[layer] = d->pattern[layer % d->pattern_count];
}

/* All parameters of that shape; 0 when out of memory. */
static double count(const struct draft *d, int64_t depth, int64_t width) {
    struct model_config m = d->config->model;
    set_shape(d, &m, depth, width);
    return (double)config_num_params(&m);
}

/* The width among those possible whose model of this depth is nearest to `params`. */
static int64_t best_width(const struct draft *d, int64_t depth, double params) {
    int64_t low = 0, high = 1024; /* indices; the first that is too large is in [low, high] */
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (count(d, depth, width_at(d, middle)) < params)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return width_at(d, 0);
    int64_t above = width_at(d, low), below = width_at(d, low - 1);
    return params / count(d, depth, below) < count(d, depth, above) / params ? below : above;
}

static double ratio(double a, double b) {
    return a > b ? a / b : b / a;
}

/* Smaller is better: any shape within GOOD of the size before any other, then the nearest to ASPECT. */
static double badness(double params, double wanted, int64_t depth, int64_t width) {
    double off = ratio(params, wanted), shape = log(ratio((double)width / (double)depth, ASPECT));
    return off <= GOOD ? shape : 100 * off + shape;
}

static void choose_shape(const struct draft *d, double params, int64_t *depth, int64_t *width) {
    const struct model_config *m = &d->config->model;
    double usual = cbrt(params / (12 * ASPECT * ASPECT)), best = INFINITY;
    int64_t first = (int64_t)(usual / 3) + 1, last = (int64_t)(3 * usual) + 2;
    if (m->num_hidden_layers)
        first = last = m->num_hidden_layers;
    last = last > MAX_DEPTH && !m->num_hidden_layers ? MAX_DEPTH : last;
    first = first < last ? first : last;
    *depth = first;
    *width = m->hidden_size ? m->hidden_size : width_at(d, 0);
    for (int64_t L = first; L <= last; L++) {
        int64_t C = m->hidden_size ? m->hidden_size : best_width(d, L, params);
        double bad = badness(count(d, L, C), params, L, C);
        if (bad < best) {
            best = bad;
            *depth = L;
            *width = C;
        }
    }
}

static int64_t width_of_depth(const struct draft *d, int64_t depth) {
    int64_t i = 0;
    while (width_at(d, i) < (int64_t)ASPECT * depth)
        i++;
    return width_at(d, i);
}

static int check_size(const struct draft *d, double wanted) {
    const struct model_config *m = &d->config->model;
    double have = (double)config_num_params(m);
    if (ratio(have, wanted) <= TOLERANCE)
        return 0;
    return fail_at(d, find_row("model", "size"),
                   "model.size = %s, but vocab_size = %" PRId64 ", hidden_size = %" PRId64
                   ", num_hidden_layers = %" PRId64 " and intermediate_size = %" PRId64
                   " come to %.3gM parameters; leave size or some of them out",
                   d->config->size, m->vocab_size, m->hidden_size, m->num_hidden_layers, m->intermediate_size,
                   have / 1e6);
}

/* ---- what training derives ---- */

static double rounded(double x) { /* two digits */
    char text[32];
    snprintf(text, sizeof text, "%.2g", x);
    return strtod(text, NULL);
}

static int64_t derived_seq_len(const struct draft *d, double params) {
    int64_t length = params < 20e6   ? 256
                     : params < 80e6 ? 512
                                     : 1024,
            most = d->config->model.max_position_embeddings;
    return most && most < length ? most : length;
}

static void derive_batch(const struct draft *d, double params, int ranks) {
    struct train_config *t = &d->config->train;
    bool free_batch = !given(d, "train.batch_tokens");
    double tokens = exp2(round(19 + 0.4 * log2(params / 124e6)));
    if (free_batch)
        t->batch_tokens = (int64_t)(tokens < 4096 ? 4096 : tokens);
    if (!given(d, "train.micro_batch")) {
        t->micro_batch = PASS_TOKENS > t->seq_len ? PASS_TOKENS / t->seq_len : 1;
        while (t->micro_batch > 1 &&
               (free_batch ? t->micro_batch * t->seq_len * ranks > t->batch_tokens
                           : t->batch_tokens % (t->micro_batch * t->seq_len * ranks) != 0))
            t->micro_batch--;
    }
    int64_t pass = t->micro_batch * t->seq_len * ranks, times = (t->batch_tokens + pass / 2) / pass;
    if (free_batch)
        t->batch_tokens = pass * (times > 0 ? times : 1);
}

/* Given keys can leave no legal value to another. */
static int check_derived(const struct draft *d) {
    for (int i = 0; derived_keys[i]; i++) {
        const struct config_row *row = row_of(derived_keys[i]);
        char why[MAX_WHY];
        int64_t value;
        memcpy(&value, row_address(d->config, row), sizeof value);
        if (row->kind == KIND_INTEGER && row->offset != offsetof(struct config, train.warmup_steps) &&
            !d->origin[row - config_rows] && value != 0 && check_range(row, (double)value, why))
            return fail_at(d, find_row("model", "size"), "model.size = %s derives %s = %" PRId64 ": %s",
                           d->config->size, derived_keys[i], value, why);
    }
    return 0;
}

int64_t derived_warmup(const struct train_config *t) {
    int64_t steps = (int64_t)(0.03 * (double)t->total_steps);
    return steps < MAX_WARMUP ? steps : MAX_WARMUP;
}

int derive_from_size(struct draft *d, int ranks) {
    struct config *c = d->config;
    double params;
    int64_t depth, width = 0;
    if (!c->size[0])
        return 0;
    if (parse_size(c->size, &params, &depth) != 0)
        return fail_at(
            d, find_row("model", "size"),
            "model.size = %s is no size; give a number of parameters such as 4M, 124M or 1.5B, or a "
            "number of layers such as depth=12",
            c->size);
    bool by_depth = depth > 0;
    if (by_depth && c->model.num_hidden_layers && c->model.num_hidden_layers != depth)
        return fail_at(d, find_row("model", "size"),
                       "model.size = %s, but num_hidden_layers = %" PRId64 "; leave one of them out", c->size,
                       c->model.num_hidden_layers);
    if (!given(d, "train.seq_len")) /* first, since learned positions are parameters */
        c->train.seq_len =
            derived_seq_len(d, by_depth ? 12 * ASPECT * ASPECT * pow((double)depth, 3) : params);
    if (by_depth)
        width = c->model.hidden_size ? c->model.hidden_size : width_of_depth(d, depth);
    else
        choose_shape(d, params, &depth, &width);
    int64_t positions = c->model.max_position_embeddings;
    set_shape(d, &c->model, depth, width);
    if (by_depth)
        params = (double)config_num_params(&c->model);
    else if (check_size(d, params) != 0)
        return -1;
    c->model.max_position_embeddings = positions; /* finish_model knows better */
    if (!given(d, "train.lr"))
        c->train.lr = rounded(fmin(3e-3, 6e-4 * pow(params / 124e6, -0.4)));
    derive_batch(d, params, ranks);
    return check_derived(d);
}

int64_t config_num_params(const struct model_config *m) {
    struct params p;
    if (params_create(&p, m, 1, &(struct error){0}) != 0)
        return 0;
    int64_t n = p.num_params;
    params_free(&p);
    return n;
}

void config_visit_derived(const struct config *c,
                          void (*visit)(void *context, const char *key, const char *value), void *context) {
    char text[MAX_TEXT];
    for (int i = 0; derived_keys[i] && c->size[0]; i++) {
        value_text(c, row_of(derived_keys[i]), text);
        visit(context, derived_keys[i], text);
    }
}
