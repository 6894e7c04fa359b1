#include "model/partition.h"

#include <stdlib.h>

/* Stage 2's gradient buffers: the embeddings' own, since a tied table is written at both ends of backward;
 * two that the other units use in turn; the reduced shard. */
static void place_gradients(struct partition *p) {
    int64_t elements = p->unit_offset[p->unit_count], slot[2] = {0, 0};
    for (int u = 0; u < p->unit_count; u++)
        p->unit_gradient_offset[u] = p->unit_offset[u];
    p->gradient_elements = elements;
    if (p->zero_stage < 2)
        return;
    for (int u = 1; u < p->unit_count; u++) {
        int64_t length = p->unit_offset[u + 1] - p->unit_offset[u];
        slot[u % 2] = length > slot[u % 2] ? length : slot[u % 2];
    }
    int64_t embeddings = p->unit_offset[1];
    p->unit_gradient_offset[0] = 0;
    for (int u = 1; u < p->unit_count; u++)
        p->unit_gradient_offset[u] = embeddings + (u % 2 ? slot[0] : 0);
    p->gradient_shard_at = embeddings + slot[0] + slot[1];
    p->gradient_elements = p->gradient_shard_at + elements / p->ranks;
}

/* The groups within [s->begin, s->end). Shares come in order, so the search goes on where it ended: *from. */
static int clip_groups(struct share *s, const struct param_group *groups, int count, int *from) {
    int last;
    while (*from < count && groups[*from].end <= s->begin)
        ++*from;
    for (last = *from; last < count && groups[last].begin < s->end; last++)
        ;
    s->groups = malloc((size_t)(last - *from + 1) * sizeof *s->groups);
    for (int i = *from; s->groups && i < last; i++) {
        struct param_group g = groups[i];
        g.begin = (g.begin > s->begin ? g.begin : s->begin) - s->begin;
        g.end = (g.end < s->end ? g.end : s->end) - s->begin;
        s->groups[s->group_count++] = g;
    }
    return s->groups ? 0 : -1;
}

static void cut(struct partition *p) {
    int64_t grain = 64 * p->ranks, most = p->unit_offset[p->unit_count] / MAX_BUCKETS;
    most = most > BUCKET_ELEMENTS ? most : BUCKET_ELEMENTS;
    most = most > (int64_t)SHARE_ELEMENTS * p->ranks ? most : (int64_t)SHARE_ELEMENTS * p->ranks;
    for (int u = 0; u < p->unit_count; u++) {
        int64_t begin = p->unit_offset[u], end = p->unit_offset[u + 1];
        p->first_bucket[u] = p->bucket_count;
        int64_t parts = (end - begin + most - 1) / most;
        int64_t each = parts ? ((end - begin + parts - 1) / parts + grain - 1) / grain * grain : 0;
        for (; begin < end; begin += each) {
            int64_t stop = begin + each < end ? begin + each : end;
            if (p->buckets)
                p->buckets[p->bucket_count] = (struct bucket){begin, stop, u};
            p->bucket_count++;
            p->bucket_elements = stop - begin > p->bucket_elements ? stop - begin : p->bucket_elements;
        }
    }
    p->first_bucket[p->unit_count] = p->bucket_count;
}

static int list_shares(struct partition *p, const struct param_group *groups, int group_count) {
    int from = 0, first = 0;
    for (int b = 0; b < p->bucket_count; b++) {
        int64_t length = (p->buckets[b].end - p->buckets[b].begin) / p->ranks;
        int64_t begin = p->buckets[b].begin + p->rank * length;
        int64_t shard = p->zero_stage == 0 ? begin : p->buckets[b].begin / p->ranks;
        p->own[p->own_count] = (struct share){begin, begin + length, shard, NULL, 0};
        if (clip_groups(&p->own[p->own_count++], groups, group_count, &from) != 0)
            return -1;
    }
    if (p->zero_stage > 0) {
        p->updated = p->own;
        p->updated_count = p->own_count;
        return 0;
    }
    p->updated = calloc(1, sizeof *p->updated);
    if (!p->updated)
        return -1;
    p->updated_count = 1;
    p->updated->end = p->unit_offset[p->unit_count];
    return clip_groups(p->updated, groups, group_count, &first);
}

int partition_create(struct partition *p, const struct params *params, const struct param_group *groups,
                     int group_count, int rank, int ranks, int zero_stage, struct error *e) {
    *p = (struct partition){.rank = rank,
                            .ranks = ranks,
                            .zero_stage = ranks > 1 ? zero_stage : 0,
                            .unit_count = params->unit_count,
                            .unit_offset = params->unit_offset};
    p->first_bucket = calloc((size_t)p->unit_count + 1, sizeof *p->first_bucket);
    p->unit_gradient_offset = calloc((size_t)p->unit_count, sizeof *p->unit_gradient_offset);
    if (!p->first_bucket || !p->unit_gradient_offset)
        return fail_run(e, "out of memory dividing the parameters");
    place_gradients(p);
    p->moment_elements = p->zero_stage == 0 ? params->elements : params->elements / ranks;
    cut(p); /* to count them */
    p->buckets = calloc((size_t)p->bucket_count, sizeof *p->buckets);
    p->own = calloc((size_t)p->bucket_count, sizeof *p->own);
    if (!p->buckets || !p->own)
        return fail_run(e, "out of memory dividing the parameters");
    p->bucket_count = 0;
    cut(p);
    if (list_shares(p, groups, group_count) != 0)
        return fail_run(e, "out of memory dividing the optimizer's groups");
    return 0;
}

void partition_free(struct partition *p) {
    for (int i = 0; p->own && i < p->own_count; i++)
        free(p->own[i].groups);
    if (p->updated && p->updated != p->own) {
        free(p->updated->groups);
        free(p->updated);
    }
    free(p->own);
    free(p->buckets);
    free(p->first_bucket);
    free(p->unit_gradient_offset);
    *p = (struct partition){0};
}
