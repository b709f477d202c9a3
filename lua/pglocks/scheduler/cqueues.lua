--- Waits in coroutines of cqueues.
---
---     local conn = pglocks.connect { conninfo = "postgresql:///app", scheduler = "cqueues" }
---
--- Outside a running controller `wait` waits alone, and nothing else goes on.

local cqueues = require "cqueues"
local condition = require "cqueues.condition"
local core = require "pglocks.core"

local poll, cancel = cqueues.poll, cqueues.cancel

---@type pglocks.scheduler
local scheduler = { now = core.now, sleep = cqueues.sleep }

local isyieldable = rawget(coroutine, "isyieldable") -- Lua 5.4

-- Before anything is sent: what fails in the middle of an operation costs the connection.
function scheduler.enter()
  if isyieldable and cqueues.running() and not isyieldable() then
    core.raise("server", "cqueues: nothing can wait here, inside a C function")
  end
end

function scheduler.wait(fd, events, seconds)
  poll({ pollfd = fd, events = events }, seconds)
  -- A controller forgets a file descriptor some time later. When that is closed meanwhile, and its
  -- number used for another, it would never wake for that one.
  cancel(fd)
end

-- False: outside a controller there is nobody to run it.
function scheduler.spawn(fn)
  local controller = cqueues.running()
  if controller then controller:wrap(fn) end
  return controller ~= nil
end

local tokens = setmetatable({}, { __mode = "k" }) -- by coroutine

-- A coroutine waits for one thing at a time: so it has one token for all its life.
function scheduler.token()
  local co = coroutine.running() or "main"
  local token = tokens[co]
  if not token then
    token = { condition = condition.new(), woken = false }
    tokens[co] = token
  end
  token.woken = false
  return token
end

function scheduler.park(seconds)
  local token = tokens[coroutine.running() or "main"]
  if not token.woken then poll(token.condition, seconds) end -- also where no controller runs
  return token.woken
end

function scheduler.wake(token)
  token.woken = true
  token.condition:signal()
end

return scheduler
