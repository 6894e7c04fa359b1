#include "model/train/start_record.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/json_object.h"
#include "model/config/command_line.h"
#include "model/config/config.h"
#include "model/flops.h"
#include "model/model.h"

static void add_time(struct json_object *o) {
    char text[32] = "";
    struct tm utc;
    time_t now = time(NULL);
    if (gmtime_r(&now, &utc))
        strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
    json_add_text(o, "time", text);
}

static void add_command(struct json_object *o, const struct command_line *line) {
    cJSON *words = cJSON_AddArrayToObject(o->object, "command");
    o->complete &= words != NULL;
    const char *fixed[] = {"train_iha", "train", line->path};
    for (int i = 0; i < 3 + line->override_count; i++)
        json_add_item(o, words, cJSON_CreateString(i < 3 ? fixed[i] : line->overrides[i - 3]));
}

static void add_memory(struct json_object *o, const struct memory_plan *p) {
    struct json_object memory = {cJSON_AddObjectToObject(o->object, "memory"), true};
    json_add_number(&memory, "parameters", "%" PRId64, (int64_t)p->parameters);
    json_add_number(&memory, "gradients", "%" PRId64, (int64_t)p->gradients);
    json_add_number(&memory, "optimizer", "%" PRId64, (int64_t)p->optimizer);
    json_add_number(&memory, "activations", "%" PRId64, (int64_t)p->activations);
    json_add_number(&memory, "workspace", "%" PRId64, (int64_t)p->workspace);
    json_add_number(&memory, "messages", "%" PRId64, (int64_t)p->messages);
    o->complete &= memory.complete;
}

/* Takes the object. EXIT_USER: the file cannot be opened, as for metrics.jsonl. */
static int append(const struct config *c, struct json_object *o, struct error *e) {
    char path[MAX_TEXT + 32];
    snprintf(path, sizeof path, "%s/starts.jsonl", c->run.dir);
    char *text = o->complete ? cJSON_PrintUnformatted(o->object) : NULL;
    cJSON_Delete(o->object);
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
    struct json_object o = {cJSON_CreateObject(), true};
    json_add_text(&o, "event", "start");
    add_time(&o);
    json_add_number(&o, "step", "%" PRId64, step);
    add_command(&o, line);
    json_add_text(&o, "device", m->k->describe(m->dev));
    json_add_number(&o, "ranks", "%d", m->comm->ranks);
    json_add_number(&o, "parameters", "%" PRId64, m->params.num_params);
    json_add_number(&o, "total_steps", "%" PRId64, c->train.total_steps);
    json_add_number(&o, "flops_per_token", "%" PRId64,
                    (int64_t)(flops->matmul + flops->attention + flops->mixing));
    add_memory(&o, &m->plan);
    struct json_object settings = {cJSON_AddObjectToObject(o.object, "config"), true};
    config_visit(c, json_add_setting, &settings);
    o.complete &= settings.complete;
    return append(c, &o, e);
}

int start_record_end(const struct config *c, int64_t step, struct error *e) {
    struct json_object o = {cJSON_CreateObject(), true};
    struct rusage usage;
    json_add_text(&o, "event", "end");
    add_time(&o);
    json_add_number(&o, "step", "%" PRId64, step);
    if (getrusage(RUSAGE_SELF, &usage) == 0)
        json_add_number(&o, "peak_host_bytes", "%" PRId64, (int64_t)usage.ru_maxrss * 1024);
    return append(c, &o, e);
}
