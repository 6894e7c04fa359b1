/* The safetensors format: an 8-byte little-endian header length, a JSON header, raw tensors.
 *
 * Reading maps the file, checks every part of the header, and returns pointers into the map. Writing streams the
 * data, without a second copy in memory. */
#ifndef IHA_MODEL_CHECKPOINT_SAFETENSORS_H
#define IHA_MODEL_CHECKPOINT_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"

enum safetensors_dtype { ST_F32, ST_F64, ST_BF16, ST_I32, ST_I64, ST_U16, ST_U8 };
enum { ST_MAX_DIMS = 8 };

struct safetensors_entry {
    char *name;
    enum safetensors_dtype dtype;
    int ndim;
    int64_t shape[ST_MAX_DIMS];
    const void *data; /* reading: in the mapped file, unaligned in some tools' files */
    size_t bytes;
};

struct safetensors {
    struct safetensors_entry *entries; /* sorted by name */
    int count;
    /* private */
    void *map;
    size_t map_bytes;
};

/* Map and check a file. EXIT_USER errors name the file, and the tensor where there is one: truncated,
 * header length past the end or absurd, not JSON, not an object, unknown dtype, a shape that does not
 * multiply out to its bytes (overflow included), offsets out of range, overlapping or with gaps, or a
 * duplicate name. */
int safetensors_open(struct safetensors *s, const char *path, struct error *e);
void safetensors_close(struct safetensors *s);

/* By name, or NULL. */
const struct safetensors_entry *safetensors_find(const struct safetensors *s, const char *name);

/* Writing: describe all tensors (entries with name, dtype, ndim, shape; data is ignored), then append the
 * bytes of each in that order, in any number of pieces, then finish. The metadata is
 * {"format": "pt"}. finish flushes and fsyncs the file; every error is EXIT_RUN and names the path
 * (disk full, for instance). On error the writer is closed and freed: do not use it again; the caller
 * removes the file. Data begin 64-aligned; tensors follow each other without gaps. */
struct safetensors_writer;
struct safetensors_writer *safetensors_create(const char *path, const struct safetensors_entry *entries,
                                              int count, struct error *e);
int safetensors_append(struct safetensors_writer *w, const void *data, size_t bytes, struct error *e);
int safetensors_finish(struct safetensors_writer *w, struct error *e);
/* Close and free without finishing. */
void safetensors_abandon(struct safetensors_writer *w);

#endif
