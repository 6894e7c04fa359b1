#include "model/generate/chat.h"

#include <stdlib.h>

struct answer {
    const struct chat_hooks *hooks;
    bool ended;
};

static bool emit(void *context, int32_t token) {
    struct answer *a = context;
    a->ended = a->hooks->is_end(a->hooks->context, token);
    return !a->ended && a->hooks->emit(a->hooks->context, token);
}

static int full(const struct decoder *d, struct error *e) {
    return fail_run(
        e,
        "the conversation has filled the model's context of %lld tokens (max_position_embeddings); "
        "start a new one",
        (long long)d->capacity);
}

/* Feed a turn and sample the answer. *unfed: the last token sampled, which is not in the cache; *ended: it ends the
 * answer. */
static int answer_turn(struct decoder *d, const struct chat_hooks *h, const int32_t *tokens, int64_t count,
                       int64_t limit, const struct sampling *s, uint64_t *state, bool *ended, int32_t *unfed,
                       struct error *e) {
    struct answer a = {.hooks = h};
    int64_t room = d->capacity - d->position - count;
    if (room < 1)
        return full(d, e);
    int status = generate_from(d, tokens, count, limit < room ? limit : room, s, state, emit, &a, unfed, e);
    h->answered(h->context);
    *ended = a.ended;
    return status == 0 && !a.ended && d->position + 1 >= d->capacity ? full(d, e) : status;
}

/* The tokens with `first` in front of them, in place of *tokens. */
static int put_first(int32_t **tokens, int64_t *count, int32_t first, struct error *e) {
    int32_t *more = realloc(*tokens, (size_t)(*count + 1) * sizeof *more);
    if (!more)
        return fail_run(e, "out of memory for %lld tokens", (long long)*count);
    for (int64_t i = *count; i > 0; i--)
        more[i] = more[i - 1];
    more[0] = first;
    *tokens = more;
    ++*count;
    return 0;
}

int chat(struct decoder *d, const struct chat_hooks *h, int64_t limit, const struct sampling *s,
         struct error *e) {
    uint64_t random = sampling_state(s);
    enum chat_state state = CHAT_FIRST;
    int32_t unfed = -1;
    decoder_reset(d);
    for (;;) {
        int32_t *tokens = NULL;
        int64_t count = h->next(h->context, state, &tokens, e);
        bool ended = false;
        int status = count < 0 ? -1 : 0;
        if (count > 0 && state == CHAT_CUT && unfed >= 0)
            status = put_first(&tokens, &count, unfed, e);
        if (count > 0 && status == 0)
            status = answer_turn(d, h, tokens, count, limit, s, &random, &ended, &unfed, e);
        free(tokens);
        if (count <= 0 || status != 0)
            return status;
        state = ended ? CHAT_ENDED : CHAT_CUT;
    }
}
