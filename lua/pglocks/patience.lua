-- patience.lua: waiting that is not in the server's queue: the options `strategy` and `slots`. All that
-- it asks of a connection are tries, and to hear of notifications between them.

local core = require "pglocks.core"
local run = require "pglocks.scope"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

-- Seconds between two tries: at first, and at most. The first are as short as the holds that nobody
-- announces; see src/pglocks.h.
local FIRST_PAUSE = 0.001
local LONGEST_PAUSE, LONGEST_BESIDE_NOTIFICATIONS = 0.25, 0.5

local TRIES = { lock = "try_lock", try_lock = "try_lock", lock_all = "try_lock_all", try_lock_all = "try_lock_all" }

-- A copy of options without those that are for us.
local function without(options, ...)
  local rest = {}
  for name, value in pairs(options) do rest[name] = value end
  for _, name in ipairs { ... } do rest[name] = nil end
  return rest
end

-- ---- a wait -----------------------------------------------------------------------------

-- Its deadline, its pauses, and what it listens to. To be closed.
local Wait = {}
Wait.__index = Wait

local SHARED = { shared = true, scope = "session" }
local INTERNAL = { internal = true }
local UNANNOUNCED = { internal = true, announces = false }

local function new_wait(conn, timeout)
  return setmetatable({
    conn = conn,
    began = core.now(),
    deadline = timeout and core.now() + timeout or math.huge,
    pause = FIRST_PAUSE,
    longest = LONGEST_PAUSE,
    markers = {}, -- by key: true, or a lock
    note = { waited = 0 }, -- made before there is a lock, which nothing may go wrong with then
  }, Wait)
end

function Wait:__close()
  for marker, mark in pairs(self.markers) do
    core.unlisten(self.conn, marker)
    if mark ~= true then core.let_go(mark) end
  end
  self.markers = {}
end

function Wait:left() return self.deadline - core.now() end

local NOT_ON_A_STANDBY = "25006" -- a SQLSTATE

-- From now on the end of a lock on one of `keys` is heard. Inside a transaction, behind a pooler of
-- transactions and on a standby nothing can be.
function Wait:listen(keys)
  if core.in_transaction(self.conn) or core.pooling(self.conn) == "transaction" then return end
  for _, key in ipairs(keys) do
    if self:left() <= 0 then return end
    local marker = core.marker(key)
    self.markers[marker] = true
    local ok, err = pcall(scheduled.listen, self.conn, marker)
    if not ok then
      if type(err) ~= "table" or err.sqlstate ~= NOT_ON_A_STANDBY then error(err, 0) end
      self.markers[marker] = nil
      return
    end
    self.longest = LONGEST_BESIDE_NOTIFICATIONS
  end
end

-- The markers are tried again and again: somebody may be looking at one in this instant.
function Wait:mark()
  for marker, mark in pairs(self.markers) do
    if mark == true and self:left() > 0 then
      mark = self.conn:try_lock(marker, SHARED)
      if mark then
        self.markers[marker] = mark
        core.annotate(mark, UNANNOUNCED)
      end
    end
  end
end

-- Not all at the same times; the program's random numbers are its own. Who was told of a lock and did
-- not get it tries again soon: whoever has it may not hold it for long enough to tell.
function Wait:hear()
  local jitter = 0.5 + core.now() * 1e5 % 0.5
  local heard = scheduled.hear(self.conn, math.max(0, math.min(self.pause * jitter, self:left())))
  self.pause = heard and FIRST_PAUSE or math.min(self.pause * 2, self.longest)
end

-- What try(wait) returns, as soon as that is something; nil when the time is over.
local function until_got(wait, try)
  while true do
    wait:mark()
    local got = try(wait)
    if got then return got end
    if wait:left() <= 0 then return nil end
    wait:hear()
  end
end

local function close(wait, got)
  wait:__close()
  wait.note.waited = core.now() - wait.began
  if got then core.annotate(got, wait.note) end
  return got
end

-- What `try` returns: before there is anything to listen for, or later, or nil when the time is over.
local function strive(wait, try, listened)
  local got = try(wait)
  if got then return got end
  wait:listen(listened)
  return until_got(wait, try)
end

-- ---- strategies -------------------------------------------------------------------------

local MOST_LISTENED = 32 -- as many locks of one `lock_all` are announced

local function keys_of(method, key, options)
  local hashing = { hash = options.hash, namespace = options.namespace }
  if TRIES[method] == "try_lock" then return { core.key(key, hashing) } end
  local keys = {}
  for i = 1, math.min(#key, MOST_LISTENED) do keys[i] = core.key(key[i], hashing) end
  return keys
end

local function by_strategy(conn, method, key, options)
  local rest, name = without(options, "strategy", "timeout"), TRIES[method]
  local function try() return (conn[name](conn, key, rest)) end
  local listened = options.strategy == "notify" and keys_of(method, key, options) or {}
  local wait = new_wait(conn, options.timeout)
  return run(wait, close, strive, wait, try, listened)
end

-- ---- semaphores -------------------------------------------------------------------------

-- Of a semaphore the slots are locks, and one more is its turnstile. Who waits has that exclusively,
-- and is the only one who may take a slot; so all others who wait queue for the turnstile, and come in
-- their order. Who finds nobody waiting has it shared for as long as it takes to take a slot.

-- Of the slots' keys: which are free?
local FREE_SLOTS = [[
SELECT k.slot FROM pg_catalog.unnest($1::pg_catalog.int8[]) WITH ORDINALITY k(key, slot)
WHERE NOT EXISTS (SELECT 1 FROM pg_catalog.pg_locks l WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'
  AND l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database d
    WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())
  AND l.objsubid OPERATOR(pg_catalog.=) 1 AND l.granted
  AND (l.classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) l.objid::pg_catalog.int8
    OPERATOR(pg_catalog.=) k.key)]]

local Semaphore = {}
Semaphore.__index = Semaphore

local function semaphore(key, options)
  local base = core.key(key, { hash = options.hash, namespace = options.namespace })
  local slots = {} -- their names
  for i = 1, options.slots do slots[i] = ("%d of %s"):format(i, base) end
  return setmetatable({ base = base, marker = core.marker(base), slots = slots, turn = tostring(base) },
    Semaphore)
end

function Semaphore:key(slot)
  return core.key(self.slots[slot], { hash = "sha256", namespace = "pglocks slot" })
end

function Semaphore:is_all_ours(conn)
  for slot = 1, #self.slots do
    if not core.holds(conn, self:key(slot)) then return false end
  end
  return true
end

-- Not one that the connection has already: each lock is a holder of its own.
local function take(conn, self, slot, options)
  if core.holds(conn, self:key(slot)) then return nil end
  local note = { slot = slot, announces = self.marker }
  local lock = conn:try_lock(self.slots[slot], {
    hash = "sha256", namespace = "pglocks slot", scope = "session", comment = options.comment,
    token = options.token,
  })
  if lock then core.annotate(lock, note) end
  return lock
end

local function free_slots(conn, self)
  local keys = {}
  for slot = 1, #self.slots do keys[slot] = tostring(self:key(slot)) end
  return scheduled.execute(conn, nil, FREE_SLOTS, "{" .. table.concat(keys, ",") .. "}")
end

-- Any that is free: mostly the one that is tried first. Nil only if there was a moment in which none was:
-- what others take, who try at the same time, may be what was free when we looked.
local function take_any(conn, self, options)
  local lock = take(conn, self, 1 + math.floor(core.now() * 1e6) % #self.slots, options)
  local tried = true
  while not lock and tried do
    tried = false
    for _, row in ipairs(free_slots(conn, self)) do
      if not lock and not core.holds(conn, self:key(row.slot)) then
        lock, tried = take(conn, self, row.slot, options), true
      end
    end
  end
  return lock
end

local Turn = {}

function Turn:__close()
  if self.lock then core.let_go(self.lock) end
  self.lock = nil
end

local function leave(turn, lock)
  Turn.__close(turn)
  return lock
end

-- Whoever tries when our call has returned must not find a turnstile that nobody waits at.
local function leave_and_wait(turn, lock)
  local conn = turn.lock and turn.conn
  Turn.__close(turn)
  if conn and lock then conn:ping() end
  return lock
end

-- The turnstile's lock is taken by `method`, and goes whatever `fn` does. Nil without it.
local function within_turn(turn, method, options, note, fn, ...)
  turn.lock = turn.conn[method](turn.conn, turn.name, options)
  if not turn.lock then return nil end
  core.annotate(turn.lock, note)
  return fn(...)
end

local function new_turn(conn, self) return setmetatable({ conn = conn, name = self.turn, lock = false }, Turn) end

local AT_ONCE = { hash = "sha256", namespace = "pglocks turn", scope = "session", shared = true }

local function slot_at_once(conn, self, options)
  local turn = new_turn(conn, self)
  return run(turn, leave, within_turn, turn, "try_lock", AT_ONCE, UNANNOUNCED, take_any, conn, self, options)
end

-- The end of such a turn is announced as any lock's: others wait for it in their own ways.
local function slot_in_turn(wait, self, options)
  local conn = wait.conn
  local timeout = wait.deadline < math.huge and math.max(0.001, wait:left()) or nil
  local in_turn = {
    hash = "sha256", namespace = "pglocks turn", scope = "session", strategy = options.strategy,
    timeout = timeout,
  }
  local function try() return take_any(conn, self, options) end
  local listened = options.strategy == "poll" and {} or { self.base }
  local turn = new_turn(conn, self)
  return run(turn, leave_and_wait, within_turn, turn, timeout and "try_lock" or "lock", in_turn, INTERNAL,
    strive, wait, try, listened)
end

local function by_slots(conn, method, key, options)
  local self = semaphore(key, options)
  local began = core.now()
  local lock = slot_at_once(conn, self, options)
  local waits = options.timeout ~= 0 and (method == "lock" or options.timeout)
  if lock or not waits then return lock end
  if self:is_all_ours(conn) then
    core.raise("deadlock", "this connection has all of the slots itself, and would wait for ever", self.base)
  end
  local left = options.timeout and math.max(0.001, options.timeout - (core.now() - began))
  local wait = new_wait(conn, left)
  return run(wait, close, slot_in_turn, wait, self, options)
end

-- ---- both -------------------------------------------------------------------------------

local METHODS = { lock = true, lock_all = true } -- that raise on a timeout
local CHECKS = {
  lock = core.check, try_lock = core.check, lock_all = core.check_all, try_lock_all = core.check_all,
}

--- What `conn[method](conn, key, options)` returns, where the options say that it is for us.
local function patiently(conn, method, key, options)
  CHECKS[method](key, options)
  local timeout = options.timeout
  local tries = timeout == 0 or not METHODS[method] and not timeout
  if not options.slots and (tries or options.strategy == "queue" or not options.strategy) then
    return conn[method](conn, key, without(options, "strategy"))
  end
  local lock = (options.slots and by_slots or by_strategy)(conn, method, key, options)
  if lock then return lock end
  if not METHODS[method] then return nil, tries and "busy" or "timeout" end
  local message = tries and "no lock on %s: somebody holds it" or "no lock on %s within %.7g s"
  if method == "lock_all" then
    core.raise("timeout", message:format(#key .. (#key == 1 and " key" or " keys"), timeout))
  end
  local locked = keys_of(method, key, options)[1]
  core.raise("timeout", message:format(core.describe(key, locked), timeout), locked)
end

core.patiently(patiently)
scheduled.patiently = patiently
