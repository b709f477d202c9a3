/* operation.c: the steps of an operation, waiting for them, and interrupting the wait. */
#include "pglocks.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* Seconds that a wait goes on before it looks again: whether Ctrl-C came just before it slept. */
#define SLICE 0.5
#define CANCEL_AGAIN 0.1 /* seconds after which a request to cancel may have been for nothing */

void operation_begin(struct session *s, const struct operation_kind *kind, double seconds) {
  struct operation *op = &s->op;
  memset(op, 0, offsetof(struct operation, failure));
  failure_clear(&op->failure);
  s->operations++;
  op->timeout = -1;
  op->kind = kind;
  op->started = monotonic_now();
  op->deadline = op->started + seconds;
  op->reply_by = op->look_at = INFINITY;
}

static double operation_deadline(const struct session *s) {
  return fmin(s->op.deadline, s->op.reply_by);
}

double operation_wakes(const struct session *s) {
  return fmin(operation_deadline(s), s->op.look_at);
}

bool operation_cancel(struct session *s) {
  bool begun = s->cancel != NULL || cancel_begin(s); /* one may be under way already */
  /* What could not be begun at all is not repeated: nobody would expect its outcome. */
  if (begun || s->op.look_at < INFINITY) s->op.look_at = monotonic_now() + CANCEL_AGAIN;
  return begun;
}

void operation_drop(struct session *s) {
  struct operation *op = &s->op;
  for (struct command *c = s->oldest; c != NULL; c = c->next)
    if (c->leaving.count == 0) c->abandoned = true;
  op->kind = NULL;
  op->lock = NULL;
  holdings_unask(s);
  if (s->rollback_due && s->state == SESSION_OPEN) command_rollback(s, false);
  /* A transaction that has just ended lets go what could not be released inside it. */
  if (s->doubtful > 0 && s->state == SESSION_OPEN) holdings_settle(s);
  notify_settle(s);
}

void operation_done(struct session *s, enum code code, const char *sqlstate, const char *format,
                    ...) {
  struct operation *op = &s->op;
  va_list args;
  char message[MESSAGE_SIZE];
  op->done = true;
  if (code == NO_ERROR) return;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  failure_set(&op->failure, code, sqlstate, "%s", message);
}

void operation_abandon(struct session *s) {
  if (s->op.kind == NULL) return;
  if (s->state == SESSION_OPEN) {
    /* Not awaited: it only takes a waiter out of the server's queue. */
    if (s->op.kind->interruptible && s->cancel == NULL) cancel_begin(s);
    session_lose(s, LOST, "", "the coroutine that waited on this connection has ended");
  } else
    session_close(s);
  operation_drop(s);
}

void operation_interrupt(struct session *s) {
  struct operation *op = &s->op;
  if (op->interrupted || op->done) return;
  op->interrupted = true;
  if (s->state == SESSION_OPEN && op->unanswered == 0 && s->cancel == NULL) { /* nothing was asked */
    op->kind->advance(s);
    return;
  }
  op->deadline = fmin(op->deadline, monotonic_now() + s->reply_timeout);
  if (s->state == SESSION_CONNECTING) {
    session_disconnect(s);
    s->state = SESSION_CLOSED;
    operation_done(s, INTERRUPTED, "", "connecting was interrupted");
  } else if (!operation_cancel(s))
    session_lose(s, s->pump_fd >= 0 ? INTERRUPTED : UNKNOWN, "",
                 "interrupted; without a cancel request, the connection was closed for it");
}

/* The deadline has passed without an answer. Whether the server did what it was asked cannot be
 * known; the cancel, not awaited, only helps it to notice sooner that nobody waits any more. */
static void operation_expire(struct session *s) {
  if (s->state == SESSION_CONNECTING) {
    session_disconnect(s);
    s->state = SESSION_CLOSED;
    operation_done(s, CONNECT, "", "no connection within %.3g s",
                   s->op.deadline - s->op.started);
    return;
  }
  if (s->op.kind->interruptible && !s->op.interrupted && s->cancel == NULL) cancel_begin(s);
  session_lose(s, UNKNOWN, "", "no answer from the server in time; the connection was closed");
}

/* Without memory for the result that stands for a Sync libpq only notes that, and is busy for
 * ever: from then on there is a deadline. */
static void give_up_on_lost_sync(struct session *s) {
  struct operation *op = &s->op;
  if (op->unanswered > 0 && isinf(op->reply_by) && PQisBusy(s->pg) &&
      strstr(PQerrorMessage(s->pg), "out of memory") != NULL)
    op->reply_by = monotonic_now() + s->reply_timeout;
}

void operation_progress(struct session *s) {
  struct operation *op = &s->op;
  if (op->done) return;
  if (s->state == SESSION_CLOSED)
    session_close(s);
  else if (s->state == SESSION_CONNECTING)
    op->kind->advance(s);
  else if (commands_collect(s)) {
    cancel_look(s);
    if (s->cancel == NULL) command_late(s);
    if (op->done) return; /* lost in sending that */
    give_up_on_lost_sync(s);
    if (s->cancel == NULL && op->unanswered == 0) {
      op->look_at = INFINITY;
      op->kind->advance(s);
    } else if (op->look_at < INFINITY && monotonic_now() >= op->look_at)
      operation_cancel(s);
  }
  if (!op->done && monotonic_now() >= operation_deadline(s)) operation_expire(s);
}

bool operation_wants(struct session *s, struct pollfd *wait) {
  const struct operation *op = &s->op;
  if (op->done) return false;
  wait->revents = 0;
  if (s->state == SESSION_CONNECTING) {
    wait->fd = PQsocket(s->pg);
    wait->events = op->state == PGRES_POLLING_READING ? POLLIN : POLLOUT;
  } else if (op->unanswered == 0 && s->cancel != NULL) {
    wait->fd = cancel_fd(s);
    wait->events = POLLIN;
  } else {
    wait->fd = PQsocket(s->pg);
    wait->events = POLLIN;
    s->written = s->written || s->unflushed; /* now some of that will be */
    s->unflushed = PQflush(s->pg) == 1;
    if (s->unflushed) wait->events |= POLLOUT;
  }
  return true;
}

/* Has Ctrl-C, or whatever sets a hook that raises, come? Then its error is kept for
 * operation_end. The standalone interpreters' handler only sets a hook, on PUC Lua on the main
 * thread alone: so a function that does nothing is called there to let it strike. */
static bool hook_raises(lua_State *L) {
  lua_State *T = L;
  bool raised;
#if LUA_VERSION_NUM >= 502
  if (lua_gethookmask(T) == 0) {
    lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
    T = lua_tothread(L, -1);
    lua_pop(L, 1);
  }
#endif
  if (lua_gethookmask(T) == 0 || !lua_checkstack(T, 4)) return false;
  slot_get(L, 1, SLOT_NOTHING);
  if (T != L) lua_xmove(L, T, 1);
  raised = lua_pcall(T, 0, 0, 0) != 0;
  if (!raised) return false;
  if (T != L) lua_xmove(T, L, 1);
  slot_set(L, 1, SLOT_INTERRUPT);
  return true;
}

/* As poll, until a time. */
static int poll_until(struct pollfd *wait, double now, double time) {
  struct timespec left = timespec_of(fmax(0, time - now));
  return ppoll(wait, 1, &left, NULL);
}

/* As poll; but 0 also before its time. */
static int wait_until(struct session *s, struct pollfd *wait, double now, double time) {
  bool first = s->state == SESSION_OPEN && !s->op.heard && wait->events == POLLIN &&
               wait->fd == PQsocket(s->pg);
  int ready = first && session_alarm(s, now, time) ? session_wait(s) : poll_until(wait, now, time);
  s->op.heard = s->op.heard || ready > 0;
  return ready;
}

void operation_run(lua_State *L, struct session *s, double now) {
  struct pollfd wait;
  bool interruptible = s->op.kind->interruptible;
  while (operation_wants(s, &wait)) {
    int ready = wait_until(s, &wait, now, fmin(operation_wakes(s), now + SLICE));
    if (ready <= 0 && interruptible && !s->op.interrupted && hook_raises(L))
      operation_interrupt(s);
    else
      operation_progress(s);
    if (!s->op.done) now = monotonic_now();
  }
}

int operation_complete(lua_State *L, struct session *s) {
  operation_run(L, s, s->op.started);
  return s->op.kind->finish(L, s);
}

void operation_end(lua_State *L, struct session *s) {
  bool interrupted = s->op.interrupted;
  struct failure failure;
  struct key key = s->op.key;
  bool has_key = s->op.has_key;
  if (s->op.failure.code == NO_ERROR && !interrupted) {
    operation_drop(s);
    return;
  }
  failure = s->op.failure;
  operation_drop(s);
  connection_tell_loss(L, 1, s);
  if (interrupted) {
    slot_get(L, 1, SLOT_INTERRUPT);
    lua_pushnil(L);
    slot_set(L, 1, SLOT_INTERRUPT);
    if (!lua_isnil(L, -1)) lua_error(L);
    if (failure.code == NO_ERROR)
      failure_set(&failure, INTERRUPTED, "", "interrupted by cancel()");
  }
  failure_push(L, &failure, has_key ? &key : NULL);
  lua_error(L);
}

