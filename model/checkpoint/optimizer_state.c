#include "model/checkpoint/optimizer_state.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/safetensors.h"

enum { PIECE = 1 << 20 }; /* elements copied at a time */

/* ---- the moments of a rank ---- */

/* A contiguous range of parameters whose moments this rank holds. packed_offset counts parameters without
 * padding, as the same on any number of ranks; shard_offset is the index of their moments in m->moments. */
struct owned {
    int64_t packed_offset, count, shard_offset;
};

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* The parameters in `shards`: partition.shards, which the rank writes, or partition.updates, which it reads. (In
 * stage 0 every rank updates all.) A malloc'd list, in the order of the flat buffer, and its length; -1 when out
 * of memory. */
static int list_owned(const struct model *m, const struct shard *shards, int shard_count,
                      struct owned **list) {
    int count = 0, tensor = 0;
    *list = malloc(((size_t)shard_count + (size_t)m->params.count) * sizeof **list);
    if (!*list)
        return -1;
    for (int s = 0; s < shard_count; s++)
        for (const struct shard *own = &shards[s]; tensor < m->params.count; tensor++) {
            const struct param *t = &m->params.list[tensor];
            int64_t begin = max64(own->begin, t->offset), end = min64(own->end, t->offset + t->count);
            if (begin < end)
                (*list)[count++] = (struct owned){t->packed_offset + begin - t->offset, end - begin,
                                                  own->local_offset + begin - own->begin};
            if (t->offset + t->count > own->end)
                break; /* the rest is in a later shard, or on another rank */
        }
    return count;
}

static tensor moments_piece(struct model *m, int64_t offset, int64_t count) {
    char *data = (char *)m->moments + (size_t)offset * dtype_bytes(m->dtypes.master);
    return tensor_of(data, m->dtypes.master, count, 0, 0, 0, 0);
}

/* Call visit for both moments of the list, in the order of the file, in pieces. */
static int visit_moments(struct model *m, const struct owned *list, int count,
                         int (*visit)(void *context, tensor piece, struct error *e), void *context,
                         struct error *e) {
    for (int moment = 0; moment < 2; moment++)
        for (int i = 0; i < count; i++)
            for (int64_t done = 0; done < list[i].count; done += PIECE) {
                int64_t offset = moment * m->partition.moment_elements + list[i].shard_offset + done;
                tensor piece = moments_piece(m, offset, min64(PIECE, list[i].count - done));
                if (visit(context, piece, e) != 0)
                    return -1;
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

static int64_t owned_total(const struct owned *list, int count) {
    int64_t total = 0;
    for (int i = 0; i < count; i++)
        total += list[i].count;
    return total;
}

int64_t optimizer_elements(const struct model *m) {
    const struct partition *p = &m->partition;
    struct owned *list;
    int count = list_owned(m, p->shards, p->bucket_count, &list);
    int64_t total = count < 0 ? -1 : owned_total(list, count);
    free(list);
    return total;
}

int optimizer_copy(struct model *m, float *moments, struct error *e) {
    struct owned *list;
    int count = list_owned(m, m->partition.shards, m->partition.bucket_count, &list);
    struct moments_copy copy = {m, moments, NULL};
    int status = count < 0 ? fail_run(e, "out of memory saving the optimizer")
                           : visit_moments(m, list, count, copy_piece, &copy, e);
    free(list);
    return status;
}

/* ranges, then both moments. On error the writer has been closed. */
static int write_moments(struct safetensors_writer *w, struct model *m, const float *moments,
                         const struct owned *list, int count, struct error *e) {
    for (int i = 0; i < count; i++) {
        int64_t range[2] = {list[i].packed_offset, list[i].packed_offset + list[i].count};
        if (safetensors_append(w, range, sizeof range, e) != 0)
            return -1;
    }
    int64_t total = owned_total(list, count);
    if (moments)
        return safetensors_append(w, moments, 2 * (size_t)total * sizeof(float), e);
    struct moments_copy copy = {m, malloc(PIECE * sizeof(float)), w};
    int status = copy.next ? visit_moments(m, list, count, append_piece, &copy, e)
                           : fail_run(e, "out of memory saving the optimizer");
    if (!copy.next)
        safetensors_abandon(w);
    free(copy.next);
    return status;
}

int optimizer_write(const char *path, struct model *m, const float *moments, struct error *e) {
    struct owned *list;
    int count = list_owned(m, m->partition.shards, m->partition.bucket_count, &list);
    if (count < 0)
        return fail_run(e, "out of memory saving %s", path);
    int64_t total = owned_total(list, count);
    struct safetensors_entry entries[] = {
        {.name = "ranges", .dtype = ST_I64, .ndim = 2, .shape = {count, 2}},
        {.name = "exp_avg", .dtype = ST_F32, .ndim = 1, .shape = {total}},
        {.name = "exp_avg_sq", .dtype = ST_F32, .ndim = 1, .shape = {total}}};
    struct safetensors_writer *w = safetensors_create(path, entries, 3, e);
    int status = w ? write_moments(w, m, moments, list, count, e) : -1;
    free(list);
    return status == 0 ? safetensors_finish(w, e) : -1;
}

/* ---- reading: every rank opens all files ---- */

struct range {
    int64_t begin, end;
    const char *moments[2]; /* fp32 in the mapped file, of parameter `begin` */
};

struct optimizer_files {
    struct safetensors *files;
    int count;
    struct range *ranges;
    int range_count;
};

static void close_optimizer(struct optimizer_files *o) {
    for (int i = 0; i < o->count && o->files; i++)
        safetensors_close(&o->files[i]);
    free(o->files);
    free(o->ranges);
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

/* Add a file's ranges to the list. */
static int list_ranges(struct optimizer_files *o, const struct safetensors *file, const char *path,
                       struct error *e) {
    const struct safetensors_entry *ranges = safetensors_find(file, "ranges"),
                                   *first = safetensors_find(file, "exp_avg"),
                                   *second = safetensors_find(file, "exp_avg_sq");
    if (!ranges || !first || !second || ranges->dtype != ST_I64 || first->dtype != ST_F32 ||
        second->dtype != ST_F32 || ranges->ndim != 2 || ranges->shape[1] != 2 ||
        first->bytes != second->bytes || ranges->shape[0] > INT32_MAX / 2 - o->range_count)
        return fail_user(e, "%s: not an optimizer file of this program, or damaged", path);
    int count = (int)ranges->shape[0];
    int64_t moments = (int64_t)(first->bytes / sizeof(float)), used = 0;
    struct range *grown = realloc(o->ranges, (size_t)(o->range_count + count + 1) * sizeof *grown);
    if (!grown)
        return fail_run(e, "out of memory reading %s", path);
    o->ranges = grown;
    for (int i = 0; i < count; i++) {
        int64_t pair[2];
        memcpy(pair, (const char *)ranges->data + (size_t)i * sizeof pair, sizeof pair);
        if (pair[0] < 0 || pair[1] <= pair[0] || pair[1] - pair[0] > moments - used)
            return fail_user(e, "%s: range %d does not fit the number of moments: the file is damaged", path,
                             i);
        size_t at = (size_t)used * sizeof(float);
        o->ranges[o->range_count++] = (struct range){
            pair[0], pair[1], {(const char *)first->data + at, (const char *)second->data + at}};
        used += pair[1] - pair[0];
    }
    return used == moments ? 0
                           : fail_user(e, "%s: more moments than its ranges list: the file is damaged", path);
}

static int by_begin(const void *a, const void *b) {
    int64_t x = ((const struct range *)a)->begin, y = ((const struct range *)b)->begin;
    return (x > y) - (x < y);
}

/* Check that the ranges cover every parameter of the model exactly once. */
static int check_cover(const struct optimizer_files *o, int64_t num_params, const char *dir,
                       struct error *e) {
    int64_t at = 0;
    for (int i = 0; i < o->range_count; i++) {
        if (o->ranges[i].begin != at)
            return fail_user(
                e, "%s: the optimizer files hold the moments of parameter %lld %s: they are damaged", dir,
                (long long)min64(at, o->ranges[i].begin), o->ranges[i].begin > at ? "not at all" : "twice");
        at = o->ranges[i].end;
    }
    return at == num_params
               ? 0
               : fail_user(e,
                           "%s: the optimizer files hold the moments of %lld parameters, and the "
                           "model has %lld",
                           dir, (long long)at, (long long)num_params);
}

static int open_optimizer(struct optimizer_files *o, const char *dir, int64_t num_params, struct error *e) {
    int ranks = count_ranks(dir, e);
    *o = (struct optimizer_files){0};
    if (ranks < 0)
        return -1;
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
        if (list_ranges(o, &o->files[rank], path, e) != 0)
            return -1;
    }
    qsort(o->ranges, (size_t)o->range_count, sizeof *o->ranges, by_begin);
    return check_cover(o, num_params, dir, e);
}

/* Both lists are sorted, so one pass over them finds the ranges of each owned part. */
static void upload_moments(struct model *m, const struct optimizer_files *o, const struct owned *list,
                           int count) {
    for (int i = 0, r = 0; i < count; i++) {
        int64_t begin = list[i].packed_offset, end = begin + list[i].count;
        while (r > 0 && o->ranges[r].begin > begin)
            r--;
        while (o->ranges[r].end <= begin)
            r++;
        for (; begin < end; r++) {
            int64_t stop = min64(end, o->ranges[r].end);
            for (int moment = 0; moment < 2; moment++)
                m->k->upload(m->dev,
                             moments_piece(m,
                                           moment * m->partition.moment_elements + list[i].shard_offset +
                                               begin - list[i].packed_offset,
                                           stop - begin),
                             o->ranges[r].moments[moment] + (begin - o->ranges[r].begin) * 4, DTYPE_F32);
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
    struct owned *list = NULL;
    int status = open_optimizer(&o, dir, layout->num_params, e);
    if (status == 0) {
        int count = list_owned(m, m->partition.updates, m->partition.update_count, &list);
        status = count < 0 ? fail_run(e, "out of memory reading %s", dir) : 0;
        if (status == 0)
            upload_moments(m, &o, list, map_to_layout(list, count, &m->params, layout));
    }
    free(list);
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
