/* Writing a JSON object with cJSON. */
#ifndef IHA_MODEL_CHECKPOINT_JSON_OBJECT_H
#define IHA_MODEL_CHECKPOINT_JSON_OBJECT_H

#include <cjson/cJSON.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

/* complete: no member failed for lack of memory. */
struct json_object {
    cJSON *object;
    bool complete;
};

static inline void json_add_text(struct json_object *o, const char *key, const char *value) {
    o->complete &= cJSON_AddStringToObject(o->object, key, value) != NULL;
}

/* The same, as config_visit() calls it. */
static inline void json_add_setting(void *object, const char *key, const char *value) {
    json_add_text(object, key, value);
}

/* Numbers are formatted here, since cJSON would round 64-bit counts and doubles to 15 digits. */
static inline void json_add_number(struct json_object *o, const char *key, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static inline void json_add_number(struct json_object *o, const char *key, const char *format, ...) {
    char text[64];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    o->complete &= cJSON_AddRawToObject(o->object, key, text) != NULL;
}

/* Takes the item, which may be NULL. */
static inline void json_add_item(struct json_object *o, cJSON *array, cJSON *item) {
    if (!cJSON_AddItemToArray(array, item)) {
        cJSON_Delete(item);
        o->complete = false;
    }
}

#endif
