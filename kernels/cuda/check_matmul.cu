/* A check of cuBLASLt's products, once, before the first step: a library that is wrong on some GPU would
 * spoil the training without an error.
 *
 * Every planned product runs with its own algorithm, strides and epilogue, written over and, without GELU,
 * added to, on small integers: all sums are exact in any order, also where partial sums are rounded to bf16.
 * All outputs are searched for parts that were not written, and one output in every CELL x CELL elements is
 * compared with a plain dot product, whose operands are computed again from their indices. GELU of a product,
 * or its derivative, may be wrong by GELU_ERROR of the product: the library computes both approximately. Rows
 * (tokens) are capped at MAX_ROWS where the algorithm also takes that many. The operands are in the
 * workspace; of a product that is too large for it a part is checked.
 *
 * Work: for each product of N x K, two products of MAX_ROWS rows, 4 N K bytes written and read, and at most
 * max(32, MAX_ROWS/CELL) * max(32, N/CELL) dot products of K. */
#include "kernels/cuda/check_values.cuh"
#include "kernels/cuda/matmul.h"

#include <math.h>
#include <stdio.h>

constexpr int64_t MAX_ROWS = 256, CELL = 64, MIN_CELLS = 32;
constexpr float GELU_ERROR = 1.0f / 128; /* two roundings to bf16 */

/* Integers from -largest to largest, of which this part (of 2^16) is not 0. */
struct integers {
    uint32_t seed, largest, nonzero;
};

static __host__ __device__ inline float integer_at(struct integers x, int64_t index) {
    uint32_t bits = random_bits(x.seed, index);
    float magnitude = (bits & 0xffff) < x.nonzero ? (float)(1 + (bits >> 17) % x.largest) : 0;
    return bits & 0x10000 ? -magnitude : magnitude;
}

/* C[m,n] = op(A) op(B) (+ C) (+ bias). Elements are numbered as in op(A) [m,k], op(B) [k,n] and C [m,n]. */
struct problem {
    int64_t m, n, k;
    struct integers a, b, c, bias, aux;
    bool has_bias, accumulate;
    enum matmul_epilogue epilogue;
};

static __host__ __device__ inline float expected_at(struct problem p, int64_t i, int64_t j) {
    float sum = p.has_bias ? integer_at(p.bias, j) : 0;
    if (p.accumulate)
        sum += integer_at(p.c, i * p.n + j);
    for (int64_t l = 0; l < p.k; l++)
        sum += integer_at(p.a, i * p.k + l) * integer_at(p.b, l * p.n + j);
    return sum;
}

/* Of a sum u, what MATMUL_GELU leaves in C, and the factor of MATMUL_GELU_BACKWARD. */
static __host__ __device__ inline float gelu_at(float u) {
    return u / (1 + expf(-1.5957691216f * (u + 0.044715f * u * u * u)));
}

static __host__ __device__ inline float gelu_derivative_at(float u) {
    float s = 1 / (1 + expf(-1.5957691216f * (u + 0.044715f * u * u * u)));
    return s + u * s * (1 - s) * 1.5957691216f * (1 + 0.134145f * u * u);
}

/* Sums of k products stay below 256, so that they are exact in bf16: they are random walks, whose standard
 * deviation is at most 38, or 2 before GELU, which is 0 or linear further out. Dense where k is small. */
static struct problem problem_of(const struct matmul *s, bool accumulate) {
    double nonzero = fmin(0.75, (s->epilogue == MATMUL_GELU ? 1.3 : 24) / sqrt((double)s->k));
    uint32_t part = (uint32_t)(nonzero * 65536);
    return {s->m,          s->n,          s->k,    {1, 1, part}, {2, 2, part}, {3, 2, 49152},
            {4, 2, 49152}, {5, 3, 49152}, s->bias, accumulate,   s->epilogue};
}

/* x, stored as [rows, cols] with this stride; `transposed`: it is numbered by columns first. */
template <typename T>
static __global__ void __launch_bounds__(CHECK_THREADS)
    fill_integers(T *x, int64_t rows, int64_t cols, int64_t stride, bool transposed, struct integers values) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    for (; i < rows * cols; i += (int64_t)gridDim.x * CHECK_THREADS) {
        int64_t row = i / cols, col = i % cols;
        x[row * stride + col] = from_float<T>(integer_at(values, transposed ? col * rows + row : i));
    }
}

/* How many cells a dimension is divided into, and the element that is compared in each. */
static __host__ __device__ inline int64_t cell_size(int64_t n) {
    int64_t size = (n + MIN_CELLS - 1) / MIN_CELLS;
    return size < CELL ? size : CELL;
}

static __host__ __device__ inline int64_t sample_in(int64_t cell, int64_t n, uint32_t bits) {
    int64_t size = cell_size(n), i = cell * size + bits % size;
    return i < n ? i : n - 1;
}

/* Whether C holds at [i,j] what it should, and, where that is an output, aux. */
template <typename T>
static __device__ bool right_at(const T *c, int64_t stride, const T *aux, int64_t aux_stride,
                                struct problem p, int64_t i, int64_t j) {
    float value = to_float(c[i * stride + j]), sum = expected_at(p, i, j);
    if (p.epilogue == MATMUL_PLAIN)
        return value == to_float(from_float<T>(sum));
    if (p.epilogue == MATMUL_GELU)
        return to_float(aux[i * aux_stride + j]) == sum &&
               fabsf(value - gelu_at(sum)) <= GELU_ERROR * fabsf(sum);
    float factor = gelu_derivative_at(integer_at(p.aux, i * p.n + j));
    return fabsf(value - sum * factor) <= GELU_ERROR * fabsf(sum);
}

/* *found = the first of the sampled elements of c that is wrong, if that is less. A thread looks at one
 * element. */
template <typename T>
static __global__ void __launch_bounds__(CHECK_THREADS)
    compare_samples(const T *c, int64_t stride, const T *aux, int64_t aux_stride, struct problem p,
                    wrong_index *found) {
    wait_for_previous();
    int64_t cell = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    int64_t across = (p.n + cell_size(p.n) - 1) / cell_size(p.n);
    int64_t down = (p.m + cell_size(p.m) - 1) / cell_size(p.m);
    if (cell >= down * across)
        return;
    uint32_t bits = random_bits(5, cell);
    int64_t i = sample_in(cell / across, p.m, bits >> 16), j = sample_in(cell % across, p.n, bits & 0xffff);
    if (!right_at(c, stride, aux, aux_stride, p, i, j))
        atomicMin(found, (wrong_index)(i * p.n + j));
}

/* *found = the first of sums [m] that is not the sum of A's row; exact, since they are below 2^24. */
static __global__ void __launch_bounds__(CHECK_THREADS)
    compare_row_sums(const float *sums, struct problem p, wrong_index *found) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    if (i >= p.m)
        return;
    float expected = 0;
    for (int64_t l = 0; l < p.k; l++)
        expected += integer_at(p.a, i * p.k + l);
    if (!(sums[i] == expected))
        atomicMin(found, (wrong_index)(i * p.n));
}

/* ---- one product ---- */

struct operands {
    char *workspace, *a, *b, *c, *bias, *aux;
};

static void fill(struct device *dev, enum dtype t, void *x, int64_t rows, int64_t cols, int64_t stride,
                 bool transposed, struct integers values) {
    by_dtype(t, [&](auto number) {
        using T = decltype(number);
        launch<fill_integers<T>>(dev, check_blocks(dev, rows * cols), CHECK_THREADS, 0, (T *)x, rows, cols,
                                 stride, transposed, values);
    });
}

/* The first wrong element of the product in c, or NONE_WRONG. */
static wrong_index find_wrong(struct device *dev, const struct matmul *s, struct problem p, const void *c,
                              const void *aux) {
    wrong_index *found = (wrong_index *)dev->scratch, index;
    int64_t cells = ceil_div(p.m, cell_size(p.m)) * ceil_div(p.n, cell_size(p.n));
    cuda_check(cudaMemsetAsync(found, 0xff, sizeof *found, dev->stream));
    by_dtype(s->out, [&](auto number) {
        using T = decltype(number);
        launch<find_nan<T>>(dev, check_blocks(dev, p.m * p.n), CHECK_THREADS, 0, (const T *)c, p.m, p.n,
                            s->ldc, found);
        if (s->epilogue == MATMUL_GELU)
            launch<find_nan<T>>(dev, check_blocks(dev, p.m * p.n), CHECK_THREADS, 0, (const T *)aux, p.m, p.n,
                                s->ldaux, found);
        launch<compare_samples<T>>(dev, (unsigned)ceil_div(cells, CHECK_THREADS), CHECK_THREADS, 0,
                                   (const T *)c, s->ldc, (const T *)aux, s->ldaux, p, found);
    });
    cuda_read(dev, found, &index, sizeof index);
    return index;
}

/* The same of the sums beside it: as an index of the product's element in that row's first column. */
static wrong_index find_wrong_sum(struct device *dev, struct problem p, const void *sums) {
    wrong_index *found = (wrong_index *)dev->scratch, index;
    cuda_check(cudaMemsetAsync(found, 0xff, sizeof *found, dev->stream));
    launch<compare_row_sums>(dev, (unsigned)ceil_div(p.m, CHECK_THREADS), CHECK_THREADS, 0,
                             (const float *)sums, p, found);
    cuda_read(dev, found, &index, sizeof index);
    return index;
}

/* Of what a kernel of this program can compute instead: sums beside a product, and GELU of it. */
static void warn(struct device *dev, const struct matmul *s, struct problem p, wrong_index index) {
    fprintf(stderr,
            "warning: cuBLASLt computes wrong %s on this GPU (%s): row %lld of %lld x %lld x %lld in %s; a "
            "kernel of this "
            "program does it instead\n",
            s->row_sums ? "sums beside matrix products" : "GELU of matrix products", dev->name,
            (long long)((int64_t)index / p.n), (long long)p.m, (long long)p.n, (long long)p.k,
            s->in == DTYPE_BF16 ? "bf16" : "fp32");
}

static int report(struct device *dev, const struct matmul *s, struct problem p, const void *c,
                  wrong_index index, struct error *e) {
    int64_t i = (int64_t)index / p.n, j = (int64_t)index % p.n;
    double value;
    tensor element =
        tensor_of((char *)c + (size_t)(i * s->ldc + j) * dtype_bytes(s->out), s->out, 1, 0, 0, 0, 0);
    cuda_download(dev, element, &value, DTYPE_F64);
    return fail_run(
        e,
        "cuBLASLt computes wrong matrix products on this GPU (%s): %lld x %lld x %lld in %s%s%s%s%s, element "
        "[%lld,%lld] is %g instead of %g; install another version of cuBLAS or of the driver, try "
        "system.deterministic = %s, or another GPU",
        dev->name, (long long)p.m, (long long)p.n, (long long)p.k, s->in == DTYPE_BF16 ? "bf16" : "fp32",
        s->transpose_a ? ", A transposed" : "", s->transpose_b ? ", B transposed" : "",
        p.has_bias ? ", with bias" : "", p.accumulate ? ", added to C" : "", (long long)i, (long long)j,
        value == value ? value : (double)NAN, (double)expected_at(p, i, j),
        dev->deterministic ? "false" : "true");
}

/* 0: it is right, or *rejected, since a kernel can do what is wrong; -1: it is wrong. */
static int check_product(struct device *dev, const struct matmul_plan *plan, struct operands x,
                         bool *rejected, struct error *e) {
    const struct matmul *s = &plan->shape;
    struct problem p = problem_of(s, false);
    bool ta = s->transpose_a, tb = s->transpose_b;
    fill(dev, s->in, x.a, ta ? p.k : p.m, ta ? p.m : p.k, s->lda, ta, p.a);
    fill(dev, s->in, x.b, tb ? p.n : p.k, tb ? p.k : p.n, s->ldb, tb, p.b);
    if (s->bias)
        fill(dev, s->out, x.bias, 1, p.n, p.n, false, p.bias);
    if (s->epilogue == MATMUL_GELU_BACKWARD)
        fill(dev, s->out, x.aux, p.m, p.n, s->ldaux, false, p.aux);
    else
        cuda_check(cudaMemsetAsync(x.aux, 0xff, matmul_bytes(s).aux, dev->stream)); /* NaN */
    int passes = s->epilogue == MATMUL_PLAIN ? 2 : 1; /* nothing is added to with an epilogue */
    for (int accumulate = 0; accumulate < passes; accumulate++) {
        p.accumulate = accumulate;
        if (accumulate)
            fill(dev, s->out, x.c, p.m, p.n, s->ldc, false, p.c);
        else
            cuda_check(cudaMemsetAsync(x.c, 0xff, matmul_bytes(s).c, dev->stream)); /* NaN */
        if (s->row_sums)
            cuda_check(cudaMemsetAsync(x.bias, 0xff, matmul_bytes(s).bias, dev->stream));
        run_planned_matmul(dev, plan, x.a, x.b, s->bias || s->row_sums ? x.bias : NULL, accumulate, x.c,
                           x.aux, x.workspace);
        wrong_index index = find_wrong(dev, s, p, x.c, x.aux);
        if (index != NONE_WRONG && s->epilogue == MATMUL_PLAIN)
            return report(dev, s, p, x.c, index, e);
        if (s->row_sums)
            index = find_wrong_sum(dev, p, x.bias);
        if (index != NONE_WRONG && !*rejected)
            warn(dev, s, p, index);
        *rejected |= index != NONE_WRONG;
    }
    return 0;
}

/* ---- sizes ---- */

/* The dimension that is a weight's rows, and the one that is tokens: see linear.cu and classifier.cu. */
static int64_t *outputs_of(struct matmul *s) {
    return s->transpose_b ? &s->n : s->transpose_a ? &s->m : &s->k;
}

static int64_t *tokens_of(struct matmul *s) {
    return s->transpose_a ? &s->k : &s->m;
}

/* Place the operands in the workspace; false if they do not fit. *used: the bytes they take. */
static bool place(const struct device *dev, const struct matmul_plan *p, struct operands *x, size_t *used) {
    struct matmul_bytes bytes = matmul_bytes(&p->shape);
    x->workspace = dev->workspace;
    x->a = x->workspace + round_up((int64_t)p->workspace_bytes, 256);
    x->b = x->a + bytes.a;
    x->c = x->b + bytes.b;
    x->bias = x->c + bytes.c;
    x->aux = x->bias + bytes.bias;
    *used = (size_t)(x->aux + bytes.aux - dev->workspace);
    return *used <= dev->workspace_bytes;
}

/* The plan to check, in place of p, and where: tokens capped if the algorithm allows it; what is too large
 * for the workspace has outputs and tokens halved in turn. False: nothing fits. */
static bool fit(struct device *dev, const struct matmul_plan *p, struct matmul_plan *resized,
                struct operands *x, size_t *used) {
    struct matmul shape = p->shape;
    int64_t *outputs = outputs_of(&shape), *tokens = tokens_of(&shape), all = *tokens;
    int64_t limit = min64(all, MAX_ROWS);
    for (bool halve_outputs = true; *outputs > 0 && limit > 0; halve_outputs = !halve_outputs) {
        for (int capped = 1; capped >= 0; capped--) {
            *tokens = capped ? limit : all;
            if (!resize_matmul(dev, p, &shape, resized))
                continue;
            if (place(dev, resized, x, used))
                return true;
            matmul_descriptors_free(resized);
        }
        *(halve_outputs ? outputs : &limit) /= 2;
    }
    return false;
}

int check_matmuls(struct device *dev, struct error *e) {
    int status = 0;
    size_t most = 0;
    for (struct matmul_plan *p = dev->matmuls; p && status == 0; p = p->next) {
        struct matmul_plan resized;
        struct operands x;
        size_t used;
        if (p->checked || p->rejected || !fit(dev, p, &resized, &x, &used))
            continue;
        bool rejected = false;
        status = check_product(dev, &resized, x, &rejected, e);
        matmul_descriptors_free(&resized);
        p->checked = true;
        p->rejected = rejected;
        most = used > most ? used : most;
    }
    if (most > 0)
        cuda_check(cudaMemsetAsync(dev->workspace, 0, most, dev->stream));
    return status;
}
