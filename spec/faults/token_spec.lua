-- Proof that the fencing tokens of a key grow along its holds, whoever has them, and across crashes of
-- the server. Processes hand keys over, and write what they get to one history, for `check` below.
--
-- `make stress` is the long form. A failure says where the history is.

local server = require "spec.faults.server"
local support = require "spec.support"

local unpack = table.unpack or unpack
local random = math.random

local LONG = tonumber(os.getenv "PGLOCKS_STRESS_ROUNDS")
local PROCESSES = 8 -- every fourth with a locker and its owners
local HAND_OVERS = LONG or math.max(500, math.floor(2000 * support.size))
local CRASHES = LONG and 60 or math.max(3, math.floor(15 * math.min(1, support.size)))
local PATIENCE = LONG and 400 or 100 -- seconds

-- The role has its commits not wait for the disk, and what is not waited for is written late: tokens
-- that were drawn so would be lost in a crash, and be drawn again.
local CONF = [[
fsync = on
synchronous_commit = off
wal_writer_delay = 10s
]]

-- ---- a process --------------------------------------------------------------------------

-- It is one owner on a connection, or several on a locker. Its holds are numbered. Each event is in the
-- history when write(2) has returned:
--   asked HOLD             before the call
--   got HOLD KEY TOKEN     while it holds the key; one for each key and token
--   kept HOLD              its release was confirmed, so that it held until then
--   lost HOLD              its session is lost
local WORKER = [[
  local conninfo, path, name, seed, owners = ...
  local pglocks = require "pglocks"
  local random = math.random
  math.randomseed(tonumber(seed))
  owners = tonumber(owners)
  local KEYS = { -205618829, { 7, -42 } }
  local file = assert(io.open(path, "a"))
  file:setvbuf "no"
  local holds = 0

  local function note(...) assert(file:write(table.concat({ ... }, " ") .. "\n")) end

  local function note_got(hold, key, lock)
    note("got", hold, (tostring(key):gsub(" ", "")), tostring(lock.token))
  end

  local function connect()
    return pglocks.connect { conninfo = conninfo, application_name = "token", timeout = 60 }
  end

  local function take(conn, key)
    local form = random(8)
    if form == 1 then return conn:lock_all(KEYS, { token = true }) end
    if form == 2 then return conn:try_lock(key, { token = true }) end
    if form == 3 then return conn:try_lock(key, { token = true, timeout = random(1, 20) / 1000 }) end
    if form == 4 then return conn:try_lock(key, { token = true, strategy = "poll", timeout = 0.5 }) end
    return conn:lock(key, { token = true })
  end

  local function round(conn, hold)
    local lock = take(conn, KEYS[random(8) == 1 and 2 or 1])
    if not lock then return end
    for _, key in ipairs(lock.keys) do note_got(hold, key, lock) end
    if owners == 1 and random(8) == 1 then
      local again = conn:lock(lock.keys[1], { token = true })
      note_got(hold, again.key, again)
      again:release()
    end
    lock:release()
    note("kept", hold)
  end

  local function live(conn, sleep)
    while not io.open(path .. ".start") do sleep(0.001) end
    while not io.open(path .. ".stop") do
      holds = holds + 1
      local hold = name .. "." .. holds
      note("asked", hold)
      local ok, err = pcall(round, conn, hold)
      local code = ok or type(err) == "table" and err.code
      if code == "lost" then
        note("lost", hold)
        if owners == 1 then conn = connect() end
      elseif not ok and not (code == "connect" and owners > 1) then -- a locker connects within a call
        error(tostring(err), 0)
      end
    end
    return conn
  end

  if owners > 1 then
    local cqueues = require "cqueues"
    local loop, left = cqueues.new(), owners
    local locker = pglocks.locker { conninfo = conninfo, application_name = "token", timeout = 60,
      scheduler = "cqueues", release = "confirmed" }
    loop:wrap(function()
      locker:lock "first":release() -- so that it has a connection
      for _ = 1, owners do
        loop:wrap(function()
          live(locker, cqueues.sleep)
          left = left - 1
          if left == 0 then locker:close() end
        end)
      end
    end)
    local ok, err = loop:loop()
    if not ok then error(tostring(err), 0) end
  else
    live(connect(), require "pglocks.core".sleep):close()
  end
  print "done"
]]

-- ---- what must hold ---------------------------------------------------------------------

-- A hold that was kept is alone from its "got" to its end: the tokens of these grow in the order of
-- the history. One that was lost may have ended before it wrote what it got, so that a later one came
-- first: its token is greater than those of all holds that were over when it was asked for, and the
-- tokens of all that are asked for when it is over are greater than its own.
-- Returns how many tokens there were, how often a key went from one process to another, and how often a
-- session was lost; or nil and what is wrong.
local function check(history)
  local kept, seen, holds = {}, {}, {}
  local highest, over = {}, {} -- tokens by key: of the last that was kept, of all that are over
  local holder, counts = {}, { hand_overs = 0, tokens = 0, losses = 0 }
  for id in history:gmatch "kept (%S+)" do kept[id] = true end
  for line in history:gmatch "[^\n]+" do
    local event, id, key, token = line:match "^(%a+) (%S+) ?(%S*) ?(%d*)$"
    local wrong
    if event == "asked" then
      holds[id] = { floor = {}, tokens = {} }
      for each, highest_over in pairs(over) do holds[id].floor[each] = highest_over end
    elseif event == "got" then
      local hold, n = holds[id], tonumber(token)
      hold.tokens[#hold.tokens + 1] = { key, n }
      counts.tokens = counts.tokens + 1
      wrong = seen[key .. n] and "again"
        or n <= (hold.floor[key] or 0) and "not above one that was over"
        or kept[id] and n <= (highest[key] or 0) and "not above that of the hold before"
      seen[key .. n] = true
      if kept[id] then
        local process = id:match "^[^.]*"
        if holder[key] and holder[key] ~= process then counts.hand_overs = counts.hand_overs + 1 end
        holder[key], highest[key] = process, n
      end
    elseif event == "kept" or event == "lost" then
      if event == "lost" then counts.losses = counts.losses + 1 end
      for _, got in ipairs(holds[id].tokens) do over[got[1]] = math.max(over[got[1]] or 0, got[2]) end
    else
      wrong = "no event"
    end
    if wrong then return nil, ("%s: %s"):format(line, wrong) end
  end
  return counts
end

describe("a history of tokens", function()
  local function history(...) return (table.concat({ ... }, "\n") .. "\n") end

  it("is accepted where they grow by key", function()
    assert.same({ hand_overs = 1, tokens = 3, losses = 0 }, check(history("asked a", "asked b", "got a k 7",
      "asked c", "got c other 5", "kept c", "kept a", "got b k 8", "kept b")))
  end)

  it("is accepted where one that was lost wrote late", function()
    assert.same({ hand_overs = 0, tokens = 2, losses = 1 }, check(history("asked a", "asked b", "got b k 8",
      "kept b", "got a k 7", "lost a")))
  end)

  for what, lines in pairs {
    ["where one comes twice"] = { "asked a", "asked b", "got a k 7", "got b k 7", "lost a", "lost b" },
    ["where they fall"] = { "asked a", "asked b", "got a k 7", "kept a", "got b k 6", "kept b" },
    ["where they fall while one is held again"] = { "asked a", "got a k 7", "got a k 6", "kept a" },
    ["where they fall after one was lost"] = { "asked a", "got a k 7", "lost a", "asked b", "got b k 6", "kept b" },
    ["where they fall to one that was lost"] = { "asked a", "got a k 7", "kept a", "asked b", "got b k 6", "lost b" },
    ["of something else"] = { "asked a", "gott a k 7" },
  } do
    it("is refused " .. what, function() assert.is_nil((check(history(unpack(lines))))) end)
  end
end)

-- ---- runs -------------------------------------------------------------------------------

describe("fencing tokens", function()
  local own, path, processes

  before_each(function()
    if server.cannot_make then return end
    own = server.make(CONF)
    path, processes = os.tmpname(), {}
  end)
  after_each(function()
    for _, process in ipairs(processes or {}) do
      support.shell(("kill -9 %d 2>/dev/null"):format(process.pid))
      process.close()
    end
    support.finish()
    server.finish()
    for _, suffix in ipairs { "", ".start", ".stop" } do os.remove((path or "") .. suffix) end
  end)

  local function sessions()
    local ok, rows = pcall(own.query, own, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'token'")
    return ok and #rows or 0 -- it may be crashing still
  end

  local function signal(what) assert(io.open(path .. "." .. what, "w")):close() end

  -- None begins before all are there.
  local function start()
    local seed = os.time()
    math.randomseed(seed)
    for i = 1, PROCESSES do
      processes[i] = support.spawn(WORKER, own.conninfo, path, tostring(i), ("%d"):format(seed + i),
        i % 4 == 0 and "4" or "1")
    end
    support.wait_until("all processes", function() return sessions() == PROCESSES end)
    signal "start"
  end

  local function join()
    signal "stop"
    local said = {}
    for i, process in ipairs(processes) do
      said[i] = table.concat({ process.lines() }, "\n")
      for line in process.lines do said[i] = said[i] .. "\n" .. line end
      process.close()
    end
    local count = #processes
    processes = {}
    for i = 1, count do assert.equal("done", said[i]) end
  end

  local function verdict()
    local counts, why = check(support.read(path))
    if not counts then
      os.execute(("cp %s %s.failed"):format(path, path))
      error(("history in %s.failed: %s"):format(path, why), 0)
    end
    return counts
  end

  local function it_with_servers(name, fn)
    it(name, server.cannot_make and function() pending(server.cannot_make) end or fn)
  end

  it_with_servers(("grow over %d hand-overs by %d processes"):format(HAND_OVERS, PROCESSES), function()
    start()
    support.wait_until("enough of them", function()
      support.sleep(0.3)
      return verdict().hand_overs >= HAND_OVERS
    end, PATIENCE)
    join()
    local counts = verdict()
    print(("  %d hand-overs, %d tokens"):format(counts.hand_overs, counts.tokens))
    assert.equal(0, counts.losses)
  end)

  -- How much of the history there is, in bytes.
  local function written()
    local file = io.open(path)
    if not file then return 0 end
    local size = file:seek "end"
    file:close()
    return size
  end

  local function wait_for_more(bytes)
    support.wait_until("half of the processes", function() return sessions() >= PROCESSES / 2 end, 30)
    local before = written()
    support.wait_until("more holds", function() return written() >= before + bytes end, 30)
  end

  -- One of the postmaster's children, mostly a session of ours: the server ends all, and begins again.
  local function crash()
    local witness = support.connect { conninfo = own.conninfo }
    local rows = witness:query [[SELECT pid FROM pg_stat_activity
      WHERE application_name = 'token' OR backend_type IN ('checkpointer', 'walwriter') ORDER BY random()]]
    support.signal("KILL", rows[1].pid)
    support.wait_until("the end of the sessions", function() return not witness:alive() end)
    witness:close()
  end

  it_with_servers(("grow across %d crashes of the server"):format(CRASHES), function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    start()
    for _ = 1, CRASHES do
      wait_for_more(2000 + random(4000))
      crash()
    end
    wait_for_more(2000)
    join()
    local counts = verdict()
    print(("  %d tokens, %d sessions lost"):format(counts.tokens, counts.losses))
    assert.is_true(counts.losses >= CRASHES * PROCESSES / 2, counts.losses)
  end)
end)
