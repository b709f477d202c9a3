-- modes.lua: a lock changes from shared to exclusive, and back. The other mode is taken, the two locks
-- give each other what they hold, and the first mode is let go: so it is held all the time.

local core = require "pglocks.core"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

-- Seconds. A try would fail where somebody waits for the lock, although we come before him.
local UPGRADE_TIMEOUT = 0.001
local DOWNGRADE_TIMEOUT = 10 -- it need not wait: for a server that does not answer

local function check_options(options)
  if options == nil then return UPGRADE_TIMEOUT end
  if type(options) ~= "table" then
    core.raise_argument(1, ("table of options expected, got %s"):format(type(options)))
  end
  for name in pairs(options) do
    if name ~= "timeout" then core.raise_argument(1, ("unknown option '%s'"):format(tostring(name))) end
  end
  local timeout = options.timeout or UPGRADE_TIMEOUT
  if type(timeout) ~= "number" or not (timeout >= 0 and timeout < math.huge) then
    core.raise_argument(1, "option 'timeout': finite number of seconds, not negative, expected")
  end
  return math.max(UPGRADE_TIMEOUT, timeout)
end

-- Raises, and says why, unless it is held.
local function check_held(lock)
  if lock:held() then return end
  lock:check()
  core.raise("not_held", "this lock is not held")
end

-- True, or nil when the other mode was not to be had. may: for one of many owners, whether it still may change.
local function change_here(lock, shared, timeout, may)
  if lock.shared == shared then
    check_held(lock)
    return true
  end
  local conn, key = core.connection_of(lock), lock.key
  local try = key and conn.try_lock or conn.try_lock_all
  local other = try(conn, key or lock.keys, {
    shared = shared, scope = lock.scope, timeout = timeout, token = lock.token ~= nil or nil,
  })
  if not other then return nil end
  if may and not may() then
    core.let_go(other)
    return nil
  end
  if not core.exchange(lock, other) then
    core.let_go(other)
    check_held(lock)
    core.raise("not_held", "this lock was released meanwhile")
  end
  if may then
    core.let_go(other)
  else
    other:release()
  end
  return true
end

local function change(lock, shared, timeout)
  local owners = scheduled.shared_by[core.connection_of(lock)]
  if not owners then return change_here(lock, shared, timeout) end
  return owners:change(lock, timeout, function(attempt, may) return change_here(lock, shared, attempt, may) end)
end

function core.lock:upgrade(options)
  local timeout = check_options(options)
  check_held(self)
  if not self.shared or change(self, false, timeout) then return true end
  return nil, "busy"
end

function core.lock:downgrade()
  check_held(self)
  if self.scope == "transaction" then
    core.raise("server", "a lock of transaction scope stays exclusive until the transaction ends")
  elseif self.slot then
    core.raise("server", "a slot of a semaphore stays exclusive: nobody shares it")
  end
  if self.shared or change(self, true, DOWNGRADE_TIMEOUT) then return true end
  core.raise("timeout", "the server did not grant the shared lock beside our own")
end
