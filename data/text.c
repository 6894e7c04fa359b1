#include "data/text.h"

#include <stdlib.h>
#include <string.h>

void text_write(struct text_writer *w, int32_t token) {
    char number[16];
    size_t length;
    const char *text = number;
    if (w->tokenizer)
        text = tokenizer_decode_next(w->tokenizer, &w->decoding, token, &length);
    else
        length = (size_t)snprintf(number, sizeof number, "%d ", token);
    fwrite(text, 1, length, w->out);
    if (w->copy)
        fwrite(text, 1, length, w->copy);
}

bool text_emit(void *text_writer, int32_t token) {
    struct text_writer *w = text_writer;
    if (w->ends && end_ids_has(w->ends, token))
        return false;
    text_write(w, token);
    fflush(w->out);
    return true;
}

int64_t text_parse_ids(const char *text, int64_t vocab, int32_t **ids, struct error *e) {
    int64_t count = 0;
    *ids = malloc((strlen(text) + 1) * sizeof **ids);
    if (!*ids)
        return fail_run(e, "out of memory for the prompt");
    for (char *end; *text; text = end) {
        long id = strtol(text, &end, 10);
        if (end == text && strspn(text, " ") == strlen(text))
            break;
        if (end == text || id < 0 || id >= vocab)
            return fail_user(
                e,
                "--prompt: the checkpoint has no tokenizer, so the prompt must be token ids below "
                "%lld; '%.20s' is not one (or name one: data.tokenizer=FILE)",
                (long long)vocab, text);
        (*ids)[count++] = (int32_t)id;
    }
    return count;
}
