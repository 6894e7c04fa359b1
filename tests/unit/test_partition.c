/* The partition over ranks, for several numbers of ranks and every ZeRO stage: the shards of all ranks cover
 * the flat buffer once, gradients in use at the same time do not overlap, and memory decreases with the
 * stage. */
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"

static struct params list_params(const struct model_config *c, int ranks) {
    struct params p;
    struct error e = {0};
    assert_int_equal(params_create(&p, c, ranks, &e), 0);
    return p;
}

enum { FIRST_INDEX = 7, SECOND_INDEX = 1 << 30 }; /* of the two groups in rounding */
enum { BUCKET_ELEMENTS = 4 << 20 };

/* Two groups whose boundary is inside a bucket: [0, boundary) and the rest. */
static struct partition make_partition(const struct params *params, int64_t boundary, int rank, int ranks,
                                       int stage) {
    struct partition p;
    struct error e = {0};
    struct param_group groups[2] = {{0, boundary, 1, 0.5f, 0, FIRST_INDEX},
                                    {boundary, params->elements, 3, 0, 0, SECOND_INDEX}};
    assert_int_equal(partition_create(&p, params, groups, 2, rank, ranks, stage, BUCKET_ELEMENTS, &e), 0);
    return p;
}

/* A vocabulary large enough that the embeddings take two buckets. */
static struct model_config wide_config(void) {
    struct model_config c = plain_config();
    c.vocab_size = BUCKET_ELEMENTS / c.hidden_size + 1000;
    return c;
}

static void check_shards(const struct model_config *c, int ranks, int stage) {
    struct params params = list_params(c, ranks);
    int64_t boundary = params.unit_offset[2] + 100;
    char *owner = calloc((size_t)params.elements, 1);
    for (int rank = 0; rank < ranks; rank++) {
        struct partition p = make_partition(&params, boundary, rank, ranks, stage);
        int64_t owned = 0;
        for (int b = 0; b < p.bucket_count; b++) {
            const struct shard *s = &p.shards[b];
            assert_true(s->begin >= p.buckets[b].begin && s->end <= p.buckets[b].end);
            assert_int_equal((s->end - s->begin) * ranks, p.buckets[b].end - p.buckets[b].begin);
            assert_int_equal(s->local_offset, stage == 0 || ranks == 1 ? s->begin : owned);
            owned += s->end - s->begin;
            for (int64_t i = s->begin; i < s->end; i++)
                owner[i]++;
        }
        assert_int_equal(owned * ranks, params.elements);
        assert_int_equal(p.moment_elements, stage == 0 || ranks == 1 ? params.elements : owned);
        partition_free(&p);
    }
    for (int64_t i = 0; i < params.elements; i++)
        assert_int_equal(owner[i], 1);
    free(owner);
    params_free(&params);
}

static void every_element_has_one_owner(void **state) {
    (void)state;
    struct model_config configs[] = {plain_config(), other_config(), wide_config()};
    for (int c = 0; c < 3; c++)
        for (int ranks = 1; ranks <= 7; ranks++)
            for (int stage = 0; stage <= 2; stage++)
                check_shards(&configs[c], ranks, stage);
}

static void buckets_are_within_a_unit_and_the_size_limit(void **state) {
    (void)state;
    struct model_config c = wide_config();
    struct params params = list_params(&c, 4);
    struct partition p = make_partition(&params, 100, 1, 4, 1);
    int64_t end = 0;
    int embeddings = 0;
    for (int b = 0; b < p.bucket_count; b++) {
        const struct bucket *x = &p.buckets[b];
        assert_int_equal(x->begin, end);
        assert_true(p.first_bucket[x->unit] <= b && b < p.first_bucket[x->unit + 1]);
        assert_true(x->begin >= p.unit_offset[x->unit] && x->end <= p.unit_offset[x->unit + 1]);
        assert_true(x->end - x->begin <= BUCKET_ELEMENTS && x->end - x->begin <= p.bucket_elements);
        embeddings += x->unit == 0;
        end = x->end;
    }
    assert_int_equal(end, params.elements);
    assert_int_equal(p.first_bucket[0], 0);
    assert_int_equal(p.first_bucket[p.unit_count], p.bucket_count);
    assert_int_equal(embeddings, 2);
    partition_free(&p);
    params_free(&params);
}

/* Every element that a rank updates is in exactly one group, and it is the one it was given. */
static void groups_are_split_at_shard_boundaries(void **state) {
    (void)state;
    struct model_config c = plain_config();
    for (int stage = 0; stage <= 1; stage++) {
        struct params params = list_params(&c, 3);
        int64_t boundary = params.unit_offset[2] + 100, covered = 0;
        struct partition p = make_partition(&params, boundary, 2, 3, stage);
        for (int s = 0; s < p.update_count; s++)
            for (int g = 0; g < p.updates[s].group_count; g++) {
                const struct param_group *x = &p.updates[s].groups[g];
                int64_t begin = p.updates[s].begin + x->begin, end = p.updates[s].begin + x->end;
                assert_true(begin < end && end <= p.updates[s].end);
                assert_true(x->lr_scale == 1 ? end <= boundary : begin >= boundary);
                assert_int_equal(x->rounding_index,
                                 x->lr_scale == 1 ? FIRST_INDEX + begin : SECOND_INDEX + begin - boundary);
                covered += end - begin;
            }
        assert_int_equal(covered, stage == 0 ? params.elements : params.elements / 3);
        partition_free(&p);
        params_free(&params);
    }
}

/* Stage 2: a unit, the one before it in backward, the embeddings and the shards are all in use at once. */
static void stage_2_gradients_do_not_overlap(void **state) {
    (void)state;
    struct model_config c = other_config();
    struct params params = list_params(&c, 4);
    struct partition p = make_partition(&params, 100, 0, 4, 2);
    for (int u = 0; u < p.unit_count; u++) {
        int64_t end = p.unit_gradient_offset[u] + p.unit_offset[u + 1] - p.unit_offset[u];
        assert_true(end <= p.gradient_shard_offset);
        if (u > 1)
            assert_true(end <= p.unit_gradient_offset[u - 1] ||
                        p.unit_gradient_offset[u] >=
                            p.unit_gradient_offset[u - 1] + p.unit_offset[u] - p.unit_offset[u - 1]);
        if (u > 0)
            assert_true(p.unit_gradient_offset[u] >= p.unit_offset[1]);
    }
    assert_int_equal(p.gradient_elements, p.gradient_shard_offset + params.elements / 4);
    assert_true(p.gradient_elements < params.elements + params.elements / 4);
    partition_free(&p);
    params_free(&params);
}

static void memory_decreases_with_ranks_and_stage(void **state) {
    (void)state;
    struct model_config c = plain_config();
    struct pass_shape shape = {1, TOKENS, RECOMPUTE_NONE, true, false, false, false};
    struct error e = {0};
    struct memory_plan single, plan[3];
    assert_int_equal(model_memory(&c, kernels_cpu(), fixture_device(), &shape, 1, 2, DTYPE_F32, &single, &e),
                     0);
    assert_int_equal(single.messages, 0);
    for (int stage = 0; stage <= 2; stage++)
        assert_int_equal(
            model_memory(&c, kernels_cpu(), fixture_device(), &shape, 4, stage, DTYPE_F32, &plan[stage], &e),
            0);
    assert_int_equal(plan[0].optimizer, 2 * plan[0].parameters);
    assert_int_equal(plan[0].gradients, plan[0].parameters);
    assert_int_equal(plan[1].optimizer * 4, plan[0].optimizer);
    assert_int_equal(plan[1].gradients, plan[0].gradients);
    assert_int_equal(plan[2].optimizer, plan[1].optimizer);
    assert_true(plan[2].gradients < plan[1].gradients);
    assert_true(plan[0].messages > 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_element_has_one_owner),
        cmocka_unit_test(buckets_are_within_a_unit_and_the_size_limit),
        cmocka_unit_test(groups_are_split_at_shard_boundaries),
        cmocka_unit_test(stage_2_gradients_do_not_overlap),
        cmocka_unit_test(memory_decreases_with_ranks_and_stage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
