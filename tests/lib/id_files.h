/* Shards of uint32 and their labels, for C tests. */
#ifndef IHA_TESTS_LIB_ID_FILES_H
#define IHA_TESTS_LIB_ID_FILES_H

#include <stdint.h>
#include <stdio.h>

static inline void write_id_file(const char *path, int32_t magic, int32_t version, const int32_t *ids,
                                 int count) {
    int32_t header[256] = {magic, version, count};
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(header, sizeof header, 1, f), 1);
    assert_int_equal(fwrite(ids, sizeof *ids, (size_t)count, f), count);
    assert_int_equal(fclose(f), 0);
}

static inline void write_ids(const char *path, const int32_t *ids, int count) {
    write_id_file(path, 20240801, 7, ids, count);
}

static inline void write_labels(const char *path, const int32_t *labels, int count) {
    write_id_file(path, 20261129, 1, labels, count);
}

#endif
