/* The checkpoint's files one by one: weights, optimizer state, trainer.json. */
#include "model/checkpoint/checkpoint_files.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/safetensors.h"
#include "model/state_dict.h"

enum { MAX_JSON = 16 << 20, PIECE = 1 << 20 /* elements moved at a time */ };

/* ---- weights ---- */

static void describe_param(struct safetensors_entry *s, struct param *p) {
    *s = (struct safetensors_entry){.name = p->name, .dtype = ST_F32, .ndim = p->ndim};
    memcpy(s->shape, p->shape, sizeof p->shape);
}

static int append_weights(struct safetensors_writer *w, const struct checkpoint_source *from,
                          struct error *e) {
    struct model *m = from->model;
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        size_t bytes = (size_t)p->count * sizeof(float);
        float *values = from->weights ? from->weights + p->packed_offset : malloc(bytes);
        if (!values) {
            safetensors_abandon(w);
            return fail_run(e, "out of memory saving %s (%zu bytes)", p->name, bytes);
        }
        if (!from->weights)
            model_get_param(m, i, values);
        int status = safetensors_append(w, values, bytes, e);
        if (!from->weights)
            free(values);
        if (status != 0)
            return -1;
    }
    return 0;
}

int weights_write(const char *path, const struct checkpoint_source *from, struct error *e) {
    struct model *m = from->model;
    struct safetensors_entry *entries = calloc((size_t)m->params.count, sizeof *entries);
    if (!entries)
        return fail_run(e, "out of memory saving %s", path);
    for (int i = 0; i < m->params.count; i++)
        describe_param(&entries[i], &m->params.list[i]);
    struct safetensors_writer *w = safetensors_create(path, entries, m->params.count, e);
    free(entries);
    if (!w || append_weights(w, from, e) != 0)
        return -1;
    return safetensors_finish(w, e);
}

static int check_weight(const struct safetensors_entry *s, const struct param *p, const char *path,
                        struct error *e) {
    char want[64];
    param_shape_text(p, want, sizeof want);
    if (!s)
        return fail_user(e, "%s: tensor %s is missing: this checkpoint is of another model", path, p->name);
    bool same = s->ndim == p->ndim;
    for (int i = 0; same && i < p->ndim; i++)
        same = s->shape[i] == p->shape[i];
    if (!same)
        return fail_user(
            e, "%s: tensor %s has another shape than the model's %s: this checkpoint is of another model",
            path, p->name, want);
    if (s->dtype != ST_F32)
        return fail_user(e, "%s: tensor %s is not fp32; convert the file", path, p->name);
    return 0;
}

int weights_read(const char *path, struct model *m, int64_t updates, struct error *e) {
    struct safetensors file;
    if (safetensors_open(&file, path, e) != 0)
        return -1;
    int status = 0;
    if (file.count > m->params.count)
        status = fail_user(e, "%s: %d tensors where the model has %d: this checkpoint is of another model",
                           path, file.count, m->params.count);
    for (int i = 0; status == 0 && i < m->params.count; i++)
        status = check_weight(safetensors_find(&file, m->params.list[i].name), &m->params.list[i], path, e);
    for (int i = 0; status == 0 && i < m->params.count; i++)
        model_set_param(m, i, safetensors_find(&file, m->params.list[i].name)->data, updates);
    safetensors_close(&file);
    return status;
}

/* ---- optimizer ---- */

/* A run of parameters this rank owns: `place` counts parameters without padding, which is the same on any
 * number of ranks; `at` is where their moments lie. */
struct owned {
    int64_t packed_offset, count, at;
};

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* What `shards` holds: those that a rank owns and writes, or all that it updates and so must read (in stage 0,
 * everything). A malloc'd list, in the order of the flat buffer, and its length; -1 when out of memory. */
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
                break; /* the rest of it is in a later shard, or another rank's */
        }
    return count;
}

static tensor moments_piece(struct model *m, int64_t at, int64_t count) {
    char *data = (char *)m->moments + (size_t)at * dtype_bytes(m->dtypes.master);
    return tensor_of(data, m->dtypes.master, count, 0, 0, 0, 0);
}

/* Both moments of what this rank owns, in the order of the file, in pieces. */
static int visit_moments(struct model *m, const struct owned *list, int count,
                         int (*visit)(void *context, tensor piece, struct error *e), void *context,
                         struct error *e) {
    for (int moment = 0; moment < 2; moment++)
        for (int i = 0; i < count; i++)
            for (int64_t done = 0; done < list[i].count; done += PIECE) {
                int64_t at = moment * m->partition.moment_elements + list[i].at + done;
                tensor piece = moments_piece(m, at, min64(PIECE, list[i].count - done));
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

/* ranges, then both moments. The writer is closed by whatever fails. */
static int write_moments(struct safetensors_writer *w, const struct checkpoint_source *from,
                         const struct owned *list, int count, struct error *e) {
    for (int i = 0; i < count; i++) {
        int64_t range[2] = {list[i].packed_offset, list[i].packed_offset + list[i].count};
        if (safetensors_append(w, range, sizeof range, e) != 0)
            return -1;
    }
    int64_t total = owned_total(list, count);
    if (from->moments)
        return safetensors_append(w, from->moments, 2 * (size_t)total * sizeof(float), e);
    struct moments_copy copy = {from->model, malloc(PIECE * sizeof(float)), w};
    int status = copy.next ? visit_moments(from->model, list, count, append_piece, &copy, e)
                           : fail_run(e, "out of memory saving the optimizer");
    if (!copy.next)
        safetensors_abandon(w);
    free(copy.next);
    return status;
}

int optimizer_write(const char *path, const struct checkpoint_source *from, struct error *e) {
    struct owned *list;
    int count =
        list_owned(from->model, from->model->partition.shards, from->model->partition.bucket_count, &list);
    if (count < 0)
        return fail_run(e, "out of memory saving %s", path);
    int64_t total = owned_total(list, count);
    struct safetensors_entry entries[] = {
        {.name = "ranges", .dtype = ST_I64, .ndim = 2, .shape = {count, 2}},
        {.name = "exp_avg", .dtype = ST_F32, .ndim = 1, .shape = {total}},
        {.name = "exp_avg_sq", .dtype = ST_F32, .ndim = 1, .shape = {total}}};
    struct safetensors_writer *w = safetensors_create(path, entries, 3, e);
    int status = w ? write_moments(w, from, list, count, e) : -1;
    free(list);
    return status == 0 ? safetensors_finish(w, e) : -1;
}

/* ---- reading the optimizer: every rank looks into all files for what it owns now ---- */

struct range {
    int64_t begin, end;
    const char *moments[2]; /* fp32 in the file, where begin's lie */
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
        return fail_user(e, "%s: cannot be listed: %s", dir, strerror(errno));
    while ((item = readdir(entries)))
        if (sscanf(item->d_name, "optimizer-%5d-of-%5d.safetensors%n", &rank, &of, &length) == 2 && of > 0)
            ranks = of;
    closedir(entries);
    return ranks ? ranks : fail_user(e, "%s: holds no optimizer state", dir);
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
        return fail_user(e, "%s: not an optimizer file of this program", path);
    int count = (int)ranges->shape[0];
    int64_t held = (int64_t)(first->bytes / sizeof(float)), used = 0;
    struct range *grown = realloc(o->ranges, (size_t)(o->range_count + count + 1) * sizeof *grown);
    if (!grown)
        return fail_run(e, "out of memory reading %s", path);
    o->ranges = grown;
    for (int i = 0; i < count; i++) {
        int64_t pair[2];
        memcpy(pair, (const char *)ranges->data + (size_t)i * sizeof pair, sizeof pair);
        if (pair[0] < 0 || pair[1] <= pair[0] || pair[1] - pair[0] > held - used)
            return fail_user(e, "%s: range %d does not fit the moments that follow: the file is damaged",
                             path, i);
        size_t at = (size_t)used * sizeof(float);
        o->ranges[o->range_count++] = (struct range){
            pair[0], pair[1], {(const char *)first->data + at, (const char *)second->data + at}};
        used += pair[1] - pair[0];
    }
    return used == held ? 0 : fail_user(e, "%s: holds more moments than its ranges: it is damaged", path);
}

static int by_begin(const void *a, const void *b) {
    int64_t x = ((const struct range *)a)->begin, y = ((const struct range *)b)->begin;
    return (x > y) - (x < y);
}

/* Every moment of the model once? */
static int check_cover(const struct optimizer_files *o, int64_t num_params, const char *dir,
                       struct error *e) {
    int64_t at = 0;
    for (int i = 0; i < o->range_count; i++) {
        if (o->ranges[i].begin != at)
            return fail_user(e, "%s: the optimizer files hold parameter %lld %s", dir,
                             (long long)min64(at, o->ranges[i].begin),
                             o->ranges[i].begin > at ? "nowhere" : "twice");
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

/* Both lists are in order, so one walk finds what each owned run needs. */
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
                                           moment * m->partition.moment_elements + list[i].at + begin -
                                               list[i].packed_offset,
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

int optimizer_read(const char *dir, struct model *m, struct error *e) {
    struct optimizer_files o;
    struct owned *list = NULL;
    int status = open_optimizer(&o, dir, m->params.num_params, e);
    if (status == 0) {
        int count = list_owned(m, m->partition.updates, m->partition.update_count, &list);
        status = count < 0 ? fail_run(e, "out of memory reading %s", dir) : 0;
        if (status == 0)
            upload_moments(m, &o, list, count);
    }
    free(list);
    close_optimizer(&o);
    return status;
}

/* ---- trainer.json ---- */

/* An object being written; whole only if every member found memory. */
struct draft_object {
    cJSON *object;
    bool whole;
};

static void add_setting(void *context, const char *key, const char *value) {
    struct draft_object *o = context;
    o->whole &= cJSON_AddStringToObject(o->object, key, value) != NULL;
}

/* 64-bit counts and exact doubles go through text: cJSON prints numbers with 15 digits first. */
static void add_text(struct draft_object *o, const char *key, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void add_text(struct draft_object *o, const char *key, const char *format, ...) {
    char text[64];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    o->whole &= cJSON_AddRawToObject(o->object, key, text) != NULL;
}

int trainer_state_write(const char *path, const struct trainer_state *p, const struct config *c,
                        struct error *e) {
    struct draft_object root = {cJSON_CreateObject(), true};
    add_text(&root, "format_version", "%d", 1);
    add_text(&root, "step", "%" PRId64, p->step);
    add_text(&root, "tokens", "%" PRId64, p->tokens);
    add_text(&root, "sequences", "%" PRId64, p->sequences);
    add_text(&root, "updates", "%" PRId64, p->history.updates);
    add_text(&root, "skips_run", "%d", p->history.skips_run);
    add_text(&root, "norm_count", "%" PRId64, p->history.norm_count);
    add_text(&root, "norm_mean", "%.17g", p->history.norm_mean);
    add_text(&root, "norm_variance", "%.17g", p->history.norm_variance);
    add_text(&root, "seconds", "%.17g", p->seconds);
    add_text(&root, "best_step", "%" PRId64, p->best_step);
    if (isfinite(p->best_val_loss))
        add_text(&root, "best_val_loss", "%.17g", p->best_val_loss);
    else
        add_text(&root, "best_val_loss", "null");
    add_setting(&root, "train_fingerprint", p->train_fingerprint);
    add_setting(&root, "val_fingerprint", p->val_fingerprint);
    struct draft_object settings = {cJSON_AddObjectToObject(root.object, "config"), true};
    config_visit(c, add_setting, &settings);
    char *text = root.whole && settings.whole ? cJSON_Print(root.object) : NULL;
    cJSON_Delete(root.object);
    if (!text)
        return fail_run(e, "out of memory saving %s", path);
    int status = files_write_synced(path, text, strlen(text), e);
    free(text);
    return status;
}

static cJSON *parse(const char *path, struct error *e) {
    char *text;
    size_t length;
    if (files_read_all(path, MAX_JSON, &text, &length, e) != 0)
        return NULL;
    cJSON *root = cJSON_ParseWithLengthOpts(text, length + 1, NULL, true); /* with the NUL: to the very end */
    free(text);
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        fail_user(e, "%s: not a JSON object: the file is damaged", path);
        return NULL;
    }
    return root;
}

/* A whole number that a double holds exactly, or -1. */
static int64_t count_of(const cJSON *root, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, key);
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < 9007199254740992.0) ||
        item->valuedouble != floor(item->valuedouble))
        return -1;
    return (int64_t)item->valuedouble;
}

/* 1e999 is JSON, and infinite. */
static bool is_finite(const cJSON *item) {
    return cJSON_IsNumber(item) && isfinite(item->valuedouble);
}

/* 0 where it is missing or cannot be. */
static double number_of(const cJSON *root, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, key);
    return is_finite(item) && item->valuedouble > 0 ? item->valuedouble : 0;
}

static void text_of(const cJSON *root, const char *key, char *out, size_t bytes) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(root, key));
    snprintf(out, bytes, "%s", text ? text : "");
}

int trainer_state_read(const char *path, struct trainer_state *p, struct error *e) {
    cJSON *root = parse(path, e);
    if (!root)
        return -1;
    const cJSON *best = cJSON_GetObjectItemCaseSensitive(root, "best_val_loss");
    int64_t skips_run = count_of(root, "skips_run");
    *p = (struct trainer_state){
        .step = count_of(root, "step"),
        .tokens = count_of(root, "tokens"),
        .sequences = count_of(root, "sequences"),
        .history = {.updates = count_of(root, "updates"),
                    .skips_run = skips_run > INT32_MAX ? -1 : (int32_t)skips_run,
                    .norm_count = count_of(root, "norm_count"),
                    .norm_mean = number_of(root, "norm_mean"),
                    .norm_variance = number_of(root, "norm_variance")},
        .best_step = count_of(root, "best_step"),
        .best_val_loss = is_finite(best) ? best->valuedouble : (double)NAN,
        .seconds = number_of(root, "seconds"),
    };
    text_of(root, "train_fingerprint", p->train_fingerprint, sizeof p->train_fingerprint);
    text_of(root, "val_fingerprint", p->val_fingerprint, sizeof p->val_fingerprint);
    int64_t version = count_of(root, "format_version");
    cJSON_Delete(root);
    if (version != 1)
        return fail_user(e, "%s: format version %lld, and this program reads version 1", path,
                         (long long)version);
    if (p->step < 0 || p->tokens < 0 || p->sequences < 0 || p->history.updates < 0 ||
        p->history.skips_run < 0 || p->history.norm_count < 0)
        return fail_user(
            e, "%s: step, tokens, sequences, updates, skips_run or norm_count is missing or not a count",
            path);
    return 0;
}

int settings_visit(const char *path, setting_visitor *visit, void *context, struct error *e) {
    cJSON *root = parse(path, e);
    if (!root)
        return -1;
    const cJSON *item, *settings = cJSON_GetObjectItemCaseSensitive(root, "config");
    cJSON_ArrayForEach(item, settings) {
        if (item->string && cJSON_IsString(item))
            visit(context, item->string, item->valuestring);
    }
    cJSON_Delete(root);
    return 0;
}
