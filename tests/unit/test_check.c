/* The checks of an operation's arguments: valid ones pass, and invalid ones end the program with a line that
 * names the operation. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/check.h"

static float numbers[64];

static tensor view(enum dtype dtype) {
    return tensor_of(numbers, dtype, 3, 4, 0, 0, 0);
}

static void want_3_by_4(tensor t) {
    check_shape("op", "x", t, DTYPE_F32, 3, 4, 0, 0, 0);
}

static void want_contiguous(tensor t) {
    check_contiguous("op", "x", t);
}

static void want_16_bytes(tensor t) {
    if (check_workspace("op", t.data, (size_t)t.shape[0], 16) != t.data)
        _exit(1);
}

/* Whether check(t), run in a process of its own, aborts with a message. */
static bool refuses(void (*check)(tensor), tensor t) {
    int pipes[2], status;
    char said[512];
    fflush(stdout);
    assert_int_equal(pipe(pipes), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
        signal(SIGABRT, SIG_DFL);
        dup2(pipes[1], STDERR_FILENO);
        check(t);
        _exit(0);
    }
    close(pipes[1]);
    ssize_t length = read(pipes[0], said, sizeof said - 1);
    close(pipes[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    said[length > 0 ? length : 0] = '\0';
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return false;
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    assert_int_equal(strncmp(said, "op: ", 4), 0);
    return true;
}

static void shapes(void **state) {
    (void)state;
    assert_false(refuses(want_3_by_4, view(DTYPE_F32)));
    assert_true(refuses(want_3_by_4, view(DTYPE_I32)));
    assert_true(refuses(want_3_by_4, tensor_of(NULL, DTYPE_F32, 3, 4, 0, 0, 0)));
    assert_true(refuses(want_3_by_4, tensor_of(numbers, DTYPE_F32, 3, 5, 0, 0, 0)));
    assert_true(refuses(want_3_by_4, tensor_of(numbers, DTYPE_F32, 2, 4, 0, 0, 0)));
    assert_true(refuses(want_3_by_4, tensor_of(numbers, DTYPE_F32, 3, 4, 1, 0, 0)));
    assert_true(refuses(want_3_by_4, tensor_of(numbers, DTYPE_F32, 12, 0, 0, 0, 0)));
    tensor apart = view(DTYPE_F32);
    apart.stride[0] = 6; /* rows may lie apart */
    assert_false(refuses(want_3_by_4, apart));
    apart.stride[1] = 2; /* and not their elements */
    assert_true(refuses(want_3_by_4, apart));
}

static void gaps_and_alignment(void **state) {
    (void)state;
    assert_false(refuses(want_contiguous, view(DTYPE_F32)));
    assert_true(refuses(want_contiguous, tensor_of(NULL, DTYPE_F32, 3, 4, 0, 0, 0)));
    tensor apart = view(DTYPE_F32), odd = view(DTYPE_F32);
    apart.stride[0] = 6;
    assert_true(refuses(want_contiguous, apart));
    odd.data = (char *)numbers + 2;
    assert_true(refuses(want_contiguous, odd));
    odd.dtype = DTYPE_BF16;
    assert_false(refuses(want_contiguous, odd));
}

static void workspace(void **state) {
    (void)state;
    assert_false(refuses(want_16_bytes, tensor_of(numbers, DTYPE_F32, 16, 0, 0, 0, 0)));
    assert_true(refuses(want_16_bytes, tensor_of(numbers, DTYPE_F32, 15, 0, 0, 0, 0)));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes),
        cmocka_unit_test(gaps_and_alignment),
        cmocka_unit_test(workspace),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
