/*
 * capture FD FILE MOST
 *
 * Reads packets off a TUN and writes them to FILE as pcap with nanoseconds, until SIGTERM or FILE has MOST octets.
 */
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static unsigned char packet[65536];
static volatile sig_atomic_t over;

static void end(int signal) { (void)signal; over = 1; }

int main(int words, char **word)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody is left behind by a benchmark that was killed */
    if (words != 4)
        return 2;
    struct pollfd device = {.fd = atoi(word[1]), .events = POLLIN};
    FILE *file = fopen(word[2], "w");
    if (file == NULL)
        return 1;
    setvbuf(file, NULL, _IOFBF, 1 << 18);
    const uint32_t head[6] = {0xa1b23c4d, 4 << 16 | 2, 0, 0, sizeof packet, 101}; /* pcap-savefile(5), LINKTYPE_RAW */
    fwrite(head, sizeof head, 1, file);
    signal(SIGTERM, end);
    while (!over && poll(&device, 1, -1) > 0 && ftell(file) < atol(word[3]))
        for (int at = 0; at < 1 << 16; at++) {
            ssize_t length = read(device.fd, packet, sizeof packet);
            if (length <= 0)
                break;
            struct timespec time;
            clock_gettime(CLOCK_REALTIME, &time);
            const uint32_t line[4] = {time.tv_sec, time.tv_nsec, length, length};
            if (!fwrite(line, sizeof line, 1, file) || !fwrite(packet, length, 1, file))
                return 1;
        }
    return over && fclose(file) == 0 ? 0 : 1;
}
