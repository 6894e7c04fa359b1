#include "kernels/cpu/cgroup.h"

#include <stdio.h>
#include <string.h>

enum { MAX_PATH_BYTES = 512 };

/* The group root + group, then its parent, and so on to root itself. */
static void visit_up(const char *root, const char *group, bool version2,
                     void (*visit)(void *context, const char *folder, bool version2), void *context) {
    char folder[MAX_PATH_BYTES];
    snprintf(folder, sizeof folder, "%s%s", root, group);
    for (;;) {
        visit(context, folder, version2);
        char *slash = strrchr(folder, '/');
        if (strlen(folder) <= strlen(root) || !slash)
            return;
        *slash = '\0';
    }
}

/* Is `controller` in a list such as "cpu,cpuacct"? */
static bool lists(const char *controllers, const char *controller) {
    size_t length = strlen(controller);
    for (const char *p = controllers; (p = strstr(p, controller)); p += length)
        if ((p == controllers || p[-1] == ',') && (p[length] == '\0' || p[length] == ','))
            return true;
    return false;
}

void cgroup_visit(const char *controller, void (*visit)(void *context, const char *folder, bool version2),
                  void *context) {
    FILE *f = fopen("/proc/self/cgroup", "r");
    char line[MAX_PATH_BYTES], group[MAX_PATH_BYTES], root[64];
    snprintf(root, sizeof root, "/sys/fs/cgroup/%s", controller);
    visit(context, "/sys/fs/cgroup", true);
    visit(context, root, false);
    while (f && fgets(line, sizeof line, f)) { /* hierarchy:controllers:path; version 2 is 0::path */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        controllers++;
        snprintf(group, sizeof group, "%s", strcmp(path, "/") == 0 ? "" : path);
        if (!*controllers)
            visit_up("/sys/fs/cgroup", group, true, visit, context);
        else if (lists(controllers, controller)) {
            char together[MAX_PATH_BYTES]; /* where controllers are mounted as one, "cpu,cpuacct" */
            snprintf(together, sizeof together, "/sys/fs/cgroup/%.400s", controllers);
            visit_up(together, group, false, visit, context);
            if (strcmp(together, root) != 0)
                visit_up(root, group, false, visit, context);
        }
    }
    if (f)
        fclose(f);
}

/* ---- processor time ---- */

/* Two numbers of a file, or of two files: quota and period. False: there is no quota. */
static bool read_quota(const char *folder, bool version2, double *quota, double *period) {
    char path[MAX_PATH_BYTES + 64];
    int found = 0;
    if (version2) {
        snprintf(path, sizeof path, "%s/cpu.max", folder); /* "max 100000": no quota */
        FILE *f = fopen(path, "r");
        found = f ? fscanf(f, "%lf %lf", quota, period) : 0;
        if (f)
            fclose(f);
        return found == 2;
    }
    double *values[] = {quota, period};
    const char *names[] = {"cpu.cfs_quota_us", "cpu.cfs_period_us"}; /* -1: no quota */
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        FILE *f = fopen(path, "r");
        found += f && fscanf(f, "%lf", values[i]) == 1;
        if (f)
            fclose(f);
    }
    return found == 2;
}

static void least_quota(void *context, const char *folder, bool version2) {
    double *least = context, quota, period;
    if (!read_quota(folder, version2, &quota, &period) || quota <= 0 || period <= 0)
        return;
    double processors = quota / period;
    if (*least == 0 || processors < *least)
        *least = processors;
}

double cgroup_cpu_quota(void) {
    double least = 0;
    cgroup_visit("cpu", least_quota, &least);
    return least;
}
