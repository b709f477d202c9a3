-- scheduled.lua: connections that a scheduler waits for. The operations and their steps are the
-- core's; between two steps the calling coroutine waits, and the program's event loop goes on.

local core = require "pglocks.core"
local run = require "pglocks.scope"

core.own_source(debug.getinfo(1, "S").source)

local scheduled = {}

-- ---- which scheduler --------------------------------------------------------------------

local SHIPPED = { cqueues = true, luv = true, nginx = true }
local FUNCTIONS = { "wait", "sleep", "now", "park", "wake", "token" }

--- The scheduler of connections that do not name one; false: they block.
---@return pglocks.scheduler|false
function scheduled.default()
  return _G.ngx ~= nil and require "pglocks.scheduler.nginx"
end

--- What the option `scheduler` names; false: to block.
---@param named string|pglocks.scheduler
---@return pglocks.scheduler|false
---@return string|nil wrong
function scheduled.choose(named)
  if named == "blocking" then return false end
  if SHIPPED[named] then
    local ok, scheduler = pcall(require, "pglocks.scheduler." .. named)
    if ok then return scheduler end
    return false, ("'%s' cannot be loaded: %s"):format(named, tostring(scheduler):match "[^\n]*")
  elseif type(named) ~= "table" then
    return false, ([["cqueues", "luv", "nginx", "blocking" or a table expected, got %s]]):format(
      type(named) == "string" and ("%q"):format(named) or type(named))
  end
  for _, name in ipairs(FUNCTIONS) do
    if type(named[name]) ~= "function" then return false, ("it has no function '%s'"):format(name) end
  end
  return named
end

-- ---- driving ----------------------------------------------------------------------------

local schedulers = setmetatable({}, { __mode = "k" }) -- by connection

--- From now on `scheduler` waits for the connection.
function scheduled.adopt(conn, scheduler)
  schedulers[conn] = scheduler
  core.configure(conn, { scheduled = true })
end

--- The scheduler of a connection, or nil.
function scheduled.of(conn) return schedulers[conn] end

-- By connection, what to call before a release: of a pool, which then decides whether to wait for
-- the answer.
local before_release = setmetatable({}, { __mode = "k" })
scheduled.before_release = before_release

local step, finish, await, new_waiter = core.step, core.finish, core.await, core.waiter

local function drive(waiter, conn)
  local scheduler = schedulers[conn]
  local wait, flush = scheduler.wait, scheduler.flush
  await(waiter, conn)
  local events, fd, seconds = step(conn)
  while events do
    wait(fd, events, seconds < math.huge and seconds or nil, conn)
    events, fd, seconds = step(conn)
  end
  if flush then flush(conn) end
  return finish(conn)
end

local function begin_and_drive(waiter, conn, begin, ...)
  local enter = schedulers[conn].enter
  if enter then enter(conn) end
  begin(...)
  return drive(waiter, conn)
end

local function pass(_, ...) return ... end

-- When the coroutine ends inside, the waiter closes the connection: nobody else would ever drive
-- the operation to its end.
local function call(conn, begin, ...)
  local waiter = new_waiter()
  return run(waiter, pass, begin_and_drive, waiter, conn, begin, ...)
end

--- Drives what was begun on a connection, with and without a scheduler.
function scheduled.run(conn)
  if schedulers[conn] then
    local waiter = new_waiter()
    return run(waiter, pass, drive, waiter, conn)
  end
  core.run(conn)
  return core.finish(conn)
end

for _, method in ipairs { "ping", "close" } do
  local begin = core.start[method]
  core.scheduled.connection[method] = function(conn, ...)
    return pass(nil, call(conn, begin, conn, ...))
  end
end

-- What patience.lua is for.
local function is_patient(options)
  return type(options) == "table" and (options.strategy ~= nil or options.slots ~= nil)
end

for _, method in ipairs { "lock", "lock_all", "try_lock", "try_lock_all" } do
  local begin = core.start[method]
  core.scheduled.connection[method] = function(conn, key, options)
    if is_patient(options) then return pass(nil, scheduled.patiently(conn, method, key, options)) end
    return pass(nil, call(conn, begin, conn, key, options))
  end
end

-- The rows alone.
function core.scheduled.connection.query(conn, ...)
  local rows = call(conn, core.start.query, conn, ...)
  return rows
end

-- While it is asked about, the end of the lock's scope in another coroutine releases it.
local function still_held(lock, ...)
  if not core.lock.held(lock) then core.raise("not_held", "this lock is not held") end
  return ...
end

local function check(lock, ...)
  return still_held(lock, call(core.connection_of(lock), core.start.check, lock, ...))
end

-- By connection, in whose place many owners have it, as turns.lua does: with release(lock),
-- check(lock, check, timeout) and change(lock, timeout, change).
local shared_by = setmetatable({}, { __mode = "kv" })
scheduled.shared_by = shared_by

function core.scheduled.lock.check(lock, ...)
  local owners = shared_by[core.connection_of(lock)]
  if owners then return owners:check(lock, check, ...) end
  return pass(nil, check(lock, ...))
end

function core.scheduled.lock.release(lock)
  local conn = core.connection_of(lock)
  local owners = shared_by[conn]
  if owners then return owners:release(lock) end
  local prepare = before_release[conn]
  if prepare then prepare(conn) end
  return pass(nil, call(conn, core.start.release, lock))
end

-- Lets the scheduler look at the network, where that is not the core's to see.
local function look(conn)
  local see = schedulers[conn].look
  if see then see(conn) end
end

function core.scheduled.connection.alive(conn)
  look(conn)
  return core.connection.alive(conn)
end

function core.scheduled.lock.held(lock)
  look(core.connection_of(lock))
  return core.lock.held(lock)
end

--- What core has under these names, for connections with and without a scheduler.
for _, name in ipairs { "execute", "attempt", "begin", "commit", "listen", "hear" } do
  local begin, blocking = core.start[name], core[name]
  scheduled[name] = function(conn, ...)
    if schedulers[conn] then return pass(nil, call(conn, begin, conn, ...)) end
    return pass(nil, blocking(conn, ...))
  end
end

--- Tries keys, each for itself, on a connection with a scheduler.
function scheduled.try_each(conn, locks)
  return pass(nil, call(conn, core.start.try_each, conn, locks))
end

-- ---- in the background ------------------------------------------------------------------

--- Calls fn in a coroutine of its own; here, where nothing else could go on meanwhile.
function scheduled.spawn(scheduler, fn)
  if scheduler.spawn(fn) == false then fn() end
end

-- ---- watching ---------------------------------------------------------------------------

local BUSY = 0.01 -- seconds until the next look at a connection that is in use

-- Refers to the connection weakly: being watched must not keep it open.
local function keep_looking(watched, scheduler, descriptor, fd)
  repeat
    scheduler.wait(fd, "r")
    local conn = watched.conn
    local alive = conn and conn:alive() -- tells on_lost
    local busy = alive and not core.is_idle(conn)
    conn = nil -- luacheck: ignore 311
    if busy then scheduler.sleep(BUSY) end
  until not alive
  getmetatable(descriptor).__close(descriptor)
end

--- Has a coroutine of its own look for the loss of a connection, where the scheduler can begin one.
function scheduled.watch(conn)
  local scheduler = schedulers[conn]
  if not scheduler or not scheduler.spawn or scheduler.look then return end
  local descriptor, fd = core.watch(conn)
  if not descriptor then return end
  local watched = setmetatable({ conn = conn }, { __mode = "v" })
  scheduler.spawn(function() keep_looking(watched, scheduler, descriptor, fd) end)
end

return scheduled
