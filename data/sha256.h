/* SHA-256 (FIPS 180-4), as sha256sum prints it: which tokenizer made a data set. */
#ifndef IHA_DATA_SHA256_H
#define IHA_DATA_SHA256_H

#include <stddef.h>

enum { SHA256_HEX = 65 };

void sha256_hex(const void *bytes, size_t length, char out[SHA256_HEX]);

#endif
