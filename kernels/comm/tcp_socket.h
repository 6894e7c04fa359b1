/* Sockets as the ranks use them, and addresses as they tell them to each other. Deadlines are those of now().
 */
#ifndef IHA_KERNELS_COMM_TCP_SOCKET_H
#define IHA_KERNELS_COMM_TCP_SOCKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* Seconds since some moment. */
double now(void);
void rest(double seconds);

/* Connected sockets do not block; nothing is held back; a machine that is gone while nothing is on its way to
 * it is noticed within half a minute. */
void tcp_prepare(int fd);

/* -1 and errno. listen: on all of this machine's addresses; port 0: any that is free. */
int tcp_connect(const struct sockaddr *to, socklen_t bytes, double deadline);
int tcp_listen(int port);
int tcp_port(int fd);

/* -1 and errno; 0: the other side hung up; ETIMEDOUT: the deadline came. */
int tcp_send_all(int fd, const void *data, size_t bytes, double deadline);
int tcp_receive_all(int fd, void *data, size_t bytes, double deadline);

/* Has the other side hung up, and is there nothing left to read? */
bool tcp_has_hung_up(int fd);

struct address {
    uint32_t family, port;
    unsigned char ip[16];
};

/* Whom a socket leads to, without the port. */
struct address tcp_peer(int fd);
bool tcp_is_loopback(const struct address *a);
socklen_t tcp_address(const struct address *a, struct sockaddr_storage *out);

#endif
