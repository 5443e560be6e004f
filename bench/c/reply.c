/*
 * reply FD
 *
 * The smallest that answers ICMP echo off a TUN, until it is killed.
 */
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static unsigned char packet[65536];

int main(int words, char **word)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody is left behind by a benchmark that was killed */
    if (words != 2)
        return 2;
    struct pollfd device = {.fd = atoi(word[1]), .events = POLLIN};
    while (poll(&device, 1, -1) > 0)
        for (;;) {
            ssize_t length = read(device.fd, packet, sizeof packet);
            if (length <= 0)
                break;
            size_t header = (packet[0] & 15) * 4;
            unsigned char *echo = packet + header;
            if (packet[0] >> 4 != 4 || packet[9] != 1 || (size_t)length < header + 8 || echo[0] != 8)
                continue;
            unsigned char source[4];
            memcpy(source, packet + 12, 4);
            memcpy(packet + 12, packet + 16, 4);
            memcpy(packet + 16, source, 4);
            echo[0] = 0;
            uint32_t sum = (echo[2] << 8 | echo[3]) + 0x0800; /* RFC 1624: the type went from 8 to 0 */
            sum = (sum & 0xffff) + (sum >> 16);
            echo[2] = sum >> 8;
            echo[3] = sum;
            if (write(device.fd, packet, length) != length)
                continue;
        }
    return 1;
}
