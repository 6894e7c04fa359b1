/* Matrix products by cuBLASLt, row-major, with fp32 accumulation.
 *
 * What a product needs (descriptor, layouts, algorithm) is built once per distinct shape and kept in a list.
 * When an operation is planned, cuBLASLt's candidate algorithms are timed (timing.cu) and the fastest is kept,
 * also for the next start (plan_file.h). With system.deterministic, and where there is no memory to time them in,
 * the first candidate is used, which is the same in every run. */
#include "kernels/cuda/matmul.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/plan_file.h"
#include "kernels/cuda/timing.h"

enum { CANDIDATES = 8 };

static bool same_shape(const struct matmul *x, const struct matmul *y) {
    return x->transpose_a == y->transpose_a && x->transpose_b == y->transpose_b && x->m == y->m &&
           x->n == y->n && x->k == y->k && x->lda == y->lda && x->ldb == y->ldb && x->ldc == y->ldc &&
           x->in == y->in && x->out == y->out && x->bias == y->bias && x->row_sums == y->row_sums &&
           x->epilogue == y->epilogue && x->ldaux == y->ldaux;
}

static cudaDataType_t library_type(enum dtype t) {
    return t == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* cuBLASLt is column-major: a row-major matrix is the column-major layout of its transpose. */
static cublasLtMatrixLayout_t layout_of(enum dtype t, int64_t rows, int64_t cols, int64_t ld) {
    cublasLtMatrixLayout_t layout;
    cublas_check(cublasLtMatrixLayoutCreate(&layout, library_type(t), (uint64_t)cols, (uint64_t)rows, ld));
    return layout;
}

/* The power of two, up to 128, that addresses of such rows are always multiples of; tensors start at
 * multiples of 128 bytes. */
static uint32_t alignment(enum dtype t, int64_t ld) {
    uint32_t bytes = (uint32_t)(ld * (int64_t)dtype_bytes(t)), lowest = bytes & -bytes;
    return lowest < 128 ? lowest : 128;
}

/* The operands that are attributes of the descriptor. */
static void set_bias_and_aux(const struct matmul_plan *p, const void *bias, const void *aux) {
    if (p->shape.bias || p->shape.row_sums)
        cublas_check(
            cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    if (p->shape.epilogue != MATMUL_PLAIN)
        cublas_check(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux,
                                                    sizeof aux));
}

static cublasLtEpilogue_t library_epilogue(const struct matmul *s) {
    if (s->epilogue == MATMUL_GELU)
        return s->bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    if (s->epilogue == MATMUL_GELU_BACKWARD)
        return CUBLASLT_EPILOGUE_DGELU;
    /* The library's second operand is our A. */
    return s->bias       ? CUBLASLT_EPILOGUE_BIAS
           : s->row_sums ? CUBLASLT_EPILOGUE_BGRADB
                         : CUBLASLT_EPILOGUE_DEFAULT;
}

static void create_descriptors(const struct device *dev, struct matmul_plan *p) {
    const struct matmul *s = &p->shape;
    /* C^T = op(B)^T op(A)^T: the library's first operand is our B. */
    cublasOperation_t transpose_first = s->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t transpose_second = s->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublas_check(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublas_check(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose_first,
                                                sizeof transpose_first));
    cublas_check(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSB, &transpose_second,
                                                sizeof transpose_second));
    cublasLtEpilogue_t epilogue = library_epilogue(s);
    cublas_check(
        cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (s->bias || s->row_sums) {
        cudaDataType_t type = library_type(s->out);
        cublas_check(
            cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type));
    }
    if (s->epilogue != MATMUL_PLAIN)
        cublas_check(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &s->ldaux,
                                                    sizeof s->ldaux));
    set_bias_and_aux(p, dev->scratch, dev->scratch); /* any address: the heuristic looks at its alignment */
    p->a = s->transpose_a ? layout_of(s->in, s->k, s->m, s->lda) : layout_of(s->in, s->m, s->k, s->lda);
    p->b = s->transpose_b ? layout_of(s->in, s->n, s->k, s->ldb) : layout_of(s->in, s->k, s->n, s->ldb);
    p->c = layout_of(s->out, s->m, s->n, s->ldc);
}

/* How many there are; 0: the library has none. */
static int find_candidates(struct device *dev, const struct matmul_plan *p,
                           cublasLtMatmulHeuristicResult_t *results) {
    const struct matmul *s = &p->shape;
    size_t max_workspace = MATMUL_WORKSPACE;
    uint32_t a = alignment(s->in, s->lda), b = alignment(s->in, s->ldb), c = alignment(s->out, s->ldc);
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        const void *value;
        size_t bytes;
    } preferences[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &max_workspace, sizeof max_workspace},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b, sizeof b},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a, sizeof a},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c, sizeof c},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c, sizeof c},
    };
    cublasLtMatmulPreference_t preference;
    cublas_check(cublasLtMatmulPreferenceCreate(&preference));
    for (size_t i = 0; i < sizeof preferences / sizeof *preferences; i++)
        cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, preferences[i].attribute,
                                                          preferences[i].value, preferences[i].bytes));
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(dev->blas, p->desc, p->b, p->a, p->c, p->c,
                                                           preference, CANDIDATES, results, &found);
    cublas_check(cublasLtMatmulPreferenceDestroy(preference));
    int usable = 0; /* each result has a status of its own; keep those that can run */
    for (int i = 0; i < found; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS)
            results[usable++] = results[i];
    found = usable;
    return status == CUBLAS_STATUS_SUCCESS ? found : 0;
}

static cublasStatus_t multiply(struct device *dev, const struct matmul_plan *p,
                               const cublasLtMatmulAlgo_t *algorithm, const void *a, const void *b,
                               float beta, void *c, void *workspace, size_t workspace_bytes) {
    float one = 1;
    return cublasLtMatmul(dev->blas, p->desc, &one, b, p->b, a, p->a, &beta, c, p->c, c, p->c, algorithm,
                          workspace, workspace_bytes, dev->stream);
}

struct matmul_bytes matmul_bytes(const struct matmul *s) {
    struct matmul_bytes bytes;
    int64_t a = (s->transpose_a ? s->k : s->m) * s->lda * (int64_t)dtype_bytes(s->in);
    int64_t b = (s->transpose_b ? s->n : s->k) * s->ldb * (int64_t)dtype_bytes(s->in);
    int64_t c = s->m * s->ldc * (int64_t)dtype_bytes(s->out),
            bias = (s->row_sums ? s->m : s->n) * (int64_t)dtype_bytes(s->out);
    bytes.a = (size_t)round_up(a, 256);
    bytes.b = (size_t)round_up(b, 256);
    bytes.c = (size_t)round_up(c, 256);
    bytes.bias = (size_t)round_up(bias, 256);
    bytes.aux = s->epilogue == MATMUL_PLAIN
                    ? 0
                    : (size_t)round_up(s->m * s->ldaux * (int64_t)dtype_bytes(s->out), 256);
    return bytes;
}

/* ---- timing ---- */

/* The index of the fastest candidate, or as time_fastest(). What something else can replace is run even where
 * it is the only candidate. */
static int fastest_candidate(struct device *dev, const struct matmul_plan *p,
                             const cublasLtMatmulHeuristicResult_t *results, int count, bool accumulate) {
    struct matmul_bytes bytes = matmul_bytes(&p->shape);
    if (count == 1 && p->shape.epilogue == MATMUL_PLAIN && !p->shape.row_sums)
        return 0;
    return time_fastest(dev, count, bytes.a + bytes.b + bytes.c + bytes.bias + bytes.aux, MATMUL_WORKSPACE,
                        [&](int i, char *a) {
                            char *b = a + bytes.a, *c = b + bytes.b, *bias = c + bytes.c;
                            set_bias_and_aux(p, bias, bias + bytes.bias);
                            return multiply(dev, p, &results[i].algo, a, b, accumulate, c, dev->workspace,
                                            results[i].workspaceSize) == CUBLAS_STATUS_SUCCESS;
                        });
}

/* ---- choices of an earlier start ---- */

enum { NAME_BYTES = 256, CHOICE_BYTES = 32 + 2 * sizeof(cublasLtMatmulAlgo_t) };

static void name_of(const struct matmul *s, char name[NAME_BYTES]) {
    static const char *const epilogues[] = {"", ", gelu", ", gelu backward"};
    char aux[32] = "";
    if (s->epilogue != MATMUL_PLAIN)
        snprintf(aux, sizeof aux, " of %lld", (long long)s->ldaux);
    snprintf(name, NAME_BYTES, "matmul %c%c %lld x %lld x %lld, rows of %lld %lld %lld, %s to %s%s%s%s",
             s->transpose_a ? 't' : 'n', s->transpose_b ? 't' : 'n', (long long)s->m, (long long)s->n,
             (long long)s->k, (long long)s->lda, (long long)s->ldb, (long long)s->ldc,
             s->in == DTYPE_BF16 ? "bf16" : "fp32", s->out == DTYPE_BF16 ? "bf16" : "fp32",
             s->bias       ? ", bias"
             : s->row_sums ? ", sums of rows"
                           : "",
             epilogues[s->epilogue], aux);
}

/* The bytes of cublasLtMatmulAlgo_t, which cuBLASLt documents to be valid for the same version of it. */
static void record(struct device *dev, const struct matmul_plan *p) {
    char name[NAME_BYTES], choice[CHOICE_BYTES];
    const unsigned char *bytes = (const unsigned char *)&p->algorithm;
    name_of(&p->shape, name);
    for (size_t i = 0; i < sizeof p->algorithm; i++)
        snprintf(choice + 2 * i, 3, "%02x", bytes[i]);
    plan_file_add(dev->plan_file, name, choice);
}

/* Take the recorded algorithm, if there is one and cuBLASLt accepts it. */
static bool recall(struct device *dev, struct matmul_plan *p) {
    char name[NAME_BYTES];
    name_of(&p->shape, name);
    const char *choice = plan_file_find(dev->plan_file, name);
    if (!choice || strlen(choice) != 2 * sizeof p->algorithm)
        return false;
    unsigned char *bytes = (unsigned char *)&p->algorithm;
    for (size_t i = 0; i < sizeof p->algorithm; i++)
        if (sscanf(choice + 2 * i, "%2hhx", &bytes[i]) != 1)
            return false;
    cublasLtMatmulHeuristicResult_t result;
    if (cublasLtMatmulAlgoCheck(dev->blas, p->desc, p->b, p->a, p->c, p->c, &p->algorithm, &result) !=
            CUBLAS_STATUS_SUCCESS ||
        result.workspaceSize > MATMUL_WORKSPACE)
        return false;
    p->workspace_bytes = result.workspaceSize;
    return true;
}

/* ---- plans ---- */

static struct matmul_plan *find(struct device *dev, const struct matmul *shape) {
    for (struct matmul_plan *p = dev->matmuls; p; p = p->next)
        if (same_shape(&p->shape, shape))
            return p;
    return NULL;
}

static struct matmul_plan *build(struct device *dev, const struct matmul *shape, bool timed,
                                 bool accumulate) {
    struct matmul_plan *p = (struct matmul_plan *)calloc(1, sizeof *p);
    if (!p)
        abort();
    p->shape = *shape;
    p->next = dev->matmuls;
    dev->matmuls = p;
    create_descriptors(dev, p);
    if (timed && recall(dev, p))
        return p;
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    int count = find_candidates(dev, p, results);
    if (count == 0) {
        p->rejected = true;
        return p;
    }
    int fastest = timed ? fastest_candidate(dev, p, results, count, accumulate) : NO_MEMORY,
        chosen = fastest < 0 ? 0 : fastest;
    p->rejected = fastest == NONE_RUNS;
    p->algorithm = results[chosen].algo;
    p->workspace_bytes = results[chosen].workspaceSize;
    if (fastest >= 0)
        record(dev, p);
    return p;
}

static struct matmul_plan *find_or_build(struct device *dev, const struct matmul *shape, bool timed,
                                         bool accumulate) {
    struct matmul_plan *p = find(dev, shape);
    return p ? p : build(dev, shape, timed, accumulate);
}

/* Abort if cuBLASLt has no algorithm for it. */
static struct matmul_plan *need(struct matmul_plan *p) {
    if (!p->rejected)
        return p;
    fprintf(stderr, "matmul: cuBLASLt has no algorithm for %lld x %lld x %lld\n", (long long)p->shape.m,
            (long long)p->shape.n, (long long)p->shape.k);
    abort();
}

void plan_matmul(struct device *dev, struct matmul shape, bool accumulate) {
    need(find_or_build(dev, &shape, !dev->deterministic, accumulate));
}

bool plan_matmul_if_supported(struct device *dev, struct matmul shape, bool accumulate) {
    return !find_or_build(dev, &shape, !dev->deterministic, accumulate)->rejected;
}

bool matmul_is_planned(struct device *dev, struct matmul shape) {
    const struct matmul_plan *p = find(dev, &shape);
    return p && !p->rejected;
}

bool matmul_is_rejected(struct device *dev, struct matmul shape) {
    const struct matmul_plan *p = find(dev, &shape);
    return p && p->rejected;
}

void reject_matmul(struct device *dev, struct matmul shape) {
    find(dev, &shape)->rejected = true;
}

void run_planned_matmul(struct device *dev, const struct matmul_plan *p, const void *a, const void *b,
                        const void *bias, bool accumulate, void *c, const void *aux, void *workspace) {
    set_bias_and_aux(p, bias, aux);
    cublas_check(multiply(dev, p, &p->algorithm, a, b, accumulate, c, workspace, p->workspace_bytes));
}

void run_matmul(struct device *dev, struct matmul shape, const void *a, const void *b, const void *bias,
                bool accumulate, void *c, const void *aux) {
    struct matmul_plan *p = need(find_or_build(dev, &shape, false, false));
    run_planned_matmul(dev, p, a, b, bias, accumulate, c, aux,
                       cuda_workspace(dev, p->workspace_bytes, "matmul"));
}

bool resize_matmul(struct device *dev, const struct matmul_plan *p, const struct matmul *shape,
                   struct matmul_plan *resized) {
    *resized = (struct matmul_plan){.shape = *shape, .algorithm = p->algorithm};
    resized->workspace_bytes = p->workspace_bytes;
    create_descriptors(dev, resized);
    if (same_shape(shape, &p->shape))
        return true;
    cublasLtMatmulHeuristicResult_t result;
    cublasStatus_t status = cublasLtMatmulAlgoCheck(dev->blas, resized->desc, resized->b, resized->a,
                                                    resized->c, resized->c, &resized->algorithm, &result);
    if (status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= MATMUL_WORKSPACE) {
        resized->workspace_bytes = result.workspaceSize;
        return true;
    }
    matmul_descriptors_free(resized);
    return false;
}

void matmul_descriptors_free(struct matmul_plan *p) {
    cublas_check(cublasLtMatrixLayoutDestroy(p->a));
    cublas_check(cublasLtMatrixLayoutDestroy(p->b));
    cublas_check(cublasLtMatrixLayoutDestroy(p->c));
    cublas_check(cublasLtMatmulDescDestroy(p->desc));
}

void matmul_plans_free(struct matmul_plan *p) {
    while (p) {
        struct matmul_plan *next = p->next;
        matmul_descriptors_free(p);
        free(p);
        p = next;
    }
}
