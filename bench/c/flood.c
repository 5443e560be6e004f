/*
 * flood IFNAME udp|icmp|sockets SOURCE DESTINATION LENGTH FLOWS RATE
 *
 * Sends IPv4 packets of LENGTH octets (with their IP header) out of IFNAME until SIGTERM, RATE a second or, with 0, as
 * fast as they go: past routing and queueing discipline, so that the reader of a TUN is the limit and not the sender;
 * or (sockets) from an ordinary UDP socket. Flows differ in the destination port or in the destination address (icmp, upwards from DESTINATION).
 * Prints how many the device took and how many it refused.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BURST = 32, BEHIND_MAX = 128 };

static volatile sig_atomic_t over;

static void end(int signal) { (void)signal; over = 1; }

static unsigned short checksum(const void *data, size_t length)
{
    const unsigned char *octets = data;
    unsigned long sum = 0;
    for (size_t at = 0; at < length; at++)
        sum += at & 1 ? octets[at] : (unsigned long)octets[at] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return htons(~sum & 0xffff);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int count, char **words)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody is left behind by a benchmark that was killed */
    if (count != 8)
        return 2;
    int icmp = !strcmp(words[2], "icmp");
    int sockets = !strcmp(words[2], "sockets");
    size_t length = atoi(words[5]);
    long flows = atol(words[6]);
    double rate = atof(words[7]);
    unsigned char *packets = calloc(flows, length);
    if (packets == NULL || length < sizeof(struct iphdr) + 8)
        return 2;
    for (long flow = 0; flow < flows; flow++) {
        unsigned char *packet = packets + flow * length;
        struct iphdr ip = {.version = 4, .ihl = 5, .ttl = 64, .tot_len = htons(length), .id = htons(flow)};
        size_t rest = length - sizeof ip;
        ip.protocol = icmp ? IPPROTO_ICMP : IPPROTO_UDP;
        inet_pton(AF_INET, words[3], &ip.saddr);
        inet_pton(AF_INET, words[4], &ip.daddr);
        if (icmp)
            ip.daddr = htonl(ntohl(ip.daddr) + flow);
        ip.check = checksum(&ip, sizeof ip);
        memcpy(packet, &ip, sizeof ip);
        if (icmp) {
            struct icmphdr *echo = (struct icmphdr *)(packet + sizeof ip);
            echo->type = ICMP_ECHO;
            echo->un.echo.sequence = htons(flow);
            echo->checksum = checksum(echo, rest);
        } else {
            struct udphdr *udp = (struct udphdr *)(packet + sizeof ip);
            udp->source = htons(40000);
            udp->dest = htons(1024 + flow);
            udp->len = htons(rest); /* no checksum: RFC 768 allows it, and nobody here looks */
        }
    }

    /* Protocol 0: it sends only; another would hand it a copy of what comes in. */
    int fd = socket(AF_PACKET, SOCK_DGRAM, 0);
    int yes = 1;
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)};
    to.sll_ifindex = if_nametoindex(words[1]);
    if (fd < 0 || to.sll_ifindex == 0 || setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &yes, sizeof yes)) {
        perror("flood");
        return 1;
    }
    signal(SIGTERM, end);
    prctl(PR_SET_TIMERSLACK, 1);
    struct iovec parts[BURST];
    struct mmsghdr messages[BURST];
    memset(messages, 0, sizeof messages);
    for (int at = 0; at < BURST; at++) {
        parts[at].iov_len = length;
        messages[at].msg_hdr = (struct msghdr){
            .msg_name = &to, .msg_namelen = sizeof to, .msg_iov = &parts[at], .msg_iovlen = 1};
    }
    struct sockaddr_in ports[BURST];
    if (sockets) {
        close(fd);
        fd = socket(AF_INET, SOCK_DGRAM, 0);
        for (int at = 0; at < BURST; at++) {
            ports[at] = (struct sockaddr_in){.sin_family = AF_INET};
            inet_pton(AF_INET, words[4], &ports[at].sin_addr);
            parts[at].iov_len = length - 28;
            messages[at].msg_hdr.msg_name = &ports[at];
            messages[at].msg_hdr.msg_namelen = sizeof ports[at];
        }
        ports[0].sin_port = htons(1024);
        if (flows == 1) { /* the route is looked up once */
            if (connect(fd, (struct sockaddr *)&ports[0], sizeof ports[0]))
                return 1;
            for (int at = 0; at < BURST; at++)
                messages[at].msg_hdr.msg_namelen = 0, messages[at].msg_hdr.msg_name = NULL;
        }
    }
    long flow = 0;
    unsigned long sent = 0, refused = 0, paced = 0;
    double begun = now();
    while (!over) {
        if (rate > 0) {
            double due = (now() - begun) * rate - paced;
            if (due < BURST) { /* asleep, so that others get something of the core */
                nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
                continue;
            }
            if (due > BEHIND_MAX) /* not on the core for a while: no burst to make up for it */
                paced += due - BURST;
            paced += BURST;
        }
        for (int at = 0; at < BURST; at++) {
            parts[at].iov_base = packets + flow * length;
            if (sockets)
                ports[at].sin_port = htons(1024 + flow);
            if (++flow == flows)
                flow = 0;
        }
        for (int at = 0; at < BURST && !over;) {
            int took = sendmmsg(fd, messages + at, BURST - at, 0);
            if (took > 0) {
                sent += took;
                at += took;
            } else if (errno == ENOBUFS) { /* the one it is at was dropped by the device */
                refused++;
                at++;
            } else if (errno != EINTR) {
                perror("flood");
                return 1;
            }
        }
    }
    printf("%lu %lu\n", sent, refused);
    return 0;
}
