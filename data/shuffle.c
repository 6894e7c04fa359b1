/* A Feistel network permutes [0, 4^k) without a table, and walking its cycle until it lands below n restricts that
 * permutation to [0, n) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). */
#include "data/shuffle.h"

enum { FEISTEL_ROUNDS = 8 };

/* The finalizer of splitmix64 (Steele, Lea, Flood, 2014). */
static uint64_t mix(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* A permutation of [0, 4^half_bits). */
static uint64_t feistel(uint64_t x, int half_bits, uint64_t key) {
    uint64_t mask = (UINT64_C(1) << half_bits) - 1;
    uint64_t left = x >> half_bits, right = x & mask;
    for (uint64_t round = 0; round < FEISTEL_ROUNDS; round++) {
        uint64_t next = left ^ (mix(key ^ mix(right ^ (round << 56))) & mask);
        left = right;
        right = next;
    }
    return left << half_bits | right;
}

/* The domain is less than 4n, so the walk takes fewer than 4 steps on average. */
int64_t shuffle_permute(int64_t x, int64_t n, uint64_t key) {
    int half_bits = 1;
    while ((UINT64_C(1) << (2 * half_bits)) < (uint64_t)n)
        half_bits++;
    uint64_t y = (uint64_t)x;
    do
        y = feistel(y, half_bits, key);
    while (y >= (uint64_t)n);
    return (int64_t)y;
}

uint64_t shuffle_key(uint64_t key, uint64_t number) {
    return mix(mix(key) + number);
}
