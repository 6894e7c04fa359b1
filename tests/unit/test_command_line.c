/* The command line: what each argument sets, in any order, and the error for each wrong one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/config/command_line.h"

enum { MAX_ARGUMENTS = 24 };

static struct command_line line;
static struct error error;

/* Parse words that are separated by spaces; '_' stands for a space within a word. */
static int parse(const char *words) {
    static char text[512], *arguments[MAX_ARGUMENTS];
    int count = 0;
    snprintf(text, sizeof text, "%s", words);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        for (char *c = word; *c; c++)
            *c = *c == '_' ? ' ' : *c;
        arguments[count++] = word;
    }
    error = (struct error){0};
    return command_line_parse(&line, count, arguments, &error);
}

static void parses(const char *words, enum command command, const char *path) {
    if (parse(words) != 0)
        fail_msg("%s: %s", words, error.text);
    assert_int_equal(line.command, command);
    if (path)
        assert_string_equal(line.path, path);
}

/* `message` is the whole error, or its part before "...". */
static void refused(const char *words, const char *message) {
    if (parse(words) != -1 || error.exit_code != EXIT_USER)
        fail_msg("accepted: %s", words);
    const char *end = strstr(message, "...");
    size_t length = end ? (size_t)(end - message) : sizeof error.text;
    if (strncmp(error.text, message, length) != 0)
        fail_msg("%s: \"%s\" instead of \"%s\"", words, error.text, message);
}

static void each_command_has_defaults(void **state) {
    (void)state;
    parses("train a.ini", COMMAND_TRAIN, "a.ini");
    assert_int_equal(line.profile_steps, 0);
    assert_int_equal(line.override_count, 0);
    parses("eval runs/a", COMMAND_EVAL, "runs/a");
    parses("generate runs/a", COMMAND_GENERATE, "runs/a");
    assert_null(line.prompt);
    assert_null(line.prompt_file);
    assert_null(line.stop);
    assert_true(line.top_p == 1);
    assert_int_equal(line.tokens, 256);
    assert_true(line.temperature == 0.8);
    assert_int_equal(line.top_k, 0);
    assert_int_equal(line.seed, 1);
    parses("info a.ini", COMMAND_INFO, "a.ini");
    assert_int_equal(line.gpus, 0);
    assert_null(line.gpu);
    assert_null(line.link);
}

static void options_and_overrides_come_in_any_order(void **state) {
    (void)state;
    static const char *const orders[] = {
        "train a.ini --profile 7 train.lr=1 run.dir=b", "train --profile 7 a.ini train.lr=1 run.dir=b",
        "train a.ini train.lr=1 --profile 7 run.dir=b", "train a.ini train.lr=1 run.dir=b --profile 7"};
    for (size_t i = 0; i < sizeof orders / sizeof *orders; i++) {
        parses(orders[i], COMMAND_TRAIN, "a.ini");
        assert_int_equal(line.profile_steps, 7);
        assert_int_equal(line.override_count, 2);
        assert_string_equal(line.overrides[0], "train.lr=1");
        assert_string_equal(line.overrides[1], "run.dir=b");
    }
}

static void options_set_their_values(void **state) {
    (void)state;
    parses("generate --prompt In_the_beginning --tokens 12 c --temperature 0.25 --top-k 40 --seed 9e15",
           COMMAND_GENERATE, "c");
    assert_string_equal(line.prompt, "In the beginning");
    assert_int_equal(line.tokens, 12);
    assert_true(line.temperature == 0.25);
    assert_int_equal(line.top_k, 40);
    assert_int_equal(line.seed, 9000000000000000);
    parses("generate c --prompt --tokens --seed 3", COMMAND_GENERATE,
           "c"); /* a value may look like an option */
    assert_string_equal(line.prompt, "--tokens");
    assert_int_equal(line.seed, 3);
    parses("generate --chat c --system Be_brief.", COMMAND_GENERATE, "c"); /* --chat has no value */
    assert_true(line.chat);
    assert_string_equal(line.system, "Be brief.");
    parses("generate --prompt-file - c --top-p 0.9 --stop Chapter_2", COMMAND_GENERATE, "c");
    assert_false(line.chat);
    assert_string_equal(line.prompt_file, "-");
    assert_true(line.top_p == 0.9);
    assert_string_equal(line.stop, "Chapter 2");
    parses("attention c --prompt x --layer 3 --out a.safetensors", COMMAND_ATTENTION, "c");
    assert_int_equal(line.layer, 3);
    assert_string_equal(line.out, "a.safetensors");
    parses("info a.ini --gpus 1 --launches", COMMAND_INFO, "a.ini");
    assert_true(line.launches);
    parses("info a.ini --gpus 16 --gpu h100 --link ib400", COMMAND_INFO, "a.ini");
    assert_false(line.launches);
    assert_int_equal(line.gpus, 16);
    assert_string_equal(line.gpu, "h100");
    assert_string_equal(line.link, "ib400");
    parses("check *.bin --vocab 257", COMMAND_CHECK, "*.bin");
    assert_int_equal(line.vocab, 257);
}

static void wrong_arguments_are_named(void **state) {
    (void)state;
    refused("", "no command given; see train_iha --help");
    refused("trian a.ini", "unknown command 'trian'; did you mean train; see train_iha --help");
    refused("serve", "unknown command 'serve'; see train_iha --help");
    refused("eval", "eval: CHECKPOINT is missing; usage: train_iha eval CHECKPOINT data.val=GLOB ...");
    refused("info --gpus a.ini", "info: CONFIG|CHECKPOINT is missing; usage: train_iha info ...");
    refused("train a.ini --profil 3",
            "train: unknown option --profil; did you mean --profile; see train_iha ...");
    refused("train --profil 3 a.ini",
            "train: unknown option --profil; did you mean --profile; see train_iha ...");
    refused("eval c --prompt x", "eval: unknown option --prompt; see train_iha eval --help");
    refused("train a.ini --profile", "train: --profile needs a value");
    refused("train a.ini --profile 1 --profile 1", "train: --profile is given twice");
    refused("train a.ini --profile 1 --profile", "train: --profile is given twice");
    refused("generate --seed 1 c --seed 1", "generate: --seed is given twice");
    refused("generate c --chat --prompt-file b",
            "generate: --chat reads its turns from the standard input; leave --prompt-file out");
    refused("generate c --chat --chat", "generate: --chat is given twice");
    refused("generate --chat", "generate: CHECKPOINT is missing; ...");
    refused("generate c --system a", "generate: --system belongs to --chat");
    refused("generate c --prompt a --prompt-file b",
            "generate: --prompt and --prompt-file are both given; give one");
    refused("check a.bin", "check: --vocab N is missing: the vocab_size of the model");
    refused("check a.bin b.bin --vocab 257",
            "check: 'b.bin' comes after GLOB; quote the glob, so that the shell does not expand it");
    refused("check a.bin --vocab 0", "check: --vocab 0: not a whole number from 1 to 2147483648");
}

static void wrong_values_are_named(void **state) {
    (void)state;
    refused("generate c --top-p 1.1", "generate: --top-p 1.1: not a number from 0 to 1");
    static const char *const numbers[] = {"many", "-1", "1001", "1.5", "nan", "inf", "1x", "1e99"};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        char words[64], message[128];
        snprintf(words, sizeof words, "train a.ini --profile %s", numbers[i]);
        snprintf(message, sizeof message, "train: --profile %s: not a whole number from 1 to 1000",
                 numbers[i]);
        refused(words, message);
    }
    refused("generate c --temperature 101", "generate: --temperature 101: not a number from 0 to 100");
    refused("info a.ini --gpu h20",
            "info: --gpu h20 is unknown; the known values are h200, h100, a100; did you mean 'h200'?");
    refused("info a.ini --link wire", "info: --link wire is unknown; the known values are nvlink, ib400");
}

static void help_and_version(void **state) {
    (void)state;
    parses("--help", COMMAND_HELP, NULL);
    assert_int_equal(line.help_topic, -1);
    parses("--version", COMMAND_VERSION, NULL);
    static const char *const names[] = {"train", "eval", "generate", "attention", "info", "check"};
    for (int i = 0; i < 5; i++) {
        char words[64], usage[64], *text = NULL;
        size_t size;
        snprintf(words, sizeof words, "%s a --unknown --help", names[i]);
        snprintf(usage, sizeof usage, "train_iha %s ", names[i]);
        parses(words, COMMAND_HELP, NULL);
        assert_int_equal(line.help_topic, i);
        FILE *out = open_memstream(&text, &size);
        command_line_print_help(out, line.help_topic);
        fclose(out);
        assert_memory_equal(text, usage, strlen(usage));
        for (char *row = strtok(text, "\n"); row; row = strtok(NULL, "\n"))
            assert_true(strlen(row) <= 120);
        free(text);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_command_has_defaults),
        cmocka_unit_test(options_and_overrides_come_in_any_order),
        cmocka_unit_test(options_set_their_values),
        cmocka_unit_test(wrong_arguments_are_named),
        cmocka_unit_test(wrong_values_are_named),
        cmocka_unit_test(help_and_version),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
