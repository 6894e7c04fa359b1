/* Free memory: the machine's, or that of the container or job of this process if it is less.
 *
 * Control groups (cgroups) are nested, and each may have a limit. Version 2 has one tree for all resources,
 * version 1 a separate one for memory. Inside a container, its own group may be mounted as the root of the
 * tree. Used bytes include the page cache, which the kernel frees when memory is needed. */
#include <stdio.h>
#include <string.h>

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

/* The least of a group and the groups around it. */
static size_t nested_groups_free(const char *root, const char *group, bool version2) {
    char folder[PATH];
    size_t least = SIZE_MAX;
    snprintf(folder, sizeof folder, "%s%s", root, group);
    for (;;) {
        size_t bytes = group_free(folder, version2);
        least = bytes < least ? bytes : least;
        char *slash = strrchr(folder, '/');
        if (strlen(folder) <= strlen(root) || !slash)
            return least;
        *slash = '\0';
    }
}

static size_t all_groups_free(void) {
    FILE *f = fopen("/proc/self/cgroup", "r");
    char line[PATH], group[PATH];
    size_t least = group_free("/sys/fs/cgroup", true); /* inside a container: its own group */
    while (f && fgets(line, sizeof line, f)) {
        size_t bytes = SIZE_MAX;
        line[strcspn(line, "\n")] = '\0';
        char *kind = strchr(line, ':'), *path = kind ? strchr(kind + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        snprintf(group, sizeof group, "%s", strcmp(path, "/") == 0 ? "" : path);
        if (strcmp(kind, ":") == 0)
            bytes = nested_groups_free("/sys/fs/cgroup", group, true);
        else if (strcmp(kind, ":memory") == 0)
            bytes = nested_groups_free("/sys/fs/cgroup/memory", group, false);
        least = bytes < least ? bytes : least;
    }
    if (f)
        fclose(f);
    return least;
}

size_t cpu_memory_available(struct device *dev) {
    size_t machine = sum_of("/proc/meminfo", "MemAvailable:", "") * 1024, group = all_groups_free();
    return (machine < group ? machine : group) / (size_t)(dev ? dev->local_ranks : 1);
}
