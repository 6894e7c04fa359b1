/* model.size and train.tokens_per_param: the model is as large as asked for whatever the vocabulary and the kind of
 * model, keys that are given keep their values, what is derived loads again, and contradictions are refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "model/config/config.h"
#include "model/params.h"
#include "model/train/schedule.h"

static struct config config;
static struct error error;
enum { MOST = 40 };

static int load(const char *first, va_list more, int ranks) {
    char *overrides[MOST] = {"data.train=x", "run.dir=y"};
    int count = 2;
    for (const char *o = first; o; o = va_arg(more, const char *))
        overrides[count++] = (char *)(uintptr_t)o;
    memset(&error, 0, sizeof error);
    return config_load(&config, NULL, count, overrides, ranks, &error);
}

static void loads_on(int ranks, const char *first, ...) {
    va_list more;
    va_start(more, first);
    if (load(first, more, ranks) != 0)
        fail_msg("did not load: %s", error.text);
    va_end(more);
}
#define loads(...) loads_on(1, __VA_ARGS__)

static void refused(const char *words, const char *first, ...) {
    va_list more;
    va_start(more, first);
    if (load(first, more, 1) == 0)
        fail_msg("accepted, but expected '%s'", words);
    va_end(more);
    if (!strstr(error.text, words))
        fail_msg("expected '%s' in: %s", words, error.text);
    assert_int_equal(error.exit_code, EXIT_USER);
    assert_null(strchr(error.text, '\n'));
}

static double parameters(void) {
    struct params p;
    assert_int_equal(params_create(&p, &config.model, 1, &error), 0);
    double n = (double)p.num_params;
    params_free(&p);
    return n;
}

static void a_model_is_as_large_as_its_size(void **state) {
    (void)state;
    static const struct {
        const char *size;
        double params;
    } sizes[] = {{"model.size=300K", 300e3}, {"model.size=4M", 4e6},     {"model.size=50M", 50e6},
                 {"model.size=124M", 124e6}, {"model.size=1.5B", 1.5e9}, {"model.size=8b", 8e9}};
    static const char *const kinds[][2] = {
        {"model.layer_pattern=mha_global", "model.bias=true"},
        {"model.activation=swiglu", "model.tie_word_embeddings=false"},
        {"model.position_embedding=learned", "model.num_attention_heads=3"},
        {"model.head_dim=128", "model.activation=relu2"},
        {"model.num_hidden_layers=7", "train.seq_len=100"}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
            for (int large = 0; large < 2; large++) {
                if (large && sizes[i].params < 50e6)
                    continue;
                if (kind >= 3 && sizes[i].params < 1e6) /* a head of 128 is too wide, and 7 layers too deep */
                    continue;
                loads(sizes[i].size, large ? "model.vocab_size=50257" : "model.vocab_size=257",
                      "train.steps=100", kinds[kind][0], kinds[kind][1], NULL);
                double n = parameters();
                if (!(n < 1.2 * sizes[i].params && n > sizes[i].params / 1.2))
                    fail_msg("%s %s %s: %.0f parameters", sizes[i].size, kinds[kind][0], kinds[kind][1], n);
                assert_true(config.train.lr > 0 && config.train.lr <= 3e-3 && config.train.warmup_steps == 3);
                assert_int_equal(
                    config.train.batch_tokens % (config.train.micro_batch * config.train.seq_len), 0);
                assert_int_equal(config.model.max_position_embeddings, config.train.seq_len);
            }
}

static void usual_sizes_have_their_usual_shapes(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        loads(i ? "model.size=124M" : "model.size=depth=12", "model.vocab_size=50257", "train.steps=100000",
              "model.layer_pattern=mha_global", NULL);
        const struct model_config *m = &config.model;
        assert_true(m->hidden_size == 768 && m->num_hidden_layers == 12 && m->num_attention_heads == 12 &&
                    m->head_dim == 64 && m->intermediate_size == 3072);
        assert_true(config.train.lr == 6e-4 && config.train.batch_tokens == 1 << 19 &&
                    config.train.seq_len == 1024 && config.train.warmup_steps == 1000);
    }
}

static void given_keys_keep_their_values(void **state) {
    (void)state;
    loads_on(3, "model.size=4M", "model.vocab_size=257", "train.steps=100", "train.lr=0.5",
             "train.warmup_steps=7", "train.micro_batch=5", "train.seq_len=64", "model.hidden_size=192",
             NULL);
    assert_true(config.train.lr == 0.5 && config.train.warmup_steps == 7 && config.train.micro_batch == 5 &&
                config.train.seq_len == 64 && config.model.hidden_size == 192);
    assert_int_equal(config.train.batch_tokens % (3 * 5 * 64), 0);
    loads("model.size=4M", "model.vocab_size=257", "train.steps=100", "train.batch_tokens=5120", NULL);
    assert_true(config.train.batch_tokens == 5120);
    loads("model.size=4M", "model.vocab_size=257", "train.steps=100", "model.max_position_embeddings=50",
          NULL);
    assert_true(config.train.seq_len == 50);
}

struct recorded {
    char *keys[100];
    int count;
};

static void record(void *context, const char *key, const char *value) {
    struct recorded *r = context;
    size_t bytes = strlen(key) + strlen(value) + 2 + strlen("none");
    r->keys[r->count] = malloc(bytes);
    snprintf(r->keys[r->count++], bytes, "%s=%s", key, value);
}

/* A recorded configuration loads, with the size and without, as the same model; config.json does not hold the size. */
static void what_is_derived_loads_again(void **state) {
    (void)state;
    struct recorded r = {0};
    loads("model.size=4M", "model.vocab_size=257", "train.tokens_per_param=20", NULL);
    struct config first = config;
    config_visit(&config, record, &r);
    for (int i = 0; i < 2; i++) {
        if (config_load(&config, NULL, r.count, r.keys, 1, &error) != 0)
            fail_msg("%s", error.text);
        assert_memory_equal(&config.model, &first.model, sizeof first.model);
        assert_true(config.train.total_steps == first.train.total_steps &&
                    config.train.lr == first.train.lr &&
                    config.train.batch_tokens == first.train.batch_tokens);
        for (int k = 0; k < r.count; k++)
            if (strcmp(r.keys[k], "model.size=4M") == 0)
                strcpy(r.keys[k], "model.size=none");
    }
    char *json = config_model_to_json(&first.model);
    assert_non_null(json);
    assert_null(strstr(json, "\"size\""));
    assert_non_null(strstr(json, "\"hidden_size\":\t256"));
    free(json);
    for (int k = 0; k < r.count; k++)
        free(r.keys[k]);
}

static void tokens_per_param_set_the_steps(void **state) {
    (void)state;
    loads("model.vocab_size=257", "model.hidden_size=16", "model.num_hidden_layers=2",
          "model.num_attention_heads=2", "train.seq_len=8", "train.micro_batch=2", "train.lr=1",
          "train.tokens_per_param=2.5", NULL);
    double exact = 2.5 * parameters() / 16;
    assert_true((double)config.train.total_steps >= exact && (double)config.train.total_steps < exact + 1);
    loads("model.size=4M", "model.vocab_size=257", "train.tokens_per_param=20", NULL);
    assert_int_equal(config.train.warmup_steps, (int64_t)(0.03 * (double)config.train.total_steps));
    /* Where the data gives the steps, the warm-up waits for them. */
    loads("model.size=4M", "model.vocab_size=257", "train.epochs=1", NULL);
    assert_int_equal(config.train.warmup_steps, -1);
    assert_int_equal(epochs_to_steps(&config.train, 51200, &error), 0);
    assert_int_equal(config.train.total_steps, 100);
    assert_int_equal(config.train.warmup_steps, 3);
}

static void contradictions_are_refused(void **state) {
    (void)state;
    static const char *const wrong[] = {"model.size=124",    "model.size=M",        "model.size=12MM",
                                        "model.size=-4M",    "model.size=nanM",     "model.size=depth=0",
                                        "model.size=depth=", "model.size=depth=2x", "model.size=large",
                                        "model.size=infB"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        refused("is no size; give a number of parameters", wrong[i], "model.vocab_size=257", "train.steps=1",
                NULL);
    refused("come to", "model.size=124M", "model.vocab_size=257", "train.steps=1", "model.hidden_size=64",
            "model.num_hidden_layers=2", NULL);
    refused("model.size = 1M, but vocab_size = 50257", "model.size=1M", "model.vocab_size=50257",
            "train.steps=1", NULL);
    refused("leave one of them out", "model.size=depth=3", "model.num_hidden_layers=4",
            "model.vocab_size=257", "train.steps=1", NULL);
    refused("hidden_size = 250 is not a multiple of num_attention_heads = 4", "model.size=4M",
            "model.hidden_size=250", "model.num_attention_heads=4", "model.vocab_size=257", "train.steps=1",
            NULL);
    refused("train.tokens_per_param = 20 and train.steps are both given", "model.size=4M",
            "model.vocab_size=257", "train.steps=1", "train.tokens_per_param=20", NULL);
    refused("train.tokens_per_param = 20 and train.epochs are both given", "model.size=4M",
            "model.vocab_size=257", "train.epochs=1", "train.tokens_per_param=20", NULL);
    refused("train.steps (or train.epochs, train.tokens_per_param)", "model.size=4M", "model.vocab_size=257",
            NULL);
    refused("model.size = depth=1 derives model.num_attention_heads = 65536", "model.size=depth=1",
            "model.hidden_size=65536", "model.head_dim=1", "model.vocab_size=257", "train.steps=1", NULL);
    refused("makes", "model.size=4M", "model.vocab_size=257", "train.tokens_per_param=1e9", NULL);
    refused("missing required key: model.vocab_size", "model.size=4M", "train.steps=1", NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_model_is_as_large_as_its_size),
        cmocka_unit_test(usual_sizes_have_their_usual_shapes),
        cmocka_unit_test(given_keys_keep_their_values),
        cmocka_unit_test(what_is_derived_loads_again),
        cmocka_unit_test(tokens_per_param_set_the_steps),
        cmocka_unit_test(contradictions_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
