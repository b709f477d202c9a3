--- What connections, locks and waits take of a process's memory:
---
---     growth.lua CONNINFO NUMBER
---
--- makes so many of each, and prints lines: a name, bytes of the process for one, those of them that
--- Lua counts.

local loops = require "spec.loops"
local pglocks = require "pglocks"
local workers = require "bench.workers"

local KEY = 4242

local conninfo, number = arg[1], tonumber(arg[2])
local loop = loops.luv

local function measure(name, count, make)
  collectgarbage()
  collectgarbage()
  local private, counted = workers.private "self", collectgarbage "count"
  local made = make(count)
  collectgarbage()
  collectgarbage()
  print(("%s %.0f %.0f"):format(name, (workers.private "self" - private) / count,
    (collectgarbage "count" - counted) * 1024 / count))
  return made
end

-- Connections that have locked once, as they all do.
local function connect(count)
  local list = {}
  for n = 1, count do
    list[n] = pglocks.connect { conninfo = conninfo, scheduler = "luv" }
    list[n]:lock(n):release()
  end
  return list
end

local observer = pglocks.connect { conninfo = conninfo, scheduler = "blocking" }
observer:lock(KEY):release()

local function queued()
  return observer:query("SELECT count(*) AS n FROM pg_locks WHERE objid = $1 AND NOT granted", KEY)[1].n
end

measure("lock", 10 * number, function(count)
  local locks = {}
  for n = 1, count do locks[n] = observer:lock(KEY + n) end
  return locks
end)

loop.run(function()
  connect(1)[1]:close() -- what is loaded only once
  local connections = measure("connection", number, connect)
  local held = observer:lock(KEY)
  measure("wait", number, function(count)
    for _, conn in ipairs(connections) do
      loop.spawn(function() conn:lock(KEY):release() end)
    end
    while queued() < count do loop.sleep(0.01) end
  end)
  held:release()
end)
