/* trainer.json: counts are counts, and progress comes back the same when it is written. */
#include "tests/fuzz/fuzz.h"

#include <math.h>

#include "model/checkpoint/trainer_state.h"

static void check_setting(void *context, const char *key, const char *value) {
    *(size_t *)context += strlen(key) + strlen(value);
}

static void check_progress(const struct trainer_state *p) {
    static const int64_t most = INT64_C(1) << 53;
    CHECK(p->step >= 0 && p->step < most && p->tokens >= 0 && p->tokens < most);
    CHECK(p->sequences >= 0 && p->sequences < most && p->history.updates >= 0 && p->history.updates < most);
    CHECK(p->history.skips_run >= 0 && p->best_step >= -1 && p->best_step < most);
    CHECK(isfinite(p->seconds) && p->seconds >= 0);
    CHECK(isnan(p->best_value) || isfinite(p->best_value));
    CHECK(p->best_by <= BEST_BY_EXACT && p->evals_since_best >= 0);
    CHECK(strnlen(p->train_fingerprint, 17) < 17 && strnlen(p->val_fingerprint, 17) < 17);
}

static void check_again(const struct trainer_state *p) {
    static struct config c;
    struct trainer_state q;
    struct error e = {0};
    const char *path = fuzz_file(1, NULL, 0);
    config_defaults(&c);
    CHECK(trainer_state_write(path, p, &c, &e) == 0 && trainer_state_read(path, &q, &e) == 0);
    CHECK(p->step == q.step && p->tokens == q.tokens && p->sequences == q.sequences);
    CHECK(p->history.updates == q.history.updates && p->history.skips_run == q.history.skips_run &&
          p->best_step == q.best_step);
    CHECK(p->seconds == q.seconds);
    CHECK(p->best_value == q.best_value || (isnan(p->best_value) && isnan(q.best_value)));
    CHECK(p->best_by == q.best_by && p->evals_since_best == q.evals_since_best);
    CHECK(strcmp(p->train_fingerprint, q.train_fingerprint) == 0);
    CHECK(strcmp(p->val_fingerprint, q.val_fingerprint) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct trainer_state p;
    struct error e = {0};
    size_t letters = 0;
    const char *path = fuzz_file(0, data, size);
    if (trainer_state_read(path, &p, &e) == 0) {
        check_progress(&p);
        check_again(&p);
    } else {
        check_user_error(&e);
    }
    if (settings_visit(path, check_setting, &letters, &e) == 0)
        CHECK(letters <= size);
    else
        check_user_error(&e);
    return 0;
}
