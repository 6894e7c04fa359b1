/* A checkpoint of a small model with one of its files replaced: it loads with the file's values, or is refused and
 * leaves the model unchanged.
 *
 * Input: a byte that picks the file, then the file. */
#include "tests/fuzz/safetensors_mutator.h"

#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>

#include "model/checkpoint/checkpoint.h"
#include "model/checkpoint/trainer_state.h"
#include "model/checkpoint/safetensors.h"
#include "model/state_dict.h"
#include "tests/lib/save_checkpoint.h"

enum file { WEIGHTS, OPTIMIZER, TRAINER, CONFIG, FILES };
static const char *const names[FILES] = {"model.safetensors", "optimizer-00000-of-00001.safetensors",
                                         "trainer.json", "config.json"};

static char run_dir[256], dir[300], paths[FILES][400];
static uint8_t *good[FILES];
static size_t good_size[FILES];
static struct config config;
static struct trainer_state progress = {
    .step = 1, .tokens = 4, .sequences = 2, .history.updates = 1, .best_value = 2.5};
static struct model model;

/* ---- files ---- */

static void write_file(const char *path, const void *data, size_t size) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size && close(fd) == 0);
}

static void keep_good(enum file f) {
    int fd = open(paths[f], O_RDONLY);
    struct stat st;
    CHECK(fd >= 0 && fstat(fd, &st) == 0);
    good_size[f] = (size_t)st.st_size;
    good[f] = malloc(good_size[f]);
    CHECK(good[f] && read(fd, good[f], good_size[f]) == st.st_size && close(fd) == 0);
}

/* ---- the checkpoint ---- */

static void make_model(void) {
    static char *const keys[] = {"model.vocab_size=3",
                                 "model.hidden_size=2",
                                 "model.num_hidden_layers=1",
                                 "model.num_attention_heads=1",
                                 "model.intermediate_size=2",
                                 "model.layer_pattern=iha_global",
                                 "train.seq_len=2",
                                 "train.micro_batch=1",
                                 "train.steps=9",
                                 "train.lr=0.1",
                                 "data.train=x.bin",
                                 "run.dir=x"};
    struct error e = {0};
    struct device_options options = {.threads = 1, .precision = DEVICE_FP32};
    struct device *dev = kernels_cpu()->open(&options, &e);
    CHECK(dev && config_load(&config, NULL, sizeof keys / sizeof *keys, keys, 1, &e) == 0);
    struct model_options how = {
        .shape = {1, 2, RECOMPUTE_NONE, true, false, false, false}, .weight_decay = 0.1, .mix_lr_scale = 1};
    CHECK(model_create(&model, &config.model, kernels_cpu(), dev, &how, &e) == 0);
    CHECK(model_initialize(&model, 1, &e) == 0);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    struct error e = {0};
    const char *tmp = getenv("TMPDIR");
    snprintf(run_dir, sizeof run_dir, "%s/fuzz_checkpoint_XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(run_dir));
    strcpy(progress.train_fingerprint, "0123456789abcdef");
    make_model();
    CHECK(save_checkpoint(run_dir, &model, &config, &progress, NULL, &e) == 0);
    snprintf(dir, sizeof dir, "%s/step_00000001", run_dir);
    for (enum file f = 0; f < FILES; f++) {
        snprintf(paths[f], sizeof paths[f], "%s/%s", dir, names[f]);
        keep_good(f);
    }
    stderr = fopen("/dev/null", "w"); /* warnings about checkpoints; descriptor 2 stays as it is */
    CHECK(stderr);
    return 0;
}

/* ---- checks ---- */

/* The values of the model, or its moments, as one array. */
static float *snapshot(enum file f, int64_t *count) {
    int64_t n = model.params.elements;
    *count = f == WEIGHTS ? n : 2 * n;
    float *copy = malloc((size_t)*count * sizeof *copy);
    CHECK(copy);
    memcpy(copy, f == WEIGHTS ? model.values : model.moments, (size_t)*count * sizeof *copy);
    return copy;
}

/* The offset in the flat buffer of a parameter, counted without padding. */
static int64_t offset_of(int64_t packed_offset) {
    int i = 0;
    while (packed_offset >= model.params.list[i].packed_offset + model.params.list[i].count)
        i++;
    return model.params.list[i].offset + packed_offset - model.params.list[i].packed_offset;
}

/* The moments of every range of the file. */
static void check_moments(const struct safetensors *s) {
    const struct safetensors_entry *ranges = safetensors_find(s, "ranges"),
                                   *moments[2] = {safetensors_find(s, "exp_avg"),
                                                  safetensors_find(s, "exp_avg_sq")};
    CHECK(ranges && ranges->dtype == ST_I64 && moments[0] && moments[0]->dtype == ST_F32 && moments[1] &&
          moments[1]->dtype == ST_F32 && moments[0]->bytes == moments[1]->bytes);
    int64_t at = 0;
    for (int64_t r = 0; r < ranges->shape[0]; r++) {
        int64_t range[2];
        memcpy(range, (const char *)ranges->data + r * 16, sizeof range);
        for (int64_t packed_offset = range[0]; packed_offset < range[1]; packed_offset++, at++)
            for (int i = 0; i < 2; i++)
                CHECK(memcmp((const char *)moments[i]->data + 4 * at,
                             (float *)model.moments + i * model.params.elements + offset_of(packed_offset),
                             4) == 0);
    }
    CHECK(at == model.params.num_params);
}

static void check_loaded(const struct safetensors *s, enum file f) {
    for (int i = 0; f == WEIGHTS && i < model.params.count; i++) {
        const struct param *p = &model.params.list[i];
        const struct safetensors_entry *t = safetensors_find(s, p->name);
        CHECK(t && t->dtype == ST_F32 && t->bytes == 4 * (size_t)p->count && t->ndim == p->ndim);
        CHECK(memcmp(t->shape, p->shape, (size_t)p->ndim * sizeof *p->shape) == 0);
        CHECK(memcmp(t->data, (float *)model.values + p->offset, t->bytes) == 0);
    }
    if (f == OPTIMIZER)
        check_moments(s);
}

static void check_tensors(enum file f) {
    struct error e = {0};
    int64_t count;
    float *before = snapshot(f, &count);
    int status = f == WEIGHTS ? checkpoint_load_weights(dir, &model, 0, &e)
                              : checkpoint_load_optimizer(dir, &model, &e);
    if (status == 0) {
        struct safetensors s;
        CHECK(safetensors_open(&s, paths[f], &e) == 0);
        check_loaded(&s, f);
        safetensors_close(&s);
    } else {
        float *after = snapshot(f, &count);
        check_user_error(&e);
        CHECK(memcmp(before, after, (size_t)count * sizeof *after) == 0);
        free(after);
    }
    free(before);
}

/* As the trainer resumes, and as eval picks its settings. */
static void check_trainer(void) {
    static struct config c;
    struct error e = {0};
    struct trainer_state p = progress;
    char found[MAX_TEXT], value[MAX_TEXT], text[MAX_TEXT + 64], *setting = text;
    if (checkpoint_resume(run_dir, &model, &config, &p, found, true, &e) == 1) {
        CHECK(p.step >= 0 && p.tokens >= 0 && p.sequences >= 0 && p.history.updates >= 0 &&
              p.history.skips_run >= 0);
        CHECK(isfinite(p.seconds) && p.seconds >= 0);
        CHECK(strcmp(p.train_fingerprint, progress.train_fingerprint) == 0);
        CHECK(strcmp(found, dir) == 0);
    } else {
        check_user_error(&e);
    }
    config_defaults(&c);
    c.model = config.model;
    if (checkpoint_setting(dir, "train.seq_len", value, &e) != 0) {
        check_user_error(&e);
    } else if (*value) {
        snprintf(text, sizeof text, "train.seq_len=%s", value);
        if (config_override(&c, 1, &setting, &e) != 0)
            check_user_error(&e);
        else
            CHECK(c.train.seq_len >= 1 && c.train.seq_len <= c.model.max_position_embeddings);
    }
}

static void check_config(void) {
    struct error e = {0};
    struct model_config m;
    char found[MAX_TEXT];
    int status = checkpoint_read_config(dir, &m, &e);
    if (status != 0)
        check_user_error(&e);
    else
        CHECK(m.vocab_size >= 1 && m.num_hidden_layers >= 1 && m.num_hidden_layers <= MAX_LAYERS);
    CHECK(checkpoint_find(run_dir, found, &e) == status);
    if (status != 0)
        check_user_error(&e);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1)
        return 0;
    enum file f = data[0] % FILES;
    write_file(paths[f], data + 1, size - 1);
    if (f == TRAINER)
        check_trainer();
    else if (f == CONFIG)
        check_config();
    else
        check_tensors(f);
    write_file(paths[f], good[f], good_size[f]);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    if (size < 1 || data[0] % FILES > OPTIMIZER)
        return LLVMFuzzerMutate(data, size, max_size);
    return 1 + mutate_safetensors(data + 1, size - 1, max_size - 1, seed);
}
