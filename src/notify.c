/* notify.c: telling those who wait with strategy = "notify" that a lock has been let go, and hearing
 * of it. */
#include "pglocks.h"

#include <string.h>

bool marker_of(const struct key *key, struct key *marker) {
  char text[NAME_IN_MESSAGE];
  struct text name = {.text = text};
  struct space space = {.is = SPACE_TEXT, .text = {"pglocks notify", strlen("pglocks notify")}};
  key_describe(key, NULL, 0, text, sizeof text);
  name.length = strlen(text);
  return scheme_default()->make(&name, &space, marker) == NULL;
}

void announce(struct session *s, const struct key *marker) {
  if (s->state == SESSION_OPEN && s->announced < ALWAYS_ROOM_FOR)
    s->announcements[s->announced++] = *marker;
}

void notify_settle(struct session *s) {
  if (s->state != SESSION_OPEN || s->in_transaction) return;
  if (s->unlisten_due) command_unlisten(s, NULL);
  s->unlisten_due = false;
  if (s->announced > 0) command_announce(s);
}

/* ---- hearing --------------------------------------------------------------------------- */

static void hearing_advance(struct session *s) {
  struct operation *op = &s->op;
  double until = op->started + op->timeout;
  if (op->interrupted) {
    operation_done(s, INTERRUPTED, "", "interrupted");
    if (s->scheduled) command_nothing(s); /* whose answer wakes the scheduler */
  } else if (s->notified || monotonic_now() >= until)
    operation_done(s, NO_ERROR, "", NULL);
  else
    op->look_at = until;
}

static int hearing_finish(lua_State *L, struct session *s) {
  bool notified = s->notified;
  s->notified = false;
  operation_end(L, s);
  lua_pushboolean(L, notified);
  return 1;
}

static const struct operation_kind hearing = {"hear", true, hearing_advance, hearing_finish};

/* hear(conn, seconds): waits until a notification comes, or the seconds are over; whether one came
 * since the last time that it was asked. */
static struct session *hear_begin(lua_State *L) {
  struct session *s = connection_check(L, 1);
  double seconds = luaL_checknumber(L, 2);
  connection_ready(L, 1, s);
  operation_begin(s, &hearing, INFINITY);
  s->op.timeout = seconds;
  hearing_advance(s);
  return s;
}

static int start_hear(lua_State *L) {
  hear_begin(L);
  return 0;
}

static int hear(lua_State *L) { return operation_complete(L, hear_begin(L)); }

/* ---- listening ------------------------------------------------------------------------- */

static int listening_finish(lua_State *L, struct session *s) {
  operation_end(L, s);
  return 0;
}

static const struct operation_kind listening = {"listen", true, query_advance, listening_finish};

static const struct key *marker_check(lua_State *L, int index) {
  const struct key *marker = key_test(L, index);
  if (marker == NULL) luaL_argerror(L, index, "key expected");
  return marker;
}

/* listen(conn, marker) */
static struct session *listen_begin(lua_State *L) {
  struct session *s = connection_check(L, 1);
  const struct key *marker = marker_check(L, 2);
  connection_ready(L, 1, s);
  operation_begin(s, &listening, s->reply_timeout);
  command_listen(s, marker);
  return s;
}

static int start_listen(lua_State *L) {
  listen_begin(L);
  return 0;
}

static int listen(lua_State *L) { return operation_complete(L, listen_begin(L)); }

/* unlisten(conn, marker): without waiting. Inside a transaction it would count only if that commits: so
 * it is put off until the end. */
static int unlisten(lua_State *L) {
  struct session *s = connection_check(L, 1);
  const struct key *marker = marker_check(L, 2);
  if (s->state != SESSION_OPEN || session_is_foreign(s)) return 0;
  if (s->op.kind != NULL || s->in_transaction)
    s->unlisten_due = true;
  else
    command_unlisten(s, marker);
  return 0;
}

static int marker(lua_State *L) {
  const struct key *key = marker_check(L, 1);
  struct key made;
  if (!marker_of(key, &made)) return luaL_error(L, "not enough memory");
  key_push(L, &made);
  return 1;
}

static const luaL_Reg starters[] = {{"hear", start_hear}, {"listen", start_listen}, {NULL, NULL}};

static const luaL_Reg functions[] = {{"hear", hear},
                                     {"listen", listen},
                                     {"marker", marker},
                                     {"unlisten", unlisten},
                                     {NULL, NULL}};

void notify_open(lua_State *L) {
  luaL_setfuncs(L, functions, 0);
  lua_getfield(L, -1, "start");
  luaL_setfuncs(L, starters, 0);
  lua_pop(L, 1);
}
