/* names.c: the names of the keys on a session, for conn:all_locks(). */
#include "pglocks.h"

#include <string.h>

/* What stands before the bytes of a name in the copy. */
struct named {
  struct key key;
  size_t length;
};

/* The bytes of all of them; with `to`, copies them. Those that are waited for, or on their way out,
 * are among them: the server has them, too. */
static size_t names_copy(const struct session *s, char *to) {
  size_t used = 0;
  for (size_t i = 0; i < s->bucket_count; i++)
    for (const struct holding *h = s->buckets[i]; h != NULL; h = h->next) {
      struct named one = {h->key, h->name_length};
      if (!h->has_name) continue;
      if (to != NULL) {
        memcpy(to + used, &one, sizeof one);
        memcpy(to + used + sizeof one, h->name, one.length);
      }
      used += sizeof one + one.length;
    }
  return used;
}

/* NULL: nothing can be held on it. */
static const struct session *open_session(lua_State *L) {
  const struct session *s = connection_find(L, 1);
  return s != NULL && s->state == SESSION_OPEN && !session_is_foreign(s) ? s : NULL;
}

/* names(conn): { [tostring(key)] = name, ... } and the backend's pid, or nothing where nothing can be
 * held. From a copy, because Lua may collect garbage meanwhile: locks of the session, and the connection
 * itself, where only a weak table has kept it. */
static int names(lua_State *L) {
  const struct session *s;
  size_t size = 0, needed, used = 0;
  char *copy = NULL, key[NAME_IN_MESSAGE];
  struct named one;
  lua_settop(L, 1);
  lua_newtable(L);
  lua_pushnil(L); /* the pid */
  lua_pushnil(L); /* the copy */
  while ((s = open_session(L)) != NULL && (needed = names_copy(s, NULL)) > size) {
    copy = lua_newuserdata(L, size = needed);
    lua_replace(L, 4);
  }
  if (s == NULL) return 0;
  if (needed > 0) names_copy(s, copy);
  lua_pushinteger(L, s->backend_pid);
  lua_replace(L, 3);
  for (; used < needed; used += sizeof one + one.length) {
    memcpy(&one, copy + used, sizeof one);
    key_describe(&one.key, NULL, 0, key, sizeof key);
    lua_pushstring(L, key);
    lua_pushlstring(L, copy + used + sizeof one, one.length);
    lua_rawset(L, 2);
  }
  lua_settop(L, 3);
  return 2;
}

static const luaL_Reg functions[] = {{"names", names}, {NULL, NULL}};

void names_open(lua_State *L) { luaL_setfuncs(L, functions, 0); }
