--- Many keys at once, and a pair beside many keys that are held.

local candidates = require "bench.candidates"
local numbers = require "bench.numbers"
local workers = require "bench.workers"

local OWNERS = { "C", table.unpack(candidates.runtimes) }
local SIZES = { { 1, 40 }, { 100, 40 }, { 1000, 12 }, { 5000, 4 } } -- and rounds
local HELD = { 0, 100, 1000 }

local function crew_of(bench, owners, variants)
  local list = {}
  for _, owner in ipairs(owners) do
    for _, variant in ipairs(variants) do list[#list + 1] = candidates.of(owner .. " " .. variant) end
  end
  local crew, missing = workers.start(list, bench.conninfo)
  bench.place(crew, "same")
  return crew, missing
end

local function milliseconds(rates) return ("%.3g"):format(1000 / numbers.median(rates)) end

local function ratio(own, base) return ("%.2f"):format((numbers.ratio(own, base))) end

local function compare_sets(bench)
  local rows = { { "", "keys", "one by one, ms", "speed to C", "at once, ms", "speed to C",
    "to one by one" } }
  local missing
  bench.found.scale = {}
  for _, settings in ipairs(SIZES) do
    local size, rounds = table.unpack(settings)
    local each, all = "each:" .. size, "all:" .. size
    local crew, left_out = crew_of(bench, OWNERS, { each, all })
    missing = left_out
    -- A chunk is many sets of few keys, or few of many; at once, of some 25 ms.
    local measured = workers.measure(crew, function(worker)
      return ("count %d"):format(math.max(1, (worker.name:find(all, 1, true) and 25000 or 500) // size))
    end, bench.rounds(rounds))
    workers.stop(crew)
    bench.found.scale[size] = {}
    for _, owner in ipairs(OWNERS) do
      local single, whole = measured[owner .. " " .. each].rate, measured[owner .. " " .. all]
      local row = { owner, numbers.whole(size), milliseconds(single),
        ratio(single, measured["C " .. each].rate) }
      if whole then
        bench.found.scale[size][owner] = numbers.ratio(whole.rate, single)
        row[5], row[6] = milliseconds(whole.rate), ratio(whole.rate, measured["C " .. all].rate)
        row[7] = ratio(whole.rate, single)
      end
      rows[#rows + 1] = row
    end
  end
  bench.report("scale", "Many keys: locked and released one by one, or all at once", rows)
  for _, line in ipairs(missing) do print("  left out: " .. line) end
end

local function compare_held(bench)
  local variants, rows = {}, { { "" } }
  for place, held in ipairs(HELD) do
    variants[place] = "held:" .. held
    table.move({ held .. " held: pairs/s", "to none" }, 1, 2, #rows[1] + 1, rows[1])
  end
  local crew = crew_of(bench, OWNERS, variants)
  local measured = workers.measure(crew, "run 25", bench.rounds(30))
  workers.stop(crew)
  for _, owner in ipairs(OWNERS) do
    local row = { owner }
    for _, variant in ipairs(variants) do
      local rates = measured[owner .. " " .. variant].rate
      row[#row + 1] = numbers.whole(numbers.median(rates))
      row[#row + 1] = ratio(rates, measured[owner .. " " .. variants[1]].rate)
    end
    rows[#rows + 1] = row
  end
  bench.report("held", "Pairs beside locks that are held on the same connection", rows)
end

return function(bench)
  compare_sets(bench)
  compare_held(bench)
end
