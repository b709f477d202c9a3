/* connection.c: the connection userdata: opening it, driving its operations, closing it. */
#include "pglocks.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CONNINFO_TYPE "pglocks conninfo"
#define WAITER_TYPE "pglocks waiter"
#define WATCH_TYPE "pglocks watch"

struct conninfo {
  enum magic magic;
  PQconninfoOption *options;
};

struct connection {
  enum magic magic;
  struct session *session; /* NULL: closed before it was open */
};

/* ---- connection userdata --------------------------------------------------------------- */

void slot_get(lua_State *L, int index, enum slot slot) {
  push_environment(L, index);
  lua_rawgeti(L, -1, slot);
  lua_remove(L, -2);
}

void slot_set(lua_State *L, int index, enum slot slot) {
  push_environment(L, index);
  lua_insert(L, -2);
  lua_rawseti(L, -2, slot);
  lua_pop(L, 1);
}

struct session *connection_check(lua_State *L, int index) {
  struct connection *c = check_userdata(L, index, CONNECTION_TYPE, sizeof *c, CONNECTION_MAGIC);
  if (c->session == NULL) luaL_argerror(L, index, "this connection was collected");
  return c->session;
}

struct session *connection_find(lua_State *L, int index) {
  struct connection *c = test_userdata(L, index, sizeof *c, CONNECTION_MAGIC);
  return c != NULL ? c->session : NULL;
}

void connection_ready(lua_State *L, int index, struct session *s) {
  if (session_is_foreign(s))
    raise_failure(L, FORKED, "this connection belongs to the parent process");
  connection_tell_loss(L, index, s);
  if (s->op.kind != NULL)
    raise_failure(L, BUSY_CONNECTION, "this connection is in use by another coroutine");
  if (s->state == SESSION_LOST) {
    failure_push(L, &s->loss, NULL);
    lua_error(L);
  }
  if (s->state != SESSION_OPEN) raise_failure(L, CLOSED, "this connection is closed");
}

static bool is_loss_untold(const struct session *s) { return s->state == SESSION_LOST && !s->loss_told; }

bool session_is_untold(const struct session *s) {
  return is_loss_untold(s) || s->release_failure.code != NO_ERROR || s->denied > 0;
}

/* on_lost(conn, err, locks), protected: what it raises must not hide what the caller is told. The
 * loss counts as told when the call is about to be made: without memory for it, the next call on
 * the connection tries again. */
static int tell_loss(lua_State *L) {
  struct session *s = connection_check(L, 1);
  bool lost = is_loss_untold(s);
  bool listens;
  slot_get(L, 1, SLOT_ON_LOST);
  listens = lua_isfunction(L, -1);
  if (listens) {
    lua_pushvalue(L, 1);
    failure_push(L, lost ? &s->loss : &s->release_failure, lost ? NULL : &s->release_key);
    holdings_push(L, s, lost);
    /* Room for the call: stack for any function, and the record of a call of that depth. */
    luaL_checkstack(L, 255, NULL);
    slot_get(L, 1, SLOT_NOTHING);
    lua_call(L, 0, 0);
  }
  if (lost)
    s->loss_told = true;
  else
    s->release_failure.code = NO_ERROR;
  if (listens) lua_call(L, 3, 0);
  return 0;
}

void connection_tell_loss(lua_State *L, int index, struct session *s) {
  bool told = true;
  if (s->telling || !session_is_untold(s) || !lua_checkstack(L, 4)) return;
  while (told && session_is_untold(s)) {
    bool lost = is_loss_untold(s);
    if (!lost && s->release_failure.code == NO_ERROR && holdings_pop_denied(s, &s->release_key))
      failure_set(&s->release_failure, NOT_HELD, "", NOT_HELD_MESSAGE);
    lua_pushvalue(L, index);
    slot_get(L, -1, SLOT_TELL_LOSS);
    lua_insert(L, -2);
    s->telling = true;
    if (lua_pcall(L, 1, 0, 0) != 0) lua_pop(L, 1);
    s->telling = false;
    told = lost ? !is_loss_untold(s) : s->release_failure.code == NO_ERROR;
  }
}

void connection_tell_free(lua_State *L, int index) {
  if (!lua_checkstack(L, 4)) return;
  lua_pushvalue(L, index);
  slot_get(L, -1, SLOT_ON_FREE);
  if (lua_isfunction(L, -1)) {
    lua_insert(L, -2);
    if (lua_pcall(L, 1, 0, 0) != 0) lua_pop(L, 1);
  } else
    lua_pop(L, 2);
}

void connection_tell_end(lua_State *L, int index) {
  if (!lua_checkstack(L, 5)) return;
  lua_pushvalue(L, index);
  slot_get(L, -1, SLOT_ON_END);
  lua_insert(L, -2);
  lua_pushvalue(L, index + 1);
  if (lua_pcall(L, 2, 0, 0) != 0) lua_pop(L, 1);
}

/* ---- the pump -------------------------------------------------------------------------- */

/* take(conn): what libpq wants to send, at most 16 KiB of it; nil: nothing now. */
static int take(lua_State *L) {
  struct session *s = connection_check(L, 1);
  char bytes[16384];
  ssize_t n = 0;
  if (s->pump_fd >= 0 && (s->written || s->state == SESSION_CONNECTING))
    n = read(s->pump_fd, bytes, sizeof bytes);
  s->written = n == sizeof bytes;
  if (n <= 0) return 0;
  lua_pushlstring(L, bytes, (size_t)n);
  return 1;
}

/* give(conn, bytes): the number of them that libpq has room for; step(conn) makes more.
 * give(conn [, nil, broken]): there will be no more; broken: because the network failed. */
static int give(lua_State *L) {
  struct session *s = connection_check(L, 1);
  size_t length;
  const char *bytes = luaL_optlstring(L, 2, NULL, &length);
  ssize_t n = 0;
  if (lua_toboolean(L, 3)) s->broken = true;
  if (s->pump_fd >= 0 && bytes == NULL)
    shutdown(s->pump_fd, SHUT_RDWR);
  else if (s->pump_fd >= 0)
    n = send(s->pump_fd, bytes, length, MSG_NOSIGNAL);
  s->given += n > 0 ? (size_t)n : 1; /* the end, too, is something to read */
  lua_pushinteger(L, n > 0 ? n : 0);
  return 1;
}

/* awaits(conn): is an answer of the server still to come? */
static int awaits(lua_State *L) {
  lua_pushboolean(L, connection_check(L, 1)->oldest != NULL);
  return 1;
}

/* ---- waiters --------------------------------------------------------------------------- */

/* Stands for the coroutine that drives an operation. When it is closed or collected before the
 * operation has come to its end, that coroutine was closed, failed or was left alone. */
struct waiter {
  enum magic magic;
  struct session *session; /* NULL: none yet, or over */
  unsigned long operation; /* its number */
};

/* waiter(): made before the operation is begun, so that nothing can go wrong afterwards. */
static int waiter(lua_State *L) {
  struct waiter *w = new_userdata(L, sizeof *w);
  w->magic = WAITER_MAGIC;
  w->session = NULL;
  luaL_setmetatable(L, WAITER_TYPE);
  return 1;
}

/* await(waiter, conn): the operation of the connection is the waiter's from now on. */
static int await(lua_State *L) {
  struct waiter *w = check_userdata(L, 1, WAITER_TYPE, sizeof *w, WAITER_MAGIC);
  struct session *s = connection_check(L, 2);
  if (w->session != NULL) return luaL_error(L, "this waiter was used before");
  w->session = s;
  w->operation = s->operations;
  s->refs++;
  return 0;
}

static int waiter_end(lua_State *L) {
  struct waiter *w = test_userdata(L, 1, sizeof *w, WAITER_MAGIC);
  struct session *s = w != NULL ? w->session : NULL;
  if (s == NULL) return 0;
  w->session = NULL;
  if (s->operations == w->operation) operation_abandon(s);
  session_unref(s);
  return 0;
}

/* ---- watches --------------------------------------------------------------------------- */

struct watch {
  enum magic magic;
  int fd;
};

/* watch(conn): an object that keeps a file descriptor open, and that: readable whenever `alive` has
 * something to look at. Nothing if there is none to be had. */
static int watch(lua_State *L) {
  struct session *s = connection_check(L, 1);
  struct watch *w = new_userdata(L, sizeof *w);
  w->magic = WATCH_MAGIC;
  w->fd = -1;
  luaL_setmetatable(L, WATCH_TYPE);
  w->fd = session_watch(s);
  if (w->fd < 0) return 0;
  lua_pushinteger(L, w->fd);
  return 2;
}

static int watch_collect(lua_State *L) {
  struct watch *w = test_userdata(L, 1, sizeof *w, WATCH_MAGIC);
  if (w != NULL && w->fd >= 0) close(w->fd);
  if (w != NULL) w->fd = -1;
  return 0;
}

/* ---- connecting ------------------------------------------------------------------------ */

/* libpq's text of a failed attempt: the SQLSTATE taken out, one line, without hints; and without
 * the address where that is not the server's. */
static void connecting_failed(struct session *s) {
  char text[MESSAGE_SIZE], sqlstate[SQLSTATE_SIZE] = "", *line = text, *to;
  const char *password = PQpass(s->pg);
  const char *from;
  size_t used = 0;
  const char *message = PQerrorMessage(s->pg);
  text[0] = '\0';
  for (from = message; *from != '\0';) {
    size_t length = strcspn(from, "\n");
    if (*from != '\t' && strncmp(from, "LOCATION:", 9) != 0 && length > 0 &&
        used + length + 3 < sizeof text) {
      if (used > 0) used += (size_t)snprintf(text + used, sizeof text - used, "; ");
      memcpy(text + used, from, length);
      text[used += length] = '\0';
    }
    from += length;
    if (*from == '\n') from++;
  }
  /* ...FATAL:  28P01: password authentication failed... */
  while ((line = strstr(line, ":  ")) != NULL) {
    if (strspn(line + 3, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == 5 && line[8] == ':') {
      memcpy(sqlstate, line + 3, 5);
      memmove(line + 2, line + 9, strlen(line + 9) + 1);
    } else
      line++;
  }
  if (password != NULL && *password != '\0')
    for (to = text; (to = strstr(to, password)) != NULL; to++) {
      size_t length = strlen(password);
      *to = '*';
      memmove(to + 1, to + length, strlen(to + length) + 1);
    }
  line = s->pump_fd >= 0 ? strstr(text, "failed: ") : NULL;
  session_disconnect(s);
  s->state = SESSION_CLOSED;
  operation_done(s, strcmp(sqlstate, "53300") == 0 ? TOO_MANY_CONNECTIONS : CONNECT, sqlstate,
                 "%s", line != NULL ? line + strlen("failed: ") : text);
}

static void connecting_advance(struct session *s) {
  struct pollfd wait;
  operation_wants(s, &wait);
  if (!is_ready(wait.fd, wait.events)) return; /* PQconnectPoll must not be called early */
  s->op.state = PQconnectPoll(s->pg);
  if (s->op.state == PGRES_POLLING_FAILED)
    connecting_failed(s);
  else if (s->op.state == PGRES_POLLING_OK) {
    PQsetErrorVerbosity(s->pg, PQERRORS_DEFAULT);
    if (PQsetnonblocking(s->pg, 1) != 0 || !PQenterPipelineMode(s->pg)) {
      connecting_failed(s);
      return;
    }
    s->state = SESSION_OPEN;
    s->backend_pid = PQbackendPID(s->pg);
    s->server_version = PQserverVersion(s->pg);
    operation_done(s, NO_ERROR, "", NULL);
  }
}

/* true, or nil and the error: the caller may have another host to try. */
static int connecting_finish(lua_State *L, struct session *s) {
  struct failure failure = s->op.failure;
  if (failure.code == NO_ERROR || failure.code == INTERRUPTED) {
    operation_end(L, s);
    lua_pushboolean(L, 1);
    return 1;
  }
  operation_drop(s);
  lua_pushnil(L);
  failure_push(L, &failure, NULL);
  return 2;
}

static const struct operation_kind connecting = {"connect", true, connecting_advance,
                                                 connecting_finish};

/* A TCP port of this machine for libpq to connect to, before its socket is replaced. */
static int listen_somewhere(char port[8]) {
  struct sockaddr_in address = {.sin_family = AF_INET};
  socklen_t length = sizeof address;
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -1;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 1) != 0 ||
      getsockname(fd, (struct sockaddr *)&address, &length) != 0) {
    close(fd);
    return -1;
  }
  snprintf(port, 8, "%u", ntohs(address.sin_port));
  return fd;
}

/* start.connect(keywords, seconds [, pumped]): a connection whose opening has begun.
 * pumped: the caller carries the bytes between libpq and the server, with take and give. */
static int start_connect(lua_State *L) {
  enum { MAX_KEYWORDS = 64 };
  const char *keywords[MAX_KEYWORDS + 1], *values[MAX_KEYWORDS + 1];
  struct connection *c;
  struct session *s;
  double seconds = luaL_checknumber(L, 2);
  int n = 0, listener = -1;
  bool pumped = lua_toboolean(L, 3);
  char port[8];
  luaL_checktype(L, 1, LUA_TTABLE);
  lua_settop(L, 2);
  for (lua_pushnil(L); lua_next(L, 1); lua_pop(L, 1)) {
    if (n == MAX_KEYWORDS - 2) return luaL_error(L, "too many connection keywords");
    if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TSTRING)
      return luaL_error(L, "connection keywords and values must be strings");
    keywords[n] = lua_tostring(L, -2);
    values[n++] = lua_tostring(L, -1);
  }

  c = new_userdata(L, sizeof *c); /* closed, and only then opened */
  c->magic = CONNECTION_MAGIC;
  c->session = NULL;
  luaL_setmetatable(L, CONNECTION_TYPE);
  lua_createtable(L, SLOTS, 0);
  for (int i = SLOT_CONNECTION; i <= SLOTS; i++) {
    lua_pushboolean(L, 0);
    lua_rawseti(L, -2, i);
  }
  lua_pushnil(L);
  lua_rawseti(L, -2, SLOT_INTERRUPT);
  luaL_getmetatable(L, CONNECTION_TYPE);
  lua_getfield(L, -1, "nothing");
  lua_rawseti(L, -3, SLOT_NOTHING);
  lua_getfield(L, -1, "tell_loss");
  lua_rawseti(L, -3, SLOT_TELL_LOSS);
  lua_pop(L, 1);
  luaL_getmetatable(L, LOCK_TYPE);
  lua_rawseti(L, -2, SLOT_LOCK);
  lua_pushvalue(L, -2);
  lua_rawseti(L, -2, SLOT_CONNECTION);
  set_environment(L, -2);

  s = c->session = session_new();
  if (s == NULL) return luaL_error(L, "not enough memory");
  operation_begin(s, &connecting, seconds);
  s->state = SESSION_CONNECTING;
  s->op.state = PGRES_POLLING_WRITING;
  if (pumped && (listener = listen_somewhere(port)) >= 0) {
    keywords[n] = "hostaddr";
    values[n++] = "127.0.0.1";
    keywords[n] = "port";
    values[n++] = port;
  }
  keywords[n] = values[n] = NULL;
  s->pg = pumped && listener < 0 ? NULL : PQconnectStartParams(keywords, values, 0);
  if (s->pg == NULL || (pumped && PQsocket(s->pg) >= 0 && !session_pump(s))) {
    if (listener >= 0) close(listener);
    session_disconnect(s);
    s->state = SESSION_CLOSED;
    operation_done(s, CONNECT, "", "out of memory or of file descriptors");
    return 1;
  }
  if (listener >= 0) close(listener);
  PQsetNoticeReceiver(s->pg, session_receive_notice, s);
  PQsetErrorVerbosity(s->pg, PQERRORS_VERBOSE); /* for the SQLSTATE of a refusal */
  if (PQstatus(s->pg) == CONNECTION_BAD) connecting_failed(s);
  return 1;
}

/* conninfo(string): its keywords as a table; nil if it cannot be parsed. libpq's own message is
 * not passed on: it may quote a part of a password.
 * conninfo(): every keyword that libpq knows, with its default (of the environment) or false. */
static int conninfo(lua_State *L) {
  const char *string = luaL_optstring(L, 1, NULL);
  char *error = NULL;
  /* a box, because Lua may throw while the options are read */
  struct conninfo *box = new_userdata(L, sizeof *box);
  box->magic = CONNINFO_MAGIC;
  box->options = NULL;
  luaL_setmetatable(L, CONNINFO_TYPE);
  box->options = string != NULL ? PQconninfoParse(string, &error) : PQconndefaults();
  PQfreemem(error);
  if (box->options == NULL) return 0;
  lua_newtable(L);
  for (PQconninfoOption *o = box->options; o->keyword != NULL; o++) {
    if (string != NULL && o->val == NULL) continue;
    if (o->val != NULL)
      lua_pushstring(L, o->val);
    else
      lua_pushboolean(L, 0);
    lua_setfield(L, -2, o->keyword);
  }
  return 1;
}

static int conninfo_collect(lua_State *L) {
  struct conninfo *box = test_userdata(L, 1, sizeof *box, CONNINFO_MAGIC);
  if (box != NULL) {
    PQconninfoFree(box->options);
    box->options = NULL;
  }
  return 0;
}

/* ---- methods --------------------------------------------------------------------------- */

/* run(conn): drives the operation to its end, blocking. */
static int run(lua_State *L) {
  struct session *s = connection_check(L, 1);
  if (s->op.kind != NULL) operation_run(L, s, monotonic_now());
  return 0;
}

/* step(conn): does what can be done without waiting; then "r", "w" or "rw", the file descriptor
 * and the seconds left (infinite: no deadline), or nothing when the operation is done. */
static int step(lua_State *L) {
  struct session *s = connection_check(L, 1);
  struct pollfd wait;
  if (s->op.kind == NULL) return 0;
  operation_progress(s);
  if (!operation_wants(s, &wait)) return 0;
  lua_pushstring(L, wait.events == POLLIN ? "r" : wait.events == POLLOUT ? "w" : "rw");
  lua_pushinteger(L, wait.fd);
  lua_pushnumber(L, fmax(0, operation_wakes(s) - monotonic_now()));
  return 3;
}

/* finish(conn): what the operation that is done returns, or raises. */
static int finish(lua_State *L) {
  struct session *s = connection_check(L, 1);
  if (s->op.kind == NULL) return 0;
  if (!s->op.done) return luaL_error(L, "the operation is not done");
  return s->op.kind->finish(L, s);
}

static void closing_advance(struct session *s) {
  struct operation *op = &s->op;
  if (op->answer.failed && op->answer.failure.code == INTERRUPTED &&
      op->rounds++ < CANCELLED_AT_MOST) {
    command_unlock_all(s);
    return;
  }
  operation_done(s, NO_ERROR, "", NULL);
  session_close(s);
}

static int closing_finish(lua_State *L, struct session *s) {
  operation_drop(s);
  s->state = SESSION_CLOSED;
  connection_tell_loss(L, 1, s);
  return 0;
}

static const struct operation_kind closing = {"close", false, closing_advance, closing_finish};

static void closing_begin(struct session *s) {
  operation_begin(s, &closing, s->reply_timeout);
  s->closing = true;
  holdings_announce(s, true);
  if (s->holding_count > 0 || s->in_transaction)
    command_unlock_all(s);
  else
    closing_advance(s);
}

/* Closed already, or not ours to close: nothing is to be done. */
static bool is_over(struct session *s) {
  if (session_is_foreign(s) || s->state != SESSION_OPEN) {
    session_close(s);
    return true;
  }
  return false;
}

static int start_close(lua_State *L) {
  struct session *s = connection_check(L, 1);
  connection_tell_loss(L, 1, s);
  if (s->op.kind != NULL)
    raise_failure(L, BUSY_CONNECTION, "this connection is in use by another coroutine");
  if (is_over(s)) {
    s->state = SESSION_CLOSED;
    return 0;
  }
  closing_begin(s);
  return 0;
}

static int connection_close(lua_State *L) {
  struct session *s = connection_check(L, 1);
  start_close(L);
  return s->op.kind != NULL ? operation_complete(L, s) : 0;
}

/* __close: as close(), but never raises. */
static int connection_scope_end(lua_State *L) {
  struct connection *c = test_userdata(L, 1, sizeof *c, CONNECTION_MAGIC);
  struct session *s = c != NULL ? c->session : NULL;
  if (s == NULL) return 0;
  if (s->op.kind != NULL)
    session_close(s);
  else if (!is_over(s)) {
    closing_begin(s);
    if (!s->scheduled) operation_run(L, s, s->op.started);
    operation_drop(s);
    session_close(s);
  }
  if (session_is_untold(s))
    connection_tell_loss(L, 1, s);
  s->state = SESSION_CLOSED;
  return 0;
}

/* __gc: only sends. */
static int connection_collect(lua_State *L) {
  struct connection *c = test_userdata(L, 1, sizeof *c, CONNECTION_MAGIC);
  struct session *s = c != NULL ? c->session : NULL;
  if (s == NULL) return 0;
  c->session = NULL;
  session_close(s);
  session_unref(s);
  return 0;
}

static int connection_alive(lua_State *L) {
  struct session *s = connection_check(L, 1);
  lua_pushboolean(L, session_alive(s));
  connection_tell_loss(L, 1, s);
  return 1;
}

static int connection_cancel(lua_State *L) {
  struct session *s = connection_check(L, 1);
  bool waiting = !session_is_foreign(s) && s->op.kind != NULL && s->op.kind->interruptible;
  if (waiting) operation_interrupt(s);
  lua_pushboolean(L, waiting);
  return 1;
}

/* configure(conn, { reply_timeout =, deferred =, commits_deferred =, lease =, scheduled =, pooled =,
 * backend_pid =, on_lost =, on_free =, on_end = }) */
static int configure(lua_State *L) {
  struct session *s = connection_check(L, 1);
  lua_getfield(L, 2, "reply_timeout");
  if (!lua_isnil(L, -1)) s->reply_timeout = luaL_checknumber(L, -1);
  lua_getfield(L, 2, "deferred");
  if (!lua_isnil(L, -1)) s->deferred = lua_toboolean(L, -1);
  lua_getfield(L, 2, "scheduled");
  if (!lua_isnil(L, -1)) s->scheduled = lua_toboolean(L, -1);
  lua_getfield(L, 2, "on_lost");
  if (!lua_isnil(L, -1)) slot_set(L, 1, SLOT_ON_LOST);
  lua_getfield(L, 2, "on_free");
  if (!lua_isnil(L, -1)) slot_set(L, 1, SLOT_ON_FREE);
  lua_getfield(L, 2, "on_end");
  if (!lua_isnil(L, -1)) slot_set(L, 1, SLOT_ON_END);
  lua_getfield(L, 2, "commits_deferred");
  if (!lua_isnil(L, -1)) s->commits_deferred = lua_toboolean(L, -1);
  lua_getfield(L, 2, "lease");
  if (!lua_isnil(L, -1)) s->lease = luaL_checknumber(L, -1);
  lua_getfield(L, 2, "pooled");
  if (!lua_isnil(L, -1))
    s->pooling = strcmp(luaL_checkstring(L, -1), "session") == 0 ? SESSION_POOLING
                                                                 : TRANSACTION_POOLING;
  lua_getfield(L, 2, "backend_pid");
  if (!lua_isnil(L, -1)) s->backend_pid = (int)luaL_checkinteger(L, -1);
  return 0;
}

/* forks(): changes in a child process. */
static int forks(lua_State *L) {
  lua_pushinteger(L, (lua_Integer)session_forks());
  return 1;
}

/* in_transaction(conn): is one open, as the server last said? */
static int in_transaction(lua_State *L) {
  lua_pushboolean(L, connection_check(L, 1)->in_transaction);
  return 1;
}

/* pooling(conn): what stands between it and the server: "session", "transaction" or nil. */
static int pooling(lua_State *L) {
  static const char *const names[] = {NULL, "session", "transaction"};
  lua_pushstring(L, names[connection_check(L, 1)->pooling]);
  return 1;
}

/* default_host(): where libpq connects to without a host: a folder of Unix sockets. */
static int default_host(lua_State *L) {
  static const char *const keywords[] = {"port", NULL}, *const values[] = {"1", NULL};
  PGconn *pg = PQconnectStartParams(keywords, values, 0);
  const char *host = pg != NULL ? PQhost(pg) : NULL;
  char copy[256];
  snprintf(copy, sizeof copy, "%s", host != NULL && *host != '\0' ? host : "/tmp");
  PQfinish(pg);
  lua_pushstring(L, copy);
  return 1;
}

/* addresses(host): the numeric addresses of a host's name, in the order of preference; nil: it has
 * none, or is the folder of a Unix socket. */
static int addresses(lua_State *L) {
  const char *host = luaL_optstring(L, 1, "");
  struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *found = NULL;
  char(*list)[NI_MAXHOST];
  int n = 0;
  enum { MOST = 16 };
  if (*host == '\0' || *host == '/' || *host == '@') return 0;
  list = lua_newuserdata(L, MOST * sizeof *list); /* before Lua may throw */
  if (getaddrinfo(host, NULL, &hints, &found) != 0) return 0;
  for (const struct addrinfo *a = found; a != NULL && n < MOST; a = a->ai_next)
    if (getnameinfo(a->ai_addr, a->ai_addrlen, list[n], sizeof *list, NULL, 0, NI_NUMERICHOST) == 0)
      n++;
  freeaddrinfo(found);
  if (n == 0) return 0;
  lua_createtable(L, n, 0);
  for (int i = 0; i < n; i++) {
    lua_pushstring(L, list[i]);
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

/* is_transient(message): does it say that there was nobody, or nobody who answered, where there may
 * be somebody soon? libpq and nginx give no other hint than the system's text. */
static int is_transient(lua_State *L) {
  static const int errors[] = {ECONNREFUSED, ENOENT,      ECONNRESET,  ECONNABORTED, EPIPE,
                               ETIMEDOUT,    EHOSTUNREACH, ENETUNREACH, EAGAIN};
  static const char *const texts[] = {"server closed the connection", "no connection within",
                                      "no answer from the server", "timeout"};
  const char *message = luaL_checkstring(L, 1);
  bool found = false;
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    found = found || strcasestr(message, strerror(errors[i])) != NULL;
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
    found = found || strcasestr(message, texts[i]) != NULL;
  lua_pushboolean(L, found);
  return 1;
}

/* sleep(seconds): at most; a signal ends it, so that the interpreter gets to see that. */
static int sleep_blocking(lua_State *L) {
  double seconds = fmin(luaL_checknumber(L, 1), 3600);
  struct timespec time;
  if (!(seconds > 0)) return 0;
  time = timespec_of(seconds);
  ppoll(NULL, 0, &time, NULL);
  return 0;
}

/* password(keywords): what libpq finds in the environment or its password file for these: "host",
 * "port", "dbname", "user", "passfile", "service". Nil: nothing. */
static int password(lua_State *L) {
  /* It looks before it connects; and to an address that is none it does not. */
  enum { MOST = 7 };
  const char *keywords[MOST + 1] = {"hostaddr", "host", "port", "dbname", "user", "passfile", "service"};
  const char *values[MOST + 1] = {"?"};
  const char *found;
  char copy[4096]; /* before Lua may throw */
  PGconn *pg;
  lua_settop(L, 1);
  for (int i = 1; i < MOST; i++) {
    lua_getfield(L, 1, keywords[i]);
    values[i] = lua_tostring(L, -1); /* stays on the stack */
  }
  pg = PQconnectStartParams(keywords, values, 0);
  found = pg != NULL ? PQpass(pg) : NULL;
  snprintf(copy, sizeof copy, "%s", found != NULL && strlen(found) < sizeof copy ? found : "");
  PQfinish(pg);
  if (*copy != '\0')
    lua_pushstring(L, copy);
  else
    lua_pushnil(L);
  return 1;
}

/* keep_alive(fd, keywords): sets on a socket that libpq does not see what libpq would set. */
static int keep_alive(lua_State *L) {
  static const struct {
    const char *keyword;
    int level, option;
  } settings[] = {{"keepalives", SOL_SOCKET, SO_KEEPALIVE},
                  {"keepalives_idle", IPPROTO_TCP, TCP_KEEPIDLE},
                  {"keepalives_interval", IPPROTO_TCP, TCP_KEEPINTVL},
                  {"keepalives_count", IPPROTO_TCP, TCP_KEEPCNT},
                  {"tcp_user_timeout", IPPROTO_TCP, TCP_USER_TIMEOUT}};
  int fd = (int)luaL_checkinteger(L, 1);
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
    int value;
    lua_getfield(L, 2, settings[i].keyword);
    value = lua_isstring(L, -1) ? atoi(lua_tostring(L, -1)) : 0;
    lua_pop(L, 1);
    if (value > 0) setsockopt(fd, settings[i].level, settings[i].option, &value, sizeof value);
  }
  return 0;
}

/* is_idle(conn): no operation is under way. */
static int is_idle(lua_State *L) {
  lua_pushboolean(L, connection_check(L, 1)->op.kind == NULL);
  return 1;
}

/* is_free(conn): nothing is held, waited for or open on it. */
static int is_free(lua_State *L) {
  struct session *s = connection_check(L, 1);
  lua_pushboolean(L, s->op.kind == NULL && !s->in_transaction && !holdings_any(s));
  return 1;
}

/* rollback(conn): ends the transaction without waiting; a connection in use is closed for it. */
static int rollback(lua_State *L) {
  struct session *s = connection_check(L, 1);
  if (is_over(s) || !s->in_transaction) return 0;
  if (s->op.kind != NULL)
    session_close(s);
  else
    command_rollback(s, false);
  return 0;
}

bool method_push(lua_State *L, bool scheduled) {
  for (int i = scheduled ? 2 : 1; i > 0; i--) {
    lua_pushvalue(L, 2);
    lua_rawget(L, lua_upvalueindex(i));
    if (!lua_isnil(L, -1)) return true;
  }
  return false;
}

static int connection_index(lua_State *L) {
  struct connection *c = test_userdata(L, 1, sizeof *c, CONNECTION_MAGIC);
  struct session *s;
  const char *field;
  lua_settop(L, 2);
  if (method_push(L, c != NULL && c->session != NULL && c->session->scheduled)) return 1;
  s = connection_check(L, 1);
  field = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  if (strcmp(field, "backend_pid") == 0)
    lua_pushinteger(L, s->backend_pid);
  else if (strcmp(field, "server_version") == 0)
    lua_pushinteger(L, s->server_version);
  else if (strcmp(field, "is_pooled") == 0)
    lua_pushboolean(L, s->pooling != DIRECT);
  return 1;
}

static int connection_tostring(lua_State *L) {
  static const char *const states[] = {"connecting", "open", "lost", "closed"};
  struct session *s = connection_check(L, 1);
  lua_pushfstring(L, CONNECTION_TYPE ": %s, backend_pid %d", states[s->state], s->backend_pid);
  return 1;
}

static int nothing(lua_State *L) {
  (void)L;
  return 0;
}

static const luaL_Reg connection_metamethods[] = {
    {"__close", connection_scope_end},
    {"__gc", connection_collect},
    {"__tostring", connection_tostring},
    {"nothing", nothing},
    {"tell_loss", tell_loss},
    {NULL, NULL}};

static const luaL_Reg connection_methods[] = {{"alive", connection_alive},
                                              {"cancel", connection_cancel},
                                              {"close", connection_close},
                                              {NULL, NULL}};

static const luaL_Reg starters[] = {
    {"connect", start_connect}, {"close", start_close}, {NULL, NULL}};

static const luaL_Reg functions[] = {{"addresses", addresses},
                                     {"await", await},
                                     {"awaits", awaits},
                                     {"configure", configure},
                                     {"conninfo", conninfo},
                                     {"default_host", default_host},
                                     {"finish", finish},
                                     {"give", give},
                                     {"forks", forks},
                                     {"in_transaction", in_transaction},
                                     {"is_free", is_free},
                                     {"is_idle", is_idle},
                                     {"is_transient", is_transient},
                                     {"keep_alive", keep_alive},
                                     {"password", password},
                                     {"pooling", pooling},
                                     {"rollback", rollback},
                                     {"run", run},
                                     {"sleep", sleep_blocking},
                                     {"step", step},
                                     {"take", take},
                                     {"waiter", waiter},
                                     {"watch", watch},
                                     {NULL, NULL}};

static const luaL_Reg waiter_metamethods[] = {
    {"__close", waiter_end}, {"__gc", waiter_end}, {NULL, NULL}};

static const luaL_Reg watch_metamethods[] = {
    {"__close", watch_collect}, {"__gc", watch_collect}, {NULL, NULL}};

void connection_open(lua_State *L) {
  sessions_open();
  luaL_setfuncs(L, functions, 0);
  luaL_newmetatable(L, CONNECTION_TYPE);
  luaL_setfuncs(L, connection_metamethods, 0);
  lua_getfield(L, -2, "start");
  luaL_setfuncs(L, starters, 0);
  lua_pop(L, 1);
  lua_getfield(L, -2, "connection");
  luaL_setfuncs(L, connection_methods, 0);
  lua_getfield(L, -3, "scheduled");
  lua_getfield(L, -1, "connection");
  lua_remove(L, -2);
  lua_pushcclosure(L, connection_index, 2);
  lua_setfield(L, -2, "__index");
  luaL_newmetatable(L, CONNINFO_TYPE);
  lua_pushcfunction(L, conninfo_collect);
  lua_setfield(L, -2, "__gc");
  luaL_newmetatable(L, WAITER_TYPE);
  luaL_setfuncs(L, waiter_metamethods, 0);
  luaL_newmetatable(L, WATCH_TYPE);
  luaL_setfuncs(L, watch_metamethods, 0);
  lua_pop(L, 4);
}
