/* Checks that need all keys: required keys, defaults that depend on other keys, and relations between keys.
 * config_values.c has checked each single value before. */
#include "model/config/config_internal.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

static bool was_given(const struct draft *d, const struct config_row *row) {
    return d->origin[row - config_rows] != 0;
}

/* ---- the model ---- */

static const struct config_row *model_row(const char *name) {
    return find_row("model", name);
}

static int finish_layers(struct draft *d) {
    struct model_config *m = &d->config->model;
    if (d->pattern_count)
        for (int64_t layer = 0; layer < m->num_hidden_layers; layer++)
            m->layer_types[layer] = d->pattern[layer % d->pattern_count];
    /* Fixed values after the last layer, so that equal models compare equal with memcmp. */
    for (int64_t layer = m->num_hidden_layers; layer < MAX_LAYERS; layer++)
        m->layer_types[layer] = LAYER_MHA_GLOBAL;
    for (int64_t layer = 0; layer < m->num_hidden_layers && !m->causal; layer++)
        if (layer_is_local(m->layer_types[layer]))
            return fail_at(d,
                           model_row(was_given(d, model_row("layer_pattern")) ? "layer_pattern" : "causal"),
                           "layer %" PRId64 " is %s, and local layers need causal = true; for causal = false "
                           "use mha_global and iha_global in layer_pattern",
                           layer, layer_type_name(m->layer_types[layer]));
    return 0;
}

static int finish_head_dim(struct draft *d) {
    struct model_config *m = &d->config->model;
    if (!m->head_dim) {
        if (m->hidden_size % m->num_attention_heads)
            return fail_at(d, model_row("num_attention_heads"),
                           "hidden_size = %" PRId64 " is not a multiple of num_attention_heads = %" PRId64
                           "; change one of them or give head_dim",
                           m->hidden_size, m->num_attention_heads);
        m->head_dim = m->hidden_size / m->num_attention_heads;
        /* hidden_size alone may be much larger than a head can be */
        char why[MAX_WHY];
        if (check_range(model_row("head_dim"), (double)m->head_dim, why))
            return fail_at(d, model_row("num_attention_heads"),
                           "head_dim = hidden_size / num_attention_heads = %" PRId64 ": %s", m->head_dim,
                           why);
    }
    if (m->position_embedding == POSITION_ROPE && m->head_dim % 2)
        return fail_at(d, model_row(was_given(d, model_row("head_dim")) ? "head_dim" : "num_attention_heads"),
                       "head_dim = %" PRId64
                       " is odd, and position_embedding = rope rotates pairs; make it even",
                       m->head_dim);
    return 0;
}

static int finish_heads(const struct draft *d) {
    struct model_config *m = &d->config->model;
    if (!m->num_key_value_heads)
        m->num_key_value_heads = m->num_attention_heads;
    if (m->num_attention_heads % m->num_key_value_heads)
        return fail_at(d, model_row("num_key_value_heads"),
                       "num_key_value_heads = %" PRId64 " does not divide num_attention_heads = %" PRId64,
                       m->num_key_value_heads, m->num_attention_heads);
    if (m->alpha_on != ALPHA_ON_QKV && m->num_key_value_heads != m->num_attention_heads)
        return fail_at(d, model_row("alpha_on"),
                       "alpha_on = qk and v need num_key_value_heads = num_attention_heads; make it qkv");
    return 0;
}

/* What a layer's type asks of the other keys. */
static int check_layer(const struct draft *d, int64_t layer) {
    const struct model_config *m = &d->config->model;
    enum layer_type type = m->layer_types[layer];
    bool grouped = type == LAYER_MHA_GLOBAL || type == LAYER_MHA_LOCAL || layer_is_iha(type);
    if (layer_is_diff(type) && m->num_attention_heads % 2)
        return fail_at(d, model_row("num_attention_heads"),
                       "layer %" PRId64 " is %s, whose heads are in pairs, and num_attention_heads = %" PRId64
                       " is odd; make it even",
                       layer, layer_type_name(type), m->num_attention_heads);
    if (!grouped && m->num_key_value_heads != m->num_attention_heads)
        return fail_at(d, model_row("num_key_value_heads"),
                       "layer %" PRId64 " is %s, which needs num_key_value_heads = num_attention_heads",
                       layer, layer_type_name(type));
    if ((layer_is_folded(type) || layer_is_simplicial(type)) && m->qk_norm != QK_NORM_NONE)
        return fail_at(d, model_row("qk_norm"), "layer %" PRId64 " is %s, which needs qk_norm = none", layer,
                       layer_type_name(type));
    return 0;
}

static int check_rope_scaling(const struct draft *d) {
    const struct model_config *m = &d->config->model;
    if (m->rope_scaling == ROPE_SCALING_NONE)
        return 0;
    if (m->position_embedding != POSITION_ROPE)
        return fail_at(d, model_row("rope_scaling"),
                       "rope_scaling = llama3 needs position_embedding = rope; leave one of them out");
    if (m->rope_high_freq_factor > m->rope_low_freq_factor)
        return 0;
    return fail_at(d, model_row("rope_high_freq_factor"),
                   "rope_high_freq_factor = %g is not above rope_low_freq_factor = %g; make it larger",
                   m->rope_high_freq_factor, m->rope_low_freq_factor);
}

int finish_model(struct draft *d, int64_t seq_len) {
    struct model_config *m = &d->config->model;
    if (finish_head_dim(d) || finish_layers(d) || finish_heads(d) || check_rope_scaling(d))
        return -1;
    for (int64_t layer = 0; layer < m->num_hidden_layers; layer++)
        if (check_layer(d, layer))
            return -1;
    if (!m->intermediate_size)
        m->intermediate_size = 4 * m->hidden_size;
    if (!m->max_position_embeddings)
        m->max_position_embeddings = seq_len;
    if (!m->iha_window) {
        /* The window at which the paper's FLOPs match MHA's: T/(2P) virtual keys, rounded down to whole
         * tokens; at least one token. */
        int64_t pseudo = m->num_pseudo_heads, tokens = seq_len / (2 * pseudo * pseudo);
        m->iha_window = pseudo * (tokens > 1 ? tokens : 1);
    }
    return 0;
}

/* ---- the run ---- */

static bool is_missing(const struct draft *d, int row) {
    const struct train_config *t = &d->config->train;
    if (&config_rows[row] == find_row("train", "steps"))
        return !t->steps && !(t->epochs > 0) && !(t->tokens_per_param > 0);
    return row_is_required(&config_rows[row]) && !d->origin[row] && !size_derives(d, &config_rows[row]);
}

/* The keys that say how long to train: at most one. */
static int check_one_length(const struct draft *d) {
    const struct train_config *t = &d->config->train;
    if (t->steps && t->epochs > 0)
        return fail_at(d, find_row("train", "epochs"),
                       "train.steps = %" PRId64
                       " and train.epochs = %g are both given; keep one, and leave the "
                       "other out or set it to none",
                       t->steps, t->epochs);
    if (t->tokens_per_param > 0 && (t->steps || t->epochs > 0))
        return fail_at(
            d, find_row("train", "tokens_per_param"),
            "train.tokens_per_param = %g and train.%s are both given; keep one, and leave the other "
            "out or set it to none",
            t->tokens_per_param, t->steps ? "steps" : "epochs");
    return 0;
}

int check_required(const struct draft *d) {
    char missing[600] = "";
    size_t used = 0;
    int count = 0;
    for (int i = 0; i < config_row_count; i++)
        if (is_missing(d, i)) {
            used += (size_t)snprintf(
                missing + used, sizeof missing - used, "%s%s.%s%s", count++ ? ", " : "",
                config_rows[i].section, config_rows[i].name,
                row_is_required(&config_rows[i]) ? "" : " (or train.epochs, train.tokens_per_param)");
            if (used >= sizeof missing)
                break;
        }
    if (!count && check_one_length(d) != 0)
        return -1;
    if (!count)
        return 0;
    return fail_at(d, NULL, "missing required %s: %s", count > 1 ? "keys" : "key", missing);
}

int check_positions(const struct draft *d, int64_t seq_len) {
    if (d->config->model.max_position_embeddings >= seq_len)
        return 0;
    const struct config_row *row = find_row("model", "max_position_embeddings");
    if (!was_given(d, row))
        row = find_row("train", "seq_len");
    return fail_at(d, row,
                   "train.seq_len = %lld is longer than model.max_position_embeddings = %lld; make them fit",
                   (long long)seq_len, (long long)d->config->model.max_position_embeddings);
}

int check_tokenizer(const struct draft *d) {
    int64_t vocab_size = d->config->model.vocab_size;
    if (strcmp(d->config->data.tokenizer, "bytes") || vocab_size >= 257)
        return 0;
    return fail_at(
        d, find_row("data", "tokenizer"),
        "tokenizer = bytes needs model.vocab_size >= 257 (256 bytes and an end of document), not %lld",
        (long long)vocab_size);
}

int check_separator(const struct draft *d) {
    int64_t vocab_size = d->config->model.vocab_size, separator = d->config->data.separator;
    if (separator < vocab_size)
        return 0;
    return fail_at(
        d, find_row("data", "separator"),
        "separator = %lld is not below model.vocab_size = %lld; give the id between documents, or auto",
        (long long)separator, (long long)vocab_size);
}

/* Elements of the widest activation of one pass. The limit of 2^44 keeps the bytes of a whole model (about 30
 * such tensors in each of 1024 layers) within an int64. */
int check_widths(const struct draft *d) {
    const struct model_config *m = &d->config->model;
    const struct train_config *t = &d->config->train;
    int64_t widest = m->num_pseudo_heads * m->num_attention_heads * m->head_dim;
    widest = widest > m->hidden_size ? widest : m->hidden_size;
    widest = widest > m->intermediate_size ? widest : m->intermediate_size;
    int64_t tokens =
        t->micro_batch * t->seq_len; /* 0: a checkpoint's configuration, before micro_batch is set */
    if (tokens == 0 || widest <= ((int64_t)1 << 44) / tokens)
        return 0;
    return fail_at(d, find_row("train", "micro_batch"),
                   "micro_batch * seq_len * %lld (the widest activation) is above the limit of 2^44 numbers; "
                   "lower one of them",
                   (long long)widest);
}

/* patience and best_by are about evaluations: there must be some. */
static int check_best(const struct draft *d) {
    const struct config *c = d->config;
    bool evaluates = c->data.val[0] && c->run.eval_every > 0;
    if (c->train.patience > 0 && !evaluates)
        return fail_at(d, find_row("train", "patience"),
                       "patience = %" PRId64 " counts evaluations, and there are none; set data.val and "
                       "run.eval_every",
                       c->train.patience);
    if (c->train.best_by != BEST_BY_LOSS && !evaluates)
        return fail_at(
            d, find_row("train", "best_by"),
            "best_by = %s compares evaluations, and there are none; set data.val and run.eval_every",
            best_by_names[c->train.best_by]);
    return 0;
}

/* The keys of Muon mean nothing to AdamW: only their defaults, which a recorded configuration holds, are accepted. */
static int check_muon_keys(const struct draft *d) {
    const struct train_config *t = &d->config->train;
    struct config initial;
    config_defaults(&initial);
    const char *key = t->muon_lr != t->lr                                             ? "muon_lr"
                      : t->muon_momentum != initial.train.muon_momentum               ? "muon_momentum"
                      : t->muon_momentum_warmup != initial.train.muon_momentum_warmup ? "muon_momentum_warmup"
                                                                                      : NULL;
    if (t->optimizer == OPTIMIZER_MUON || !key)
        return 0;
    return fail_at(
        d, find_row("train", key),
        "train.%s is of train.optimizer = muon, and the optimizer is adamw; set it to muon, or leave "
        "%s out",
        key, key);
}

/* Muon's rate is a multiple of the schedule's. */
static int finish_muon(struct draft *d) {
    struct train_config *t = &d->config->train;
    if (!was_given(d, find_row("train", "muon_lr")))
        t->muon_lr = t->lr;
    if (t->lr == 0 && t->muon_lr > 0 && t->optimizer == OPTIMIZER_MUON)
        return fail_at(d, find_row("train", "muon_lr"),
                       "muon_lr = %g needs lr above 0, whose schedule it follows", t->muon_lr);
    return check_muon_keys(d);
}

/* total_steps, and warmup_steps = auto, which model.size sets; with train.epochs see epochs_to_steps. */
static int finish_steps(struct draft *d) {
    struct train_config *t = &d->config->train;
    const struct config_row *most = find_row("train", "steps");
    double params = t->tokens_per_param > 0 ? (double)config_num_params(&d->config->model) : 0;
    double steps = ceil(t->tokens_per_param * params / (double)t->batch_tokens);
    if (t->tokens_per_param > 0 && steps > most->max)
        return fail_at(d, find_row("train", "tokens_per_param"),
                       "tokens_per_param = %g makes %.0f steps; the limit is %.0f: lower it",
                       t->tokens_per_param, steps, most->max);
    t->total_steps = t->tokens_per_param > 0 ? (int64_t)fmax(1, steps) : t->steps;
    if (d->config->size[0] && !was_given(d, find_row("train", "warmup_steps")))
        t->warmup_steps = -1;
    if (t->warmup_steps < 0 && t->total_steps)
        t->warmup_steps = derived_warmup(t);
    if (t->total_steps && t->warmup_steps > t->total_steps)
        return fail_at(d, find_row("train", "warmup_steps"),
                       "warmup_steps = %lld is above steps = %lld; lower it or train longer",
                       (long long)t->warmup_steps, (long long)t->total_steps);
    return 0;
}

int finish_train(struct draft *d, int ranks) {
    struct train_config *t = &d->config->train;
    const struct config_row *batch = find_row("train", "batch_tokens");
    /* At most 2^16 * 2^24 * 2^22: no overflow. */
    int64_t pass = t->micro_batch * t->seq_len * ranks;
    if (!was_given(d, batch) && !d->config->size[0])
        t->batch_tokens = pass;
    if (pass > (int64_t)batch->max)
        return fail_at(d, find_row("train", "micro_batch"),
                       "micro_batch * seq_len * ranks = %lld tokens in one pass; the limit is %.0f",
                       (long long)pass, batch->max);
    if (t->batch_tokens % pass) {
        int64_t times = (t->batch_tokens + pass / 2) / pass;
        return fail_at(
            d, batch,
            "batch_tokens = %lld is not a multiple of micro_batch * seq_len * ranks = %lld * %lld * "
            "%d = %lld; the nearest that fits is %lld",
            (long long)t->batch_tokens, (long long)t->micro_batch, (long long)t->seq_len, ranks,
            (long long)pass, (long long)((times ? times : 1) * pass));
    }
    if (!was_given(d, find_row("train", "min_lr")))
        t->min_lr = t->lr / 10;
    if (t->min_lr > t->lr)
        return fail_at(d, find_row("train", "min_lr"), "min_lr = %g is above lr = %g; lower it", t->min_lr,
                       t->lr);
    if (finish_steps(d) != 0)
        return -1;
    return finish_muon(d) || check_best(d) || check_widths(d) ? -1 : 0;
}
