/* Attention's masks at every edge of a tile, a window or a pseudo-token; which query sees which key; and
 * which tiles of scores are needed. Shared by the tests of the CPU and the CUDA backend, whose lengths and
 * windows differ because their tiles do. */
#ifndef IHA_TESTS_LIB_ATTENTION_CASES_H
#define IHA_TESTS_LIB_ATTENTION_CASES_H

#include "kernels/kernels.h"
#include "tests/lib/sample.h"
#include "tests/lib/segments.h"

enum { ON_CPU = 1, ON_CUDA = 2, ON_BOTH = ON_CPU | ON_CUDA };

static const struct {
    int64_t value;
    int on;
} ATTENTION_LENGTHS[] = {{1, ON_BOTH},  {2, ON_CPU},    {3, ON_CPU},   {7, ON_CUDA},  {15, ON_CPU},
                         {16, ON_CPU},  {17, ON_CPU},   {63, ON_BOTH}, {64, ON_BOTH}, {65, ON_BOTH},
                         {127, ON_CPU}, {130, ON_BOTH}, {200, ON_BOTH}},
  ATTENTION_WINDOWS[] = {{0, ON_BOTH},  {1, ON_BOTH},  {2, ON_BOTH},  {3, ON_CPU},   {16, ON_CPU},
                         {32, ON_CUDA}, {63, ON_BOTH}, {64, ON_BOTH}, {65, ON_BOTH}, {201, ON_BOTH}};

static const struct {
    bool causal, token_mask;
    int64_t pseudo;
    int on;
} ATTENTION_MASKS[] = {
    {true, false, 1, ON_BOTH}, {true, false, 3, ON_BOTH},  {true, true, 1, ON_BOTH},
    {true, true, 2, ON_BOTH},  {true, true, 3, ON_BOTH},   {true, true, 4, ON_CUDA},
    {true, true, 5, ON_CPU},   {false, false, 1, ON_BOTH},
};

/* Lengths of segments in tokens (segments.h): of one token each, edges at the border of a tile and beside it,
 * one that spans tiles, ragged ones. */
static const int64_t ATTENTION_SEGMENTS[][SEGMENT_LENGTHS] = {{1},         {64},     {32, 16},
                                                              {63, 1, 65}, {129, 3}, {2, 9, 1, 1, 30, 5, 17}};

#define COUNT(a) (sizeof(a) / sizeof *(a))

/* Call run with one head of every mask, for each of these lengths with each of these windows. */
static inline void attention_each_mask(int on, const int64_t *lengths, size_t length_count,
                                       const int64_t *windows, size_t window_count,
                                       void (*run)(struct attention_spec s)) {
    for (size_t i = 0; i < length_count; i++)
        for (size_t j = 0; j < window_count; j++)
            for (size_t m = 0; m < COUNT(ATTENTION_MASKS); m++)
                if (ATTENTION_MASKS[m].on & on)
                    run((struct attention_spec){.batch = 1,
                                                .length = lengths[i],
                                                .heads = 1,
                                                .pseudo = ATTENTION_MASKS[m].pseudo,
                                                .causal = ATTENTION_MASKS[m].causal,
                                                .token_mask = ATTENTION_MASKS[m].token_mask,
                                                .window = windows[j]});
}

/* The same for all lengths and windows of the tables. */
static inline void attention_each_case(int on, void (*run)(struct attention_spec s)) {
    for (size_t i = 0; i < COUNT(ATTENTION_LENGTHS); i++)
        for (size_t j = 0; j < COUNT(ATTENTION_WINDOWS); j++)
            if (ATTENTION_LENGTHS[i].on & ATTENTION_WINDOWS[j].on & on)
                attention_each_mask(on, &ATTENTION_LENGTHS[i].value, 1, &ATTENTION_WINDOWS[j].value, 1, run);
}

/* The same masks and windows with every list of segments, in a sequence of about `length` virtual tokens. */
static inline void attention_each_segmented(int on, int64_t length,
                                            void (*run)(struct attention_spec s, const int64_t *lengths)) {
    for (size_t i = 0; i < COUNT(ATTENTION_SEGMENTS); i++)
        for (size_t j = 0; j < COUNT(ATTENTION_WINDOWS); j++)
            for (size_t m = 0; m < COUNT(ATTENTION_MASKS); m++)
                if (ATTENTION_WINDOWS[j].on & ATTENTION_MASKS[m].on & on)
                    run((struct attention_spec){.batch = 1,
                                                .length = length - length % ATTENTION_MASKS[m].pseudo,
                                                .heads = 1,
                                                .pseudo = ATTENTION_MASKS[m].pseudo,
                                                .causal = ATTENTION_MASKS[m].causal,
                                                .token_mask = ATTENTION_MASKS[m].token_mask,
                                                .window = ATTENTION_WINDOWS[j].value,
                                                .segmented = true},
                        ATTENTION_SEGMENTS[i]);
}

/* Whether query s sees this key: the definition in struct attention_spec (kernels.h), independent of
 * attention_keys(). */
static inline bool attention_visible(const struct attention_spec *a, int64_t s, int64_t key) {
    bool before = !a->causal || (a->token_mask ? key / a->pseudo <= s / a->pseudo : key <= s);
    return before && (a->window == 0 || s - key < a->window);
}

/* The same in sequence b. segments: [2,B,T], or NULL. */
static inline bool attention_visible_in(const struct attention_spec *a, const int32_t *segments, int64_t b,
                                        int64_t s, int64_t key) {
    const int32_t *first = segments ? segments + b * (a->length / a->pseudo) : NULL;
    return attention_visible(a, s, key) && (!first || first[s / a->pseudo] == first[key / a->pseudo]);
}

/* Tiles of `queries` by `keys` scores that hold a visible pair, over all heads. segments: [2,B,T], or NULL. */
static inline int64_t attention_tiles_needed_in(const struct attention_spec *a, const int32_t *segments,
                                                int64_t queries, int64_t keys) {
    int64_t count = 0;
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t q0 = 0; q0 < a->length; q0 += queries)
            for (int64_t k0 = 0; k0 < a->length; k0 += keys) {
                bool needed = false;
                for (int64_t s = q0; s < a->length && s < q0 + queries && !needed; s++)
                    for (int64_t key = k0; key < a->length && key < k0 + keys && !needed; key++)
                        needed = attention_visible_in(a, segments, b, s, key);
                count += needed;
            }
    return count * a->heads;
}

static inline int64_t attention_tiles_needed(const struct attention_spec *a, int64_t queries, int64_t keys) {
    return attention_tiles_needed_in(a, NULL, queries, keys);
}

#endif
