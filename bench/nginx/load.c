/* An HTTP load generator:
 *
 *     load [-a] [-p MS] PORT PATH CLIENTS SECONDS
 *
 * CLIENTS keep-alive connections to 127.0.0.1 ask for PATH, each again as soon as it has its answer
 * (-p: MS milliseconds after it), for SECONDS. What is under way then is waited for, so that no
 * request is aborted; -a leaves at once. An answer must have a Content-Length. Prints one line:
 *
 *     rate 18012.3 p50_us 870 p99_us 1650 answered 9021 failed 0 ended_at 1234.567890
 *
 * rate: answers a second, those that came after SECONDS not counted. ended_at: CLOCK_MONOTONIC
 * when the time was over. */

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER_SIZE = 4096, EVENTS = 256, DRAIN_SECONDS = 5, COMPLAINTS = 3 };

struct client {
  int fd;
  bool asked;
  double asked_at, next_at; /* next_at: when it may ask again */
  size_t length;
  char answer[ANSWER_SIZE + 1];
};

static struct client *clients;
static int epoll, client_count, busy;
static struct sockaddr_in address = {.sin_family = AF_INET};
static char request[1024];
static size_t request_length;
static double pause_seconds, deadline;

static uint32_t *latencies; /* microseconds */
static size_t latency_count, latency_room;
static long answered, in_time, failed;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void open_client(struct client *client) {
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
  int on = 1;
  client->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (client->fd < 0 || connect(client->fd, (struct sockaddr *)&address, sizeof address) != 0)
    die("load: connect");
  setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, client->fd, &event) != 0) die("load: epoll_ctl");
  client->length = 0;
}

static void ask(struct client *client) {
  client->asked_at = now();
  client->asked = true;
  client->length = 0;
  busy++;
  if (write(client->fd, request, request_length) != (ssize_t)request_length) die("load: write");
}

static void note(struct client *client, double at) {
  if (latency_count == latency_room) {
    latency_room = latency_room ? 2 * latency_room : 4096;
    latencies = realloc(latencies, latency_room * sizeof *latencies);
    if (!latencies) die("load");
  }
  latencies[latency_count++] = (uint32_t)((at - client->asked_at) * 1e6);
}

/* The client has an answer, or will have none. */
static void finish(struct client *client, bool success) {
  double at = now();
  if (client->asked) {
    busy--;
    answered++;
    if (at < deadline) {
      in_time++;
      note(client, at);
    }
    if (!success && failed++ < COMPLAINTS)
      fprintf(stderr, "load: %.*s\n", (int)strcspn(client->answer, "\r"), client->answer);
  }
  client->asked = false;
  client->next_at = at + pause_seconds;
}

/* The whole length of the answer that has begun to come; 0: not known yet. */
static size_t answer_length(struct client *client) {
  const char *end, *header;
  client->answer[client->length] = '\0';
  end = strstr(client->answer, "\r\n\r\n");
  if (!end) return 0;
  header = strcasestr(client->answer, "\r\ncontent-length:");
  if (!header || header > end) {
    fprintf(stderr, "load: an answer without a Content-Length:\n%s\n", client->answer);
    exit(1);
  }
  return (size_t)(end + 4 - client->answer) + strtoul(header + 17, NULL, 10);
}

static void receive(struct client *client) {
  ssize_t got = read(client->fd, client->answer + client->length, ANSWER_SIZE - client->length);
  if (got < 0 && errno == EINTR) return;
  if (got > 0) {
    size_t wanted;
    client->length += (size_t)got;
    wanted = answer_length(client);
    if (wanted == 0 || client->length < wanted) return;
    finish(client, strncmp(client->answer + 9, "200", 3) == 0);
    if (!strcasestr(client->answer, "\r\nconnection: close")) return;
  } else {
    client->answer[client->length] = '\0';
    finish(client, false);
  }
  close(client->fd);
  if (now() < deadline) {
    open_client(client);
  } else {
    client->fd = -1;
  }
}

/* Milliseconds until somebody may ask again, or the time is over. */
static int ask_those_due(void) {
  double at = now(), next = deadline;
  if (at >= deadline) return 100;
  for (int i = 0; i < client_count; i++) {
    if (clients[i].asked) continue;
    if (clients[i].next_at <= at) {
      ask(&clients[i]);
    } else if (clients[i].next_at < next) {
      next = clients[i].next_at;
    }
  }
  return (int)((next - at) * 1000) + 1;
}

static int compare(const void *a, const void *b) {
  uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
  return (left > right) - (left < right);
}

static uint32_t percentile(double share) {
  return latency_count ? latencies[(size_t)(share * (double)(latency_count - 1))] : 0;
}

static void usage(void) {
  fputs("usage: load [-a] [-p MS] PORT PATH CLIENTS SECONDS\n", stderr);
  exit(2);
}

int main(int argc, char **argv) {
  bool abandon = false;
  double seconds, began;
  int option;
  struct rlimit files;

  while ((option = getopt(argc, argv, "ap:")) != -1) {
    if (option == 'a') {
      abandon = true;
    } else if (option == 'p') {
      pause_seconds = atof(optarg) / 1000;
    } else {
      usage();
    }
  }
  if (argc - optind != 4) usage();
  address.sin_port = htons((uint16_t)atoi(argv[optind]));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  request_length = (size_t)snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n",
                                    argv[optind + 1]);
  client_count = atoi(argv[optind + 2]);
  seconds = atof(argv[optind + 3]);
  if (client_count < 1 || seconds <= 0 || request_length >= sizeof request) usage();

  if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  clients = calloc((size_t)client_count, sizeof *clients);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  if (!clients || epoll < 0) die("load");
  for (int i = 0; i < client_count; i++) open_client(&clients[i]);

  began = now();
  deadline = began + seconds;
  while (now() < deadline || (!abandon && busy > 0 && now() < deadline + DRAIN_SECONDS)) {
    struct epoll_event events[EVENTS];
    int count = epoll_wait(epoll, events, EVENTS, ask_those_due());
    for (int i = 0; i < count; i++) receive(events[i].data.ptr);
  }
  if (abandon) deadline = now();
  for (int i = 0; i < client_count; i++) {
    if (clients[i].fd >= 0) close(clients[i].fd);
  }

  if (latency_count) qsort(latencies, latency_count, sizeof *latencies, compare);
  printf("rate %.1f p50_us %u p99_us %u answered %ld failed %ld ended_at %.6f\n",
         (double)in_time / seconds, percentile(0.5), percentile(0.99), answered,
         failed + (abandon ? 0 : busy), deadline);
  return 0;
}
