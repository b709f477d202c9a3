--- Many owners in one process, on the few connections of a locker, beside a connection for each.

local candidates = require "bench.candidates"
local numbers = require "bench.numbers"
local workers = require "bench.workers"

local LOOPS = { "cqueues", "luv" }
local HELD = 1000
local HANDOVERS = { 1, 8, 32, 128, 512 }
local HANDOVER_TIMES = { 0.0005, 0.001, 0.002, 0.005, 0.01 }

local owners, median, whole = candidates.owners, numbers.median, numbers.whole

-- Calls fn(runtime, loop) for each.
local function each_kind(bench, fn)
  for _, runtime in ipairs(candidates.runtimes) do
    for place = 1, bench.short and 1 or #LOOPS do fn(runtime, LOOPS[place]) end
  end
end

local function start(bench, list, placement)
  local crew, missing = workers.start(list, bench.conninfo)
  if missing[1] then error(missing[1], 0) end
  bench.place(crew, placement or "cross")
  return crew
end

local function milliseconds(seconds) return ("%.2f"):format(1000 * seconds) end

-- ---- locks that are held ----------------------------------------------------------------

local function measure_holding(bench)
  local rows = { { "", "connections", "all at once, ms", "bytes of the process", "counted by Lua" } }
  bench.found.locker.holding = {}
  each_kind(bench, function(runtime, loop)
    local crew = start(bench, { owners(runtime, "holder loop=" .. loop) })
    local weighed = crew[1]:ask("weigh " .. HELD)
    local took = {}
    for round = 1, bench.rounds(5) do took[round] = crew[1]:ask("count " .. HELD).seconds end
    workers.stop(crew)
    local name = runtime .. ", " .. loop
    table.insert(bench.found.locker.holding, { name = name, connections = weighed[1] })
    rows[#rows + 1] = { name, whole(weighed[1]), milliseconds(median(took)), whole(weighed[2]), whole(weighed[3]) }
  end)
  bench.report("locker-held", ("A locker with %s locks: taken by a coroutine each; what one takes")
    :format(whole(HELD)), rows)
end

-- ---- a key each -------------------------------------------------------------------------

local function measure_spread(bench)
  local size = bench.short and 100 or 500
  local rows = { { "", "connections: pairs/s", "locker: pairs/s", "ratio", "min..max", "own CPU us/pair", "ratio" } }
  bench.found.locker.spread = {}
  each_kind(bench, function(runtime, loop)
    local settings = (" loop=%s owners=%d keys=%d"):format(loop, size, size)
    local crew = start(bench, { owners(runtime, "connections" .. settings), owners(runtime, "locker" .. settings) })
    local measured = workers.measure(crew, "run 200", bench.rounds(10))
    workers.stop(crew)
    local base, own = measured[crew[1].name], measured[crew[2].name]
    local ratio, spread = numbers.ratio(own.rate, base.rate)
    local name = runtime .. ", " .. loop
    table.insert(bench.found.locker.spread, { name = name, ratio = ratio })
    rows[#rows + 1] = { name, whole(median(base.rate)), whole(median(own.rate)), ("%.2f"):format(ratio), spread,
      ("%.1f"):format(median(own.cpu) * 1e6), ("%.2f"):format((numbers.ratio(own.cpu, base.cpu))) }
  end)
  bench.report("locker-spread", ("%d coroutines with a key each, on connections of their own and on a locker")
    :format(size), rows)
end

-- ---- a key for all ----------------------------------------------------------------------

-- Each of the candidates, alone and beside a competitor. Returns by name { rate =, beside = its rate
-- beside him, wait = his p50, longest = his p99 }, lists by round.
local function measure_contended(bench, list, command, rounds)
  local found = {}
  local crew = start(bench, { owners("Lua 5.4", "competitor"), table.unpack(list) })
  local competitor = crew[1]
  bench.place({ competitor }, "other")
  local answers = numbers.rounds({ table.unpack(crew, 2) }, rounds, function(worker)
    local alone = worker:ask(command)
    competitor:tell(command)
    local beside = worker:ask(command)
    return { alone = alone, beside = beside, competitor = competitor:answer() }
  end)
  workers.stop(crew)
  for worker, of_rounds in pairs(answers) do
    local of = { rate = {}, beside = {}, wait = {}, longest = {} }
    for round, answer in ipairs(of_rounds) do
      of.rate[round], of.beside[round] = answer.alone.rate, answer.beside.rate
      of.wait[round], of.longest[round] = answer.competitor[1], answer.competitor[2]
    end
    found[worker.name] = of
  end
  return found
end

-- As many processes in C, of the server's queue.
local function measure_processes(bench, size, command)
  local list = {}
  for place = 1, size do list[place] = candidates.of "C text" end
  local crew = start(bench, list)
  local rates = {}
  for round = 1, bench.rounds(3) do
    local total, longest = 0, 0
    for _, answer in ipairs(workers.ask_all(crew, command)) do
      total, longest = total + answer.pairs, math.max(longest, answer.seconds)
    end
    rates[round] = total / longest
  end
  workers.stop(crew)
  return median(rates)
end

local function hot_row(name, size, of, base)
  return { name, whole(size), whole(median(of.rate)), ("%.2f"):format((numbers.ratio(of.rate, base.rate))),
    whole(median(of.beside)), ("%.2f"):format((numbers.ratio(of.beside, base.beside))),
    milliseconds(median(of.wait)), milliseconds(median(of.longest)) }
end

local function measure_hot(bench)
  local command = bench.short and "run 100" or "run 300"
  local rows = { { "", "owners", "pairs/s", "ratio", "beside another process", "ratio", "its wait: p50 ms", "p99 ms" } }
  bench.found.locker.hot = {}
  for _, size in ipairs(bench.short and { 8 } or { 8, 100 }) do
    rows[#rows + 1] = { "C text, a process each", whole(size), whole(measure_processes(bench, size, command)) }
    each_kind(bench, function(runtime, loop)
      local settings = (" loop=%s owners=%d keys=1"):format(loop, size)
      local list = { owners(runtime, "connections" .. settings), owners(runtime, "locker" .. settings) }
      local measured = measure_contended(bench, list, command, bench.rounds(6))
      local base, own = measured[list[1].name], measured[list[2].name]
      local name = ("%s, %s"):format(runtime, loop)
      rows[#rows + 1] = hot_row(name .. ", connections", size, base, base)
      rows[#rows + 1] = hot_row(name .. ", locker", size, own, base)
      table.insert(bench.found.locker.hot, { name = ("%s, %d"):format(name, size),
        ratio = numbers.ratio(own.rate, base.rate), wait = median(own.longest) * 1000 })
    end)
  end
  bench.report("locker-hot", "Coroutines that take turns at one key, also beside a process that wants it all the time",
    rows)
end

-- What the defaults of handovers and handover_time are chosen by.
local function measure_handovers(bench, runtime, section)
  local counts = bench.short and { 1, 32 } or HANDOVERS
  local times = bench.short and { 0.005 } or HANDOVER_TIMES
  local rows, list = { { "handovers" } }, {}
  for _, count in ipairs(counts) do
    for _, time in ipairs(times) do
      list[#list + 1] = owners(runtime, ("locker owners=50 keys=1 handovers=%d handover_time=%g%s"):format(count, time,
        section and (" section=%g"):format(section) or ""))
    end
  end
  local measured = measure_contended(bench, list, bench.short and "run 100" or "run 250", bench.rounds(5))
  for place, count in ipairs(counts) do
    local row = { whole(count) }
    for column, time in ipairs(times) do
      rows[1][column + 1] = ("%g ms"):format(time * 1000)
      local of = measured[list[(place - 1) * #times + column].name]
      row[column + 1] = ("%s, %s"):format(whole(median(of.beside)), milliseconds(median(of.longest)))
    end
    rows[#rows + 1] = row
  end
  bench.report(("locker-handovers-%s-%g"):format(runtime:match "%S+", section or 0),
    ("%s, by handovers and handover_time, 50 owners%s: pairs/s beside another process, p99 of its wait in ms")
      :format(runtime, section and (" that sleep %g ms"):format(section * 1000) or ""), rows)
end

-- ---- nobody else ------------------------------------------------------------------------

local function measure_alone(bench)
  local rows = { { "", "connection: pairs/s", "locker", "ratio", "min..max", "beside 100 locks: connection", "locker",
    "ratio", "min..max" } }
  each_kind(bench, function(runtime, loop)
    local row = { runtime .. ", " .. loop }
    for _, held in ipairs { 0, 100 } do
      local settings = (" loop=%s held=%d"):format(loop, held)
      local crew = start(bench, { owners(runtime, "connections" .. settings), owners(runtime, "locker" .. settings) },
        "same")
      local measured = workers.measure(crew, "run 25", bench.rounds(40))
      workers.stop(crew)
      local base, own = measured[crew[1].name].rate, measured[crew[2].name].rate
      local ratio, spread = numbers.ratio(own, base)
      table.move({ whole(median(base)), whole(median(own)), ("%.2f"):format(ratio), spread }, 1, 4, #row + 1, row)
    end
    rows[#rows + 1] = row
  end)
  bench.report("locker-alone", "One coroutine with a free key, on one CPU with the server", rows)
end

return function(bench)
  bench.found.locker = {}
  bench.with_server_on(1, function()
    measure_holding(bench)
    measure_spread(bench)
    measure_hot(bench)
    for _, runtime in ipairs(candidates.runtimes) do measure_handovers(bench, runtime) end
    measure_handovers(bench, "LuaJIT", 0.001)
  end)
  bench.with_server_on(0, function() measure_alone(bench) end)
end
