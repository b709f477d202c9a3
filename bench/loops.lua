--- make bench-loops: what a scheduler costs on one connection, and whether a program goes on while
--- many of its coroutines wait.
---
---     SHORT=1   one round, and fewer that wait: it shows that all runs, and measures little

local core = require "pglocks.core"
local loops = require "spec.loops"
local numbers = require "bench.numbers"
local pglocks = require "pglocks"

-- Hundreds of connections at once may take longer than libpq's usual patience for one.
local CONNINFO = assert(os.getenv "PGLOCKS_TEST_CONNINFO", "no server: say `make bench-loops`")
  .. " connect_timeout=60"
local jit = rawget(_G, "jit")
local SHORT = (os.getenv "SHORT" or "") ~= ""
local SECONDS = SHORT and 0.1 or 0.5 -- of each measurement
local ROUNDS = SHORT and 1 or 6
local WAITING = SHORT and 100 or 500
local TICK = 0.01

-- ---- pairs on one connection ------------------------------------------------------------

local CANDIDATES = {
  "blocking, confirmed", "blocking, deferred",
  "cqueues, confirmed", "cqueues, deferred",
  "luv, confirmed", "luv, deferred",
}

local function pairs_a_second(conn)
  local began, count, key = core.now(), 0, 0
  repeat
    for _ = 1, 20 do
      key = key + 1
      conn:lock(key):release()
    end
    count = count + 20
  until core.now() - began >= SECONDS
  return count / (core.now() - began)
end

local function measure_pairs(candidate)
  local scheduler, release = candidate:match "(%w+), (%w+)"
  local result
  local function measure()
    local conn = pglocks.connect { conninfo = CONNINFO, scheduler = scheduler, release = release }
    local cpu = os.clock()
    local rate = pairs_a_second(conn)
    result = { rate = rate, cpu = (os.clock() - cpu) / (rate * SECONDS) }
    conn:close()
  end
  if scheduler == "blocking" then
    measure()
  else
    loops[scheduler].run(measure)
  end
  return result
end

local function compare_pairs()
  local found = numbers.rounds(CANDIDATES, ROUNDS, measure_pairs)
  local rows = { { "", "pairs/s", "ratio", "min..max", "own CPU us/pair", "ratio" } }
  for _, candidate in ipairs(CANDIDATES) do
    local base = found["blocking, " .. candidate:match "%w+$"]
    local own = found[candidate]
    local ratio, spread = numbers.ratio(numbers.list(own, "rate"), numbers.list(base, "rate"))
    rows[#rows + 1] = {
      candidate,
      numbers.whole(numbers.median(numbers.list(own, "rate"))),
      ("%.2f"):format(ratio),
      spread,
      ("%.1f"):format(numbers.median(numbers.list(own, "cpu")) * 1e6),
      ("%.2f"):format((numbers.ratio(numbers.list(own, "cpu"), numbers.list(base, "cpu")))),
    }
  end
  numbers.print_table("Pairs on one connection; ratio: to blocking with the same release", rows)
end

-- ---- coroutines that wait ---------------------------------------------------------------

local function tick(loop, seconds)
  local late, due = {}, core.now() + TICK
  local last = due + seconds
  while due < last do
    loop.sleep(math.max(0, due - core.now()))
    late[#late + 1] = (core.now() - due) * 1000
    -- Ticks that were missed are not made up for: one delay would count many times.
    due = math.max(due, core.now()) + TICK
  end
  return late
end

-- From a connection of its own, which blocks: it must not need the loop that it looks at.
local function count_waiting(observer)
  return observer:query([[SELECT count(*) AS n FROM pg_locks
    WHERE locktype = 'advisory' AND NOT granted]])[1].n
end

local function measure_waiting(name, waiting)
  local loop, row = loops[name], nil
  local seconds = SHORT and 0.3 or 3
  local observer = pglocks.connect { conninfo = CONNINFO, scheduler = "blocking" }
  local held = observer:lock(1)
  pglocks.setup {
    databases = { default = { conninfo = CONNINFO, dedicated = true, pool_size = waiting + 1, timeout = 60 } },
    scheduler = name,
  }
  loop.run(function()
    local granted, began = 0, core.now()
    for _ = 1, waiting do
      loop.spawn(function()
        local lock = pglocks.lock(1)
        granted = granted + 1
        lock:release()
      end)
    end
    while count_waiting(observer) < waiting do
      if core.now() - began > 60 then error("waited in vain for coroutines to queue", 0) end
      loop.sleep(0.05)
    end
    local gathered = core.now() - began
    loop.sleep(1.5) -- after a second each backend in the queue looks for deadlocks
    local wall, cpu = core.now(), os.clock()
    local late = tick(loop, seconds)
    cpu, wall = os.clock() - cpu, core.now() - wall
    held:release()
    local released = core.now()
    while granted < waiting do loop.sleep(0.01) end
    row = {
      name,
      numbers.whole(waiting),
      ("%.2f"):format(gathered),
      ("%.2f"):format(numbers.percentile(late, 0.5)),
      ("%.2f"):format(numbers.percentile(late, 0.99)),
      ("%.2f"):format(numbers.percentile(late, 1)),
      ("%.2f %%"):format(100 * cpu / wall),
      ("%.2f"):format(core.now() - released),
    }
  end)
  observer:close()
  return row
end

local function compare_waiting()
  local rows = { { "", "waiting", "gathered in s", "late p50 ms", "p99 ms", "max ms", "own CPU",
    "all served in s" } }
  for _, name in ipairs { "cqueues", "luv" } do
    for _, waiting in ipairs { 0, WAITING } do rows[#rows + 1] = measure_waiting(name, waiting) end
  end
  rows[#rows + 1] = { "blocking", "1", "", "for ever", "", "", "", "" }
  numbers.print_table(("A ticker of %d ms while coroutines wait for one lock"):format(TICK * 1000), rows)
end

-- ---- all --------------------------------------------------------------------------------

print(("%s; medians of %d rounds"):format(jit and jit.version or _VERSION, ROUNDS))
print "min..max: of the ratios of the rounds, which is how noisy this machine was"
compare_pairs()
compare_waiting()
