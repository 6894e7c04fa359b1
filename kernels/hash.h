/* FNV-1a (Fowler, Noll, Vo), 64 bits: to compare data and settings by their hashes. Not a cryptographic hash:
 * it does not protect against data that are made to have the same hash. */
#ifndef IHA_KERNELS_HASH_H
#define IHA_KERNELS_HASH_H

#include <stddef.h>
#include <stdint.h>

#define FNV1A_START UINT64_C(0xcbf29ce484222325)

/* Continues `hash`, which is FNV1A_START at first, with these bytes. */
static inline uint64_t fnv1a(uint64_t hash, const void *data, size_t bytes) {
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
    return hash;
}

#endif
