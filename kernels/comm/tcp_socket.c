#include "kernels/comm/tcp_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "kernels/clock.h"

/* ---- sockets ---- */

void tcp_set_options(int fd) {
    int on = 1, idle = 10, interval = 5, probes = 3;
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
}

/* Wait until fd is ready for `events`; false: the deadline has passed. */
static bool wait_ready(int fd, short events, double deadline) {
    struct pollfd p = {.fd = fd, .events = events};
    for (;;) {
        double left = clock_seconds_left(deadline);
        if (left <= 0)
            return false;
        if (poll(&p, 1, left < 1 ? (int)(left * 1000) + 1 : 1000) > 0)
            return true;
    }
}

int tcp_send_all(int fd, const void *data, size_t bytes, double deadline) {
    for (size_t sent = 0; sent < bytes;) {
        ssize_t n = send(fd, (const char *)data + sent, bytes - sent, MSG_NOSIGNAL);
        if (n > 0)
            sent += (size_t)n;
        else if (errno != EINTR && (errno != EAGAIN || !wait_ready(fd, POLLOUT, deadline)))
            return -1;
    }
    return 0;
}

int tcp_receive_all(int fd, void *data, size_t bytes, double deadline) {
    for (size_t got = 0; got < bytes;) {
        ssize_t n = recv(fd, (char *)data + got, bytes - got, 0);
        if (n > 0) {
            got += (size_t)n;
        } else if (n == 0) {
            errno = 0;
            return -1;
        } else if (errno != EINTR && errno != EAGAIN) {
            return -1;
        } else if (!wait_ready(fd, POLLIN, deadline)) {
            errno = ETIMEDOUT;
            return -1;
        }
    }
    return 0;
}

int tcp_connect(const struct sockaddr *to, socklen_t bytes, double deadline) {
    int fd = socket(to->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), error_number = 0;
    socklen_t length = sizeof error_number;
    if (fd < 0)
        return -1;
    if (connect(fd, to, bytes) != 0) {
        error_number = errno;
        if (error_number == EINPROGRESS && !wait_ready(fd, POLLOUT, deadline))
            error_number = ETIMEDOUT;
        else if (error_number == EINPROGRESS)
            getsockopt(fd, SOL_SOCKET, SO_ERROR, &error_number, &length);
    }
    if (error_number == 0) {
        tcp_set_options(fd);
        return fd;
    }
    close(fd);
    errno = error_number;
    return -1;
}

int tcp_listen(int port) {
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int on = 1, off = 0, fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), status = -1;
    if (fd >= 0) { /* for IPv4 and IPv6 */
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        status = bind(fd, (struct sockaddr *)&v6, sizeof v6);
    }
    if (status != 0 && (fd < 0 || errno == EADDRNOTAVAIL)) { /* a machine without IPv6 */
        if (fd >= 0)
            close(fd);
        fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        status = bind(fd, (struct sockaddr *)&v4, sizeof v4);
    }
    if (status == 0 && listen(fd, SOMAXCONN) == 0)
        return fd;
    int error_number = errno;
    if (fd >= 0)
        close(fd);
    errno = error_number;
    return -1;
}

/* ---- addresses ---- */

static struct tcp_address from_sockaddr(const struct sockaddr_storage *s) {
    struct tcp_address a = {.family = s->ss_family};
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)s;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)s;
    if (s->ss_family == AF_INET) {
        memcpy(a.ip, &v4->sin_addr, 4);
    } else if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
        a.family = AF_INET;
        memcpy(a.ip, v6->sin6_addr.s6_addr + 12, 4);
    } else {
        memcpy(a.ip, &v6->sin6_addr, 16);
    }
    return a;
}

socklen_t tcp_to_sockaddr(const struct tcp_address *a, struct sockaddr_storage *s) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)a->port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)a->port)};
    memcpy(&v4.sin_addr, a->ip, 4);
    memcpy(&v6.sin6_addr, a->ip, 16);
    memset(s, 0, sizeof *s);
    if (a->family == AF_INET)
        memcpy(s, &v4, sizeof v4);
    else
        memcpy(s, &v6, sizeof v6);
    return a->family == AF_INET ? sizeof v4 : sizeof v6;
}

bool tcp_is_loopback(const struct tcp_address *a) {
    static const unsigned char v6[16] = {[15] = 1};
    return a->family == AF_INET ? a->ip[0] == 127 : memcmp(a->ip, v6, sizeof v6) == 0;
}

struct tcp_address tcp_peer_address(int fd) {
    struct sockaddr_storage s = {.ss_family = AF_INET};
    socklen_t bytes = sizeof s;
    getpeername(fd, (struct sockaddr *)&s, &bytes);
    return from_sockaddr(&s);
}

int tcp_local_port(int fd) {
    struct sockaddr_storage s = {0};
    socklen_t bytes = sizeof s;
    getsockname(fd, (struct sockaddr *)&s, &bytes);
    return ntohs(s.ss_family == AF_INET ? ((struct sockaddr_in *)&s)->sin_port
                                        : ((struct sockaddr_in6 *)&s)->sin6_port);
}

bool tcp_is_closed(int fd) {
    char byte;
    ssize_t n = recv(fd, &byte, 1, MSG_PEEK);
    return n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
}
