#include "model/partition.h"

#include <stdlib.h>

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Stage 2's gradient buffer: the embeddings' memory, which is not shared, because a tied table gets
 * gradients at both ends of backward; two slots that the other units use in turn; the reduced shards. */
static void lay_out_gradients(struct partition *p) {
    int64_t elements = p->unit_offset[p->unit_count], slot[2] = {0, 0};
    for (int u = 0; u < p->unit_count; u++)
        p->unit_gradient_offset[u] = p->unit_offset[u];
    p->gradient_elements = elements;
    if (p->zero_stage < 2)
        return;
    for (int u = 1; u < p->unit_count; u++)
        slot[u % 2] = max64(slot[u % 2], p->unit_offset[u + 1] - p->unit_offset[u]);
    int64_t embeddings = p->unit_offset[1];
    p->unit_gradient_offset[0] = 0;
    for (int u = 1; u < p->unit_count; u++)
        p->unit_gradient_offset[u] = embeddings + (u % 2 ? slot[0] : 0);
    p->gradient_shard_offset = embeddings + slot[0] + slot[1];
    p->gradient_elements = p->gradient_shard_offset + elements / p->ranks;
}

/* Every unit in as few buckets of one size as the limit allows. While p->buckets is NULL, only counts. */
static void make_buckets(struct partition *p, int64_t most) {
    int64_t grain = 64 * p->ranks;
    int64_t limit = max64(most, (int64_t)SHARD_ELEMENTS * p->ranks);
    limit = max64(limit, p->unit_offset[p->unit_count] / MAX_BUCKETS);
    p->bucket_count = 0;
    for (int u = 0; u < p->unit_count; u++) {
        int64_t begin = p->unit_offset[u], end = p->unit_offset[u + 1];
        int64_t parts = (end - begin + limit - 1) / limit;
        int64_t size = parts ? ((end - begin + parts - 1) / parts + grain - 1) / grain * grain : 0;
        p->first_bucket[u] = p->bucket_count;
        for (; begin < end; begin += size) {
            int64_t bucket_end = min64(begin + size, end);
            if (p->buckets)
                p->buckets[p->bucket_count] = (struct bucket){begin, bucket_end, u};
            p->bucket_count++;
            p->bucket_elements = max64(p->bucket_elements, bucket_end - begin);
        }
    }
    p->first_bucket[p->unit_count] = p->bucket_count;
}

/* The groups within [s->begin, s->end), relative to begin. Shards come in order, so the search goes on from
 * *first, the group where the shard before ended. */
static int clip_groups(struct shard *s, const struct param_group *groups, int count, int *first) {
    int last;
    while (*first < count && groups[*first].end <= s->begin)
        ++*first;
    for (last = *first; last < count && groups[last].begin < s->end; last++)
        ;
    s->groups = malloc((size_t)(last - *first + 1) * sizeof *s->groups);
    for (int i = *first; s->groups && i < last; i++)
        s->group_count += !(groups[i].muon_scale > 0);
    s->muon_groups = s->groups ? s->groups + s->group_count : NULL;
    for (int i = *first, adamw = 0; s->groups && i < last; i++) {
        struct param_group g = groups[i];
        int64_t begin = max64(g.begin, s->begin);
        g.rounding_index += begin - g.begin;
        g.begin = begin - s->begin;
        g.end = min64(g.end, s->end) - s->begin;
        if (g.muon_scale > 0)
            s->muon_groups[s->muon_count++] = g;
        else
            s->groups[adamw++] = g;
    }
    return s->groups ? 0 : -1;
}

/* Second moments of the shard's groups follow those of the shards before. */
static void place_second_moments(struct partition *p, struct shard *s) {
    s->second_offset = p->second_elements;
    for (int i = 0; i < s->group_count; i++)
        p->second_elements += s->groups[i].end - s->groups[i].begin;
}

/* AdamW's elements before `begin`. The search goes on from *next, and *count AdamW elements before that group. */
static int64_t adamw_elements_before(const struct param_group *groups, int group_count, int64_t begin,
                                     int *next, int64_t *count) {
    for (; *next < group_count && groups[*next].end <= begin; ++*next)
        *count += groups[*next].muon_scale > 0 ? 0 : groups[*next].end - groups[*next].begin;
    bool inside = *next < group_count && !(groups[*next].muon_scale > 0) && groups[*next].begin < begin;
    return *count + (inside ? begin - groups[*next].begin : 0);
}

static int make_shards(struct partition *p, const struct param_group *groups, int group_count) {
    int first = 0, next = 0;
    int64_t before = 0;
    for (int b = 0; b < p->bucket_count; b++) {
        int64_t count = (p->buckets[b].end - p->buckets[b].begin) / p->ranks;
        int64_t begin = p->buckets[b].begin + p->rank * count;
        int64_t local_offset = p->zero_stage == 0 ? begin : p->buckets[b].begin / p->ranks;
        p->shards[b] = (struct shard){.begin = begin, .end = begin + count, .local_offset = local_offset};
        if (clip_groups(&p->shards[b], groups, group_count, &first) != 0)
            return -1;
        if (p->zero_stage > 0)
            place_second_moments(p, &p->shards[b]);
        else /* among those of all parameters */
            p->shards[b].second_offset = adamw_elements_before(groups, group_count, begin, &next, &before);
    }
    return 0;
}

static int make_updates(struct partition *p, const struct param_group *groups, int group_count) {
    int first = 0;
    p->updates = p->shards;
    p->update_count = p->bucket_count;
    if (p->zero_stage > 0)
        return 0;
    p->updates = calloc(1, sizeof *p->updates);
    if (!p->updates)
        return -1;
    p->update_count = 1;
    p->updates->end = p->unit_offset[p->unit_count];
    if (clip_groups(p->updates, groups, group_count, &first) != 0)
        return -1;
    place_second_moments(p, p->updates);
    return 0;
}

int partition_create(struct partition *p, const struct params *params, const struct param_group *groups,
                     int group_count, int rank, int ranks, int zero_stage, int64_t bucket_elements,
                     struct error *e) {
    *p = (struct partition){.rank = rank,
                            .ranks = ranks,
                            .zero_stage = ranks > 1 ? zero_stage : 0,
                            .unit_count = params->unit_count,
                            .unit_offset = params->unit_offset};
    p->first_bucket = calloc((size_t)p->unit_count + 1, sizeof *p->first_bucket);
    p->unit_gradient_offset = calloc((size_t)p->unit_count, sizeof *p->unit_gradient_offset);
    if (!p->first_bucket || !p->unit_gradient_offset)
        return fail_run(e, "out of memory dividing the parameters");
    lay_out_gradients(p);
    p->moment_elements = p->zero_stage == 0 ? params->elements : params->elements / ranks;
    make_buckets(p, bucket_elements); /* to count them */
    p->buckets = calloc((size_t)p->bucket_count, sizeof *p->buckets);
    p->shards = calloc((size_t)p->bucket_count, sizeof *p->shards);
    if (!p->buckets || !p->shards)
        return fail_run(e, "out of memory dividing the parameters");
    make_buckets(p, bucket_elements);
    if (make_shards(p, groups, group_count) != 0 || make_updates(p, groups, group_count) != 0)
        return fail_run(e, "out of memory dividing the optimizer's groups");
    return 0;
}

void partition_free(struct partition *p) {
    for (int b = 0; p->shards && b < p->bucket_count; b++)
        free(p->shards[b].groups);
    if (p->updates && p->updates != p->shards) {
        free(p->updates->groups);
        free(p->updates);
    }
    free(p->shards);
    free(p->buckets);
    free(p->first_bucket);
    free(p->unit_gradient_offset);
    *p = (struct partition){0};
}
