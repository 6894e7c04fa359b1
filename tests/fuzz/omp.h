/* In the place of OpenMP's header: the fuzz targets are built without it, in one thread, so that they need no
 * second OpenMP runtime and do the same in every run. Only they have this directory among their includes. */
#ifndef IHA_TESTS_FUZZ_OMP_H
#define IHA_TESTS_FUZZ_OMP_H

static inline void omp_set_num_threads(int threads) {
    (void)threads;
}

static inline void omp_set_dynamic(int dynamic) {
    (void)dynamic;
}

static inline void omp_set_max_active_levels(int levels) {
    (void)levels;
}

static inline int omp_get_max_active_levels(void) {
    return 1;
}

static inline int omp_get_max_threads(void) {
    return 1;
}

static inline int omp_get_thread_limit(void) {
    return 1;
}

static inline int omp_get_num_threads(void) {
    return 1;
}

static inline int omp_get_thread_num(void) {
    return 0;
}

#endif
