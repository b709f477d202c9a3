/* keys.c: any Lua values, given to the calls that read keys, options and descriptions.
 *
 * The input is a program of calls with their arguments. Each call must return, or raise what
 * pglocks raises. Nothing is connected to anything: `connect` and names of hosts are refused. */
#include "harness.h"

#include <errno.h>
#include <math.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static lua_State *L;

/* In the registry: what is called, made once. */
#define PGLOCKS "fuzz pglocks"
#define CORE "fuzz core"
#define DESCRIBE "fuzz describe"
#define CONNECTION "fuzz connection"
#define FUNCTIONS "fuzz functions"

enum { MAX_CALLS = 8, MAX_DEPTH = 3 };

/* ---- no network ------------------------------------------------------------------------ */

/* In the place of libc's, for libpq too. */
#pragma GCC visibility push(default)
int connect(int fd, __CONST_SOCKADDR_ARG address, socklen_t length) {
  (void)fd, (void)address, (void)length;
  errno = ECONNREFUSED;
  return -1;
}

int __interceptor_getaddrinfo(const char *, const char *, const struct addrinfo *,
                              struct addrinfo **);

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
  struct addrinfo numeric = {0};
  if (hints != NULL) numeric = *hints;
  numeric.ai_flags |= AI_NUMERICHOST | AI_NUMERICSERV;
  return __interceptor_getaddrinfo(name, service, &numeric, found);
}
#pragma GCC visibility pop

/* ---- values ---------------------------------------------------------------------------- */

#define USERS_OWN "an error of the user's own"

static int raise_users_own(lua_State *T) { return luaL_error(T, USERS_OWN); }

static int return_nothing(lua_State *T) {
  (void)T;
  return 0;
}

static int return_first(lua_State *T) {
  lua_settop(T, 1);
  return 1;
}

static int called_without_lock(lua_State *T) {
  (void)T;
  finding("a function was called without the lock");
}

/* What a user's own scheme may do. */
static int return_length(lua_State *T) {
  lua_pushinteger(T, (lua_Integer)lua_rawlen(T, 1));
  return 1;
}

static const char *const strings[] = {
    "",        "42",     "a name", "sha256",          "django-pglocks", "sha256\0x", "shared",
    "timeout", "hash",   "using",  "namespace",       "comment",        "wait",      "default",
    "cqueues", "luv",    "nginx",  "blocking",        "session",        "confirmed", "deferred",
    "host",    "*/ --",  "\"\\*/", "\xff\xfe\x80",    "%s%n",           "5432",      "1,2",
    "conninfo", "password", "port", "databases", "scheduler", "pooled", "on_lost", "release",
    "distributedlock", "00000003,ffffffff", "flyway", "\xf0\x9f\x98\x80\"", "goose", "good_job", "river",
    "-7", "npm-advisory-lock", "npm-pg-advisory-lock", "hashtextextended", "sqlalchemy-dlock", "sqlx",
    "with_advisory_lock"};

static const char *const options[] = {
    "shared", "timeout", "hash", "namespace", "comment", "using", "wait", "timeuot", "scope"};

static const char *const keywords[] = {
    "conninfo", "host",  "hostaddr",     "port",          "dbname",    "user",    "password",
    "sslmode",  "timeout", "reply_timeout", "on_lost",    "release",   "pooled",  "pool_size",
    "scheduler", "allow_standby", "connect_timeout", "options", "nonsense", "target_session_attrs"};

#define LENGTH(array) (sizeof(array) / sizeof *(array))
#define PICK(array) ((array)[input_byte() % LENGTH(array)])

static void push_number(void) {
  static const double doubles[] = {
      1.5, 0.0, -0.0, 1e-9, 0.0004, 1e300, 9223372036854775808.0, -9223372036854775808.0,
      9007199254740993.0, 2147483647.0, 2147483648.0, -2147483649.0, 4294967296.0, -1.0,
      HUGE_VAL, -HUGE_VAL, NAN};
  static const long long integers[] = {0, 1, -1, INT32_MAX, INT32_MIN, 2147483648LL, -2147483649LL,
                                       UINT32_MAX, INT64_MAX, INT64_MIN, (1LL << 53) + 1};
  union {
    uint64_t bits;
    double n;
  } raw;
  switch (input_byte() % 5) {
  case 0:
    lua_pushinteger(L, (int8_t)input_byte());
    break;
  case 1:
    lua_pushinteger(L, PICK(integers));
    break;
  case 2:
    lua_pushnumber(L, PICK(doubles));
    break;
  case 3:
    lua_pushinteger(L, (lua_Integer)input_integer(8));
    break;
  default:
    raw.bits = input_integer(8);
    lua_pushnumber(L, raw.n);
  }
}

static void push_string(void) {
  size_t length = input_byte();
  if (length < 128) {
    lua_pushstring(L, strings[length % LENGTH(strings)]);
  } else if (length < 136) {
    luaL_Buffer buffer;
    char *bytes = luaL_buffinitsize(L, &buffer, length * 64);
    memset(bytes, (int)input_byte(), length * 64);
    luaL_pushresultsize(&buffer, length * 64);
  } else {
    length -= 136;
    if (length > (size_t)(input_end - input)) length = (size_t)(input_end - input);
    /* The password is nowhere but where one belongs. */
    if (memmem(input, length, CANARY, strlen(CANARY)) == NULL)
      lua_pushlstring(L, (const char *)input, length);
    else
      lua_pushliteral(L, "");
    input += length;
  }
}

static void push_field(const char *of, const char *name) {
  lua_getfield(L, LUA_REGISTRYINDEX, of);
  lua_getfield(L, -1, name);
  lua_remove(L, -2);
}

/* A connection that was refused before anything was sent; the same one throughout a run. */
static void push_closed_connection(void) {
  lua_getfield(L, LUA_REGISTRYINDEX, CONNECTION);
  if (!lua_isnil(L, -1)) return;
  push_field(CORE, "start");
  lua_getfield(L, -1, "connect");
  lua_newtable(L);
  lua_pushliteral(L, "?");
  lua_setfield(L, -2, "hostaddr");
  lua_pushinteger(L, 1);
  lua_call(L, 2, 1);
  lua_replace(L, -3);
  push_field(CORE, "finish");
  lua_pushvalue(L, -3);
  lua_call(L, 1, 0);
  lua_pop(L, 1);
  lua_pushvalue(L, -1);
  lua_setfield(L, LUA_REGISTRYINDEX, CONNECTION);
}

static void push_value(int depth);

/* The option `hash` is a function to call. */
static void replace_function(void) {
  static const lua_CFunction schemes[] = {raise_users_own, return_nothing, return_first, return_length};
  if (lua_tocfunction(L, -1) != called_without_lock || lua_type(L, -2) != LUA_TSTRING ||
      strcmp(lua_tostring(L, -2), "hash") != 0)
    return;
  lua_pop(L, 1);
  lua_pushcfunction(L, PICK(schemes));
}

static void push_table(int depth, const char *const *names, size_t count) {
  lua_newtable(L);
  for (unsigned n = input_byte() % 6; n > 0; n--) {
    unsigned which = input_byte();
    if (which < 224 && count > 0)
      lua_pushstring(L, names[which % count]);
    else
      push_value(depth + 1);
    push_value(depth + 1);
    replace_function();
    if (lua_isnil(L, -2) || (lua_isnumber(L, -2) && lua_tonumber(L, -2) != lua_tonumber(L, -2)))
      lua_pop(L, 2);
    else
      lua_rawset(L, -3);
  }
}

static void push_options(void) { push_table(1, options, LENGTH(options)); }

/* A metatable of one of ours on something else. */
static void push_impostor(void) {
  static const char *const types[] = {"pglocks key",    "pglocks lock",   "pglocks connection",
                                      "pglocks waiter", "pglocks watch",  "pglocks conninfo",
                                      "pglocks result", "pglocks error"};
  size_t size = (size_t)40 * (input_byte() % 3);
  const char *type = PICK(types);
  if (input_byte() % 4 == 0)
    lua_newtable(L);
  else
    memset(lua_newuserdatauv(L, size, 1), 0, size);
  luaL_setmetatable(L, type);
}

static void push_value(int depth) {
  static const char *const events[] = {"__index", "__len", "__pairs",   "__call",
                                       "__eq",    "__lt",  "__tostring", "__concat"};
  static const lua_CFunction handlers[] = {raise_users_own, return_nothing, return_first};
  unsigned kind = input_byte() % 24;
  luaL_checkstack(L, 16, NULL);
  if (depth >= MAX_DEPTH) kind %= 12;
  switch (kind) {
  case 0:
    lua_pushnil(L);
    break;
  case 1:
    lua_pushboolean(L, 0);
    break;
  case 2:
    lua_pushboolean(L, 1);
    break;
  case 3:
  case 4:
  case 5:
    push_number();
    break;
  case 6:
  case 7:
  case 8:
    push_string();
    break;
  case 9:
    lua_pushcfunction(L, called_without_lock);
    break;
  case 10:
    lua_pushlightuserdata(L, L);
    break;
  case 11:
    push_closed_connection();
    break;
  case 12:
    push_impostor();
    break;
  case 13: /* a key itself */
    lua_getfield(L, LUA_REGISTRYINDEX, CORE);
    lua_getfield(L, -1, "key");
    lua_replace(L, -2);
    lua_pushinteger(L, (int8_t)input_byte());
    lua_call(L, 1, 1);
    break;
  case 14:
    lua_newthread(L);
    break;
  case 15:
  case 16:
  case 17:
    lua_newtable(L);
    for (int i = 1; i <= 2; i++) {
      if (kind == 17) push_value(depth + 1);
      else push_number();
      lua_rawseti(L, -2, i);
    }
    break;
  case 18:
    push_table(depth, strings, LENGTH(strings));
    break;
  case 19:
    push_table(depth, options, LENGTH(options));
    break;
  case 20:
    push_table(depth, keywords, LENGTH(keywords));
    break;
  case 21: /* it has metamethods */
    push_table(depth, keywords, LENGTH(keywords));
    lua_newtable(L);
    /* What a wrong iterator or name leads to is not pglocks' to tell. */
    if (input_byte() % 2 == 0) {
      lua_pushcfunction(L, PICK(handlers));
      lua_setfield(L, -2, "__index");
    } else {
      lua_pushcfunction(L, raise_users_own);
      lua_setfield(L, -2, PICK(events));
    }
    lua_setmetatable(L, -2);
    break;
  case 22: /* it contains itself */
    lua_newtable(L);
    lua_pushvalue(L, -1);
    lua_rawseti(L, -2, 1);
    lua_pushvalue(L, -1);
    lua_rawseti(L, -2, 2);
    break;
  default:
    lua_newtable(L);
  }
}

/* ---- descriptions ---------------------------------------------------------------------- */

static void add_specials(luaL_Buffer *buffer) {
  static const char specials[] = " '\\=%@/:?#[],&\n\t!0aF~";
  for (unsigned n = input_byte() % 4; n > 0; n--) {
    unsigned c = input_byte();
    luaL_addchar(buffer, c < 200 ? specials[c % (sizeof specials - 1)] : (char)c);
  }
}

/* A conninfo string or a URI with a password in it, well put or not. */
static void push_conninfo(void) {
  static const char *const assignments[] = {
      "",
      "host=a ",
      "host=a,b port=1,2 ",
      "port=5432 ",
      "port=x ",
      "hostaddr=127.0.0.1 ",
      "user=u ",
      "sslmode=disable ",
      "sslmode=nonsense ",
      "nonsense=1 ",
      "dbname=d ",
      "=",
      "host = /tmp ",
      "connect_timeout=1 ",
      "target_session_attrs=any ",
      "host=@abstract ",
      "user "};
  static const char *const schemes[] = {"postgresql://", "postgres://", "postgresqls://"};
  static const char *const users[] = {"u", "", "u%20", "a.b"};
  static const char *const places[] = {"",        "h",      "h:1",   "[::1]:5432", "h1,h2:2/d",
                                       "/d",      "h/d?sslmode=disable", "?host=/tmp", "%2Ftmp/d",
                                       "h:x/d",   "h?nonsense=1", "h/%zz"};
  luaL_Buffer buffer;
  luaL_buffinit(L, &buffer);
  if (input_byte() % 2 == 0) {
    luaL_addstring(&buffer, PICK(assignments));
    luaL_addstring(&buffer, PICK(assignments));
    luaL_addstring(&buffer, "password=");
    add_specials(&buffer);
    luaL_addstring(&buffer, CANARY);
    add_specials(&buffer);
    luaL_addstring(&buffer, " ");
    luaL_addstring(&buffer, PICK(assignments));
  } else {
    luaL_addstring(&buffer, PICK(schemes));
    luaL_addstring(&buffer, PICK(users));
    luaL_addstring(&buffer, ":");
    add_specials(&buffer);
    luaL_addstring(&buffer, CANARY);
    add_specials(&buffer);
    luaL_addstring(&buffer, "@");
    luaL_addstring(&buffer, PICK(places));
  }
  luaL_pushresult(&buffer);
}

static void push_description(void) {
  switch (input_byte() % 4) {
  case 0:
    push_value(1);
    break;
  case 1:
    push_conninfo();
    break;
  default:
    push_table(1, keywords, LENGTH(keywords));
    if (input_byte() % 2 == 0) {
      push_conninfo();
      lua_setfield(L, -2, "conninfo");
    } else {
      lua_pushliteral(L, CANARY);
      lua_setfield(L, -2, "password");
    }
  }
}

/* ---- calls ----------------------------------------------------------------------------- */

static bool is_users_own(void) {
  return lua_type(L, -1) == LUA_TSTRING && strstr(lua_tostring(L, -1), USERS_OWN) != NULL;
}

/* Calls the function that lies before `arguments` values, and leaves what it returned or the
 * error. The code of that: "" for an argument error, NULL for none. */
static const char *call(const char *where, int arguments, bool argument) {
  if (lua_pcall(L, arguments, LUA_MULTRET, 0) == LUA_OK) return NULL;
  if (is_users_own()) return "user";
  return harness_error(L, where, argument);
}

/* A list of keys, or nearly so; now and then anything else. */
static void push_keys(void) {
  unsigned n = input_byte();
  if (n >= 240) {
    push_value(0);
    return;
  }
  lua_newtable(L);
  for (int i = 1; i <= (int)(n % 5); i++) {
    push_value(1);
    lua_rawseti(L, -2, i);
  }
  if (n < 220) return;
  push_value(1);
  lua_setfield(L, -2, "n");
}

/* A number of arguments, of which the first are a key, or many, and options. */
static int push_arguments(bool many) {
  unsigned n = input_byte() % 8;
  if (many) push_keys();
  else push_value(0);
  if (n < 4)
    push_options();
  else
    push_value(0);
  if (n % 4 == 1) push_value(0);
  if (n % 4 == 2) lua_pushcfunction(L, called_without_lock);
  return n % 4 == 1 || n % 4 == 2 ? 3 : 2;
}

static const char *call_copied(const char *of, const char *name, int first, int arguments) {
  push_field(of, name);
  for (int i = 0; i < arguments; i++) lua_pushvalue(L, first + i);
  return call(name, arguments, true);
}

static lua_Integer integer_field(int index, const char *name) {
  lua_Integer n;
  lua_getfield(L, index, name);
  if (!lua_isinteger(L, -1)) finding("key.%s is no integer", name);
  n = lua_tointeger(L, -1);
  lua_pop(L, 1);
  return n;
}

/* The same values give the same key, which agrees with itself. */
static void check_key(int key, int other) {
  lua_Integer classid = integer_field(key, "classid"), objid = integer_field(key, "objid"),
              objsubid = integer_field(key, "objsubid");
  long long a, b;
  int end = 0;
  if (!lua_compare(L, key, other, LUA_OPEQ)) finding("the same values, two keys");
  if (lua_compare(L, key, other, LUA_OPLT) || !lua_compare(L, key, other, LUA_OPLE))
    finding("equal keys are in an order");
  if (classid < 0 || classid > UINT32_MAX || objid < 0 || objid > UINT32_MAX ||
      (objsubid != 1 && objsubid != 2))
    finding("a key out of range");
  luaL_tolstring(L, key, NULL);
  if (objsubid == 1) {
    if (sscanf(lua_tostring(L, -1), "%lld%n", &a, &end) != 1 ||
        (uint64_t)a != ((uint64_t)classid << 32 | (uint64_t)objid))
      finding("tostring(key) is %s", lua_tostring(L, -1));
  } else if (sscanf(lua_tostring(L, -1), "(%lld, %lld)%n", &a, &b, &end) != 2 ||
             (uint32_t)a != classid || (uint32_t)b != objid)
    finding("tostring(key) is %s", lua_tostring(L, -1));
  if ((size_t)end != strlen(lua_tostring(L, -1))) finding("tostring(key) goes on");
  lua_pop(L, 1);
  call_copied(CORE, "key", key, 1);
  if (!lua_compare(L, key, -1, LUA_OPEQ)) finding("a key's key is another");
  lua_pop(L, 1);
}

static void call_key(void) {
  int first = lua_gettop(L) + 1;
  const char *code, *again;
  push_value(0);
  if (input_byte() % 2 == 0)
    lua_pushnil(L);
  else
    push_options();
  code = call_copied(CORE, "key", first, 2);
  again = call_copied(CORE, "key", first, 2);
  if ((code == NULL) != (again == NULL)) finding("the same values, a key and an error");
  if (code != NULL) return;
  check_key(first + 2, first + 3);
  if (call_copied(CORE, "check", first, 2) != NULL) finding("check() and key() disagree");
}

/* check_all() takes a list of what check() takes, and nothing else. */
static void check_keys(int keys, int how, bool taken) {
  int count = lua_istable(L, keys) ? (int)lua_rawlen(L, keys) : 0, found = 0;
  bool each = true;
  if (lua_istable(L, keys))
    for (lua_pushnil(L); lua_next(L, keys); lua_pop(L, 1)) found++;
  for (int i = 1; i <= count; i++) {
    push_field(CORE, "check");
    lua_rawgeti(L, keys, i);
    lua_pushvalue(L, how);
    each = call("check", 2, true) == NULL && each;
  }
  if (taken != (each && count > 0 && found == count))
    finding("check_all() %s %d keys", taken ? "takes" : "refuses", count);
}

/* What check() takes, or check_all(), a connection that is closed refuses as such, and nothing
 * else. */
static void call_method(void) {
  static const struct {
    const char *name;
    bool many, with; /* with: it takes a function */
  } methods[] = {{"lock", false, false},          {"try_lock", false, false},
                 {"with_lock", false, true},      {"try_with_lock", false, true},
                 {"lock_all", true, false},       {"try_lock_all", true, false},
                 {"with_lock_all", true, true},   {"try_with_lock_all", true, true}};
  size_t method = input_byte() % LENGTH(methods);
  const char *name = methods[method].name;
  int first = lua_gettop(L) + 1, arguments;
  const char *checked, *code;
  lua_pushnil(L); /* another than the one that a call may have collected */
  lua_setfield(L, LUA_REGISTRYINDEX, CONNECTION);
  push_closed_connection();
  arguments = push_arguments(methods[method].many);
  checked = call_copied(CORE, methods[method].many ? "check_all" : "check", first + 1, 2);
  if (methods[method].many) check_keys(first + 1, first + 2, checked == NULL);
  lua_settop(L, first + arguments);
  lua_getfield(L, first, name);
  lua_insert(L, first);
  code = call(name, arguments + 1, true);
  if (code == NULL) finding("%s returns on a closed connection", name);
  if (*code == '\0') {
    if (checked == NULL && !methods[method].with)
      finding("%s refuses what may be locked: %s", name, lua_tostring(L, -1));
  } else if (checked != NULL && strcmp(checked, code) != 0 && !methods[method].with)
    finding("%s takes what may not be locked", name);
  else if (strcmp(code, "closed") != 0 && strcmp(code, "user") != 0)
    finding("%s on a closed connection raises %s", name, code);
}

static void call_of_module(void) {
  static const char *const names[] = {
      "lock",     "try_lock",     "with_lock",     "try_with_lock",     "wrap",
      "lock_all", "try_lock_all", "with_lock_all", "try_with_lock_all", "advisory_lock"};
  const char *name = PICK(names), *code;
  push_field(PGLOCKS, name);
  code = call(name, push_arguments(strstr(name, "_all") != NULL), true);
  /* A timeout of next to nothing is over before anybody has refused the connection. */
  if (code == NULL && strcmp(name, "wrap") != 0 &&
      (lua_type(L, -1) != LUA_TSTRING || strcmp(lua_tostring(L, -1), "timeout") != 0))
    finding("%s returns without a server", name);
}

static void call_setup(void) {
  push_field(PGLOCKS, "setup");
  if (input_byte() % 4 == 0)
    push_value(0);
  else {
    push_table(1, options, LENGTH(options)); /* hash and namespace are among them */
    if (input_byte() % 2 == 0) {
      lua_newtable(L);
      push_description();
      lua_setfield(L, -2, input_byte() % 2 == 0 ? "default" : "other");
      lua_setfield(L, -2, "databases");
    }
    for (size_t i = 0; i < LENGTH(options); i++) /* else nearly every call would be refused */
      if (strcmp(options[i], "hash") != 0 && strcmp(options[i], "namespace") != 0) {
        lua_pushnil(L);
        lua_setfield(L, -2, options[i]);
      }
  }
  call("setup", 1, true);
}

static void call_describe(void) {
  int first = lua_gettop(L) + 1;
  lua_getfield(L, LUA_REGISTRYINDEX, DESCRIBE);
  push_description();
  lua_pushvalue(L, -1);
  lua_replace(L, first);
  lua_getfield(L, LUA_REGISTRYINDEX, DESCRIBE);
  lua_insert(L, first + 1);
  lua_pushboolean(L, 0);
  if (call("describe", 2, false) == NULL) {
    if (lua_isnil(L, first + 1)) {
      if (lua_type(L, first + 2) != LUA_TSTRING) finding("describe does not say what is wrong");
      harness_error(L, "describe", false);
    } else if (!lua_istable(L, first + 1) || !lua_istable(L, first + 2))
      finding("describe returns no tables");
  }
  lua_settop(L, first);
  push_field(PGLOCKS, "connect");
  lua_insert(L, first);
  if (call("connect", 1, true) == NULL) finding("connect returns without a server");
}

/* Any function of ours, with any arguments: of some of them only Lua's own errors are expected. */
static void call_any(void) {
  unsigned arguments;
  lua_getfield(L, LUA_REGISTRYINDEX, FUNCTIONS);
  lua_rawgeti(L, -1, (int)(input_byte() % lua_rawlen(L, -1)) + 1);
  lua_replace(L, -2);
  arguments = input_byte() % 5;
  for (unsigned i = 0; i < arguments; i++) push_value(0);
  call("a function", (int)arguments, false);
}

/* ---- the target ------------------------------------------------------------------------ */

static void collect_functions(int table, int depth) {
  static const char *const left_out[] = {
      "keep_alive", /* it would set options of any socket */
      "password",   /* it reads any file */
      "sleep",      /* it would */
      "nothing"};
  for (lua_pushnil(L); lua_next(L, table); lua_pop(L, 1)) {
    bool wanted = true;
    if (lua_istable(L, -1) && depth < 3) collect_functions(lua_gettop(L), depth + 1);
    if (!lua_isfunction(L, -1) || lua_type(L, -2) != LUA_TSTRING) continue;
    for (size_t i = 0; i < LENGTH(left_out); i++)
      wanted = wanted && strcmp(lua_tostring(L, -2), left_out[i]) != 0;
    if (!wanted) continue;
    lua_getfield(L, LUA_REGISTRYINDEX, FUNCTIONS);
    lua_pushvalue(L, -2);
    lua_rawseti(L, -2, (int)lua_rawlen(L, -2) + 1);
    lua_pop(L, 1);
  }
}

static void require(const char *name, const char *as) {
  lua_getglobal(L, "require");
  lua_pushstring(L, name);
  lua_call(L, 1, 1);
  lua_setfield(L, LUA_REGISTRYINDEX, as);
}

static int not_transient(lua_State *state) {
  lua_pushboolean(state, 0);
  return 1;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  static const char *const types[] = {"pglocks key",  "pglocks lock",     "pglocks connection",
                                      "pglocks watch", "pglocks waiter", "pglocks conninfo",
                                      "pglocks result", "pglocks error"};
  (void)argc, (void)argv;
  unsetenv("PGSERVICE");
  setenv("PGPASSFILE", "/dev/null", 1);
  setenv("PGHOST", "/nowhere", 1);
  L = harness_state();
  require("pglocks", PGLOCKS);
  require("pglocks.core", CORE);
  lua_getglobal(L, "require");
  lua_pushliteral(L, "pglocks.connect");
  lua_call(L, 1, 1);
  lua_getfield(L, -1, "describe");
  lua_setfield(L, LUA_REGISTRYINDEX, DESCRIBE);
  lua_newtable(L);
  lua_setfield(L, LUA_REGISTRYINDEX, FUNCTIONS);
  lua_getfield(L, LUA_REGISTRYINDEX, CORE);
  collect_functions(lua_gettop(L), 0);
  for (size_t i = 0; i < LENGTH(types); i++) {
    luaL_getmetatable(L, types[i]);
    collect_functions(lua_gettop(L), 2);
  }
  /* Whatever refuses a connection does so for good: connect need not try again, and wait for that. */
  lua_getfield(L, LUA_REGISTRYINDEX, CORE);
  lua_pushcfunction(L, not_transient);
  lua_setfield(L, -2, "is_transient");
  lua_settop(L, 0);
  return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static void (*const calls[])(void) = {call_key,       call_key,   call_method,   call_method,
                                        call_of_module, call_setup, call_describe, call_any};
  input = data;
  input_end = data + size;
  for (int i = 0; i < MAX_CALLS && input_left(); i++) {
    PICK(calls)();
    lua_settop(L, 0);
  }
  push_field(PGLOCKS, "setup"); /* as at the start */
  lua_newtable(L);
  lua_call(L, 1, 0);
  lua_pushnil(L);
  lua_setfield(L, LUA_REGISTRYINDEX, CONNECTION);
  lua_gc(L, LUA_GCCOLLECT);
  return 0;
}
