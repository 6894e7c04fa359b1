#include "model/train/start_record.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "model/checkpoint/files.h"
#include "model/config/command_line.h"
#include "model/config/config.h"
#include "model/flops.h"
#include "model/model.h"

/* An object being built. complete: no member failed for lack of memory. */
struct object {
    cJSON *json;
    bool complete;
};

static void add_text(void *context, const char *key, const char *value) {
    struct object *o = context;
    o->complete &= cJSON_AddStringToObject(o->json, key, value) != NULL;
}

/* cJSON's own numbers are doubles. */
static void add_count(struct object *o, const char *key, int64_t n) {
    char text[32];
    snprintf(text, sizeof text, "%" PRId64, n);
    o->complete &= cJSON_AddRawToObject(o->json, key, text) != NULL;
}

static void add_time(struct object *o) {
    char text[32] = "";
    struct tm utc;
    time_t now = time(NULL);
    if (gmtime_r(&now, &utc))
        strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
    add_text(o, "time", text);
}

static void add_command(struct object *o, const struct command_line *line) {
    cJSON *words = cJSON_AddArrayToObject(o->json, "command");
    o->complete &= words != NULL;
    const char *fixed[] = {"train_iha", "train", line->path};
    for (int i = 0; i < 3 + line->override_count; i++) {
        cJSON *word = cJSON_CreateString(i < 3 ? fixed[i] : line->overrides[i - 3]);
        if (!cJSON_AddItemToArray(words, word)) {
            cJSON_Delete(word);
            o->complete = false;
        }
    }
}

static void add_memory(struct object *o, const struct memory_plan *p) {
    struct object memory = {cJSON_AddObjectToObject(o->json, "memory"), true};
    add_count(&memory, "parameters", (int64_t)p->parameters);
    add_count(&memory, "gradients", (int64_t)p->gradients);
    add_count(&memory, "optimizer", (int64_t)p->optimizer);
    add_count(&memory, "activations", (int64_t)p->activations);
    add_count(&memory, "workspace", (int64_t)p->workspace);
    add_count(&memory, "messages", (int64_t)p->messages);
    o->complete &= memory.complete;
}

/* Takes the object. EXIT_USER: the file cannot be opened, as for metrics.jsonl. */
static int append(const struct config *c, struct object *o, struct error *e) {
    char path[MAX_TEXT + 32];
    snprintf(path, sizeof path, "%s/starts.jsonl", c->run.dir);
    char *text = o->complete ? cJSON_PrintUnformatted(o->json) : NULL;
    cJSON_Delete(o->json);
    if (!text)
        return fail_run(e, "out of memory writing %s", path);
    FILE *f = fopen(path, "a");
    if (!f) {
        fail_user(e, "%s: cannot write: %s; %s", path, strerror(errno), files_advice(errno));
        free(text);
        return -1;
    }
    int err = 0;
    if (fprintf(f, "%s\n", text) < 0 || fflush(f) != 0)
        err = errno;
    if (fclose(f) != 0 && !err)
        err = errno;
    free(text);
    return err ? fail_run(e, "%s: cannot write: %s; %s", path, strerror(err), files_advice(err)) : 0;
}

int start_record_write(const struct config *c, const struct model *m, const struct flops *flops,
                       const struct command_line *line, int64_t step, struct error *e) {
    struct object o = {cJSON_CreateObject(), true};
    add_text(&o, "event", "start");
    add_time(&o);
    add_count(&o, "step", step);
    add_command(&o, line);
    add_text(&o, "device", m->k->describe(m->dev));
    add_count(&o, "ranks", m->comm->ranks);
    add_count(&o, "parameters", m->params.num_params);
    add_count(&o, "total_steps", c->train.total_steps);
    add_count(&o, "flops_per_token", (int64_t)(flops->matmul + flops->attention + flops->mixing));
    add_memory(&o, &m->plan);
    struct object settings = {cJSON_AddObjectToObject(o.json, "config"), true};
    config_visit(c, add_text, &settings);
    o.complete &= settings.complete;
    return append(c, &o, e);
}

int start_record_end(const struct config *c, int64_t step, struct error *e) {
    struct object o = {cJSON_CreateObject(), true};
    struct rusage usage;
    add_text(&o, "event", "end");
    add_time(&o);
    add_count(&o, "step", step);
    if (getrusage(RUSAGE_SELF, &usage) == 0)
        add_count(&o, "peak_host_bytes", (int64_t)usage.ru_maxrss * 1024);
    return append(c, &o, e);
}
