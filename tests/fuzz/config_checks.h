/* Checks that every configuration that loads must pass. */
#ifndef IHA_TESTS_FUZZ_CONFIG_CHECKS_H
#define IHA_TESTS_FUZZ_CONFIG_CHECKS_H

#include "tests/fuzz/fuzz.h"

#include <math.h>

#include "kernels/kernels.h"
#include "model/config/config_internal.h"
#include "model/flops.h"
#include "model/model.h"

static inline void check_row(const struct config *c, const struct config_row *row) {
    const void *at = row_address(c, row);
    int64_t integer;
    double real;
    unsigned index, count = 0;
    switch (row->kind) {
    case KIND_INTEGER:
        memcpy(&integer, at, sizeof integer);
        CHECK((row->zero && integer == row->zero_value) ||
              (integer >= (int64_t)row->min && integer <= (int64_t)row->max));
        break;
    case KIND_REAL:
        memcpy(&real, at, sizeof real);
        if (row->zero && real == 0) /* its word */
            break;
        CHECK(row->open & EXCLUDES_MIN ? real > row->min : real >= row->min);
        CHECK(row->open & EXCLUDES_MAX ? real < row->max : real <= row->max);
        break;
    case KIND_BOOL:
        CHECK(*(const uint8_t *)at <= 1);
        break;
    case KIND_ENUM:
        memcpy(&index, at, sizeof index);
        while (row->values[count])
            count++;
        CHECK(index < count);
        break;
    case KIND_TEXT:
        CHECK(strnlen(at, MAX_TEXT) < MAX_TEXT);
        break;
    case KIND_PATTERN:
        break;
    }
}

static inline void check_model(const struct model_config *m) {
    struct config *c = calloc(1, sizeof *c);
    CHECK(c);
    c->model = *m;
    for (int i = 0; i < config_row_count; i++)
        if (strcmp(config_rows[i].section, "model") == 0)
            check_row(c, &config_rows[i]);
    free(c);
    CHECK(m->iha_window >= 1);
    CHECK(m->position_embedding != POSITION_ROPE || m->head_dim % 2 == 0);
    for (int i = 0; i < MAX_LAYERS; i++) {
        CHECK((unsigned)m->layer_types[i] < LAYER_TYPES);
        CHECK(i >= m->num_hidden_layers || m->causal || !layer_is_local(m->layer_types[i]));
    }
}

/* config.json holds all of a model except the init_* keys. */
static inline void check_json(const struct model_config *m) {
    struct error e = {0};
    struct config *c = calloc(1, sizeof *c);
    CHECK(c);
    char *json = config_model_to_json(m);
    CHECK(json);
    if (config_model_from_json(&c->model, json, "config.json", &e) != 0)
        dprintf(STDERR_FILENO, "%s\n%s\n", e.text, json);
    CHECK(e.exit_code == 0);
    c->model.init_alpha = m->init_alpha;
    c->model.init_collapse = m->init_collapse;
    CHECK(memcmp(&c->model, m, sizeof *m) == 0);
    free(json);
    free(c);
}

/* No size may overflow. The sanitizer checks signed arithmetic; this checks the unsigned sizes. */
static inline void check_costs(const struct model_config *m, int64_t batch, int64_t seq_len) {
    static struct device *dev;
    struct error e = {0};
    struct device_options options = {.threads = 1, .precision = DEVICE_FP32};
    struct pass_shape shape = {batch, seq_len, RECOMPUTE_NONE, true, false, false, false};
    struct memory_plan plan;
    if (!dev)
        dev = kernels_cpu()->open(&options, &e);
    CHECK(dev);
    if (m->num_hidden_layers <= 64) {
        CHECK(model_memory(m, kernels_cpu(), dev, &shape, 1, 0, DTYPE_F32, &plan, &e) == 0);
        double least = 4.0 * (double)m->vocab_size * (double)m->hidden_size;
        CHECK((double)plan.parameters >= least && (double)plan.gradients >= least);
        CHECK((double)plan.optimizer >= 2 * least && (double)plan.optimizer < 0x1p62);
        double most = 0, rows = (double)batch * (double)seq_len; /* what a layer's attention puts out */
        for (int i = 0; i < m->num_hidden_layers; i++)
            if (layer_is_iha(m->layer_types[i]))
                most = 4 * rows * (double)(m->num_pseudo_heads * m->num_attention_heads * m->head_dim);
        CHECK((double)plan.activations >= most && (double)plan.activations >= 4 * rows);
        CHECK((double)plan.activations < 0x1p63 && (double)plan.workspace < 0x1p63);
    }
    struct flops f = flops_per_token(m, seq_len);
    CHECK(isfinite(f.matmul) && f.matmul > 0 && isfinite(f.attention) && f.attention > 0);
}

#endif
