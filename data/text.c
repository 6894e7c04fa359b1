#include "data/text.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_NUMBER = 16 }; /* bytes of an id as text */

/* The text of the next token; ids go into `number`. */
static const char *token_text(struct text_writer *w, int32_t token, char number[MAX_NUMBER], size_t *length) {
    if (w->tokenizer)
        return tokenizer_decode_next(w->tokenizer, &w->decoding, token, length);
    *length = (size_t)snprintf(number, MAX_NUMBER, "%d ", token);
    return number;
}

static void write_bytes(const struct text_writer *w, const char *bytes, size_t length) {
    fwrite(bytes, 1, length, w->out);
    if (w->copy)
        fwrite(bytes, 1, length, w->copy);
}

void text_write(struct text_writer *w, int32_t token) {
    char number[MAX_NUMBER];
    size_t length;
    const char *text = token_text(w, token, number, &length);
    write_bytes(w, text, length);
}

/* Write a byte, or hold it back while the last bytes are the beginning of `stop`. Returns whether `stop` is
 * complete. */
static bool emit_byte(struct text_writer *w, char byte) {
    size_t length = strlen(w->stop);
    while (w->stop[w->held_length] != byte) {
        if (w->held_length == 0) {
            write_bytes(w, &byte, 1);
            return false;
        }
        /* What is held does not become `stop`; perhaps a shorter end of it does. */
        size_t drop = 1;
        while (memcmp(w->stop + drop, w->stop, w->held_length - drop) != 0)
            drop++;
        write_bytes(w, w->stop, drop);
        w->held_length -= drop;
    }
    return ++w->held_length == length;
}

bool text_emit(void *text_writer, int32_t token) {
    struct text_writer *w = text_writer;
    char number[MAX_NUMBER];
    size_t length;
    if (w->ends && end_ids_has(w->ends, token))
        return false;
    const char *text = token_text(w, token, number, &length);
    for (size_t i = 0; w->stop && i < length; i++)
        if (emit_byte(w, text[i])) {
            w->held_length = 0;
            return false;
        }
    if (!w->stop)
        write_bytes(w, text, length);
    return fflush(w->out) == 0 || w->copy; /* a copy is completed in any case */
}

void text_finish(struct text_writer *w) {
    if (w->held_length > 0)
        write_bytes(w, w->stop, w->held_length);
    w->held_length = 0;
}

int64_t text_parse_ids(const char *option, const char *text, size_t length, int64_t vocab, int32_t **ids,
                       struct error *e) {
    const char *const text_end = text + length;
    int64_t count = 0;
    *ids = malloc((length + 1) * sizeof **ids);
    if (!*ids)
        return fail_run(e, "out of memory for the prompt");
    for (char *end; text < text_end; text = end) {
        long id = strtol(text, &end, 10);
        if (end == text && text + strspn(text, " \t\r\n") == text_end)
            break;
        if (end == text || id < 0 || id >= vocab)
            return fail_user(e,
                             "%s: the checkpoint has no tokenizer, so the prompt must be token ids below "
                             "%lld; '%.20s' is not one (or name one: data.tokenizer=FILE)",
                             option, (long long)vocab, text);
        (*ids)[count++] = (int32_t)id;
    }
    return count;
}
