/* Control groups (Linux cgroups, versions 1 and 2): the limits of the container or job of this process. */
#ifndef IHA_KERNELS_CPU_CGROUP_H
#define IHA_KERNELS_CPU_CGROUP_H

#include <stdbool.h>

/* Call visit(folder) for the group this process is in and for every group around it, up to the root of the
 * hierarchy. controller: "memory" or "cpu". Groups nest, and each may have a limit of its own. Version 2 has
 * one hierarchy for all controllers, version 1 one for each. Inside a container the hierarchy may be mounted
 * at the container's own group, so the root is visited in any case. */
void cgroup_visit(const char *controller, void (*visit)(void *context, const char *folder, bool version2),
                  void *context);

/* Processors' worth of time that this process may use, by the smallest quota around it; 0: no quota. */
double cgroup_cpu_quota(void);

#endif
