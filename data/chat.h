/* chat.json: a chat template as the ids and texts between the contents of messages, which data/prepare.py --chat writes
 * beside its shards (data/chat_pieces.py says how they are found) and a run copies into its checkpoints.
 *
 *     before_system content after_system          or before_user alone
 *     content after_user                          the first turn; the model goes on from here
 *     answer answer_end                           generation stops at its last id
 *     after_answer content after_user             the next turn
 *
 * Texts side by side are encoded together, as prepare.py does it (data/chat_tokens.py); special tokens written out in a
 * content stay text. */
#ifndef IHA_DATA_CHAT_H
#define IHA_DATA_CHAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "data/tokenizer.h"

struct chat;

/* EXIT_USER: not such a file, or an id is not below vocab_size. */
struct chat *chat_open(const char *path, int64_t vocab_size, struct error *e);
void chat_close(struct chat *c);

/* The chat.json beside the shards of these globs, or *chat = NULL. EXIT_USER: one that chat_open refuses, or several that
 * differ. */
int chat_of_shards(const char *const *globs, int count, int64_t vocab_size, struct chat **chat,
                   struct error *e);

/* EXIT_USER: the pieces were made with another tokenizer than this one. text: the content of its file, NULL for bytes. */
int chat_check_tokenizer(const struct chat *c, const char *text, size_t bytes, struct error *e);

/* Why `generate --chat` cannot use this template, as prepare.py has found; NULL: it can. Where it cannot there is nothing
 * to encode turns with, and no end. */
const char *chat_refusal(const struct chat *c);

char *chat_json(const struct chat *c);        /* the file's content, malloc'd; NULL: no memory */
bool chat_knows_system(const struct chat *c); /* may a conversation begin with a system message? */
int32_t chat_end(const struct chat *c);       /* the id that ends an answer */

/* What stands before a user's turn. */
enum chat_before {
    CHAT_BEGINS,       /* nothing */
    CHAT_ANSWER_ENDED, /* an answer up to its end's last id, which the model has generated and nobody has fed */
    CHAT_ANSWER_CUT,   /* an answer that was stopped somewhere */
};

struct chat_turn {
    enum chat_before before;
    const char *system; /* CHAT_BEGINS: a system message, or NULL */
    const char *text;   /* the user's */
    size_t length;      /* of text; any bytes */
};

/* What to feed after what is there already, so that the model's answer comes next: the end of the answer before, and the
 * turn. A malloc'd array in *ids and its length, or -1. */
int64_t chat_encode_turn(const struct chat *c, const struct tokenizer *t, const struct chat_turn *turn,
                         int32_t **ids, struct error *e);

#endif
