#include "model/info/info.h"

#include <string.h>

#include "model/flops.h"

static const char *human(double n, char out[32]) {
    const char *units[] = {"", "k", "M", "B", "T"};
    int unit = 0;
    for (; n >= 1000 && unit < 4; unit++)
        n /= 1000;
    snprintf(out, 32, unit ? "%.2f%s" : "%.0f%s", n, units[unit]);
    return out;
}

static const char *human_bytes(size_t bytes, char out[32]) {
    bool large = bytes >= (size_t)10e9;
    snprintf(out, 32, "%.1f %s", (double)bytes / (large ? 1e9 : 1e6), large ? "GB" : "MB");
    return out;
}

static void print_model(FILE *out, const struct model_config *m) {
    const char *positions[] = {
        [POSITION_ROPE] = "rope", [POSITION_LEARNED] = "learned", [POSITION_NONE] = "none"};
    const char *norms[] = {[NORM_RMSNORM] = "rmsnorm", [NORM_LAYERNORM] = "layernorm"};
    const char *activations[] = {
        [ACTIVATION_GELU_TANH] = "gelu_tanh", [ACTIVATION_RELU2] = "relu2", [ACTIVATION_SWIGLU] = "swiglu"};
    char kv_heads[32] = "";
    if (config_kv_heads(m) != m->num_attention_heads)
        snprintf(kv_heads, sizeof kv_heads, " (%lld of k, v)", (long long)config_kv_heads(m));
    fprintf(out,
            "Model: %lld layers, hidden %lld, %lld heads x %lld%s, MLP %lld (%s)\n       vocabulary %lld%s, ",
            (long long)m->num_hidden_layers, (long long)m->hidden_size, (long long)m->num_attention_heads,
            (long long)m->head_dim, kv_heads, (long long)m->intermediate_size, activations[m->activation],
            (long long)m->vocab_size, m->tie_word_embeddings ? ", tied embeddings" : "");
    fprintf(out, "%s%s\n       positions: %s, %s\n", norms[m->norm],
            m->bias       ? " with bias"
            : m->qkv_bias ? ", bias of qkv"
                          : "",
            m->rope_scaling == ROPE_SCALING_LLAMA3 ? "rope scaled as in Llama 3"
                                                   : positions[m->position_embedding],
            m->causal ? "causal" : "not causal");
    if (m->qk_norm == QK_NORM_RMSNORM)
        fprintf(out, "       queries and keys normalised by head\n");
    fprintf(out, "       IHA: %lld pseudo-heads, %s mask, %s rope, %s collapse\n\n",
            (long long)m->num_pseudo_heads, m->iha_mask == MASK_FLAT ? "flat" : "token",
            m->iha_rope == IHA_ROPE_VIRTUAL ? "virtual" : "token",
            m->iha_collapse == COLLAPSE_FULL ? "full" : "per-head");
}

static void print_parameters(FILE *out, const struct params *p) {
    static const char *const names[] = {[PART_EMBEDDINGS] = "embeddings",
                                        [PART_ATTENTION] = "attention projections",
                                        [PART_MIX] = "alpha, collapse, lambda, talk",
                                        [PART_MLP] = "MLP",
                                        [PART_NORMS] = "norms",
                                        [PART_HEAD] = "lm_head"};
    char text[32];
    fprintf(out, "Parameters: %s (%lld)\n", human((double)p->num_params, text), (long long)p->num_params);
    for (int part = 0; part < PARAM_PARTS; part++) {
        int64_t count = 0;
        for (int i = 0; i < p->count; i++)
            if ((int)param_part_of(&p->list[i]) == part)
                count += p->list[i].count;
        if (count > 0)
            fprintf(out, "  %-26s %14lld  %5.1f%%\n", names[part], (long long)count,
                    100 * (double)count / (double)p->num_params);
    }
    fputc('\n', out);
}

static void print_schedule(FILE *out, const struct model_config *m, int64_t seq_len) {
    double full = (double)seq_len * (double)seq_len, causal = m->causal ? (full + (double)seq_len) / 2 : full;
    double executed = 0, charged = 0;
    fprintf(out, "Layer schedule at %lld tokens, with the cost of attention:\n", (long long)seq_len);
    fprintf(out, "  %-8s %-17s %10s %10s %10s\n", "layers", "type", "window", "executed", "charged");
    for (int first = 0; first < m->num_hidden_layers;) {
        enum layer_type type = m->layer_types[first];
        int last = first;
        while (last + 1 < m->num_hidden_layers && m->layer_types[last + 1] == type)
            last++;
        double cost = attention_cost(m, type), pairs = cost * attention_pairs(m, type, seq_len),
               charged_pairs = cost * attention_pairs_in_paper(m, type, seq_len);
        char range[32], window[48] = "-";
        snprintf(range, sizeof range, first == last ? "%d" : "%d-%d", first, last);
        if (layer_is_local(type))
            snprintf(window, sizeof window, "%lld",
                     (long long)(layer_is_iha(type) ? m->iha_window : m->local_window));
        fprintf(out, "  %-8s %-17s %10s %10.3f %10.3f\n", range, layer_type_name(type), window,
                pairs / causal, charged_pairs / full);
        executed += (last - first + 1) * pairs / causal;
        charged += (last - first + 1) * charged_pairs / full;
        first = last + 1;
    }
    double L = (double)m->num_hidden_layers;
    fprintf(out, "  %-8s %-17s %10s %10.3f %10.3f\n", "mean", "", "", executed / L, charged / L);
    fprintf(out, "  executed: visible pairs over those of a causal MHA layer; charged: as the\n"
                 "  paper counts, the whole window of every query, over T^2. Windows of IHA layers\n"
                 "  are in virtual tokens (P per token).\n\n");
}

static void print_flops(FILE *out, const struct model_config *m, int64_t seq_len, bool segments) {
    struct flops f = flops_per_token(m, seq_len);
    double total = f.matmul + f.attention + f.mixing;
    char text[32];
    fprintf(out, "FLOPs per token (forward + backward): %s\n", human(total, text));
    fprintf(out, "  %-12s %10s  %5.1f%%   6 x weights of matrices, with the vocabulary\n", "matmul",
            human(f.matmul, text), 100 * f.matmul / total);
    fprintf(out, "  %-12s %10s  %5.1f%%   12 x H x d x visible pairs, over layers\n", "attention",
            human(f.attention, text), 100 * f.attention / total);
    fprintf(out, "  %-12s %10s  %5.1f%%   6 x d x P x (%s H^2 + %s) per IHA layer\n", "mixing",
            human(f.mixing, text), 100 * f.mixing / total,
            m->alpha_on == ALPHA_ON_QKV  ? "3"
            : m->alpha_on == ALPHA_ON_QK ? "2"
                                         : "1",
            m->iha_collapse == COLLAPSE_FULL ? "H^2" : "H");
    if (segments)
        fprintf(out, "  attention is that of a sequence without segments; MFU counts the pairs that\n"
                     "  each step's segments leave visible\n");
    fputc('\n', out);
}

void info_print_memory(FILE *out, const struct config *c, enum dtype compute, const struct memory_plan *p) {
    size_t total = memory_total(p);
    char text[32];
    struct {
        const char *name;
        size_t bytes;
    } rows[] = {{"parameters", p->parameters},   {"gradients", p->gradients}, {"optimizer", p->optimizer},
                {"activations", p->activations}, {"workspace", p->workspace}, {"messages", p->messages}};
    fprintf(out, "Memory for training in %s, %lld x %lld tokens a pass, recompute %s: %s\n",
            compute == DTYPE_BF16 ? "bf16" : "fp32", (long long)c->train.micro_batch,
            (long long)c->train.seq_len, recompute_names[c->system.recompute], human_bytes(total, text));
    size_t count = sizeof rows / sizeof *rows - (p->messages == 0);
    for (size_t i = 0; i < count; i++)
        fprintf(out, "  %-12s %12s\n", rows[i].name, human_bytes(rows[i].bytes, text));
    fprintf(out, "  and %s of host memory for checkpoint snapshots, if available\n",
            human_bytes(p->snapshot, text));
}

/* The memory of one rank by number of ranks and ZeRO stage. */
static int print_ranks(FILE *out, const struct config *c, const struct kernels *k, struct device *dev,
                       const struct pass_shape *shape, struct error *e) {
    fprintf(out,
            "\nMemory of one rank among several, MB (system.zero_stage is %lld):\n  ranks  %10s %10s %10s\n",
            (long long)c->system.zero_stage, "stage 0", "stage 1", "stage 2");
    for (int ranks = 2; ranks <= 64; ranks *= 2) {
        fprintf(out, "  %5d ", ranks);
        for (int stage = 0; stage <= 2; stage++) {
            struct memory_plan plan;
            enum dtype reduce = c->system.reduce_dtype == REDUCE_BF16 ? DTYPE_BF16 : DTYPE_F32;
            if (model_memory(&c->model, k, dev, shape, ranks, stage, reduce, &plan, e) != 0)
                return -1;
            fprintf(out, " %10.1f", (double)memory_total(&plan) / 1e6);
        }
        fprintf(out, "\n");
    }
    return 0;
}

/* Nothing for a checkpoint. */
static void print_steps(FILE *out, const struct train_config *t) {
    if (t->total_steps > 0)
        fprintf(out, "Steps: %lld of %lld tokens", (long long)t->total_steps, (long long)t->batch_tokens);
    else if (t->epochs > 0)
        fprintf(out, "Steps: not known, since data.train cannot be opened here");
    if (t->epochs > 0)
        fprintf(out, ", for train.epochs = %g", t->epochs);
    if (t->tokens_per_param > 0)
        fprintf(out, ", for train.tokens_per_param = %g", t->tokens_per_param);
    if (t->total_steps > 0 || t->epochs > 0)
        fputs("\n\n", out);
}

static void print_derived(void *out, const char *key, const char *value) {
    fprintf(out, "  %-28s %s\n", key, value);
}

static void print_size(FILE *out, const struct config *c) {
    if (!c->size[0])
        return;
    fprintf(out, "model.size = %s; from it, where not given:\n", c->size);
    config_visit_derived(c, print_derived, out);
    fputc('\n', out);
}

int info_print_counts(FILE *out, const struct config *c, struct error *e) {
    struct params params;
    if (params_create(&params, &c->model, 1, e) != 0)
        return -1;
    print_size(out, c);
    print_model(out, &c->model);
    print_parameters(out, &params);
    print_schedule(out, &c->model, c->train.seq_len);
    print_flops(out, &c->model, c->train.seq_len, c->data.segments != SEGMENTS_NONE);
    print_steps(out, &c->train);
    params_free(&params);
    return 0;
}

int info_print(FILE *out, const struct config *c, const struct kernels *k, struct device *dev,
               struct error *e) {
    struct pass_shape shape = pass_shape_of(c, true);
    struct memory_plan memory;
    if (model_memory(&c->model, k, dev, &shape, 1, 0, DTYPE_F32, &memory, e) != 0 ||
        info_print_counts(out, c, e) != 0)
        return -1;
    info_print_memory(out, c, k->dtypes(dev).compute, &memory);
    return print_ranks(out, c, k, dev, &shape, e);
}

void info_print_determinism(FILE *out, const struct model *m) {
    bool printed[LAYER_TYPES] = {false};
    const char *separator = "";
    size_t workspace = 0;
    if (!m->k->attention_backend)
        return;
    fprintf(out, "deterministic: attention");
    for (int layer = 0; layer < m->config.num_hidden_layers; layer++) {
        enum layer_type type = m->config.layer_types[layer];
        const struct layer_specs *specs = &m->specs[layer];
        size_t bytes = 0;
        if (printed[type])
            continue;
        const char *backend = "built-in kernels";
        if (attention_kind(specs) == OP_ATTENTION)
            backend = m->k->attention_backend(m->dev, planned_attention(specs), &bytes);
        fprintf(out, "%s of %s layers by %s", separator, layer_type_name(type), backend);
        if (bytes > 0)
            fprintf(out, " with %.1f MB", (double)bytes / 1e6);
        separator = ",";
        printed[type] = true;
        workspace = bytes > workspace ? bytes : workspace; /* all layers share one workspace */
    }
    fprintf(out, "; %.1f MB of the workspace are for that\n", (double)workspace / 1e6);
    if (m->comm->ranks > 1)
        fprintf(out, "deterministic: gradients are summed in rank order, with %.1f MB for messages\n",
                (double)m->plan.messages / 1e6);
}
