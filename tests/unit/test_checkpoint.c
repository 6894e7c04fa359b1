/* Checkpoints: resuming restores every bit, so that training continues as if it had not stopped; which
 * checkpoints are kept; a damaged one is skipped; one of another run is refused; a failed save leaves earlier
 * ones unchanged.
 *
 * Everything happens in a temporary directory that is the current one while the tests run. */
#define FIXTURE_THREADS 1
#include "tests/lib/model_fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "model/checkpoint/checkpoint.h"
#include "model/checkpoint/files.h"
#include "tests/lib/save_checkpoint.h"
#include "tests/lib/temporary_directory.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))

static const char WEIGHTS[] = "model.safetensors", OPTIMIZER[] = "optimizer-00000-of-00001.safetensors";

/* Replaces the C library's fsync: fails with ENOSPC from the call `sync_fails_at` on (counted from 1). */
static int sync_calls, sync_fails_at;

int fsync(int fd) {
    if (++sync_calls >= sync_fails_at && sync_fails_at > 0) {
        errno = ENOSPC;
        return -1;
    }
    return (int)syscall(SYS_fsync, fd);
}

/* ---- a run ---- */

/* Every test has its own run directory, named after it. */
struct run {
    char dir[64];
    struct config config;
    struct model model;
    struct trainer_state trainer;
};

static void load_config(struct config *c, const char *extra) {
    static char *const base[] = {
        "model.vocab_size=30",
        "model.hidden_size=12",
        "model.num_hidden_layers=2",
        "data.train=x.bin",
        "train.seq_len=6",
        "train.micro_batch=2",
        "train.steps=100",
        "train.lr=0.003",
        "run.dir=x",
        "model.local_window=3",
        "model.num_attention_heads=3",
        "model.layer_pattern=iha_local mha_global",
    };
    char *overrides[COUNT(base) + 1];
    struct error e = {0};
    memcpy(overrides, base, sizeof base);
    overrides[COUNT(base)] = (char *)extra;
    if (config_load(c, NULL, (int)COUNT(base) + (extra != NULL), overrides, 1, &e) != 0)
        fail_msg("%s", e.text);
}

/* A model of the run, with initial values by `seed`. */
static void open_run(struct run *r, const char *dir, const char *extra, uint64_t seed) {
    struct error e = {0};
    *r = (struct run){.trainer = {.best_value = NAN}};
    snprintf(r->dir, sizeof r->dir, "%s", dir);
    strcpy(r->trainer.train_fingerprint, "0123456789abcdef");
    load_config(&r->config, extra);
    assert_int_equal(files_make_dirs(dir, &e), 0);
    fixture_model(&r->model, &r->config.model,
                  (struct pass_shape){2, 6, RECOMPUTE_NONE, true, false, false, false});
    assert_int_equal(model_initialize(&r->model, seed, &e), 0);
}

static void close_run(struct run *r) {
    model_free(&r->model);
}

static void train_step(struct run *r) {
    struct model *m = &r->model;
    int32_t tokens[12], targets[12];
    fixture_tokens(tokens, 12, 30, (uint64_t)r->trainer.step * 2 + 1);
    fixture_tokens(targets, 12, 30, (uint64_t)r->trainer.step * 2 + 2);
    m->k->step_begin(m->dev, m->state, r->trainer.step, 1e-2);
    model_forward_backward(m, (struct batch){tokens, targets, NULL}, 1.0 / 12, false, NULL, NULL);
    model_update(m, &(struct update_hyper){0.9, 0.95, 1e-8, 1, 0, 12, 0});
    r->trainer.step++;
    r->trainer.tokens += 12;
    r->trainer.history.updates++;
}

static int save(struct run *r, struct error *e) {
    return save_checkpoint(r->dir, &r->model, &r->config, &r->trainer, NULL, e);
}

static void step_and_save(struct run *r) {
    struct error e = {0};
    train_step(r);
    if (save(r, &e) != 0)
        fail_msg("%s", e.text);
}

/* As the trainer does it: AdamW's number of updates is written to the device. */
static int resume(struct run *r, char dir[MAX_TEXT], struct error *e) {
    int status = checkpoint_resume(r->dir, &r->model, &r->config, &r->trainer, dir, true, e);
    struct step_state state = {.history = r->trainer.history};
    r->model.k->step_write(r->model.dev, r->model.state, &state);
    return status;
}

static void check_newest(const char *run_dir, const char *expected) {
    struct error e = {0};
    char dir[MAX_TEXT];
    assert_int_equal(checkpoint_find(run_dir, dir, &e), 0);
    assert_string_equal(dir, expected);
}

static void check_same_numbers(const struct model *a, const struct model *b) {
    size_t bytes = (size_t)a->params.elements * sizeof(float);
    assert_int_equal(a->params.elements, b->params.elements);
    assert_memory_equal(a->values, b->values, bytes);
    assert_memory_equal(a->moments, b->moments, 2 * bytes);
}

/* What a fresh process would find in the run directory: the state of `like`, at `step`. */
static void check_resumes(const struct run *like, const char *extra, int64_t step) {
    struct run r;
    struct error e = {0};
    char dir[MAX_TEXT];
    open_run(&r, like->dir, extra, 99);
    if (resume(&r, dir, &e) != 1)
        fail_msg("%s", e.text);
    assert_int_equal(r.trainer.step, step);
    check_same_numbers(&r.model, &like->model);
    close_run(&r);
}

static void path_in(char out[256], const struct run *r, int64_t step, const char *file) {
    snprintf(out, 256, "%s/step_%08d%s%s", r->dir, (int)step, *file ? "/" : "", file);
}

static bool exists(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
}

static bool has_step(const struct run *r, int64_t step) {
    char path[256];
    path_in(path, r, step, "");
    return exists(path);
}

/* Redirect stderr to a file. */
static int kept_stderr;

static void capture_stderr(void) {
    fflush(stderr);
    kept_stderr = dup(STDERR_FILENO);
    int fd = open("stderr", O_CREAT | O_TRUNC | O_WRONLY, 0666);
    dup2(fd, STDERR_FILENO);
    close(fd);
}

static char *captured_stderr(void) {
    char *text;
    fflush(stderr);
    dup2(kept_stderr, STDERR_FILENO);
    close(kept_stderr);
    assert_int_equal(files_read_all("stderr", 1 << 20, &text, NULL, NULL), 0);
    return text;
}

static void check_error(const struct error *e, int exit_code, const char *expected) {
    if (e->exit_code != exit_code || !strstr(e->text, expected))
        fail_msg("exit %d, \"%s\": not exit %d with \"%s\"", e->exit_code, e->text, exit_code, expected);
}

/* ---- saving and resuming ---- */

static void what_is_saved_comes_back(void **state) {
    (void)state;
    struct run r, other;
    struct error e = {0};
    char dir[MAX_TEXT];
    open_run(&r, "back", NULL, 1);
    for (int i = 0; i < 3; i++)
        train_step(&r);
    r.trainer.sequences = (1LL << 52) + 1;
    r.trainer.history.skips_run = 2;
    r.trainer.seconds = 0.1 + 0.2;
    r.trainer.best_value = 1.0 / 3;
    r.trainer.best_step = 2;
    assert_int_equal(save(&r, &e), 0);
    open_run(&other, "back", NULL, 2);
    assert_int_equal(resume(&other, dir, &e), 1);
    assert_string_equal(dir, "back/step_00000003");
    assert_memory_equal(&other.trainer, &r.trainer, sizeof r.trainer);
    check_same_numbers(&other.model, &r.model);
    for (int i = 0; i < 3; i++) { /* and both continue equally */
        train_step(&r);
        train_step(&other);
    }
    check_same_numbers(&other.model, &r.model);
    close_run(&r);
    close_run(&other);
}

static void an_empty_run_has_nothing_to_resume(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    char dir[MAX_TEXT];
    open_run(&r, "empty", NULL, 1);
    assert_int_equal(resume(&r, dir, &e), 0);
    close_run(&r);
}

static void no_best_loss_yet_stays_none(void **state) {
    (void)state;
    struct run r;
    struct trainer_state p;
    open_run(&r, "none", NULL, 1);
    step_and_save(&r);
    assert_int_equal(checkpoint_read_trainer_state("none/step_00000001", &p, NULL), 0);
    assert_true(isnan(p.best_value));
    assert_false(exists("none/best"));
    close_run(&r);
}

static void settings_and_tokenizer_are_kept(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    char value[MAX_TEXT], *text;
    open_run(&r, "settings", NULL, 1);
    assert_int_equal(files_write_synced("tok.json", "{\"a\": 1}", 8, &e), 0);
    assert_int_equal(save_checkpoint("settings", &r.model, &r.config, &r.trainer, "tok.json", &e), 0);
    assert_int_equal(files_read_all("settings/step_00000000/tokenizer.json", 100, &text, NULL, &e), 0);
    assert_string_equal(text, "{\"a\": 1}");
    free(text);
    assert_int_equal(checkpoint_setting("settings/step_00000000", "train.lr", value, &e), 0);
    assert_true(strtod(value, NULL) == 0.003);
    assert_int_equal(checkpoint_setting("settings/step_00000000", "train.nothing", value, &e), 0);
    assert_string_equal(value, "");
    close_run(&r);
}

static void find_takes_a_checkpoint_or_a_run(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    char dir[MAX_TEXT];
    open_run(&r, "find", NULL, 1);
    assert_int_equal(checkpoint_find("find", dir, &e), -1);
    check_error(&e, EXIT_USER, "find");
    step_and_save(&r);
    step_and_save(&r);
    assert_int_equal(checkpoint_find("find", dir, &e), 0);
    assert_string_equal(dir, "find/step_00000002");
    assert_int_equal(checkpoint_find("find/step_00000001", dir, &e), 0);
    assert_string_equal(dir, "find/step_00000001");
    assert_int_equal(checkpoint_find("absent", dir, &e), -1);
    check_error(&e, EXIT_USER, "absent");
    close_run(&r);
}

/* ---- config.json ---- */

static const char *const CONFIG_KEYS[] = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "position_embedding",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_positions",
    "norm",
    "norm_eps",
    "qk_norm",
    "activation",
    "bias",
    "qkv_bias",
    "tie_word_embeddings",
    "causal",
    "layer_types",
    "local_window",
    "num_pseudo_heads",
    "iha_window",
    "iha_mask",
    "iha_rope",
    "iha_collapse",
    "alpha_on",
    "architectures", /* from here on for Transformers */
    "auto_map",
    "dtype",
};

static void config_json_has_the_contract_s_keys(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    char *text;
    open_run(&r, "config", NULL, 1);
    step_and_save(&r);
    assert_int_equal(files_read_all("config/step_00000001/config.json", 1 << 20, &text, NULL, &e), 0);
    cJSON *json = cJSON_Parse(text);
    for (size_t i = 0; i < COUNT(CONFIG_KEYS); i++)
        if (!cJSON_GetObjectItemCaseSensitive(json, CONFIG_KEYS[i]))
            fail_msg("config.json has no %s", CONFIG_KEYS[i]);
    assert_int_equal(cJSON_GetArraySize(json), COUNT(CONFIG_KEYS));
    assert_string_equal(cJSON_GetStringValue(cJSON_GetObjectItem(json, "model_type")), "iha");
    cJSON *types = cJSON_GetObjectItem(json, "layer_types");
    assert_int_equal(cJSON_GetArraySize(types), 2);
    assert_string_equal(cJSON_GetStringValue(cJSON_GetArrayItem(types, 0)), "iha_local");
    assert_string_equal(cJSON_GetStringValue(cJSON_GetArrayItem(types, 1)), "mha_global");
    cJSON_Delete(json);
    free(text);
    close_run(&r);
}

static void config_json_reads_as_the_model(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    struct model_config found;
    open_run(&r, "read", NULL, 1);
    step_and_save(&r);
    assert_int_equal(checkpoint_read_config("read/step_00000001", &found, &e), 0);
    char *a = config_model_to_json(&found), *b = config_model_to_json(&r.config.model);
    assert_string_equal(a, b);
    free(a);
    free(b);
    close_run(&r);
}

/* ---- which are kept ---- */

static void check_steps(const struct run *r, const char *expected) {
    for (int step = 1; step <= 9; step++)
        if (has_step(r, step) != (strchr(expected, '0' + step) != NULL))
            fail_msg("step %d is%s there; expected are %s", step, has_step(r, step) ? "" : " not", expected);
}

static void check_best(const struct run *r, const char *expected) {
    char path[256], target[64] = {0};
    snprintf(path, sizeof path, "%s/best", r->dir);
    assert_true(readlink(path, target, sizeof target - 1) > 0);
    assert_string_equal(target, expected);
}

static void improve(struct run *r, double loss) {
    r->trainer.best_value = loss;
    r->trainer.best_step = r->trainer.step + 1;
}

static void the_newest_and_the_best_stay(void **state) {
    (void)state;
    struct run r;
    open_run(&r, "keep", "run.keep=2", 1);
    step_and_save(&r);
    improve(&r, 3);
    step_and_save(&r);
    check_steps(&r, "12");
    check_best(&r, "step_00000002");
    step_and_save(&r);
    step_and_save(&r);
    step_and_save(&r);
    check_steps(&r, "245");
    check_best(&r, "step_00000002");
    improve(&r, 2);
    step_and_save(&r);
    check_steps(&r, "56");
    check_best(&r, "step_00000006");
    check_newest("keep", "keep/step_00000006");
    close_run(&r);
}

static void keep_zero_removes_none(void **state) {
    (void)state;
    struct run r;
    open_run(&r, "keep_all", "run.keep=0", 1);
    for (int i = 0; i < 5; i++)
        step_and_save(&r);
    check_steps(&r, "12345");
    close_run(&r);
}

static void saving_a_step_again_replaces_it(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    open_run(&r, "again", NULL, 1);
    step_and_save(&r);
    train_step(&r);
    r.trainer.step = 1;
    assert_int_equal(save(&r, &e), 0);
    check_resumes(&r, NULL, 1);
    close_run(&r);
}

static void leftovers_are_cleaned(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    open_run(&r, "clean", NULL, 1);
    step_and_save(&r);
    assert_int_equal(files_make_dirs("clean/step_00000002.tmp", &e), 0);
    assert_int_equal(files_write_synced("clean/step_00000002.tmp/model.safetensors", "half", 4, &e), 0);
    assert_int_equal(files_make_dirs("clean/step_00000009.tmp", &e), 0);
    assert_int_equal(files_write_synced("clean/notes.tmp", "mine", 4, &e), 0);
    check_newest("clean", "clean/step_00000001");
    step_and_save(&r); /* replaces what is left of the same step */
    check_resumes(&r, NULL, 2);
    checkpoint_clean("clean");
    assert_false(exists("clean/step_00000009.tmp"));
    assert_true(exists("clean/notes.tmp"));
    check_steps(&r, "12");
    checkpoint_clean("absent"); /* no harm */
    close_run(&r);
}

/* ---- damaged ---- */

enum damage { TRUNCATED, EMPTY, REMOVED, OVERWRITTEN, DAMAGES };

static void damage_file(const char *path, enum damage how) {
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    if (how == REMOVED)
        assert_int_equal(unlink(path), 0);
    else if (how == OVERWRITTEN) {
        int fd = open(path, O_WRONLY);
        assert_int_equal(pwrite(fd, "\xff\xff\xff\xff{}}[\xff\xff\xff\xff", 12, 0), 12);
        close(fd);
    } else
        assert_int_equal(truncate(path, how == EMPTY ? 0 : st.st_size - 9), 0);
}

/* One file of the newer checkpoint is damaged: the older one is loaded, with a warning. */
static void check_passed_over(const char *file, enum damage how) {
    struct run r, first;
    char path[256], dir[64];
    static int turn;
    snprintf(dir, sizeof dir, "damaged_%d", turn++);
    open_run(&r, dir, NULL, 1);
    open_run(&first, dir, NULL, 1);
    step_and_save(&r);
    step_and_save(&r);
    train_step(&first);
    path_in(path, &r, 2, file);
    damage_file(path, how);
    capture_stderr();
    check_resumes(&first, NULL, 1);
    char *text = captured_stderr();
    path_in(path, &r, 2, "");
    if (!strstr(text, path) || !strstr(text, "warning"))
        fail_msg("\"%s\" does not warn of %s", text, path);
    free(text);
    close_run(&r);
    close_run(&first);
}

static void a_damaged_newest_is_passed_over(void **state) {
    (void)state;
    const char *const files[] = {WEIGHTS, OPTIMIZER, "trainer.json"};
    for (size_t i = 0; i < COUNT(files); i++)
        for (int how = 0; how < DAMAGES; how++)
            check_passed_over(files[i], (enum damage)how);
}

/* Replace a checkpoint's file. */
static void put_file(const struct run *r, const char *file, const char *text, size_t length) {
    char path[256];
    struct error e = {0};
    path_in(path, r, r->trainer.step, file);
    assert_int_equal(files_write_synced(path, text, length, &e), 0);
}

/* trainer.json of `r` with the text of one of its lines replaced. */
static void edit_trainer(const struct run *r, const char *from, const char *to) {
    char path[256], *text, edited[8192];
    path_in(path, r, r->trainer.step, "trainer.json");
    assert_int_equal(files_read_all(path, sizeof edited / 2, &text, NULL, NULL), 0);
    char *at = strstr(text, from);
    assert_non_null(at);
    int length = snprintf(edited, sizeof edited, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    put_file(r, "trainer.json", edited, (size_t)length);
    free(text);
}

/* Numbers that are valid JSON and impossible for a run are read as missing. */
static void numbers_beyond_sense_are_left_out(void **state) {
    (void)state;
    struct run r;
    struct trainer_state p;
    open_run(&r, "beyond", NULL, 1);
    step_and_save(&r);
    edit_trainer(&r, "\"best_val_loss\":\tnull", "\"best_val_loss\": -1e999");
    edit_trainer(&r, "\"seconds\":\t0", "\"seconds\": -5");
    assert_int_equal(checkpoint_read_trainer_state("beyond/step_00000001", &p, NULL), 0);
    assert_true(isnan(p.best_value));
    assert_true(p.seconds == 0);
    close_run(&r);
}

static void the_best_is_of_one_figure(void **state) {
    (void)state;
    struct run r, other;
    struct error e = {0};
    char dir[MAX_TEXT];
    open_run(&r, "figure", NULL, 1);
    r.config.train.best_by = r.trainer.best_by = BEST_BY_EXACT;
    r.trainer.best_value = 0.75;
    r.trainer.best_step = 1;
    r.trainer.evals_since_best = 3;
    step_and_save(&r);
    struct trainer_state saved = r.trainer;
    assert_int_equal(resume(&r, dir, &e), 1);
    assert_memory_equal(&r.trainer, &saved, sizeof saved);
    edit_trainer(&r, "\"train.best_by\"", "\"train.best\"");
    close_run(&r);
    /* A run by another figure, whose checkpoint does not record train.best_by: it begins without a best. */
    open_run(&other, "figure", NULL, 1);
    assert_int_equal(resume(&other, dir, &e), 1);
    assert_int_equal(other.trainer.best_by, BEST_BY_LOSS);
    assert_true(isnan(other.trainer.best_value) && other.trainer.evals_since_best == 0);
    close_run(&other);
}

static void text_after_the_json_is_damage(void **state) {
    (void)state;
    struct run r;
    struct trainer_state p;
    struct model_config m;
    struct error e = {0};
    open_run(&r, "after", NULL, 1);
    step_and_save(&r);
    put_file(&r, "trainer.json", "{\"format_version\": 1} x", 23);
    assert_int_equal(checkpoint_read_trainer_state("after/step_00000001", &p, &e), -1);
    check_error(&e, EXIT_USER, "damaged");
    char *json = config_model_to_json(&r.config.model);
    put_file(&r, "config.json", json, strlen(json) + 1);
    assert_int_equal(checkpoint_read_config("after/step_00000001", &m, &e), -1);
    check_error(&e, EXIT_USER, "a zero byte");
    free(json);
    close_run(&r);
}

/* A recorded setting may be any text; the error has one line of it, without control characters. */
static void a_file_cannot_write_to_the_terminal(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    char dir[MAX_TEXT];
    open_run(&r, "terminal", NULL, 1);
    step_and_save(&r);
    edit_trainer(&r, "\"train.seed\":\t\"1\"", "\"train.seed\": \"2\\n\\u001b[31m\\u009b1m\\u00fc\"");
    assert_int_equal(resume(&r, dir, &e), -1);
    check_error(&e, EXIT_USER, "train.seed was 2??[31m??1m\xc3\xbc and is now 1");
    close_run(&r);
}

static void none_that_loads_is_an_error(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    char dir[MAX_TEXT];
    open_run(&r, "all", NULL, 1);
    for (int step = 1; step <= 2; step++) {
        char path[256];
        step_and_save(&r);
        path_in(path, &r, step, WEIGHTS);
        damage_file(path, TRUNCATED);
    }
    capture_stderr();
    int status = resume(&r, dir, &e);
    free(captured_stderr());
    assert_int_equal(status, -1);
    check_error(&e, EXIT_USER, "all");
    close_run(&r);
}

/* ---- another run ---- */

/* Resuming run directory `dir` as a run configured with `extra` and these shards is refused. */
static void check_refused(const char *dir, const char *extra, const char *fingerprint, const char *expected) {
    struct run r;
    struct error e = {0};
    char found[MAX_TEXT];
    open_run(&r, dir, extra, 1);
    strcpy(r.trainer.train_fingerprint, fingerprint);
    size_t bytes = (size_t)r.model.params.elements * sizeof(float);
    char *before = malloc(bytes);
    memcpy(before, r.model.values, bytes);
    assert_int_equal(resume(&r, found, &e), -1);
    check_error(&e, EXIT_USER, expected);
    assert_memory_equal(before, r.model.values, bytes);
    free(before);
    close_run(&r);
}

static void another_run_is_refused(void **state) {
    (void)state;
    struct run r;
    const char *same = "0123456789abcdef";
    open_run(&r, "other", NULL, 1);
    step_and_save(&r);
    check_refused("other", "model.hidden_size=18", same, "model.hidden_size");
    check_refused("other", "model.tie_word_embeddings=false", same, "model.tie_word_embeddings");
    check_refused("other", "model.rope_theta=500", same, "model.rope_theta"); /* changes no tensor's shape */
    check_refused("other", "model.layer_pattern=mha_global", same, "model.layer_pattern");
    check_refused("other", "train.seed=5", same, "train.seed");
    check_refused("other", NULL, "fedcba9876543210", "data");
    edit_trainer(&r, "\"config\":", "\"config\": {\"another program's\": \"key\"}, \"was\":");
    check_refused("other", NULL, same, "records no configuration");
    edit_trainer(&r, "\"config\": {\"another program's\": \"key\"}, \"was\":", "\"config\":");
    check_resumes(&r, "train.steps=200", 1);
    check_resumes(&r, "run.keep=7", 1);
    check_resumes(&r, "system.recompute=full", 1);
    close_run(&r);
}

static void check_weights_refused(const char *extra, const char *tensor) {
    struct run r;
    struct error e = {0};
    open_run(&r, "tensors", extra, 1);
    assert_int_equal(checkpoint_load_weights("tensors/step_00000001", &r.model, 0, &e), -1);
    check_error(&e, EXIT_USER, tensor);
    check_error(&e, EXIT_USER, "another model");
    close_run(&r);
}

static void weights_of_another_model_name_the_tensor(void **state) {
    (void)state;
    struct run r;
    open_run(&r, "tensors", NULL, 1);
    step_and_save(&r);
    check_weights_refused("model.vocab_size=31", "embed.weight");
    check_weights_refused("model.tie_word_embeddings=false", "lm_head.weight");
    check_weights_refused("model.num_pseudo_heads=3", "layers.0.attn.alpha_q");
    check_weights_refused("model.iha_collapse=per_head", "layers.0.attn.collapse");
    check_weights_refused("model.intermediate_size=44", "layers.0.mlp.up.weight");
    check_weights_refused("model.layer_pattern=mha_global", "model.safetensors"); /* more than it has */
    close_run(&r);
}

/* ---- failing while saving ---- */

static void check_save_fails(struct run *r, const char *expected) {
    struct error e = {0};
    assert_int_equal(save(r, &e), -1);
    check_error(&e, EXIT_RUN, expected);
}

static void a_directory_that_takes_nothing(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    open_run(&r, "gone", NULL, 1);
    assert_int_equal(rmdir("gone"), 0);
    check_save_fails(&r, "gone");
    assert_int_equal(files_write_synced("gone", "a file", 6, &e), 0);
    check_save_fails(&r, "gone");
    assert_int_equal(unlink("gone"), 0);
    assert_int_equal(mkdir("gone", 0555), 0);
    if (geteuid() != 0) /* root may write anywhere */
        check_save_fails(&r, "gone");
    close_run(&r);
}

static void a_tokenizer_that_went_away(void **state) {
    (void)state;
    struct run r;
    struct error e = {0};
    open_run(&r, "tokenizer", NULL, 1);
    step_and_save(&r);
    struct trainer_state next = r.trainer;
    next.step = 2;
    assert_int_equal(save_checkpoint(r.dir, &r.model, &r.config, &next, "absent.json", &e), -1);
    check_error(&e, EXIT_RUN, "absent.json");
    check_steps(&r, "1");
    check_resumes(&r, NULL, 1);
    close_run(&r);
}

/* A file system with room for so many bytes a file. */
static void limit_file_size(rlim_t bytes) {
    struct rlimit limit;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

static void a_full_disk_leaves_the_one_before(void **state) {
    (void)state;
    static const rlim_t room[] = {0, 1, 100, 4096, 12000};
    struct run r, before;
    open_run(&r, "full", "run.keep=1", 1);
    open_run(&before, "full", "run.keep=1", 1);
    step_and_save(&r);
    train_step(&before);
    train_step(&r);
    for (size_t i = 0; i < COUNT(room); i++) {
        limit_file_size(room[i]);
        struct error e = {0};
        int status = save(&r, &e);
        limit_file_size(RLIM_INFINITY);
        assert_int_equal(status, -1);
        check_error(&e, EXIT_RUN, "full/step_00000002");
        check_steps(&r, "1");
        assert_false(exists("full/step_00000002.tmp"));
        check_resumes(&before, NULL, 1);
    }
    close_run(&r);
    close_run(&before);
}

/* fsync fails from the n-th call on, for every n: after a save that reports failure the run is as it was, or,
 * if the rename was done, has the complete new checkpoint. */
static void any_failing_sync_leaves_a_whole_checkpoint(void **state) {
    (void)state;
    struct run r, before;
    open_run(&r, "sync", "run.keep=1", 1);
    open_run(&before, "sync", "run.keep=1", 1);
    step_and_save(&r);
    train_step(&before);
    train_step(&r);
    int status = -1, failures = 0;
    for (int n = 1; status != 0; n++, failures++) {
        struct error e = {0};
        sync_calls = 0;
        sync_fails_at = n;
        status = save(&r, &e);
        sync_fails_at = 0;
        if (status != 0)
            check_error(&e, EXIT_RUN, "sync");
        bool renamed = has_step(&r, 2);
        check_resumes(renamed ? &r : &before, NULL, renamed ? 2 : 1);
        assert_false(exists("sync/step_00000002.tmp"));
    }
    assert_true(failures >= 6); /* four files, the new directory, its parent */
    check_steps(&r, "2");
    close_run(&r);
    close_run(&before);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_saved_comes_back),
        cmocka_unit_test(an_empty_run_has_nothing_to_resume),
        cmocka_unit_test(no_best_loss_yet_stays_none),
        cmocka_unit_test(the_best_is_of_one_figure),
        cmocka_unit_test(settings_and_tokenizer_are_kept),
        cmocka_unit_test(find_takes_a_checkpoint_or_a_run),
        cmocka_unit_test(config_json_has_the_contract_s_keys),
        cmocka_unit_test(config_json_reads_as_the_model),
        cmocka_unit_test(the_newest_and_the_best_stay),
        cmocka_unit_test(keep_zero_removes_none),
        cmocka_unit_test(saving_a_step_again_replaces_it),
        cmocka_unit_test(leftovers_are_cleaned),
        cmocka_unit_test(a_damaged_newest_is_passed_over),
        cmocka_unit_test(numbers_beyond_sense_are_left_out),
        cmocka_unit_test(text_after_the_json_is_damage),
        cmocka_unit_test(a_file_cannot_write_to_the_terminal),
        cmocka_unit_test(none_that_loads_is_an_error),
        cmocka_unit_test(another_run_is_refused),
        cmocka_unit_test(weights_of_another_model_name_the_tensor),
        cmocka_unit_test(a_directory_that_takes_nothing),
        cmocka_unit_test(a_tokenizer_that_went_away),
        cmocka_unit_test(a_full_disk_leaves_the_one_before),
        cmocka_unit_test(any_failing_sync_leaves_a_whole_checkpoint),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
