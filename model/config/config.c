/* The table of all configuration keys, --help, and which keys may change on resume.
 *
 * To add a key: add the field to config.h and one row here. config_values.c converts between text and value,
 * config_load.c reads files and overrides, config_check.c checks relations between keys, config_json.c reads
 * and writes config.json. Each of these files calls only those named before it. */
#include "model/config/config_internal.h"

#include <string.h>

#define NAMES(...) ((const char *const[]){__VA_ARGS__, NULL})
#define AT(field) offsetof(struct config, field)
/* An enum is stored through an unsigned of the same size. */
_Static_assert(sizeof(enum norm) == sizeof(unsigned), "enums are read and written as unsigned");

const char *const config_layer_type_names[] = {[LAYER_MHA_GLOBAL] = "mha_global",
                                               [LAYER_MHA_LOCAL] = "mha_local",
                                               [LAYER_IHA_GLOBAL] = "iha_global",
                                               [LAYER_IHA_LOCAL] = "iha_local",
                                               [LAYER_FOLDED_GLOBAL] = "folded_global",
                                               [LAYER_FOLDED_LOCAL] = "folded_local",
                                               [LAYER_DIFF_GLOBAL] = "diff_global",
                                               [LAYER_DIFF_LOCAL] = "diff_local",
                                               [LAYER_TALKING_GLOBAL] = "talking_global",
                                               [LAYER_TALKING_LOCAL] = "talking_local",
                                               [LAYER_SIMPLICIAL_GLOBAL] = "simplicial_global",
                                               [LAYER_SIMPLICIAL_LOCAL] = "simplicial_local",
                                               NULL};
const char *const recompute_names[] = {
    [RECOMPUTE_NONE] = "none", [RECOMPUTE_LIGHT] = "light", [RECOMPUTE_FULL] = "full", NULL};
const char *const best_by_names[] = {
    [BEST_BY_LOSS] = "loss", [BEST_BY_ACCURACY] = "accuracy", [BEST_BY_EXACT] = "exact", NULL};
const char *const config_sections[] = {"model", "train", "system", "data", "eval", "run", NULL};

/* The upper limits are far beyond any real model, and low enough that no product of sizes (parameters,
 * bytes, tokens of a whole run) overflows an int64; see also check_widths in config_check.c. */
#define TWO(n) ((double)(1LL << (n)))

#define INTEGER(low, high) .kind = KIND_INTEGER, .min = (low), .max = (high)
#define REAL(low, high) .kind = KIND_REAL, .min = (low), .max = (high)
#define ENUM(...) .kind = KIND_ENUM, .values = NAMES(__VA_ARGS__)

#define MODEL(field) .section = "model", .name = #field, .offset = AT(model.field)
#define TRAIN(field) .section = "train", .name = #field, .offset = AT(train.field)
#define SYSTEM(field) .section = "system", .name = #field, .offset = AT(system.field), .may_change = true
#define DATA(field) .section = "data", .name = #field, .offset = AT(data.field)
#define EVAL(field) .section = "eval", .name = #field, .offset = AT(eval.field), .may_change = true
#define RUN(field) .section = "run", .name = #field, .offset = AT(run.field), .may_change = true

const struct config_row config_rows[] = {
    {.section = "model",
     .name = "size",
     .offset = AT(size),
     .kind = KIND_TEXT,
     .zero = "none",
     .initial = "none",
     .may_change = true,
     .help = "parameters in all, such as 4M, 124M, 1.5B, or depth=N:\nderives the keys marked [size] unless "
             "they are given"},
    {MODEL(vocab_size), INTEGER(1, TWO(31) - 1), .help = "token ids, without padding (V)"},
    {MODEL(hidden_size), INTEGER(1, TWO(20)), .help = "width of the residual stream (C) [size]"},
    {MODEL(num_hidden_layers), INTEGER(1, MAX_LAYERS), .help = "transformer blocks (L) [size]"},
    {MODEL(num_attention_heads), INTEGER(1, 4096), .help = "attention heads (H) [size]"},
    {MODEL(num_key_value_heads), INTEGER(1, 4096), .derived = "H",
     .help = "heads of keys and values, a divisor of H"},
    {MODEL(head_dim), INTEGER(1, 4096), .derived = "C/H", .help = "width of one head (d) [size]"},
    {MODEL(intermediate_size), INTEGER(1, TWO(24)), .derived = "4C", .help = "width of the MLP (F) [size]"},
    {MODEL(max_position_embeddings), INTEGER(1, TWO(24)), .derived = "seq_len",
     .help = "longest sequence the model takes, in tokens"},
    {MODEL(position_embedding),
     ENUM([POSITION_ROPE] = "rope", [POSITION_LEARNED] = "learned", [POSITION_NONE] = "none"),
     .initial = "rope", .help = "how positions are encoded"},
    {MODEL(rope_theta), REAL(0, 1e15), .open = EXCLUDES_MIN, .initial = "10000", .help = "RoPE's base"},
    {MODEL(rope_scaling), ENUM([ROPE_SCALING_NONE] = "none", [ROPE_SCALING_LLAMA3] = "llama3"),
     .initial = "none", .help = "llama3: lower low frequencies by rope_factor"},
    {MODEL(rope_factor), REAL(1, 1e9), .initial = "8", .help = "of rope_scaling = llama3"},
    {MODEL(rope_low_freq_factor), REAL(0, 1e9), .open = EXCLUDES_MIN, .initial = "1",
     .help = "wavelengths above positions / this are scaled"},
    {MODEL(rope_high_freq_factor), REAL(0, 1e9), .open = EXCLUDES_MIN, .initial = "4",
     .help = "wavelengths below positions / this are not"},
    {MODEL(rope_original_positions), INTEGER(1, TWO(24)), .initial = "8192",
     .help = "positions before scaling, in tokens"},
    {MODEL(norm), ENUM([NORM_RMSNORM] = "rmsnorm", [NORM_LAYERNORM] = "layernorm"), .initial = "rmsnorm",
     .help = "normalisation layers"},
    {MODEL(norm_eps), REAL(1e-30, 1), .initial = "1e-5", .help = "added to the variance in a norm"},
    {MODEL(qk_norm), ENUM([QK_NORM_NONE] = "none", [QK_NORM_RMSNORM] = "rmsnorm"), .initial = "none",
     .help = "of heads of q and k, before mixing and RoPE"},
    {MODEL(activation),
     ENUM([ACTIVATION_GELU_TANH] = "gelu_tanh", [ACTIVATION_RELU2] = "relu2", [ACTIVATION_SWIGLU] = "swiglu"),
     .initial = "gelu_tanh", .help = "swiglu adds a gate matrix"},
    {MODEL(bias), .kind = KIND_BOOL, .initial = "false",
     .help = "bias of qkv, out, up, down and of layernorm"},
    {MODEL(qkv_bias), .kind = KIND_BOOL, .initial = "false", .help = "bias of qkv, also without `bias`"},
    {MODEL(tie_word_embeddings), .kind = KIND_BOOL, .initial = "true",
     .help = "classifier and embedding share one matrix"},
    {MODEL(causal), .kind = KIND_BOOL, .initial = "true", .help = "no attention to later tokens"},
    {.section = "model",
     .name = "layer_pattern",
     .kind = KIND_PATTERN,
     .initial = "iha_local*4 mha_global",
     .help = "layer types, repeated up to num_hidden_layers:\n"
             "mha, iha, folded, diff, talking, simplicial, each with\n_global or _local and an optional *N"},
    {MODEL(local_window), INTEGER(1, TWO(40)), .initial = "512",
     .help = "keys per query in local layers other than iha_local,\nitself included"},
    {MODEL(num_pseudo_heads), INTEGER(1, 4096), .initial = "2", .help = "pseudo-heads per head (P)"},
    {MODEL(iha_window), INTEGER(1, TWO(40)), .zero = "auto", .initial = "auto",
     .help =
         "keys per query in iha_local layers, in virtual tokens;\nauto: max(P, P*floor(seq_len/(2*P*P)))"},
    {MODEL(iha_mask), ENUM([MASK_FLAT] = "flat", [MASK_TOKEN] = "token"), .initial = "flat",
     .help = "causal over virtual or over whole tokens"},
    {MODEL(iha_rope), ENUM([IHA_ROPE_VIRTUAL] = "virtual", [IHA_ROPE_TOKEN] = "token"), .initial = "virtual",
     .help = "position that RoPE rotates by"},
    {MODEL(iha_collapse), ENUM([COLLAPSE_FULL] = "full", [COLLAPSE_PER_HEAD] = "per_head"), .initial = "full",
     .help = "over all heads or within each head"},
    {MODEL(alpha_on), ENUM([ALPHA_ON_QKV] = "qkv", [ALPHA_ON_QK] = "qk", [ALPHA_ON_V] = "v"),
     .initial = "qkv", .help = "which of q, k, v are mixed"},
    {MODEL(init_alpha), ENUM([ALPHA_IDENTITY] = "identity", [ALPHA_NOISE] = "noise"), .initial = "identity",
     .help = "initial alpha"},
    {MODEL(init_collapse), ENUM([COLLAPSE_LAST] = "last", [COLLAPSE_MEAN] = "mean"), .initial = "last",
     .help = "initial collapse"},

    {TRAIN(seq_len), INTEGER(1, TWO(24)), .help = "tokens of a training sequence (T) [size]"},
    {TRAIN(micro_batch), INTEGER(1, TWO(16)), .help = "sequences per rank and pass [size]"},
    {TRAIN(batch_tokens), INTEGER(1, TWO(32)), .derived = "one pass",
     .help = "tokens per optimizer step over all ranks;\na multiple of micro_batch*seq_len*ranks [size]"},
    {TRAIN(steps), INTEGER(1, TWO(30)), .zero = "none", .initial = "none", .may_change = true,
     .help = "optimizer steps of the whole run;\nexactly one of steps, epochs, tokens_per_param is given"},
    {TRAIN(epochs), REAL(0, 1e9), .open = EXCLUDES_MIN, .zero = "none", .initial = "none", .may_change = true,
     .help = "passes over the training data instead of steps;\nmay be a fraction; steps are rounded up"},
    {TRAIN(tokens_per_param), REAL(0, 1e9), .open = EXCLUDES_MIN, .zero = "none", .initial = "none",
     .may_change = true,
     .help = "tokens of training per parameter instead of steps,\nsuch as 20; steps are rounded up"},
    {TRAIN(lr), REAL(0, 1000), .may_change = true, .help = "peak learning rate [size]"},
    {TRAIN(min_lr), REAL(0, 1000), .derived = "lr/10", .may_change = true,
     .help = "learning rate at the end of the schedule"},
    {TRAIN(warmup_steps), INTEGER(0, TWO(30)), .zero = "auto", .zero_value = -1, .initial = "0",
     .may_change = true,
     .help = "steps of linear warm-up to lr;\nauto, which size sets: 3 % of all, at most 1000"},
    {TRAIN(schedule),
     ENUM([SCHEDULE_COSINE] = "cosine", [SCHEDULE_LINEAR] = "linear", [SCHEDULE_CONSTANT] = "constant",
          [SCHEDULE_WSD] = "wsd"),
     .initial = "cosine", .may_change = true, .help = "decay from lr to min_lr"},
    {TRAIN(optimizer), ENUM([OPTIMIZER_ADAMW] = "adamw", [OPTIMIZER_MUON] = "muon"), .initial = "adamw",
     .help = "muon: AdamW for all but the\nmatrices of attention and MLP"},
    {TRAIN(muon_lr), REAL(0, 1000), .derived = "lr", .may_change = true,
     .help = "Muon's peak learning rate, on the same schedule"},
    {TRAIN(muon_momentum), REAL(0, 1), .open = EXCLUDES_MAX, .initial = "0.95",
     .help = "Muon's Nesterov momentum"},
    {TRAIN(muon_momentum_warmup), INTEGER(0, TWO(30)), .initial = "300", .may_change = true,
     .help = "steps over which momentum rises from 0.85\n(or muon_momentum, if that is less); 0: none"},
    {TRAIN(weight_decay), REAL(0, 1000), .initial = "0.1", .help = "decoupled weight decay of matrices"},
    {TRAIN(beta1), REAL(0, 1), .open = EXCLUDES_MAX, .initial = "0.9",
     .help = "AdamW's decay rate of the first moment"},
    {TRAIN(beta2), REAL(0, 1), .open = EXCLUDES_MAX, .initial = "0.95",
     .help = "AdamW's decay rate of the second moment"},
    {TRAIN(eps), REAL(1e-30, 1), .initial = "1e-8", .help = "added to AdamW's denominator"},
    {TRAIN(grad_clip), REAL(0, 1e9), .initial = "1.0", .help = "largest gradient norm; 0: no clipping"},
    {TRAIN(mix_lr_scale), REAL(0, 1e6), .initial = "1",
     .help = "factor on lr for alpha, collapse, lambda, talk"},
    {TRAIN(seed), INTEGER(0, TWO(53)), .initial = "1",
     .help = "random seed of initialisation and data order"},
    {TRAIN(init_from), .kind = KIND_TEXT, .zero = "none", .initial = "none",
     .help = "a checkpoint to start a new run from"},
    {TRAIN(init_optimizer), ENUM([OPTIMIZER_FRESH] = "fresh", [OPTIMIZER_KEEP] = "keep"), .initial = "fresh",
     .help = "the optimizer's moments, with init_from"},
    {TRAIN(resize_vocab), .kind = KIND_BOOL, .initial = "false",
     .help =
         "init_from may have another vocab_size:\nnew rows are the mean of the old, surplus ones left out"},
    {TRAIN(skip_zscore), REAL(0, 1e9), .initial = "0",
     .help = "skip steps whose gradient norm is this many standard\ndeviations above its mean; 0: only "
             "non-finite steps"},
    {TRAIN(max_skips), INTEGER(0, TWO(30)), .initial = "10",
     .help = "most skipped steps in a row; one more ends the run\nwith an error"},
    {TRAIN(patience), INTEGER(0, TWO(30)), .initial = "0", .may_change = true,
     .help = "end the run after this many evaluations in a row\nwithout improvement in best_by; 0: never"},
    {TRAIN(best_by), .kind = KIND_ENUM, .values = best_by_names, .initial = "loss",
     .help = "figure that chooses the best\ncheckpoint; accuracy and exact are of labelled data.val"},

    {SYSTEM(device), ENUM([DEVICE_AUTO] = "auto", [DEVICE_CPU] = "cpu", [DEVICE_CUDA] = "cuda"),
     .initial = "auto", .help = "where to compute"},
    {SYSTEM(precision), ENUM([PRECISION_AUTO] = "auto", [PRECISION_FP32] = "fp32", [PRECISION_BF16] = "bf16"),
     .initial = "auto",
     .help = "data type of activations and matmuls;\nauto: bf16 on GPUs and CPUs with avx512_bf16 or "
             "amx_bf16,\notherwise fp32; chosen when a run is created"},
    {SYSTEM(comm), ENUM([COMM_AUTO] = "auto", [COMM_MPI] = "mpi", [COMM_NCCL] = "nccl"), .initial = "auto",
     .help = "communication between ranks"},
    {SYSTEM(zero_stage), INTEGER(0, 2), .initial = "1",
     .help = "shard over ranks: 1 optimizer state, 2 also gradients"},
    {SYSTEM(reduce_dtype), ENUM([REDUCE_FP32] = "fp32", [REDUCE_BF16] = "bf16"), .initial = "fp32",
     .help = "data type of the gradient reduction over ranks"},
    {SYSTEM(recompute), .kind = KIND_ENUM, .values = recompute_names, .initial = "none",
     .help = "activations that backward recomputes\nto save memory"},
    {SYSTEM(deterministic), .kind = KIND_BOOL, .initial = "false",
     .help = "bit-identical results in every run on cuda"},
    {SYSTEM(graph), ENUM([GRAPH_AUTO] = "auto", [GRAPH_OFF] = "off"), .initial = "auto",
     .help = "capture a pass as a CUDA graph,\nwhere the driver supports it"},
    {SYSTEM(threads), INTEGER(1, 4096), .zero = "all", .initial = "all", .help = "CPU threads per rank"},
    {SYSTEM(peer_timeout), REAL(0, 1e9), .open = EXCLUDES_MIN, .initial = "300",
     .help = "seconds to wait for another rank"},

    {DATA(train), .kind = KIND_TEXT,
     .help = "glob of training shards, or several with their\nshares: 0.7 a/*.bin, 0.3 b/*.bin"},
    {DATA(val), .kind = KIND_TEXT, .zero = "none", .initial = "none", .help = "glob of validation shards"},
    {DATA(tokenizer), .kind = KIND_TEXT, .initial = "none",
     .help = "none|bytes|FILE, for samples;\nnone: samples are printed as token ids"},
    {DATA(shuffle), .kind = KIND_BOOL, .initial = "true", .help = "training sequences in random order"},
    {DATA(packing), ENUM([PACKING_STREAM] = "stream", [PACKING_FIT] = "fit"), .initial = "stream",
     .help = "stream: one stream, cut into sequences;\nfit: whole documents, padded"},
    {DATA(segments), ENUM([SEGMENTS_NONE] = "none", [SEGMENTS_DOCUMENTS] = "documents"), .initial = "none",
     .help = "boundaries that attention does not cross"},
    {DATA(separator), INTEGER(0, TWO(31) - 1), .zero = "auto", .zero_value = -1, .initial = "auto",
     .help = "token id between documents;\nauto: from dataset.json or the tokenizer"},
    {DATA(separator_at), ENUM([SEPARATOR_AT_END] = "end", [SEPARATOR_AT_START] = "start"), .initial = "end",
     .help = "a document ends or begins with its separator"},
    {DATA(segment_positions), ENUM([POSITIONS_RESTART] = "restart", [POSITIONS_CONTINUE] = "continue"),
     .initial = "restart", .help = "positions in each segment"},

    {EVAL(tasks), .kind = KIND_TEXT, .zero = "none", .initial = "none",
     .help = "glob of choices, which data/prepare.py --choices\nmakes, for each evaluation"},
    {EVAL(task_items), INTEGER(0, TWO(30)), .initial = "0",
     .help = "items of each file that are scored; 0: all"},

    {RUN(dir), .kind = KIND_TEXT, .help = "where checkpoints and metrics go"},
    {RUN(eval_every), INTEGER(0, TWO(30)), .initial = "0", .help = "steps between evaluations; 0: never"},
    {RUN(eval_batches), INTEGER(0, TWO(40)), .initial = "0",
     .help = "batches per evaluation; 0: the whole set"},
    {RUN(save_every), INTEGER(0, TWO(30)), .initial = "0",
     .help = "steps between checkpoints; 0: only the last step"},
    {RUN(keep), INTEGER(0, TWO(30)), .initial = "2",
     .help = "newest checkpoints to keep; 0: never delete one"},
    {RUN(sample_every), INTEGER(0, TWO(30)), .initial = "0", .help = "steps between samples; 0: never"},
    {RUN(log_every), INTEGER(0, TWO(30)), .initial = "1", .help = "steps between status lines; 0: never"},
    {RUN(log_norms_every), INTEGER(0, TWO(30)), .initial = "0",
     .help = "steps between norms of gradients and weights by\npart of the model in metrics.jsonl; 0: never"},
};
const int config_row_count = sizeof config_rows / sizeof *config_rows;
_Static_assert(sizeof config_rows / sizeof *config_rows <= MAX_ROWS, "struct draft has too few origins");

const char *layer_type_name(enum layer_type type) {
    return config_layer_type_names[type];
}

const struct config_row *find_row(const char *section, const char *name) {
    for (int i = 0; i < config_row_count; i++)
        if (!strcmp(config_rows[i].section, section) && !strcmp(config_rows[i].name, name))
            return &config_rows[i];
    return NULL;
}

static const struct config_row *row_of_key(const char *key) {
    for (int i = 0; i < config_row_count; i++) {
        const struct config_row *row = &config_rows[i];
        size_t n = strlen(row->section);
        if (!strncmp(key, row->section, n) && key[n] == '.' && !strcmp(key + n + 1, row->name))
            return row;
    }
    return NULL;
}

bool config_may_change_on_resume(const char *key) {
    const struct config_row *row = row_of_key(key);
    return row && row->may_change;
}

const char *config_default(const char *key) {
    const struct config_row *row = row_of_key(key);
    return row ? row->initial : NULL;
}

void config_print_help(FILE *out) {
    const char *section = "";
    fputs("The file is INI: [section] lines, key = value lines, comments after # or ;.\n"
          "Any key can be overridden on the command line as section.key=value.\n",
          out);
    for (int i = 0; i < config_row_count; i++) {
        const struct config_row *row = &config_rows[i];
        if (strcmp(section, row->section))
            fprintf(out, "\n[%s]%*sdefault\n", row->section, (int)(25 - strlen(row->section)), "");
        section = row->section;
        fprintf(out, "  %-24s %-24s", row->name,
                row->derived   ? row->derived
                : row->initial ? row->initial
                               : "(required)");
        for (int k = 0; row->values && row->values[k]; k++)
            fprintf(out, "%s%s", row->values[k], row->values[k + 1] ? "|" : ": ");
        if (row->kind == KIND_BOOL)
            fputs("true|false: ", out);
        for (const char *p = row->help; *p; p++) /* indent further lines of help */
            if (*p == '\n')
                fprintf(out, "\n%51s", "");
            else
                fputc(*p, out);
        fputc('\n', out);
    }
}
