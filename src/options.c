/* options.c: the arguments of what takes locks: options, keys, and the lock that is made of them. */
#include "lock.h"

#include <stdlib.h>
#include <string.h>

#define MOST_KEYS 1000000 /* more than any server can lock */
#define MOST_SLOTS 1000
#define LONGEST_TIMEOUT 2147483.0 /* seconds; lock_timeout is an int of milliseconds */

double timeout_check(lua_State *L, int index, int argument, const char *what) {
  double timeout;
  if (lua_type(L, index) != LUA_TNUMBER)
    type_error(L, argument, lua_pushfstring(L, "%s: number of seconds", what), index);
  timeout = lua_tonumber(L, index);
  if (!(timeout >= 0) || isinf(timeout))
    argument_error(L, argument,
                   lua_pushfstring(L, "%s: finite number of seconds, not negative, expected", what));
  return fmin(timeout, LONGEST_TIMEOUT);
}

static bool boolean_check(lua_State *L, const char *option, int index) {
  if (!lua_isboolean(L, index))
    type_error(L, 2, lua_pushfstring(L, "option '%s': boolean", option), index);
  return lua_toboolean(L, index);
}

static void scope_check(lua_State *L, int index, struct options *o) {
  const char *scope = is_name(L, index) ? lua_tostring(L, index) : "";
  if (strcmp(scope, "session") == 0)
    o->scope = SCOPE_SESSION;
  else if (strcmp(scope, "transaction") == 0)
    o->scope = SCOPE_TRANSACTION;
  else
    argument_error(L, 2, "option 'scope': \"session\" or \"transaction\" expected");
}

static void strategy_check(lua_State *L, int index, struct options *o) {
  const char *strategy = is_name(L, index) ? lua_tostring(L, index) : "";
  o->patient = strcmp(strategy, "notify") == 0 || strcmp(strategy, "poll") == 0;
  if (!o->patient && strcmp(strategy, "queue") != 0)
    argument_error(L, 2, "option 'strategy': \"queue\", \"notify\" or \"poll\" expected");
}

static void slots_check(lua_State *L, int index, struct options *o) {
  double slots = lua_type(L, index) == LUA_TNUMBER ? lua_tonumber(L, index) : 0;
  if (!(slots >= 1 && slots <= MOST_SLOTS && slots == floor(slots)))
    argument_error(L, 2, "option 'slots': integer from 1 to 1000 expected");
  o->slots = (int)slots;
}

static void option_check(lua_State *L, const char *option, int index, struct options *o) {
  if (strcmp(option, "shared") == 0)
    o->shared = boolean_check(L, option, index);
  else if (strcmp(option, "token") == 0)
    o->token = boolean_check(L, option, index);
  else if (strcmp(option, "scope") == 0)
    scope_check(L, index, o);
  else if (strcmp(option, "strategy") == 0)
    strategy_check(L, index, o);
  else if (strcmp(option, "slots") == 0)
    slots_check(L, index, o);
  else if (strcmp(option, "timeout") == 0)
    o->timeout = timeout_check(L, index, 2, "option 'timeout'");
  else if (strcmp(option, "comment") == 0) {
    if (lua_type(L, index) != LUA_TSTRING && !lua_isboolean(L, index))
      type_error(L, 2, "option 'comment': string or boolean", index);
    lua_pushvalue(L, index);
    lua_replace(L, 4);
    o->comment = lua_toboolean(L, 4) ? 4 : 0;
  } else if (!key_option(L, option, index, 2, &o->hashing))
    option_error(L, 2);
}

/* The options at 3; 4 is a place for the comment. */
void options_check(lua_State *L, struct options *o) {
  memset(&o->hashing, 0, sizeof o->hashing);
  o->scope = SCOPE_DEFAULT;
  o->shared = o->token = o->patient = false;
  o->slots = 0;
  o->timeout = -1;
  o->comment = 0;
  if (lua_isnil(L, 3)) return;
  if (!lua_istable(L, 3)) type_error(L, 2, "table of options", 3);
  for (lua_pushnil(L); lua_next(L, 3); lua_pop(L, 1)) {
    if (!is_name(L, -2)) option_error(L, 2);
    option_check(L, lua_tostring(L, -2), lua_gettop(L), o);
  }
  if (o->token && o->scope == SCOPE_TRANSACTION)
    argument_error(L, 2, "option 'token': a lock of session scope expected, not of a transaction");
  if (o->slots > 0 && (o->shared || o->scope == SCOPE_TRANSACTION))
    argument_error(L, 2, "option 'slots': an exclusive lock of session scope expected");
}

/* Of lock_all, and of check_all for it. */
void options_check_all(lua_State *L, struct options *o) {
  options_check(L, o);
  if (o->slots > 0) argument_error(L, 2, "option 'slots': one key expected, not many");
}

/* check(key, options): raises what conn:lock would raise about them. */
static int check_arguments(lua_State *L) {
  struct options o;
  struct key key;
  lua_settop(L, 2);
  lua_pushnil(L);
  lua_insert(L, 1);
  lua_settop(L, 4);
  options_check(L, &o);
  key_check(L, 2, 3, 1, 0, &o.hashing, &key);
  return 0;
}

/* The SQL comment that shows an administrator who locks what, and where in the program. No byte
 * of the name or of the caller's own text can end it. */
const char *comment_push(lua_State *L, int text, const struct lock *lock) {
  char key[NAME_IN_MESSAGE], place[NAME_IN_MESSAGE], extra[NAME_IN_MESSAGE] = "";
  size_t length;
  const char *string;
  lock_describe(lock, key);
  push_caller(L);
  string = lua_tolstring(L, -1, &length);
  text_escape(string, length, place, sizeof place);
  if (lua_type(L, text) == LUA_TSTRING) {
    string = lua_tolstring(L, text, &length);
    text_escape(string, length, extra, sizeof extra);
  }
  lua_pop(L, 1);
  return lua_pushfstring(L, "/* pglocks %s at %s%s%s */ ", key, place, *extra ? ": " : "", extra);
}

/* The list of keys at 2: how many, and the bytes of its names. */
static size_t list_check(lua_State *L, size_t *names_length) {
  size_t count, found = 0;
  if (!lua_istable(L, 2)) type_error(L, 1, "list of keys", 2);
  count = lua_rawlen(L, 2);
  for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) {
    if (lua_type(L, -1) == LUA_TSTRING) *names_length += lua_rawlen(L, -1);
    found++;
  }
  if (count == 0 || found != count)
    argument_error(L, 1, found == 0 ? "at least one key expected, got an empty list"
                                    : "list of keys expected, got another table");
  if (count > MOST_KEYS) argument_error(L, 1, "at most 1000000 keys expected");
  return count;
}

static int compare_members(const void *a, const void *b) {
  return key_compare(&((const struct member *)a)->key, &((const struct member *)b)->key);
}

void lock_sort(struct lock *lock) {
  struct member *m = lock->members;
  size_t i = 1, kept = 1;
  while (i < lock->count && compare_members(&m[i - 1], &m[i]) < 0) i++;
  if (i == lock->count) return; /* as most lists are */
  qsort(m, lock->count, sizeof *m, compare_members);
  for (i = 1; i < lock->count; i++)
    if (!key_equal(&m[i].key, &m[kept - 1].key)) m[kept++] = m[i];
  lock->count = kept;
}

/* The key at `index`; a name is copied to `names`, where there is room for `room` bytes. */
static size_t member_read(lua_State *L, int index, int element, const struct options *o,
                          struct member *m, char *names, size_t room) {
  m->holding = NULL;
  m->generation = 0; /* no holding's */
  m->name = NULL;
  m->name_length = 0;
  key_check(L, index, 3, 1, element, &o->hashing, &m->key);
  if (lua_type(L, index) != LUA_TSTRING) return 0;
  m->name = lua_tolstring(L, index, &m->name_length);
  if (m->name_length > room) argument_error(L, 1, "the list of keys was changed meanwhile");
  m->name = memcpy(names, m->name, m->name_length);
  return m->name_length;
}

/* check_all(keys, options): raises what conn:lock_all would raise about them. */
static int check_all_arguments(lua_State *L) {
  struct options o;
  struct key key;
  size_t count, names_length = 0;
  lua_settop(L, 2);
  lua_pushnil(L);
  lua_insert(L, 1);
  lua_settop(L, 4);
  options_check_all(L, &o);
  count = list_check(L, &names_length);
  for (size_t i = 1; i <= count; i++) {
    lua_rawgeti(L, 2, (int)i);
    key_check(L, 5, 3, 1, (int)i, &o.hashing, &key);
    lua_pop(L, 1);
  }
  return 0;
}

/* Of no connection yet. */
struct lock *lock_make(lua_State *L, bool many, const struct options *o) {
  size_t names_length = !many && lua_type(L, 2) == LUA_TSTRING ? lua_rawlen(L, 2) : 0;
  size_t count = many ? list_check(L, &names_length) : 1, used = 0;
  struct lock *lock =
      new_userdata(L, sizeof *lock + count * sizeof *lock->members + names_length);
  char *names = (char *)&lock->members[count];
  memset(lock, 0, sizeof *lock);
  lock->magic = LOCK_MAGIC;
  lock->state = LOCK_CLOSED;
  lock->shared = o->shared;
  lock->transaction = o->scope == SCOPE_TRANSACTION;
  lock->draws = o->token;
  lock->many = many;
  lock->count = count;
  if (!many) member_read(L, 2, 0, o, lock->members, names, names_length);
  for (size_t i = 0; many && i < count; i++) {
    lua_rawgeti(L, 2, (int)i + 1);
    used += member_read(L, lua_gettop(L), (int)i + 1, o, &lock->members[i], names + used,
                        names_length - used);
    lua_pop(L, 1);
  }
  if (many) lock_sort(lock);
  return lock;
}

static const luaL_Reg functions[] = {
    {"check", check_arguments}, {"check_all", check_all_arguments}, {NULL, NULL}};

void options_open(lua_State *L) { luaL_setfuncs(L, functions, 0); }
