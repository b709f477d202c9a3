/* share.c: locks of many owners on one connection. Each is made closed, and joins what the connection holds
 * of its key: so the server sees one holder, and turns.lua decides who is next. */
#include "lock.h"

#include <string.h>

/* The bytes of a key. */
static void identity_push(lua_State *L, const struct key *key) {
  char bytes[sizeof key->classid + sizeof key->objid + 1];
  memcpy(bytes, &key->classid, sizeof key->classid);
  memcpy(bytes + sizeof key->classid, &key->objid, sizeof key->objid);
  bytes[sizeof bytes - 1] = (char)key->objsubid;
  lua_pushlstring(L, bytes, sizeof bytes);
}

/* closed_lock(key, options): a lock of no connection yet, the string of its key, whether it is to be shared,
 * its timeout or nil, whether a token is asked for; and whether anything is that takes a connection of its
 * own. Raises what conn:lock would raise about them. */
static int closed_lock(lua_State *L) {
  struct options o;
  struct lock *lock;
  lua_settop(L, 2);
  lua_pushnil(L);
  lua_insert(L, 1);
  lua_settop(L, 4);
  options_check(L, &o);
  lock = lock_make(L, false, &o);
  lock->draws = false;
  luaL_setmetatable(L, LOCK_TYPE);
  identity_push(L, &lock->members[0].key);
  lua_pushboolean(L, o.shared);
  if (o.timeout >= 0)
    lua_pushnumber(L, o.timeout);
  else
    lua_pushnil(L);
  lua_pushboolean(L, o.token);
  lua_pushboolean(L, o.patient || o.slots > 0 || o.scope == SCOPE_TRANSACTION || o.comment != 0);
  return 6;
}

static int push_joined(lua_State *L, const struct lock *lock) {
  identity_push(L, &lock->members[0].key);
  if (lock->owner == 0) return 1;
  lua_pushinteger(L, lock->owner);
  return 2;
}

/* standing(lock): the string of its key, and whom it was joined for; nothing when it is not held. Raises
 * lost, once, and forked. */
static int standing(lua_State *L) {
  struct lock *lock = lock_check(L);
  struct session *s = connection_insert(L, lock);
  enum lock_state state;
  if (session_is_foreign(s)) connection_ready(L, 1, s);
  session_alive(s);
  connection_tell_loss(L, 1, s);
  state = lock_state(lock);
  if (state == LOCK_HELD && holds_locks(s)) return push_joined(L, lock);
  if (lock->state == LOCK_HELD && s->state != SESSION_CLOSED && !s->closing) {
    struct failure failure = s->loss;
    if (s->state != SESSION_LOST) failure_set(&failure, LOST, "", NOT_HELD_MESSAGE);
    failure.code = LOST;
    release_now(s, lock);
    failure_push(L, &failure, &lock->members[0].key);
    lua_error(L);
  }
  return 0;
}

/* identity(lock): the string of its key, and whom it was joined for; nothing when it is known not to be
 * held. */
static int identity(lua_State *L) {
  struct lock *lock = lock_check(L);
  if (lock_state(lock) != LOCK_HELD || !holds_locks(lock->session)) return 0;
  return push_joined(L, lock);
}

/* leaves(conn, lock): is a release of the lock's key under way? */
static int leaves(lua_State *L) {
  struct session *s = connection_check(L, 1);
  struct lock *lock = check_userdata(L, 2, LOCK_TYPE, sizeof *lock, LOCK_MAGIC);
  lua_pushboolean(L, holds_locks(s) && holding_leaves(s, &lock->members[0].key));
  return 1;
}

/* join(conn, lock, waited, owner): a closed lock becomes one more on what the connection holds of its key and
 * mode, for an owner, who is a number. False: it holds nothing of that. */
static int join(lua_State *L) {
  struct session *s = connection_check(L, 1);
  struct lock *lock = check_userdata(L, 2, LOCK_TYPE, sizeof *lock, LOCK_MAGIC);
  struct member *m = lock->members;
  bool held;
  if (lock->session != NULL) return luaL_error(L, "this lock was used before");
  m->holding = holds_locks(s) ? holding_get(s, &m->key, lock->shared, false) : NULL;
  held = m->holding != NULL && m->holding->count > 0;
  if (held) {
    lock_bind(L, 2, 1, lock, s);
    if (m->holding->count == 1) holding_set_name(m->holding, m->name, m->name_length);
    member_count(m);
    lock->state = LOCK_HELD;
    lock->acquired = lock->joined = true;
    lock->waited = luaL_optnumber(L, 3, 0);
    lock->owner = luaL_optinteger(L, 4, 0);
  } else if (m->holding != NULL)
    holding_put(s, m->holding);
  lua_pushboolean(L, held);
  return 1;
}

/* bind(conn, lock): a closed lock that was not to be had, for its methods. */
static int bind(lua_State *L) {
  struct session *s = connection_check(L, 1);
  struct lock *lock = check_userdata(L, 2, LOCK_TYPE, sizeof *lock, LOCK_MAGIC);
  if (lock->session != NULL) return luaL_error(L, "this lock was used before");
  lock_bind(L, 2, 1, lock, s);
  return 0;
}

static const luaL_Reg functions[] = {{"bind", bind},
                                     {"closed_lock", closed_lock},
                                     {"identity", identity},
                                     {"join", join},
                                     {"leaves", leaves},
                                     {"standing", standing},
                                     {NULL, NULL}};

void share_open(lua_State *L) { luaL_setfuncs(L, functions, 0); }
