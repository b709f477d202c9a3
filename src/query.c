/* query.c: statements of the user's own on a connection, and ping. */
#include "pglocks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RESULT_TYPE "pglocks result"

enum { MAX_PARAMETERS = 64, BOOL_OID = 16, INT8_OID = 20, INT2_OID = 21, INT4_OID = 23, OID_OID = 26 };

enum { ANSWERED, SETTLED }; /* op.state */

/* The guards' answers come before that to a Sync after them. */
void query_advance(struct session *s) {
  struct operation *op = &s->op;
  struct command **unanswered = s->newest;
  if (op->state == ANSWERED) {
    if (op->answer.failed) op->failure = op->answer.failure;
    if (op->interrupted) failure_set(&op->failure, INTERRUPTED, "", "interrupted");
    op->state = SETTLED;
    op->reply_by = monotonic_now() + s->reply_timeout;
    if (op->result != NULL && *op->result != NULL)
      transaction_note_end(s, PQcmdStatus(*op->result));
    holdings_settle(s);
    notify_settle(s);
    if (s->newest != unanswered) command_sync(s);
  }
  if (op->unanswered == 0 && !op->done)
    operation_done(s, op->failure.code, op->failure.sqlstate, "%s", op->failure.message);
}

/* ---- rows ------------------------------------------------------------------------------ */

void push_exact(lua_State *L, int64_t n) {
#if LUA_VERSION_NUM >= 503
  lua_pushinteger(L, n);
#else
  char digits[24];
  snprintf(digits, sizeof digits, "%lld", (long long)n);
  if (n >= -9007199254740992LL && n <= 9007199254740992LL)
    lua_pushnumber(L, (lua_Number)n);
  else
    lua_pushstring(L, digits);
#endif
}

static void push_value(lua_State *L, const PGresult *result, int row, int column) {
  const char *text = PQgetvalue(result, row, column);
  switch (PQftype(result, column)) {
  case BOOL_OID:
    lua_pushboolean(L, *text == 't');
    break;
  case INT2_OID:
  case INT4_OID:
  case INT8_OID:
  case OID_OID:
    push_exact(L, strtoll(text, NULL, 10));
    break;
  default:
    lua_pushlstring(L, text, (size_t)PQgetlength(result, row, column));
  }
}

static void push_rows(lua_State *L, const PGresult *result) {
  int rows = PQntuples(result), columns = PQnfields(result);
  lua_createtable(L, rows, 0);
  for (int row = 0; row < rows; row++) {
    lua_createtable(L, 0, columns);
    for (int column = 0; column < columns; column++) {
      if (PQgetisnull(result, row, column)) continue;
      push_value(L, result, row, column);
      lua_setfield(L, -2, PQfname(result, column));
    }
    lua_rawseti(L, -2, row + 1);
  }
}

/* Made before the query is sent, so that its result always has an owner: Lua may throw while it
 * makes tables of it, and may run a finalizer that makes another query. */
struct box {
  enum magic magic;
  PGresult *result;
};

static struct box *box_push(lua_State *L) {
  struct box *box = new_userdata(L, sizeof *box);
  box->magic = RESULT_MAGIC;
  box->result = NULL;
  luaL_setmetatable(L, RESULT_TYPE);
  return box;
}

static int box_collect(lua_State *L) {
  struct box *box = test_userdata(L, 1, sizeof *box, RESULT_MAGIC);
  if (box != NULL) {
    PQclear(box->result);
    box->result = NULL;
  }
  return 0;
}

static int query_finish(lua_State *L, struct session *s) {
  struct box *box;
  slot_get(L, 1, SLOT_PENDING);
  box = lua_touserdata(L, -1);
  lua_pushboolean(L, 0);
  slot_set(L, 1, SLOT_PENDING);
  operation_end(L, s);
  push_rows(L, box->result);
  lua_pushstring(L, PQcmdStatus(box->result));
  PQclear(box->result);
  box->result = NULL;
  return 2;
}

static const struct operation_kind querying = {"query", true, query_advance, query_finish};

/* ---- parameters ------------------------------------------------------------------------ */

/* The text that PostgreSQL reads for the Lua value at `index`; it lives as long as the stack. */
static const char *parameter(lua_State *L, int index, int argument) {
  size_t length;
  const char *text;
  switch (lua_type(L, index)) {
  case LUA_TNIL:
    return NULL;
  case LUA_TBOOLEAN:
    return lua_toboolean(L, index) ? "t" : "f";
  case LUA_TNUMBER:
    if (!lua_isinteger(L, index)) {
      double n = lua_tonumber(L, index);
      char digits[32];
      snprintf(digits, sizeof digits, n == floor(n) && fabs(n) < 1e15 ? "%.0f" : "%.17g", n);
      lua_pushstring(L, isnan(n) ? "NaN" : isinf(n) ? (n > 0 ? "Infinity" : "-Infinity") : digits);
    } else
      lua_pushfstring(L, "%s", lua_tostring(L, index));
    lua_replace(L, index);
    return lua_tostring(L, index);
  case LUA_TSTRING:
    text = lua_tolstring(L, index, &length);
    if (strlen(text) != length)
      argument_error(L, argument, "string without NUL expected: PostgreSQL's text has none");
    return text;
  default:
    type_error(L, argument, "nil, boolean, number or string", index);
    return NULL;
  }
}

/* Connection at 1, then SQL and parameters from `first`; seconds < 0: no deadline. */
static struct session *query_begin(lua_State *L, int first, double seconds) {
  struct session *s;
  const char *values[MAX_PARAMETERS];
  struct box *box;
  const char *sql;
  int n = lua_gettop(L) - first;
  s = connection_check(L, 1);
  if (lua_type(L, first) != LUA_TSTRING) type_error(L, 1, "SQL as a string", first);
  sql = parameter(L, first, 1);
  if (n > MAX_PARAMETERS) argument_error(L, 2, "at most 64 parameters expected");
  for (int i = 0; i < n; i++) values[i] = parameter(L, first + 1 + i, 2 + i);
  box = box_push(L);
  connection_ready(L, 1, s); /* last, because a collection may have done anything to it */
  slot_set(L, 1, SLOT_PENDING);
  operation_begin(s, &querying, seconds < 0 ? INFINITY : seconds);
  s->op.result = &box->result;
  command_query(s, sql, n, values);
  return s;
}

static int start_query(lua_State *L) {
  query_begin(L, 2, -1);
  return 0;
}

/* The rows alone. */
static int connection_query(lua_State *L) {
  operation_complete(L, query_begin(L, 2, -1));
  lua_pop(L, 1);
  return 1;
}

/* execute(conn, seconds, sql, ...): the rows and the command tag. seconds: nil is the reply
 * timeout, negative no deadline. */
static struct session *execute_begin(lua_State *L) {
  double seconds = connection_check(L, 1)->reply_timeout;
  return query_begin(L, 3, lua_isnil(L, 2) ? seconds : luaL_checknumber(L, 2));
}

static int start_execute(lua_State *L) {
  execute_begin(L);
  return 0;
}

static int execute(lua_State *L) { return operation_complete(L, execute_begin(L)); }

/* ---- ping ------------------------------------------------------------------------------ */

/* A bare Sync: a round trip that works in every state of a transaction. */
static int ping_finish(lua_State *L, struct session *s) {
  operation_end(L, s);
  lua_pushboolean(L, 1);
  return 1;
}

static const struct operation_kind pinging = {"ping", true, query_advance, ping_finish};

static struct session *ping_begin(lua_State *L) {
  struct session *s = connection_check(L, 1);
  double seconds = s->reply_timeout;
  if (!lua_isnoneornil(L, 2)) seconds = timeout_check(L, 2, 1, "timeout");
  connection_ready(L, 1, s);
  operation_begin(s, &pinging, seconds);
  command_sync(s);
  return s;
}

static int start_ping(lua_State *L) {
  ping_begin(L);
  return 0;
}

static int connection_ping(lua_State *L) { return operation_complete(L, ping_begin(L)); }

static const luaL_Reg connection_methods[] = {
    {"ping", connection_ping}, {"query", connection_query}, {NULL, NULL}};

static const luaL_Reg starters[] = {
    {"execute", start_execute}, {"ping", start_ping}, {"query", start_query}, {NULL, NULL}};

static const luaL_Reg functions[] = {{"execute", execute}, {NULL, NULL}};

void query_open(lua_State *L) {
  luaL_setfuncs(L, functions, 0);
  luaL_newmetatable(L, RESULT_TYPE);
  lua_pushcfunction(L, box_collect);
  lua_setfield(L, -2, "__gc");
  lua_pop(L, 1);
  lua_getfield(L, -1, "connection");
  luaL_setfuncs(L, connection_methods, 0);
  lua_pop(L, 1);
  lua_getfield(L, -1, "start");
  luaL_setfuncs(L, starters, 0);
  lua_pop(L, 1);
}
