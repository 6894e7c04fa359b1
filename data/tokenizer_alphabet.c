/* The 256 characters that byte-level vocabularies (GPT-2, Llama 3, ...) write bytes with. */
#include "data/tokenizer_internal.h"

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

int64_t bytes_of_token(const char *token, size_t length, char *out) {
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
