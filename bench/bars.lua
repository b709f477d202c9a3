--- What pglocks is to reach: a table of bars, of what was measured, and of what was missed.

local candidates = require "bench.candidates"
local numbers = require "bench.numbers"

local AT_LEAST, AT_MOST = ">=", "<="

local PEERS = {
  { "luasql", 1.4 },
  { "pgmoon", 2 },
  { "psycopg2", 1.6 },
  { "django-pglocks", 2.5 },
  { "with_advisory_lock", 5 },
}

-- The median ratio of two candidates of the same rounds; nil where one of them is missing.
local function ratio(measured, own, base, field)
  own, base = measured[own], measured[base]
  return own and base and (numbers.ratio(own[field or "rate"], base[field or "rate"]))
end

-- By part: adds its bars with bar(what, relation, limit, measured or nil, why there is nothing).
local parts = {}

function parts.pairs(bar, found)
  for _, runtime in ipairs(candidates.runtimes) do
    local confirmed, deferred = runtime .. " confirmed", runtime .. " deferred"
    local cpu = ratio(found.same, confirmed, "C binary", "cpu")
    bar(confirmed .. " to C binary", AT_LEAST, 0.95, ratio(found.same, confirmed, "C binary"))
    bar(confirmed .. " to C binary, client CPU", AT_MOST, 1.12, cpu)
    bar(confirmed .. " to C text", AT_LEAST, 1.3, ratio(found.same, confirmed, "C text"))
    bar(confirmed .. " to C text, TCP", AT_LEAST, 1.25, ratio(found.tcp, confirmed, "C text"))
    bar(deferred .. " to C text, two CPUs", AT_LEAST, 1.9, ratio(found.cross, deferred, "C text"))
    bar(runtime .. " timeout to confirmed, time", AT_MOST, 1.1,
      ratio(found.same, confirmed, runtime .. " timeout"))
    for _, peer in ipairs(PEERS) do
      bar(("%s to %s"):format(confirmed, peer[1]), AT_LEAST, peer[2], ratio(found.same, confirmed, peer[1]),
        "not installed")
    end
    local transaction = runtime .. " transaction_deferred"
    bar(transaction .. " to C transaction", AT_LEAST, 1.4, ratio(found.same, transaction, "C transaction"))
    bar(transaction .. " to C transaction, two CPUs", AT_LEAST, 2.7,
      ratio(found.cross, transaction, "C transaction"))
    for _, limit in ipairs { { confirmed, 6 }, { deferred, 5 } } do
      local counted = found.counts[limit[1]]
      bar(limit[1] .. ", system calls", AT_MOST, limit[2], counted and counted.strace and counted.strace.total)
    end
  end
end

function parts.network(bar, found)
  for _, runtime in ipairs(candidates.runtimes) do
    bar(runtime .. " deferred to C text, 1 ms of network", AT_LEAST, 1.9,
      ratio(found[1], runtime .. " deferred", "C text"))
  end
end

-- Once in half a second one that waits looks whether it was interrupted: "no CPU" leaves room for that.
function parts.contention(bar, found)
  for _, row in ipairs(found) do
    if row.name:find "confirmed" then
      bar(("%s, fairness among %d"):format(row.name, row.size), AT_LEAST, 0.99, row.fairness)
      bar(("%s, CPU of one of %d that wait"):format(row.name, row.size), AT_MOST, 0.001, row.client)
    end
  end
end

function parts.scale(bar, found)
  for _, runtime in ipairs(candidates.runtimes) do
    for _, limit in ipairs { { 1000, 50 }, { 5000, 200 } } do
      bar(("%s: %d keys at once to one by one"):format(runtime, limit[1]), AT_LEAST, limit[2],
        found[limit[1]][runtime], "pglocks has none yet")
    end
  end
end

function parts.locker(bar, found)
  for _, row in ipairs(found.holding) do
    bar(row.name .. ": connections for 1,000 locks", AT_MOST, 10, row.connections)
  end
  for _, row in ipairs(found.spread) do
    bar(row.name .. ": a locker to connections, a key each", AT_LEAST, 4, row.ratio)
  end
  for _, row in ipairs(found.hot) do
    bar(row.name .. ": a locker to connections, one key", AT_LEAST, 5, row.ratio)
    bar(row.name .. ": p99 of another process's wait, ms", AT_MOST, 5, row.wait)
  end
end

local function holds(relation, limit, measured)
  if relation == AT_LEAST then return measured >= limit end
  return measured <= limit
end

--- Of the parts that have been measured.
return function(bench)
  local rows = { { "", "bar", "measured", "" } }
  local function bar(what, relation, limit, measured, reason)
    rows[#rows + 1] = {
      what,
      ("%s %g"):format(relation, limit),
      measured and ("%.4g"):format(measured) or "-",
      not measured and (reason or "not measured") or holds(relation, limit, measured) and "" or "MISSED",
    }
  end
  for _, name in ipairs(bench.parts) do
    if parts[name] and bench.found[name] then parts[name](bar, bench.found[name]) end
  end
  if #rows > 1 then bench.report("bars", "Bars; of speed, if nothing else is said", rows) end
end
