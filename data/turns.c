#include "data/turns.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <unistd.h>

#include "kernels/at_start.h"

enum { MAX_TURN = 1 << 24, STEP = 1 << 16 }; /* bytes */

static void ignore(int number) {
    (void)number;
}

void turns_open(struct turns *t) {
    sigset_t interrupt;
    struct sigaction action = {.sa_handler = ignore};
    *t = (struct turns){.terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO)};
    at_start_keep_ignored();
    if (at_start_ignored(SIGINT))
        return; /* it stays ignored; blocked, it would be kept until turns_interrupted() asks for it */
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    pthread_sigmask(SIG_BLOCK, &interrupt, NULL);
    sigaction(SIGINT, &action, NULL); /* a handler, so that waiting ends */
}

void turns_close(struct turns *t) {
    free(t->bytes);
    *t = (struct turns){0};
}

bool turns_interrupted(struct turns *t) {
    sigset_t pending, interrupt;
    int number;
    if (sigpending(&pending) != 0 || !sigismember(&pending, SIGINT))
        return false;
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    sigwait(&interrupt, &number);
    t->interrupted |= !t->terminal;
    return true;
}

/* Wait until there is input; false: Ctrl-C, which is let through only here. */
static bool wait_for_input(void) {
    fd_set input;
    sigset_t mask;
    FD_ZERO(&input);
    FD_SET(STDIN_FILENO, &input);
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    sigdelset(&mask, SIGINT);
    for (;;) {
        int ready = pselect(STDIN_FILENO + 1, &input, NULL, NULL, NULL, &mask);
        if (ready >= 0 || errno != EINTR)
            return true; /* an error is read()'s to report */
        return false;
    }
}

/* Read on: 1, or 0 at the end of the input and after Ctrl-C, or -1. */
static int read_more(struct turns *t, struct error *e) {
    if (t->length > MAX_TURN)
        return fail_user(e, "standard input: a line of more than %d bytes", MAX_TURN);
    if (t->capacity - t->length < STEP) {
        char *more = realloc(t->bytes, t->capacity + STEP);
        if (!more)
            return fail_run(e, "out of memory for a line of the standard input");
        t->bytes = more;
        t->capacity += STEP;
    }
    if (!wait_for_input())
        return 0;
    ssize_t n;
    do
        n = read(STDIN_FILENO, t->bytes + t->length, t->capacity - t->length);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return fail_user(e, "standard input: cannot be read: %s", strerror(errno));
    t->length += (size_t)n;
    t->at_end = n == 0;
    return n > 0;
}

static bool is_blank(const char *text, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (!memchr(" \t\r\v\f", text[i], 5))
            return false;
    return true;
}

/* The next line, blank or not: 1, 0 or -1 as above. */
static int read_line(struct turns *t, const char **text, size_t *length, struct error *e) {
    memmove(t->bytes, t->bytes + t->at, t->length - t->at);
    t->length -= t->at;
    t->at = 0;
    size_t searched = 0;
    for (;;) {
        char *end = searched < t->length ? memchr(t->bytes + searched, '\n', t->length - searched) : NULL;
        searched = t->length;
        if (!end && !t->at_end) {
            int more = read_more(t, e);
            if (more < 0 || (more == 0 && !t->at_end))
                return more;
            continue;
        }
        *text = t->bytes;
        *length = end ? (size_t)(end - t->bytes) : t->length;
        t->at = end ? *length + 1 : t->length;
        if (*length > 0 && (*text)[*length - 1] == '\r')
            --*length;
        return end || t->length > 0;
    }
}

int turns_read(struct turns *t, const char **text, size_t *length, struct error *e) {
    int status = 1;
    if (!t->bytes && !(t->bytes = malloc(t->capacity = STEP)))
        return fail_run(e, "out of memory for a line of the standard input");
    while (status > 0 && !t->interrupted) {
        if (t->terminal) {
            fputs("> ", stdout);
            fflush(stdout);
        }
        status = read_line(t, text, length, e);
        if (status > 0 && !is_blank(*text, *length))
            return 1;
    }
    if (t->terminal)
        fputc('\n', stdout);
    return status < 0 ? -1 : 0;
}
