-- luv.lua: three coroutines take turns on one lock, and a ticker goes on beside them. Which
-- database is what libpq's environment says:
--
--     PGHOST=/run/postgresql PGDATABASE=app lua examples/luv.lua
--
-- Started twice at the same time, the two processes take turns as well.

local uv = require "luv"
local pglocks = require "pglocks"

pglocks.setup { scheduler = "luv" }

local WORKERS, TURN, TICK = 3, 50, 10 -- of the last two: milliseconds

local counter, ticks = 0, 0
local ticker = uv.new_timer()

local function resume(co)
  local ok, err = coroutine.resume(co)
  if not ok then error(debug.traceback(co, tostring(err)), 0) end
end

local function sleep(milliseconds)
  local co, timer = coroutine.running(), uv.new_timer()
  timer:start(milliseconds, 0, function()
    timer:close()
    resume(co)
  end)
  coroutine.yield()
end

-- Goes wrong as soon as two do it at once: both would read the same number.
local function count()
  local read = counter
  print("reads " .. read)
  sleep(TURN)
  counter = read + 1
  print("writes " .. counter)
end

local function work()
  pglocks.with_lock("counter", { timeout = 30 }, count) -- only this coroutine waits
end

local function tick()
  ticks = ticks + 1
  if counter == WORKERS then ticker:close() end -- nothing is left to wait for: the loop ends
end

ticker:start(TICK, TICK, tick)
for _ = 1, WORKERS do resume(coroutine.create(work)) end
uv.run()

print(ticks > WORKERS and "the ticker went on" or "the ticker had to wait")
