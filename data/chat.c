#include "data/chat.h"

#include <cjson/cJSON.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/sha256.h"
#include "data/tokenizer_internal.h"

enum piece {
    BEFORE_SYSTEM,
    AFTER_SYSTEM,
    BEFORE_USER,
    AFTER_USER,
    ANSWER_BEGIN,
    ANSWER_END,
    AFTER_ANSWER,
    PIECE_COUNT
};
static const char *const piece_names[PIECE_COUNT] = {"before_system", "after_system", "before_user",
                                                     "after_user",    "answer_begin", "answer_end",
                                                     "after_answer"};
enum { FORMAT_VERSION = 1 };

/* Which white space around a content goes. */
struct stripping {
    bool left, right;
};

struct chat {
    cJSON *root;                      /* the file, which the pieces point into */
    const cJSON *pieces[PIECE_COUNT]; /* arrays of texts and ids; of the system's: NULL where it knows none */
    struct stripping system, first, after_system, user; /* of the first turn, and of one behind a system's */
    bool drop[256];                                     /* bytes that contents lose */
    char *path;                                         /* for messages */
    const char *refusal;                                /* why there are no pieces; NULL: there are */
    int32_t end;
};

/* ---- the file ---- */

static bool is_id(const cJSON *item, int64_t below) {
    return cJSON_IsNumber(item) && item->valuedouble >= 0 && item->valuedouble < (double)below &&
           item->valuedouble == (double)(int32_t)item->valuedouble;
}

static int load_piece(struct chat *c, enum piece piece, int64_t vocab_size, struct error *e) {
    const cJSON *list = json_member(c->root, piece_names[piece]);
    if (!list && piece <= AFTER_SYSTEM)
        return 0;
    if (!cJSON_IsArray(list))
        return fail_user(e, "%s: it has no list \"%s\"; prepare the conversations again", c->path,
                         piece_names[piece]);
    for (const cJSON *item = list->child; item; item = item->next)
        if (!cJSON_IsString(item) && !is_id(item, vocab_size))
            return fail_user(e,
                             "%s: \"%s\" must hold texts and token ids below the model's vocab_size, %lld; "
                             "prepare the conversations again, or set model.vocab_size as prepare.py says",
                             c->path, piece_names[piece], (long long)vocab_size);
    c->pieces[piece] = list;
    return 0;
}

static int load_drop(struct chat *c, struct error *e) {
    const cJSON *list = json_member(c->root, "drop");
    if (list && !cJSON_IsArray(list))
        return fail_user(e, "%s: \"drop\" must be a list of bytes", c->path);
    for (const cJSON *item = list ? list->child : NULL; item; item = item->next) {
        if (!is_id(item, 256))
            return fail_user(e, "%s: \"drop\" must be a list of bytes", c->path);
        c->drop[(int)item->valuedouble] = true;
    }
    return 0;
}

/* false, true, "left" or "right". */
static int load_stripping(struct chat *c, const char *name, struct stripping missing, struct stripping *out,
                          struct error *e) {
    const cJSON *item = json_member(c->root, name);
    const char *text = cJSON_IsString(item) ? item->valuestring : "";
    *out = missing;
    if (!item)
        return 0;
    *out = (struct stripping){cJSON_IsTrue(item) || strcmp(text, "left") == 0,
                              cJSON_IsTrue(item) || strcmp(text, "right") == 0};
    if (out->left || out->right || cJSON_IsFalse(item))
        return 0;
    return fail_user(e, "%s: \"%s\" must be true, false, \"left\" or \"right\"", c->path, name);
}

static int load(struct chat *c, int64_t vocab_size, struct error *e) {
    const char *sha256;
    if (!cJSON_IsObject(c->root) || !is_id(json_member(c->root, "format_version"), FORMAT_VERSION + 1) ||
        json_member(c->root, "format_version")->valueint != FORMAT_VERSION)
        return fail_user(
            e, "%s: not a chat.json of this version of the program; prepare the conversations again",
            c->path);
    if (json_text(c->root, "tokenizer_sha256", &sha256, c->path, e) != 0 ||
        json_text(c->root, "refused", &c->refusal, c->path, e) != 0)
        return -1;
    if (c->refusal)
        return 0;
    for (int i = 0; i < PIECE_COUNT; i++)
        if (load_piece(c, (enum piece)i, vocab_size, e) != 0)
            return -1;
    if (!c->pieces[BEFORE_SYSTEM] != !c->pieces[AFTER_SYSTEM])
        return fail_user(e, "%s: only one of \"before_system\" and \"after_system\" is there", c->path);
    const cJSON *end = c->pieces[ANSWER_END]->child;
    while (end && end->next)
        end = end->next;
    if (!cJSON_IsNumber(end))
        return fail_user(e, "%s: \"answer_end\" must end with the id that ends an answer", c->path);
    c->end = (int32_t)end->valuedouble;
    if (load_stripping(c, "strip_system", (struct stripping){0}, &c->system, e) != 0 ||
        load_stripping(c, "strip_user", (struct stripping){0}, &c->user, e) != 0 ||
        load_stripping(c, "strip_first", c->user, &c->first, e) != 0 ||
        load_stripping(c, "strip_after_system", c->user, &c->after_system, e) != 0)
        return -1;
    return load_drop(c, e);
}

struct chat *chat_open(const char *path, int64_t vocab_size, struct error *e) {
    struct chat *c = calloc(1, sizeof *c);
    if (!c || !(c->path = strdup(path))) {
        free(c);
        fail_run(e, "%s: out of memory", path);
        return NULL;
    }
    c->root = json_read(path, "prepare the conversations again", e);
    if (c->root && load(c, vocab_size, e) == 0)
        return c;
    chat_close(c);
    return NULL;
}

void chat_close(struct chat *c) {
    if (!c)
        return;
    cJSON_Delete(c->root);
    free(c->path);
    free(c);
}

const char *chat_refusal(const struct chat *c) {
    return c->refusal;
}

char *chat_json(const struct chat *c) {
    return cJSON_Print(c->root);
}

bool chat_knows_system(const struct chat *c) {
    return c->pieces[BEFORE_SYSTEM] != NULL;
}

int32_t chat_end(const struct chat *c) {
    return c->end;
}

int chat_check_tokenizer(const struct chat *c, const char *text, size_t bytes, struct error *e) {
    char own[SHA256_HEX] = "";
    const char *recorded = NULL;
    json_text(c->root, "tokenizer_sha256", &recorded, c->path, NULL);
    if (text)
        sha256_hex(text, bytes, own);
    if (strcmp(recorded ? recorded : "", own) == 0)
        return 0;
    return fail_user(
        e, "%s: its chat template belongs to another tokenizer than this; use the one it came with", c->path);
}

/* ---- beside shards ---- */

/* "template", a file's name, may differ. */
static bool same_pieces(const struct chat *a, const struct chat *b) {
    const char *const others[] = {"drop",        "strip_system",       "strip_user",
                                  "strip_first", "strip_after_system", "tokenizer_sha256"};
    for (int i = 0; i < PIECE_COUNT; i++)
        if (!a->pieces[i] != !b->pieces[i] ||
            (a->pieces[i] && !cJSON_Compare(a->pieces[i], b->pieces[i], true)))
            return false;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        const cJSON *x = json_member(a->root, others[i]), *y = json_member(b->root, others[i]);
        if (!x != !y || (x && !cJSON_Compare(x, y, true)))
            return false;
    }
    return true;
}

static int take_file(const char *path, int64_t vocab_size, struct chat **chat, struct error *e) {
    struct chat *found = chat_open(path, vocab_size, e);
    if (!found)
        return -1;
    if (!*chat) {
        *chat = found;
        return 0;
    }
    int rc = same_pieces(*chat, found) ? 0
                                       : fail_user(e,
                                                   "%s: another chat template than in %s; prepare the "
                                                   "conversations alike, or remove one of these files",
                                                   path, (*chat)->path);
    chat_close(found);
    return rc;
}

/* In each folder that the glob of shards reaches. */
static int take_glob(const char *shards, int64_t vocab_size, struct chat **chat, struct error *e) {
    const char *slash = strrchr(shards, '/');
    size_t folder = slash ? (size_t)(slash + 1 - shards) : 0, size = folder + sizeof "chat.json";
    char *pattern = malloc(size);
    glob_t found;
    int rc = 0;
    if (!pattern)
        return fail_run(e, "out of memory for a file name");
    snprintf(pattern, size, "%.*schat.json", (int)folder, shards);
    if (glob(pattern, 0, NULL, &found) == 0) {
        for (size_t i = 0; i < found.gl_pathc && rc == 0; i++)
            rc = take_file(found.gl_pathv[i], vocab_size, chat, e);
        globfree(&found);
    }
    free(pattern);
    return rc;
}

int chat_of_shards(const char *const *globs, int count, int64_t vocab_size, struct chat **chat,
                   struct error *e) {
    int rc = 0;
    *chat = NULL;
    for (int i = 0; i < count && rc == 0; i++)
        rc = take_glob(globs[i], vocab_size, chat, e);
    if (rc != 0) {
        chat_close(*chat);
        *chat = NULL;
    }
    return rc;
}

/* ---- encoding ---- */

/* Ids so far, and text that comes after them, which is encoded when the next id or the end comes. */
struct composing {
    const struct chat *chat;
    const struct tokenizer *tokenizer;
    int32_t *ids;
    int64_t count;
    struct text pending;
    enum text_place place; /* of the pending text */
    bool strips;           /* the id before it takes the spaces behind it */
    struct error *e;
};

static int push_ids(struct composing *x, const int32_t *ids, int64_t count) {
    int32_t *more = realloc(x->ids, (size_t)(x->count + count + 1) * sizeof *more);
    if (!more)
        return fail_run(x->e, "out of memory for %lld tokens", (long long)(x->count + count));
    x->ids = more;
    memcpy(x->ids + x->count, ids, (size_t)count * sizeof *ids);
    x->count += count;
    return 0;
}

/* next_strips: the id that comes takes the spaces before it. */
static int encode_pending(struct composing *x, bool next_strips) {
    int32_t *ids = NULL;
    size_t begin = 0, end = x->pending.length;
    int rc = 0;
    if (x->strips)
        begin = spaces_after(x->pending.bytes, end);
    if (next_strips)
        end = start_of_spaces_before(x->pending.bytes, begin, end);
    x->pending.length = 0;
    if (begin < end) {
        int64_t count =
            tokenizer_encode_plain(x->tokenizer, x->pending.bytes + begin, end - begin, x->place, &ids, x->e);
        rc = count < 0 ? -1 : push_ids(x, ids, count);
    }
    free(ids);
    return rc;
}

static int add_id(struct composing *x, int32_t id) {
    bool before, after;
    tokenizer_strips(x->tokenizer, id, &before, &after);
    int rc = encode_pending(x, before) == 0 ? push_ids(x, &id, 1) : -1;
    x->strips = after;
    x->place = TEXT_FOLLOWS;
    return rc;
}

static int add_text(struct composing *x, const char *text, size_t length) {
    return text_append(&x->pending, text, length) ? fail_run(x->e, "out of memory for a message") : 0;
}

static int add_item(struct composing *x, const cJSON *item) {
    if (cJSON_IsString(item))
        return add_text(x, item->valuestring, strlen(item->valuestring));
    return add_id(x, (int32_t)item->valuedouble);
}

static int add_piece(struct composing *x, enum piece piece) {
    for (const cJSON *item = x->chat->pieces[piece]->child; item; item = item->next)
        if (add_item(x, item) != 0)
            return -1;
    return 0;
}

/* What Python's str.strip() takes away. */
static bool is_stripped(uint32_t code) {
    return is_space(code) || (code >= 0x1c && code <= 0x1f);
}

static void strip(struct stripping strips, const char **text, size_t *length) {
    int used;
    while (strips.left && *length > 0 && is_stripped(utf8_next(*text, *length, &used))) {
        *text += used;
        *length -= (size_t)used;
    }
    while (strips.right && *length > 0) {
        size_t last = step_back(*text, *length);
        if (!is_stripped(utf8_next(*text + last, *length - last, &used)) || last + (size_t)used != *length)
            return;
        *length = last;
    }
}

static int add_content(struct composing *x, const char *text, size_t length, struct stripping strips) {
    struct text kept = {0};
    int rc = 0;
    for (size_t i = 0; i < length && rc == 0; i++)
        if (!x->chat->drop[(unsigned char)text[i]] && text_append(&kept, text + i, 1))
            rc = fail_run(x->e, "out of memory for a message");
    const char *content = kept.bytes;
    size_t left = kept.length;
    if (left > 0)
        strip(strips, &content, &left);
    if (rc == 0 && left > 0)
        rc = add_text(x, content, left);
    free(kept.bytes);
    return rc;
}

static int add_beginning(struct composing *x, const struct chat_turn *turn) {
    if (!turn->system)
        return add_piece(x, BEFORE_USER);
    if (!chat_knows_system(x->chat))
        return fail_user(x->e, "%s: the chat template knows no system message; leave --system out",
                         x->chat->path);
    if (add_piece(x, BEFORE_SYSTEM) != 0 ||
        add_content(x, turn->system, strlen(turn->system), x->chat->system) != 0)
        return -1;
    return add_piece(x, AFTER_SYSTEM);
}

static int add_turn(struct composing *x, const struct chat_turn *turn) {
    int rc = 0;
    bool first = turn->before == CHAT_BEGINS;
    switch (turn->before) {
    case CHAT_BEGINS:
        rc = add_beginning(x, turn);
        break;
    case CHAT_ANSWER_ENDED:
        rc = add_id(x, x->chat->end);
        break;
    case CHAT_ANSWER_CUT:
        x->place = TEXT_CONTINUES;
        rc = add_piece(x, ANSWER_END);
        break;
    }
    if (rc == 0 && !first)
        rc = add_piece(x, AFTER_ANSWER);
    if (rc == 0)
        rc = add_content(x, turn->text, turn->length,
                         !first         ? x->chat->user
                         : turn->system ? x->chat->after_system
                                        : x->chat->first);
    return rc == 0 ? add_piece(x, AFTER_USER) : -1;
}

/* Encode what is pending, and pass the ids on, or free everything. */
static int64_t finish(struct composing *x, int status, int32_t **ids) {
    if (status == 0)
        status = encode_pending(x, false);
    free(x->pending.bytes);
    *ids = status == 0 ? x->ids : NULL;
    if (status == 0)
        return x->count;
    free(x->ids);
    return -1;
}

int64_t chat_encode_turn(const struct chat *c, const struct tokenizer *t, const struct chat_turn *turn,
                         int32_t **ids, struct error *e) {
    struct composing x = {.chat = c, .tokenizer = t, .e = e};
    return finish(&x, add_turn(&x, turn), ids);
}
