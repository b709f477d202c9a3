--- One client takes and releases one lock, again and again, and nobody else wants it.

local candidates = require "bench.candidates"
local numbers = require "bench.numbers"
local workers = require "bench.workers"

local HEAD = { "", "pairs/s", "to C text", "q1", "q3", "to C binary", "q1", "q3", "CPU us/pair",
  "to C binary" }
local COUNTS = { "system calls", "instructions" }

local function add_ratio(row, own, base)
  local ratios = numbers.ratios(own, base)
  for _, share in ipairs { 0.5, 0.25, 0.75 } do
    row[#row + 1] = ("%.2f"):format(numbers.percentile(ratios, share))
  end
end

local function row_of(name, measured, counts)
  local own, text, binary = measured[name], measured["C text"], measured["C binary"]
  local row = { name, numbers.whole(numbers.median(own.rate)) }
  add_ratio(row, own.rate, text.rate)
  add_ratio(row, own.rate, binary.rate)
  row[#row + 1] = ("%.1f"):format(numbers.median(own.cpu) * 1e6)
  row[#row + 1] = ("%.2f"):format((numbers.ratio(own.cpu, binary.cpu)))
  if counts then
    local counted = counts[name] or {}
    row[#row + 1] = counted.strace and ("%.1f"):format(counted.strace.total) or ""
    row[#row + 1] = counted.valgrind and numbers.whole(counted.valgrind.total) or ""
  end
  return row
end

local function report(bench, name, title, crew, measured, counts)
  local rows = { { table.unpack(HEAD) } }
  if counts then table.move(COUNTS, 1, #COUNTS, #HEAD + 1, rows[1]) end
  for _, worker in ipairs(crew) do rows[#rows + 1] = row_of(worker.name, measured, counts) end
  bench.report(name, title, rows)
end

-- Where the instructions are.
local FILES = { "libpq", "libc%.", "^lua", "^core%.so$" }

local function report_instructions(bench, counts)
  local rows = { { "", "instructions", "libpq", "libc", "interpreter", "pglocks" } }
  for _, candidate in ipairs(candidates.pairs) do
    local counted = (counts[candidate.name] or {}).valgrind
    if counted then
      local row = { candidate.name, numbers.whole(counted.total) }
      for place, pattern in ipairs(FILES) do
        local sum = 0
        for file, each in pairs(counted) do
          if file:find(pattern) then sum = sum + each end
        end
        row[place + 2] = numbers.whole(sum)
      end
      rows[#rows + 1] = row
    end
  end
  if #rows > 1 then bench.report("instructions", "Instructions of the client for a pair, and where", rows) end
end

-- Returns how to stop it again.
local function start_redis(folder)
  if not workers.has "redis-server" then return function() end end
  candidates.redis.conninfo = folder .. "/redis"
  local command = "exec redis-server --port 0 --unixsocket %s/redis --dir %s --save '' --appendonly no"
  local server = assert(io.popen("echo $$; " .. command:format(folder, folder)))
  local pid = server:read "*l"
  for line in server:lines() do
    if line:find "[Rr]eady to accept" then break end
  end
  return function()
    workers.shell("kill " .. pid)
    server:close()
  end
end

local function count(bench)
  local list = bench.short and candidates.all("C text", "Lua 5.4 confirmed", "LuaJIT confirmed")
    or candidates.pairs
  local counts = {}
  for _, candidate in ipairs(list) do
    local counted = {}
    for _, tool in ipairs { "strace", "valgrind" } do
      counted[tool] = workers.count(tool, candidate, bench.conninfo)
    end
    counts[candidate.name] = counted
  end
  return counts
end

return function(bench)
  local found = { counts = count(bench) }
  bench.found.pairs = found

  local everybody = { table.unpack(candidates.pairs) }
  table.move(candidates.peers, 1, #candidates.peers, #everybody + 1, everybody)
  everybody[#everybody + 1] = candidates.redis
  local stop_redis = start_redis(bench.folder)
  local crew, missing = workers.start(everybody, bench.conninfo)
  for _, placement in ipairs { "same", "cross" } do
    bench.place(crew, placement)
    found[placement] = workers.measure(crew, "run 25", bench.rounds(50))
  end
  workers.stop(crew)
  stop_redis()
  report(bench, "pairs-same", "Pairs, client and server on one CPU", crew, found.same, found.counts)
  report(bench, "pairs-cross", "Pairs, client and server on two CPUs", crew, found.cross)
  for _, line in ipairs(missing) do print("  left out: " .. line) end
  report_instructions(bench, found.counts)

  local list = candidates.all("C text", "C binary", "Lua 5.4 confirmed", "LuaJIT confirmed")
  crew = workers.start(list, bench.tcp())
  bench.place(crew, "same")
  found.tcp = workers.measure(crew, "run 25", bench.rounds(60))
  workers.stop(crew)
  report(bench, "pairs-tcp", "Pairs over TCP, client and server on one CPU", crew, found.tcp)
end
