/*
 * forward FD FD
 *
 * Reads packets off either TUN and writes them to the other as they are, virtio_net_hdr and all, until it is killed.
 */
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { BATCH = 64 };

static unsigned char buffer[65536 + 64];

int main(int words, char **word)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody is left behind by a benchmark that was killed */
    if (words != 3)
        return 2;
    struct pollfd ends[2] = {{.fd = atoi(word[1]), .events = POLLIN}, {.fd = atoi(word[2]), .events = POLLIN}};
    while (poll(ends, 2, -1) > 0)
        for (int side = 0; side < 2; side++)
            for (int at = 0; at < BATCH && ends[side].revents; at++) {
                ssize_t length = read(ends[side].fd, buffer, sizeof buffer);
                if (length <= 0)
                    break;
                if (write(ends[!side].fd, buffer, length) != length)
                    continue; /* the other end does not want it: lost, as on a wire */
            }
    return 1;
}
