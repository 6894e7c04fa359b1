/* Two small hash tables for the tokenizer: a vocabulary has 10^5 entries, a merge table 3*10^5, and both are
 * built in one go and then only read. Linear probing, powers of two, never more than half full. */
#include "data/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

static uint64_t scramble(uint64_t x) {
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    return x ^ (x >> 32);
}

/* Eight bytes at a time: tokens are short, and this runs once per piece of text. */
uint64_t hash_piece(const char *bytes, size_t length) {
    uint64_t hash = length * UINT64_C(0x9e3779b97f4a7c15), word;
    for (; length >= 8; bytes += 8, length -= 8) {
        memcpy(&word, bytes, 8);
        hash = scramble(hash ^ word);
    }
    word = 0;
    if (length)
        memcpy(&word, bytes, length);
    return scramble(hash ^ word);
}

/* ---- strings ---- */

static struct string_slot *find_string(const struct string_map *m, const char *key, size_t length) {
    size_t i = hash_piece(key, length) & (m->capacity - 1);
    while (m->slots[i].key && (m->slots[i].length != length || memcmp(m->slots[i].key, key, length) != 0))
        i = (i + 1) & (m->capacity - 1);
    return &m->slots[i];
}

static int grow_strings(struct string_map *m) {
    struct string_map bigger = {.capacity = m->capacity ? 2 * m->capacity : 1024, .used = m->used};
    bigger.slots = calloc(bigger.capacity, sizeof *bigger.slots);
    if (!bigger.slots)
        return -1;
    for (size_t i = 0; i < m->capacity; i++)
        if (m->slots[i].key)
            *find_string(&bigger, m->slots[i].key, m->slots[i].length) = m->slots[i];
    free(m->slots);
    *m = bigger;
    return 0;
}

int string_map_put(struct string_map *m, const char *key, size_t length, int32_t value) {
    if (2 * (m->used + 1) > m->capacity && grow_strings(m))
        return -1;
    struct string_slot *slot = find_string(m, key, length);
    m->used += slot->key == NULL;
    *slot = (struct string_slot){key, (uint32_t)length, value};
    return 0;
}

int32_t string_map_get(const struct string_map *m, const char *key, size_t length, int32_t missing) {
    if (m->used == 0)
        return missing;
    const struct string_slot *slot = find_string(m, key, length);
    return slot->key ? slot->value : missing;
}

void string_map_free(struct string_map *m) {
    free(m->slots);
    *m = (struct string_map){0};
}

/* ---- pairs ---- */

static bool is_empty(const struct pair_slot *slot) {
    return slot->a == UINT32_MAX && slot->b == UINT32_MAX;
}

static struct pair_slot *find_pair(const struct pair_map *m, uint32_t a, uint32_t b) {
    size_t i = scramble((uint64_t)a << 32 | b) & (m->capacity - 1);
    while (!is_empty(&m->slots[i]) && (m->slots[i].a != a || m->slots[i].b != b))
        i = (i + 1) & (m->capacity - 1);
    return &m->slots[i];
}

static int grow_pairs(struct pair_map *m) {
    struct pair_map bigger = {.capacity = m->capacity ? 2 * m->capacity : 1024, .used = m->used};
    bigger.slots = malloc(bigger.capacity * sizeof *bigger.slots);
    if (!bigger.slots)
        return -1;
    for (size_t i = 0; i < bigger.capacity; i++)
        bigger.slots[i] = (struct pair_slot){.a = UINT32_MAX, .b = UINT32_MAX};
    for (size_t i = 0; i < m->capacity; i++)
        if (!is_empty(&m->slots[i]))
            *find_pair(&bigger, m->slots[i].a, m->slots[i].b) = m->slots[i];
    free(m->slots);
    *m = bigger;
    return 0;
}

int pair_map_put(struct pair_map *m, uint32_t a, uint32_t b, uint32_t rank, int32_t id) {
    if (2 * (m->used + 1) > m->capacity && grow_pairs(m))
        return -1;
    struct pair_slot *slot = find_pair(m, a, b);
    m->used += is_empty(slot);
    *slot = (struct pair_slot){a, b, rank, id};
    return 0;
}

const struct pair_slot *pair_map_get(const struct pair_map *m, uint32_t a, uint32_t b) {
    if (m->used == 0)
        return NULL;
    const struct pair_slot *slot = find_pair(m, a, b);
    return is_empty(slot) ? NULL : slot;
}

void pair_map_free(struct pair_map *m) {
    free(m->slots);
    *m = (struct pair_map){0};
}
