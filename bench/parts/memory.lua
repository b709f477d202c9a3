--- Memory: of what there may be many, of processes that wait, and whether pairs leave anything behind.

local candidates = require "bench.candidates"
local numbers = require "bench.numbers"
local workers = require "bench.workers"

local RUNTIMES = { "5.4", "jit" } -- as tools/lua says, in the order of candidates.runtimes

local function measure_growth(bench)
  local rows = { { "", "Lua 5.4: process", "counted by Lua", "LuaJIT: process", "counted by Lua" } }
  for _, name in ipairs { "lock", "connection", "wait" } do rows[#rows + 1] = { name } end
  for _, runtime in ipairs(RUNTIMES) do
    local said = workers.shell(("tools/lua %s bench/growth.lua '%s' %d"):format(runtime, bench.conninfo,
      bench.short and 20 or 200))
    for place = 2, #rows do
      local row = rows[place]
      local process, counted = said:match("%f[%w]" .. row[1] .. " (%S+) (%S+)")
      if not process then error("bench/growth.lua has failed: " .. said, 0) end
      table.move({ numbers.whole(process), numbers.whole(counted) }, 1, 2, #row + 1, row)
    end
  end
  bench.report("memory", "Bytes of a lock that is held, of a connection, and of a coroutine that waits", rows)
end

local function kilobytes(pid) return numbers.whole(workers.private(pid) / 1024) end

-- Both runtimes at a time, with shared locks, so that neither waits for the other.
local function measure_leaks(bench)
  local count = bench.short and 20000 or 1000000
  local crew = workers.start(candidates.all("Lua 5.4 shared", "LuaJIT shared"), bench.conninfo)
  local rows = { { "", "KB before", ("after %s pairs"):format(numbers.whole(count)) } }
  for place, worker in ipairs(crew) do bench.place({ worker }, place == 1 and "same" or "other") end
  workers.ask_all(crew, ("count %d"):format(count // 4)) -- until the collector has found its pace
  for place, worker in ipairs(crew) do rows[place + 1] = { worker.name, kilobytes(worker.pid) } end
  workers.ask_all(crew, ("count %d"):format(count))
  for place, worker in ipairs(crew) do rows[place + 1][3] = kilobytes(worker.pid) end
  workers.stop(crew)
  bench.report("leaks", "Memory of a process before and after many pairs", rows)
end

local function measure_waiting(bench)
  local list = candidates.all("C binary", "Lua 5.4 confirmed", "LuaJIT confirmed")
  local crew = workers.start(list, bench.conninfo)
  local rows = { { "KB", "client", "its server process" } }
  workers.ask_all(crew, "count 1")
  bench.while_all_wait(crew, function()
    for place, worker in ipairs(crew) do
      rows[place + 1] = { worker.name, kilobytes(worker.pid), kilobytes(worker.server_pid) }
    end
  end)
  workers.stop(crew)
  bench.report("waiters", "Memory of a process that waits for a lock", rows)
end

return function(bench)
  measure_growth(bench)
  measure_waiting(bench)
  measure_leaks(bench)
end
