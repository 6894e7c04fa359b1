/* linear: y = x W^T + bias, and its three gradients: dx and dW by cuBLASLt (matmul.cu), dbias by a kernel
 * that sums columns, or by cuBLASLt beside dW where that is faster, or from sums that came with dy. */
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/timing.h"

#include <stdio.h>
#include <string.h>

enum { LANES = 8, ROWS_UNROLL = 4 };

/* Partial column sums of x [rows, cols]: block (32 V columns, LANES rows), grid (columns, parts); part p
 * takes rows p LANES + lane, then every parts LANES further on. A warp reads 32 V neighbouring elements of a
 * row, coalesced. partials [parts, cols]. Bytes moved: rows cols elements. */
template <typename T, int V>
static __global__ void __launch_bounds__(32 * LANES)
    sum_columns(const T *x, int64_t rows, int64_t cols, int64_t stride, float *partials) {
    wait_for_previous();
    __shared__ float lanes[LANES][32][V + 1]; /* + 1: threads of a warp write to different banks */
    int64_t c = ((int64_t)blockIdx.x * 32 + threadIdx.x) * V;
    int64_t row = (int64_t)blockIdx.y * LANES + threadIdx.y, step = (int64_t)gridDim.y * LANES;
    float sum[V] = {};
    if (c < cols)
        for (; row < rows; row += ROWS_UNROLL * step) {
            float values[ROWS_UNROLL][V]; /* loads in flight at once */
#pragma unroll
            for (int k = 0; k < ROWS_UNROLL; k++)
                if (row + k * step < rows)
                    load(x + (row + k * step) * stride + c, values[k]);
#pragma unroll
            for (int k = 0; k < ROWS_UNROLL; k++)
                if (row + k * step < rows)
#pragma unroll
                    for (int j = 0; j < V; j++)
                        sum[j] += values[k][j];
        }
#pragma unroll
    for (int j = 0; j < V; j++)
        lanes[threadIdx.y][threadIdx.x][j] = sum[j];
    __syncthreads();
    for (int i = (int)(threadIdx.y * 32 + threadIdx.x); i < 32 * V; i += 32 * LANES) {
        int64_t column = (int64_t)blockIdx.x * 32 * V + i;
        float total = 0;
        for (int lane = 0; lane < LANES; lane++)
            total += lanes[lane][i / V][i % V];
        if (column < cols)
            partials[blockIdx.y * cols + column] = total;
    }
}

/* Enough parts for 8 blocks per SM, but no more than there are rows for. Wider vectors make fewer blocks
 * across, and so more parts: the plan counts with the widest. */
static int64_t column_parts(const struct device *dev, int64_t rows, int64_t cols, int width) {
    int64_t across = ceil_div(cols, 32 * width), wanted = ceil_div((int64_t)dev->sm_count * 8, across);
    return min64(wanted, ceil_div(rows, LANES * ROWS_UNROLL));
}

static size_t column_bytes(const struct device *dev, int64_t rows, int64_t cols) {
    return (size_t)(column_parts(dev, rows, cols, VECTOR<bf16>) * cols) * sizeof(float);
}

/* out F32 [cols] (+)= column sums of x [rows, cols]. */
static void column_sums(struct device *dev, tensor x, float *out, bool accumulate) {
    int64_t rows = x.shape[0], cols = x.shape[1];
    float *partials = (float *)cuda_workspace(dev, column_bytes(dev, rows, cols), "linear_backward");
    by_dtype(x.dtype, [&](auto number) {
        using T = decltype(number);
        bool aligned = aligned16({x.data}) && x.stride[0] % VECTOR<T> == 0;
        by_width<T>(cols, aligned, [&](auto width) {
            constexpr int V = decltype(width)::value;
            int parts =
                (int)min64(column_parts(dev, rows, cols, V), column_parts(dev, rows, cols, VECTOR<bf16>));
            dim3 grid((unsigned)ceil_div(cols, 32 * V), (unsigned)parts);
            launch<sum_columns<T, V>>(dev, grid, dim3(32, LANES), 0, (const T *)x.data, rows, cols,
                                      x.stride[0], partials);
            sum_partials(dev, partials, parts, cols, {{out, accumulate}});
        });
    });
}

/* ---- the operation ---- */

static struct matmul dw_shape(const struct linear_spec *s, enum dtype t, int64_t ldy, int64_t ldx,
                              int64_t ldw) {
    return (struct matmul){true, false, s->out, s->in, s->rows, ldy, ldx, ldw, t, DTYPE_F32, false};
}

/* ---- dbias beside dW ---- */

/* cuBLASLt reads dy for dW anyway, and can sum its columns; it overwrites the sums, so that they are added to dbias
 * by a kernel where gradients accumulate. */
static struct matmul dw_and_sums(struct matmul dw) {
    dw.row_sums = true;
    return dw;
}

/* The workspace of the sums is after the product's. */
static size_t sums_bytes(int64_t out) {
    return MATMUL_WORKSPACE + (size_t)round_up(out * (int64_t)sizeof(float), 256);
}

static void dw_with_dbias(struct device *dev, struct matmul dw, const void *dy, const void *x, float *out,
                          float *dbias, bool accumulate) {
    char *workspace = (char *)cuda_workspace(dev, sums_bytes(dw.m), "linear_backward");
    float *sums = accumulate ? (float *)(workspace + MATMUL_WORKSPACE) : dbias;
    run_matmul(dev, dw_and_sums(dw), dy, x, sums, accumulate, out);
    if (accumulate)
        sum_partials(dev, sums, 1, dw.m, {{dbias, true}});
}

static void dw_then_dbias(struct device *dev, struct matmul dw, tensor dy, const void *x, float *out,
                          float *dbias, bool accumulate) {
    run_matmul(dev, dw, dy.data, x, NULL, accumulate, out);
    column_sums(dev, dy, dbias, accumulate);
}

enum { APART, TOGETHER };

/* The faster one; -1: there is no memory to time them. */
static int faster_dbias(struct device *dev, const struct linear_spec *s, struct matmul dw, enum dtype t) {
    size_t sums = column_bytes(dev, s->rows, s->out), together = sums_bytes(s->out);
    int64_t dy = round_up(s->rows * s->out * (int64_t)dtype_bytes(t), 256),
            x = round_up(s->rows * s->in * (int64_t)dtype_bytes(t), 256),
            w = round_up(s->out * s->in * (int64_t)sizeof(float), 256),
            bias = s->out * (int64_t)sizeof(float);
    return time_fastest(dev, 2, (size_t)(dy + x + w + bias), sums > together ? sums : together,
                        [&](int i, char *memory) {
                            char *inputs = memory + dy;
                            float *dw_out = (float *)(inputs + x), *dbias = (float *)(inputs + x + w);
                            if (i == APART)
                                dw_then_dbias(dev, dw, tensor_of(memory, t, s->rows, s->out, 0, 0, 0), inputs,
                                              dw_out, dbias, true);
                            else
                                dw_with_dbias(dev, dw, memory, inputs, dw_out, dbias, true);
                            return true;
                        });
}

/* Choose, once for a shape. With system.deterministic, whose choices do not depend on time, they are apart, and also
 * where they were not timed. */
static void plan_dbias(struct device *dev, const struct linear_spec *s, struct matmul dw, enum dtype t) {
    struct matmul both = dw_and_sums(dw);
    char name[160];
    if (dev->deterministic || matmul_is_planned(dev, both) || matmul_is_rejected(dev, both) ||
        !plan_matmul_if_supported(dev, both, true))
        return;
    snprintf(name, sizeof name, "dW and dbias, %lld rows of %lld to %lld, %s", (long long)s->rows,
             (long long)s->in, (long long)s->out, t == DTYPE_BF16 ? "bf16" : "fp32");
    if (choose_once(dev, name, {"apart", "together"}, [&] { return faster_dbias(dev, s, dw, t); }) !=
        TOGETHER)
        reject_matmul(dev, both);
}

/* ---- plan and calls ---- */

int cuda_linear_plan(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e) {
    (void)e;
    const struct linear_spec *s = &spec->linear;
    enum dtype t = cuda_compute(dev);
    plan_matmul(dev, linear_product(s, t, s->in, s->in, s->out, false));
    if (!spec->no_bias)
        plan_matmul(dev, linear_product(s, t, s->in, s->in, s->out, true));
    cost->workspace = MATMUL_WORKSPACE;
    if (spec->no_backward)
        return 0;
    struct matmul dw = dw_shape(s, t, s->out, s->in, s->in);
    plan_matmul(dev, linear_dx_product(s, t, s->out, s->in, s->in));
    plan_matmul(dev, dw, true);
    if (spec->no_bias || spec->dy_sums)
        return 0;
    plan_dbias(dev, s, dw, t);
    size_t sums = column_bytes(dev, s->rows, s->out);
    size_t products = matmul_is_planned(dev, dw_and_sums(dw)) ? sums_bytes(s->out) : MATMUL_WORKSPACE;
    cost->workspace = sums > products ? sums : products;
    return 0;
}

void cuda_linear(struct device *dev, const struct linear_spec *s, tensor x, tensor w, tensor bias, tensor y) {
    enum dtype t = cuda_compute(dev);
    check_shape("linear", "x", x, t, s->rows, s->in);
    check_shape("linear", "W", w, t, s->out, s->in);
    check_shape("linear", "y", y, t, s->rows, s->out);
    if (bias.data)
        check_shape("linear", "bias", bias, t, s->out);
    run_matmul(dev, linear_product(s, t, x.stride[0], w.stride[0], y.stride[0], bias.data != NULL), x.data,
               w.data, bias.data, false, y.data);
}

void cuda_linear_backward(struct device *dev, const struct linear_spec *s, tensor dy, tensor dy_sums,
                          tensor x, tensor w, tensor dx, bool add_dx, tensor dw, tensor dbias,
                          bool accumulate) {
    enum dtype t = cuda_compute(dev);
    check_shape("linear_backward", "dy", dy, t, s->rows, s->out);
    check_shape("linear_backward", "x", x, t, s->rows, s->in);
    check_shape("linear_backward", "dW", dw, DTYPE_F32, s->out, s->in);
    struct matmul product = dw_shape(s, t, dy.stride[0], x.stride[0], dw.stride[0]);
    if (dbias.data)
        check_shape("linear_backward", "dbias", dbias, DTYPE_F32, s->out);
    if (dy_sums.data)
        check_shape("linear_backward", "dy_sums", dy_sums, DTYPE_F32, s->out);
    if (!dbias.data || dy_sums.data)
        run_matmul(dev, product, dy.data, x.data, NULL, accumulate, dw.data);
    else if (matmul_is_planned(dev, dw_and_sums(product)))
        dw_with_dbias(dev, product, dy.data, x.data, (float *)dw.data, (float *)dbias.data, accumulate);
    else
        dw_then_dbias(dev, product, dy, x.data, (float *)dw.data, (float *)dbias.data, accumulate);
    if (dbias.data && dy_sums.data)
        sum_partials(dev, (const float *)dy_sums.data, 1, s->out, {{(float *)dbias.data, accumulate}});
    if (dx.data) {
        check_shape("linear_backward", "W", w, t, s->out, s->in);
        check_shape("linear_backward", "dx", dx, t, s->rows, s->in);
        run_matmul(dev, linear_dx_product(s, t, dy.stride[0], w.stride[0], dx.stride[0]), dy.data, w.data,
                   NULL, add_dx, dx.data);
    }
}
