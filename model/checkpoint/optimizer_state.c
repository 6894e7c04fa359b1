#include "model/checkpoint/optimizer_state.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/safetensors.h"

enum { PIECE = 1 << 20 /* elements copied at a time */, MOMENTS = 2 };

/* ---- the moments of a rank ---- */

/* A contiguous range of parameters whose moments this rank holds. packed_offset counts parameters without
 * padding, as the same on any number of ranks; shard_offset is the index of their moments in m->moments. */
struct owned {
    int64_t packed_offset, count, shard_offset;
};

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* What this rank holds of both moments, each in the order of the flat buffer. Muon's parameters have no second one. */
struct owned_moments {
    struct owned *list[MOMENTS];
    int count[MOMENTS];
};

/* Append the parameters in elements [begin, end) of the flat buffer, whose moments are at `offset`. *tensor: the first
 * that can be in it, and afterwards in the next range. */
static int append_owned(const struct model *m, int64_t begin, int64_t end, int64_t offset, struct owned *list,
                        int count, int *tensor) {
    for (; *tensor < m->params.count; ++*tensor) {
        const struct param *t = &m->params.list[*tensor];
        struct element_range in = param_overlap(t, begin, end);
        if (in.begin < in.end)
            list[count++] = (struct owned){t->packed_offset + in.begin - t->offset, in.end - in.begin,
                                           offset + in.begin - begin};
        if (t->offset + t->count > end)
            break; /* the rest is in a later range, or on another rank */
    }
    return count;
}

static void list_first(const struct model *m, const struct shard *shards, int shard_count,
                       struct owned_moments *o) {
    int tensor = 0;
    for (int i = 0; i < shard_count; i++)
        o->count[0] = append_owned(m, shards[i].begin, shards[i].end, shards[i].local_offset, o->list[0],
                                   o->count[0], &tensor);
}

static void list_second(const struct model *m, const struct shard *shards, int shard_count,
                        struct owned_moments *o) {
    int tensor = 0;
    for (int i = 0; i < shard_count; i++) {
        const struct shard *s = &shards[i];
        int64_t offset = s->second_offset;
        for (int g = 0; g < s->group_count; g++) {
            const struct param_group *group = &s->groups[g];
            o->count[1] = append_owned(m, s->begin + group->begin, s->begin + group->end, offset, o->list[1],
                                       o->count[1], &tensor);
            offset += group->end - group->begin;
        }
    }
}

static void free_owned(struct owned_moments *o) {
    free(o->list[0]);
    free(o->list[1]);
}

/* The parameters in `shards`: partition.shards, which the rank writes, or partition.updates, which it reads. (In
 * stage 0 every rank updates all.) -1 when out of memory; to be freed in any case. */
static int list_owned(const struct model *m, const struct shard *shards, int shard_count,
                      struct owned_moments *o) {
    size_t most = (size_t)shard_count + (size_t)m->params.count;
    *o = (struct owned_moments){.list = {malloc(most * sizeof **o->list), malloc(most * sizeof **o->list)}};
    if (!o->list[0] || !o->list[1])
        return -1;
    list_first(m, shards, shard_count, o);
    list_second(m, shards, shard_count, o);
    return 0;
}

static tensor moments_piece(struct model *m, int64_t offset, int64_t count) {
    char *data = (char *)m->moments + (size_t)offset * dtype_bytes(m->dtypes.master);
    return tensor_of(data, m->dtypes.master, count, 0, 0, 0, 0);
}

/* Where a moment begins in m->moments. */
static int64_t moment_offset(const struct model *m, int moment) {
    return moment == 0 ? 0 : m->partition.moment_elements;
}

/* Call visit for both moments, in the order of the file, in pieces. */
static int visit_moments(struct model *m, const struct owned_moments *o,
                         int (*visit)(void *context, tensor piece, struct error *e), void *context,
                         struct error *e) {
    for (int moment = 0; moment < MOMENTS; moment++)
        for (int i = 0; i < o->count[moment]; i++) {
            const struct owned *own = &o->list[moment][i];
            for (int64_t done = 0; done < own->count; done += PIECE) {
                int64_t offset = moment_offset(m, moment) + own->shard_offset + done;
                tensor piece = moments_piece(m, offset, min64(PIECE, own->count - done));
                if (visit(context, piece, e) != 0)
                    return -1;
            }
        }
    return 0;
}

struct moments_copy {
    struct model *m;
    float *next; /* where the next piece goes */
    struct safetensors_writer *w;
};

static int copy_piece(void *context, tensor piece, struct error *e) {
    struct moments_copy *c = context;
    (void)e;
    c->m->k->download(c->m->dev, piece, c->next, DTYPE_F32);
    c->next += tensor_count(piece);
    return 0;
}

static int append_piece(void *context, tensor piece, struct error *e) {
    struct moments_copy *c = context;
    c->m->k->download(c->m->dev, piece, c->next, DTYPE_F32);
    return safetensors_append(c->w, c->next, (size_t)tensor_count(piece) * sizeof(float), e);
}

static int64_t owned_total(const struct owned_moments *o, int moment) {
    int64_t total = 0;
    for (int i = 0; i < o->count[moment]; i++)
        total += o->list[moment][i].count;
    return total;
}

int64_t optimizer_elements(const struct model *m) {
    const struct partition *p = &m->partition;
    struct owned_moments o;
    int status = list_owned(m, p->shards, p->bucket_count, &o);
    int64_t total = status < 0 ? -1 : owned_total(&o, 0) + owned_total(&o, 1);
    free_owned(&o);
    return total;
}

int optimizer_copy(struct model *m, float *moments, struct error *e) {
    struct owned_moments o;
    int listed = list_owned(m, m->partition.shards, m->partition.bucket_count, &o);
    struct moments_copy copy = {m, moments, NULL};
    int status = listed < 0 ? fail_run(e, "out of memory saving the optimizer")
                            : visit_moments(m, &o, copy_piece, &copy, e);
    free_owned(&o);
    return status;
}

/* Append the ranges of one moment. On error the writer has been closed. */
static int write_ranges(struct safetensors_writer *w, const struct owned_moments *o, int moment,
                        struct error *e) {
    for (int i = 0; i < o->count[moment]; i++) {
        const struct owned *own = &o->list[moment][i];
        int64_t range[2] = {own->packed_offset, own->packed_offset + own->count};
        if (safetensors_append(w, range, sizeof range, e) != 0)
            return -1;
    }
    return 0;
}

/* Both moments. On error the writer has been closed. */
static int write_moments(struct safetensors_writer *w, struct model *m, const float *moments,
                         const struct owned_moments *o, struct error *e) {
    int64_t total = owned_total(o, 0) + owned_total(o, 1);
    if (moments)
        return safetensors_append(w, moments, (size_t)total * sizeof(float), e);
    struct moments_copy copy = {m, malloc(PIECE * sizeof(float)), w};
    int status = copy.next ? visit_moments(m, o, append_piece, &copy, e)
                           : fail_run(e, "out of memory saving the optimizer");
    if (!copy.next)
        safetensors_abandon(w);
    free(copy.next);
    return status;
}

/* Ranges of their own where second moments are not of the same parameters as the first. */
static int write_file(const char *path, struct model *m, const float *moments, const struct owned_moments *o,
                      struct error *e) {
    struct safetensors_entry entries[] = {
        {.name = "ranges", .dtype = ST_I64, .ndim = 2, .shape = {o->count[0], 2}},
        {.name = "ranges_sq", .dtype = ST_I64, .ndim = 2, .shape = {o->count[1], 2}},
        {.name = "exp_avg", .dtype = ST_F32, .ndim = 1, .shape = {owned_total(o, 0)}},
        {.name = "exp_avg_sq", .dtype = ST_F32, .ndim = 1, .shape = {owned_total(o, 1)}}};
    bool both = m->shape.muon;
    if (!both)
        entries[1] = entries[0];
    struct safetensors_writer *w = safetensors_create(path, entries + !both, 3 + both, e);
    if (!w || write_ranges(w, o, 0, e) != 0 || (both && write_ranges(w, o, 1, e) != 0) ||
        write_moments(w, m, moments, o, e) != 0)
        return -1;
    return safetensors_finish(w, e);
}

int optimizer_write(const char *path, struct model *m, const float *moments, struct error *e) {
    struct owned_moments o;
    int status = list_owned(m, m->partition.shards, m->partition.bucket_count, &o) < 0
                     ? fail_run(e, "out of memory saving %s", path)
                     : write_file(path, m, moments, &o, e);
    free_owned(&o);
    return status;
}

/* ---- reading: every rank opens all files ---- */

struct range {
    int64_t begin, end;
    const char *values; /* fp32 in the mapped file, of parameter `begin` */
};

struct range_list {
    struct range *ranges;
    int count;
};

struct optimizer_files {
    struct safetensors *files;
    int count;
    struct range_list moments[MOMENTS];
};

static void close_optimizer(struct optimizer_files *o) {
    for (int i = 0; i < o->count && o->files; i++)
        safetensors_close(&o->files[i]);
    free(o->files);
    for (int i = 0; i < MOMENTS; i++)
        free(o->moments[i].ranges);
}

/* The W of "optimizer-RRRRR-of-WWWWW.safetensors" in a directory. */
static int count_ranks(const char *dir, struct error *e) {
    DIR *entries = opendir(dir);
    struct dirent *item;
    int ranks = 0, rank, of, length;
    if (!entries)
        return fail_user(e, "%s: cannot list the directory: %s; %s", dir, strerror(errno),
                         files_advice(errno));
    while ((item = readdir(entries)))
        if (sscanf(item->d_name, "optimizer-%5d-of-%5d.safetensors%n", &rank, &of, &length) == 2 && of > 0)
            ranks = of;
    closedir(entries);
    return ranks
               ? ranks
               : fail_user(e, "%s: no optimizer-RRRRR-of-WWWWW.safetensors found; use a complete checkpoint",
                           dir);
}

/* Add a file's ranges of one moment to the list. ranges_sq is only in files of a run with Muon. */
static int list_ranges(struct range_list *o, const struct safetensors *file, int moment, const char *path,
                       struct error *e) {
    const struct safetensors_entry *own = moment == 0 ? NULL : safetensors_find(file, "ranges_sq"),
                                   *ranges = own ? own : safetensors_find(file, "ranges"),
                                   *values = safetensors_find(file, moment == 0 ? "exp_avg" : "exp_avg_sq");
    if (!ranges || !values || ranges->dtype != ST_I64 || values->dtype != ST_F32 || ranges->ndim != 2 ||
        ranges->shape[1] != 2 || ranges->shape[0] > INT32_MAX / 2 - o->count)
        return fail_user(e, "%s: not an optimizer file of this program, or damaged", path);
    int count = (int)ranges->shape[0];
    int64_t moments = (int64_t)(values->bytes / sizeof(float)), used = 0;
    struct range *grown = realloc(o->ranges, (size_t)(o->count + count + 1) * sizeof *grown);
    if (!grown)
        return fail_run(e, "out of memory reading %s", path);
    o->ranges = grown;
    for (int i = 0; i < count; i++) {
        int64_t pair[2];
        memcpy(pair, (const char *)ranges->data + (size_t)i * sizeof pair, sizeof pair);
        if (pair[0] < 0 || pair[1] <= pair[0] || pair[1] - pair[0] > moments - used)
            return fail_user(e, "%s: range %d does not fit the number of moments: the file is damaged", path,
                             i);
        o->ranges[o->count++] =
            (struct range){pair[0], pair[1], (const char *)values->data + (size_t)used * sizeof(float)};
        used += pair[1] - pair[0];
    }
    return used == moments ? 0
                           : fail_user(e, "%s: more moments than its ranges list: the file is damaged", path);
}

static int by_begin(const void *a, const void *b) {
    int64_t x = ((const struct range *)a)->begin, y = ((const struct range *)b)->begin;
    return (x > y) - (x < y);
}

/* The next run of parameters, from tensor *next on, that have this moment: packed offsets [*begin, *end). muon:
 * whether Muon trained them. */
static bool next_run(const struct params *layout, bool muon, int moment, int *next, int64_t *begin,
                     int64_t *end) {
    bool found = false;
    for (; *next < layout->count; ++*next) {
        const struct param *t = &layout->list[*next];
        bool has = moment == 0 || !muon || !muon_updates(t);
        if (!has && found)
            break;
        if (!has)
            continue;
        *begin = found ? *begin : t->packed_offset;
        *end = t->packed_offset + t->count;
        found = true;
    }
    return found;
}

/* Check that the ranges cover every parameter that has this moment exactly once. layout: the parameters of the
 * checkpoint. */
static int check_cover(const struct range_list *o, const struct params *layout, bool muon, int moment,
                       const char *dir, struct error *e) {
    int64_t begin, end, held = 0, wanted = 0;
    int next = 0, r = 0;
    bool complete = true;
    for (int i = 0; i < o->count; i++)
        held += o->ranges[i].end - o->ranges[i].begin;
    while (next_run(layout, muon, moment, &next, &begin, &end)) {
        wanted += end - begin;
        for (; complete && begin < end && r < o->count; begin = o->ranges[r++].end) {
            if (o->ranges[r].begin != begin)
                return fail_user(
                    e, "%s: the optimizer files hold the moments of parameter %lld %s: they are damaged", dir,
                    (long long)min64(begin, o->ranges[r].begin),
                    o->ranges[r].begin > begin ? "not at all" : "twice");
            complete = o->ranges[r].end <= end;
        }
        complete &= begin >= end;
    }
    return complete && r == o->count
               ? 0
               : fail_user(e,
                           "%s: the optimizer files hold the moments of %lld parameters, and the "
                           "model has %lld",
                           dir, (long long)held, (long long)wanted);
}

static int open_files(struct optimizer_files *o, const char *dir, int ranks, struct error *e) {
    o->files = calloc((size_t)ranks, sizeof *o->files);
    if (!o->files)
        return fail_run(e, "out of memory reading %s", dir);
    for (int rank = 0; rank < ranks; rank++) {
        char path[MAX_TEXT + 128], name[OPTIMIZER_NAME];
        optimizer_name(name, rank, ranks);
        snprintf(path, sizeof path, "%s/%s", dir, name);
        if (safetensors_open(&o->files[rank], path, e) != 0)
            return -1;
        o->count++;
        for (int i = 0; i < MOMENTS; i++)
            if (list_ranges(&o->moments[i], &o->files[rank], i, path, e) != 0)
                return -1;
    }
    return 0;
}

static int open_optimizer(struct optimizer_files *o, const char *dir, const struct params *layout, bool muon,
                          struct error *e) {
    int ranks = count_ranks(dir, e);
    *o = (struct optimizer_files){0};
    if (ranks < 0 || open_files(o, dir, ranks, e) != 0)
        return -1;
    for (int i = 0; i < MOMENTS; i++) {
        qsort(o->moments[i].ranges, (size_t)o->moments[i].count, sizeof *o->moments[i].ranges, by_begin);
        if (check_cover(&o->moments[i], layout, muon, i, dir, e) != 0)
            return -1;
    }
    return 0;
}

/* Both lists are sorted, so one pass over them finds the ranges of each owned part. */
static void upload_moment(struct model *m, int moment, const struct range_list *o, const struct owned *list,
                          int count) {
    for (int i = 0, r = 0; i < count; i++) {
        int64_t begin = list[i].packed_offset, end = begin + list[i].count;
        while (r > 0 && o->ranges[r].begin > begin)
            r--;
        while (o->ranges[r].end <= begin)
            r++;
        for (; begin < end; r++) {
            int64_t stop = min64(end, o->ranges[r].end),
                    at = moment_offset(m, moment) + list[i].shard_offset + begin - list[i].packed_offset;
            m->k->upload(m->dev, moments_piece(m, at, stop - begin),
                         o->ranges[r].values + (begin - o->ranges[r].begin) * 4, DTYPE_F32);
            begin = stop;
            if (begin == end)
                break;
        }
    }
}

void optimizer_name(char out[OPTIMIZER_NAME], int rank, int ranks) {
    snprintf(out, OPTIMIZER_NAME, "optimizer-%05d-of-%05d.safetensors", rank, ranks);
}

/* Give each part of the list its packed offset in another layout of the same tensors, whose first dimension may
 * differ, and leave out what that layout does not have. Returns the new length. */
static int map_to_layout(struct owned *list, int count, const struct params *p, const struct params *layout) {
    int out = 0;
    for (int i = 0, tensor = 0; i < count; i++) {
        struct owned own = list[i];
        while (p->list[tensor].packed_offset + p->list[tensor].count <= own.packed_offset)
            tensor++;
        int64_t within = own.packed_offset - p->list[tensor].packed_offset;
        own.packed_offset = layout->list[tensor].packed_offset + within;
        own.count = min64(own.count, layout->list[tensor].count - within);
        if (own.count > 0)
            list[out++] = own;
    }
    return out;
}

/* layout: the parameters of the checkpoint. */
static int read_moments(const char *dir, struct model *m, const struct params *layout, struct error *e) {
    struct optimizer_files o;
    struct owned_moments owned = {0};
    int status = open_optimizer(&o, dir, layout, m->shape.muon, e);
    if (status == 0 && list_owned(m, m->partition.updates, m->partition.update_count, &owned) < 0)
        status = fail_run(e, "out of memory reading %s", dir);
    for (int i = 0; i < MOMENTS && status == 0; i++)
        upload_moment(m, i, &o.moments[i], owned.list[i],
                      map_to_layout(owned.list[i], owned.count[i], &m->params, layout));
    free_owned(&owned);
    close_optimizer(&o);
    return status;
}

int optimizer_read(const char *dir, struct model *m, struct error *e) {
    return read_moments(dir, m, &m->params, e);
}

int optimizer_read_resized(const char *dir, struct model *m, int64_t vocab_size, struct error *e) {
    struct model_config config = m->config;
    struct params old;
    config.vocab_size = vocab_size;
    if (params_create(&old, &config, 1, e) != 0)
        return -1;
    int status = read_moments(dir, m, &old, e);
    params_free(&old);
    return status;
}
