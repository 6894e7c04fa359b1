/* In the place of OpenMP's header: the fuzz targets are built without it, in one thread, so that they need no
 * second OpenMP runtime and do the same in every run. Only they have this directory among their includes. */
#ifndef IHA_TESTS_FUZZ_OMP_H
#define IHA_TESTS_FUZZ_OMP_H

static inline void omp_set_num_threads(int threads) {
    (void)threads;
}

static inline int omp_get_max_threads(void) {
    return 1;
}

static inline int omp_get_thread_num(void) {
    return 0;
}

#endif
