/* Non-blocking TCP sockets, and addresses in the form that ranks send each other. Deadlines are in the
 * time of clock_seconds(). */
#ifndef IHA_KERNELS_COMM_TCP_SOCKET_H
#define IHA_KERNELS_COMM_TCP_SOCKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* For a connected socket: non-blocking, no delay, and keepalive probes that find an unreachable machine
 * within half a minute when no data is in flight. */
void tcp_set_options(int fd);

/* A socket, or -1 and errno. listen: on all addresses of this machine; port 0: any free one. */
int tcp_connect(const struct sockaddr *to, socklen_t bytes, double deadline);
int tcp_listen(int port);
int tcp_local_port(int fd);

/* -1 and errno; 0: the peer closed the connection; ETIMEDOUT: the deadline has passed. */
int tcp_send_all(int fd, const void *data, size_t bytes, double deadline);
int tcp_receive_all(int fd, void *data, size_t bytes, double deadline);

/* Whether the peer has closed the connection and nothing is left to read. */
bool tcp_is_closed(int fd);

struct tcp_address {
    uint32_t family, port;
    unsigned char ip[16];
};

/* The address at the other end of a socket, without its port. */
struct tcp_address tcp_peer_address(int fd);
bool tcp_is_loopback(const struct tcp_address *a);
socklen_t tcp_to_sockaddr(const struct tcp_address *a, struct sockaddr_storage *out);

#endif
