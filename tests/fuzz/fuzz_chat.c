/* chat.json: what is accepted gives ids of the vocabulary for any text, and the same when a checkpoint's copy is read.
 *
 * Input: the file, RECORD_SEPARATOR, the user's text and, after another one, a system message. */
#include "tests/fuzz/fuzz.h"

#include "data/chat.h"

enum { VOCAB_SIZE = 257, TURNS = 4 };

struct encoded {
    int32_t *ids;
    int64_t count;
};

/* Turn i of a known conversation: after nothing, after both kinds of answers, and with a system message. */
static struct encoded encode(const struct chat *c, const struct tokenizer *t, int i, const char *text,
                             size_t length, const char *system) {
    static const enum chat_before before[TURNS] = {CHAT_BEGINS, CHAT_ANSWER_ENDED, CHAT_ANSWER_CUT,
                                                   CHAT_BEGINS};
    struct chat_turn turn = {
        .before = before[i], .system = i == 3 ? system : NULL, .text = text, .length = length};
    struct encoded made;
    struct error e = {0};
    made.count = chat_encode_turn(c, t, &turn, &made.ids, &e);
    if (i == 3 && !chat_knows_system(c)) {
        CHECK(made.count == -1 && !made.ids);
        check_user_error(&e);
        return made;
    }
    CHECK(made.count >= 0);
    for (int64_t k = 0; k < made.count; k++)
        CHECK(made.ids[k] >= 0 && made.ids[k] < VOCAB_SIZE);
    CHECK(i != 1 || made.ids[0] == chat_end(c));
    return made;
}

static void check_copy(const struct chat *c, const struct tokenizer *t, const char *text, size_t length,
                       const char *system) {
    struct error e = {0};
    char *json = chat_json(c);
    CHECK(json);
    struct chat *copy = chat_open(fuzz_file(1, json, strlen(json)), VOCAB_SIZE, &e);
    CHECK(copy && !chat_refusal(copy) == !chat_refusal(c));
    CHECK(chat_end(copy) == chat_end(c) && chat_knows_system(copy) == chat_knows_system(c));
    for (int i = 0; i < TURNS && !chat_refusal(c); i++) {
        struct encoded a = encode(c, t, i, text, length, system),
                       b = encode(copy, t, i, text, length, system);
        CHECK(a.count == b.count &&
              (a.count <= 0 || memcmp(a.ids, b.ids, (size_t)a.count * sizeof *a.ids) == 0));
        free(a.ids);
        free(b.ids);
    }
    chat_close(copy);
    free(json);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct tokenizer *t;
    struct error e = {0};
    const uint8_t *text = size ? memchr(data, RECORD_SEPARATOR, size) : NULL;
    size_t file = text ? (size_t)(text - data) : size, length = text ? size - file - 1 : 0;
    const uint8_t *rest = length ? memchr(text + 1, RECORD_SEPARATOR, length) : NULL;
    char *system = rest ? strndup((const char *)rest + 1, size - (size_t)(rest + 1 - data)) : strdup("");
    if (rest)
        length = (size_t)(rest - text) - 1;
    if (!t)
        CHECK((t = tokenizer_open("bytes", VOCAB_SIZE, &e)));
    struct chat *c = chat_open(fuzz_file(0, data, file), VOCAB_SIZE, &e);
    if (c)
        check_copy(c, t, text ? (const char *)text + 1 : "", length, system);
    else
        check_user_error(&e);
    chat_close(c);
    free(system);
    return 0;
}
