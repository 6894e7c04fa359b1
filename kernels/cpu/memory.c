/* Free memory: the machine's, or that of the container or job of this process if it is less. The memory use
 * that control groups report includes the page cache, which the kernel frees when memory is needed. */
#include <stdio.h>
#include <string.h>

#include "kernels/cpu/cgroup.h"
#include "kernels/cpu/cpu.h"

enum { PATH = 512 };

/* The number in folder/name, or SIZE_MAX if there is none (a missing file, or "max"). */
static size_t read_bytes(const char *folder, const char *name) {
    char path[PATH + 64];
    size_t bytes = SIZE_MAX;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%zu", &bytes) != 1)
        bytes = SIZE_MAX;
    if (f)
        fclose(f);
    return bytes;
}

/* The sum of the numbers in lines "key number" whose key is `a` or `b`. */
static size_t sum_of(const char *path, const char *a, const char *b) {
    FILE *f = fopen(path, "r");
    char key[64];
    size_t sum = 0, value;
    while (f && fscanf(f, "%63s %zu%*[^\n]", key, &value) == 2)
        sum += strcmp(key, a) == 0 || strcmp(key, b) == 0 ? value : 0;
    if (f)
        fclose(f);
    return sum;
}

/* Free bytes of one group; SIZE_MAX: no limit. */
static size_t group_free(const char *folder, bool version2) {
    char stat[PATH + 64];
    size_t limit = read_bytes(folder, version2 ? "memory.max" : "memory.limit_in_bytes");
    size_t used = read_bytes(folder, version2 ? "memory.current" : "memory.usage_in_bytes");
    if (limit == SIZE_MAX || used == SIZE_MAX)
        return SIZE_MAX;
    snprintf(stat, sizeof stat, "%s/memory.stat", folder);
    size_t cache = version2 ? sum_of(stat, "inactive_file", "active_file")
                            : sum_of(stat, "total_inactive_file", "total_active_file");
    used -= cache < used ? cache : used;
    return limit > used ? limit - used : 1;
}

static void keep_least(void *context, const char *folder, bool version2) {
    size_t *least = context, bytes = group_free(folder, version2);
    *least = bytes < *least ? bytes : *least;
}

size_t cpu_memory_available(struct device *dev) {
    size_t machine = sum_of("/proc/meminfo", "MemAvailable:", "") * 1024, group = SIZE_MAX;
    cgroup_visit("memory", keep_least, &group);
    return (machine < group ? machine : group) / (size_t)(dev ? dev->local_ranks : 1);
}
