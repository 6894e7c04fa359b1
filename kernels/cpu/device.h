/* The CPU backend's device, whatever its number types: members of the table in kernels.h. */
#ifndef IHA_KERNELS_CPU_DEVICE_H
#define IHA_KERNELS_CPU_DEVICE_H

#include "kernels/kernels.h"

/* Starts the threads. */
struct device *cpu_device_open(const struct device_options *options, struct error *e);
void cpu_device_close(struct device *dev);

const char *cpu_describe(struct device *dev);
double cpu_peak_flops(struct device *dev);
struct comm *cpu_open_comm(struct device *dev, struct comm *ranks, enum comm_backend how, struct error *e);
size_t cpu_staging_bytes(struct device *dev, int64_t elements, int ranks, enum dtype dtype, enum dtype wire);
void cpu_set_progress_callback(struct device *dev, void (*call)(void *context), void *context);
void *cpu_alloc(struct device *dev, size_t bytes, struct error *e);
void cpu_release(struct device *dev, void *data);
void cpu_zero(struct device *dev, void *data, size_t bytes);
void cpu_copy(struct device *dev, void *to, const void *from, size_t bytes);
void cpu_upload(struct device *dev, tensor dst, const void *host, enum dtype host_dtype);
void cpu_download(struct device *dev, tensor src, void *host, enum dtype host_dtype);
bool cpu_graph_replay(struct device *dev, int id);
void cpu_graph_begin(struct device *dev, int id);
bool cpu_graph_end(struct device *dev, int id);
void cpu_range_begin(struct device *dev, const char *name, int index);
void cpu_range_end(struct device *dev);
void cpu_trace_begin(struct device *dev);
struct trace *cpu_trace_end(struct device *dev);
void cpu_set_workspace(struct device *dev, void *data, size_t bytes);

#endif
