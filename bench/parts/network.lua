--- Pairs through a proxy that delays what passes. On a network only round trips count.

local candidates = require "bench.candidates"
local numbers = require "bench.numbers"
local workers = require "bench.workers"

-- Milliseconds of a round trip; of a chunk, which has to last for several pairs; and rounds.
local NETWORKS = { { 0, 25, 60 }, { 1, 50, 25 }, { 10, 250, 6 } }

local function start_proxy(bench, round_trip)
  local command = ("exec build/bench/delay %d %s"):format(round_trip * 500, bench.target())
  local proxy = assert(io.popen("echo $$; " .. command))
  local pid, port = proxy:read "*l", proxy:read "*l"
  return bench.tcp(port), function()
    workers.shell("kill " .. pid)
    proxy:close()
  end
end

return function(bench)
  local list = candidates.all("C text", "C binary", "C deferred", "Lua 5.4 confirmed", "Lua 5.4 timeout",
    "Lua 5.4 deferred", "LuaJIT deferred")
  local rows = { { "" } }
  for place, candidate in ipairs(list) do rows[place + 1] = { candidate.name } end
  bench.found.network = {}
  for _, network in ipairs(NETWORKS) do
    local round_trip, chunk, rounds = table.unpack(network)
    local conninfo, stop_proxy = start_proxy(bench, round_trip)
    local crew = workers.start(list, conninfo)
    bench.place(crew, "cross")
    local measured = workers.measure(crew, "run " .. chunk, bench.rounds(rounds))
    workers.stop(crew)
    stop_proxy()
    bench.found.network[round_trip] = measured
    table.move({ round_trip .. " ms: pairs/s", "to C text" }, 1, 2, #rows[1] + 1, rows[1])
    for place, candidate in ipairs(list) do
      local rates, row = measured[candidate.name].rate, rows[place + 1]
      row[#row + 1] = numbers.whole(numbers.median(rates))
      row[#row + 1] = ("%.2f"):format((numbers.ratio(rates, measured["C text"].rate)))
    end
  end
  bench.report("network", "Pairs over a network, by its round trip", rows)
end
