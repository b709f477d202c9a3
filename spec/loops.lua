--- Event loops for the specs, all of one shape: those that pglocks has a scheduler for, and one
--- that is made here of nothing but coroutines and a poll, as a user might.
---
---     loop.run(fn)    calls fn in a coroutine, and runs the loop until all coroutines have ended;
---                     rethrows the first error
---     loop.spawn(fn)  begins another; returns its coroutine
---     loop.scheduler  what the option `scheduler` takes
---     loop.sleep(s)

local core = require "pglocks.core"
local cqueues = require "cqueues"
local uv = require "luv"

local loops = {}

-- Errors of coroutines, for run to rethrow: of those that it has begun, as a loop may go on with others that
-- a failure has left behind.
local failures

local function guarded(fn)
  local errors = failures
  return function()
    local ok, err = xpcall(fn, function(e) return type(e) == "string" and debug.traceback(e, 2) or e end)
    if not ok then errors[#errors + 1] = err end
  end
end

local function rethrow()
  if failures[1] ~= nil then error(failures[1], 0) end
end

-- ---- cqueues ----------------------------------------------------------------------------

local controller

loops.cqueues = {
  scheduler = "cqueues",
  sleep = cqueues.sleep,

  spawn = function(fn)
    local co
    controller:wrap(function()
      co = coroutine.running()
      return guarded(fn)()
    end)
    return function() return co end
  end,

  run = function(fn)
    controller, failures = cqueues.new(), {}
    loops.cqueues.spawn(fn)
    while not controller:empty() and not failures[1] do assert(controller:step()) end
    rethrow()
  end,
}

-- ---- luv --------------------------------------------------------------------------------

loops.luv = {
  scheduler = "luv",
  sleep = function(seconds) require "pglocks.scheduler.luv".sleep(seconds) end,

  spawn = function(fn)
    local co = coroutine.create(guarded(fn))
    assert(coroutine.resume(co))
    return function() return co end
  end,

  run = function(fn)
    failures = {}
    loops.luv.spawn(fn)
    while not failures[1] and uv.run "once" do end
    rethrow()
  end,
}

-- ---- a user's own -----------------------------------------------------------------------

-- What each coroutine waits for: { fd =, events =, until =, token = }.
local waiting, ready = {}, {}
local tokens = setmetatable({}, { __mode = "k" })

local own = { now = core.now }

local function suspend(what)
  local co = coroutine.running()
  waiting[co] = what
  return coroutine.yield()
end

local function due(seconds) return seconds and core.now() + seconds or math.huge end

local function is_main()
  local co, main = coroutine.running()
  return not co or main
end

function own.wait(fd, events, seconds)
  if is_main() then
    cqueues.poll({ pollfd = fd, events = events }, seconds)
    cqueues.cancel(fd)
    return
  end
  suspend { poll = { pollfd = fd, events = events }, due = due(seconds) }
end

function own.sleep(seconds) suspend { due = due(seconds) } end

function own.token()
  local token = { co = coroutine.running() }
  tokens[token.co] = token
  return token
end

function own.park(seconds)
  local co = coroutine.running()
  local token = tokens[co]
  tokens[co] = nil
  return token.woken or suspend { due = due(seconds), token = token }
end

function own.wake(token)
  token.woken = true
  if waiting[token.co] and waiting[token.co].token == token then ready[token.co] = true end
end

local function step()
  local first, polls, by_poll = math.huge, {}, {}
  for co, what in pairs(waiting) do
    first = math.min(first, what.due)
    if what.poll then
      polls[#polls + 1] = what.poll
      by_poll[what.poll] = co
    end
  end
  if next(ready) then first = 0 end
  polls[#polls + 1] = first < math.huge and math.max(0, first - core.now()) or nil
  for _, came in ipairs { cqueues.poll((table.unpack or unpack)(polls)) } do
    if by_poll[came] then ready[by_poll[came]] = true end
  end
  for co, what in pairs(waiting) do
    if what.due <= core.now() and not ready[co] then ready[co] = false end
  end
  local now = ready
  ready = {}
  for co, came in pairs(now) do
    if waiting[co] then
      if waiting[co].poll then cqueues.cancel(waiting[co].poll.pollfd) end
      waiting[co] = nil
      assert(coroutine.resume(co, came))
    end
  end
end

loops.own = {
  scheduler = own,
  sleep = own.sleep,

  spawn = function(fn)
    local co = coroutine.create(guarded(fn))
    assert(coroutine.resume(co))
    return function() return co end
  end,

  run = function(fn)
    failures = {}
    loops.own.spawn(fn)
    while next(waiting) and not failures[1] do step() end
    waiting = {}
    rethrow()
  end,
}

-- The scheduler without what it need not have; lockers do need it.
loops.own.spawning = setmetatable({ spawn = loops.own.spawn }, { __index = own })

-- A coroutine that was closed from outside is waited for no longer.
function loops.own.forget(co) waiting[co] = nil end

return loops
