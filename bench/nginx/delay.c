/* A TCP proxy to a PostgreSQL server on this machine that takes its time, as a network does:
 *
 *     delay MICROSECONDS PATH|PORT
 *
 * Listens on 127.0.0.1, prints the port, and passes on what it gets MICROSECONDS later, in each
 * direction, to the Unix socket PATH or to PORT of 127.0.0.1. Ends with the process that began it. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK_SIZE = 16384, PAIRS = 1024 };

struct chunk {
  struct chunk *next;
  int64_t due; /* nanoseconds */
  size_t length;
  char bytes[];
};

/* From one socket to another. */
struct direction {
  struct chunk *first, **last;
  bool ended; /* nothing more comes in */
};

/* fds[0]: the client; directions[0]: what it sent. */
struct pair {
  int fds[2];
  struct direction directions[2];
};

static struct pair pairs[PAIRS];
static int pair_count;
static int64_t delay;
static const char *target;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static struct sockaddr_in loopback(int port) {
  struct sockaddr_in address = {.sin_family = AF_INET};
  address.sin_port = htons((uint16_t)port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

/* Without it TCP itself would hold back small packets. */
static void at_once(int fd) {
  int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static int connect_target(void) {
  int fd;
  if (target[0] == '/') {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", target);
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0) die("delay: connect");
  } else {
    struct sockaddr_in address = loopback(atoi(target));
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0) die("delay: connect");
    at_once(fd);
  }
  return fd;
}

static void accept_client(int listener) {
  struct pair *pair;
  int fd = accept(listener, NULL, NULL);
  if (fd < 0) return;
  if (pair_count == PAIRS) {
    close(fd);
    return;
  }
  at_once(fd);
  pair = &pairs[pair_count++];
  memset(pair, 0, sizeof *pair);
  pair->fds[0] = fd;
  pair->fds[1] = connect_target();
  for (int i = 0; i < 2; i++) pair->directions[i].last = &pair->directions[i].first;
}

static void take(struct direction *direction, int from) {
  struct chunk *chunk = malloc(sizeof *chunk + CHUNK_SIZE);
  ssize_t got;
  if (!chunk) die("delay");
  got = read(from, chunk->bytes, CHUNK_SIZE);
  /* The end is delayed like all else: an empty chunk. */
  chunk->length = got > 0 ? (size_t)got : 0;
  chunk->due = now() + delay;
  chunk->next = NULL;
  *direction->last = chunk;
  direction->last = &chunk->next;
  direction->ended = got <= 0;
}

/* Passes on what is due; false: the end came through. */
static bool pass_on(struct direction *direction, int to, int64_t at, int64_t *next) {
  while (direction->first) {
    struct chunk *chunk = direction->first;
    if (chunk->due > at) {
      if (chunk->due < *next) *next = chunk->due;
      return true;
    }
    if (chunk->length == 0 || write(to, chunk->bytes, chunk->length) != (ssize_t)chunk->length) return false;
    direction->first = chunk->next;
    if (!direction->first) direction->last = &direction->first;
    free(chunk);
  }
  return true;
}

static void drop(struct pair *pair) {
  for (int i = 0; i < 2; i++) {
    close(pair->fds[i]);
    while (pair->directions[i].first) {
      struct chunk *chunk = pair->directions[i].first;
      pair->directions[i].first = chunk->next;
      free(chunk);
    }
  }
  *pair = pairs[--pair_count];
  for (int i = 0; i < 2; i++) { /* moved: an empty list ends in itself */
    struct direction *direction = &pair->directions[i];
    if (!direction->first) direction->last = &direction->first;
  }
}

int main(int argc, char **argv) {
  static struct pollfd polled[1 + 2 * PAIRS];
  struct sockaddr_in address = loopback(0);
  socklen_t length = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0);

  if (argc != 3) {
    fputs("usage: delay MICROSECONDS PATH|PORT\n", stderr);
    return 2;
  }
  delay = (int64_t)atoi(argv[1]) * 1000;
  target = argv[2];
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  signal(SIGPIPE, SIG_IGN);
  prctl(PR_SET_TIMERSLACK, 1); /* otherwise the kernel adds 50 microseconds */
  if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 ||
      listen(listener, PAIRS) != 0 || getsockname(listener, (struct sockaddr *)&address, &length) != 0)
    die("delay: listen");
  printf("%d\n", ntohs(address.sin_port));
  fflush(stdout);

  for (;;) {
    int64_t at = now(), next = INT64_MAX;
    struct timespec wait;
    int count;

    for (int i = pair_count - 1; i >= 0; i--) {
      struct pair *pair = &pairs[i];
      if (!pass_on(&pair->directions[0], pair->fds[1], at, &next) ||
          !pass_on(&pair->directions[1], pair->fds[0], at, &next))
        drop(pair);
    }

    polled[0] = (struct pollfd){.fd = listener, .events = POLLIN};
    count = pair_count;
    for (int i = 0; i < count; i++) {
      for (int j = 0; j < 2; j++) {
        int fd = pairs[i].directions[j].ended ? -1 : pairs[i].fds[j];
        polled[1 + 2 * i + j] = (struct pollfd){.fd = fd, .events = POLLIN};
      }
    }
    if (next != INT64_MAX) {
      int64_t left = next - now() > 0 ? next - now() : 0;
      wait.tv_sec = (time_t)(left / 1000000000);
      wait.tv_nsec = (long)(left % 1000000000);
    }
    if (ppoll(polled, (nfds_t)(1 + 2 * count), next == INT64_MAX ? NULL : &wait, NULL) <= 0) continue;

    for (int i = 0; i < 2 * count; i++) {
      struct pair *pair = &pairs[i / 2];
      if (polled[1 + i].revents) take(&pair->directions[i % 2], pair->fds[i % 2]);
    }
    if (polled[0].revents) accept_client(listener);
  }
}
