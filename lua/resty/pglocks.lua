--- lua-resty-lock's contract, for all machines that use one PostgreSQL database.
---
---     local resty_pglocks = require "resty.pglocks"
---     resty_pglocks.setup("my_locks", "postgresql:///app") -- in init_by_lua
---
---     local lock = resty_pglocks:new("my_locks", { timeout = 5, exptime = 30 })
---     local elapsed, err = lock:lock "invoice 42"
---     if not elapsed then return fail(err) end
---     pay()
---     local ok, err = lock:unlock()
---
--- It differs where a shared dictionary of one nginx and a session of PostgreSQL do.
---
--- - A hold ends with the request that took it, if nobody has ended it before; in lua-resty-lock it
---   lasts until `exptime`. Of a worker or a machine that died nothing is held any more, either.
--- - What `exptime` has ended is over: a late `unlock` says "unlocked", and never ends what somebody
---   else holds by then. The object can lock again at once.
--- - Whoever waits stands in a queue, first come, first served: nobody polls, and `step`, `ratio` and
---   `max_step` make no difference.
--- - `unlock` waits for the server's answer where nginx can wait, unless setup says `release = "deferred"`.
--- - Arguments of a wrong type, and unknown options, raise.
---
--- A name in the dictionary `my_locks` is for others what `pglocks.key(name, { namespace = "my_locks",
--- hash = "sha256" })` says.

local core = require "pglocks.core"
local locker = require "pglocks.locker"
local opening = require "pglocks.connect"
local scheduled = require "pglocks.scheduled"
local scheduler = require "pglocks.scheduler.nginx"
local semaphore = require "ngx.semaphore"

core.own_source(debug.getinfo(1, "S").source)

local math, pcall, setmetatable = math, pcall, setmetatable

-- Seconds.
local TIMEOUT, EXPTIME = 5, 30
local LOOKS = 1 -- between two looks at the clock: a worker that is to stop waits for the next
local LATE = 5 -- a look that is overdue for so long will never come

---@class resty.pglocks
---@field dict resty.pglocks.dictionary
---@field timeout number  seconds
---@field exptime number  seconds
---@field hold table|nil
local resty_pglocks = { _VERSION = "pglocks scm" }
resty_pglocks.__index = resty_pglocks

-- ---- what ends holds --------------------------------------------------------------------

-- { lock = a pglocks.lock, ends_at =, has_expired = }. Its object alone refers to it, so that it is
-- collected with that.
local holds = setmetatable({}, { __mode = "k" })

-- It may expire while `held` looks at the network.
local function is_held(hold) return hold ~= nil and hold.lock:held() and not hold.has_expired end

-- Without waiting, from any request and in any phase.
local function let_go(lock) getmetatable(lock).__close(lock) end

-- Returns when the next one ends. Never waits: none of the locks is of this request.
local function end_expired()
  local now, next_end = core.now(), math.huge
  for hold in pairs(holds) do
    if not hold.lock:held() then
      holds[hold] = nil
    elseif hold.ends_at <= now then
      holds[hold], hold.has_expired = nil, true
      let_go(hold.lock)
    else
      next_end = math.min(next_end, hold.ends_at)
    end
  end
  return next_end
end

-- One timer in each worker looks at the clock for all holds: nginx takes no timer back, so that one
-- for each would be pending long after the unlock. It stays for a while when there is no hold.
local nearer, watcher, looks_at = semaphore.new(), nil, -math.huge

local function watch()
  local me, last = {}, core.now()
  watcher = me
  while watcher == me do
    local next_end, now = end_expired(), core.now()
    if next_end < math.huge then
      last = now
    elseif now - last > LOOKS then
      watcher, looks_at = nil, -math.huge
      return
    end
    looks_at = math.min(next_end, now + LOOKS)
    nearer:wait(math.max(0.001, looks_at - now))
  end
end

-- Nil, and why: nobody would end the hold at that time.
local function look_at(time)
  if core.now() > looks_at + LATE then
    local ok, err = pcall(scheduler.spawn, watch)
    if not ok then return nil, err.message end
    looks_at = core.now()
  elseif time < looks_at then
    nearer:post(1)
  end
  return true
end

local function keep(hold, seconds)
  hold.ends_at = seconds == 0 and math.huge or core.now() + seconds
  holds[hold] = true
  if seconds == 0 then return true end
  return look_at(hold.ends_at)
end

-- ---- dictionaries -----------------------------------------------------------------------

---@class resty.pglocks.dictionary
local Dictionary = {}
Dictionary.__index = Dictionary

local dictionaries = {} -- by name

--- How many seconds the hold of a key still lasts, if it is one of this worker's; 0: it does not
--- expire.
---
---     local ttl = lock.dict:ttl "invoice 42"
---@param key string|number
---@return number|nil seconds
---@return "not found"|nil why
function Dictionary:ttl(key)
  local hold = self.holds[tostring(key)]
  if not is_held(hold) then return nil, "not found" end
  return hold.ends_at == math.huge and 0 or math.max(0.001, hold.ends_at - core.now())
end

--- Names a dictionary; opens no connection. Usually in init_by_lua or init_worker_by_lua.
---
---     resty_pglocks.setup("my_locks", "postgresql:///app")
---@param name string
---@param described? string|pglocks.description  as for `pglocks.connect`, or one of `pglocks.setup`
function resty_pglocks.setup(name, described)
  if type(name) ~= "string" then
    core.raise_argument(1, ("name of a dictionary expected, got %s"):format(type(name)))
  end
  local keywords, options = opening.describe(described, scheduled.default(), "locker")
  local wrong = not keywords and options or locker.unsuited(options)
  if wrong then core.raise_argument(2, wrong) end
  -- After `unlock` the key is free, also for one who tries once.
  options.release = options.release or "confirmed"
  dictionaries[name] = setmetatable({
    -- A hold that ends by `exptime` may be waited for by its own light thread.
    owner = locker.new(keywords, options, { deadlocks = false }),
    hash = "sha256", namespace = name, -- a key of another dictionary is another lock
    holds = setmetatable({}, { __mode = "v" }), -- by key, the latest
  }, Dictionary)
end

-- ---- lock objects -----------------------------------------------------------------------

local OPTIONS = { timeout = true, exptime = true, step = true, ratio = true, max_step = true }

local function is_finite(value)
  return type(value) == "number" and value > -math.huge and value < math.huge
end

local function check_options(opts)
  if type(opts) ~= "table" then
    core.raise_argument(2, ("table of options expected, got %s"):format(type(opts)))
  end
  for name, value in pairs(opts) do
    if not OPTIONS[name] then
      core.raise_argument(2, ("unknown option '%s'"):format(tostring(name)))
    elseif not is_finite(value) then
      core.raise_argument(2, ("option '%s': number expected, got %s")
        :format(name, type(value) == "number" and tostring(value) or type(value)))
    elseif name == "exptime" and value < 0 then
      core.raise_argument(2, "option 'exptime': seconds, at least 0, expected")
    end
  end
end

--- An object that can hold one lock at a time.
---
---     local lock, err = resty_pglocks:new("my_locks", { timeout = 0.5 })
---@param name string  of a dictionary
---@param opts? { timeout?: number, exptime?: number, step?: number, ratio?: number, max_step?: number }
--- timeout: seconds that `lock` waits (5), and at most exptime; 0 or less: it tries once. exptime: seconds
--- after which a hold ends (30); 0: it does not
---@return resty.pglocks|nil
---@return "dictionary not found"|nil err
function resty_pglocks.new(_, name, opts)
  if opts ~= nil then check_options(opts) end
  local dict = dictionaries[name]
  if not dict then return nil, "dictionary not found" end
  local timeout, exptime = opts and opts.timeout, opts and opts.exptime or EXPTIME
  if timeout and exptime > 0 then timeout = math.min(timeout, exptime) end
  return setmetatable({ dict = dict, timeout = timeout or TIMEOUT, exptime = exptime }, resty_pglocks)
end

--- Waits for a lock, where nginx can wait.
---
---     local elapsed, err = lock:lock "invoice 42"
---@param key string|number  a number is the name that it is written as
---@return number|nil elapsed  seconds; 0: nobody else had it
---@return string|nil err  "nil key", "locked": this object holds one, "timeout", or what went wrong
function resty_pglocks.lock(self, key)
  if not key then
    return nil, "nil key"
  elseif type(key) ~= "string" and type(key) ~= "number" then
    core.raise_argument(1, ("string or number as the key expected, got %s"):format(type(key)))
  elseif is_held(self.hold) then
    return nil, "locked"
  end
  key = tostring(key)
  local dict = self.dict
  local ok, lock = pcall(dict.owner.try_lock, dict.owner, key, {
    hash = dict.hash, namespace = dict.namespace, timeout = math.max(0, self.timeout),
  })
  if not ok then
    return nil, tostring(lock)
  elseif not lock then
    return nil, "timeout"
  end
  local hold = { lock = lock }
  -- Another light thread may have locked this object, meanwhile.
  local err = is_held(self.hold) and "locked" or select(2, keep(hold, self.exptime))
  if err then
    let_go(lock)
    return nil, err
  end
  self.hold, dict.holds[key] = hold, hold
  return lock.waited
end

--- Ends the hold. In phases where nginx cannot wait that is only sent.
---
---     local ok, err = lock:unlock()
---@return 1|nil ok
---@return string|nil err  "unlocked": this object holds none, or not any more; or what went wrong
function resty_pglocks.unlock(self)
  local hold = self.hold
  self.hold = nil
  if not hold or hold.has_expired then return nil, "unlocked" end
  holds[hold] = nil
  local lock = hold.lock
  lock:held() -- hears of a loss; a release that is only sent would not
  local ok, released = pcall(lock.release, lock)
  if not ok then return nil, tostring(released) end
  if not released then return nil, "unlocked" end -- it ended with the request that took it
  return 1
end

--- Has the hold end so many seconds from now.
---
---     local ok, err = lock:expire(60)
---@param time? number  seconds; `exptime` without it; 0: it does not expire
---@return true|nil ok
---@return string|nil err  "unlocked": this object holds none; "not found": it has expired, or was lost
function resty_pglocks.expire(self, time)
  if time ~= nil and not (is_finite(time) and time >= 0) then
    core.raise_argument(1, ("seconds, at least 0, expected, got %s"):format(
      type(time) == "number" and tostring(time) or type(time)))
  end
  local hold = self.hold
  if not hold then return nil, "unlocked" end
  if not is_held(hold) then return nil, "not found" end
  return keep(hold, time or self.exptime)
end

return resty_pglocks
