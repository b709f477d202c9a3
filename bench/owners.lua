--- Many owners in one process, as a worker of the benchmarks, on both runtimes:
---
---     owners.lua CONNINFO VARIANT
---
--- A VARIANT is a kind and settings: "locker loop=cqueues owners=500 keys=500". Each of so many coroutines
--- takes and releases one of so many keys, all of one `locker`, or with `connections`, one each; `section`:
--- and sleeps so many seconds in between. A
--- `competitor` is one plain connection, that also answers how long it waited: 0.5 and 0.99 of all times
--- were not longer than so many seconds. A `holder` takes N locks at once for `count N`, and
--- keeps them; after N more it answers to `weigh N` how many connections they are on, and what each takes:
--- bytes of the process, and those of them that Lua counts. bench/workers.lua says all else.

local core = require "pglocks.core"
local loops = require "spec.loops"
local numbers = require "bench.numbers"
local pglocks = require "pglocks"
local worker = require "bench.peers.worker"
local workers = require "bench.workers"

local KEY = 4242
local PID = require "luv".os_getpid()

local conninfo, kind = arg[1], arg[2]:match "^%a+"
local settings = { loop = "cqueues", owners = "1", keys = "1", held = "0" }
for name, value in arg[2]:gmatch "([%w_]+)=(%S+)" do settings[name] = value end

local loop = loops[settings.loop]
local owners, keys, held = tonumber(settings.owners), tonumber(settings.keys), tonumber(settings.held)
local section = tonumber(settings.section)

local function described()
  return { conninfo = conninfo, scheduler = settings.loop, application_name = "owners",
    handovers = tonumber(settings.handovers), handover_time = tonumber(settings.handover_time) }
end

-- All owners at a time, until that long has passed.
local function run(clients, milliseconds)
  local deadline, count = core.now() + milliseconds / 1000, 0
  loop.run(function()
    for n = 1, owners do
      loop.spawn(function()
        local client, key = clients[n] or clients[1], KEY + n % keys
        repeat
          local lock = client:lock(key)
          if section then loop.sleep(section) end
          lock:release()
          count = count + 1
        until core.now() >= deadline
      end)
    end
  end)
  return count
end

local kinds = {}

-- Of the locks that are held beside, all are on the connection that the pairs are on, too.
local function prepare(clients, number)
  local others = {}
  loop.run(function()
    for n = 1, number do clients[n]:lock(n):release() end
    for n = 1, held do others[n] = clients[1]:lock(PID * 1000 + n) end
  end)
  return function(milliseconds) return run(clients, milliseconds, others) end
end

function kinds.locker()
  local description = described()
  if held > 0 then description.locks_per_connection = 2 * held end
  return { run = prepare({ pglocks.locker(description) }, 1) }
end

function kinds.connections()
  local clients = {}
  loop.run(function()
    for n = 1, owners do
      local description = described()
      description.handovers, description.handover_time = nil, nil
      clients[n] = pglocks.connect(description)
    end
  end)
  return { run = prepare(clients, owners) }
end

function kinds.competitor()
  local conn = pglocks.connect { conninfo = conninfo, scheduler = "blocking" }
  return {
    run = function(milliseconds)
      local deadline, waits = core.now() + milliseconds / 1000, {}
      local now
      repeat
        local began = core.now()
        local lock = conn:lock(KEY + 1 % keys)
        now = core.now()
        waits[#waits + 1] = now - began
        lock:release()
      until now >= deadline
      return #waits, ("%.6f %.6f"):format(numbers.percentile(waits, 0.5), numbers.percentile(waits, 0.99))
    end,
  }
end

function kinds.holder()
  local locker = pglocks.locker(described())
  local observer = pglocks.connect { conninfo = conninfo, scheduler = "blocking" }
  local made = {}
  local function let_go()
    for _, lock in ipairs(made) do lock:release() end
    made = {}
  end
  -- What a coroutine that has ended leaves to the allocator is none of a lock's: one takes all of them.
  local function hold(number)
    for n = #made + 1, #made + number do made[n] = locker:lock(n) end
  end
  local function memory()
    collectgarbage()
    collectgarbage()
    return workers.private "self", collectgarbage "count" * 1024
  end
  loop.run(function() hold(100) end)
  return {
    count = function(number)
      loop.run(let_go)
      loop.run(function()
        for n = 1, number do
          loop.spawn(function() made[n] = locker:lock(n) end)
        end
      end)
      return number
    end,
    weigh = function(number)
      local private, counted = memory()
      loop.run(function() hold(number) end)
      local private_now, counted_now = memory()
      local sessions = observer:query [[SELECT count(*) AS n FROM pg_stat_activity
        WHERE application_name = 'owners']][1].n
      return number, ("%d %.0f %.0f"):format(sessions, (private_now - private) / number,
        (counted_now - counted) / number)
    end,
  }
end

worker.obey(0, kinds[kind]())
