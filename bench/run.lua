--- make bench: pglocks beside the same done by hand in C, and beside other libraries. Prints tables, and
--- leaves them as CSV in build/bench/.
---
---     SHORT=1     one round of everything: it shows that all runs, and measures little
---     ONLY=pairs  one part: pairs, network, contention, scale, memory, locker
---
--- Machines are noisy: only ratios count, taken side by side. In a round each candidate has 25 ms in
--- turn, in the next one backwards; a ratio is taken within a round, and of all rounds the median.

local bars = require "bench.bars"
local numbers = require "bench.numbers"
local pglocks = require "pglocks"
local uv = require "luv"
local workers = require "bench.workers"

local FOLDER = "build/bench/" -- of the CSV files
local KEY = 4242
-- Hundred connections at once may take longer than libpq's usual patience for one.
local PATIENCE = " connect_timeout=60"

local ONLY = os.getenv "ONLY" or ""

-- What the parts share.
local bench = {
  short = (os.getenv "SHORT" or "") ~= "",
  conninfo = assert(os.getenv "PGLOCKS_TEST_CONNINFO", "no server: say `make bench`") .. PATIENCE,
  folder = assert(uv.fs_mkdtemp "/tmp/pglocks-bench.XXXXXX"), -- goes when all has been measured
  parts = { "pairs", "network", "contention", "scale", "memory", "locker" },
  found = {}, -- by part, for the bars
}

local observer = pglocks.connect(bench.conninfo)

local function keyword(name, default)
  return bench.conninfo:match("%f[%w]" .. name .. "=(%S+)") or default
end

--- The port of 127.0.0.1, or the path, where the server listens: for a proxy.
function bench.target()
  local host, port = keyword("host", ""), keyword("port", "5432")
  return host:sub(1, 1) == "/" and ("%s/.s.PGSQL.%s"):format(host, port) or port
end

--- A conninfo for TCP, to the server itself or to another port.
function bench.tcp(port)
  return ("host=127.0.0.1 port=%s dbname=%s user=%s"):format(port or keyword("port", "5432"),
    keyword("dbname", "postgres"), keyword("user", "postgres")) .. PATIENCE
end

function bench.rounds(usual) return bench.short and 1 or usual end

function bench.report(name, title, rows)
  numbers.print_table(title, rows)
  numbers.write_csv(FOLDER .. name .. ".csv", rows)
end

local warned

function bench.warn_unless(placed)
  if placed or warned then return end
  warned = true
  print "\nNOT PINNED, which needs taskset, two CPUs and the rights to it: these figures say little."
end

function bench.place(crew, placement) bench.warn_unless(workers.place(crew, placement)) end

--- Calls fn while the server begins its processes on one CPU.
function bench.with_server_on(cpu, fn)
  bench.warn_unless(workers.place_server(observer.backend_pid, cpu))
  fn()
  workers.place_server(observer.backend_pid)
end

--- Calls fn while all of a crew wait for the lock that we hold. polls: they do not stand in the queue.
function bench.while_all_wait(crew, fn, polls)
  local lock = observer:lock(KEY)
  local function queued()
    return observer:query("SELECT count(*) AS n FROM pg_locks WHERE objid = $1 AND NOT granted", KEY)[1].n
  end
  for _, worker in ipairs(crew) do worker:tell "count 1" end
  while not polls and queued() < #crew do uv.sleep(5) end
  fn()
  lock:release()
  for _, worker in ipairs(crew) do worker:answer() end
end

print("PostgreSQL " .. observer:query "SHOW server_version"[1].server_version)
print "Medians of rounds. q1, q3: the quartiles of a ratio, which is how noisy this machine was."
local ok, err = xpcall(function()
  for _, name in ipairs(bench.parts) do
    if ONLY == "" or ONLY == name then require("bench.parts." .. name)(bench) end
  end
  bars(bench)
end, function(e) return type(e) == "string" and debug.traceback(e, 2) or tostring(e) end)
workers.shell("rm -rf " .. bench.folder)
observer:close()
if not ok then
  io.stderr:write(err, "\n")
  os.exit(1)
end
