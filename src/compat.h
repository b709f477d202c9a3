/* compat.h: one spelling of the Lua C API for Lua 5.1 (LuaJIT) to 5.5.
 * Everything here is a macro or static, so no symbol leaves the module. */
#ifndef PGLOCKS_COMPAT_H
#define PGLOCKS_COMPAT_H

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

/* A userdata's environment: one table of its own, which keeps what it needs alive. */
#if LUA_VERSION_NUM >= 504
#define new_userdata(L, size) lua_newuserdatauv(L, size, 1)
#define set_environment(L, i) lua_setiuservalue(L, i, 1)
#define push_environment(L, i) lua_getiuservalue(L, i, 1)
#elif LUA_VERSION_NUM >= 502
#define new_userdata(L, size) lua_newuserdata(L, size)
#define set_environment(L, i) lua_setuservalue(L, i)
#define push_environment(L, i) lua_getuservalue(L, i)
#else
#define new_userdata(L, size) lua_newuserdata(L, size)
#define set_environment(L, i) lua_setfenv(L, i)
#define push_environment(L, i) lua_getfenv(L, i)
#endif

#if LUA_VERSION_NUM < 502
#define lua_rawlen(L, i) lua_objlen(L, i)

#ifndef LUA_JITLIBNAME /* LuaJIT has these three */
static inline void luaL_setfuncs(lua_State *L, const luaL_Reg *reg, int nup) {
  for (; reg->name; reg++) {
    for (int i = 0; i < nup; i++) lua_pushvalue(L, -nup);
    lua_pushcclosure(L, reg->func, nup);
    lua_setfield(L, -nup - 2, reg->name);
  }
  lua_pop(L, nup);
}

static inline void luaL_setmetatable(lua_State *L, const char *name) {
  luaL_getmetatable(L, name);
  lua_setmetatable(L, -2);
}
#define luaL_newlib(L, reg) (luaL_newlibtable(L, reg), luaL_setfuncs(L, reg, 0))
#define luaL_newlibtable(L, reg) lua_createtable(L, 0, sizeof(reg) / sizeof((reg)[0]) - 1)
#endif
#endif

#if LUA_VERSION_NUM < 503
#define lua_isinteger(L, i) ((void)(L), (void)(i), 0)
#endif

#endif
