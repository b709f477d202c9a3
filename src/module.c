/* module.c: luaopen_pglocks_core, and what every file of the module uses: argument errors,
 * error objects, self-checks, the clock. */
#include "pglocks.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Sources of pglocks' own Lua files: [source] = true. Errors and comments name their caller. */
#define OWN_SOURCES "pglocks own sources"

double monotonic_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- userdata -------------------------------------------------------------------------- */

/* Looking at the metatable, too, would take longer than all else that a call does before it sends. */
void *test_userdata(lua_State *L, int index, size_t size, enum magic magic) {
  enum magic *p = lua_touserdata(L, index);
  /* A light userdata has no length. */
  return p != NULL && lua_rawlen(L, index) >= size && *p == magic ? p : NULL;
}

void *check_userdata(lua_State *L, int index, const char *type, size_t size, enum magic magic) {
  void *p = test_userdata(L, index, size, magic);
  if (p == NULL) {
    lua_pushfstring(L, "%s expected, got %s", type, luaL_typename(L, index));
    luaL_argerror(L, index, lua_tostring(L, -1));
  }
  return p;
}

/* ---- argument errors ------------------------------------------------------------------- */

static bool is_own_source(lua_State *L, const char *source) {
  bool own;
  lua_getfield(L, LUA_REGISTRYINDEX, OWN_SOURCES);
  lua_getfield(L, -1, source);
  own = lua_toboolean(L, -1);
  lua_pop(L, 2);
  return own;
}

/* Finds the first function that is neither C nor ours, and what it called us. */
static bool find_caller(lua_State *L, lua_Debug *caller, char *called, size_t size) {
  *called = '\0';
  for (int level = 0; lua_getstack(L, level, caller); level++) {
    lua_getinfo(L, "Sln", caller);
    if (level == 0 || (*caller->what != 'C' && is_own_source(L, caller->source))) {
      snprintf(called, size, "%s", caller->name ? caller->name : "?"); /* none after a tail call */
    } else if (*caller->what != 'C')
      return true;
  }
  return false;
}

/* "file:line" and what follows it, or "" where the caller is not Lua. */
static void push_position(lua_State *L, const char *suffix, char *called, size_t size) {
  lua_Debug caller;
  if (find_caller(L, &caller, called, size) && caller.currentline > 0)
    lua_pushfstring(L, "%s:%d%s", caller.short_src, caller.currentline, suffix);
  else
    lua_pushliteral(L, "");
}

void push_caller(lua_State *L) {
  char called[64];
  push_position(L, "", called, sizeof called);
}

int argument_error(lua_State *L, int argument, const char *expected) {
  char called[64];
  push_position(L, ": ", called, sizeof called);
  lua_pushfstring(L, "bad argument #%d to '%s' (%s)", argument, called, expected);
  lua_concat(L, 2);
  lua_error(L);
  abort(); /* lua_error does not return, but does not say so */
}

int type_error(lua_State *L, int argument, const char *expected, int index) {
  const char *got = luaL_typename(L, index);
  argument_error(L, argument, lua_pushfstring(L, "%s expected, got %s", expected, got));
}

bool is_name(lua_State *L, int index) {
  return lua_type(L, index) == LUA_TSTRING &&
         strlen(lua_tostring(L, index)) == lua_rawlen(L, index);
}

int option_error(lua_State *L, int argument) {
  const char *option = lua_type(L, -2) == LUA_TSTRING ? lua_tostring(L, -2) : luaL_typename(L, -2);
  argument_error(L, argument, lua_pushfstring(L, "unknown option '%s'", option));
}

/* own_source(source): a Lua file of pglocks, as debug.getinfo names it. */
static int own_source(lua_State *L) {
  luaL_checkstring(L, 1);
  lua_getfield(L, LUA_REGISTRYINDEX, OWN_SOURCES);
  lua_pushvalue(L, 1);
  lua_pushboolean(L, 1);
  lua_rawset(L, -3);
  return 0;
}

/* raise_argument(argument, message): argument_error for the Lua files. */
static int raise_argument(lua_State *L) {
  argument_error(L, (int)luaL_checkinteger(L, 1), luaL_checkstring(L, 2));
}

/* ---- error objects --------------------------------------------------------------------- */

static const struct {
  enum code code;
  const char *name, *hint;
} codes[] = {
    {ABORTED_TRANSACTION, "aborted_transaction", "roll the transaction back first"},
    {BUSY_CONNECTION, "busy_connection", "give each coroutine a connection of its own"},
    {CLOSED, "closed", NULL},
    {CONNECT, "connect", NULL},
    {DEADLOCK, "deadlock", "take the locks in one order everywhere; other locks are still held"},
    {FORKED, "forked", "connect anew in the child process"},
    {INTERRUPTED, "interrupted", NULL},
    {LOST, "lost", "the lock is no longer held: stop, or take it anew and start over"},
    {NOT_HELD, "not_held", "did something else release it: DISCARD ALL, pg_advisory_unlock_all()?"},
    {PERMISSION, "permission", NULL},
    {POOLED, "pooled", "session locks need a direct connection or session pooling"},
    {SERVER, "server", NULL},
    {STANDBY, "standby", "a standby has locks of its own: connect to the primary"},
    {TIMEOUT, "timeout", NULL},
    {TOO_MANY_CONNECTIONS, "too_many_connections", NULL},
    {TOO_MANY_LOCKS, "too_many_locks",
     "hold fewer locks at once, or raise max_locks_per_transaction"},
    {UNKNOWN, "unknown", "the server may have done it or not; free_by says when it lets go"},
};

void failure_clear(struct failure *failure) {
  failure->code = NO_ERROR;
  failure->sqlstate[0] = failure->message[0] = '\0';
}

void failure_set(struct failure *failure, enum code code, const char *sqlstate,
                 const char *format, ...) {
  va_list args;
  char message[MESSAGE_SIZE]; /* apart, because the arguments may be the failure's own */
  failure->code = code;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  message[strcspn(message, "\n")] = '\0'; /* libpq's texts end in one, or go on with advice */
  memmove(failure->sqlstate, sqlstate, strnlen(sqlstate, SQLSTATE_SIZE - 1) + 1);
  failure->sqlstate[SQLSTATE_SIZE - 1] = '\0';
  memcpy(failure->message, message, sizeof message);
}

bool failure_never_ran(const struct failure *failure) {
  return strcmp(failure->sqlstate, "26000") == 0;
}

void failure_push(lua_State *L, const struct failure *failure, const struct key *key) {
  luaL_checkstack(L, 4, NULL);
  lua_createtable(L, 0, 6);
  lua_pushstring(L, failure->message);
  lua_setfield(L, -2, "message");
  for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
    if (codes[i].code == failure->code) {
      lua_pushstring(L, codes[i].name);
      lua_setfield(L, -2, "code");
      if (codes[i].hint != NULL) {
        lua_pushstring(L, codes[i].hint);
        lua_setfield(L, -2, "hint");
      }
    }
  if (*failure->sqlstate != '\0') {
    lua_pushstring(L, failure->sqlstate);
    lua_setfield(L, -2, "sqlstate");
  }
  if (failure->code == UNKNOWN) {
    lua_pushinteger(L, FREED_BY);
    lua_setfield(L, -2, "free_by");
  }
  if (key != NULL) {
    key_push(L, key);
    lua_setfield(L, -2, "key");
  }
  luaL_setmetatable(L, ERROR_TYPE);
}

void raise_failure(lua_State *L, enum code code, const char *message) {
  struct failure failure;
  failure_set(&failure, code, "", "%s", message);
  failure_push(L, &failure, NULL);
  lua_error(L);
}

static const char *field(lua_State *L, const char *name, const char *otherwise) {
  lua_getfield(L, 1, name);
  return lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : otherwise;
}

static int error_tostring(lua_State *L) {
  const char *code, *message, *sqlstate;
  luaL_checktype(L, 1, LUA_TTABLE);
  code = field(L, "code", "error");
  message = field(L, "message", "");
  sqlstate = field(L, "sqlstate", NULL);
  if (sqlstate != NULL)
    lua_pushfstring(L, "pglocks: %s: %s (SQLSTATE %s)", code, message, sqlstate);
  else
    lua_pushfstring(L, "pglocks: %s: %s", code, message);
  return 1;
}

/* raise(code, message, key): an error object for the Lua files. */
static int raise_error(lua_State *L) {
  const char *name = luaL_checkstring(L, 1), *message = luaL_checkstring(L, 2);
  enum code code = SERVER;
  struct failure failure;
  lua_settop(L, 3);
  for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
    if (strcmp(codes[i].name, name) == 0) code = codes[i].code;
  failure_set(&failure, code, "", "%s", message);
  failure_push(L, &failure, key_test(L, 3));
  return lua_error(L);
}

/* ---- the module ------------------------------------------------------------------------ */

static int now(lua_State *L) {
  lua_pushnumber(L, monotonic_now());
  return 1;
}

static const luaL_Reg functions[] = {{"now", now},
                                     {"own_source", own_source},
                                     {"raise", raise_error},
                                     {"raise_argument", raise_argument},
                                     {NULL, NULL}};

/* pglocks.core:
 *   connection, lock   the methods of each, for Lua to add to
 *   scheduled          connection, lock: those that replace them where a scheduler waits
 *   start              the same methods, as operations that are begun and not waited for: drive
 *                      them with step(conn), then finish(conn) */
__attribute__((visibility("default"))) int luaopen_pglocks_core(lua_State *L);

int luaopen_pglocks_core(lua_State *L) {
  lua_newtable(L);
  lua_setfield(L, LUA_REGISTRYINDEX, OWN_SOURCES);
  luaL_newmetatable(L, ERROR_TYPE);
  lua_pushcfunction(L, error_tostring);
  lua_setfield(L, -2, "__tostring");
  lua_pop(L, 1);

  luaL_newlib(L, functions);
  lua_newtable(L);
  lua_setfield(L, -2, "start");
  lua_newtable(L);
  lua_setfield(L, -2, "connection");
  lua_newtable(L);
  lua_setfield(L, -2, "lock");
  lua_newtable(L);
  for (size_t i = 0; i < 2; i++) {
    lua_newtable(L);
    lua_setfield(L, -2, i == 0 ? "connection" : "lock");
  }
  lua_setfield(L, -2, "scheduled");
  key_open(L);
  connection_open(L);
  query_open(L);
  lock_open(L);
  transaction_open(L);
  notify_open(L);
  names_open(L);
  return 1;
}
