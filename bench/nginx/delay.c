/* A TCP proxy to a PostgreSQL server on this machine that takes its time, as a network does:
 *
 *     delay MICROSECONDS PATH|PORT
 *
 * Listens on 127.0.0.1, prints the port, and passes on what it gets MICROSECONDS later, in each
 * direction, to the Unix socket PATH or to PORT of 127.0.0.1. Ends with the process that began it. */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK_SIZE = 16384, EVENTS = 64, BACKLOG = 1024 };

/* A socket, and the one that gets what comes in here. Never freed: a late chunk may refer to it. */
struct end {
  int fd;
  struct end *other;
  bool closed;
};

struct chunk {
  struct chunk *next;
  struct end *to;
  int64_t due; /* nanoseconds */
  size_t length; /* 0: the end of the stream, which is delayed like all else */
  char bytes[];
};

/* One queue for all, as each chunk is due after those that came before it. */
static struct chunk *first, **last = &first;
static int epoll, timer;
static int64_t delay, armed_for;
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
  struct sockaddr_un local = {.sun_family = AF_UNIX};
  struct sockaddr_in remote = loopback(atoi(target));
  bool is_local = target[0] == '/';
  int fd = socket(is_local ? AF_UNIX : AF_INET, SOCK_STREAM, 0);
  snprintf(local.sun_path, sizeof local.sun_path, "%s", target);
  if (fd < 0 || connect(fd, is_local ? (struct sockaddr *)&local : (struct sockaddr *)&remote,
                        is_local ? sizeof local : sizeof remote) != 0)
    die("delay: connect");
  if (!is_local) at_once(fd);
  return fd;
}

/* data: what an event on fd will be told by. */
static void watch(int fd, void *data, uint32_t events) {
  struct epoll_event event = {.events = events, .data.ptr = data};
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) die("delay: epoll_ctl");
}

static void accept_client(int listener) {
  struct end *ends;
  int fd = accept(listener, NULL, NULL);
  if (fd < 0) return;
  at_once(fd);
  ends = calloc(2, sizeof *ends);
  if (!ends) die("delay");
  ends[0] = (struct end){.fd = fd, .other = &ends[1]};
  ends[1] = (struct end){.fd = connect_target(), .other = &ends[0]};
  for (int i = 0; i < 2; i++) watch(ends[i].fd, &ends[i], EPOLLIN);
}

static void take(struct end *from) {
  struct chunk *chunk;
  ssize_t got;
  if (from->closed) return;
  chunk = malloc(sizeof *chunk + CHUNK_SIZE);
  if (!chunk) die("delay");
  got = read(from->fd, chunk->bytes, CHUNK_SIZE);
  if (got <= 0) epoll_ctl(epoll, EPOLL_CTL_DEL, from->fd, NULL);
  chunk->length = got > 0 ? (size_t)got : 0;
  chunk->to = from->other;
  chunk->due = now() + delay;
  chunk->next = NULL;
  *last = chunk;
  last = &chunk->next;
}

static void close_both(struct end *end) {
  struct end *ends[2] = {end, end->other};
  for (int i = 0; i < 2; i++) {
    if (!ends[i]->closed) close(ends[i]->fd);
    ends[i]->closed = true;
  }
}

static void pass_on(void) {
  struct itimerspec next = {{0, 0}, {0, 0}};
  while (first && first->due <= now()) {
    struct chunk *chunk = first;
    struct end *to = chunk->to;
    first = chunk->next;
    if (!first) last = &first;
    if (!to->closed &&
        (chunk->length == 0 || write(to->fd, chunk->bytes, chunk->length) != (ssize_t)chunk->length))
      close_both(to);
    free(chunk);
  }
  if (!first || first->due == armed_for) return;
  armed_for = first->due;
  next.it_value.tv_sec = (time_t)(armed_for / 1000000000);
  next.it_value.tv_nsec = (long)(armed_for % 1000000000);
  timerfd_settime(timer, TFD_TIMER_ABSTIME, &next, NULL);
}

int main(int argc, char **argv) {
  struct sockaddr_in address = loopback(0);
  socklen_t length = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0);

  if (argc != 3) {
    fputs("usage: delay MICROSECONDS PATH|PORT\n", stderr);
    return 2;
  }
  delay = (int64_t)atoi(argv[1]) * 1000;
  target = argv[2];
  signal(SIGPIPE, SIG_IGN);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
  if (epoll < 0 || timer < 0) die("delay");
  if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 ||
      listen(listener, BACKLOG) != 0 || getsockname(listener, (struct sockaddr *)&address, &length) != 0)
    die("delay: listen");
  watch(listener, &listener, EPOLLIN);
  watch(timer, &timer, EPOLLIN | EPOLLET); /* told once, and never read */
  printf("%d\n", ntohs(address.sin_port));
  fflush(stdout);

  for (;;) {
    struct epoll_event events[EVENTS];
    int count = epoll_wait(epoll, events, EVENTS, -1);
    for (int i = 0; i < count; i++) {
      void *data = events[i].data.ptr;
      if (data == &listener) {
        accept_client(listener);
      } else if (data != &timer) {
        take(data);
      }
    }
    pass_on();
  }
}
