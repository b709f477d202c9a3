-- locker.lua: many owners on few connections. It has the lock calls of a connection, but each lock is an
-- owner of its own, so that the coroutines of one process exclude each other, too. turns.lua says how.

local core = require "pglocks.core"
local pool = require "pglocks.pool"
local run = require "pglocks.scope"
local turns = require "pglocks.turns"

core.own_source(debug.getinfo(1, "S").source)

-- What the options of the same names are, where they do not say.
local DEFAULTS = { max_connections = 10, locks_per_connection = 100, handovers = 128, handover_time = 0.002 }

local TIMEOUT = 30 -- seconds, of `lock`: no server sees a deadlock between these owners and others

---@class pglocks.locker
local Locker = {}
Locker.__index = Locker

--- What stands against a locker with such options, or nil: in the words of an argument error.
local function unsuited(options)
  local scheduler = options.scheduler
  if not scheduler then
    return "option 'scheduler' expected: \"cqueues\", \"luv\", \"nginx\" or a table"
  elseif not scheduler.spawn then
    return "option 'scheduler': a locker needs its function 'spawn'"
  elseif options.pooled == "transaction" then
    return "option 'pooled': a locker's locks are of session scope"
  elseif options.lease then
    return "option 'lease': nobody pings for all owners of a connection"
  end
end

--- A locker of connections to what `describe` has read. special: { deadlocks = false }, where a lock may end
--- that its own coroutine waits for.
local function new(keywords, options, special)
  local settings = { deadlocks = not special or special.deadlocks }
  for name, value in pairs(DEFAULTS) do settings[name] = options[name] or value end
  local self = setmetatable({ keywords = keywords, options = options }, Locker)
  local on_lost = options.on_lost
  self.turns = turns.new(keywords, options, settings, on_lost and function(err, locks)
    pcall(on_lost, self, err, locks)
  end)
  return self
end

-- For what a shared connection cannot do: one of its own for each lock.
function Locker:connections()
  self.pool = self.pool or pool.new(self.keywords, self.options, self.options.scheduler)
  return self.pool
end

function Locker:check_open()
  local scheduler = self.options.scheduler
  self.forks = self.forks or core.forks() -- of its first use: nothing was open before
  if self.forks ~= core.forks() then core.raise("forked", "this locker belongs to the parent process") end
  if self.is_closed then core.raise("closed", "this locker was closed") end
  if scheduler.enter then scheduler.enter() end
end

-- ---- locks ------------------------------------------------------------------------------

-- A lock whose token is still to be drawn.
local Draft = {}

function Draft:__close()
  if self.lock then getmetatable(self.lock).__close(self.lock) end
end

local function keep(draft)
  local lock = draft.lock
  draft.lock = nil
  return lock
end

-- The lock; or nil, why there is none, and the closed lock.
local function get(self, method, key, options, default)
  local lock, id, shared, timeout, token, apart = core.closed_lock(key, options)
  self:check_open()
  if apart then
    local connections = self:connections()
    return connections[method](connections, key, options)
  end
  local outcome = self.turns:acquire(lock, id, shared, timeout or default)
  if outcome == true then
    if not token then return lock end
    return run(setmetatable({ lock = lock }, Draft), keep, self.turns.draw, self.turns, lock)
  elseif type(outcome) == "string" then
    return nil, outcome, lock
  end
  error(outcome, 0)
end

local function raise_deadlock(key, lock)
  core.raise("deadlock", ("%s is held, or waited for, by a coroutine that waits for this one")
    :format(core.describe(key, lock.key)), lock.key)
end

--- Waits for a lock, 30 s or `timeout` seconds. Raises what conn:lock does; and deadlock at once where the
--- coroutines of this locker wait for each other.
---
---     local lock <close> = locker:lock "invoice 42"
---@param key pglocks.locked
---@param options? pglocks.options
---@return pglocks.lock
function Locker:lock(key, options)
  local lock, why, closed = get(self, "lock", key, options, TIMEOUT)
  if lock then return lock end
  if why == "deadlock" then raise_deadlock(key, closed) end
  local timeout = options and options.timeout or TIMEOUT
  core.raise("timeout", ("no lock on %s%s"):format(core.describe(key, closed.key),
    why == "busy" and ": somebody holds it" or (" within %.7g s"):format(timeout)), closed.key)
end

--- Takes a lock if it is free, or becomes so within `timeout` seconds. Raises what `lock` raises, but for
--- timeout.
---
---     local lock <close>, why = locker:try_lock "nightly"
---@param key pglocks.locked
---@param options? pglocks.options
---@return pglocks.lock|nil lock
---@return nil|"busy"|"timeout" why
function Locker:try_lock(key, options)
  local lock, why, closed = get(self, "try_lock", key, options, 0)
  if lock then return lock end
  if why == "deadlock" then raise_deadlock(key, closed) end
  return nil, why
end

--- As try_lock without a timeout, but always a lock, whose `acquired` tells.
function Locker:attempt(key, options)
  local lock, why, closed = get(self, "attempt", key, options, 0)
  if lock then return lock end
  if why == "deadlock" then raise_deadlock(key, closed) end
  return self.turns:bind(closed)
end

local function through(...) return ... end

for _, method in ipairs { "lock_all", "try_lock_all" } do
  Locker[method] = function(self, keys, options)
    core.check_all(keys, options)
    self:check_open()
    local connections = self:connections()
    return through(connections[method](connections, keys, options))
  end
end

for _, method in ipairs { "with_lock", "try_with_lock", "with_lock_all", "try_with_lock_all" } do
  Locker[method] = function(...) return through(core.connection[method](...)) end
end

-- ---- all of it --------------------------------------------------------------------------

--- What its locks hold, as conn:locks() gives it; without those that have a connection of their own.
function Locker:locks() return self.turns:locks() end

--- Every advisory lock of the database, as conn:all_locks(): asked on one of its connections.
function Locker:all_locks(filter)
  self:check_open()
  return through(self.turns:any_link():call(core.connection.all_locks, filter))
end

--- False once it was closed. Its connections are opened when they are needed.
function Locker:alive() return not self.is_closed end

local function close(self, waits)
  local is_ours = self.forks == core.forks() and not self.is_closed
  self.is_closed = true
  if is_ours then self.turns:close(waits) end
end

--- Releases all of its locks: they are free when it returns. Who waits for one gets `closed`. Locks that
--- have a connection of their own (`lock_all`, `scope`, `strategy`, `slots`, `comment`) stay.
function Locker:close() close(self, true) end

-- At the end of a scope: only sends.
function Locker:__close() close(self, false) end

return { new = new, unsuited = unsuited }
