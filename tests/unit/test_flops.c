/* FLOPs per token against sums by hand, and those of segments against a count of every visible pair. */
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"
#include "tests/lib/segments.h"

#include "model/flops.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))

static void check_flops(const struct model_config *c, double matmul, double attention, double mixing) {
    struct flops f = flops_per_token(c, 4);
    if (f.matmul != matmul || f.attention != attention || f.mixing != mixing)
        fail_msg("%g %g %g, not %g %g %g", f.matmul, f.attention, f.mixing, matmul, attention, mixing);
}

/* By hand, T = 4. Weights: vocabulary 80, qkv 192, out 64, up and down 128 each. */
static void flops_of_mha(void **state) {
    (void)state;
    struct model_config c = counted_config(LAYER_MHA_GLOBAL);
    check_flops(&c, 6 * (80 + 192 + 64 + 256), 12 * 8 * (1 + 2 + 3 + 4) / 4.0, 0);
    c.causal = false;
    check_flops(&c, 6 * (80 + 192 + 64 + 256), 12 * 8 * 4, 0);
    c = counted_config(LAYER_MHA_LOCAL);
    c.activation = ACTIVATION_SWIGLU;
    check_flops(&c, 6 * (80 + 192 + 64 + 384), 12 * 8 * (1 + 2 + 2 + 2) / 4.0, 0);
    c.num_hidden_layers = 2;
    c.layer_types[1] = LAYER_MHA_GLOBAL;
    check_flops(&c, 6 * (80 + 2 * (192 + 64 + 384)), 12 * 8 * (7 + 10) / 4.0, 0);
}

/* S = 8 virtual tokens, each seeing 3; with the token mask the first of a pair also sees the second. */
static void flops_of_iha(void **state) {
    (void)state;
    struct model_config c = counted_config(LAYER_IHA_LOCAL);
    double matmul = 6 * (80 + 192 + 64 + 256), full = 6 * 4 * 2 * 4 * 4,
           per_head = 6 * (3 * 2 * 4 + 2 * 2) * 4;
    check_flops(&c, matmul, 12 * 8 * (1 + 2 + 6 * 3) / 4.0, full);
    c.iha_collapse = COLLAPSE_PER_HEAD;
    check_flops(&c, matmul, 12 * 8 * (1 + 2 + 6 * 3) / 4.0, per_head);
    c.iha_mask = MASK_TOKEN;
    check_flops(&c, matmul, 12 * 8 * (2 + 2 + 4 + 3 + 4 + 3 + 4 + 3) / 4.0, per_head);
    c.layer_types[0] = LAYER_IHA_GLOBAL;
    check_flops(&c, matmul, 12 * 8 * (2 * (2 + 4 + 6 + 8)) / 4.0, per_head);
    assert_true(attention_pairs_in_paper(&c, LAYER_IHA_LOCAL, 4) == 8 * 3);
    assert_true(attention_pairs_in_paper(&c, LAYER_IHA_GLOBAL, 4) == 8 * 8);
}

/* Against a count of every query's keys, segment by segment. */
static double counted_pairs(const struct model_config *c, int64_t first, int64_t last) {
    double pairs = 0;
    for (int i = 0; i < c->num_hidden_layers; i++) {
        enum layer_type type = c->layer_types[i];
        int64_t P = layer_is_iha(type) ? c->num_pseudo_heads : 1;
        int64_t window = !layer_is_local(type) ? 0 : layer_is_iha(type) ? c->iha_window : c->local_window;
        struct attention_spec a = {
            .pseudo = P, .causal = c->causal, .token_mask = c->iha_mask, .window = window};
        for (int64_t s = first * P; s < last * P; s++) {
            int64_t begin, end;
            attention_segment_keys(&a, s, first, last, &begin, &end);
            pairs += (double)(end - begin);
        }
    }
    return pairs;
}

static void check_segment_flops(const struct model_config *c, int64_t T, const int64_t *lengths) {
    int32_t segments[2 * BATCH * TOKENS];
    double pairs = 0;
    fill_segments(lengths, BATCH, T, segments);
    for (int64_t n = 0; n < BATCH * T; n++)
        if (segments[n] == n % T)
            pairs += counted_pairs(c, segments[n], segments[BATCH * T + n]);
    double flops = flops_segments(c, T, segments, BATCH);
    if (flops != 12 * (double)(c->num_attention_heads * c->head_dim) * pairs)
        fail_msg("causal %d, mask %d, P %d, windows %d and %d: %.0f FLOPs", c->causal, c->iha_mask,
                 (int)c->num_pseudo_heads, (int)c->local_window, (int)c->iha_window, flops);
}

static void flops_of_segments(void **state) {
    (void)state;
    static const int64_t lengths[][SEGMENT_LENGTHS] = {{1}, {TOKENS}, {5, 1, 2, 9}, {TOKENS - 1, 1}};
    for (size_t i = 0; i < COUNT(lengths); i++)
        for (int64_t P = 1; P <= 5; P++)
            for (int64_t window = 1; window <= TOKENS; window += 3)
                for (int mask = 0; mask < 3; mask++) {
                    struct model_config c = plain_config();
                    c.num_pseudo_heads = P;
                    c.local_window = window;
                    c.iha_window = window + P;
                    c.iha_mask = mask == 1 ? MASK_TOKEN : MASK_FLAT;
                    c.causal = mask < 2;
                    check_segment_flops(&c, TOKENS, lengths[i]);
                }
    struct model_config c = plain_config(); /* one segment to a sequence: as without */
    int32_t zeros[2 * TOKENS] = {0};
    double expected = 2 * TOKENS * flops_per_token(&c, TOKENS).attention;
    assert_true(fabs(flops_segments(&c, TOKENS, zeros, 2) - expected) < 1e-9 * expected);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(flops_of_mha),
        cmocka_unit_test(flops_of_iha),
        cmocka_unit_test(flops_of_segments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
