/* Tensor-core instructions as kernels/cuda/mma.cuh documents them, computed by the last lane to arrive. */
#include "tests/cuda/emulator/internal.h"

struct mma_lane {
    float *d;
    const uint32_t *a, *b;
};

static float half_of(uint32_t pair, int high) {
    return emulator_bits<float>(high ? pair & 0xffff0000 : pair << 16);
}

static void complete_mma(void *const *lanes, uint32_t) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const struct mma_lane *l = (const struct mma_lane *)lanes[lane];
        int g = lane / 4, c = lane % 4 * 2;
        for (int i = 0; i < 2; i++) {
            for (int r = 0; r < 4; r++)
                a[g + r % 2 * 8][c + r / 2 * 8 + i] = half_of(l->a[r], i);
            for (int r = 0; r < 2; r++) {
                b[c + r * 8 + i][g] = half_of(l->b[r], i);
                d[g + r * 8][c + i] = l->d[r * 2 + i];
            }
        }
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++)
                d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; lane++) {
        float *out = ((const struct mma_lane *)lanes[lane])->d;
        for (int r = 0; r < 4; r++)
            out[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
    }
}

void emulator_mma_m16n8k16(float *d, const uint32_t *a, const uint32_t *b) {
    struct mma_lane lane = {d, a, b};
    emulator_warp(0xffffffff, "mma", &lane, complete_mma);
}

struct ldmatrix_lane {
    uint32_t *r;
    int count;
    bool transpose;
    const uint16_t *row;
};

static void complete_ldmatrix(void *const *lanes, uint32_t) {
    int count = ((const struct ldmatrix_lane *)lanes[0])->count;
    for (int i = 0; i < count; i++) {
        uint16_t m[8][8];
        for (int r = 0; r < 8; r++) {
            const uint16_t *row = ((const struct ldmatrix_lane *)lanes[8 * i + r])->row;
            if ((uintptr_t)row % 16)
                emulator_fail("ldmatrix: the row at %p is not aligned to 16 bytes", (const void *)row);
            memcpy(m[r], row, sizeof m[r]);
        }
        for (int lane = 0; lane < 32; lane++) {
            const struct ldmatrix_lane *l = (const struct ldmatrix_lane *)lanes[lane];
            int g = lane / 4, c = lane % 4 * 2;
            l->r[i] =
                l->transpose ? m[c][g] | (uint32_t)m[c + 1][g] << 16 : m[g][c] | (uint32_t)m[g][c + 1] << 16;
        }
    }
}

void emulator_ldmatrix(uint32_t *r, int count, bool transpose, const void *row) {
    struct ldmatrix_lane lane = {r, count, transpose, (const uint16_t *)row};
    emulator_warp(0xffffffff, "ldmatrix", &lane, complete_ldmatrix);
}
