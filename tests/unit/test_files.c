/* The file-system functions: what each leaves on the disk, and its errors.
 *
 * Everything happens in a temporary directory that is the current one while the tests run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "model/checkpoint/files.h"
#include "tests/lib/counted_fsync.h"
#include "tests/lib/temporary_directory.h"

static int exists(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0;
}

static void check_content(const char *path, const char *expected) {
    char *data;
    size_t length;
    assert_int_equal(files_read_all(path, 1000, &data, &length, NULL), 0);
    assert_int_equal(length, strlen(expected));
    assert_string_equal(data, expected);
    free(data);
}

static void put(const char *path, const char *text) {
    assert_int_equal(files_write_synced(path, text, strlen(text), NULL), 0);
}

static void check_error(const struct error *e, int exit_code, const char *path, const char *expected) {
    if (e->exit_code != exit_code || !strstr(e->text, path) || !strstr(e->text, expected))
        fail_msg("exit %d, \"%s\": not exit %d with \"%s\" and \"%s\"", e->exit_code, e->text, exit_code,
                 path, expected);
}

/* ---- reading and writing ---- */

static void test_read_and_write(void **state) {
    (void)state;
    put("a", "hello");
    check_content("a", "hello");
    put("a", "bye"); /* shorter: nothing of the old content may remain */
    check_content("a", "bye");
    assert_int_equal(files_write_synced("a", NULL, 0, NULL), 0);
    check_content("a", "");
    char *data;
    size_t length;
    assert_int_equal(files_write_synced("a", "x\0y", 3, NULL), 0);
    assert_int_equal(files_read_all("a", 3, &data, &length, NULL), 0);
    assert_int_equal(length, 3);
    assert_memory_equal(data, "x\0y", 4);
    free(data);
    assert_int_equal(files_read_all("a", 3, &data, NULL, NULL), 0);
    free(data);
}

static void test_read_limits(void **state) {
    (void)state;
    struct error e = {0};
    char *data;
    put("a", "12345");
    assert_int_equal(files_read_all("a", 4, &data, NULL, &e), -1);
    assert_null(data);
    check_error(&e, EXIT_USER, "\"a\"", "larger than the 4 bytes");
    assert_int_equal(files_read_all("a", SIZE_MAX, &data, NULL, &e), 0);
    free(data);
    /* Without a size: an endless file, and one in /proc. */
    assert_int_equal(files_read_all("/dev/zero", 100000, &data, NULL, &e), -1);
    check_error(&e, EXIT_USER, "/dev/zero", "larger");
    assert_int_equal(files_read_all("/proc/self/status", 1 << 20, &data, NULL, &e), 0);
    assert_non_null(strstr(data, "VmRSS"));
    free(data);
    assert_int_equal(files_read_all("absent", 9, &data, NULL, &e), -1);
    check_error(&e, EXIT_USER, "\"absent\"", "No such file or directory; check the path");
    assert_int_equal(files_read_all(".", 9, &data, NULL, &e), -1);
    check_error(&e, EXIT_USER, "\".\"", "Is a directory");
    assert_null(data);
}

static void test_read_grows(void **state) {
    (void)state;
    enum { BYTES = 300000 };
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        char *text = malloc(BYTES);
        memset(text, 'p', BYTES);
        _exit(files_write_fd(ends[1], text, BYTES));
    }
    close(ends[1]);
    char name[32], *data;
    size_t length;
    snprintf(name, sizeof name, "/dev/fd/%d", ends[0]);
    assert_int_equal(files_read_all(name, 1 << 20, &data, &length, NULL), 0);
    assert_int_equal(length, BYTES);
    assert_int_equal(strspn(data, "p"), BYTES);
    free(data);
    close(ends[0]);
    waitpid(child, NULL, 0);
}

static void test_write_failures(void **state) {
    (void)state;
    struct error e = {0};
    assert_int_equal(files_write_synced("/dev/full", "x", 1, &e), -1);
    check_error(&e, EXIT_RUN, "/dev/full", "No space left on device; free some disk space");
    assert_int_equal(files_write_synced("absent/a", "x", 1, &e), -1);
    check_error(&e, EXIT_RUN, "absent/a", "No such file or directory");
    struct rlimit before, low;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    low = before;
    low.rlim_cur = 3;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    int result = files_write_synced("limited", "12345", 5, &e);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(result, -1);
    check_error(&e, EXIT_RUN, "limited", "ulimit -f");
    check_content("limited", "123");
}

static volatile sig_atomic_t alarms;

static void count_alarm(int signal_number) {
    (void)signal_number;
    alarms++;
}

/* Read a pipe slowly to its end; the exit status says whether every byte came once and in order. */
static void read_slowly(int fd, size_t expected) {
    static unsigned char piece[20000];
    size_t total = 0;
    ssize_t n;
    while ((n = read(fd, piece, sizeof piece)) > 0) {
        for (ssize_t i = 0; i < n; i++)
            if (piece[i] != (unsigned char)((total + (size_t)i) % 251))
                _exit(1);
        total += (size_t)n;
        usleep(1000);
    }
    _exit(total == expected ? 0 : 2);
}

/* Writing to a full pipe while a timer interrupts: each interruption ends write(2) short or with EINTR. */
static void test_write_interrupted(void **state) {
    (void)state;
    enum { BYTES = 2000000 };
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        close(ends[1]);
        read_slowly(ends[0], BYTES);
    }
    close(ends[0]);
    unsigned char *data = malloc(BYTES);
    assert_non_null(data);
    for (size_t i = 0; i < BYTES; i++)
        data[i] = (unsigned char)(i % 251);
    struct sigaction action = {.sa_handler = count_alarm}; /* without SA_RESTART */
    sigaction(SIGALRM, &action, NULL);
    struct itimerval every = {.it_interval.tv_usec = 500, .it_value.tv_usec = 500}, never = {0};
    setitimer(ITIMER_REAL, &every, NULL);
    int err = files_write_fd(ends[1], data, BYTES);
    setitimer(ITIMER_REAL, &never, NULL);
    signal(SIGALRM, SIG_DFL);
    close(ends[1]);
    free(data);
    assert_int_equal(err, 0);
    assert_true(alarms > 0);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* ---- directories ---- */

static void test_make_dirs(void **state) {
    (void)state;
    struct error e = {0};
    assert_int_equal(files_make_dirs("m/a/b", &e), 0);
    assert_int_equal(files_make_dirs("m/a/b", &e), 0);
    assert_int_equal(files_make_dirs("m//c///d//", &e), 0);
    assert_int_equal(files_make_dirs(".", &e), 0);
    assert_int_equal(files_make_dirs("/", &e), 0);
    assert_int_equal(files_make_dirs("./m/../m/e", &e), 0);
    char absolute[sizeof temporary_directory + 16];
    snprintf(absolute, sizeof absolute, "%s/m/f/g", temporary_directory);
    assert_int_equal(files_make_dirs(absolute, &e), 0);
    assert_true(exists("m/a/b/.") && exists("m/c/d/.") && exists("m/e/.") && exists("m/f/g/."));
    assert_int_equal(symlink("a", "m/link"), 0);
    assert_int_equal(files_make_dirs("m/link/h", &e), 0);
    assert_true(exists("m/a/h/."));

    put("m/file", "x");
    assert_int_equal(files_make_dirs("m/file", &e), -1);
    check_error(&e, EXIT_USER, "\"m/file\"", "Not a directory");
    assert_int_equal(files_make_dirs("m/file/below/it", &e), -1);
    check_error(&e, EXIT_USER, "\"m/file\"", "Not a directory");
    assert_int_equal(files_make_dirs("", &e), -1);
    check_error(&e, EXIT_USER, "\"\"", "check the path");
    assert_int_equal(files_make_dirs("/proc/nothing", &e), -1);
    check_error(&e, EXIT_USER, "/proc/nothing", "cannot make the directory");
}

static void test_remove_tree(void **state) {
    (void)state;
    struct error e = {0};
    assert_int_equal(files_make_dirs("r/tree/deep/er", &e), 0);
    assert_int_equal(files_make_dirs("r/kept", &e), 0);
    put("r/kept/file", "kept");
    put("r/tree/deep/er/file", "x");
    put("r/tree/.hidden", "x");
    assert_int_equal(mkfifo("r/tree/fifo", 0600), 0);
    assert_int_equal(symlink("../kept", "r/tree/to_dir"), 0);
    assert_int_equal(symlink("../kept/file", "r/tree/to_file"), 0);
    assert_int_equal(symlink("nowhere", "r/tree/dangling"), 0);
    char name[64];
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "r/tree/deep/%d", i);
        close(open(name, O_CREAT | O_WRONLY, 0600));
    }
    assert_int_equal(files_remove_tree("r/tree", &e), 0);
    assert_false(exists("r/tree"));
    check_content("r/kept/file", "kept");
    assert_int_equal(files_remove_tree("r/tree", &e), 0); /* removed already */
    assert_int_equal(files_remove_tree("r/absent/tree", &e), 0);

    assert_int_equal(symlink("kept", "r/link"), 0);
    assert_int_equal(files_remove_tree("r/link/", &e), 0); /* the slash must not lead through the link */
    assert_false(exists("r/link"));
    check_content("r/kept/file", "kept");
    assert_int_equal(files_remove_tree("r/kept/", &e), 0);
    assert_false(exists("r/kept"));
}

static void test_remove_tree_refuses(void **state) {
    (void)state;
    static const char *const paths[] = {"", "/", "//", ".", "..", "q/.", "q/../", "./"};
    assert_int_equal(files_make_dirs("q/inside", NULL), 0);
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        struct error e = {0};
        assert_int_equal(files_remove_tree(paths[i], &e), -1);
        check_error(&e, EXIT_RUN, paths[i], "name the directory itself");
    }
    assert_true(exists("q/inside"));
    struct error e = {0};
    assert_int_equal(files_remove_tree("/proc/self/task", &e), -1);
    check_error(&e, EXIT_RUN, "/proc/self/task", "stopped at");
}

static void test_publish_dir(void **state) {
    (void)state;
    struct error e = {0};
    assert_int_equal(files_make_dirs("p/step_1.tmp", &e), 0);
    put("p/step_1.tmp/file", "1");
    assert_int_equal(files_publish_dir("p/step_1.tmp", "p/step_1", &e), 0);
    assert_false(exists("p/step_1.tmp"));
    check_content("p/step_1/file", "1");
    /* An existing one that is not empty is left as it is. */
    assert_int_equal(files_make_dirs("p/step_1.tmp", &e), 0);
    put("p/step_1.tmp/file", "2");
    assert_int_equal(files_publish_dir("p/step_1.tmp", "p/step_1", &e), -1);
    check_error(&e, EXIT_RUN, "\"p/step_1.tmp\" to \"p/step_1\"", "out of the way");
    check_content("p/step_1/file", "1");
    check_content("p/step_1.tmp/file", "2");
    assert_int_equal(files_publish_dir("p/absent", "p/step_2", &e), -1);
    check_error(&e, EXIT_RUN, "p/absent", "No such file");
    /* A name without a directory in it. */
    assert_int_equal(files_make_dirs("step.tmp", &e), 0);
    assert_int_equal(files_publish_dir("step.tmp", "step", &e), 0);
    assert_true(exists("step"));
}

static void test_sync_dir(void **state) {
    (void)state;
    struct error e = {0};
    assert_int_equal(files_sync_dir(".", &e), 0);
    assert_int_equal(files_sync_dir("absent", &e), -1);
    check_error(&e, EXIT_RUN, "absent", "No such file");
    put("plain", "x");
    assert_int_equal(files_sync_dir("plain", &e), -1);
    check_error(&e, EXIT_RUN, "plain", "Not a directory");
}

static void check_link(const char *path, const char *expected) {
    char target[100] = "";
    assert_true(readlink(path, target, sizeof target - 1) > 0);
    assert_string_equal(target, expected);
}

/* Each function syncs what it promises, and reports failures. */
static void test_synced(void **state) {
    (void)state;
    struct error e = {0};
    sync_calls = 0;
    put("s", "x");
    assert_int_equal(sync_calls, 1);
    assert_int_equal(files_make_dirs("sync/one.tmp", &e), 0); /* a parent for each directory made */
    assert_int_equal(sync_calls, 3);
    assert_int_equal(files_make_dirs("sync/one.tmp", &e), 0);
    assert_int_equal(sync_calls, 3);
    assert_int_equal(files_publish_dir("sync/one.tmp", "sync/one", &e), 0); /* the directory, its parent */
    assert_int_equal(sync_calls, 5);
    assert_int_equal(files_link_replace("one", "sync/best", &e), 0);
    assert_int_equal(sync_calls, 6);

    sync_errno = EIO;
    assert_int_equal(files_write_synced("s", "x", 1, &e), -1);
    check_error(&e, EXIT_RUN, "\"s\"", "Input/output error; check the disk");
    assert_int_equal(files_publish_dir("sync/one", "sync/two", &e), -1);
    check_error(&e, EXIT_RUN, "sync/one", "Input/output error");
    assert_false(exists("sync/two")); /* not renamed, since its names may be lost */
    assert_int_equal(files_make_dirs("sync/three", &e), -1);
    check_error(&e, EXIT_RUN, "sync", "Input/output error");
    sync_errno = EINVAL; /* "cannot be synced" is no error for a directory, and one for a file */
    assert_int_equal(files_sync_dir("sync", &e), 0);
    assert_int_equal(files_write_synced("s", "x", 1, &e), -1);
    sync_errno = 0;
}

static void test_link_replace(void **state) {
    (void)state;
    struct error e = {0};
    assert_int_equal(files_make_dirs("l/step_1", &e), 0);
    assert_int_equal(files_make_dirs("l/step_2", &e), 0);
    assert_int_equal(files_link_replace("step_1", "l/best", &e), 0);
    check_link("l/best", "step_1");
    assert_int_equal(files_link_replace("step_2", "l/best", &e), 0); /* not a link inside step_1 */
    check_link("l/best", "step_2");
    assert_int_equal(symlink("stale", "l/best.tmp"), 0); /* left by a crash */
    assert_int_equal(files_link_replace("step_1", "l/best", &e), 0);
    check_link("l/best", "step_1");
    assert_false(exists("l/best.tmp"));
    assert_int_equal(files_link_replace("step_1", "l/step_2", &e), -1); /* a directory is no link */
    check_error(&e, EXIT_RUN, "l/step_2", "cannot link");
    assert_false(exists("l/step_2.tmp"));
    assert_int_equal(files_link_replace("x", "absent/best", &e), -1);
    check_error(&e, EXIT_RUN, "absent/best", "No such file");
}

/* ---- locking, space ---- */

/* In a child, since a lock belongs to an open file and the child opens its own: 0 when it got the lock. */
static int child_locks(const char *path, const char *expected) {
    pid_t child = fork();
    if (child == 0) {
        struct error e = {0};
        if (files_lock(path, &e) >= 0)
            _exit(0);
        _exit(e.exit_code == EXIT_USER && strstr(e.text, path) && strstr(e.text, expected) ? 1 : 2);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void test_lock(void **state) {
    (void)state;
    struct error e = {0};
    put("lock", "99999999999\n"); /* of a process that has ended */
    int fd = files_lock("lock", &e);
    assert_true(fd >= 0);
    char pid[32], expected[64];
    snprintf(pid, sizeof pid, "%ld\n", (long)getpid());
    check_content("lock", pid);
    snprintf(expected, sizeof expected, "is in use by another process (pid %ld)", (long)getpid());
    assert_int_equal(child_locks("lock", expected), 1);
    check_content("lock", pid); /* unchanged by the child, which did not get the lock */
    close(fd);
    assert_int_equal(child_locks("lock", ""), 0); /* and the child's end frees it again */
    fd = files_lock("lock", &e);
    assert_true(fd >= 0);
    assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    assert_int_equal(ftruncate(fd, 0), 0); /* its owner has not written its pid yet */
    assert_int_equal(child_locks("lock", "(pid unknown)"), 1);
    close(fd);
    assert_int_equal(files_lock("absent/lock", &e), -1);
    check_error(&e, EXIT_USER, "absent/lock", "No such file");
    assert_int_equal(files_lock("/dev/full", &e), -1); /* a pid that cannot be written */
    check_error(&e, EXIT_RUN, "/dev/full", "No space left");
}

static void test_free_bytes(void **state) {
    (void)state;
    assert_true(files_free_bytes(".") > 0);
    assert_int_equal(files_free_bytes("absent"), -1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read_and_write),
        cmocka_unit_test(test_read_limits),
        cmocka_unit_test(test_read_grows),
        cmocka_unit_test(test_write_failures),
        cmocka_unit_test(test_write_interrupted),
        cmocka_unit_test(test_make_dirs),
        cmocka_unit_test(test_remove_tree),
        cmocka_unit_test(test_remove_tree_refuses),
        cmocka_unit_test(test_publish_dir),
        cmocka_unit_test(test_sync_dir),
        cmocka_unit_test(test_synced),
        cmocka_unit_test(test_link_replace),
        cmocka_unit_test(test_lock),
        cmocka_unit_test(test_free_bytes),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
