--- Waits in coroutines on luv's event loop.
---
---     local conn = pglocks.connect { conninfo = "postgresql:///app", scheduler = "luv" }
---
--- On the main thread `wait` runs the loop itself, until there is nothing to wait for any more. In
--- a callback, which no loop can go on beside, it raises: begin a coroutine there.

do
  local co, main = coroutine.running()
  if co and not main and not package.loaded.luv then
    -- luv calls back on the thread that loaded it, and crashes when that has ended.
    error("luv must be loaded on the main thread: say require \"luv\" there", 0)
  end
end

local uv = require "luv"
local core = require "pglocks.core"
local run = require "pglocks.scope"

core.own_source(debug.getinfo(1, "S").source)

-- libuv never comes back to Lua while nothing happens: so every half second something does, for
-- Ctrl-C to strike in.
local INTERRUPT_MS = 500
local interrupts, waiting = uv.new_timer(), 0

-- Timers that nobody uses: a new one costs several times as much. { timer =, fire = its callback, wait = whose
-- it is }
local timers = {}

-- What a coroutine waits for; closed before it does, and when that has come, or when the coroutine is.
local Wait = {}

function Wait:__close()
  if self.closed then return end
  self.closed = true
  waiting = waiting - 1
  if waiting == 0 then interrupts:stop() end
  if self.poll then self.poll:close() end
  if self.timer then
    self.timer.timer:stop()
    self.timer.wait = nil
    timers[#timers + 1] = self.timer
  end
end

-- An error that nobody caught ends the program, as luv has it; on the way its scopes are closed.
local function fail(co, err)
  local message = debug.traceback(co, tostring(err))
  local close = rawget(coroutine, "close") -- Lua 5.4
  if close then close(co) end
  error(message, 0)
end

local function resume(self)
  if self.over or self.closed then return end
  self.over = true
  if not self.co then return end
  local ok, err = coroutine.resume(self.co)
  if not ok then fail(self.co, err) end
end

local isyieldable = rawget(coroutine, "isyieldable") -- Lua 5.4

-- The coroutine that can wait; nil: the main thread, which has to run the loop.
local function running()
  local co, main = coroutine.running()
  if main or not co then
    if not uv.loop_mode() then return nil end
    core.raise("server", "luv: nothing can wait in a callback; begin a coroutine there")
  elseif isyieldable and not isyieldable() then
    core.raise("server", "luv: nothing can wait here, inside a C function")
  end
  return co
end

local function new_wait() -- with room for all that it will know
  return setmetatable({ co = nil, timer = nil, poll = nil, over = false, woken = false, closed = true }, Wait)
end

local function begin(self)
  self.co = running()
  if waiting == 0 then interrupts:start(INTERRUPT_MS, INTERRUPT_MS, function() end) end
  waiting = waiting + 1
  self.closed = false
  return self
end

local function new_timer()
  local one = { timer = uv.new_timer(), wait = nil, fire = nil }
  function one.fire() resume(one.wait) end
  return one
end

local function set_timer(self, seconds)
  local one = table.remove(timers) or new_timer()
  self.timer, one.wait = one, self
  one.timer:start(math.ceil(seconds * 1000), 0, one.fire)
end

local function suspend(self)
  if self.co then
    coroutine.yield()
  else
    while not self.over do uv.run "once" end
  end
end

local function finish(self)
  self:__close()
  -- What is closed goes in the next turn of the loop. On the main thread that may have been the last, and
  -- Lua 5.4 would crash at its end.
  if not self.co then uv.run "nowait" end
  return self.woken
end

Wait.__index = Wait

local function wait(self) return run(self, finish, suspend, self) end

---@type pglocks.scheduler
local scheduler = { now = core.now }

-- Before anything is sent: what fails in the middle of an operation costs the connection.
scheduler.enter = running

function scheduler.wait(fd, events, seconds)
  local self = begin(new_wait())
  local err
  self.poll, err = uv.new_poll(fd)
  if not self.poll then
    self:__close()
    error(err, 0)
  end
  self.poll:start(events, function() resume(self) end)
  if seconds then set_timer(self, seconds) end
  wait(self)
end

function scheduler.sleep(seconds)
  local self = begin(new_wait())
  set_timer(self, seconds)
  wait(self)
end

function scheduler.spawn(fn)
  local co = coroutine.create(fn)
  local ok, err = coroutine.resume(co)
  if not ok then fail(co, err) end
end

local tokens = setmetatable({}, { __mode = "k" }) -- by coroutine

function scheduler.token()
  local token = new_wait()
  tokens[coroutine.running() or "main"] = token
  return token
end

function scheduler.park(seconds)
  local co = coroutine.running() or "main"
  local self = tokens[co]
  tokens[co] = nil -- it leads to the coroutine, which LuaJIT would never collect
  if self.woken then return true end
  begin(self)
  set_timer(self, seconds or 1e6)
  return wait(self)
end

-- Who was woken goes on in the loop's next turn, because whoever wakes may be in the middle of anything. Where
-- one of them fails, the turn after that is for the others.
local idle = uv.new_idle()
local woken, first, last = {}, 1, 0

local function resume_woken()
  for place = first, last do
    local self = woken[place]
    woken[place], first = nil, place + 1
    resume(self)
  end
  if first > last then idle:stop() end
end

function scheduler.wake(token)
  token.woken = true
  if token.closed then return end
  if first > last then
    first, last = 1, 0
    idle:start(resume_woken)
  end
  last = last + 1
  woken[last] = token
end

return scheduler
