/* A conversation with a model: the user's turn is fed, an answer is sampled, and what both have said stays in the cache of
 * keys and values, so that each token is computed once. */
#ifndef IHA_MODEL_GENERATE_CHAT_H
#define IHA_MODEL_GENERATE_CHAT_H

#include "model/generate/generate.h"

/* How the answer before a turn ended. */
enum chat_state {
    CHAT_FIRST, /* there is none */
    CHAT_ENDED, /* at an id that ends answers, which has not been fed */
    CHAT_CUT,   /* elsewhere */
};

struct chat_hooks {
    void *context;
    /* The tokens to feed before the next answer, malloc'd, and their number; 0: the conversation is over; -1: error. */
    int64_t (*next)(void *context, enum chat_state state, int32_t **tokens, struct error *e);
    bool (*is_end)(void *context, int32_t token); /* does it end an answer? */
    bool (*emit)(void *context, int32_t token);   /* a token of the answer; false: stop */
    void (*answered)(void *context);              /* after each answer */
};

/* Until `next` says that it is over. limit: the most tokens of an answer. EXIT_RUN: the decoder's capacity is used up, the
 * answer so far having been passed on. */
int chat(struct decoder *d, const struct chat_hooks *h, int64_t limit, const struct sampling *s,
         struct error *e);

#endif
