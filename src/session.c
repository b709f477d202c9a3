/* session.c: what stands behind a connection and all its locks: the socket and its loss, requests
 * to cancel, and what a forked child may do with it: nothing. */
#include "pglocks.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define DEFAULT_REPLY_TIMEOUT 10.0

/* ---- fork ------------------------------------------------------------------------------ */

static pthread_mutex_t sessions_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct session *sessions;
static unsigned fork_generation;

static void lock_sessions(void) { pthread_mutex_lock(&sessions_mutex); }

static void unlock_sessions(void) { pthread_mutex_unlock(&sessions_mutex); }

/* A child that spoke on the parent's socket, or only closed it politely, would end the parent's
 * session; one that kept it open would keep a dead parent's locks alive. */
static void child_lets_go(void) {
  int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  fork_generation++;
  for (struct session *s = sessions; s != NULL; s = s->next)
    if (s->pg == NULL)
      continue;
    else if (null >= 0)
      dup3(null, PQsocket(s->pg), O_CLOEXEC);
    else
      close(PQsocket(s->pg));
  for (struct session *s = sessions; s != NULL; s = s->next)
    if (s->pump_fd >= 0 && null >= 0) dup3(null, s->pump_fd, O_CLOEXEC);
  if (null >= 0) close(null);
  unlock_sessions();
}

unsigned session_forks(void) { return fork_generation; }

bool session_is_foreign(const struct session *s) { return s->born != fork_generation; }

/* ---- sessions -------------------------------------------------------------------------- */

static void session_link(struct session *s) {
  lock_sessions();
  s->next = sessions;
  s->link = &sessions;
  if (sessions != NULL) sessions->link = &s->next;
  sessions = s;
  unlock_sessions();
}

static void session_unlink(struct session *s) {
  lock_sessions();
  *s->link = s->next;
  if (s->next != NULL) s->next->link = s->link;
  unlock_sessions();
}

/* ---- watching, and waiting ------------------------------------------------------------- */

static int always_readable(void) {
  static int fd = -1;
  if (fd < 0) fd = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
  return fd;
}

static bool epoll_add(int epoll, int fd, uint32_t events) {
  struct epoll_event event = {.events = events, .data.fd = fd};
  return epoll >= 0 && fd >= 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

static void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

int session_watch(struct session *s) {
  int fd;
  if (s->pg == NULL || s->watch_fd >= 0 || always_readable() < 0) return -1;
  s->watch_fd = epoll_create1(EPOLL_CLOEXEC);
  fd = epoll_add(s->watch_fd, PQsocket(s->pg), EPOLLIN)
           ? fcntl(s->watch_fd, F_DUPFD_CLOEXEC, 0)
           : -1;
  if (fd < 0) close_fd(&s->watch_fd);
  return fd;
}

static void watch_end(struct session *s) {
  if (s->watch_fd < 0) return;
  if (!session_is_foreign(s)) /* a parent still watches */
    epoll_add(s->watch_fd, always_readable(), EPOLLIN);
  close_fd(&s->watch_fd);
}

struct timespec timespec_of(double seconds) {
  struct timespec time;
  time.tv_sec = (time_t)seconds;
  time.tv_nsec = (long)((seconds - (double)time.tv_sec) * 1e9);
  return time;
}

static void wait_end(struct session *s) {
  close_fd(&s->wait_fd);
  close_fd(&s->timer_fd);
  s->alarm = 0;
}

bool session_alarm(struct session *s, double now, double time) {
  struct itimerspec at = {.it_value = timespec_of(time)};
  if (s->alarm > now && s->alarm <= time) return true;
  if (time <= now || s->pg == NULL) return false;
  if (s->wait_fd < 0) {
    s->wait_fd = epoll_create1(EPOLL_CLOEXEC);
    s->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (!epoll_add(s->wait_fd, PQsocket(s->pg), EPOLLIN | EPOLLET) ||
        !epoll_add(s->wait_fd, s->timer_fd, EPOLLIN | EPOLLET)) {
      wait_end(s);
      return false;
    }
  }
  s->alarm = timerfd_settime(s->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) == 0 ? time : 0;
  return s->alarm > 0;
}

int session_wait(struct session *s) {
  struct epoll_event events[2];
  int count = epoll_wait(s->wait_fd, events, 2, -1), ready = count < 0 ? -1 : 0;
  for (int i = 0; i < count; i++)
    if (events[i].data.fd == s->timer_fd)
      s->alarm = 0;
    else
      ready = 1;
  return ready;
}

/* Closes the socket. Without a word to the server in a child: there it is /dev/null. */
void session_disconnect(struct session *s) {
  PGconn *pg = s->pg;
  if (pg == NULL) return;
  watch_end(s);
  wait_end(s);
  lock_sessions();
  s->pg = NULL;
  unlock_sessions();
  PQfinish(pg);
  if (s->pump_fd >= 0) close(s->pump_fd);
  s->pump_fd = -1;
  s->in_transaction = s->transaction_failed = false;
}

bool session_pump(struct session *s) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) != 0) return false;
  s->pump_fd = pair[1];
  if (dup3(pair[0], PQsocket(s->pg), O_CLOEXEC) < 0) {
    close(pair[0]);
    return false;
  }
  close(pair[0]);
  return true;
}

void session_close(struct session *s) {
  bool waited_for = s->scheduled && s->op.kind != NULL && !s->op.done;
  bool was_open = s->state == SESSION_OPEN || s->state == SESSION_CONNECTING;
  if (was_open) s->state = SESSION_CLOSED;
  if (was_open && waited_for && s->pg != NULL && !session_is_foreign(s)) {
    /* A scheduler waits for this file descriptor in another coroutine: that wakes up, and closes
     * it in its next step. */
    shutdown(PQsocket(s->pg), SHUT_RDWR);
    return;
  }
  session_disconnect(s);
  commands_drop(s);
  if (s->op.kind != NULL && !s->op.done)
    operation_done(s, CLOSED, "", "this connection was closed meanwhile");
}

static void cancel_unref(struct cancel *cancel);

void session_unref(struct session *s) {
  if (--s->refs > 0) return;
  session_disconnect(s);
  commands_drop(s);
  if (s->cancel != NULL) cancel_unref(s->cancel);
  while (s->spare_commands != NULL) {
    struct command *c = s->spare_commands;
    s->spare_commands = c->next;
    free(c);
  }
  holdings_free(s);
  if (s->packed != s->first_packed) free(s->packed);
  session_unlink(s);
  free(s);
}

struct session *session_new(void) {
  struct session *s = calloc(1, sizeof *s);
  if (s == NULL) return NULL;
  s->refs = 1;
  s->watch_fd = s->wait_fd = s->timer_fd = s->pump_fd = -1;
  s->born = fork_generation;
  s->newest = &s->oldest;
  s->late.kind = LEAVING;
  s->buckets = s->first_buckets;
  s->bucket_count = BUCKETS;
  s->packed = s->first_packed;
  s->packed_for = ALWAYS_ROOM_FOR;
  s->reply_timeout = DEFAULT_REPLY_TIMEOUT;
  session_link(s);
  return s;
}

void session_lose(struct session *s, enum code code, const char *sqlstate, const char *message) {
  struct failure failure;
  if (s->pg == NULL) return;
  failure_set(&failure, code, sqlstate, "%s", message);
  s->loss = failure;
  s->loss.code = LOST;
  s->state = SESSION_LOST;
  session_disconnect(s);
  commands_drop(s);
  if (s->op.kind != NULL && !s->op.done)
    operation_done(s, code, failure.sqlstate, "%s", failure.message);
}

void session_note_transaction(struct session *s) {
  PGTransactionStatusType status = PQtransactionStatus(s->pg);
  if (status == PQTRANS_ACTIVE || status == PQTRANS_UNKNOWN) return;
  if (status == PQTRANS_IDLE) {
    transaction_ended(s);
    return;
  }
  s->in_transaction = true;
  s->transaction_failed = status == PQTRANS_INERROR;
  /* Cancelled before it began, COMMIT leaves the transaction open, and nobody else will end that. */
  if (s->commit_failed && s->transaction_failed) s->rollback_due = true;
  s->commit_failed = false;
}

bool is_ready(int fd, short events) {
  struct pollfd p = {fd, events, 0};
  return poll(&p, 1, 0) > 0;
}

bool session_has_input(const struct session *s) {
  return s->pump_fd >= 0 ? s->given > 0 : is_ready(PQsocket(s->pg), POLLIN);
}

bool session_alive(struct session *s) {
  if (s->state != SESSION_OPEN || session_is_foreign(s)) return false;
  /* An operation under way watches the socket itself; its bytes are not ours to take. */
  if (s->op.kind != NULL) return !s->doomed && !s->closing;
  while (s->pg != NULL && session_has_input(s)) commands_collect(s);
  return s->pg != NULL;
}

/* libpq's default would print on stderr. Nothing of Lua may be called from here. */
void session_receive_notice(void *session, const PGresult *notice) {
  static const char *const ends[] = {"57P01", "57P02", "57P03", "57P04", "57P05",
                                     "25P03", "25P04"};
  struct session *s = session;
  const char *sqlstate = PQresultErrorField(notice, PG_DIAG_SQLSTATE);
  const char *severity = PQresultErrorField(notice, PG_DIAG_SEVERITY_NONLOCALIZED);
  const char *message = PQresultErrorField(notice, PG_DIAG_MESSAGE_PRIMARY);
  bool end = severity != NULL && (!strcmp(severity, "FATAL") || !strcmp(severity, "PANIC"));
  for (size_t i = 0; sqlstate != NULL && i < sizeof ends / sizeof *ends; i++)
    end = end || strcmp(sqlstate, ends[i]) == 0; /* 57P02 comes as a mere warning */
  if (!end || s->doomed) return;
  s->doomed = true;
  failure_set(&s->loss, LOST, sqlstate ? sqlstate : "", "%s",
              message ? message : "the server ended the session");
}

/* ---- cancelling ------------------------------------------------------------------------ */

/* A detached thread makes the request and tells by an eventfd. Nothing may be sent before it has
 * finished, or it would hit that. It goes on where the session is given up meanwhile. */
struct cancel {
#ifdef LIBPQ_HAS_ASYNC_CANCEL
  PGcancelConn *request;
#else
  PGcancel *request;
#endif
  double deadline; /* monotonic seconds */
  int fd;
  int refs; /* the session and the thread */
};

#ifdef LIBPQ_HAS_ASYNC_CANCEL /* libpq 17: encrypted as the connection is, and bounded */
static void ignore_notice(void *nothing, const PGresult *notice) {
  (void)nothing;
  (void)notice;
}

/* The request inherits the notice receiver, and may outlive the session that this is for. */
static void cancel_create(struct cancel *cancel, struct session *s) {
  PQnoticeReceiver receiver = PQsetNoticeReceiver(s->pg, ignore_notice, NULL);
  cancel->request = PQcancelCreate(s->pg);
  PQsetNoticeReceiver(s->pg, receiver, s);
}

static void cancel_free(struct cancel *cancel) { PQcancelFinish(cancel->request); }

static void cancel_send(struct cancel *cancel) {
  PostgresPollingStatusType status =
      PQcancelStart(cancel->request) ? PGRES_POLLING_WRITING : PGRES_POLLING_FAILED;
  while (status == PGRES_POLLING_READING || status == PGRES_POLLING_WRITING) {
    struct pollfd wait = {PQcancelSocket(cancel->request),
                          status == PGRES_POLLING_READING ? POLLIN : POLLOUT, 0};
    double left = fmin(cancel->deadline - monotonic_now(), 1000);
    if (left <= 0 || (poll(&wait, 1, (int)(left * 1000) + 1) < 0 && errno != EINTR)) return;
    if (wait.revents != 0) status = PQcancelPoll(cancel->request);
  }
}
#else /* PQcancel blocks, without limit where the server hangs: its session then gives up */
static void cancel_create(struct cancel *cancel, struct session *s) {
  cancel->request = PQgetCancel(s->pg);
}

static void cancel_free(struct cancel *cancel) { PQfreeCancel(cancel->request); }

static void cancel_send(struct cancel *cancel) {
  char error[256];
  PQcancel(cancel->request, error, sizeof error);
}
#endif

static void cancel_unref(struct cancel *cancel) {
  if (__atomic_sub_fetch(&cancel->refs, 1, __ATOMIC_ACQ_REL) > 0) return;
  cancel_free(cancel);
  close(cancel->fd);
  free(cancel);
}

static void *cancel_thread(void *arg) {
  struct cancel *cancel = arg;
  uint64_t one = 1;
  cancel_send(cancel);
  if (write(cancel->fd, &one, sizeof one) < 0) { /* cannot happen: an eventfd at 0 */
  }
  cancel_unref(cancel);
  return NULL;
}

/* A cancel's thread may outlive the Lua state, and LuaJIT unloads modules before it has run the
 * last finalizers: so the code stays mapped. */
static void pin_library(void) {
  Dl_info self;
  union {
    void *(*function)(void *);
    void *address;
  } here = {cancel_thread};
  if (dladdr(here.address, &self)) dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

bool cancel_begin(struct session *s) {
  struct cancel *cancel = s->pump_fd >= 0 ? NULL : calloc(1, sizeof *cancel);
  sigset_t all, before;
  pthread_attr_t detached;
  pthread_t thread;
  int rc;
  if (cancel == NULL) return false;
  cancel->refs = 2;
  cancel->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  cancel->deadline = monotonic_now() + s->reply_timeout;
  cancel_create(cancel, s);
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  sigfillset(&all); /* signals are for the threads of the program */
  pthread_sigmask(SIG_SETMASK, &all, &before);
  rc = cancel->fd < 0 || cancel->request == NULL
           ? EAGAIN
           : pthread_create(&thread, &detached, cancel_thread, cancel);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&detached);
  if (rc != 0) {
    cancel->refs = 1;
    cancel_unref(cancel);
    return false;
  }
  s->cancel = cancel;
  return true;
}

int cancel_fd(const struct session *s) { return s->cancel->fd; }

void cancel_look(struct session *s) {
  if (s->cancel == NULL || !is_ready(s->cancel->fd, POLLIN)) return;
  cancel_unref(s->cancel);
  s->cancel = NULL;
}

/* ---- once in a process ----------------------------------------------------------------- */

static void prepare_process(void) {
  pin_library();
  pthread_atfork(lock_sessions, unlock_sessions, child_lets_go);
}

void sessions_open(void) {
  static pthread_once_t prepared = PTHREAD_ONCE_INIT;
  pthread_once(&prepared, prepare_process);
}
