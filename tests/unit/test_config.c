/* Configuration: defaults, every class of user error with its message and exit code, and round trips (JSON,
 * visit). Run from the root of the repository, where configs/ is. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "model/config/config.h"

/* The least that config_load accepts. */
static const char small[] = "[model]\n"
                            "vocab_size = 300\nhidden_size = 64\n"
                            "num_hidden_layers = 7\nnum_attention_heads = 4\n" /* lines 4 and 5 */
                            "[train]\nseq_len = 64\nmicro_batch = 2\nsteps = 100\nlr = 1e-3\n"
                            "[data]\ntrain = data/x/train_*.bin\n"
                            "[run]\ndir = runs/x\n"; /* lines 13 and 14 */

enum { MAX_OVERRIDES = 8 };
static char file[] = "/tmp/test_config_XXXXXX";
static struct config config;
static struct error error;

static void write_file(const char *bytes, size_t size) {
    FILE *f = fopen(file, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    fclose(f);
}

/* Load `text` as a file, with overrides up to a NULL. */
static int load_text(const char *text, va_list args) {
    char *overrides[MAX_OVERRIDES];
    int count = 0;
    while ((overrides[count] = va_arg(args, char *)))
        assert_true(++count < MAX_OVERRIDES);
    write_file(text, strlen(text));
    memset(&error, 0, sizeof error);
    memset(&config, 0x5a, sizeof config); /* old content must not matter */
    return config_load(&config, file, count, overrides, 1, &error);
}

static void loads(const char *text, ...) {
    va_list args;
    va_start(args, text);
    int status = load_text(text, args);
    va_end(args);
    if (status)
        fail_msg("did not load: %s", error.text);
}

static void check_error(int status, const char *words) {
    if (!status)
        fail_msg("accepted, but expected '%s'", words);
    if (!strstr(error.text, words))
        fail_msg("expected '%s' in: %s", words, error.text);
    assert_int_equal(error.exit_code, EXIT_USER);
    assert_null(strchr(error.text, '\n'));
}

/* The text is refused, with `words` in the message. */
static void refused(const char *words, const char *text, ...) {
    va_list args;
    va_start(args, text);
    int status = load_text(text, args);
    va_end(args);
    check_error(status, words);
}

/* `small` with more lines after it (from line 15) is refused. */
static void refused_line(const char *line, const char *words) {
    char text[20000];
    snprintf(text, sizeof text, "%s%s\n", small, line);
    refused(words, text, NULL);
}

/* ---- valid configurations ---- */

static void test_defaults(void **state) {
    (void)state;
    loads(small, NULL);
    const struct model_config *m = &config.model;
    assert_int_equal(m->head_dim, 16);
    assert_int_equal(m->intermediate_size, 256);
    assert_int_equal(m->max_position_embeddings, 64);
    assert_int_equal(m->position_embedding, POSITION_ROPE);
    assert_true(m->rope_theta == 10000 && m->norm_eps == 1e-5);
    assert_int_equal(m->norm, NORM_RMSNORM);
    assert_int_equal(m->activation, ACTIVATION_GELU_TANH);
    assert_true(!m->bias && m->tie_word_embeddings && m->causal);
    assert_int_equal(m->local_window, 512);
    assert_int_equal(m->num_pseudo_heads, 2);
    assert_int_equal(m->iha_window, 16);
    assert_int_equal(m->iha_mask, MASK_FLAT);
    assert_int_equal(m->iha_rope, IHA_ROPE_VIRTUAL);
    assert_int_equal(m->iha_collapse, COLLAPSE_FULL);
    assert_int_equal(m->init_alpha, ALPHA_IDENTITY);
    assert_int_equal(m->init_collapse, COLLAPSE_LAST);
    const struct train_config *t = &config.train;
    assert_int_equal(t->batch_tokens, 128);
    assert_true(t->min_lr == 1e-3 / 10);
    assert_int_equal(t->warmup_steps, 0);
    assert_int_equal(t->schedule, SCHEDULE_COSINE);
    assert_true(t->weight_decay == 0.1 && t->beta1 == 0.9 && t->beta2 == 0.95 && t->eps == 1e-8);
    assert_true(t->grad_clip == 1 && t->mix_lr_scale == 1 && t->skip_zscore == 0);
    assert_int_equal(t->seed, 1);
    assert_string_equal(t->init_from, "");
    assert_int_equal(t->init_optimizer, OPTIMIZER_FRESH);
    assert_int_equal(t->max_skips, 10);
    const struct system_config *s = &config.system;
    assert_int_equal(s->device, DEVICE_AUTO);
    assert_int_equal(s->precision, PRECISION_AUTO);
    assert_int_equal(s->comm, COMM_AUTO);
    assert_int_equal(s->zero_stage, 1);
    assert_int_equal(s->reduce_dtype, REDUCE_FP32);
    assert_int_equal(s->recompute, RECOMPUTE_NONE);
    assert_int_equal(s->graph, GRAPH_AUTO);
    assert_true(!s->deterministic && s->threads == 0 && s->peer_timeout == 300);
    assert_string_equal(config.data.val, "");
    assert_string_equal(config.data.tokenizer, "none");
    assert_true(config.data.shuffle);
    const struct run_config *r = &config.run;
    assert_true(!r->eval_every && !r->eval_batches && !r->save_every && !r->sample_every);
    assert_int_equal(r->keep, 2);
    assert_int_equal(r->log_every, 1);
}

static void test_config_defaults(void **state) {
    (void)state;
    memset(&config, 0x5a, sizeof config);
    config_defaults(&config);
    assert_int_equal(config.model.vocab_size, 0);
    assert_string_equal(config.run.dir, "");
    assert_true(config.train.beta2 == 0.95);
    assert_int_equal(config.model.layer_types[0], LAYER_IHA_LOCAL);
    assert_int_equal(config.model.layer_types[4], LAYER_MHA_GLOBAL);
}

static void test_values(void **state) {
    (void)state;
    loads(small, "model.activation=swiglu", "model.head_dim=10", "train.min_lr=0",
          "train.seed=9007199254740992", "system.threads=3", "data.val=a b#c;d", "model.bias=true", NULL);
    assert_int_equal(config.model.activation, ACTIVATION_SWIGLU);
    assert_int_equal(config.model.head_dim, 10);
    assert_true(config.train.min_lr == 0);
    assert_true(config.train.seed == 9007199254740992);
    assert_int_equal(config.system.threads, 3);
    assert_string_equal(config.data.val, "a b#c;d");
    assert_true(config.model.bias);
    loads(small, "train.lr=1", "train.lr=2", NULL); /* the last one counts */
    assert_true(config.train.lr == 2);
}

static void test_comments_and_layout(void **state) {
    (void)state;
    char text[8000];
    refused_line("[train]\nbeta1 = 0.5# no blank: no comment",
                 ":16: beta1 = 0.5# no blank: no comment: not a number");
    snprintf(text, sizeof text,
             "\xEF\xBB\xBF# comment\r\n; comment\r\n%s[data]\n\tval = a#b;c ; comment # more\n"
             "   # an indented comment\n[train]  # comment\n  beta1=0.5\t# comment\r\n  beta2 = 0.75",
             small);
    loads(text, NULL);
    assert_string_equal(config.data.val, "a#b;c");
    assert_string_equal(config.data.train, "data/x/train_*.bin");
    assert_true(config.train.beta1 == 0.5 && config.train.beta2 == 0.75);
}

static void test_without_a_file(void **state) {
    (void)state;
    char *overrides[] = {"model.vocab_size=9",
                         "model.hidden_size=8",
                         "model.num_hidden_layers=1",
                         "train.lr=1",
                         "train.steps=1",
                         "model.num_attention_heads=2",
                         "train.micro_batch=1",
                         "train.seq_len=4",
                         "data.train=x",
                         "run.dir=y"};
    memset(&error, 0, sizeof error);
    assert_int_equal(config_load(&config, NULL, 10, overrides, 3, &error), 0);
    assert_int_equal(config.train.batch_tokens, 12);
    check_error(config_load(&config, NULL, 9, overrides, 1, &error),
                "configuration: missing required key: run.dir");
    assert_int_equal(config_load(&config, NULL, 9, overrides, 1, NULL), -1); /* without an error to fill */
}

static void pattern_is(const char *pattern, const char *letters) {
    static const char names[] = "MmIi"; /* large: global */
    char override[64], found[MAX_LAYERS + 1] = "";
    snprintf(override, sizeof override, "model.layer_pattern=%s", pattern);
    loads(small, override, NULL);
    for (int i = 0; i < config.model.num_hidden_layers; i++)
        found[i] = names[config.model.layer_types[i]];
    assert_string_equal(found, letters);
    for (int i = 7; i < MAX_LAYERS; i++)
        assert_int_equal(config.model.layer_types[i], 0);
}

static void test_pattern(void **state) {
    (void)state;
    loads(small, NULL);
    pattern_is("iha_local*4 mha_global", "iiiiMii");
    pattern_is("mha_global", "MMMMMMM");
    pattern_is("  mha_local \t iha_global*2 ", "mIImIIm");
    pattern_is("iha_global*1000 mha_global", "IIIIIII");
    refused("unknown value 'iha_lokal'; did you mean 'iha_local'?", small, "model.layer_pattern=iha_lokal*4",
            NULL);
    refused("is not a count", small, "model.layer_pattern=mha_global*0", NULL);
    refused("is not a count", small, "model.layer_pattern=mha_global*", NULL);
    refused("is not a count", small, "model.layer_pattern=mha_global*2\n*", NULL);
    refused("is not a count", small, "model.layer_pattern=mha_global*99999999999", NULL);
    refused("more than 1024 layers", small, "model.layer_pattern=mha_global*1025", NULL);
    refused("more than 1024 layers", small, "model.layer_pattern=mha_global*1024 mha_local", NULL);
    refused("empty", small, "model.layer_pattern= ", NULL);
}

static void test_auto_window(void **state) {
    (void)state;
    static const struct {
        int pseudo_heads, seq_len, window;
    } cases[] = {/* max(P, P*floor(T/(2P^2))) */
                 {1, 8192, 4096}, {2, 8192, 2048}, {4, 8192, 1024}, {2, 1024, 256}, {3, 100, 15},
                 {3, 17, 3},      {4, 31, 4},      {8, 36, 8},      {2, 1, 2},      {20, 8192, 200}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char pseudo_heads[64], seq_len[64];
        snprintf(pseudo_heads, 64, "model.num_pseudo_heads=%d", cases[i].pseudo_heads);
        snprintf(seq_len, 64, "train.seq_len=%d", cases[i].seq_len);
        loads(small, pseudo_heads, seq_len, NULL);
        assert_int_equal(config.model.iha_window, cases[i].window);
    }
    loads(small, "model.iha_window=7", NULL);
    assert_int_equal(config.model.iha_window, 7);
    /* seq_len decides, not the longest sequence the model could take */
    loads(small, "model.max_position_embeddings=4096", "model.iha_window=auto", NULL);
    assert_int_equal(config.model.iha_window, 16);
}

static void test_committed_configs(void **state) {
    (void)state;
    static const struct {
        const char *path;
        int64_t layers, hidden, vocab, window;
    } cases[] = {{"configs/gpt2_124m.ini", 12, 768, 50257, 256},
                 {"configs/iha_gpt2_124m.ini", 12, 768, 50257, 256},
                 {"configs/llama_1b.ini", 16, 2048, 128256, 1024},
                 {"configs/paper/2.4b_iha.ini", 26, 2560, 128256, 2048},
                 {"configs/bytes_small.ini", 5, 256, 257, 128}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int ranks = 1; ranks <= 8; ranks *= 2) {
            if (!strcmp(cases[i].path, "configs/bytes_small.ini") && ranks == 8)
                continue; /* its batch is four passes */
            if (config_load(&config, cases[i].path, 0, NULL, ranks, &error))
                fail_msg("%s", error.text);
            assert_int_equal(config.model.num_hidden_layers, cases[i].layers);
            assert_int_equal(config.model.hidden_size, cases[i].hidden);
            assert_int_equal(config.model.vocab_size, cases[i].vocab);
            assert_int_equal(config.model.iha_window, cases[i].window);
        }
    assert_int_equal(config_load(&config, "configs/paper/2.4b_iha.ini", 0, NULL, 128, &error), 0);
    assert_int_equal(config.model.layer_types[25], LAYER_IHA_LOCAL);
}

/* ---- invalid configurations ---- */

static void test_broken_files(void **state) {
    (void)state;
    refused_line("hidden_size", ":15: 'hidden_size' is neither");
    refused_line("= 3", ":15: '= 3' is neither");
    refused_line("[model", ":15: '[model' is not a section");
    refused_line("[model] x", ":15: '[model] x' is not a section");
    refused_line("[modle]", ":15: unknown section 'modle'; did you mean 'model'?");
    refused_line("[something]", ":15: unknown section 'something'; the sections are model, train");
    refused_line("[]", ":15: unknown section ''");
    refused_line("[model]\nhidden_sise = 3",
                 ":16: unknown key 'hidden_sise' in [model]; did you mean 'hidden_size'?");
    refused_line("[model]\nlr = 3", ":16: unknown key 'lr' in [model]; it belongs in [train]");
    refused_line("[model]\nxyzzy = 3", ":16: unknown key 'xyzzy' in [model]; train_iha --help");
    refused_line("[model]\nhidden_size = 64", ":16: 'hidden_size' was already set on line 3");
    refused(":2: key 'lr' before any section", "# x\nlr = 3\n[train]\n", NULL);
    refused_line("[train]\nbeta1 = ", ":16: beta1 = : not a number");
    refused_line("[train]\ninit_from =", "empty; give init_from a value or write none");
    refused_line("[train]\nbeta1 = 0.5\n  beta2 = x",
                 ":17: beta2 = x: not a number"); /* indented: no continuation */
    refused("missing required keys: model.vocab_size, model.hidden_size", "", NULL);
    refused(": missing required key: run.dir",
            "[model]\nvocab_size=9\nhidden_size=8\nnum_hidden_layers=1\n"
            "num_attention_heads=2\n[train]\nseq_len=4\nmicro_batch=1\nsteps=1\nlr=1\n[data]\ntrain=x\n",
            NULL);
    check_error(config_load(&config, "configs/absent.ini", 0, NULL, 1, &error),
                "configs/absent.ini: No such file");
    check_error(config_load(&config, "configs", 0, NULL, 1, &error), "configs: Is a directory");
}

static void test_long_lines_and_zero_bytes(void **state) {
    (void)state;
    char text[12000], path[1400], override[1500];
    memset(path, 'p', sizeof path);
    path[150] = 0; /* short enough for every build of inih */
    snprintf(text, sizeof text, "%s[data]\nval = %s\n", small, path);
    loads(text, NULL);
    assert_string_equal(config.data.val, path);
    /* Longer ones are read whole or refused, never cut. */
    path[150] = 'p';
    path[MAX_TEXT - 1] = 0;
    snprintf(text, sizeof text, "%s[data]\nval = %s\n", small, path);
    write_file(text, strlen(text));
    if (config_load(&config, file, 0, NULL, 1, &error))
        check_error(-1, ":16: line of");
    else
        assert_string_equal(config.data.val, path);
    snprintf(override, sizeof override, "data.val=%s", path);
    loads(small, override, NULL);
    assert_string_equal(config.data.val, path);
    path[MAX_TEXT - 1] = 'p';
    path[MAX_TEXT] = 0;
    snprintf(override, sizeof override, "data.val=%s", path);
    refused("too long; val takes at most 1023 bytes", small, override, NULL);
    memset(text, 'x', 9000);
    memcpy(text, "[run]\ndir = ", 12);
    strcpy(text + 9000, "\n");
    refused(":2: line of", text, NULL);
    write_file("[model]\nvo\0cab_size = 3\n", 24);
    check_error(config_load(&config, file, 0, NULL, 1, &error), ":2: contains a zero byte");
}

static void test_overrides(void **state) {
    (void)state;
    refused("override 'train.lr=abc': not a number; lr takes a number from 0 to 1000", small, "train.lr=abc",
            NULL);
    refused("override 'trian.lr=1': unknown section 'trian'; did you mean 'train'?", small, "trian.lr=1",
            NULL);
    refused("override 'train.lrr=1': unknown key 'lrr' in [train]; did you mean 'lr'?", small, "train.lrr=1",
            NULL);
    refused("override 'lr=1': expected section.key=value; did you mean 'train.lr=...'?", small, "lr=1", NULL);
    refused("override 'nonsense': expected section.key=value, such as", small, "nonsense", NULL);
    refused("override 'data.train': expected section.key=value", small, "data.train", NULL);
    refused("override 'x=a.b': expected section.key=value", small, "x=a.b", NULL);
    refused("override '': expected", small, "", NULL);
    refused("override 'run.dir=': empty", small, "run.dir=", NULL);
    /* Errors are one line, whatever the length and the control characters of the text. */
    refused("override 'tr?ain.lr?=1': unknown section 'tr?ain'", small, "tr\nain.lr\033=1", NULL);
    char wide[3000];
    memset(wide, 'k', sizeof wide - 1);
    wide[sizeof wide - 1] = 0;
    refused("kkkkkkk...': expected section", small, wide, NULL);
    wide[1500] = '.';
    wide[2000] = '=';
    refused("kkkkkkk...': unknown section", small, wide, NULL);
}

/* One pair of quotes around a value is not part of it, and ~/ is the home directory. */
static void test_quotes_and_home(void **state) {
    (void)state;
    char text[20000];
    assert_int_equal(setenv("HOME", "/home/anna", 1), 0);
    snprintf(text, sizeof text, "%s%s", small,
             "[train]\ninit_from = '~/runs/a b'\nschedule = \"linear\"\n[data]\nval = \"my data #1 ;/*.bin\" "
             "# all\n"
             "tokenizer = ~/t.json\n");
    loads(text, "data.train=\"~/my data/*.bin\"", "run.dir=~", NULL);
    assert_string_equal(config.train.init_from, "/home/anna/runs/a b");
    assert_int_equal(config.train.schedule, SCHEDULE_LINEAR);
    assert_string_equal(config.data.val, "my data #1 ;/*.bin");
    assert_string_equal(config.data.tokenizer, "/home/anna/t.json");
    assert_string_equal(config.data.train, "/home/anna/my data/*.bin");
    assert_string_equal(config.run.dir, "/home/anna");
    assert_int_equal(setenv("HOME", "/home/a[b]*?\\c", 1), 0); /* its own characters are no pattern */
    loads(small, "data.train=~/d[0-9]/*.bin", "data.val=~", "run.dir=~/r", "data.tokenizer=~/t.json", NULL);
    assert_string_equal(config.data.train, "/home/a[[]b][*][?]\\\\c/d[0-9]/*.bin");
    assert_string_equal(config.data.val, "/home/a[[]b][*][?]\\\\c");
    assert_string_equal(config.run.dir, "/home/a[b]*?\\c/r");
    assert_string_equal(config.data.tokenizer, "/home/a[b]*?\\c/t.json");
    loads(small, "data.train=it's/~a\"b/*.bin", "data.val='none'", NULL); /* in the middle they are letters */
    assert_string_equal(config.data.train, "it's/~a\"b/*.bin");
    assert_string_equal(config.data.val, "");

    static const char *const cases[][2] = {
        {"data.train=\"a b", "a quote is missing"},
        {"data.train=a b'", "a quote is missing"},
        {"data.train=\"a'", "a quote is missing"},
        {"data.train=''a''", "a quote is missing"},
        {"data.train=\"", "a quote is missing"},
        {"data.train=''", "empty; give train a value"},
        {"data.train=~boris/*.bin", "write the whole path"},
        {"data.train='~boris/x'", "write the whole path"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(cases[i][1], small, cases[i][0], NULL);
    assert_int_equal(setenv("HOME", "", 1), 0);
    refused("HOME is not set", small, "data.train=~/x", NULL);
    assert_int_equal(unsetenv("HOME"), 0);
    refused("HOME is not set", small, "data.train=~/x", NULL);
}

static void test_values_refused(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"model.hidden_size=12.5", "not a whole number; hidden_size takes a whole number from 1 to 1048576"},
        {"model.hidden_size=0x10", "not a whole number"},
        {"model.hidden_size= 16", "not a whole number"},
        {"model.hidden_size=-", "not a whole number"},
        {"model.hidden_size=-64", "out of range"},
        {"model.hidden_size=0", "out of range"},
        {"model.vocab_size=2147483648", "out of range; vocab_size takes a whole number from 1 to 2147483647"},
        {"model.vocab_size=99999999999999999999999", "out of range"},
        {"model.vocab_size=18446744073709551617", "out of range"}, /* 2^64 + 1 */
        {"model.num_hidden_layers=1025", "out of range"},
        {"model.head_dim=0", "out of range"},
        {"model.iha_window=0",
         "out of range; iha_window takes a whole number from 1 to 1099511627776, or auto"},
        {"model.iha_window=all", "not a whole number"},
        {"model.local_window=0", "out of range"},
        {"model.local_window=auto", "not a whole number"},
        {"model.norm_eps=0", "out of range; norm_eps takes a number from 1e-30 to 1"},
        {"model.bias=yes", "not true or false; bias takes only these two values"},
        {"model.causal=1", "not true or false"},
        {"model.qkv_bias=1", "not true or false"},
        {"model.rope_scaling=yarn", "unknown value 'yarn'; rope_scaling takes none or llama3"},
        {"model.rope_factor=0.5", "out of range"},
        {"model.norm=rms", "unknown value 'rms'; norm takes rmsnorm or layernorm"},
        {"model.norm=RMSNorm", "did you mean 'rmsnorm'?"},
        {"model.activation=swigul",
         "unknown value 'swigul'; did you mean 'swiglu'? activation takes gelu_tanh, relu2 or swiglu"},
        {"train.lr=nan", "not a number"},
        {"train.lr=inf", "not a number"},
        {"train.lr=1e999", "out of range"},
        {"train.lr=0x1p-3", "not a number"},
        {"train.lr= 1", "not a number"},
        {"train.lr=1e-3x", "not a number"},
        {"train.lr=-1", "out of range"},
        {"train.beta1=1", "out of range; beta1 takes a number from 0 to 1 (excluded)"},
        {"train.beta2=1.5", "out of range"},
        {"train.eps=0", "out of range"},
        {"train.schedule=cosin", "did you mean 'cosine'?"},
        {"train.seed=-1", "out of range"},
        {"train.seed=9007199254740993", "out of range"}, /* as a double it would be the largest seed */
        {"train.steps=0", "out of range; steps takes a whole number from 1 to 1073741824, or none"},
        {"train.epochs=0", "out of range; epochs takes a number from 0 (excluded) to 1000000000, or none"},
        {"train.epochs=all", "not a number"},
        {"system.zero_stage=3", "out of range; zero_stage takes a whole number from 0 to 2"},
        {"system.threads=0", "out of range; threads takes a whole number from 1 to 4096, or all"},
        {"system.peer_timeout=0", "out of range"},
        {"system.device=gpu", "device takes auto, cpu or cuda"},
        {"data.shuffle=True", "not true or false"},
        {"run.keep=-1", "out of range"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(cases[i][1], small, cases[i][0], NULL);
}

static void test_relations(void **state) {
    (void)state;
    refused("override 'model.num_attention_heads=5': hidden_size = 64 is not a multiple of "
            "num_attention_heads = 5",
            small, "model.num_attention_heads=5", NULL);
    refused(":5: hidden_size = 65 is not a multiple", small, "model.hidden_size=65", NULL);
    loads(small, "model.num_attention_heads=5", "model.head_dim=12", NULL);
    refused("override 'model.head_dim=7': head_dim = 7 is odd", small, "model.head_dim=7", NULL);
    refused("layer 0 is diff_global, whose heads are in pairs, and num_attention_heads = 3 is odd", small,
            "model.layer_pattern=diff_global", "model.num_attention_heads=3", "model.head_dim=8", NULL);
    loads(small, "model.head_dim=7", "model.position_embedding=learned", NULL);
    refused("override 'model.rope_scaling=llama3': rope_scaling = llama3 needs position_embedding = rope",
            small, "model.rope_scaling=llama3", "model.position_embedding=learned", NULL);
    refused("override 'model.rope_high_freq_factor=1': rope_high_freq_factor = 1 is not above", small,
            "model.rope_scaling=llama3", "model.rope_high_freq_factor=1", NULL);
    loads(small, "model.rope_high_freq_factor=1", NULL); /* of no scaling */
    refused("override 'model.num_key_value_heads=3': num_key_value_heads = 3 does not divide "
            "num_attention_heads = 4",
            small, "model.num_key_value_heads=3", NULL);
    loads(small, "model.num_key_value_heads=2", NULL);
    assert_int_equal(config.model.num_key_value_heads, 2);
    loads(small, NULL);
    assert_int_equal(config.model.num_key_value_heads, 4);
    refused("layer 1 is folded_global, which needs num_key_value_heads = num_attention_heads", small,
            "model.num_key_value_heads=2", "model.layer_pattern=mha_global folded_global", NULL);
    refused("layer 0 is folded_local, which needs qk_norm = none", small, "model.qk_norm=rmsnorm",
            "model.layer_pattern=folded_local", NULL);
    refused(":5: head_dim = hidden_size / num_attention_heads = 262144: out of range", small,
            "model.hidden_size=1048576", NULL);
    refused("override 'model.causal=false': layer 0 is iha_local, and local layers need causal = true", small,
            "model.causal=false", NULL);
    refused("override 'model.layer_pattern=mha_global mha_local': layer 1 is mha_local", small,
            "model.causal=false", "model.layer_pattern=mha_global mha_local", NULL);
    loads(small, "model.causal=false", "model.layer_pattern=mha_global*7 mha_local",
          NULL); /* cut before it */
    refused("override 'model.max_position_embeddings=63': train.seq_len = 64 is longer than "
            "model.max_position_embeddings = 63",
            small, "model.max_position_embeddings=63", NULL);
    loads(small, "model.max_position_embeddings=64", NULL);
    refused("micro_batch * seq_len * ranks = 2 * 64 * 1 = 128; the nearest that fits is 1024", small,
            "train.batch_tokens=1000", NULL);
    refused("the nearest that fits is 128", small, "train.batch_tokens=3", NULL);
    loads(small, "train.batch_tokens=1024", NULL);
    refused("min_lr = 0.002 is above lr = 0.001", small, "train.min_lr=2e-3", NULL);
    refused("warmup_steps = 101 is above steps = 100", small, "train.warmup_steps=101", NULL);
    loads(small, "train.warmup_steps=100", NULL);
    assert_int_equal(config.train.total_steps, 100);
    loads(small, "train.steps=none", "train.epochs=2.5", "train.warmup_steps=101", NULL);
    assert_true(config.train.epochs == 2.5 && config.train.steps == 0 && config.train.total_steps == 0);
    refused(": missing required key: train.steps (or train.epochs, train.tokens_per_param)", small,
            "train.steps=none", NULL);
    refused("override 'train.epochs=2': train.steps = 100 and train.epochs = 2 are both given", small,
            "train.epochs=2", NULL);
    refused("override 'train.patience=3': patience = 3 counts evaluations, and there are none", small,
            "train.patience=3", "data.val=x", NULL);
    refused("best_by = exact compares evaluations", small, "train.best_by=exact", "run.eval_every=1", NULL);
    loads(small, "train.patience=3", "train.best_by=exact", "data.val=x", "run.eval_every=1", NULL);
    refused("tokenizer = bytes needs model.vocab_size >= 257", small, "data.tokenizer=bytes",
            "model.vocab_size=256", NULL);
    loads(small, "data.tokenizer=bytes", "model.vocab_size=257", NULL);
    refused("tokens in one pass; the limit is 4294967296", small, "train.micro_batch=65536",
            "train.seq_len=16777216", NULL);
    refused("above the limit of 2^44 numbers", small, "train.micro_batch=65536", "train.seq_len=65536",
            "model.num_pseudo_heads=4096", NULL);
}

static void test_ranks(void **state) {
    (void)state;
    loads(small, NULL);
    char *overrides[] = {"train.batch_tokens=1024"};
    assert_int_equal(config_load(&config, file, 0, NULL, 3, &error), 0);
    assert_int_equal(config.train.batch_tokens, 384);
    assert_int_equal(config_load(&config, file, 1, overrides, 8, &error), 0);
    assert_int_equal(config.train.batch_tokens, 1024);
    check_error(config_load(&config, file, 1, overrides, 3, &error),
                "2 * 64 * 3 = 384; the nearest that fits is 1152");
    check_error(config_load(&config, file, 0, NULL, 0, &error), "0 ranks");
}

static void test_override_of_a_checkpoint(void **state) {
    (void)state;
    config_defaults(&config);
    config.model.vocab_size = 256;
    config.model.max_position_embeddings = 64;
    char *good[] = {"data.val=x/*", "train.seq_len=64", "system.threads=2"};
    assert_int_equal(config_override(&config, 3, good, &error), 0);
    assert_string_equal(config.data.val, "x/*");
    assert_int_equal(config.train.seq_len, 64);
    assert_int_equal(config.system.threads, 2);
    assert_int_equal(config.model.vocab_size, 256);
    static const char *const bad[][2] = {
        {"model.hidden_size=3", "override 'model.hidden_size=3': the model comes from the checkpoint"},
        {"model.hiden=3", "the model comes from the checkpoint"},
        {"data.vall=3", "did you mean 'val'?"},
        {"train.lr=x", "not a number"},
        {"train.seq_len=65", "override 'train.seq_len=65': train.seq_len = 65 is longer"},
        {"data.tokenizer=bytes", "needs model.vocab_size >= 257"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct config copy = config;
        char *override = (char *)(uintptr_t)bad[i][0];
        check_error(config_override(&copy, 1, &override, &error), bad[i][1]);
    }
}

/* ---- round trips ---- */

static struct model_config from_json(const char *json) {
    struct model_config m;
    memset(&m, 0x5a, sizeof m);
    if (config_model_from_json(&m, json, "here.json", &error))
        fail_msg("did not load: %s", error.text);
    return m;
}

static void test_json_round_trip(void **state) {
    (void)state;
    loads(small, "model.rope_theta=0.30000000000000004", "model.norm_eps=1.0000000000000002e-05",
          "model.layer_pattern=mha_local iha_local mha_global iha_global", "model.num_pseudo_heads=3",
          "model.activation=relu2", "model.iha_mask=token", "model.bias=true", NULL);
    char *json = config_model_to_json(&config.model);
    assert_non_null(json);
    struct model_config m = from_json(json);
    assert_true(m.rope_theta == 0.30000000000000004); /* to the last bit, which 15 digits lose */
    assert_true(m.norm_eps == 1.0000000000000002e-05);
    assert_memory_equal(&m, &config.model, sizeof m);
    assert_non_null(strstr(json, "\"model_type\":\t\"iha\""));
    assert_non_null(
        strstr(json, "\"mha_local\", \"iha_local\", \"mha_global\", \"iha_global\", \"mha_local\""));
    assert_non_null(strstr(json, "\"bias\":\ttrue"));
    assert_non_null(strstr(json, "\"iha_window\":\t9"));
    assert_null(strstr(json, "init_"));
    assert_null(strstr(json, "layer_pattern"));
    assert_string_equal(json + strlen(json) - 3, "\n}\n");
    free(json);
    /* The init_* keys are left out. */
    loads(small, "model.init_alpha=noise", NULL);
    json = config_model_to_json(&config.model);
    assert_int_equal(from_json(json).init_alpha, ALPHA_IDENTITY);
    free(json);
}

#define KEYS                                                                                                 \
    "\"model_type\":\"iha\",\"vocab_size\":300,\"hidden_size\":64,\"num_attention_heads\":4,"                \
    "\"num_hidden_layers\":2,\"max_position_embeddings\":128"

static void test_json_defaults(void **state) {
    (void)state;
    struct model_config m = from_json("{" KEYS "}");
    assert_int_equal(m.head_dim, 16);
    assert_int_equal(m.intermediate_size, 256);
    assert_int_equal(m.iha_window, 32);
    assert_int_equal(m.layer_types[0], LAYER_IHA_LOCAL);
    assert_int_equal(m.layer_types[2], 0);
    m = from_json(" {" KEYS ",\"torch_dtype\":\"float32\",\"x\":{\"vocab_size\":[]},\"head_dim\":null,"
                  "\"rope_theta\":5e5,\"init_alpha\":7,\"layer_types\":[\"mha_global\",\"iha_local\"]}\n\n");
    assert_int_equal(m.head_dim, 16);
    assert_true(m.rope_theta == 500000);
    assert_int_equal(m.layer_types[0], LAYER_MHA_GLOBAL);
    assert_int_equal(m.layer_types[1], LAYER_IHA_LOCAL);
}

static void test_json_refused(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"", "here.json:1: not valid JSON"},
        {"{\n\"a\": 1,\n\"b\": \"open", "here.json:3: not valid JSON"},
        {"{" KEYS "} x", "not valid JSON"},
        {"[1]", "here.json: not a JSON object"},
        {"{}", "here.json: no \"model_type\""},
        {"{\"model_type\":\"llama\"}", "model_type is 'llama'; only 'iha'"},
        {"{\"model_type\":\"l\\nl\"}", "model_type is 'l?l'"},
        {"{\"model_type\":\"iha\"}", "missing key \"vocab_size\""},
        {"{\"model_type\":\"iha\",\"vocab_size\":null}", "missing key \"vocab_size\""},
        {"{\"model_type\":\"iha\",\"vocab_size\":9,\"hidden_size\":8,\"num_hidden_layers\":1,"
         "\"num_attention_heads\":2}",
         "missing key \"max_position_embeddings\""},
        {"{" KEYS ",\"vocab_size\":300}", "\"vocab_size\" is given twice"},
        {"{" KEYS ",\"head_dim\":\"16\"}", "\"head_dim\" is not a number"},
        {"{" KEYS ",\"head_dim\":16.5}", "\"head_dim\": 16.5 is not a whole number"},
        {"{" KEYS ",\"head_dim\":-16}",
         "\"head_dim\": out of range; head_dim takes a whole number from 1 to 4096"},
        {"{" KEYS ",\"head_dim\":0}", "out of range"},
        {"{" KEYS ",\"iha_window\":1e300}", "out of range"},
        {"{" KEYS ",\"iha_window\":1e999}", "out of range"},
        {"{" KEYS ",\"iha_window\":0}", "out of range"},
        {"{" KEYS ",\"iha_window\":\"auto\"}", "\"iha_window\" is not a number"},
        {"{" KEYS ",\"bias\":1}", "\"bias\" is not true or false"},
        {"{" KEYS ",\"norm\":true}", "\"norm\" is not a string"},
        {"{" KEYS ",\"norm\":\"rmsnrm\"}", "did you mean 'rmsnorm'?"},
        {"{" KEYS ",\"head_dim\":15}", "head_dim = 15 is odd"},
        {"{" KEYS ",\"causal\":false}", "layer 0 is iha_local"},
        {"{" KEYS ",\"layer_types\":[\"mha_global\"]}", "layer_types names 1 layers, num_hidden_layers is 2"},
        {"{" KEYS ",\"layer_types\":[]}", "layer_types names 0 layers"},
        {"{" KEYS ",\"layer_types\":\"mha_global\"}", "\"layer_types\" is not a list of names"},
        {"{" KEYS ",\"layer_types\":[\"mha_global\",3]}", "\"layer_types\" is not a list of names"},
        {"{" KEYS ",\"layer_types\":[\"mha_global\",\"full\"]}", "layer_types[1]: unknown value 'full'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_config m;
        check_error(config_model_from_json(&m, cases[i][0], "here.json", &error), cases[i][1]);
    }
    char *many = malloc(40000);
    strcpy(many, "{" KEYS ",\"layer_types\":[\"mha_global\"");
    for (int i = 0; i < MAX_LAYERS; i++)
        strcat(many, ",\"mha_global\"");
    strcat(many, "]}");
    struct model_config m;
    check_error(config_model_from_json(&m, many, "here.json", &error), "more than 1024 layers");
    free(many);
}

struct visited {
    int count;
    char *text[128]; /* section.key=value */
};

static void collect(void *context, const char *key, const char *value) {
    struct visited *v = context;
    size_t size = strlen(key) + strlen(value) + 2;
    assert_true(v->count < 128);
    v->text[v->count] = malloc(size);
    snprintf(v->text[v->count++], size, "%s=%s", key, value);
}

static bool has(const struct visited *v, const char *text) {
    for (int i = 0; i < v->count; i++)
        if (!strcmp(v->text[i], text))
            return true;
    return false;
}

/* The output of config_visit, given as overrides, is the same configuration. */
static void visit_round_trip(const struct config *original, struct visited *v) {
    *v = (struct visited){0};
    config_visit(original, collect, v);
    struct config *again = malloc(sizeof *again);
    struct visited w = {0};
    if (config_load(again, NULL, v->count, v->text, 1, &error))
        fail_msg("did not load: %s", error.text);
    assert_memory_equal(&again->model, &original->model, sizeof again->model);
    config_visit(again, collect, &w);
    assert_int_equal(v->count, w.count);
    for (int i = 0; i < w.count; i++) {
        assert_string_equal(v->text[i], w.text[i]);
        free(w.text[i]);
    }
    free(again);
}

static void free_visited(struct visited *v) {
    while (v->count)
        free(v->text[--v->count]);
}

static void test_visit(void **state) {
    (void)state;
    struct visited v;
    loads(small, NULL);
    visit_round_trip(&config, &v);
    static const char *const expected[] = {
        "model.vocab_size=300",
        "model.head_dim=16",
        "model.iha_window=16",
        "model.rope_theta=10000",
        "model.norm_eps=1e-05",
        "model.bias=false",
        "model.iha_rope=virtual",
        "train.min_lr=0.0001",
        "model.layer_pattern=iha_local iha_local iha_local iha_local mha_global iha_local iha_local",
        "train.batch_tokens=128",
        "train.init_from=none",
        "train.weight_decay=0.1",
        "system.precision=auto",
        "system.threads=all",
        "data.val=none",
        "data.tokenizer=none",
        "data.train=data/x/train_*.bin",
        "run.dir=runs/x",
        "run.log_every=1",
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if (!has(&v, expected[i]))
            fail_msg("not visited: %s", expected[i]);
    free_visited(&v);

    loads(small, "train.lr=0.30000000000000004", "model.num_hidden_layers=1024", "train.init_from=a # b; c ",
          "data.val=x=y", "system.threads=7", "train.min_lr=0", "train.seed=9007199254740992", NULL);
    visit_round_trip(&config, &v);
    assert_true(has(&v, "train.lr=0.30000000000000004"));
    assert_true(has(&v, "train.init_from=a # b; c "));
    assert_true(has(&v, "data.val=x=y"));
    assert_true(has(&v, "train.min_lr=0"));
    assert_true(has(&v, "train.seed=9007199254740992"));
    assert_true(has(&v, "train.epochs=none"));
    free_visited(&v);

    loads(small, "train.steps=none", "train.epochs=0.1", NULL);
    config.train.total_steps = 7; /* of one run's data */
    visit_round_trip(&config, &v);
    assert_true(has(&v, "train.epochs=0.1") && has(&v, "train.steps=none"));
    free_visited(&v);
}

static void test_resume(void **state) {
    (void)state;
    static const char *const may[] = {
        "train.steps",    "train.lr", "train.min_lr", "train.warmup_steps", "train.schedule", "system.device",
        "system.threads", "run.dir",  "run.keep",     "train.epochs",       "train.patience"};
    static const char *const may_not[] = {"model.vocab_size",
                                          "model.layer_pattern",
                                          "train.seq_len",
                                          "train.batch_tokens",
                                          "train.seed",
                                          "train.beta1",
                                          "train.best_by",
                                          "data.train",
                                          "data.shuffle",
                                          "nonsense",
                                          "run.",
                                          "run",
                                          "",
                                          "train.lrx"};
    for (size_t i = 0; i < sizeof may / sizeof *may; i++)
        assert_true(config_may_change_on_resume(may[i]));
    for (size_t i = 0; i < sizeof may_not / sizeof *may_not; i++)
        assert_false(config_may_change_on_resume(may_not[i]));
}

static void test_help(void **state) {
    (void)state;
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    config_print_help(out);
    fclose(out);
    struct visited v = {0};
    loads(small, NULL);
    config_visit(&config, collect, &v);
    assert_int_equal(v.count, 91); /* every key */
    for (int i = 0; i < v.count; i++) {
        char word[80];
        char *name = strchr(v.text[i], '.') + 1;
        snprintf(word, sizeof word, "\n  %.*s ", (int)strcspn(name, "="), name);
        if (!strstr(text, word))
            fail_msg("no help on %s", name);
    }
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        assert_true(strlen(line) <= 110);
    free_visited(&v);
    free(text);
}

static void test_nearest(void **state) {
    (void)state;
    static const char *const names[] = {"train", "eval", "generate", "info", NULL};
    assert_string_equal(nearest_name("trian", names),
                        "train"); /* a swap of adjacent letters counts as one error */
    assert_string_equal(nearest_name("GENERATE", names), "generate");
    assert_string_equal(nearest_name("evla", names), "eval");
    assert_null(nearest_name("serve", names));
    assert_null(nearest_name("", names));
    assert_null(nearest_name("x", names));
    char wide[5000];
    memset(wide, 't', sizeof wide - 1);
    wide[sizeof wide - 1] = 0;
    assert_null(nearest_name(wide, names));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),        cmocka_unit_test(test_config_defaults),
        cmocka_unit_test(test_values),          cmocka_unit_test(test_comments_and_layout),
        cmocka_unit_test(test_without_a_file),  cmocka_unit_test(test_pattern),
        cmocka_unit_test(test_auto_window),     cmocka_unit_test(test_committed_configs),
        cmocka_unit_test(test_broken_files),    cmocka_unit_test(test_long_lines_and_zero_bytes),
        cmocka_unit_test(test_overrides),       cmocka_unit_test(test_quotes_and_home),
        cmocka_unit_test(test_values_refused),  cmocka_unit_test(test_relations),
        cmocka_unit_test(test_ranks),           cmocka_unit_test(test_override_of_a_checkpoint),
        cmocka_unit_test(test_json_round_trip), cmocka_unit_test(test_json_defaults),
        cmocka_unit_test(test_json_refused),    cmocka_unit_test(test_visit),
        cmocka_unit_test(test_resume),          cmocka_unit_test(test_help),
        cmocka_unit_test(test_nearest),
    };
    int descriptor = mkstemp(file);
    if (descriptor < 0)
        return 1;
    close(descriptor);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(file);
    return failed;
}
