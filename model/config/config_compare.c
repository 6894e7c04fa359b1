#include "model/config/config_compare.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "model/config/config_internal.h"

enum { MAX_REASONS = 16, REASON_BYTES = 200 };

/* Differences of layers, each with the layers that have it. */
struct reasons {
    struct reason {
        char text[REASON_BYTES];
        int first, layers;
    } list[MAX_REASONS];
    int count;
};

static void __attribute__((format(printf, 3, 4)))
add_reason(struct reasons *r, int layer, const char *format, ...) {
    char text[REASON_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    int i = 0;
    while (i < r->count && strcmp(r->list[i].text, text) != 0)
        i++;
    if (i == MAX_REASONS)
        return;
    if (i == r->count) {
        r->list[r->count++] = (struct reason){.first = layer};
        memcpy(r->list[i].text, text, sizeof text);
    }
    r->list[i].layers++;
}

/* Append to a list in `out`; what does not fit is left out, and the list ends in "...". */
static void append(char *out, size_t size, const char *text) {
    size_t used = strlen(out), more = strlen(text) + 2;
    const char *before = used ? "; " : "";
    if (used + more < size - 8)
        snprintf(out + used, size - used, "%s%s", before, text);
    else if (used >= 3 && strcmp(out + used - 3, "...") != 0)
        snprintf(out + used, size - used, "; ...");
}

static void append_reasons(char *out, size_t size, const struct reasons *r) {
    for (int i = 0; i < r->count; i++) {
        char text[REASON_BYTES + 64], more[32] = "";
        if (r->list[i].layers > 1)
            snprintf(more, sizeof more, " and %d more", r->list[i].layers - 1);
        snprintf(text, sizeof text, "layer %d%s: %s", r->list[i].first, more, r->list[i].text);
        append(out, size, text);
    }
}

/* ---- layers ---- */

struct pair {
    const struct model_config *then, *now;
    int64_t seq_len;
    struct reasons misfits, changes;
};

static int64_t at_most(int64_t a, int64_t limit) {
    return a < limit ? a : limit;
}

/* How many tokens a query sees of seq_len; of an IHA layer, of whole tokens. */
static int64_t reach(const struct model_config *m, enum layer_type type, int64_t seq_len) {
    int64_t tokens = type == LAYER_IHA_LOCAL ? m->iha_window / m->num_pseudo_heads
                     : layer_is_local(type)  ? m->local_window
                                             : seq_len;
    return at_most(tokens, seq_len);
}

static void compare_reach(struct pair *p, int layer) {
    int64_t then = reach(p->then, p->then->layer_types[layer], p->seq_len);
    int64_t now = reach(p->now, p->now->layer_types[layer], p->seq_len);
    if (then != now)
        add_reason(&p->changes, layer, "a query sees %lld tokens and saw %lld", (long long)now,
                   (long long)then);
}

static bool window_is_inside(const struct model_config *m, enum layer_type type, int64_t seq_len) {
    return type == LAYER_IHA_LOCAL && m->iha_window < seq_len * m->num_pseudo_heads;
}

static void compare_upcycled(struct pair *p, int layer) {
    const struct model_config *m = p->now;
    enum layer_type type = m->layer_types[layer];
    int64_t P = m->num_pseudo_heads;
    bool cut = window_is_inside(m, type, p->seq_len);
    if (m->init_alpha != ALPHA_IDENTITY)
        add_reason(&p->changes, layer, "model.init_alpha = noise (identity keeps the function)");
    if (P > 1 && m->position_embedding == POSITION_ROPE && m->iha_rope == IHA_ROPE_VIRTUAL)
        add_reason(
            &p->changes, layer,
            "model.iha_rope = virtual rotates the pseudo-heads of a token apart (token keeps the function)");
    if (P > 1 && m->causal && m->init_collapse == COLLAPSE_MEAN && m->iha_mask == MASK_FLAT)
        add_reason(
            &p->changes, layer,
            "model.init_collapse = mean, of pseudo-heads that see less of their token under model.iha_mask = "
            "flat (last keeps the function)");
    else if (P > 1 && m->init_collapse == COLLAPSE_MEAN && cut)
        add_reason(&p->changes, layer,
                   "model.init_collapse = mean, of pseudo-heads whose windows begin inside of tokens (last "
                   "keeps the "
                   "function)");
    if (cut && m->iha_window % P)
        add_reason(&p->changes, layer,
                   "model.iha_window = %lld is not a multiple of model.num_pseudo_heads = %lld",
                   (long long)m->iha_window, (long long)P);
    compare_reach(p, layer);
}

/* Two IHA layers with the same P, so with the same alpha and collapse. */
static void compare_iha(struct pair *p, int layer) {
    const struct model_config *then = p->then, *now = p->now;
    int64_t all = p->seq_len * now->num_pseudo_heads;
    int64_t windows[2];
    const struct model_config *models[] = {then, now};
    for (int i = 0; i < 2; i++)
        windows[i] =
            models[i]->layer_types[layer] == LAYER_IHA_LOCAL ? at_most(models[i]->iha_window, all) : all;
    if (windows[0] != windows[1])
        add_reason(&p->changes, layer, "a query sees %lld virtual tokens and saw %lld", (long long)windows[1],
                   (long long)windows[0]);
    if (now->num_pseudo_heads > 1 && now->causal && then->causal && then->iha_mask != now->iha_mask)
        add_reason(&p->changes, layer, "model.iha_mask");
    if (now->num_pseudo_heads > 1 && now->position_embedding == POSITION_ROPE &&
        then->iha_rope != now->iha_rope)
        add_reason(&p->changes, layer, "model.iha_rope");
}

static void compare_layer(struct pair *p, int layer) {
    enum layer_type then = p->then->layer_types[layer], now = p->now->layer_types[layer];
    if (then / 2 != now / 2 && (then >= LAYER_DIFF_GLOBAL || now >= LAYER_DIFF_GLOBAL))
        add_reason(&p->misfits, layer, "it is %s and was %s, which has other parameters",
                   layer_type_name(now), layer_type_name(then));
    else if ((layer_is_iha(then) && !layer_is_iha(now)) || (layer_is_folded(then) && !layer_is_folded(now)))
        add_reason(&p->misfits, layer, "it is %s and was %s, whose %s would be lost", layer_type_name(now),
                   layer_type_name(then), layer_is_iha(then) ? "alpha and collapse" : "alpha");
    else if (layer_is_iha(then))
        compare_iha(p, layer);
    else if (layer_is_iha(now))
        compare_upcycled(p, layer);
    else {
        if (layer_is_folded(now) && !layer_is_folded(then) && p->now->init_alpha != ALPHA_IDENTITY)
            add_reason(&p->changes, layer, "model.init_alpha = noise (identity keeps the function)");
        compare_reach(p, layer);
    }
}

/* Whether a layer that was MHA mixes heads now. */
static bool is_upcycled(enum layer_type then, enum layer_type now) {
    return (layer_is_iha(now) && !layer_is_iha(then)) || (layer_is_folded(now) && !layer_is_folded(then));
}

/* ---- keys ---- */

static bool any_iha(const struct model_config *m) {
    for (int64_t layer = 0; layer < m->num_hidden_layers; layer++)
        if (layer_is_iha(m->layer_types[layer]))
            return true;
    return false;
}

/* Alphas in any layer. */
static bool any_mixed(const struct model_config *m) {
    for (int64_t layer = 0; layer < m->num_hidden_layers; layer++)
        if (layer_is_folded(m->layer_types[layer]))
            return true;
    return any_iha(m);
}

enum meaning { MISFIT, CHANGE, NOTHING };

/* What a key means that has another value. */
static enum meaning meaning_of(const char *name, const struct model_config *then,
                               const struct model_config *now) {
    static const char *const per_layer[] = {"layer_pattern", "local_window", "iha_window", "iha_mask",
                                            "iha_rope"};
    for (size_t i = 0; i < sizeof per_layer / sizeof *per_layer; i++)
        if (!strcmp(name, per_layer[i]))
            return NOTHING; /* compared layer by layer */
    if (!strncmp(name, "init_", 5) || !strcmp(name, "vocab_size"))
        return NOTHING;
    if (!strcmp(name, "num_pseudo_heads") || !strcmp(name, "iha_collapse"))
        return any_iha(then) ? MISFIT : NOTHING;
    if (!strcmp(name, "alpha_on"))
        return any_mixed(then) ? MISFIT : NOTHING;
    if (!strcmp(name, "max_position_embeddings"))
        return then->position_embedding == POSITION_LEARNED ? MISFIT : NOTHING;
    if (!strcmp(name, "rope_theta") || !strcmp(name, "rope_scaling"))
        return then->position_embedding == POSITION_ROPE ? CHANGE : NOTHING;
    if (!strncmp(name, "rope_", 5)) /* of rope_scaling */
        return then->rope_scaling && now->rope_scaling ? CHANGE : NOTHING;
    if (!strcmp(name, "qkv_bias"))
        return config_qkv_bias(then) != config_qkv_bias(now) ? MISFIT : NOTHING;
    return !strcmp(name, "norm_eps") || !strcmp(name, "causal") ? CHANGE : MISFIT;
}

static void compare_keys(const struct model_config *then, const struct model_config *now,
                         struct model_comparison *c) {
    struct config *configs = calloc(2, sizeof *configs);
    if (!configs) {
        append(c->misfits, sizeof c->misfits, "out of memory comparing them");
        return;
    }
    configs[0].model = *then;
    configs[1].model = *now;
    for (int i = 0; i < config_row_count; i++) {
        const struct config_row *row = &config_rows[i];
        char was[MAX_TEXT], is[MAX_TEXT], text[160];
        enum meaning meaning = strcmp(row->section, "model") ? NOTHING : meaning_of(row->name, then, now);
        if (meaning == NOTHING)
            continue;
        value_text(&configs[0], row, was);
        value_text(&configs[1], row, is);
        if (!strcmp(was, is))
            continue;
        snprintf(text, sizeof text, "model.%s is %.40s and was %.40s", row->name, is, was);
        if (meaning == MISFIT)
            append(c->misfits, sizeof c->misfits, text);
        else
            append(c->changes, sizeof c->changes, text);
    }
    free(configs);
}

void config_compare(const struct model_config *then, const struct model_config *now, int64_t seq_len,
                    struct model_comparison *c) {
    struct pair p = {.then = then, .now = now, .seq_len = seq_len};
    *c = (struct model_comparison){0};
    compare_keys(then, now, c);
    if (then->num_hidden_layers != now->num_hidden_layers)
        return;
    for (int layer = 0; layer < now->num_hidden_layers; layer++) {
        compare_layer(&p, layer);
        c->upcycled += is_upcycled(then->layer_types[layer], now->layer_types[layer]);
    }
    append_reasons(c->misfits, sizeof c->misfits, &p.misfits);
    append_reasons(c->changes, sizeof c->changes, &p.changes);
}
