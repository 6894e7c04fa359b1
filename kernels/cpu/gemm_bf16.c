/* Matrix products of bf16 with fp32 sums, by oneDNN's matmul primitives.
 *
 * A primitive holds the code that oneDNN generates for one shape. It is built when the product is planned and
 * kept in a list; its scratch memory is in the operation's workspace, so that running it allocates nothing. A
 * product of a shape that was not planned is built on its first use, with scratch memory of its own.
 *
 * Where oneDNN has no bf16 (processors without AVX-512), operands are converted to fp32 and multiplied by
 * sgemm. */
#include "kernels/cpu/cpu.h"

#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <stdlib.h>

/* Each of oneDNN's instruction sets has the bits of those it includes. On other processors than x86 the same bits
 * mean other sets. */
static bool has_instructions(dnnl_cpu_isa_t wanted) {
#ifdef __x86_64__
    return ((unsigned)dnnl_get_effective_cpu_isa() & (unsigned)wanted) == (unsigned)wanted;
#else
    (void)wanted;
    return false;
#endif
}

bool cpu_multiplies_bf16(void) {
    return has_instructions(dnnl_cpu_isa_avx512_core_bf16); /* AMX includes it */
}

const char *cpu_bf16_how(void) {
    return has_instructions(dnnl_cpu_isa_avx512_core_amx) ? "by AMX"
           : cpu_multiplies_bf16()                        ? "by AVX512-BF16"
                                                          : "by conversion";
}

bool cpu_bf16_has_pairs(void) {
#if defined __x86_64__
    return cpu_multiplies_bf16() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

/* On AMD's processors it is as fast. On a Xeon it takes four times as long, so that two multiply-adds of converted
 * numbers are faster (docs/performance.md). */
bool cpu_bf16_pairs_are_fast(void) {
#if defined __x86_64__
    return cpu_bf16_has_pairs() && __builtin_cpu_is("amd");
#else
    return false;
#endif
}

/* ---- oneDNN 2 and 3 ---- */

#if DNNL_VERSION_MAJOR >= 3
typedef dnnl_memory_desc_t memory_desc;
typedef const_dnnl_memory_desc_t memory_desc_view;
#define VIEW(desc) (desc)

static dnnl_status_t describe(memory_desc *md, int ndims, const dnnl_dims_t dims, dnnl_data_type_t type,
                              const dnnl_dims_t strides) {
    return dnnl_memory_desc_create_with_strides(md, ndims, dims, type, strides);
}

static void forget(memory_desc *md) {
    if (*md)
        dnnl_memory_desc_destroy(*md);
}

static dnnl_status_t append_sum(dnnl_post_ops_t ops) {
    return dnnl_post_ops_append_sum(ops, 1, 0, dnnl_data_type_undef);
}

static dnnl_status_t create_descriptor(dnnl_primitive_desc_t *pd, const memory_desc *a, const memory_desc *b,
                                       const memory_desc *bias, const memory_desc *c,
                                       const_dnnl_primitive_attr_t attributes, dnnl_engine_t engine) {
    return dnnl_matmul_primitive_desc_create(pd, engine, *a, *b, *bias, *c, attributes);
}
#else
typedef dnnl_memory_desc_t memory_desc;
typedef const dnnl_memory_desc_t *memory_desc_view;
#define VIEW(desc) (&(desc))

static dnnl_status_t describe(memory_desc *md, int ndims, const dnnl_dims_t dims, dnnl_data_type_t type,
                              const dnnl_dims_t strides) {
    return dnnl_memory_desc_init_by_strides(md, ndims, dims, type, strides);
}

static void forget(memory_desc *md) {
    (void)md;
}

static dnnl_status_t append_sum(dnnl_post_ops_t ops) {
    return dnnl_post_ops_append_sum(ops, 1);
}

static dnnl_status_t create_descriptor(dnnl_primitive_desc_t *pd, const memory_desc *a, const memory_desc *b,
                                       const memory_desc *bias, const memory_desc *c,
                                       const_dnnl_primitive_attr_t attributes, dnnl_engine_t engine) {
    dnnl_matmul_desc_t matmul;
    dnnl_status_t status = dnnl_matmul_desc_init(&matmul, a, b, bias->ndims > 0 ? bias : NULL, c);
    return status == dnnl_success ? dnnl_primitive_desc_create(pd, &matmul, attributes, engine, NULL)
                                  : status;
}
#endif

/* ---- building ---- */

enum { A, B, BIAS, C, SCRATCH, OPERANDS };

struct product_plan {
    struct gemm shape;
    bool to_real, planned;
    dnnl_primitive_t primitive; /* NULL: by conversion */
    dnnl_memory_t memory[OPERANDS];
    size_t scratch_bytes;
    struct product_plan *next;
};

struct gemm_library {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    struct product_plan *plans;
};

static _Noreturn void fail_product(const struct gemm *g, dnnl_status_t status) {
    fprintf(stderr, "gemm: oneDNN failed for a bf16 product of %lld x %lld x %lld (status %d)\n",
            (long long)g->m, (long long)g->n, (long long)g->k, (int)status);
    abort();
}

static int open_library(struct device *dev, struct error *e) {
    if (dev->library)
        return 0;
    struct gemm_library *l = calloc(1, sizeof *l);
    if (!l || dnnl_engine_create(&l->engine, dnnl_cpu, 0) != dnnl_success ||
        dnnl_stream_create(&l->stream, l->engine, dnnl_stream_default_flags) != dnnl_success) {
        free(l);
        return fail_run(e, "oneDNN cannot open the processor; out of memory?");
    }
    dev->library = l;
    return 0;
}

/* Descriptors of the operands. A transposed one has its strides exchanged. */
static dnnl_status_t describe_operands(const struct gemm *g, bool to_real, memory_desc md[OPERANDS]) {
    const dnnl_dims_t a = {g->m, g->k}, b = {g->k, g->n}, bias = {1, g->n}, c = {g->m, g->n};
    const dnnl_dims_t normal_a = {g->lda, 1}, transposed_a = {1, g->lda}, normal_b = {g->ldb, 1},
                      transposed_b = {1, g->ldb}, rows_bias = {g->n, 1}, rows_c = {g->ldc, 1};
    dnnl_status_t status = describe(&md[A], 2, a, dnnl_bf16, g->transpose_a ? transposed_a : normal_a);
    if (status == dnnl_success)
        status = describe(&md[B], 2, b, dnnl_bf16, g->transpose_b ? transposed_b : normal_b);
    if (status == dnnl_success && g->bias)
        status = describe(&md[BIAS], 2, bias, dnnl_bf16, rows_bias);
    if (status == dnnl_success)
        status = describe(&md[C], 2, c, to_real ? dnnl_f32 : dnnl_bf16, rows_c);
    return status;
}

static dnnl_status_t create_attributes(const struct product_plan *p, dnnl_primitive_attr_t *attributes) {
    dnnl_post_ops_t ops;
    dnnl_status_t status = dnnl_primitive_attr_create(attributes);
    if (status == dnnl_success && p->planned)
        status = dnnl_primitive_attr_set_scratchpad_mode(*attributes, dnnl_scratchpad_mode_user);
    if (status != dnnl_success || !p->shape.accumulate)
        return status;
    status = dnnl_post_ops_create(&ops);
    if (status != dnnl_success)
        return status;
    if ((status = append_sum(ops)) == dnnl_success)
        status = dnnl_primitive_attr_set_post_ops(*attributes, ops);
    dnnl_post_ops_destroy(ops);
    return status;
}

/* Memory objects, without data yet, and the primitive. */
static dnnl_status_t create_primitive(struct gemm_library *l, struct product_plan *p,
                                      const memory_desc md[OPERANDS], const_dnnl_primitive_desc_t pd) {
    memory_desc_view scratch = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
    p->scratch_bytes = p->planned && scratch ? dnnl_memory_desc_get_size(scratch) : 0;
    for (int i = A; i <= C; i++) {
        if (i == BIAS && !p->shape.bias)
            continue;
        dnnl_status_t status = dnnl_memory_create(&p->memory[i], VIEW(md[i]), l->engine, DNNL_MEMORY_NONE);
        if (status != dnnl_success)
            return status;
    }
    if (p->scratch_bytes > 0) {
        dnnl_status_t status = dnnl_memory_create(&p->memory[SCRATCH], scratch, l->engine, DNNL_MEMORY_NONE);
        if (status != dnnl_success)
            return status;
    }
    return dnnl_primitive_create(&p->primitive, pd);
}

static dnnl_status_t build(struct gemm_library *l, struct product_plan *p) {
    memory_desc md[OPERANDS];
    dnnl_primitive_attr_t attributes = NULL;
    dnnl_primitive_desc_t pd = NULL;
    memset(md, 0, sizeof md);
    dnnl_status_t status = describe_operands(&p->shape, p->to_real, md);
    if (status == dnnl_success)
        status = create_attributes(p, &attributes);
    if (status == dnnl_success)
        status = create_descriptor(&pd, &md[A], &md[B], &md[BIAS], &md[C], attributes, l->engine);
    if (status == dnnl_success)
        status = create_primitive(l, p, md, pd);
    if (pd)
        dnnl_primitive_desc_destroy(pd);
    if (attributes)
        dnnl_primitive_attr_destroy(attributes);
    for (int i = 0; i < OPERANDS; i++)
        forget(&md[i]);
    return status;
}

/* Floats of the operands by conversion: op(A), op(B) and, for elements, C. */
static size_t converted_bytes(const struct gemm *g, bool to_real) {
    int64_t reals = round_up(g->m * g->k, 16) + round_up(g->k * g->n, 16) + (to_real ? 0 : g->m * g->n);
    return (size_t)reals * sizeof(float);
}

static void free_plan(struct product_plan *p) {
    if (p->primitive)
        dnnl_primitive_destroy(p->primitive);
    for (int i = 0; i < OPERANDS; i++)
        if (p->memory[i])
            dnnl_memory_destroy(p->memory[i]);
    free(p);
}

static bool same_product(const struct gemm *x, const struct gemm *y) {
    return x->transpose_a == y->transpose_a && x->transpose_b == y->transpose_b && x->m == y->m &&
           x->n == y->n && x->k == y->k && x->lda == y->lda && x->ldb == y->ldb && x->ldc == y->ldc &&
           x->accumulate == y->accumulate && x->bias == y->bias;
}

/* NULL and *e: out of memory. */
static struct product_plan *find_or_build(struct device *dev, const struct gemm *g, bool to_real,
                                          bool planned, struct error *e) {
    if (open_library(dev, e) != 0)
        return NULL;
    for (struct product_plan *p = dev->library->plans; p; p = p->next)
        if (p->to_real == to_real && same_product(&p->shape, g))
            return p;
    struct product_plan *p = calloc(1, sizeof *p);
    if (!p) {
        fail_run(e, "out of memory planning a matrix product");
        return NULL;
    }
    *p = (struct product_plan){.shape = *g, .to_real = to_real, .planned = planned};
    dnnl_status_t status = build(dev->library, p);
    if (status == dnnl_unimplemented) {
        p->scratch_bytes = planned ? converted_bytes(g, to_real) : 0;
    } else if (status != dnnl_success) {
        free_plan(p);
        fail_run(e, "oneDNN cannot plan a bf16 product of %lld x %lld x %lld (status %d%s)", (long long)g->m,
                 (long long)g->n, (long long)g->k, (int)status,
                 status == dnnl_out_of_memory ? ": out of memory" : "");
        return NULL;
    }
    p->next = dev->library->plans;
    dev->library->plans = p;
    return p;
}

int cpu_bf16_gemm_plan(struct device *dev, const struct gemm *g, bool to_real, size_t *workspace,
                       struct error *e) {
    const struct product_plan *p = find_or_build(dev, g, to_real, true, e);
    if (!p)
        return -1;
    if (p->scratch_bytes > *workspace)
        *workspace = p->scratch_bytes;
    return 0;
}

int cpu_bf16_gemm_build(struct device *dev, const struct gemm *g, bool to_real, struct error *e) {
    const struct product_plan *p = find_or_build(dev, g, to_real, false, e);
    if (!p || p->primitive || p->scratch_bytes > 0)
        return p ? 0 : -1;
    void *converted = malloc(converted_bytes(g, to_real)); /* what multiply() will allocate */
    free(converted);
    return converted ? 0 : fail_run(e, "out of memory for a matrix product by conversion");
}

/* ---- computing ---- */

/* x [rows,cols] at stride ld, as floats without gaps. */
static void convert_operand(const elem *x, int64_t rows, int64_t cols, int64_t ld, float *out) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++)
        read_elems(x + i * ld, cols, out + i * cols);
}

static void multiply_converted(const struct gemm *g, const elem *a, const elem *b, const elem *bias, void *c,
                               bool to_real, float *scratch) {
    float *x = scratch, *y = x + round_up(g->m * g->k, 16), *sums = y + round_up(g->k * g->n, 16);
    int64_t lda = g->transpose_a ? g->m : g->k, ldb = g->transpose_b ? g->k : g->n;
    convert_operand(a, g->transpose_a ? g->k : g->m, lda, g->lda, x);
    convert_operand(b, g->transpose_b ? g->n : g->k, ldb, g->ldb, y);
    gemm(g->transpose_a, g->transpose_b, g->m, g->n, g->k, x, lda, y, ldb, to_real && g->accumulate,
         to_real ? (float *)c : sums, to_real ? g->ldc : g->n);
    if (to_real)
        return;
#pragma omp parallel for
    for (int64_t i = 0; i < g->m; i++) {
        elem *row = (elem *)c + i * g->ldc;
        for (int64_t j = 0; j < g->n; j++) {
            float sum = sums[i * g->n + j] + (g->bias ? from_elem(bias[j]) : 0);
            row[j] = to_elem(sum + (g->accumulate ? from_elem(row[j]) : 0));
        }
    }
}

static void multiply(struct device *dev, const struct gemm *g, const elem *a, const elem *b, const elem *bias,
                     void *c, bool to_real, size_t used) {
    struct error e;
    struct product_plan *p = find_or_build(dev, g, to_real, false, &e);
    if (!p) {
        fprintf(stderr, "gemm: %s\n", e.text);
        abort();
    }
    char *scratch = NULL;
    if (p->scratch_bytes > 0)
        scratch = (char *)cpu_workspace(dev, used + p->scratch_bytes, "gemm") + used;
    if (!p->primitive) {
        float *converted = scratch ? (float *)scratch : malloc(converted_bytes(g, to_real));
        if (!converted)
            fail_product(g, dnnl_out_of_memory);
        multiply_converted(g, a, b, bias, c, to_real, converted);
        if (!scratch)
            free(converted);
        return;
    }
    static const int argument[OPERANDS] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_BIAS, DNNL_ARG_DST,
                                           DNNL_ARG_SCRATCHPAD};
    const void *data[OPERANDS] = {a, b, bias, c, scratch};
    dnnl_exec_arg_t arguments[OPERANDS];
    int count = 0;
    for (int i = 0; i < OPERANDS; i++) {
        if (!p->memory[i])
            continue;
        dnnl_memory_set_data_handle(p->memory[i], (void *)data[i]);
        arguments[count++] = (dnnl_exec_arg_t){argument[i], p->memory[i]};
    }
    dnnl_status_t status = dnnl_primitive_execute(p->primitive, dev->library->stream, count, arguments);
    if (status == dnnl_success)
        status = dnnl_stream_wait(dev->library->stream);
    if (status != dnnl_success)
        fail_product(g, status);
}

void cpu_bf16_gemm(struct device *dev, const struct gemm *g, const elem *a, const elem *b, const elem *bias,
                   elem *c, size_t used) {
    multiply(dev, g, a, b, bias, c, false, used);
}

void cpu_bf16_gemm_real(struct device *dev, const struct gemm *g, const elem *a, const elem *b, real *c,
                        size_t used) {
    multiply(dev, g, a, b, NULL, c, true, used);
}

void cpu_bf16_gemm_end_check(struct device *dev) {
    struct product_plan **at = dev->library ? &dev->library->plans : NULL;
    size_t scratch = 0;
    while (at && *at) {
        struct product_plan *p = *at;
        if (p->planned) {
            scratch = p->scratch_bytes > scratch ? p->scratch_bytes : scratch;
            at = &p->next;
            continue;
        }
        *at = p->next;
        free_plan(p);
    }
    if (dev->workspace)
        memset(dev->workspace, 0, scratch < dev->workspace_bytes ? scratch : dev->workspace_bytes);
}

void cpu_bf16_gemm_free(struct device *dev) {
    struct gemm_library *l = dev->library;
    if (!l)
        return;
    for (struct product_plan *p = l->plans, *next; p; p = next) {
        next = p->next;
        free_plan(p);
    }
    dnnl_stream_destroy(l->stream);
    dnnl_engine_destroy(l->engine);
    free(l);
    dev->library = NULL;
}
