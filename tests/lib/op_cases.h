/* The cases of every operation, once: what its gradient check, the comparison of backends (on an emulated GPU
 * and on a real one) and the benchmarks run. Attention's many masks, and which query sees which key, are in
 * attention_cases.h. */
#ifndef IHA_TESTS_LIB_OP_CASES_H
#define IHA_TESTS_LIB_OP_CASES_H

#include "kernels/kernels.h"
#include "tests/lib/sample.h"
#include "tests/lib/segments.h"

/* What a case is run by. */
enum {
    GRADIENT = 1,      /* against central differences, in double: small */
    COMPARE = 2,       /* the CUDA backend against the CPU's */
    BENCH_CPU = 4,     /* make bench */
    BENCH_GPU = 8,     /* make bench-gpu */
    BENCH_DIVIDE = 16, /* make bench: one thread and all */
};

/* What a spec leaves open. */
enum {
    ACCUMULATE = 1,        /* parameters' gradients (and linear's dx) are added to */
    BIAS = 2,              /* linear; of a norm: layernorm, with its bias */
    DELTA = 4,             /* norm: x + delta */
    POSITIONS = 8,         /* embed: learned positions */
    ONE_TOKEN = 16,        /* embed: one token again and again, ... */
    FEW_TOKENS = 32,       /* ... three of them; with ONE_TOKEN every token in turn; neither: any */
    LOSS_ONLY = 64,        /* classifier */
    GIVEN_POSITIONS = 128, /* embed, qkv_mix: of each token */
    CORRECT = 256,         /* classifier: which targets have the largest logit */
    FIRST_DX = 512,        /* norm: dx is written, not added to */
    SUMS = 1024,           /* norm: dx_sums is wanted; linear: dy_sums is there, any numbers */
};

struct op_case {
    unsigned use;
    struct op_spec spec;
    unsigned options, vary;            /* vary: run with every combination of these options as well */
    int64_t first;                     /* embed, qkv_mix: the position of the first token, forward */
    int64_t gap;                       /* linear: elements beside each row of x, y and dy */
    int64_t segments[SEGMENT_LENGTHS]; /* attention, segmented: lengths as in segments.h */
};

/* clang-format off */
#define EMBED_CASE(...) .spec = {.kind = OP_EMBED, .embed = {__VA_ARGS__}}
#define NORM_CASE(...) .spec = {.kind = OP_NORM, .norm = {__VA_ARGS__}}
#define LINEAR_CASE(...) .spec = {.kind = OP_LINEAR, .linear = {__VA_ARGS__}}
#define MIX_CASE(...) .spec = {.kind = OP_QKV_MIX, .qkv_mix = {__VA_ARGS__}}
#define ATTENTION_CASE(...) .spec = {.kind = OP_ATTENTION, .attention = {__VA_ARGS__}}
#define TALKING_CASE(...) .spec = {.kind = OP_TALKING, .attention = {__VA_ARGS__}}
#define SIMPLICIAL_CASE(...) .spec = {.kind = OP_SIMPLICIAL, .attention = {__VA_ARGS__}}
#define COLLAPSE_CASE(...) .spec = {.kind = OP_COLLAPSE, .collapse = {__VA_ARGS__}}
#define FOLD_CASE(...) .spec = {.kind = OP_FOLD, .fold = {__VA_ARGS__}}
#define DIFF_CASE(...) .spec = {.kind = OP_DIFF_COMBINE, .diff_combine = {__VA_ARGS__}}
#define QK_NORM_CASE(...) .spec = {.kind = OP_QK_NORM, .qk_norm = {__VA_ARGS__}}
#define ACT_CASE(...) .spec = {.kind = OP_ACT, .act = {__VA_ARGS__}}
#define CLASSIFIER_CASE(...) .spec = {.kind = OP_CLASSIFIER, .classifier = {__VA_ARGS__}}

#define ALL_TOKENS (ONE_TOKEN | FEW_TOKENS)
#define ALL_ACTS(USE, ROWS, HIDDEN)                                                                          \
    {USE, ACT_CASE(ACT_GELU_TANH, ROWS, HIDDEN)}, {USE, ACT_CASE(ACT_RELU2, ROWS, HIDDEN)},                  \
    {USE, ACT_CASE(ACT_SWIGLU, ROWS, HIDDEN)}
/* One layer's mixing of heads: T tokens, H heads, P pseudo-heads, d. */
#define MIX_AND_COLLAPSE(USE, T, H, P, D)                                                                    \
    {USE, MIX_CASE(1, T, H, D, P, true, true, true)}, {USE, COLLAPSE_CASE(1, T, H, D, P, false)}
/* clang-format on */

/* Benchmarks measure and print in this order. */
static const struct op_case OP_CASES[] = {
    /* ---- embed: batch, tokens, vocab, hidden ---- */
    {GRADIENT, EMBED_CASE(2, 3, 7, 5), .options = POSITIONS, .vary = FEW_TOKENS | GIVEN_POSITIONS},
    {COMPARE, EMBED_CASE(1, 1, 5, 1), .vary = POSITIONS | ALL_TOKENS, .first = 2},
    {COMPARE, EMBED_CASE(2, 3, 7, 5), .vary = POSITIONS | ALL_TOKENS, .first = 2},
    {COMPARE, EMBED_CASE(3, 21, 1500, 24), .vary = POSITIONS | ALL_TOKENS, .first = 2},
    {COMPARE, EMBED_CASE(5, 67, 33, 40), .vary = POSITIONS | ALL_TOKENS, .first = 2},
    {COMPARE, EMBED_CASE(1, 320, 4, 9), .options = ONE_TOKEN}, /* whole chunks, all one run */
    {COMPARE, EMBED_CASE(2, 350, 20, 16), .options = FEW_TOKENS | POSITIONS, .first = 2},
    {COMPARE, EMBED_CASE(1, 1, 5, 1), .options = POSITIONS | GIVEN_POSITIONS},
    {COMPARE, EMBED_CASE(3, 21, 1500, 24), .options = POSITIONS | GIVEN_POSITIONS},
    {COMPARE, EMBED_CASE(5, 67, 33, 40), .options = POSITIONS | GIVEN_POSITIONS, .vary = ALL_TOKENS},
    {COMPARE, EMBED_CASE(2, 350, 20, 16), .options = FEW_TOKENS | POSITIONS | GIVEN_POSITIONS},
    {COMPARE, EMBED_CASE(1, 33, 70, 2056), .options = POSITIONS | GIVEN_POSITIONS},
    {COMPARE, EMBED_CASE(2, 3, 7, 5), .options = GIVEN_POSITIONS}, /* no table: positions are not read */
    {COMPARE, EMBED_CASE(1, 33, 3, 8), .options = ONE_TOKEN},      /* one row crosses */
    {COMPARE, EMBED_CASE(1, 33, 70, 2056), .options = POSITIONS,
     .first = 2}, /* more columns than a block takes */

    {BENCH_DIVIDE, EMBED_CASE(8, 256, 257, 256)},

    /* ---- residual_norm: type, eps, rows, hidden ---- */
    {GRADIENT, NORM_CASE(NORM_TYPE_RMS, 1e-3, 5, 19), .vary = ACCUMULATE | DELTA},
    {GRADIENT, NORM_CASE(NORM_TYPE_RMS, 1e-3, 5, 19), .options = DELTA | FIRST_DX},
    {GRADIENT, NORM_CASE(NORM_TYPE_LAYER, 1e-3, 5, 19), .options = DELTA},
    {GRADIENT, NORM_CASE(NORM_TYPE_LAYER, 1e-3, 5, 19), .options = DELTA | BIAS},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 1, 5), .vary = BIAS | DELTA | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 3, 8), .vary = BIAS | DELTA | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 9, 24), .vary = BIAS | DELTA | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 11, 130), .vary = BIAS | DELTA | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 7, 768), .vary = BIAS | DELTA | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 2, 1032), .vary = BIAS | DELTA | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 3, 2056), .vary = BIAS | DELTA | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_LAYER, 1e-5, 7, 768), .options = DELTA, .vary = FIRST_DX},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 3, 5), .options = DELTA | BIAS | FIRST_DX, .vary = ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 3, 5), .options = DELTA | SUMS, .vary = BIAS | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 11, 130), .options = DELTA | SUMS, .vary = BIAS | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 19, 768), .options = DELTA | SUMS, .vary = BIAS | ACCUMULATE},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 3, 2056), .options = DELTA | SUMS, .vary = BIAS | FIRST_DX},
    /* More rows than the blocks of backward take at once. */
    {COMPARE, NORM_CASE(NORM_TYPE_LAYER, 1e-5, 301, 64), .options = BIAS | DELTA | ACCUMULATE | SUMS},
    {COMPARE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 203, 1028), .options = DELTA | SUMS},
    {BENCH_GPU, NORM_CASE(NORM_TYPE_RMS, 1e-5, 65536, 2560), .options = DELTA | ACCUMULATE},
    {BENCH_GPU, NORM_CASE(NORM_TYPE_LAYER, 1e-5, 131072, 768), .options = DELTA | ACCUMULATE | BIAS,
     .vary = SUMS},

    {BENCH_DIVIDE, NORM_CASE(NORM_TYPE_RMS, 1e-5, 2048, 256), .options = DELTA},

    /* ---- linear: rows, in, out ---- */
    {GRADIENT, LINEAR_CASE(6, 5, 7), .options = BIAS, .vary = ACCUMULATE},
    {COMPARE, LINEAR_CASE(1, 1, 1), .vary = BIAS | ACCUMULATE},
    {COMPARE, LINEAR_CASE(3, 5, 7), .vary = BIAS | ACCUMULATE},
    {COMPARE, LINEAR_CASE(16, 8, 24), .vary = BIAS | ACCUMULATE},
    {COMPARE, LINEAR_CASE(33, 40, 129), .vary = BIAS | ACCUMULATE},
    {COMPARE, LINEAR_CASE(70, 24, 264), .vary = BIAS | ACCUMULATE},
    {COMPARE, LINEAR_CASE(301, 16, 8), .vary = BIAS | ACCUMULATE},
    {COMPARE, LINEAR_CASE(1000, 4, 8), .vary = BIAS | ACCUMULATE},
    {COMPARE, LINEAR_CASE(16, 8, 24), .options = BIAS | SUMS, .vary = ACCUMULATE},
    {COMPARE, LINEAR_CASE(70, 24, 264), .options = BIAS | ACCUMULATE, .gap = 8},
    {COMPARE, LINEAR_CASE(33, 40, 129), .options = BIAS, .gap = 3},

    {BENCH_DIVIDE, LINEAR_CASE(2048, 1, 256), .options = BIAS}, /* mostly column sums */

    /* ---- qkv_mix: batch, tokens, heads, head_dim, pseudo; mixed, rope, rope_virtual ---- */
    {GRADIENT, MIX_CASE(2, 5, 3, 6, 1, false, true, true), .vary = GIVEN_POSITIONS},
    {GRADIENT, MIX_CASE(1, 4, 4, 16, 1, true, true, true)},
    {GRADIENT | COMPARE, MIX_CASE(2, 5, 3, 6, 2, true, true, true),
     .vary = GIVEN_POSITIONS}, /* a d that tensor cores do not take */
    {GRADIENT | COMPARE, MIX_CASE(1, 20, 5, 10, 3, true, true, false),
     .vary = GIVEN_POSITIONS}, /* more than a CPU block of tokens */
    {GRADIENT | COMPARE, MIX_CASE(2, 3, 2, 8, 4, true, false, true), .vary = ACCUMULATE | GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(1, 3, 2, 7, 2, true, false, true)}, /* an odd d */
    {GRADIENT | COMPARE, MIX_CASE(2, 3, 4, 6, 3, true, true, true, 2),
     .vary = ACCUMULATE}, /* fewer heads of k, v */
    {GRADIENT | COMPARE, MIX_CASE(2, 3, 4, 6, 1, false, true, true, 1), .vary = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(2, 11, 12, 32, 2, true, true, true, 4), ACCUMULATE, .first = 2},
    {COMPARE, MIX_CASE(1, 9, 32, 16, 2, true, true, false, 2)}, /* other tiles for q than for k and v */
    {COMPARE, MIX_CASE(1, 5, 6, 16, 1, false, true, true, 3), .first = 2},
    {COMPARE, MIX_CASE(1, 4, 4, 16, 1, true, true, true), .first = 3},              /* smallest tile */
    {COMPARE, MIX_CASE(2, 11, 3, 32, 5, true, true, true), ACCUMULATE, .first = 7}, /* two chunks of P */
    {COMPARE, MIX_CASE(1, 37, 12, 64, 2, true, true, true)},                        /* GPT-2 */
    {COMPARE, MIX_CASE(2, 3, 12, 64, 2, true, true, false), .first = 2},
    {COMPARE, MIX_CASE(1, 3, 16, 64, 4, true, true, true), ACCUMULATE},
    {COMPARE, MIX_CASE(1, 2, 7, 96, 3, true, true, true), .first = 1}, /* a group of columns, half full */
    {COMPARE, MIX_CASE(1, 13, 5, 128, 9, true, true, true)},           /* two warps to a team */
    {COMPARE, MIX_CASE(1, 9, 20, 32, 4, true, true, true)}, /* the 2.4B model: 5 tiles for 2 warps */
    {COMPARE, MIX_CASE(1, 5, 20, 16, 20, true, true, true), ACCUMULATE}, /* the 2.4B model with P = H */
    {COMPARE, MIX_CASE(1, 3, 24, 16, 24, true, true, true), ACCUMULATE}, /* P = H: two groups of rows */
    {COMPARE, MIX_CASE(1, 3, 17, 32, 3, true, false, false)},
    {COMPARE, MIX_CASE(1, 2, 33, 16, 2, true, true, true)},             /* four tiles of heads */
    {COMPARE, MIX_CASE(1, 2, 64, 16, 5, true, true, true), ACCUMULATE}, /* backward: two groups of rows */
    {COMPARE,
     MIX_CASE(1, 1, 64, 16, 12, true, true, true)}, /* more alphas than shared memory holds at once */
    {COMPARE,
     MIX_CASE(1, 1, 56, 16, 56, true, true, true)}, /* backward's last group: fewer tiles than warps */
    {COMPARE, MIX_CASE(1, 3, 20, 64, 20, true, true, false)},
    {COMPARE, MIX_CASE(1, 1, 65, 16, 1, true, true, true), ACCUMULATE}, /* too many heads */
    {COMPARE, MIX_CASE(1, 1, 1, 64, 1, true, true, true), .first = 100},
    {COMPARE, MIX_CASE(2, 5, 3, 6, 1, false, true, true), .first = 4}, /* rotation alone */
    {COMPARE, MIX_CASE(2, 7, 3, 48, 1, false, true, true), .first = 4},
    {COMPARE, MIX_CASE(1, 5, 2, 64, 1, false, true, false)},
    {COMPARE, MIX_CASE(1, 3, 2, 9, 1, false, false, false)},
    {COMPARE, MIX_CASE(1, 4, 4, 16, 1, true, true, true), .options = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(2, 11, 3, 32, 5, true, true, true), .options = GIVEN_POSITIONS | ACCUMULATE},
    {COMPARE, MIX_CASE(1, 37, 12, 64, 2, true, true, true), .options = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(2, 3, 12, 64, 2, true, true, false), .options = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(1, 13, 5, 128, 9, true, true, true), .options = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(1, 2, 64, 16, 5, true, true, true), .options = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(1, 3, 20, 64, 20, true, true, false), .options = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(1, 1, 65, 16, 1, true, true, true), .options = GIVEN_POSITIONS},
    {COMPARE, MIX_CASE(2, 7, 3, 48, 1, false, true, true), .options = GIVEN_POSITIONS},

    /* ---- collapse: batch, tokens, heads, head_dim, pseudo, per_head ---- */
    {GRADIENT | COMPARE, COLLAPSE_CASE(2, 5, 3, 6, 2, false)}, /* a d that tensor cores do not take */
    {GRADIENT | COMPARE, COLLAPSE_CASE(1, 19, 5, 9, 3, false)},
    {GRADIENT | COMPARE, COLLAPSE_CASE(2, 5, 3, 6, 2, true), .vary = ACCUMULATE},
    {COMPARE, COLLAPSE_CASE(1, 1, 1, 16, 1, false)}, /* smallest tile: 8 columns a half */
    {COMPARE, COLLAPSE_CASE(2, 11, 3, 32, 5, false)},
    {COMPARE, COLLAPSE_CASE(1, 37, 12, 64, 2, false), ACCUMULATE}, /* GPT-2 */
    {COMPARE, COLLAPSE_CASE(2, 3, 12, 64, 2, true)},
    {COMPARE, COLLAPSE_CASE(1, 3, 16, 64, 4, false)},
    {COMPARE, COLLAPSE_CASE(1, 2, 7, 96, 3, false), ACCUMULATE}, /* a group of columns, half full */
    {COMPARE, COLLAPSE_CASE(1, 13, 5, 128, 15, false)},          /* two warps to a team */
    {COMPARE, COLLAPSE_CASE(1, 2, 5, 128, 15, true)},
    {COMPARE, COLLAPSE_CASE(1, 9, 20, 32, 4, false)},              /* the 2.4B model: 5 tiles for 2 warps */
    {COMPARE, COLLAPSE_CASE(1, 5, 20, 16, 20, false), ACCUMULATE}, /* the 2.4B model with P = H */
    {COMPARE, COLLAPSE_CASE(1, 3, 24, 16, 24, false), ACCUMULATE}, /* P = H: two groups of rows */
    {COMPARE, COLLAPSE_CASE(1, 3, 17, 32, 3, false)},
    {COMPARE, COLLAPSE_CASE(1, 2, 33, 16, 2, false)}, /* four tiles of heads */
    {COMPARE, COLLAPSE_CASE(1, 2, 40, 32, 5, true), ACCUMULATE},
    {COMPARE, COLLAPSE_CASE(1, 2, 64, 16, 5, false)},  /* backward: two groups of rows */
    {COMPARE, COLLAPSE_CASE(1, 1, 64, 16, 26, false)}, /* R in parts, rows in groups */
    {COMPARE, COLLAPSE_CASE(1, 3, 20, 64, 20, false), ACCUMULATE},
    {COMPARE,
     COLLAPSE_CASE(1, 19, 3, 32, 1700, false)},       /* the same with few heads, and warps without a token */
    {COMPARE, COLLAPSE_CASE(1, 1, 65, 16, 1, false)}, /* too many heads */

    MIX_AND_COLLAPSE(BENCH_CPU | BENCH_DIVIDE, 2048, 4, 2, 64), /* the quickstart's model */
    MIX_AND_COLLAPSE(BENCH_CPU, 2048, 12, 2, 64),
    MIX_AND_COLLAPSE(BENCH_CPU, 2048, 16, 4, 64),
    MIX_AND_COLLAPSE(BENCH_CPU, 2048, 20, 4, 128),
    MIX_AND_COLLAPSE(BENCH_CPU, 256, 20, 20, 128),
    MIX_AND_COLLAPSE(BENCH_GPU, 16384, 12, 2, 64),
    MIX_AND_COLLAPSE(BENCH_GPU, 16384, 12, 2, 128),
    MIX_AND_COLLAPSE(BENCH_GPU, 16384, 16, 4, 64),
    MIX_AND_COLLAPSE(BENCH_GPU, 16384, 16, 4, 128),
    MIX_AND_COLLAPSE(BENCH_GPU, 4096, 20, 20, 64),
    MIX_AND_COLLAPSE(BENCH_GPU, 4096, 20, 20, 128),

    /* ---- fold: heads, columns ---- */
    /* ---- qk_norm: rows, heads, kv_heads, head_dim, eps ---- */
    {GRADIENT | COMPARE, QK_NORM_CASE(5, 4, 2, 6, 1e-3), .vary = ACCUMULATE},
    {COMPARE, QK_NORM_CASE(1, 1, 1, 1, 1e-5)},
    {COMPARE, QK_NORM_CASE(301, 3, 1, 40, 1e-5),
     ACCUMULATE}, /* more heads than the blocks of backward take at once */
    {COMPARE, QK_NORM_CASE(9, 2, 2, 256, 1e-5)},

    {GRADIENT | COMPARE, FOLD_CASE(3, 7), .vary = ACCUMULATE},
    {GRADIENT | COMPARE, FOLD_CASE(1, 5)},
    {COMPARE, FOLD_CASE(2, 1024 + 40), .vary = ACCUMULATE}, /* more columns than a thread or block takes */
    {COMPARE, FOLD_CASE(17, 24), ACCUMULATE},

    /* ---- diff_combine: rows, pairs, head_dim, lambda_init, eps ---- */
    {GRADIENT | COMPARE, DIFF_CASE(3, 2, 5, 0.2, 1e-3), .vary = ACCUMULATE},
    {GRADIENT | COMPARE, DIFF_CASE(1, 1, 1, 0.7, 1e-2)},
    {COMPARE, DIFF_CASE(70, 3, 7, 0.5, 1e-5), .vary = ACCUMULATE}, /* more pairs than warps at once */

    /* ---- attention: batch, S, heads, head_dim, pseudo, causal, token_mask, window, scale (0: d^-1/2),
     * segmented ---- */
    {GRADIENT, ATTENTION_CASE(2, 7, 2, 4, 1, true, false, 0, 0.7)},
    {GRADIENT, ATTENTION_CASE(1, 9, 2, 5, 3, true, true, 0, 0.7)},
    {GRADIENT, ATTENTION_CASE(1, 9, 1, 6, 3, true, true, 4, 0.7)},
    {GRADIENT, ATTENTION_CASE(1, 70, 1, 3, 1, true, false, 9, 0.7)}, /* two tiles */
    {GRADIENT, ATTENTION_CASE(1, 67, 1, 3, 2, false, false, 0, 0.7)},
    {GRADIENT, ATTENTION_CASE(2, 7, 2, 4, 1, true, false, 0, 0.7, true), .segments = {3, 1}},
    {GRADIENT, ATTENTION_CASE(2, 7, 2, 4, 1, true, false, 2, 0.7, true), .segments = {3, 1}},
    {GRADIENT, ATTENTION_CASE(1, 12, 2, 5, 3, true, true, 0, 0.7, true), .segments = {1, 2}},
    {GRADIENT, ATTENTION_CASE(1, 12, 1, 6, 3, true, true, 4, 0.7, true), .segments = {1, 2}},
    {GRADIENT, ATTENTION_CASE(2, 12, 1, 5, 2, true, false, 0, 0.7, true), .segments = {2, 4}},
    {GRADIENT, ATTENTION_CASE(1, 12, 1, 5, 2, true, false, 3, 0.7, true), .segments = {4, 2}},
    {GRADIENT, ATTENTION_CASE(2, 12, 1, 5, 2, false, false, 0, 0.7, true), .segments = {2, 4}},
    {GRADIENT, ATTENTION_CASE(1, 6, 1, 3, 1, true, false, 0, 0.7, true), .segments = {1, 1, 3}},
    /* Two tiles: the edge of a segment in a tile, at its border, and a segment across it. */
    {GRADIENT, ATTENTION_CASE(1, 70, 1, 3, 1, true, false, 9, 0.7, true), .segments = {60, 10}},
    {GRADIENT, ATTENTION_CASE(1, 70, 1, 3, 1, true, false, 0, 0.7, true), .segments = {64, 6}},
    {GRADIENT, ATTENTION_CASE(1, 70, 1, 3, 2, false, false, 0, 0.7, true), .segments = {20, 15}},
    /* Short sequences of small heads, where what surrounds the products weighs most. */
    /* fewer heads of k and v: one and two groups, masks, windows, more tiles than one */
    {GRADIENT | COMPARE, ATTENTION_CASE(2, 9, 4, 6, 1, true, false, 0, 0, false, 2)},
    {GRADIENT | COMPARE, ATTENTION_CASE(1, 10, 3, 5, 2, true, true, 7, 0, true, 1), .segments = {3, 2}},
    {COMPARE, ATTENTION_CASE(1, 200, 4, 16, 2, true, false, 90, 0, false, 2)},
    {COMPARE, ATTENTION_CASE(2, 130, 6, 8, 1, false, false, 0, 0, false, 2)},
    {COMPARE, ATTENTION_CASE(1, 150, 3, 24, 3, true, true, 0, 0, true, 1), .segments = {17, 30, 3}},
    {BENCH_CPU, ATTENTION_CASE(32, 66 * 8, 8, 16, 8, false, false, 0, 0)},
    /* Whole and windowed, the smallest and the usual head. */
    {BENCH_CPU, ATTENTION_CASE(1, 2 * 1024, 8, 64, 2, true, false, 0, 0)},
    {BENCH_CPU, ATTENTION_CASE(1, 2 * 1024, 16, 16, 2, true, false, 0, 0)},
    {BENCH_CPU, ATTENTION_CASE(1, 2 * 2048, 8, 64, 2, true, false, 512, 0)},
    {BENCH_CPU, ATTENTION_CASE(1, 2 * 2048, 16, 16, 2, true, false, 512, 0)},
    /* One head, which threads share. */
    {BENCH_CPU, ATTENTION_CASE(1, 2048, 1, 64, 1, true, false, 0, 0)},
    /* With a window, time and tiles per token must not grow with the sequence. */
    {BENCH_CPU, ATTENTION_CASE(1, 4 * 1024, 8, 64, 4, true, false, 512, 0)},
    {BENCH_CPU, ATTENTION_CASE(1, 4 * 2048, 8, 64, 4, true, false, 512, 0)},
    {BENCH_CPU, ATTENTION_CASE(1, 4 * 4096, 8, 64, 4, true, false, 512, 0)},
    {BENCH_CPU, ATTENTION_CASE(1, 4 * 8192, 8, 64, 4, true, false, 512, 0)},
    {BENCH_CPU, ATTENTION_CASE(1, 4 * 16384, 8, 64, 4, true, false, 512, 0)},
    {BENCH_GPU, ATTENTION_CASE(16, 1024, 12, 64, 1, true, false, 0, 0)},
    {BENCH_GPU, ATTENTION_CASE(16, 1024, 12, 64, 1, true, false, 0, 0, true), .segments = {128}},
    {BENCH_GPU, ATTENTION_CASE(8, 2048, 12, 64, 1, true, false, 512, 0)},
    {BENCH_GPU, ATTENTION_CASE(4, 4096, 16, 128, 1, true, false, 0, 0)},
    {BENCH_GPU, ATTENTION_CASE(2, 8192, 20, 128, 1, true, false, 0, 0)},
    {BENCH_GPU, ATTENTION_CASE(1, 32768, 20, 128, 1, true, false, 1024, 0)},

    /* ---- talking and simplicial: as attention ---- */
    {GRADIENT, TALKING_CASE(2, 7, 3, 4, 1, true, false, 0, 0.7), .vary = ACCUMULATE},
    {GRADIENT,
     TALKING_CASE(1, 37, 2, 3, 1, true, false, 9, 0.7)}, /* more than a tile of queries, and of keys */
    {GRADIENT, TALKING_CASE(1, 35, 2, 3, 1, false, false, 0, 0.7)},
    {GRADIENT, TALKING_CASE(2, 9, 2, 4, 1, true, false, 4, 0.7, true), .segments = {3, 1}},
    {GRADIENT, TALKING_CASE(2, 9, 1, 4, 1, false, false, 0, 0.7, true), .segments = {3, 1}},
    {COMPARE, TALKING_CASE(1, 1, 1, 4, 1, true, false, 0, 0)},
    {COMPARE, TALKING_CASE(2, 21, 3, 5, 1, true, false, 0, 0), .vary = ACCUMULATE},
    {COMPARE, TALKING_CASE(1, 40, 4, 16, 1, true, false, 9, 0)},
    {COMPARE, TALKING_CASE(2, 37, 2, 24, 1, false, false, 0, 0), .vary = ACCUMULATE},
    {COMPARE, TALKING_CASE(1, 50, 12, 64, 1, true, false, 0, 0)},
    {COMPARE, TALKING_CASE(1, 33, 17, 16, 1, true, false, 0, 0)}, /* two groups of heads */
    {COMPARE, TALKING_CASE(1, 18, 3, 80, 1, true, false, 0, 0)},  /* two parts of d, or one */
    {COMPARE, TALKING_CASE(1, 20, 20, 128, 1, true, false, 0, 0)},
    {COMPARE, TALKING_CASE(1, 18, 32, 8, 1, true, false, 0, 0)},
    {COMPARE, TALKING_CASE(1, 17, 2, 256, 1, true, false, 0, 0)},
    {COMPARE, TALKING_CASE(280, 16, 4, 8, 1, true, false, 0, 0)}, /* more tiles than blocks of an H200 */
    {COMPARE, TALKING_CASE(2, 45, 3, 16, 1, true, false, 8, 0, true), .segments = {20, 1}},
    {COMPARE, TALKING_CASE(2, 40, 4, 8, 1, false, false, 0, 0, true), .segments = {17, 3}},
    {BENCH_GPU, TALKING_CASE(8, 1024, 12, 64, 1, true, false, 0, 0)},
    {COMPARE, SIMPLICIAL_CASE(2, 1, 3, 8, 1, true, false, 0, 0)},
    {COMPARE, SIMPLICIAL_CASE(2, 13, 2, 5, 1, true, false, 0, 0)},
    {COMPARE, SIMPLICIAL_CASE(1, 40, 3, 16, 1, false, false, 0, 0)},
    {COMPARE, SIMPLICIAL_CASE(1, 70, 2, 64, 1, true, false, 33, 0)},
    {COMPARE, SIMPLICIAL_CASE(1, 9, 1, 130, 1, true, false, 0, 0)},
    {COMPARE, SIMPLICIAL_CASE(1, 20, 1, 256, 1, true, false, 0, 0)},
    {COMPARE, SIMPLICIAL_CASE(2, 24, 2, 8, 1, true, false, 5, 0, true), .segments = {9, 1}},
    {GRADIENT, SIMPLICIAL_CASE(2, 6, 2, 4, 1, true, false, 0, 0.7)},
    {GRADIENT, SIMPLICIAL_CASE(1, 21, 1, 3, 1, true, false, 18, 0.7)}, /* more than a group of second keys */
    {GRADIENT, SIMPLICIAL_CASE(1, 18, 1, 3, 1, false, false, 0, 0.7)},
    {GRADIENT, SIMPLICIAL_CASE(2, 9, 2, 4, 1, true, false, 3, 0.7, true), .segments = {4, 1}},

    /* ---- mlp_act: type, rows, hidden ---- */
    ALL_ACTS(GRADIENT, 4, 21),
    ALL_ACTS(COMPARE, 1, 1),
    ALL_ACTS(COMPARE, 1, 7),
    ALL_ACTS(COMPARE, 3, 8),
    ALL_ACTS(COMPARE, 5, 129),
    ALL_ACTS(COMPARE, 7, 1024),
    ALL_ACTS(COMPARE, 2, 4100),
    {BENCH_GPU, ACT_CASE(ACT_GELU_TANH, 32768, 4096)},
    {BENCH_GPU, ACT_CASE(ACT_SWIGLU, 32768, 4096)},

    /* ---- classifier: rows, hidden, vocab, padded ---- */
    {GRADIENT, CLASSIFIER_CASE(5, 6, 9), .vary = CORRECT},
    {GRADIENT, CLASSIFIER_CASE(5, 6, 9, 16)},
    {COMPARE, CLASSIFIER_CASE(1, 1, 2), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(5, 8, 7), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(9, 24, 64), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(6, 16, 4099), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(33, 40, 130), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(3, 8, 8200), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(4, 8, 16413),
     .vary = LOSS_ONLY}, /* more than all threads take at once, and a rest */
    {COMPARE, CLASSIFIER_CASE(5, 8, 7, 8), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(7, 16, 259, 384), .vary = LOSS_ONLY | ACCUMULATE | CORRECT},
    {COMPARE, CLASSIFIER_CASE(9, 24, 257, 384), .vary = LOSS_ONLY | ACCUMULATE},
    {COMPARE, CLASSIFIER_CASE(3, 8, 4095, 4096), .vary = ACCUMULATE},
    {BENCH_GPU, CLASSIFIER_CASE(16384, 768, 50257), .options = ACCUMULATE},
    {BENCH_GPU, CLASSIFIER_CASE(16384, 768, 50257, 50304), .options = ACCUMULATE},
};

/* Call run with every case of two operations for one use, in the table's order, its options varied.
 * Returns how many there were. Of those for tests, TEST_SAMPLE may leave out some (sample.h). */
static inline int op_cases_of(enum op_kind kind, enum op_kind other, unsigned use,
                              void (*run)(const struct op_case *c, void *context), void *context) {
    int count = 0;
    for (size_t i = 0; i < sizeof OP_CASES / sizeof *OP_CASES; i++) {
        const struct op_case *row = &OP_CASES[i];
        if ((row->spec.kind != kind && row->spec.kind != other) || !(row->use & use))
            continue;
        for (unsigned varied = row->vary;;
             varied = (varied - 1) & row->vary) { /* all subsets, down to none */
            struct op_case c = *row;
            c.options |= varied;
            if (c.spec.kind == OP_NORM && c.options & BIAS)
                c.spec.norm.type = NORM_TYPE_LAYER; /* rmsnorm has no bias */
            if ((varied & (LOSS_ONLY | ACCUMULATE)) != (LOSS_ONLY | ACCUMULATE)) {
                if (count == 0 || use & (BENCH_CPU | BENCH_GPU) || in_sample())
                    run(&c, context);
                count++;
            }
            if (varied == 0)
                break;
        }
    }
    return count;
}

static inline int op_cases_run(enum op_kind kind, unsigned use,
                               void (*run)(const struct op_case *c, void *context), void *context) {
    return op_cases_of(kind, kind, use, run, context);
}

#endif
