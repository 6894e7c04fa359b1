/* How a vocabulary spells text, and back: one token of a tokenizer.json to the bytes it stands for.
 *
 * The "decoder" of the file names the spelling; where there is none, it is the one the pre-tokenizer or the
 * model writes with. A decoder that looks at a token's neighbours (such as Metaspace, which drops the first
 * space of a text) is applied to each token alone, since generation prints them one by one. */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>

/* ---- the byte alphabet ---- */

/* Printable Latin-1 bytes stand for themselves. The other 68, which are 0x00-0x20, 0x7f-0xa0 and 0xad, are
 * written as U+0100, U+0101, ... in that order. */
static bool is_itself(uint32_t byte) {
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
}

int byte_character(unsigned char byte, char out[3]) {
    int code = byte;
    if (!is_itself(byte))
        code = 0x100 + (byte <= 0x20 ? byte : byte <= 0xa0 ? byte - 0x7f + 33 : 67);
    if (code < 0x80) {
        out[0] = (char)code;
        out[1] = 0;
        return 1;
    }
    out[0] = (char)(0xc0 | code >> 6);
    out[1] = (char)(0x80 | (code & 0x3f));
    out[2] = 0;
    return 2;
}

/* The byte that a code point stands for, or -1. */
static int byte_of_code(uint32_t code) {
    if (code < 0x100)
        return is_itself(code) ? (int)code : -1;
    uint32_t n = code - 0x100;
    return n < 33 ? (int)n : n < 67 ? (int)(n - 33 + 0x7f) : n == 67 ? 0xad : -1;
}

int64_t bytes_of_token(const char *token, char *out) {
    size_t length = strlen(token);
    int64_t count = 0;
    int used;
    for (size_t i = 0; i < length; i += (size_t)used) {
        int byte = byte_of_code(utf8_next(token + i, length - i, &used));
        if (byte < 0)
            return -1;
        if (out)
            out[count] = (char)byte;
        count++;
    }
    return count;
}

/* ---- which spelling ---- */

/* A "decoder" or "pre_tokenizer" that is of this type, or a Sequence with a member that is. */
static bool has_type(const cJSON *node, const char *members, const char *type) {
    if (json_is_type(node, type))
        return true;
    const cJSON *list = json_member(node, members);
    for (const cJSON *item = cJSON_IsArray(list) ? list->child : NULL; item; item = item->next)
        if (json_is_type(item, type)) /* nobody nests sequences here */
            return true;
    return false;
}

static bool decoder_has(const cJSON *decoder, const char *type) {
    return has_type(decoder, "decoders", type);
}

static bool pre_tokenizer_has(const cJSON *node, const char *type) {
    return has_type(node, "pretokenizers", type);
}

/* The decoder says; where there is none, what the vocabulary was made with. */
static enum style find_style(const cJSON *root, const cJSON *model) {
    const cJSON *decoder = json_member(root, "decoder"), *pre = json_member(root, "pre_tokenizer");
    if (decoder_has(decoder, "ByteLevel"))
        return STYLE_BYTE_LEVEL;
    if (decoder_has(decoder, "WordPiece"))
        return STYLE_WORDPIECE;
    if (decoder_has(decoder, "Metaspace") || decoder_has(decoder, "ByteFallback"))
        return STYLE_METASPACE;
    if (decoder)
        return STYLE_PLAIN;
    if (pre_tokenizer_has(pre, "ByteLevel"))
        return STYLE_BYTE_LEVEL;
    if (json_is_type(model, "WordPiece"))
        return STYLE_WORDPIECE;
    if (json_is_type(model, "Unigram") || pre_tokenizer_has(pre, "Metaspace") ||
        cJSON_IsTrue(json_member(model, "byte_fallback")))
        return STYLE_METASPACE;
    return STYLE_PLAIN;
}

void find_spelling(struct spelling *spelling, const cJSON *root, const cJSON *model) {
    const cJSON *prefix = json_member(json_member(root, "decoder"), "prefix");
    if (!cJSON_IsString(prefix))
        prefix = json_member(model, "continuing_subword_prefix");
    spelling->style = find_style(root, model);
    snprintf(spelling->prefix, sizeof spelling->prefix, "%s",
             cJSON_IsString(prefix) ? prefix->valuestring : "##");
}

/* ---- one token ---- */

static int hex_digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* SentencePiece: U+2581 is a space, <0x0A> a byte. */
static size_t write_metaspace(const char *text, char *out) {
    size_t n = 0;
    if (strlen(text) == 6 && strncmp(text, "<0x", 3) == 0 && hex_digit(text[3]) >= 0 &&
        hex_digit(text[4]) >= 0 && text[5] == '>') {
        *out = (char)(hex_digit(text[3]) << 4 | hex_digit(text[4]));
        return 1;
    }
    while (*text) {
        if (strncmp(text, "\xe2\x96\x81", 3) == 0) {
            out[n++] = ' ';
            text += 3;
        } else {
            out[n++] = *text++;
        }
    }
    return n;
}

/* BERT: a token that does not continue a word starts a new one. */
static size_t write_wordpiece(const char *prefix, const char *text, char *out) {
    size_t skip = strlen(prefix);
    if (skip && strncmp(text, prefix, skip) == 0) {
        memcpy(out, text + skip, strlen(text) - skip);
        return strlen(text) - skip;
    }
    *out = ' ';
    memcpy(out + 1, text, strlen(text));
    return strlen(text) + 1;
}

size_t spell_token(const struct spelling *spelling, const char *text, char *out) {
    enum style style = spelling->style;
    int64_t length = style == STYLE_BYTE_LEVEL ? bytes_of_token(text, out) : -1;
    if (length >= 0)
        return (size_t)length;
    if (style == STYLE_METASPACE)
        return write_metaspace(text, out);
    if (style == STYLE_WORDPIECE)
        return write_wordpiece(spelling->prefix, text, out);
    memcpy(out, text, strlen(text)); /* as is; also a byte-level token with other characters in it */
    return strlen(text);
}
