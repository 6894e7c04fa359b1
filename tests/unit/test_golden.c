/* The model in fp32 against an independent float64 reference (tests/reference/), case by case: loss, logits
 * and every gradient. The tolerance is not picked by hand: the error may be at most three times that of the
 * plain computation of the same formulas in fp32, which the golden file records (the largest of eight
 * equivalent orders of summation), or a few roundings of the result where that plain error happens to be
 * smaller still. */
#include "tests/lib/model_fixture.h"

#include <glob.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/safetensors.h"

static const double FACTOR = 3;
static const double ROUNDINGS = 4 * 1.2e-7; /* of the norm of the result */

struct golden {
    char name[256];
    struct safetensors file;
    struct model_config config;
};

static const struct safetensors_entry *entry(const struct golden *g, const char *name) {
    const struct safetensors_entry *s = safetensors_find(&g->file, name);
    if (!s)
        fail_msg("%s: no tensor %s", g->name, name);
    return s;
}

static double scalar(const struct golden *g, const char *name) {
    return *(const double *)entry(g, name)->data;
}

static void open_golden(struct golden *g, const char *json_path) {
    struct error e = {0};
    char *json;
    size_t length;
    snprintf(g->name, sizeof g->name, "%s", json_path);
    if (files_read_all(json_path, 1 << 20, &json, &length, &e) != 0 ||
        config_model_from_json(&g->config, json, json_path, &e) != 0)
        fail_msg("%s", e.text);
    free(json);
    strcpy(strstr(g->name, ".json"), ".safetensors");
    if (safetensors_open(&g->file, g->name, &e) != 0)
        fail_msg("%s", e.text);
}

static void load_params(struct model *m, const struct golden *g) {
    for (int i = 0; i < m->params.count; i++) {
        char name[128];
        snprintf(name, sizeof name, "param.%s", m->params.list[i].name);
        const struct safetensors_entry *s = entry(g, name);
        assert_int_equal(s->bytes, (size_t)m->params.list[i].count * sizeof(float));
        model_set_param(m, i, s->data, 0);
    }
}

/* whole: the norm of all gradients, against which a gradient that is exactly zero is judged. (Where a query
 * sees one key only, softmax has no gradient; the fused kernel subtracts <dO,O> from dO v, two sums of the
 * same numbers in different orders, and leaves a rounding.) */
static void compare(const struct golden *g, const char *what, const float *got, const double *want, int64_t n,
                    double plain_error, double whole) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += want[i] * want[i];
    }
    error = sqrt(error);
    norm = norm > 0 ? sqrt(norm) : whole;
    if (!(error <= fmax(FACTOR * plain_error, ROUNDINGS * norm)))
        fail_msg("%s: %s: error %.3g, plain fp32 %.3g, norm %.3g", g->name, what, error, plain_error, norm);
}

static void compare_logits(struct model *m, const struct golden *g, struct batch batch) {
    const struct safetensors_entry *want = entry(g, "logits");
    int64_t rows = m->shape.batch * m->shape.tokens, V = m->config.vocab_size;
    float *logits = calloc((size_t)(rows * V), sizeof *logits);
    struct linear_spec spec = {rows, m->config.hidden_size, V};
    model_upload(m, batch);
    model_forward(m);
    m->k->linear(m->dev, &spec, m->h, model_param(m, m->params.lm_head), tensor_none(),
                 tensor_of(logits, DTYPE_F32, rows, V, 0, 0, 0));
    compare(g, "logits", logits, want->data, rows * V, scalar(g, "plain32.logits"), 0);
    free(logits);
}

static double norm_of_all_gradients(const struct golden *g) {
    double sum = 0;
    for (int i = 0; i < g->file.count; i++) {
        const struct safetensors_entry *s = &g->file.entries[i];
        if (strncmp(s->name, "grad.", 5) == 0)
            for (size_t j = 0; j < s->bytes / sizeof(double); j++)
                sum += ((const double *)s->data)[j] * ((const double *)s->data)[j];
    }
    return sqrt(sum);
}

static void compare_gradients(struct model *m, const struct golden *g) {
    double whole = norm_of_all_gradients(g);
    for (int i = 0; i < m->params.count; i++) {
        char name[128], plain[160];
        snprintf(name, sizeof name, "grad.%s", m->params.list[i].name);
        snprintf(plain, sizeof plain, "plain32.%s", name);
        compare(g, name, model_gradient(m, i).data, entry(g, name)->data, m->params.list[i].count,
                scalar(g, plain), whole);
    }
}

static void check_golden(const char *json_path, enum recompute recompute) {
    struct golden g;
    open_golden(&g, json_path);
    const struct safetensors_entry *tokens = entry(&g, "tokens"), *targets = entry(&g, "targets");
    const struct safetensors_entry *segments = safetensors_find(&g.file, "segments");
    struct batch batch = {tokens->data, targets->data, segments ? segments->data : NULL};
    bool restart = segments && *(const int32_t *)entry(&g, "restart_positions")->data;
    int64_t B = tokens->shape[0], T = tokens->shape[1], counted = 0;
    for (int64_t i = 0; i < B * T; i++)
        counted += batch.targets[i] >= 0;
    struct model m;
    fixture_model(&m, &g.config,
                  (struct pass_shape){B, T, recompute, true, segments != NULL, restart, false});
    load_params(&m, &g);
    double loss = fixture_batch_loss(&m, batch, 1.0 / (double)counted);
    compare(&g, "loss", &(float){(float)loss}, entry(&g, "loss")->data, 1, scalar(&g, "plain32.loss"), 0);
    compare_gradients(&m, &g);
    compare_logits(&m, &g, batch);
    model_free(&m);
    safetensors_close(&g.file);
}

static void every_golden_case(void **state) {
    (void)state;
    glob_t found;
    assert_int_equal(glob("tests/golden/model_*.json", 0, NULL, &found), 0);
    assert_true(found.gl_pathc >= 41);
    for (size_t i = 0; i < found.gl_pathc; i++)
        for (int recompute = RECOMPUTE_NONE; recompute <= RECOMPUTE_FULL; recompute++)
            check_golden(found.gl_pathv[i], (enum recompute)recompute);
    globfree(&found);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_golden_case)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
