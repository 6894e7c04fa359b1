/* chat.json: the program feeds the ids that data/prepare.py --chat trains on, for each conversation of
 * tests/reference/make_chat_cases.py; and damaged files. */
#include "tests/lib/tokenizer_fixture.h"

#include "data/chat.h"

static char chat_path[96];

static int make_files(void **state) {
    int rc = make_dir(state);
    snprintf(chat_path, sizeof chat_path, "%s/chat.json", dir);
    return rc;
}

static int remove_files(void **state) {
    remove(chat_path);
    return remove_dir(state);
}

static void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, strlen(text), f), strlen(text));
    assert_int_equal(fclose(f), 0);
}

static void write_node(const char *path, const cJSON *node) {
    char *text = cJSON_Print(node);
    assert_non_null(text);
    write_text(path, text);
    free(text);
}

/* ---- ids ---- */

/* wanted: what two lists hold, one after the other; the first may be missing. */
static void expect_ids(const char *name, int row, const cJSON *end, const cJSON *wanted, const int32_t *ids,
                       int64_t count) {
    assert_true(count >= 0);
    for (int64_t i = 0; i < count; i++) {
        const cJSON **next = end ? &end : &wanted;
        if (!*next || (*next)->valueint != ids[i])
            fail_msg("%s, conversation %d: id %d at %lld where %d is expected", name, row, ids[i],
                     (long long)i, *next ? (*next)->valueint : -1);
        *next = (*next)->next;
    }
    if (end || wanted)
        fail_msg("%s, conversation %d: ids are missing at the end of a turn", name, row);
}

static void check_turn(const char *name, int row, const struct chat *c, const struct tokenizer *t,
                       const struct chat_turn *turn, const cJSON *end, const cJSON *wanted) {
    struct error e = {0};
    int32_t *ids;
    int64_t count = chat_encode_turn(c, t, turn, &ids, &e);
    expect_ids(name, row, end, wanted, ids, count);
    free(ids);
}

static const char *text_of(const cJSON *message, const char *member) {
    return cJSON_GetObjectItem(message, member)->valuestring;
}

/* "ids" holds those of each turn, and of the answers between. end: what ends an answer, behind its content. */
static void check_conversation(const char *name, int row, const struct chat *c, const struct tokenizer *t,
                               const cJSON *end, const cJSON *conversation) {
    const cJSON *wanted = cJSON_GetObjectItem(conversation, "ids")->child, *last = end;
    struct chat_turn turn = {.before = CHAT_BEGINS};
    while (last->next)
        last = last->next;
    assert_int_equal(last->valueint, chat_end(c));
    for (const cJSON *m = cJSON_GetObjectItem(conversation, "messages")->child; m; m = m->next) {
        const char *role = text_of(m, "role"), *text = text_of(m, "content");
        if (strcmp(role, "system") == 0) {
            turn.system = text;
            continue;
        }
        if (strcmp(role, "user") == 0) {
            bool begins = turn.before == CHAT_BEGINS;
            turn.text = text;
            turn.length = strlen(text);
            check_turn(name, row, c, t, &turn, begins ? NULL : last, wanted->child);
            if (!begins) {
                turn.before = CHAT_ANSWER_CUT;
                check_turn(name, row, c, t, &turn, end, wanted->child);
            }
            turn = (struct chat_turn){.before = CHAT_ANSWER_ENDED};
        } else { /* the model writes it; its end is the next turn's to feed */
            assert_int_equal(cJSON_GetArrayItem(wanted, cJSON_GetArraySize(wanted) - 1)->valueint,
                             chat_end(c));
        }
        wanted = wanted->next;
    }
    assert_null(wanted);
}

static void test_ids(void **state) {
    (void)state;
    size_t length;
    int checked = 0;
    char *text = read_file("tests/golden/chat_cases.json", &length);
    cJSON *root = cJSON_Parse(text);
    assert_non_null(root);
    for (const cJSON *item = root->child; item; item = item->next) {
        const cJSON *tokenizer = cJSON_GetObjectItem(item, "tokenizer");
        struct error e = {0};
        write_node(chat_path, cJSON_GetObjectItem(item, "chat"));
        if (!cJSON_IsNull(tokenizer))
            write_node(file_path, tokenizer);
        struct tokenizer *t = tokenizer_open(cJSON_IsNull(tokenizer) ? "bytes" : file_path, ANY_SIZE, &e);
        struct chat *c = chat_open(chat_path, tokenizer_size(t), &e);
        if (!c)
            fail_msg("%s", e.text);
        int row = 0;
        for (const cJSON *v = cJSON_GetObjectItem(item, "conversations")->child; v; v = v->next, checked++)
            check_conversation(text_of(item, "name"), row++, c, t,
                               cJSON_GetObjectItem(item, "answer_end")->child, v);
        chat_close(c);
        tokenizer_close(t);
    }
    assert_int_equal(checked, 14 * 24);
    cJSON_Delete(root);
    free(text);
}

/* ---- the file ---- */

#define CHAT(more)                                                                                           \
    "{\"format_version\": 1, \"before_user\": [1, \"u\"], \"after_user\": [2, \"a\"], \"answer_begin\": "    \
    "[], "                                                                                                   \
    "\"answer_end\": [\" \", 3], \"after_answer\": [\"\\n\"]" more "}"

static void test_refused(void **state) {
    (void)state;
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"[]", "not a chat.json"},
        {"{", "not valid JSON"},
        {"{\"format_version\": 2}", "not a chat.json of this version"},
        {"{\"format_version\": 1}", "no list \"before_user\""},
        {CHAT(", \"before_system\": [1]"), "only one of"},
        {CHAT(", \"before_system\": [300], \"after_system\": [1]"),
         "token ids below the model's vocab_size, 257"},
        {CHAT(", \"before_system\": [1.5], \"after_system\": [1]"), "texts and token ids"},
        {CHAT(", \"before_system\": [-1], \"after_system\": [1]"), "texts and token ids"},
        {CHAT(", \"before_system\": [[]], \"after_system\": [1]"), "texts and token ids"},
        {CHAT(", \"drop\": [256]"), "\"drop\" must be"},
        {CHAT(", \"drop\": 1"), "\"drop\" must be"},
        {CHAT(", \"strip_user\": 1"), "must be true, false, \"left\""},
        {CHAT(", \"strip_system\": \"both\""), "must be true, false, \"left\""},
        {CHAT(", \"tokenizer_sha256\": 1"), "must be text"},
        {CHAT(", \"answer_end\": [3]"), "stands twice"},
        {"{\"format_version\": 1, \"before_user\": [], \"after_user\": [], \"answer_begin\": [], "
         "\"answer_end\": [3, "
         "\" \"], \"after_answer\": []}",
         "must end with the id"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct error e = {0};
        write_text(chat_path, bad[i].text);
        assert_null(chat_open(chat_path, 257, &e));
        assert_int_equal(e.exit_code, EXIT_USER);
        if (!strstr(e.text, bad[i].message))
            fail_msg("'%s' instead of '%s'", e.text, bad[i].message);
    }
}

static void test_answers_that_were_cut(void **state) {
    (void)state;
    struct error e = {0};
    write_text(chat_path, CHAT(", \"drop\": [120]"));
    struct tokenizer *t = tokenizer_open("bytes", 257, &e);
    struct chat *c = chat_open(chat_path, 257, &e);
    assert_non_null(c);
    static const struct {
        enum chat_before before;
        const char *wanted;
    } cases[] = {{CHAT_BEGINS, "\1uq\2a"}, {CHAT_ANSWER_ENDED, "\3\nq\2a"}, {CHAT_ANSWER_CUT, " \3\nq\2a"}};
    for (size_t i = 0; i < 3; i++) {
        struct chat_turn turn = {.before = cases[i].before, .text = "xqxx", .length = 4};
        int32_t *ids;
        int64_t count = chat_encode_turn(c, t, &turn, &ids, &e);
        assert_int_equal(count, strlen(cases[i].wanted));
        for (int64_t k = 0; k < count; k++)
            assert_int_equal(ids[k], cases[i].wanted[k]);
        free(ids);
    }
    struct chat_turn turn = {.before = CHAT_BEGINS, .system = "s", .text = "q", .length = 1};
    int32_t *ids;
    assert_int_equal(chat_encode_turn(c, t, &turn, &ids, &e), -1);
    assert_non_null(strstr(e.text, "knows no system message"));
    assert_int_equal(chat_check_tokenizer(c, NULL, 0, &e), 0);
    assert_int_equal(chat_check_tokenizer(c, "{}", 2, &e), -1);
    chat_close(c);
    tokenizer_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ids), cmocka_unit_test(test_refused),
                                       cmocka_unit_test(test_answers_that_were_cut)};
    return cmocka_run_group_tests(tests, make_files, remove_files);
}
