/* The emulator's cuBLASLt: D = alpha op(A) op(B) + beta C (+ bias), the sums of op(B)'s columns, GELU of D
 * and its derivative, column-major, in plain loops that sum in fp32, in blocks. Attributes that the backend
 * does not use are refused. An algorithm is chosen for the alignments that the preference, and the bias at
 * that time, promise; using it with addresses that are less aligned aborts here, where a GPU may fault or
 * return an error. */
#include "tests/cuda/emulator/internal.h"

#include <cublasLt.h>

struct desc {
    cublasOperation_t transpose_a, transpose_b;
    cublasLtEpilogue_t epilogue;
    const void *bias;
    cudaDataType_t bias_type;
    void *aux;
    int64_t ldaux;
};

struct layout {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld, batch_stride;
    int32_t batches;
};

struct preference {
    uint64_t workspace;
    uint32_t a, b, c, d; /* bytes that addresses are multiples of */
};

/* What an algorithm was chosen for, stored in its opaque words. */
struct chosen {
    uint64_t candidate; /* 0: not from the heuristic */
    struct preference promised;
    uint32_t bias;
};
static_assert(sizeof(struct chosen) <= sizeof(cublasLtMatmulAlgo_t), "fits where the library keeps its own");

static const struct desc *desc_of(cublasLtMatmulDesc_t d) {
    return (const struct desc *)d;
}

static const struct layout *layout_of(cublasLtMatrixLayout_t l) {
    return (const struct layout *)l;
}

size_t cublasLtGetVersion() {
    return 130101;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = (cublasLtHandle_t)malloc(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    *out = (cublasLtMatmulDesc_t) new desc{
        CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, CUDA_R_32F, nullptr, 0};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete (struct desc *)d;
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T> static cublasStatus_t set(T *to, const void *value, size_t bytes) {
    if (bytes != sizeof *to)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                              cublasLtMatmulDescAttributes_t attribute, const void *value,
                                              size_t bytes) {
    struct desc *desc = (struct desc *)d;
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return set(&desc->transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return set(&desc->transpose_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return set(&desc->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return set(&desc->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
        return set(&desc->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
        return set(&desc->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
        return set(&desc->ldaux, value, bytes);
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    if (ld < (int64_t)rows || rows == 0 || cols == 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    *out = (cublasLtMatrixLayout_t) new layout{type, rows, cols, ld, 0, 1};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete (struct layout *)l;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void *value,
                                                size_t bytes) {
    struct layout *layout = (struct layout *)l;
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
        return set(&layout->batches, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
        return set(&layout->batch_stride, value, bytes);
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    *out = (cublasLtMatmulPreference_t) new preference{0, 256, 256, 256, 256};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete (struct preference *)p;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t bytes) {
    struct preference *preference = (struct preference *)p;
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return set(&preference->workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        return set(&preference->a, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        return set(&preference->b, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        return set(&preference->c, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        return set(&preference->d, value, bytes);
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

struct emulator_products emulator_products = {PRODUCTS_RIGHT, 0, 1, -1, 0, 0};
bool emulator_no_sums, emulator_no_gelu;

static bool has_bias(const struct desc &d) {
    return d.epilogue == CUBLASLT_EPILOGUE_BIAS || d.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}

static bool writes_aux(const struct desc &d) {
    return d.epilogue == CUBLASLT_EPILOGUE_GELU_AUX || d.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}

static bool has_aux(const struct desc &d) {
    return writes_aux(d) || d.epilogue == CUBLASLT_EPILOGUE_DGELU;
}

/* Three results: the first is marked as not supported, the two others compute the same. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t p, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
    if ((desc_of(desc)->epilogue == CUBLASLT_EPILOGUE_BGRADB && emulator_no_sums) ||
        (has_aux(*desc_of(desc)) && emulator_no_gelu))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    struct chosen chosen = {0, *(const struct preference *)p,
                            (uint32_t)((uintptr_t)desc_of(desc)->bias % 16)};
    *found = wanted < 3 ? wanted : 3;
    for (int i = 0; i < *found; i++) {
        memset(&results[i], 0, sizeof results[i]);
        chosen.candidate = (uint64_t)i;
        results[i].state = CUBLAS_STATUS_NOT_SUPPORTED;
        if (i == 0)
            continue;
        memcpy(&results[i].algo, &chosen, sizeof chosen);
        results[i].state = CUBLAS_STATUS_SUCCESS;
        results[i].workspaceSize = 1024;
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* Every algorithm from the heuristic supports every size, unless a test wants it otherwise. */
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algorithm,
                                       cublasLtMatmulHeuristicResult_t *result) {
    int64_t rows = (int64_t)layout_of(d)->cols;
    struct chosen chosen;
    memset(result, 0, sizeof *result);
    memcpy(&chosen, algorithm, sizeof chosen);
    if (chosen.candidate == 0 || chosen.candidate > 2)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (emulator_products.min_rows > 0 && rows < emulator_products.min_rows)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    result->algo = *algorithm;
    result->state = CUBLAS_STATUS_SUCCESS;
    result->workspaceSize = 1024;
    return CUBLAS_STATUS_SUCCESS;
}

static float element(const void *p, cudaDataType_t type, int64_t i) {
    return type == CUDA_R_16BF ? __bfloat162float(((const __nv_bfloat16 *)p)[i]) : ((const float *)p)[i];
}

static void put(void *p, cudaDataType_t type, int64_t i, float x) {
    if (type == CUDA_R_16BF)
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
    else
        ((float *)p)[i] = x;
}

/* An operand as [n][k], where k is the index that is summed over. */
static std::vector<float> gather(const void *p, const struct layout &l, int64_t at, bool k_is_row, int64_t n,
                                 int64_t k) {
    std::vector<float> out((size_t)(n * k));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j++)
            out[(size_t)(i * k + j)] = element(p, l.type, at + (k_is_row ? i * l.ld + j : j * l.ld + i));
    return out;
}

/* In fp32, in blocks of k that are added up afterwards, as libraries do: added up one by one, a long sum has
 * rounding errors in proportion to k. */
static float dot(const float *x, const float *y, int64_t k) {
    enum { BLOCK = 256 };
    float sum = 0;
    for (int64_t begin = 0; begin < k; begin += BLOCK) {
        float part = 0;
        for (int64_t l = begin; l < k && l < begin + BLOCK; l++)
            part += x[l] * y[l];
        sum += part;
    }
    return sum;
}

/* The tanh form, as in the library. */
static float gelu(float u) {
    return 0.5f * u * (1 + tanhf(0.7978845608f * (u + 0.044715f * u * u * u)));
}

static float gelu_derivative(float u) {
    float t = tanhf(0.7978845608f * (u + 0.044715f * u * u * u));
    return 0.5f * (1 + t) + 0.5f * u * (1 - t * t) * 0.7978845608f * (1 + 0.134145f * u * u);
}

/* Another function of that name, u sigmoid(1.702 u), which is up to 0.02 beside it. */
static float quick_gelu(float u) {
    return u / (1 + expf(-1.702f * u));
}

static float quick_gelu_derivative(float u) {
    float s = 1 / (1 + expf(-1.702f * u));
    return s + 1.702f * u * s * (1 - s);
}

/* Whether element [i,j] of the row-major D [rows,cols] is in the tile that is wrong. */
static bool in_tile(const struct emulator_products &p, int64_t i, int64_t j, int64_t rows, int64_t cols) {
    int64_t y = p.tile / p.tiles, x = p.tile % p.tiles;
    return i >= rows * y / p.tiles && i < rows * (y + 1) / p.tiles && j >= cols * x / p.tiles &&
           j < cols * (x + 1) / p.tiles;
}

static void multiply(struct desc d, float alpha, const void *a, struct layout la, const void *b,
                     struct layout lb, float beta, const void *c, struct layout lc, void *out,
                     struct layout ld, struct emulator_products faulty) {
    int64_t m = (int64_t)ld.rows, n = (int64_t)ld.cols;
    int64_t k = (int64_t)(d.transpose_a == CUBLAS_OP_N ? la.cols : la.rows);
    for (int batch = 0; batch < ld.batches; batch++) {
        std::vector<float> x = gather(a, la, batch * la.batch_stride, d.transpose_a == CUBLAS_OP_T, m, k);
        std::vector<float> y = gather(b, lb, batch * lb.batch_stride, d.transpose_b == CUBLAS_OP_N, n, k);
        if (d.epilogue == CUBLASLT_EPILOGUE_BGRADB) {
            std::vector<float> ones((size_t)k, 1);
            for (int64_t j = 0; j < n; j++)
                put((void *)d.bias, d.bias_type, j,
                    dot(&y[(size_t)(j * k)], ones.data(), k) +
                        (float)(faulty.fault == PRODUCTS_WRONG_SUM && j == faulty.tile));
        }
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++) {
                float sum = alpha * dot(&x[(size_t)(i * k)], &y[(size_t)(j * k)], k);
                if (beta != 0)
                    sum += beta * element(c, lc.type, batch * lc.batch_stride + j * lc.ld + i);
                if (has_bias(d))
                    sum += element(d.bias, d.bias_type, i);
                enum emulator_fault fault = in_tile(faulty, j, i, n, m) ? faulty.fault : PRODUCTS_RIGHT;
                bool quick = fault == PRODUCTS_WRONG_GELU;
                if (writes_aux(d)) {
                    put(d.aux, ld.type, j * d.ldaux + i, sum + (float)(fault == PRODUCTS_WRONG_AUX));
                    sum = quick ? quick_gelu(sum) : gelu(sum);
                } else if (has_aux(d)) {
                    float u = element(d.aux, ld.type, j * d.ldaux + i);
                    sum *= quick ? quick_gelu_derivative(u) : gelu_derivative(u);
                }
                if (fault == PRODUCTS_UNWRITTEN || (fault == PRODUCTS_UNWRITTEN_GELU && has_aux(d)))
                    continue;
                if (fault == PRODUCTS_WRONG)
                    sum += 1;
                put(out, ld.type, batch * ld.batch_stride + j * ld.ld + i, sum);
            }
    }
}

static bool fits(struct desc d, const struct layout *a, const struct layout *b, const struct layout *c,
                 const struct layout *out) {
    bool ta = d.transpose_a != CUBLAS_OP_N, tb = d.transpose_b != CUBLAS_OP_N;
    return (ta ? a->cols : a->rows) == out->rows && (tb ? b->rows : b->cols) == out->cols &&
           (ta ? a->rows : a->cols) == (tb ? b->cols : b->rows) && c->rows == out->rows &&
           c->cols == out->cols && a->type == b->type && c->type == out->type && a->batches == out->batches;
}

static void check_matrix(const void *p, const struct layout &l, const char *what) {
    int64_t elements = (l.batches - 1) * l.batch_stride + ((int64_t)l.cols - 1) * l.ld + (int64_t)l.rows;
    emulator_check_device(p, (size_t)elements * (l.type == CUDA_R_16BF ? 2 : 4), what);
}

static void check_address(const void *p, uint32_t multiple_of, const char *what) {
    if ((uintptr_t)p % multiple_of != 0)
        emulator_fail(
            "cublasLtMatmul: %s at %p is no multiple of the %u bytes that its algorithm was chosen for", what,
            p, multiple_of);
}

static void check_promises(const struct chosen &chosen, const struct desc &d, const void *a, const void *b,
                           const void *c, const void *out, const void *workspace, size_t workspace_bytes) {
    if (chosen.candidate == 0)
        emulator_fail("cublasLtMatmul: the algorithm does not come from cublasLtMatmulAlgoGetHeuristic");
    check_address(a, chosen.promised.a, "A");
    check_address(b, chosen.promised.b, "B");
    check_address(c, chosen.promised.c, "C");
    check_address(out, chosen.promised.d, "D");
    check_address(workspace, 256, "the workspace");
    if (has_aux(d)) {
        check_address(d.aux, 16, "the matrix beside D");
        if (d.ldaux % 8 != 0)
            emulator_fail("cublasLtMatmul: the rows beside D are of %lld elements, no multiple of 8",
                          (long long)d.ldaux);
    }
    if ((has_bias(d) || d.epilogue == CUBLASLT_EPILOGUE_BGRADB) && (uintptr_t)d.bias % 16 != chosen.bias)
        emulator_fail(
            "cublasLtMatmul: the bias at %p is aligned differently from the one the algorithm was chosen for",
            d.bias);
    if (workspace_bytes > chosen.promised.workspace)
        emulator_fail("cublasLtMatmul: more workspace than was offered");
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t la, const void *b, cublasLtMatrixLayout_t lb,
                              const void *beta, const void *c, cublasLtMatrixLayout_t lc, void *d,
                              cublasLtMatrixLayout_t ld, const cublasLtMatmulAlgo_t *algorithm,
                              void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    struct desc what = *desc_of(desc);
    struct layout wa = *layout_of(la), wb = *layout_of(lb), wc = *layout_of(lc), wd = *layout_of(ld);
    if (!fits(what, &wa, &wb, &wc, &wd))
        return CUBLAS_STATUS_INVALID_VALUE;
    check_matrix(a, wa, "cublasLtMatmul, A");
    check_matrix(b, wb, "cublasLtMatmul, B");
    check_matrix(c, wc, "cublasLtMatmul, C");
    check_matrix(d, wd, "cublasLtMatmul, D");
    size_t beside = has_bias(what)                              ? (size_t)wd.rows
                    : what.epilogue == CUBLASLT_EPILOGUE_BGRADB ? (size_t)wd.cols
                                                                : 0;
    emulator_check_device(what.bias, beside * (what.bias_type == CUDA_R_16BF ? 2 : 4),
                          "cublasLtMatmul, bias");
    if (what.epilogue == CUBLASLT_EPILOGUE_BGRADB && what.bias_type != wd.type)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (has_aux(what)) {
        if (what.ldaux < (int64_t)wd.rows || *(const float *)beta != 0)
            return CUBLAS_STATUS_INVALID_VALUE;
        struct layout aux = wd;
        aux.ld = what.ldaux;
        check_matrix(what.aux, aux, "cublasLtMatmul, aux");
    }
    emulator_check_device(workspace, workspace_bytes, "cublasLtMatmul, workspace");
    struct chosen chosen;
    memcpy(&chosen, algorithm, sizeof chosen);
    check_promises(chosen, what, a, b, c, d, workspace, workspace_bytes);
    float scale = *(const float *)alpha, keep = *(const float *)beta;
    struct emulator_products faulty = emulator_products;
    if (faulty.only >= 0 && faulty.only != faulty.calls)
        faulty.fault = PRODUCTS_RIGHT;
    emulator_products.calls++;
    cudaError_t error = emulator_enqueue(stream, [=] {
        emulator_running_name = "cublasLtMatmul";
        /* Both ends, because writing all of it takes longer than the product. */
        size_t written = workspace_bytes < 64 << 10 ? workspace_bytes : 64 << 10;
        memset(workspace, 0xff, written);
        memset((char *)workspace + workspace_bytes - written, 0xff, written);
        emulator_pass_time(has_aux(what) ? "cublasLtMatmul with GELU" : "cublasLtMatmul",
                           (int)chosen.candidate);
        multiply(what, scale, a, wa, b, wb, keep, c, wc, d, wd, faulty);
    });
    return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
