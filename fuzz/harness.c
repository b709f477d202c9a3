/* harness.c: what the fuzz targets share. */
#include "harness.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const uint8_t *input, *input_end;

/* A run is short: a long memory of what was freed would only cost time. And libpq makes room for a
 * message of any length that its first bytes promise. */
const char *__asan_default_options(void);

const char *__asan_default_options(void) {
  return "quarantine_size_mb=4:max_allocation_size_mb=64:allocator_may_return_null=1";
}

bool input_left(void) { return input < input_end; }

unsigned input_byte(void) { return input_left() ? *input++ : 0; }

uint64_t input_integer(int bytes) {
  uint64_t n = 0;
  while (bytes-- > 0) n = n << 8 | input_byte();
  return n;
}

void finding(const char *format, ...) {
  va_list args;
  fputs("FINDING: ", stderr);
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputs("\n", stderr);
  abort();
}

void trace(const char *format, ...) {
  static int wanted = -1;
  va_list args;
  if (wanted < 0) wanted = getenv("PGLOCKS_FUZZ_TRACE") != NULL;
  if (!wanted) return;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputs("\n", stderr);
}

int luaopen_pglocks_core(lua_State *L);

lua_State *harness_state(void) {
  lua_State *L = luaL_newstate();
  if (L == NULL) finding("no Lua state");
  luaL_openlibs(L);
  lua_getglobal(L, "package");
  lua_pushliteral(L, "lua/?.lua;lua/?/init.lua");
  lua_setfield(L, -2, "path");
  lua_pushliteral(L, "");
  lua_setfield(L, -2, "cpath");
  lua_getfield(L, -1, "preload");
  lua_pushcfunction(L, luaopen_pglocks_core);
  lua_setfield(L, -2, "pglocks.core");
  lua_pop(L, 2);
  return L;
}

static const char *const codes[] = {
    "aborted_transaction", "busy_connection", "closed",   "connect", "deadlock",
    "forked",              "interrupted",     "lost",     "not_held", "permission",
    "pooled",              "server",          "standby",  "timeout", "too_many_connections",
    "too_many_locks",      "unknown"};

static const char *code_known(const char *where, const char *code) {
  for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
    if (strcmp(code, codes[i]) == 0) return codes[i];
  finding("%s raises an error with the code '%s'", where, code);
}

static void has_no_canary(const char *where, const char *text) {
  if (strstr(text, CANARY) != NULL) finding("%s tells the password: %s", where, text);
}

const char *harness_error(lua_State *L, const char *where, bool argument) {
  const char *code;
  if (lua_type(L, -1) == LUA_TSTRING) {
    if (argument && strstr(lua_tostring(L, -1), "bad argument #") == NULL)
      finding("%s raises what is no argument error: %s", where, lua_tostring(L, -1));
    has_no_canary(where, lua_tostring(L, -1));
    return "";
  }
  if (lua_type(L, -1) != LUA_TTABLE || !luaL_getmetafield(L, -1, "__tostring"))
    finding("%s raises a %s", where, luaL_typename(L, -1));
  lua_getfield(L, -2, "code");
  lua_getfield(L, -3, "message");
  if (lua_type(L, -1) != LUA_TSTRING || lua_type(L, -2) != LUA_TSTRING)
    finding("%s raises an error without a code or a message", where);
  code = code_known(where, lua_tostring(L, -2));
  has_no_canary(where, luaL_tolstring(L, -4, NULL));
  lua_pop(L, 4);
  return code;
}
