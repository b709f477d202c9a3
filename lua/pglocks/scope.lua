-- scope.lua: a function call inside which something is open, and after which it is closed.
--
-- run(closable, finish, fn, ...) calls fn(...) and returns finish(closable, <what fn returned>).
-- When either raises, closable's `__close` runs, and the error goes on as it was. When neither does,
-- `finish` has closed it; on Lua 5.4 `__close` is called once more.

local core = require "pglocks.core"

core.own_source(debug.getinfo(1, "S").source)

if _VERSION >= "Lua 5.4" then
  -- To-be-closed: the error is never caught, so that its traceback reaches down to fn. The text
  -- is loaded, because it is a syntax error for other Luas.
  local run = assert(load([[
    local closable, finish, fn = ...
    local guard <close> = closable
    return finish(guard, fn(select(4, ...)))
  ]], "=pglocks"))
  core.own_source "=pglocks"
  return run
end

local function call(closable, finish, fn, ...) return finish(closable, fn(...)) end

local function settle(closable, ok, ...)
  if ok then return ... end
  getmetatable(closable).__close(closable, (...))
  error((...), 0)
end

local function run(closable, finish, fn, ...)
  return settle(closable, pcall(call, closable, finish, fn, ...))
end

return run
