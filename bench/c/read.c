/*
 * read FD bare|flows SKIP
 *
 * Reads packets off a TUN until it is killed and does nothing with them, or keeps a table of flows: both directions of
 * an IPv4 5-tuple, packets, octets, first and last seen. SKIP is the length of the header in front of each packet
 * (virtio_net_hdr: 10).
 */
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, SLOTS = 8192 };

struct flow {
    uint64_t ends, ports;
    uint64_t packets[2], octets[2];
    int64_t first, last;
};

static struct flow flows[SLOTS];
static unsigned char buffer[65536 + 64];

static void count(const unsigned char *packet, size_t length, int64_t seen)
{
    if (length < 20 || packet[0] >> 4 != 4)
        return;
    size_t header = (packet[0] & 15) * 4;
    uint32_t source, destination;
    uint16_t from = 0, to = 0;
    memcpy(&source, packet + 12, 4);
    memcpy(&destination, packet + 16, 4);
    if ((packet[9] == 6 || packet[9] == 17) && length >= header + 4) {
        memcpy(&from, packet + header, 2);
        memcpy(&to, packet + header + 2, 2);
    }
    int back = source > destination || (source == destination && from > to);
    uint64_t ends = back ? (uint64_t)destination << 32 | source : (uint64_t)source << 32 | destination;
    uint64_t ports = (uint64_t)packet[9] << 32 | (back ? (uint32_t)to << 16 | from : (uint32_t)from << 16 | to);
    uint64_t hash = (ends ^ ports * 0x9e3779b97f4a7c15u) * 0x9e3779b97f4a7c15u;
    for (size_t at = hash >> 51, tried = 0; tried < SLOTS; at = (at + 1) % SLOTS, tried++) {
        struct flow *flow = &flows[at];
        if (flow->first == 0) {
            flow->ends = ends;
            flow->ports = ports;
            flow->first = seen;
        } else if (flow->ends != ends || flow->ports != ports) {
            continue;
        }
        flow->packets[back]++;
        flow->octets[back] += length;
        flow->last = seen;
        return;
    }
}

int main(int words, char **word)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody is left behind by a benchmark that was killed */
    if (words != 4)
        return 2;
    struct pollfd device = {.fd = atoi(word[1]), .events = POLLIN};
    int keeps = !strcmp(word[2], "flows");
    size_t skip = atoi(word[3]);
    while (poll(&device, 1, -1) > 0) {
        struct timespec time;
        clock_gettime(CLOCK_REALTIME, &time);
        int64_t seen = time.tv_sec * 1000000000ll + time.tv_nsec;
        for (long at = 0; at < BATCH || !keeps; at++) {
            ssize_t length = read(device.fd, buffer, sizeof buffer);
            if (length <= 0)
                break;
            if (keeps && (size_t)length > skip)
                count(buffer + skip, length - skip, seen);
        }
    }
    return 1;
}
