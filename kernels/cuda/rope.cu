/* The table of rotary position embedding's angles, computed on the host in double: the angles of late
 * positions are large, and their rounding would be a rotation. */
#include "kernels/cuda/cuda.h"

#include <math.h>
#include <stdlib.h>

/* table F32 [positions, 2, d/2], whatever the precision of what is rotated. */
void cuda_rope_table(struct device *dev, tensor table, double theta) {
    int64_t positions = table.shape[0], half = table.shape[2];
    check_shape("rope_table", "table", table, DTYPE_F32, positions, 2, half);
    float *values = (float *)malloc((size_t)tensor_count(table) * sizeof *values);
    if (!values)
        abort();
    for (int64_t position = 0; position < positions; position++)
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)position * pow(theta, -(double)i / (double)half);
            values[position * 2 * half + i] = (float)cos(angle);
            values[position * 2 * half + half + i] = (float)sin(angle);
        }
    cuda_upload(dev, table, values, DTYPE_F32);
    free(values);
}
