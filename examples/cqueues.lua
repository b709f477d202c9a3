-- cqueues.lua: three coroutines take turns on one lock, and a ticker goes on beside them. Which
-- database is what libpq's environment says:
--
--     PGHOST=/run/postgresql PGDATABASE=app lua examples/cqueues.lua
--
-- Started twice at the same time, the two processes take turns as well.

local cqueues = require "cqueues"
local pglocks = require "pglocks"

pglocks.setup { scheduler = "cqueues" }

local WORKERS, TURN, TICK = 3, 0.05, 0.01 -- of the last two: seconds

local counter, ticks = 0, 0

-- Goes wrong as soon as two do it at once: both would read the same number.
local function count()
  local read = counter
  print("reads " .. read)
  cqueues.sleep(TURN)
  counter = read + 1
  print("writes " .. counter)
end

local function work()
  pglocks.with_lock("counter", { timeout = 30 }, count) -- only this coroutine waits
end

local function tick()
  while counter < WORKERS do
    cqueues.sleep(TICK)
    ticks = ticks + 1
  end
end

local loop = cqueues.new()
for _ = 1, WORKERS do loop:wrap(work) end
loop:wrap(tick)
local ok, err = loop:loop()
if not ok then error(tostring(err), 0) end

print(ticks > WORKERS and "the ticker went on" or "the ticker had to wait")
