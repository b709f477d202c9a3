/* key.c: what PostgreSQL locks: a 64-bit key or a pair, made from a number, a pair of numbers
 * or, by a scheme, a name. */
#include "pglocks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULTS "pglocks key defaults"
#define TOSTRING "pglocks tostring"
#define INT64 "pglocks int64"
#define LUAJIT_TCDATA 10

struct key_userdata {
  enum magic magic;
  struct key key;
};

/* ---- keys from Lua values -------------------------------------------------------------- */

enum number { NOT_A_NUMBER, NOT_EXACT, EXACT };

/* Of LuaJIT's cdata only tostring tells C what it is: 42LL, or 42ULL. */
static enum number cdata_integer(lua_State *L, int index, int64_t *n) {
  char digits[24] = "", *end;
  const char *text;
  bool is_unsigned = false;
  lua_getfield(L, LUA_REGISTRYINDEX, TOSTRING);
  lua_pushvalue(L, index);
  lua_call(L, 1, 1);
  text = lua_tostring(L, -1);
  if (text != NULL) snprintf(digits, sizeof digits, "%s", text);
  lua_pop(L, 1);
  if (digits[0] != '-' && (digits[0] < '0' || digits[0] > '9')) return NOT_A_NUMBER;
  *n = (int64_t)strtoull(digits, &end, 10);
  if (strcmp(end, "ULL") == 0)
    is_unsigned = true;
  else if (strcmp(end, "LL") != 0)
    return NOT_A_NUMBER;
  return is_unsigned && *n < 0 ? NOT_EXACT : EXACT;
}

/* By hand, because Lua 5.4's own conversion takes "42" and LuaJIT's takes 1.5. */
static enum number exact_integer(lua_State *L, int index, int64_t *n) {
  double d;
  if (lua_type(L, index) == LUAJIT_TCDATA) return cdata_integer(L, index, n);
  if (lua_type(L, index) != LUA_TNUMBER) return NOT_A_NUMBER;
  if (lua_isinteger(L, index)) {
    *n = lua_tointeger(L, index);
    return EXACT;
  }
  d = lua_tonumber(L, index);
  if (!(d >= -9223372036854775808.0 && d < 9223372036854775808.0) || d != floor(d))
    return NOT_EXACT;
#if LUA_VERSION_NUM < 503
  /* All numbers are doubles here: past 2^53 the program may have meant another one. */
  if (fabs(d) > 9007199254740992.0) return NOT_EXACT;
#endif
  *n = (int64_t)d;
  return EXACT;
}

static void set_big(struct key *key, int64_t n) {
  key->classid = (uint32_t)((uint64_t)n >> 32);
  key->objid = (uint32_t)n;
  key->objsubid = 1;
}

/* Exactly [1] and [2]: a third value is somebody's mistake. */
static bool has_two_values(lua_State *L, int index) {
  int n = 0;
  for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1))
    if (++n > 2) {
      lua_pop(L, 2);
      return false;
    }
  return n == 2 && lua_rawlen(L, index) == 2;
}

/* Where a key came from, for messages. */
struct source {
  int argument, element; /* of a list; 0: it is none */
  bool hashed;           /* returned by a function of the user's */
  bool beside;           /* its options, so that it is an option itself */
};

static int options_argument(const struct source *from) {
  return from->beside ? from->argument : from->argument + 1;
}

/* What stands before a message; pushes it. */
static const char *said(lua_State *L, const struct source *from) {
  const char *what = from->hashed ? "what the 'hash' function returned: "
                     : from->beside ? "option 'key': "
                                    : "";
  return from->element > 0 ? lua_pushfstring(L, "keys[%d]: %s", from->element, what) : what;
}

static void pair_check(lua_State *L, int index, const struct source *from, struct key *key) {
  int64_t n[2];
  if (!has_two_values(L, index))
    argument_error(L, from->argument,
                   lua_pushfstring(L, "%sa pair of 32-bit integers expected, got another table",
                                   said(L, from)));
  for (int i = 0; i < 2; i++) {
    enum number is;
    lua_rawgeti(L, index, i + 1);
    is = exact_integer(L, lua_gettop(L), &n[i]);
    if (is != EXACT || n[i] < INT32_MIN || n[i] > INT32_MAX) {
      const char *wrong = is == NOT_A_NUMBER ? luaL_typename(L, -1)
                          : is == NOT_EXACT  ? "no exact integer"
                                             : "out of range";
      argument_error(L, from->argument,
                     lua_pushfstring(L, "%sa pair of 32-bit integers expected, [%d] is %s",
                                     said(L, from), i + 1, wrong));
    }
    lua_pop(L, 1);
  }
  key->classid = (uint32_t)n[0];
  key->objid = (uint32_t)n[1];
  key->objsubid = 2;
}

/* What stands for itself, or raises. */
static void plain_check(lua_State *L, int index, const struct source *from, struct key *key) {
  const struct key_userdata *other;
  int64_t n;
  switch (exact_integer(L, index, &n)) {
  case EXACT:
    set_big(key, n);
    return;
  case NOT_EXACT:
    argument_error(L, from->argument,
                   lua_pushfstring(L, "%snumber has no exact representation as a 64-bit integer",
                                   said(L, from)));
    return; /* not reached */
  case NOT_A_NUMBER:
    break;
  }
  other = test_userdata(L, index, sizeof *other, KEY_MAGIC);
  if (other != NULL)
    *key = other->key;
  else if (lua_type(L, index) == LUA_TTABLE)
    pair_check(L, index, from, key);
  else
    type_error(L, from->argument,
               lua_pushfstring(L, "%sinteger, pair of integers or %s", said(L, from),
                               from->hashed ? "key" : "string"), index);
}

/* ---- names ------------------------------------------------------------------------------ */

/* What the call has not said is as the defaults say. */
static void fill_up(lua_State *L, struct hashing *how) {
  const struct hashing *defaults;
  if (how->explicit_scheme && how->explicit_space) return;
  lua_getfield(L, LUA_REGISTRYINDEX, DEFAULTS);
  defaults = lua_touserdata(L, -1);
  if (!how->explicit_scheme) how->scheme = defaults->scheme;
  if (!how->explicit_space) how->space = defaults->space;
  lua_pop(L, 1);
}

static void hash_option(lua_State *L, int index, int argument, struct hashing *how) {
  how->explicit_scheme = true;
  how->scheme = NULL;
  if (lua_isfunction(L, index)) return;
  if (lua_type(L, index) != LUA_TSTRING)
    type_error(L, argument, "option 'hash': name of a scheme or function", index);
  if (is_name(L, index)) how->scheme = scheme_find(lua_tostring(L, index));
  if (how->scheme == NULL)
    argument_error(L, argument, lua_pushfstring(L, "option 'hash': unknown scheme '%s'",
                                                lua_tostring(L, index)));
}

static void namespace_option(lua_State *L, int index, int argument, struct hashing *how) {
  struct space *space = &how->space;
  memset(space, 0, sizeof *space);
  how->explicit_space = true;
  if (lua_type(L, index) == LUA_TSTRING) {
    space->is = SPACE_TEXT;
    space->text.text = lua_tolstring(L, index, &space->text.length);
  } else if (exact_integer(L, index, &space->number) == EXACT) {
    space->is = SPACE_NUMBER;
  } else if (lua_istable(L, index) && lua_rawlen(L, index) > 0) {
    space->is = SPACE_LIST;
    for (int i = 1; i <= (int)lua_rawlen(L, index); i++) {
      const char *one;
      size_t length;
      lua_rawgeti(L, index, i);
      if (lua_type(L, -1) != LUA_TSTRING)
        argument_error(L, argument, lua_pushfstring(L, "option 'namespace': list of strings expected,"
                                                    " [%d] is %s", i, luaL_typename(L, -1)));
      one = lua_tolstring(L, -1, &length);
      space->number = space_seed(space->number, one, length);
      lua_pop(L, 1);
    }
  } else {
    type_error(L, argument, "option 'namespace': string, integer or list of strings", index);
  }
}

bool key_option(lua_State *L, const char *option, int index, int argument, struct hashing *how) {
  if (strcmp(option, "hash") == 0)
    hash_option(L, index, argument, how);
  else if (strcmp(option, "namespace") == 0)
    namespace_option(L, index, argument, how);
  else
    return false;
  return true;
}

/* Raises if they do not go together. */
static void adopt(lua_State *L, int argument, struct hashing *how) {
  const char *takes = how->scheme != NULL ? scheme_adopt(how->scheme, &how->space) : NULL;
  if (takes != NULL)
    argument_error(L, argument, lua_pushfstring(L, "hash '%s' takes %s", how->scheme->name, takes));
}

/* What an option was given as: in the call's options at `index`, or else to setup. */
static void push_option(lua_State *L, const char *option, bool is_explicit, int index) {
  if (is_explicit) {
    lua_pushvalue(L, index);
  } else {
    lua_getfield(L, LUA_REGISTRYINDEX, DEFAULTS);
    push_environment(L, -1);
    lua_replace(L, -2);
  }
  lua_pushstring(L, option);
  lua_rawget(L, -2);
  lua_replace(L, -2);
}

/* hash(name, namespace) */
static void call_function(lua_State *L, int index, int options, const struct source *from,
                          const struct hashing *how, struct key *key) {
  struct source result = {options_argument(from), from->element, true, from->beside};
  int top = lua_gettop(L);
  push_option(L, "hash", how->explicit_scheme, options);
  lua_pushvalue(L, index);
  push_option(L, "namespace", how->explicit_space, options);
  lua_call(L, 2, 1);
  plain_check(L, top + 1, &result, key);
  lua_pop(L, 1);
}

static void name_check(lua_State *L, int index, int options, const struct source *from,
                       const struct hashing *given, struct key *key) {
  struct hashing how = *given;
  struct text name;
  const char *wrong;
  fill_up(L, &how);
  if (how.scheme == NULL) {
    call_function(L, index, options, from, &how, key);
    return;
  }
  adopt(L, options_argument(from), &how); /* the defaults go together */
  name.text = lua_tolstring(L, index, &name.length);
  wrong = how.scheme->make(&name, &how.space, key);
  if (wrong != NULL)
    argument_error(L, from->argument,
                   lua_pushfstring(L, "%shash '%s': %s", said(L, from), how.scheme->name, wrong));
}

/* ---- any of them ------------------------------------------------------------------------ */

const struct key *key_test(lua_State *L, int index) {
  const struct key_userdata *key = test_userdata(L, index, sizeof *key, KEY_MAGIC);
  return key != NULL ? &key->key : NULL;
}

void key_check(lua_State *L, int index, int options, int argument, int element,
               const struct hashing *how, struct key *key) {
  struct source from = {argument, element, false, how->beside};
  if (lua_type(L, index) == LUA_TSTRING)
    name_check(L, index, options, &from, how, key);
  else if (how->explicit_scheme || how->explicit_space)
    argument_error(L, options_argument(&from),
                   lua_pushfstring(L, "option '%s' is for names only",
                                   how->explicit_scheme ? "hash" : "namespace"));
  else
    plain_check(L, index, &from, key);
}

/* ---- showing keys ---------------------------------------------------------------------- */

static int64_t key_number(const struct key *key) {
  return (int64_t)((uint64_t)key->classid << 32 | key->objid);
}

static void key_format(const struct key *key, char *buffer, size_t size) {
  if (key->objsubid == 2)
    snprintf(buffer, size, "(%d, %d)", (int)(int32_t)key->classid, (int)(int32_t)key->objid);
  else
    snprintf(buffer, size, "%lld", (long long)key_number(key));
}

void text_escape(const char *text, size_t length, char *buffer, size_t size) {
  size_t used = 0, i;
  for (i = 0; i < length && used + 8 < size; i++) {
    unsigned char c = (unsigned char)text[i];
    if (c < ' ' || c > '~' || c == '"' || c == '\\' || c == '*')
      used += (size_t)snprintf(buffer + used, size - used, "\\x%02X", c);
    else
      buffer[used++] = (char)c;
  }
  snprintf(buffer + used, size - used, i < length ? "..." : "");
}

void key_describe(const struct key *key, const char *name, size_t length, char *buffer,
                  size_t size) {
  if (name == NULL) {
    key_format(key, buffer, size);
    return;
  }
  buffer[0] = '"';
  text_escape(name, length, buffer + 1, size - 2);
  strcat(buffer, "\"");
}

bool key_equal(const struct key *a, const struct key *b) {
  return a->classid == b->classid && a->objid == b->objid && a->objsubid == b->objsubid;
}

int key_compare(const struct key *a, const struct key *b) {
  int64_t x = key_number(a), y = key_number(b);
  if (a->objsubid != b->objsubid) return a->objsubid < b->objsubid ? -1 : 1;
  if (a->objsubid == 2 && a->classid == b->classid) {
    x = (int32_t)a->objid;
    y = (int32_t)b->objid;
  }
  return (x > y) - (x < y);
}

/* ---- the key object -------------------------------------------------------------------- */

void key_push(lua_State *L, const struct key *key) {
  struct key_userdata *u = new_userdata(L, sizeof *u);
  u->magic = KEY_MAGIC;
  u->key = *key;
  luaL_setmetatable(L, KEY_TYPE);
}

static const struct key *self(lua_State *L, int index) {
  struct key_userdata *u = check_userdata(L, index, KEY_TYPE, sizeof *u, KEY_MAGIC);
  return &u->key;
}

static int key_eq(lua_State *L) {
  const struct key_userdata *a = test_userdata(L, 1, sizeof *a, KEY_MAGIC);
  const struct key_userdata *b = test_userdata(L, 2, sizeof *b, KEY_MAGIC);
  lua_pushboolean(L, a != NULL && b != NULL && key_equal(&a->key, &b->key));
  return 1;
}

static int key_lt(lua_State *L) {
  lua_pushboolean(L, key_compare(self(L, 1), self(L, 2)) < 0);
  return 1;
}

static int key_le(lua_State *L) {
  lua_pushboolean(L, key_compare(self(L, 1), self(L, 2)) <= 0);
  return 1;
}

static int key_tostring(lua_State *L) {
  char text[32];
  key_format(self(L, 1), text, sizeof text);
  lua_pushstring(L, text);
  return 1;
}

#if LUA_VERSION_NUM < 503
/* A function that makes LuaJIT's 64-bit integer of two halves, loaded when first needed; or false.
 * Unprotected: an error is one of memory, or Ctrl-C, and no sign that there is no ffi. */
static void push_int64(lua_State *L) {
  static const char chunk[] =
      "if not (package.loaded.ffi or package.preload.ffi) then return false end\n"
      "local int64 = require 'ffi'.typeof 'int64_t'\n"
      "return function(high, low) return int64(high) * 2^32 + low end";
  lua_getfield(L, LUA_REGISTRYINDEX, INT64);
  if (!lua_isnil(L, -1)) return;
  lua_pop(L, 1);
  if (luaL_loadstring(L, chunk) != 0) lua_error(L);
  lua_call(L, 0, 1);
  lua_pushvalue(L, -1);
  lua_setfield(L, LUA_REGISTRYINDEX, INT64);
}
#endif

/* A number past 2^53 is an int64_t of LuaJIT's ffi, and without that a string of digits. */
static void push_integer(lua_State *L, int64_t n) {
#if LUA_VERSION_NUM >= 503
  lua_pushinteger(L, n);
#else
  if (n >= -(INT64_C(1) << 53) && n <= INT64_C(1) << 53) {
    lua_pushnumber(L, (double)n);
    return;
  }
  push_int64(L);
  if (lua_toboolean(L, -1)) {
    lua_pushnumber(L, (int32_t)((uint64_t)n >> 32));
    lua_pushnumber(L, (uint32_t)n);
    lua_call(L, 2, 1);
  } else {
    char digits[24];
    snprintf(digits, sizeof digits, "%lld", (long long)n);
    lua_pushstring(L, digits);
  }
#endif
}

/* What a call would take for the same key. */
static void push_value(lua_State *L, const struct key *key) {
  if (key->objsubid == 1) {
    push_integer(L, key_number(key));
    return;
  }
  lua_createtable(L, 2, 0);
  lua_pushinteger(L, (int32_t)key->classid);
  lua_rawseti(L, -2, 1);
  lua_pushinteger(L, (int32_t)key->objid);
  lua_rawseti(L, -2, 2);
}

static int key_index(lua_State *L) {
  const struct key *key = self(L, 1);
  const char *field = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  if (strcmp(field, "classid") == 0)
    push_integer(L, key->classid);
  else if (strcmp(field, "objid") == 0)
    push_integer(L, key->objid);
  else if (strcmp(field, "objsubid") == 0)
    push_integer(L, key->objsubid);
  else if (strcmp(field, "value") == 0)
    push_value(L, key);
  else
    return 0;
  return 1;
}

static void options_check(lua_State *L, int index, int argument, struct hashing *how) {
  if (lua_isnoneornil(L, index)) return;
  if (!lua_istable(L, index)) type_error(L, argument, "table of options", index);
  for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1))
    if (!is_name(L, -2) ||
        !key_option(L, lua_tostring(L, -2), lua_gettop(L), argument, how))
      option_error(L, argument);
}

/* key(key [, { hash =, namespace = }]) */
static int make_key(lua_State *L) {
  struct hashing how = {0};
  struct key key;
  lua_settop(L, 2);
  options_check(L, 2, 2, &how);
  key_check(L, 1, 2, 1, 0, &how, &key);
  key_push(L, &key);
  return 1;
}

/* key_defaults({ hash =, namespace = }): for every later call; without them, as at the start. */
static int set_defaults(lua_State *L) {
  struct hashing how = {0}, *defaults;
  lua_settop(L, 1);
  how.scheme = scheme_default();
  options_check(L, 1, 1, &how);
  adopt(L, 1, &how);
  how.explicit_scheme = how.explicit_space = false;
  defaults = new_userdata(L, sizeof *defaults);
  *defaults = how;
  lua_newtable(L); /* keeps a copy of the options, and the namespace alive */
  if (lua_istable(L, 1))
    for (lua_pushnil(L); lua_next(L, 1);) {
      lua_pushvalue(L, -2);
      lua_insert(L, -2);
      lua_rawset(L, -4);
    }
  set_environment(L, -2);
  lua_setfield(L, LUA_REGISTRYINDEX, DEFAULTS);
  return 0;
}

/* key_among(options): the `key` of a table, with the `hash` and `namespace` that stand there, too; nil
 * where there is none. */
static int key_among(lua_State *L) {
  static const char *const options[] = {"hash", "namespace"};
  struct hashing how = {.beside = true};
  struct key key;
  luaL_checktype(L, 1, LUA_TTABLE);
  lua_settop(L, 1);
  lua_pushliteral(L, "key");
  lua_rawget(L, 1);
  for (int i = 0; i < 2; i++) {
    lua_pushstring(L, options[i]);
    lua_rawget(L, 1);
    if (!lua_isnil(L, -1)) key_option(L, options[i], lua_gettop(L), 1, &how);
  }
  if (lua_isnil(L, 2) && !how.explicit_scheme && !how.explicit_space) return 0;
  key_check(L, 2, 1, 1, 0, &how, &key);
  key_push(L, &key);
  return 1;
}

static uint32_t shown_check(lua_State *L, int index) {
  double n = luaL_checknumber(L, index);
  if (!(n >= 0 && n <= UINT32_MAX)) luaL_argerror(L, index, "a number of pg_locks expected");
  return (uint32_t)n;
}

/* key_shown(classid, objid, objsubid): the key that pg_locks shows so. */
static int key_shown(lua_State *L) {
  struct key key = {shown_check(L, 1), shown_check(L, 2), (uint8_t)shown_check(L, 3)};
  key_push(L, &key);
  return 1;
}

static const luaL_Reg key_metamethods[] = {
    {"__eq", key_eq}, {"__index", key_index},       {"__le", key_le},
    {"__lt", key_lt}, {"__tostring", key_tostring}, {NULL, NULL}};

/* describe(given, key): as in a message, by the name that was given. */
static int describe(lua_State *L) {
  const struct key *key = key_test(L, 2);
  char text[NAME_IN_MESSAGE];
  size_t length = 0;
  const char *name = lua_type(L, 1) == LUA_TSTRING ? lua_tolstring(L, 1, &length) : NULL;
  if (key == NULL) luaL_argerror(L, 2, "key expected");
  key_describe(key, name, length, text, sizeof text);
  lua_pushstring(L, text);
  return 1;
}

static const luaL_Reg functions[] = {{"describe", describe},
                                     {"key", make_key},
                                     {"key_among", key_among},
                                     {"key_defaults", set_defaults},
                                     {"key_shown", key_shown},
                                     {NULL, NULL}};

void key_open(lua_State *L) {
  schemes_open();
  luaL_setfuncs(L, functions, 0);
  luaL_newmetatable(L, KEY_TYPE);
  luaL_setfuncs(L, key_metamethods, 0);
  lua_pop(L, 1);
  lua_getglobal(L, "tostring");
  lua_setfield(L, LUA_REGISTRYINDEX, TOSTRING);
  lua_pushcfunction(L, set_defaults);
  lua_call(L, 0, 0);
}
