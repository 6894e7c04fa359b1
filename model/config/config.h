/* The configuration of a run: one INI file, overridden key by key from the command line.
 *
 * Everything a user may set is one row of the table in config.c, and only there: its section,
 * name, type, range, default and the sentence that `--help` prints. */
#ifndef IHA_MODEL_CONFIG_CONFIG_H
#define IHA_MODEL_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"

enum { MAX_LAYERS = 1024, MAX_TEXT = 1024 };

enum position_embedding { POSITION_ROPE, POSITION_LEARNED, POSITION_NONE };
enum rope_scaling { ROPE_SCALING_NONE, ROPE_SCALING_LLAMA3 };
enum norm { NORM_RMSNORM, NORM_LAYERNORM };
enum activation { ACTIVATION_GELU_TANH, ACTIVATION_RELU2, ACTIVATION_SWIGLU };
/* In pairs: global, local. */
enum layer_type {
    LAYER_MHA_GLOBAL,
    LAYER_MHA_LOCAL,
    LAYER_IHA_GLOBAL,
    LAYER_IHA_LOCAL,
    LAYER_FOLDED_GLOBAL, /* heads mixed with P = 1 and no collapse, in the weight of qkv */
    LAYER_FOLDED_LOCAL,
    LAYER_DIFF_GLOBAL, /* differential: two attentions of half as many heads, subtracted */
    LAYER_DIFF_LOCAL,
    LAYER_TALKING_GLOBAL, /* heads are mixed before the softmax and after it */
    LAYER_TALKING_LOCAL,
    LAYER_SIMPLICIAL_GLOBAL, /* attention to pairs of keys */
    LAYER_SIMPLICIAL_LOCAL,
    LAYER_TYPES
};
enum qk_norm { QK_NORM_NONE, QK_NORM_RMSNORM };
enum alpha_on { ALPHA_ON_QKV, ALPHA_ON_QK, ALPHA_ON_V };
enum iha_mask { MASK_FLAT, MASK_TOKEN };
enum iha_rope { IHA_ROPE_VIRTUAL, IHA_ROPE_TOKEN };
enum iha_collapse { COLLAPSE_FULL, COLLAPSE_PER_HEAD };
enum init_alpha { ALPHA_IDENTITY, ALPHA_NOISE };
enum init_collapse { COLLAPSE_LAST, COLLAPSE_MEAN };
enum schedule { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD };
enum optimizer { OPTIMIZER_ADAMW, OPTIMIZER_MUON };
enum init_optimizer { OPTIMIZER_FRESH, OPTIMIZER_KEEP };
enum best_by { BEST_BY_LOSS, BEST_BY_ACCURACY, BEST_BY_EXACT };
enum device_kind { DEVICE_AUTO, DEVICE_CPU, DEVICE_CUDA };
enum precision { PRECISION_AUTO, PRECISION_FP32, PRECISION_BF16 };
enum comm_kind { COMM_AUTO, COMM_MPI, COMM_NCCL };
enum graph_use { GRAPH_AUTO, GRAPH_OFF };
enum reduce_dtype { REDUCE_FP32, REDUCE_BF16 };
enum segment_kind { SEGMENTS_NONE, SEGMENTS_DOCUMENTS };
enum separator_at { SEPARATOR_AT_END, SEPARATOR_AT_START };
enum segment_positions { POSITIONS_RESTART, POSITIONS_CONTINUE };
enum packing { PACKING_STREAM, PACKING_FIT };
enum recompute { RECOMPUTE_NONE, RECOMPUTE_LIGHT, RECOMPUTE_FULL };

struct model_config {
    int64_t vocab_size;              /* V */
    int64_t hidden_size;             /* C */
    int64_t num_hidden_layers;       /* L */
    int64_t num_attention_heads;     /* H */
    int64_t num_key_value_heads;     /* G; 0: as num_attention_heads. See config_kv_heads() */
    int64_t head_dim;                /* d */
    int64_t intermediate_size;       /* F */
    int64_t max_position_embeddings; /* tokens */
    enum position_embedding position_embedding;
    double rope_theta;
    enum rope_scaling rope_scaling;
    double rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int64_t rope_original_positions; /* tokens */
    enum norm norm;
    double norm_eps;
    enum qk_norm qk_norm;
    enum activation activation;
    bool bias;
    bool qkv_bias; /* of qkv alone; see config_qkv_bias() */
    bool tie_word_embeddings;
    bool causal;
    enum layer_type layer_types[MAX_LAYERS]; /* layer_pattern, repeated over the layers */
    int64_t local_window;     /* keys per query in local layers but iha_local, itself included */
    int64_t num_pseudo_heads; /* P */
    int64_t iha_window;       /* the same in an iha_local layer, in virtual tokens */
    enum iha_mask iha_mask;
    enum iha_rope iha_rope;
    enum iha_collapse iha_collapse;
    enum alpha_on alpha_on;           /* which of q, k and v are mixed */
    enum init_alpha init_alpha;       /* init_* matter when a run is created, and are not part of */
    enum init_collapse init_collapse; /* what a checkpoint's config.json holds */
};

struct train_config {
    int64_t seq_len;         /* T, tokens */
    int64_t micro_batch;     /* sequences per rank and pass */
    int64_t batch_tokens;    /* per optimizer step, over all ranks */
    int64_t steps;           /* 0: `epochs` and the data, or tokens_per_param, give them */
    double epochs;           /* 0: not given */
    double tokens_per_param; /* 0: not given */
    int64_t total_steps; /* of the run: `steps`, or from the other two; 0: not known until epochs_to_steps */
    double lr, min_lr;
    enum optimizer optimizer;
    double muon_lr; /* peak, with the schedule of lr */
    double muon_momentum;
    int64_t muon_momentum_warmup; /* steps */
    int64_t warmup_steps;         /* -1: auto, until total_steps is known */
    enum schedule schedule;
    double weight_decay, beta1, beta2, eps, grad_clip;
    double mix_lr_scale;
    int64_t seed;
    char init_from[MAX_TEXT]; /* empty: none */
    enum init_optimizer init_optimizer;
    bool resize_vocab; /* init_from may have another vocab_size */
    double skip_zscore;
    int64_t max_skips;
    int64_t patience;     /* evaluations in a row without a better figure that end the run; 0: off */
    enum best_by best_by; /* the figure */
};

struct system_config {
    enum device_kind device;
    enum precision precision;
    enum comm_kind comm;
    int64_t zero_stage;
    enum reduce_dtype reduce_dtype;
    enum recompute recompute;
    bool deterministic;
    enum graph_use graph;
    int64_t threads; /* 0: all */
    double peer_timeout;
};

struct data_config {
    char train[MAX_TEXT], val[MAX_TEXT]; /* globs; empty: none. train may be a mixture: data/mixture.h */
    char tokenizer[MAX_TEXT];            /* "none", "bytes" or a file */
    bool shuffle;
    enum packing packing;
    enum segment_kind segments;
    int64_t separator; /* id; -1: auto, until the data is opened */
    enum separator_at separator_at;
    enum segment_positions segment_positions;
};

struct eval_config {
    char tasks[MAX_TEXT]; /* a glob of choices; empty: none */
    int64_t task_items;   /* of each that are scored at most; 0: all */
};

struct run_config {
    char dir[MAX_TEXT];
    int64_t eval_every, eval_batches, save_every, keep, sample_every, log_every, log_norms_every;
};

struct config {
    char size
        [MAX_TEXT]; /* model.size; empty: none. It is not part of the model, only the keys derived from it are. */
    struct model_config model;
    struct train_config train;
    struct system_config system;
    struct data_config data;
    struct eval_config eval;
    struct run_config run;
};

/* Read an INI file, then apply `count` overrides "section.key=value" in order, fill the defaults
 * that depend on other keys, and check every value and every relation between keys.
 * `path` may be NULL: overrides alone. `ranks` divides batch_tokens.
 * Errors (EXIT_USER) name the file and line or the override, and for an unknown section, key or
 * value the nearest known one. */
int config_load(struct config *c, const char *path, int count, char *const *overrides, int ranks,
                struct error *e);

/* The subset that eval and generate need. Starts from *c as the caller filled it (a checkpoint's model,
 * defaults elsewhere: see config_defaults), applies overrides of every section but [model] (an override
 * of model.* is an error that says the model comes from the checkpoint), and checks their values, but
 * requires no key. */
int config_override(struct config *c, int count, char *const *overrides, struct error *e);

/* Muon's rate as a factor on lr. */
static inline double config_muon_lr_scale(const struct config *c) {
    return c->train.lr > 0 ? c->train.muon_lr / c->train.lr : 1;
}

/* Heads of keys and values. */
static inline int64_t config_kv_heads(const struct model_config *m) {
    return m->num_key_value_heads ? m->num_key_value_heads : m->num_attention_heads;
}

/* Whether qkv has a bias. */
static inline bool config_qkv_bias(const struct model_config *m) {
    return m->bias || m->qkv_bias;
}

/* Every key at its default; required ones zero or empty. */
void config_defaults(struct config *c);

/* The model as a checkpoint's config.json holds it: model_type "iha", every [model] key resolved to its
 * value, `layer_types` (a list of names) instead of `layer_pattern`, no init_* keys.
 * config_model_to_json returns a malloc'd string, pretty-printed, ending in a newline.
 * config_model_from_json checks everything config_load checks (the file may come from anywhere);
 * `where` names the file in errors. Unknown keys are ignored, since other tools add keys. A missing key
 * takes its default where it has one. */
char *config_model_to_json(const struct model_config *m);
int config_model_from_json(struct model_config *m, const char *json, const char *where, struct error *e);

/* Every key of the run as "section.key" -> text, one call of `visit` per key in table order, with the
 * values config_load accepts and resolves to the same configuration. trainer.json stores them, and a resumed
 * run is compared with them. Layers are given as `model.layer_pattern`, one name per layer. */
void config_visit(const struct config *c, void (*visit)(void *context, const char *key, const char *value),
                  void *context);

/* The keys that model.size derives unless they are given, with the values of this configuration; none without a
 * size. */
void config_visit_derived(const struct config *c,
                          void (*visit)(void *context, const char *key, const char *value), void *context);

/* All parameters of a model, embeddings included; 0 when out of memory. */
int64_t config_num_params(const struct model_config *m);

/* The warm-up of warmup_steps = auto in a run of total_steps. */
int64_t derived_warmup(const struct train_config *t);

/* May `section.key` change when a run is resumed? (steps, the schedule's keys, [system] and [run] may.) */
bool config_may_change_on_resume(const char *key);

/* The default of `section.key` as a user would write it; NULL: none, or it depends on other keys. */
const char *config_default(const char *key);

/* All keys with defaults and one-line explanations, for --help. */
void config_print_help(FILE *out);

/* The same as Markdown tables, for docs/configuration.md. */
void config_print_markdown(FILE *out);

extern const char *const recompute_names[]; /* by enum recompute */
extern const char *const best_by_names[];   /* by enum best_by */
const char *layer_type_name(enum layer_type type);
static inline bool layer_is_iha(enum layer_type t) {
    return t == LAYER_IHA_GLOBAL || t == LAYER_IHA_LOCAL;
}
static inline bool layer_is_local(enum layer_type t) {
    return t % 2 == LAYER_MHA_LOCAL;
}
static inline bool layer_is_folded(enum layer_type t) {
    return t == LAYER_FOLDED_GLOBAL || t == LAYER_FOLDED_LOCAL;
}
static inline bool layer_is_talking(enum layer_type t) {
    return t == LAYER_TALKING_GLOBAL || t == LAYER_TALKING_LOCAL;
}
static inline bool layer_is_simplicial(enum layer_type t) {
    return t == LAYER_SIMPLICIAL_GLOBAL || t == LAYER_SIMPLICIAL_LOCAL;
}
/* Heads in qkv: H of q, G of k and of v, and in simplicial layers H of k' and of v'. */
static inline int64_t layer_qkv_heads(const struct model_config *m, enum layer_type t) {
    int64_t H = m->num_attention_heads;
    return H + 2 * config_kv_heads(m) + (layer_is_simplicial(t) ? 2 * H : 0);
}
static inline bool layer_is_diff(enum layer_type t) {
    return t == LAYER_DIFF_GLOBAL || t == LAYER_DIFF_LOCAL;
}

/* The known name nearest to `word` by edit distance, or NULL when none is near enough to be meant. Names
 * are given as a NULL-terminated list. Used for every "did you mean". */
const char *nearest_name(const char *word, const char *const *names);

#endif
