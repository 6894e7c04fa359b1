/* The configuration: a file and overrides. What loads is within its ranges and, written key by key, loads again with
 * the same values.
 *
 * Input: the INI file; then overrides, a RECORD_SEPARATOR before each. */
#include "tests/fuzz/config_checks.h"

enum { MAX_OVERRIDES = 128 };

struct overrides {
    char *text[MAX_OVERRIDES];
    int count;
};

static void free_overrides(struct overrides *o) {
    for (int i = 0; i < o->count; i++)
        free(o->text[i]);
    o->count = 0;
}

static void collect(void *context, const char *key, const char *value) {
    struct overrides *o = context;
    size_t bytes = strlen(key) + strlen(value) + 2;
    CHECK(o->count < MAX_OVERRIDES);
    o->text[o->count] = malloc(bytes);
    CHECK(o->text[o->count]);
    snprintf(o->text[o->count++], bytes, "%s=%s", key, value);
}

static void check_run(const struct config *c) {
    const struct train_config *t = &c->train;
    for (int i = 0; i < config_row_count; i++)
        check_row(c, &config_rows[i]);
    check_model(&c->model);
    CHECK(t->seq_len <= c->model.max_position_embeddings);
    CHECK(t->batch_tokens % (t->seq_len * t->micro_batch) == 0);
    CHECK(t->min_lr <= t->lr && (t->total_steps == 0 || t->warmup_steps <= t->total_steps));
    CHECK(*c->data.train && *c->data.tokenizer && *c->run.dir);
    CHECK(strcmp(c->data.tokenizer, "bytes") != 0 || c->model.vocab_size >= 257);
    check_json(&c->model);
    check_costs(&c->model, t->micro_batch, t->seq_len);
}

static void check_again(const struct config *c) {
    static struct config again;
    struct overrides o = {0};
    struct error e = {0};
    config_visit(c, collect, &o);
    CHECK(o.count == config_row_count);
    if (config_load(&again, NULL, o.count, o.text, 1, &e) != 0)
        dprintf(STDERR_FILENO, "%s\n", e.text);
    CHECK(e.exit_code == 0);
    CHECK(memcmp(c, &again, sizeof again) == 0);
    free_overrides(&o);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct config c;
    struct error e = {0};
    struct overrides o = {0};
    size_t at = fuzz_part(data, size);
    const char *path = fuzz_file(0, data, at);
    while (at < size && o.count < 16) {
        size_t length = fuzz_part(data + at + 1, size - at - 1);
        o.text[o.count++] = fuzz_text(data + at + 1, length);
        at += 1 + length;
    }
    if (config_load(&c, path, o.count, o.text, 1, &e) != 0) {
        check_user_error(&e);
    } else {
        check_run(&c);
        check_again(&c);
        if (config_load(&c, path, o.count, o.text, 64, &e) == 0)
            CHECK(c.train.batch_tokens % (64 * c.train.micro_batch * c.train.seq_len) == 0);
        else
            check_user_error(&e);
    }
    /* As eval and generate do it. */
    config_defaults(&c);
    c.model.vocab_size = 300;
    c.model.max_position_embeddings = 64;
    if (config_override(&c, o.count, o.text, &e) == 0)
        CHECK(c.train.seq_len <= 64 && c.model.vocab_size == 300);
    else
        check_user_error(&e);
    free_overrides(&o);
    return 0;
}
