/* The CPU backend's device, whatever its number types: opening, memory, transfers and tracing. */
#include "kernels/cpu/device.h"

#include "kernels/cpu/cpu.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/limits.h"

static void read_processor_name(char *out, size_t bytes) {
    snprintf(out, bytes, "unknown processor");
    FILE *f = fopen("/proc/cpuinfo", "r");
    if (!f)
        return;
    char line[256];
    while (fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        bool name = strncmp(line, "model name", 10) == 0, part = strncmp(line, "CPU part", 8) == 0;
        if (colon && (name || part)) { /* Arm has a number alone: 0xd4f is a Neoverse V2 */
            snprintf(out, bytes, "%s%.*s", part ? "Arm, part " : "", (int)strcspn(colon + 2, "\n"),
                     colon + 2);
            break;
        }
    }
    fclose(f);
}

struct device *cpu_device_open(const struct device_options *options, struct error *e) {
    char note[96];
    int threads = cpu_set_threads(options->threads, options->comm, note, e);
    if (threads < 0)
        return NULL;
    struct device *dev = calloc(1, sizeof *dev);
    if (!dev) {
        fail_user(e, "out of memory opening the CPU device");
        return NULL;
    }
    dev->threads = threads;
    dev->local_ranks = options->comm ? options->comm->local_ranks : 1;
    char name[128];
    read_processor_name(name, sizeof name);
    snprintf(dev->description, sizeof dev->description, "cpu: %s, %d thread%s%s, %d-bit vectors", name,
             dev->threads, dev->threads == 1 ? "" : "s", note, VECTOR_BYTES * 8);
    return dev;
}

void cpu_device_close(struct device *dev) {
    free(dev->products);
    free(dev);
}

const char *cpu_describe(struct device *dev) {
    return dev->description;
}

double cpu_peak_flops(struct device *dev) {
    (void)dev;
    return 0; /* not known: mfu is left out */
}

/* Tensors are in host memory, where `ranks` already works. */
struct comm *cpu_open_comm(struct device *dev, struct comm *ranks, enum comm_backend how, struct error *e) {
    (void)dev;
    if (how != COMM_BACKEND_NCCL)
        return ranks;
    fail_user(e, "system.comm = nccl needs GPUs, but this run is on the CPU; set system.comm = auto");
    return NULL;
}

size_t cpu_staging_bytes(struct device *dev, int64_t elements, int ranks, enum dtype dtype, enum dtype wire) {
    (void)dev, (void)ranks;
    return comm_staging_bytes(elements, dtype, wire);
}

void cpu_set_progress_callback(struct device *dev, void (*call)(void *context), void *context) {
    dev->progress_callback = call;
    dev->progress_context = context;
}

enum { PAGE = 4096, LARGE = 8 << 20 };

/* mmap gives zeroed pages, and each is placed in the memory next to the processor that first writes to it.
 * One page in front holds the size, for munmap.
 *
 * Large blocks ask for huge pages, of 2 MiB, which most systems give only on request: of 4 KiB pages there are more
 * than the TLB holds, and reading memory takes a third longer. */
void *cpu_alloc(struct device *dev, size_t bytes, struct error *e) {
    (void)dev;
    if (bytes == 0)
        bytes = 1;
    size_t *head = mmap(NULL, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (head == MAP_FAILED) {
        char note[64];
        int err = errno;
        fail_user(e,
                  "cannot allocate %.2f GB: %s%s; make train.micro_batch, train.seq_len or the model "
                  "smaller, or set "
                  "system.recompute = full",
                  bytes / 1e9, strerror(err), limits_memory_note(note));
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= LARGE)
        madvise(head, bytes + PAGE, MADV_HUGEPAGE); /* if it fails, memory is only slower */
#endif
    *head = bytes + PAGE;
    return (char *)head + PAGE;
}

void cpu_release(struct device *dev, void *data) {
    (void)dev;
    if (!data)
        return;
    size_t *head = (size_t *)((char *)data - PAGE);
    munmap(head, *head);
}

void cpu_zero(struct device *dev, void *data, size_t bytes) {
    (void)dev;
    memset(data, 0, bytes);
}

void cpu_copy(struct device *dev, void *to, const void *from, size_t bytes) {
    (void)dev;
    memcpy(to, from, bytes);
}

/* No graphs: calling an operation costs next to nothing on the CPU. */
bool cpu_graph_replay(struct device *dev, int id) {
    (void)dev, (void)id;
    return false;
}

void cpu_graph_begin(struct device *dev, int id) {
    (void)dev, (void)id;
}

bool cpu_graph_end(struct device *dev, int id) {
    (void)dev, (void)id;
    return true;
}

void cpu_range_begin(struct device *dev, const char *name, int index) {
    struct traced_range *r = dev->trace ? trace_enter(dev->trace, name, index) : NULL;
    if (r)
        r->begin = clock_seconds() - dev->trace_start;
}

void cpu_range_end(struct device *dev) {
    struct traced_range *r = dev->trace ? trace_leave(dev->trace) : NULL;
    if (r)
        r->end = clock_seconds() - dev->trace_start;
}

void cpu_trace_begin(struct device *dev) {
    dev->trace = trace_create();
    dev->trace_start = clock_seconds();
}

struct trace *cpu_trace_end(struct device *dev) {
    struct trace *t = dev->trace;
    dev->trace = NULL;
    return t;
}

static double load_as_double(const void *p, enum dtype t, int64_t i) {
    return t == DTYPE_F64    ? ((const double *)p)[i]
           : t == DTYPE_I32  ? ((const int32_t *)p)[i]
           : t == DTYPE_BF16 ? from_bf16(((const uint16_t *)p)[i])
                             : ((const float *)p)[i];
}

static void convert(void *dst, enum dtype to, const void *src, enum dtype from, int64_t n) {
    if (to == from) {
        memcpy(dst, src, (size_t)n * dtype_bytes(to));
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        double x = load_as_double(src, from, i);
        if (to == DTYPE_F64)
            ((double *)dst)[i] = x;
        else if (to == DTYPE_I32)
            ((int32_t *)dst)[i] = (int32_t)x;
        else if (to == DTYPE_BF16)
            ((uint16_t *)dst)[i] = round_to_bf16((float)x);
        else
            ((float *)dst)[i] = (float)x;
    }
}

void cpu_upload(struct device *dev, tensor dst, const void *host, enum dtype host_dtype) {
    (void)dev;
    check_contiguous("upload", "destination", dst);
    convert(dst.data, dst.dtype, host, host_dtype, tensor_count(dst));
}

void cpu_download(struct device *dev, tensor src, void *host, enum dtype host_dtype) {
    (void)dev;
    check_contiguous("download", "source", src);
    convert(host, host_dtype, src.data, src.dtype, tensor_count(src));
}

void cpu_set_workspace(struct device *dev, void *data, size_t bytes) {
    dev->workspace = data;
    dev->workspace_bytes = bytes;
}

void *cpu_workspace(struct device *dev, size_t bytes, const char *op) {
    return check_workspace(op, dev->workspace, dev->workspace_bytes, bytes);
}
