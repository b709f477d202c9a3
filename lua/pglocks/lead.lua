-- lead.lua: one process of many runs a function, and another one when that has died. Whoever has
-- the lock leads. It is tried for again and again, and not waited for in the server's queue: one
-- that stands by for days must neither keep VACUUM from its work nor fill the server's log with
-- waits that have ended.

local core = require "pglocks.core"
local descriptions = require "pglocks.connect"
local run = require "pglocks.scope"

core.own_source(debug.getinfo(1, "S").source)

local unpack = table.unpack or rawget(_G, "unpack")

-- Seconds.
local INTERVAL = 1 -- from one try to the next
local LOOK = 0.1 -- from one look at `stop`, and at the session, to the next
local FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10 -- after a failure
local LASTED = 10 -- a session that went well for so long makes the next pause the first one
local BUSY = 0.01 -- until the next try to release, while a coroutine of the function's own checks

local function pack(...) return { n = select("#", ...), ... } end

-- From a half to 1: not all at once, where many have lost one server. The program's random numbers
-- are its own.
local function jittered(seconds) return seconds * (0.5 + core.now() * 1e5 % 1 / 2) end

-- ---- what is tried again ----------------------------------------------------------------

-- The others are what only a person can mend: a password, a privilege, a name, an option.
local PASSES = {
  interrupted = true, lost = true, standby = true, too_many_connections = true,
  too_many_locks = true, unknown = true,
}

-- Classes of SQLSTATEs: the network, resources, an administrator, the system, a bug of the server.
local CLASS_PASSES = { ["08"] = true, ["53"] = true, ["57"] = true, ["58"] = true, XX = true }

local function passes(err)
  if type(err) ~= "table" or type(err.code) ~= "string" then return false end
  if PASSES[err.code] then return true end
  if err.sqlstate then return CLASS_PASSES[err.sqlstate:sub(1, 2)] == true end
  return err.code == "connect"
end

-- ---- terms ------------------------------------------------------------------------------

--- What the function gets.
---@class pglocks.term
---@field number integer  1, 2, ...: of this call's terms
---@field token? integer|string  the lock's
local Term = {}
Term.__index = Term

-- A session of the candidate's, as long as that lasts. `is_over`: there is no leadership to lose,
-- because it has not begun or has ended.

local function new_term(candidate)
  return setmetatable({ candidate = candidate, began = candidate.now(), is_over = true }, Term)
end

-- Once for each term. What on_lost raises is kept until the function has ended: whoever came upon
-- the loss, a watcher or any call, is not who can deal with it.
local function lose(term, err)
  if term.is_over then return end
  term.is_over, term.loss = true, err
  local on_lost = term.candidate.on_lost
  if not on_lost then return end
  local ok, wrong = pcall(on_lost, term, err)
  if not ok then term.failure = { wrong } end
end

--- False once the leadership is known to be lost, or `stop` says so: the function has to return.
--- Asks nobody.
---
---     while term:is_leader() do work() end
---@return boolean
function Term:is_leader()
  if not self.is_over and not self.lock:held() then -- which has told of it, where the session is gone
    lose(self, select(2, pcall(core.raise, "lost", "the lock is no longer held")))
  end
  return not self.is_over and not self.candidate:is_stopped()
end

--- Sleeps, but not beyond the moment in which `is_leader` becomes false.
---
---     repeat work() until not term:sleep(60)
---@param seconds number
---@return boolean is_leader
function Term:sleep(seconds)
  if type(seconds) ~= "number" or seconds ~= seconds or seconds < 0 then
    core.raise_argument(1, "seconds, at least 0, expected")
  end
  local candidate = self.candidate
  local due = candidate.now() + seconds
  while self:is_leader() do
    local left = due - candidate.now()
    if left <= 0 then return true end
    candidate.sleep(math.min(left, LOOK))
  end
  return false
end

--- Asks the server, for the moment before a step that cannot be undone. Raises busy_connection.
---
---     if not term:check() then return end
---@param timeout? number  seconds; without it the connection's `reply_timeout`
---@return boolean is_leader
---@return pglocks.error|nil loss
function Term:check(timeout)
  if self.is_over then return false, self.loss end
  local ok, err = pcall(self.lock.check, self.lock, timeout)
  if ok then return true end
  if type(err) ~= "table" or self.lock:held() then error(err, 0) end
  lose(self, err)
  return false, self.loss
end

-- Was the lock held until now?
local function release(term)
  local ok, err
  repeat
    ok, err = pcall(term.lock.release, term.lock)
    local is_busy = not ok and type(err) == "table" and err.code == "busy_connection"
    if is_busy then term.candidate.sleep(BUSY) end
  until not is_busy
  if ok then return not term.is_over end
  if type(err) ~= "table" then error(err, 0) end -- Ctrl-C
  lose(term, err)
  return false
end

-- An error may be in flight: never raises. Of a loss that comes out now on_lost is told still.
function Term:__close()
  local conn = self.conn
  if conn then getmetatable(conn).__close(conn) end
  self.is_over = true
end

-- ---- candidates -------------------------------------------------------------------------

local Candidate = {}
Candidate.__index = Candidate

-- Once it was said, for good.
function Candidate:is_stopped()
  if not self.has_stopped and self.stop and self.stop() then self.has_stopped = true end
  return self.has_stopped
end

-- Shorter, when it is stopped.
function Candidate:wait(seconds)
  local due = self.now() + seconds
  while not self:is_stopped() do
    local left = due - self.now()
    if left <= 0 then return end
    self.sleep(math.min(left, LOOK))
  end
end

function Candidate:back_off(session, err)
  if self.now() - session.began >= LASTED then self.pause = FIRST_PAUSE end
  local seconds = jittered(self.pause)
  self.pause = math.min(self.pause * 2, LONGEST_PAUSE)
  if err and self.on_retry then self.on_retry(err, seconds) end
  self:wait(seconds)
end

-- What `connect` takes, with an on_lost that tells the term's.
function Candidate:describe(term)
  local described, theirs = {}, self.described.on_lost
  for name, value in pairs(self.described) do described[name] = value end
  described.release = "confirmed"
  function described.on_lost(conn, err, locks)
    lose(term, err)
    if theirs then theirs(conn, err, locks) end
  end
  return described
end

-- A true value when the term has the lock; else the error that is in the way, or nil: stopped.
function Candidate:elect(term)
  while not self:is_stopped() do
    local ok, lock, why = pcall(term.conn.try_lock, term.conn, self.key, self.options)
    if not ok then return false, lock end
    if lock then
      self.terms = self.terms + 1
      term.lock, term.number, term.token, term.is_over = lock, self.terms, lock.token, false
      return true
    end
    if why == "busy" then self:wait(jittered(self.interval)) end
  end
  return false
end

-- Whether the function has been called, and what it returned; or the error that was in the way.
local function serve(term, fn, ...)
  local candidate = term.candidate
  local elected, err = candidate:elect(term)
  if not elected then return false, err end
  if candidate.on_elected then candidate.on_elected(term) end
  if not term:is_leader() then return false end
  return true, fn(term, ...)
end

-- Whether the function has returned as the leader, and what; or the error that was in the way.
local function finish(term, called, ...)
  local led = term.lock and release(term)
  Term.__close(term)
  if term.failure then error(term.failure[1], 0) end
  if called and not led then return false end
  return called, ...
end

-- One session: as finish.
function Candidate:stand(term, fn, ...)
  local ok, conn = pcall(self.connect, self:describe(term))
  if not ok then return false, conn end
  term.conn = conn
  return run(term, finish, serve, term, fn, ...)
end

-- ---- options ----------------------------------------------------------------------------

local function is_callable(value)
  local metatable = type(value) ~= "function" and getmetatable(value)
  return type(value) == "function"
    or type(metatable) == "table" and type(metatable.__call) == "function"
end

local function is_seconds(value)
  return type(value) == "number" and value > 0 and value < math.huge
end

-- Our own options: what each must be, and how to say that. All others are the lock's.
local OPTIONS = {
  interval = { is_seconds, "seconds, more than 0" },
  on_elected = { is_callable, "a function" },
  on_lost = { is_callable, "a function" },
  on_retry = { is_callable, "a function" },
  stop = { is_callable, "a function" },
  using = { function(v) return type(v) == "string" end, "the name of a database" },
  database = { function() return true end }, -- by find
}

local function split(options)
  local own, locks = {}, {}
  for name, value in pairs(options or {}) do
    local option = OPTIONS[name]
    if option and not option[1](value) then
      core.raise_argument(2, ("option '%s' must be %s"):format(name, option[2]))
    end
    (option and own or locks)[name] = value
  end
  if own.using ~= nil and own.database ~= nil then
    core.raise_argument(2, "option 'database' or 'using' expected, got both")
  elseif locks.shared or locks.slots then
    core.raise_argument(2, ("option '%s': leaders exclude each other"):format(locks.shared and "shared" or "slots"))
  end
  return own, locks
end

-- What setup or the user has described, in the form that `connect` takes.
local function describe(keywords, options)
  local described = {}
  for name, value in pairs(keywords) do described[name] = value end
  for name, value in pairs(options) do described[name] = value end
  for name in pairs(descriptions.only_of) do described[name] = nil end
  described.scheduler = options.scheduler or "blocking"
  return described
end

--- As pglocks.lead.
---@param connect fun(described: pglocks.description): pglocks.connection
---@param find fun(description: string|pglocks.description|nil, name: string): table, table
--- keywords and options of a description, or of the database of that name
---@param key pglocks.locked
---@param options pglocks.leading|nil
---@param fn fun(term: pglocks.term, ...: any): ...
return function(connect, find, key, options, fn, ...)
  local own, locks = split(options)
  core.check(key, locks)
  local keywords, opening = find(own.database, own.using or "default")
  local scheduler = opening.scheduler
  local candidate = setmetatable({
    connect = connect, described = describe(keywords, opening), key = key, options = locks,
    sleep = scheduler and scheduler.sleep or core.sleep, now = scheduler and scheduler.now or core.now,
    interval = own.interval or INTERVAL, stop = own.stop,
    on_elected = own.on_elected, on_lost = own.on_lost, on_retry = own.on_retry,
    terms = 0, pause = FIRST_PAUSE, has_stopped = false,
  }, Candidate)
  while not candidate:is_stopped() do
    local term = new_term(candidate)
    local result = pack(candidate:stand(term, fn, ...))
    if result[1] then return unpack(result, 2, result.n) end
    local err = result[2]
    if err ~= nil and not passes(err) then error(err, 0) end
    if not candidate:is_stopped() then candidate:back_off(term, err) end
  end
  return nil, "stopped"
end
