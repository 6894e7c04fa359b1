#include "data/text.h"

#include <stdlib.h>
#include <string.h>

static void write_to(FILE *out, const struct tokenizer *tokenizer, int32_t token) {
    size_t length;
    if (!tokenizer) {
        fprintf(out, "%d ", token);
        return;
    }
    const char *text = tokenizer_decode(tokenizer, token, &length);
    fwrite(text, 1, length, out);
}

void text_write(const struct text_writer *w, int32_t token) {
    write_to(w->out, w->tokenizer, token);
    if (w->copy)
        write_to(w->copy, w->tokenizer, token);
}

bool text_emit(void *text_writer, int32_t token) {
    const struct text_writer *w = text_writer;
    if (token == w->end_of_text)
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
