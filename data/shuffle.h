/* The order of training: permutations that are a function of their key alone, computed in place (no table), so that
 * nothing of them is saved in a checkpoint. */
#ifndef IHA_DATA_SHUFFLE_H
#define IHA_DATA_SHUFFLE_H

#include <stdint.h>

/* Where a permutation of [0, n) takes x. */
int64_t shuffle_permute(int64_t x, int64_t n, uint64_t key);

/* A key of its own for each (key, number). */
uint64_t shuffle_key(uint64_t key, uint64_t number);

#endif
