/*
 * segments DESTINATION SIZE COUNT
 *
 * Sends COUNT times SIZE octets of UDP to DESTINATION in one piece each, for the device to cut (UDP_SEGMENT, udp(7)),
 * until SIGTERM. The octets are spliced from a file in memory, so that the sender copies nothing and is not the limit;
 * where the kernel does not splice into UDP they are sent the usual way. Prints how many pieces.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

static volatile sig_atomic_t over;

static void end(int signal) { (void)signal; over = 1; }

int main(int count, char **words)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody is left behind by a benchmark that was killed */
    if (count != 4)
        return 2;
    int size = atoi(words[2]), length = size * atoi(words[3]);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(5001)};
    inet_pton(AF_INET, words[1], &to.sin_addr);
    int fd = socket(AF_INET, SOCK_DGRAM, 0), file = memfd_create("segments", 0);
    char *octets = calloc(1, length);
    if (fd < 0 || file < 0 || octets == NULL || write(file, octets, length) != length ||
        connect(fd, (struct sockaddr *)&to, sizeof to) || setsockopt(fd, SOL_UDP, UDP_SEGMENT, &size, sizeof size)) {
        perror("segments");
        return 1;
    }
    signal(SIGTERM, end);
    unsigned long pieces = 0;
    int splices = 1;
    while (!over) {
        off_t at = 0;
        ssize_t took = splices ? sendfile(fd, file, &at, length) : send(fd, octets, length, 0);
        if (took == length) {
            pieces++;
        } else if (splices) {
            splices = 0;
        } else if (errno != EINTR && errno != ENOBUFS && errno != EAGAIN) {
            perror("segments");
            return 1;
        }
    }
    printf("%lu %s\n", pieces, splices ? "spliced" : "copied");
    return 0;
}
