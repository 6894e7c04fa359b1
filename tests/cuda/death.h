/* Tests of what must end a program. */
#ifndef IHA_TESTS_CUDA_DEATH_H
#define IHA_TESTS_CUDA_DEATH_H

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

/* Run f(argument) in a child, which must die and say `message`. */
static inline void expect_death(void (*f)(int), int argument, const char *message) {
    int out[2];
    assert_int_equal(pipe(out), 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        int fatal[] = {SIGABRT, SIGSEGV, SIGBUS};
        for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++)
            signal(fatal[i], SIG_DFL); /* cmocka's would carry on with the next test */
        dup2(out[1], STDERR_FILENO);
        f(argument);
        _exit(0);
    }
    close(out[1]);
    char text[16384] = "";
    size_t length = 0;
    for (ssize_t n; (n = read(out[0], text + length, sizeof text - 1 - length)) > 0;)
        length += (size_t)n;
    close(out[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        fail_msg("nothing was caught; expected \"%s\"", message);
    if (!strstr(text, message))
        fail_msg("expected \"%s\", got: %s", message, text);
}

#endif
