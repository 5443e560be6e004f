/*
 * tcp sink ADDRESS | tcp source ADDRESS SECONDS
 *
 * Where there is no iperf3: one TCP connection, as much as goes. The sink prints octets and seconds.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 17];

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int words, char **word)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody is left behind by a benchmark that was killed */
    if (words < 3)
        return 2;
    struct sockaddr_in end = {.sin_family = AF_INET, .sin_port = htons(5201)};
    inet_pton(AF_INET, word[2], &end.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    if (!strcmp(word[1], "sink")) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (bind(fd, (struct sockaddr *)&end, sizeof end) || listen(fd, 1))
            return 1;
        int from = accept(fd, NULL, NULL);
        double begun = now();
        unsigned long octets = 0;
        for (ssize_t took; (took = read(from, buffer, sizeof buffer)) > 0; octets += took)
            ;
        printf("%lu %f\n", octets, now() - begun);
        return 0;
    }
    if (words != 4 || connect(fd, (struct sockaddr *)&end, sizeof end))
        return 1;
    for (double until = now() + atof(word[3]); now() < until;)
        if (write(fd, buffer, sizeof buffer) < 0)
            return 1;
    return 0;
}
