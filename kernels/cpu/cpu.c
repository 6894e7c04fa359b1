/* The CPU backend's table of functions for one pair of number types (real.h), and what of it depends on them. */
#include "kernels/cpu/cpu.h"

#include <stdio.h>

#include "kernels/cpu/device.h"

static struct device *cpu_open(const struct device_options *options, struct error *e) {
    enum device_precision precision = ELEM_DTYPE == DTYPE_BF16 ? DEVICE_BF16 : DEVICE_FP32;
    if (options->precision != precision) {
        fail_user(e, "the CPU backend was opened in another precision than it was chosen for");
        return NULL;
    }
    struct device *dev = cpu_device_open(options, e);
#ifdef KERNELS_BF16
    if (!dev)
        return NULL;
    size_t used = strlen(dev->description);
    snprintf(dev->description + used, sizeof dev->description - used, ", bf16 %s", cpu_bf16_how());
    dev->uses_pairs = cpu_bf16_pairs_are_fast();
#endif
    return dev;
}

static void cpu_close(struct device *dev) {
    CPU(gemm_free)(dev);
    cpu_device_close(dev);
}

/* Gradients of parameters stay in fp32 also in bf16: many micro-batches are summed into them. */
static struct device_dtypes cpu_dtypes(struct device *dev) {
    (void)dev;
    return (struct device_dtypes){ELEM_DTYPE, REAL_DTYPE, REAL_DTYPE};
}

static int cpu_plan(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e) {
    switch (spec->kind) {
    case OP_NORM:
        *cost = CPU(norm_plan)(dev, &spec->norm);
        break;
    case OP_QKV_MIX:
        *cost = CPU(qkv_mix_plan)(dev, &spec->qkv_mix);
        break;
    case OP_ATTENTION:
        *cost = CPU(attention_plan)(dev, &spec->attention);
        break;
    case OP_TALKING:
        *cost = CPU(talking_plan)(dev, &spec->attention);
        break;
    case OP_SIMPLICIAL:
        *cost = CPU(simplicial_plan)(dev, &spec->attention);
        break;
    case OP_COLLAPSE:
        *cost = CPU(collapse_plan)(dev, &spec->collapse);
        break;
    case OP_QK_NORM:
        *cost = CPU(qk_norm_plan)(dev, &spec->qk_norm);
        break;
    case OP_FOLD:
        *cost = CPU(fold_plan)(dev, &spec->fold);
        break;
    case OP_DIFF_COMBINE:
        *cost = CPU(diff_combine_plan)(dev, &spec->diff_combine);
        break;
    case OP_CLASSIFIER:
        return CPU(classifier_plan)(dev, &spec->classifier, cost, e);
    case OP_LINEAR:
        return CPU(linear_plan)(dev, &spec->linear, cost, e);
    case OP_DECODE:
        *cost = CPU(decode_plan)(dev, &spec->attention);
        break;
    case OP_ORTHOGONALIZE:
        return CPU(orthogonalize_plan)(dev, &spec->orthogonalize, cost, e);
    case OP_EMBED:
    case OP_ACT:
        *cost = (struct op_cost){0};
        break;
    }
    return 0;
}

#ifdef KERNELS_BF16
const struct kernels *kernels_cpu_bf16(void) {
#else
const struct kernels *kernels_cpu(void) {
#endif
    static const struct kernels table = {
        .name = "cpu",
        .open = cpu_open,
        .close = cpu_close,
        .dtypes = cpu_dtypes,
        .memory_available = cpu_memory_available,
        .plan = cpu_plan,
        .check_libraries = CPU(check_libraries),
        .describe = cpu_describe,
        .peak_flops = cpu_peak_flops,
        .open_comm = cpu_open_comm,
        .staging_bytes = cpu_staging_bytes,
        .set_progress_callback = cpu_set_progress_callback,
        .alloc = cpu_alloc,
        .release = cpu_release,
        .zero = cpu_zero,
        .copy = cpu_copy,
        .upload = cpu_upload,
        .download = cpu_download,
        .graph_replay = cpu_graph_replay,
        .graph_begin = cpu_graph_begin,
        .graph_end = cpu_graph_end,
        .range_begin = cpu_range_begin,
        .range_end = cpu_range_end,
        .trace_begin = cpu_trace_begin,
        .trace_end = cpu_trace_end,
        .set_workspace = cpu_set_workspace,
        .message_elements = 4 << 20,
        .run_ahead = 0,
#define OP(name, parameters, arguments) .name = CPU(name),
#include "kernels/ops.def"
    };
    return &table;
}
