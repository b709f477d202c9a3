--- Processes take turns at one key; and how much CPU they use while they wait for it.

local candidates = require "bench.candidates"
local numbers = require "bench.numbers"
local uv = require "luv"
local workers = require "bench.workers"

local function used(crew)
  local clients, servers = 0, 0
  for _, worker in ipairs(crew) do
    clients = clients + workers.cpu(worker.pid)
    servers = servers + workers.cpu(worker.server_pid)
  end
  return clients, servers
end

-- The share of a CPU that one client needs while it waits, and its server's process.
local function measure_waiting(bench, crew, polls)
  local window = bench.short and 0.2 or 1
  local clients, servers
  bench.while_all_wait(crew, function()
    -- After a second in the queue a server's process looks for deadlocks, once.
    uv.sleep(bench.short and 100 or 1200)
    local clients_before, servers_before = used(crew)
    uv.sleep(math.floor(window * 1000))
    clients, servers = used(crew)
    clients, servers = clients - clients_before, servers - servers_before
  end, polls)
  return clients / window / #crew, servers / window / #crew
end

local function measure(bench, candidate, size)
  local list = {}
  for place = 1, size do list[place] = candidate end
  local crew = workers.start(list, bench.conninfo)
  local answers = workers.ask_all(crew, bench.short and "run 200" or "run 1000")
  local client, server = measure_waiting(bench, crew, candidate.variant == "poll")
  workers.stop(crew)
  local counts = numbers.list(answers, "pairs")
  local total, least = 0, math.huge
  for _, count in ipairs(counts) do
    total = total + count
    least = math.min(least, count)
  end
  local longest = math.max(table.unpack(numbers.list(answers, "seconds")))
  return { name = candidate.name, size = size, rate = total / longest, fairness = numbers.fairness(counts),
    least = least, client = client, server = server }
end

return function(bench)
  local list = candidates.all("C text", "Lua 5.4 confirmed", "LuaJIT confirmed", "C poll")
  local rows = { { "", "processes", "pairs/s", "Jain fairness", "pairs of the last", "CPU of one that waits",
    "of its server process" } }
  bench.found.contention = {}
  for _, size in ipairs(bench.short and { 2, 8 } or { 2, 8, 32, 100 }) do
    for _, candidate in ipairs(list) do
      local found = measure(bench, candidate, size)
      table.insert(bench.found.contention, found)
      rows[#rows + 1] = {
        candidate.name,
        numbers.whole(size),
        numbers.whole(found.rate),
        ("%.4f"):format(found.fairness),
        numbers.whole(found.least),
        ("%.3f %%"):format(found.client * 100),
        ("%.3f %%"):format(found.server * 100),
      }
    end
  end
  bench.report("contention", "Processes that take turns at one key, or try it every 50 ms (poll)", rows)
end
