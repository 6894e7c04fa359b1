/* How much memory there is: the machine's, or that of the container or job this process runs in, where less.
 *
 * Control groups nest, and each may have a limit. Version 2 keeps one tree, version 1 one of its own for
 * memory; inside a container either may be seen from its root. What they count as used includes the page
 * cache, which the kernel gives back when memory is wanted. */
#include <stdio.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

enum { PATH = 512 };

/* The number in a file of the system's, or SIZE_MAX when there is none ("max"). */
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

/* Lines "key number" of a file: the sum of those whose key is `a` or `b`. */
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

/* What one group still allows; SIZE_MAX: it has no limit. */
static size_t left_in(const char *folder, bool version2) {
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

/* The least over a group and those around it. */
static size_t left_in_nest(const char *root, const char *group, bool version2) {
    char folder[PATH];
    size_t least = SIZE_MAX;
    snprintf(folder, sizeof folder, "%s%s", root, group);
    for (;;) {
        size_t left = left_in(folder, version2);
        least = left < least ? left : least;
        char *slash = strrchr(folder, '/');
        if (strlen(folder) <= strlen(root) || !slash)
            return least;
        *slash = '\0';
    }
}

static size_t left_in_groups(void) {
    FILE *f = fopen("/proc/self/cgroup", "r");
    char line[PATH], group[PATH];
    size_t least = left_in("/sys/fs/cgroup", true); /* as a container sees its own */
    while (f && fgets(line, sizeof line, f)) {
        size_t left = SIZE_MAX;
        line[strcspn(line, "\n")] = '\0';
        char *kind = strchr(line, ':'), *path = kind ? strchr(kind + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        snprintf(group, sizeof group, "%s", strcmp(path, "/") == 0 ? "" : path);
        if (strcmp(kind, ":") == 0)
            left = left_in_nest("/sys/fs/cgroup", group, true);
        else if (strcmp(kind, ":memory") == 0)
            left = left_in_nest("/sys/fs/cgroup/memory", group, false);
        least = left < least ? left : least;
    }
    if (f)
        fclose(f);
    return least;
}

size_t cpu_memory_available(struct device *dev) {
    size_t machine = sum_of("/proc/meminfo", "MemAvailable:", "") * 1024, group = left_in_groups();
    return (machine < group ? machine : group) / (size_t)(dev ? dev->sharers : 1);
}
