/* The files of a checkpoint, one function each way; checkpoint.c makes a directory of them. */
#ifndef IHA_CHECKPOINT_FILES_H
#define IHA_CHECKPOINT_FILES_H

#include "model/checkpoint.h"

int weights_write(const char *path, struct model *m, struct error *e);
int weights_read(const char *path, struct model *m, struct error *e);
int optimizer_write(const char *path, struct model *m, struct error *e);
int optimizer_read(const char *path, struct model *m, struct error *e);
int progress_write(const char *path, const struct progress *p, const struct config *c, struct error *e);
int progress_read(const char *path, struct progress *p, struct error *e);

/* Every setting trainer.json recorded, "section.key" and its value. */
typedef void setting_visitor(void *context, const char *key, const char *value);
int settings_visit(const char *path, setting_visitor *visit, void *context, struct error *e);

#endif
