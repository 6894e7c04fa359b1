/* config.json: a model that is read is a legal one, and comes back the same when it is written; and one that
 * no machine could hold is refused before its sizes overflow. */
#include "tests/fuzz/config_checks.h"

/* As the commands on a checkpoint do it: overrides, here none, and all checks that follow. */
static void check_use(const struct model_config *m) {
    static struct config c;
    struct error e = {0};
    config_defaults(&c);
    c.model = *m;
    c.train.seq_len = m->max_position_embeddings;
    c.train.micro_batch = 1;
    if (config_override(&c, 0, NULL, &e) == 0)
        check_costs(m, 1, m->max_position_embeddings);
    else
        check_user_error(&e);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct model_config m;
    struct error e = {0};
    char *text = fuzz_text(data, size);
    if (config_model_from_json(&m, text, "config.json", &e) == 0) {
        check_model(&m);
        check_json(&m);
        check_use(&m);
    } else {
        check_user_error(&e);
    }
    free(text);
    return 0;
}
