-- Proof of mutual exclusion: processes that contend for a few locks, while others strike them. What
-- must hold, spec/faults/model.lua says; what each process does, spec/faults/worker.lua and, with
-- many owners in a process, spec/faults/owners.lua.
--
-- `make stress ROUNDS=10000` is the long form. There the server itself is struck down too. A
-- failure prints the seed, the lines of the histories that do not go together and what happened
-- around them, and says where the histories are.

local lfs = require "lfs"
local uv = require "luv"
local support = require "spec.support"
local history = require "spec.faults.history"
local model = require "spec.faults.model"

local core, random = support.core, math.random
local KEYS = { -205618829, { 7, -42 }, "some lock" } -- of worker.lua and owners.lua

local LONG = tonumber(os.getenv "PGLOCKS_STRESS_ROUNDS")
local is_costly = support.slow >= 10 -- under valgrind, where a process takes seconds to start
local ROUNDS = LONG or math.max(60, math.floor(600 * support.size))
local is_old = tonumber(support.observe("SHOW server_version_num")[1].server_version_num) < 140000
local PROCESSES = is_costly and 4 or 16
-- Then no new session begins: on a busy machine the short form does fewer rounds.
local SECONDS = LONG and 540 or math.min(7 * support.slow, 30)

-- ---- the processes ----------------------------------------------------------------------

local Stress = {}
Stress.__index = Stress

local function new_stress(seed)
  local self = setmetatable({ folder = os.tmpname(), seed = seed, processes = {}, graves = {} }, Stress)
  os.remove(self.folder)
  assert(lfs.mkdir(self.folder))
  for _, key in ipairs(KEYS) do
    local name = history.key(key)
    assert(lfs.mkdir(self.folder .. "/inside." .. name))
    local file = assert(io.open(self.folder .. "/counter." .. name, "w"))
    file:write "0 nobody"
    file:close()
  end
  local write = history.writer(self.folder .. "/history")
  function self.note(...) write(nil, "-", ...) end
  return self
end

--- Starts the next process of a slot, which lives for what rounds the slot has left.
function Stress:start(slot)
  slot.started = slot.started + 1
  local p = { name = slot.number .. "." .. slot.started, slot = slot }
  local output = assert(uv.fs_open(self.folder .. "/output." .. p.name, "w", 384))
  p.handle, p.pid = assert(uv.spawn("sh", {
    args = { "-c", "exec " .. (os.getenv "PGLOCKS_TEST_LUA" or "lua") .. ' "$@"', "sh",
      slot.worker, p.name, self.folder, tostring(slot.left),
      tostring(self.deadline), tostring(random(2 ^ 30)) },
    stdio = { 0, output, output },
  }, function(status, signal)
    p.handle:close()
    p.status, p.signal = status, signal
  end))
  uv.fs_close(output)
  self.processes[p.name] = p
end

-- Its rounds count, and the next one of its slot begins.
function Stress:bury(p)
  self.processes[p.name] = nil
  local output = support.read(self.folder .. "/output." .. p.name)
  local is_expected = p.status == 0 and p.signal == 0 or p.struck and
    (p.signal == 9 or p.signal == 2 or p.status == 1 and output:find("interrupted!", 1, true))
  if not is_expected then
    error(("process %s ended with status %d, signal %d:\n%s"):format(p.name, p.status, p.signal, output), 0)
  end
  if p.struck then
    for _, key in ipairs(KEYS) do -- what it could not remove
      local set = self.folder .. "/inside." .. history.key(key)
      for name in lfs.dir(set) do
        if name:gsub("^pid%d+%.", ""):sub(1, #p.name + 1) == p.name .. "." then os.remove(set .. "/" .. name) end
      end
    end
    self.graves[p.name] = core.now() + 12 * support.slow
  end
  local file = io.open(self.folder .. "/history." .. p.name) -- none if it was killed very early
  local _, rounds = (file and file:read "*a" or ""):gsub(" invoke ", "")
  if file then file:close() end
  p.slot.left = p.slot.left - rounds
  if p.slot.left > 0 and core.now() < self.deadline then self:start(p.slot) end
end

--- Sessions of processes that were killed must be gone, with their locks, a few seconds after: one
--- that waits for a lock looks every 5 s whether its client is still there.
function Stress:visit_graves()
  if core.now() < (self.visited or 0) + 0.2 then return end
  self.visited = core.now()
  local rows = support.observe [[SELECT DISTINCT application_name AS session FROM pg_locks
    JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND application_name LIKE 'stress %']]
  local haunted = {}
  for _, row in ipairs(rows) do
    haunted[row.session:match "^stress (%d+%.%d+)"] = row.session
  end
  for name, deadline in pairs(self.graves) do
    if not haunted[name] then
      self.graves[name] = nil
    elseif core.now() > deadline then
      error(("%s has ended, and still has locks, or waits for them"):format(haunted[name]), 0)
    end
  end
end

--- The connections of a locker hold keys or wait for one: what held would keep its keys until the wait is over.
--- (Who changes its mode waits for a moment.)
local HOLDS_AND_WAITS = [[SELECT a.application_name AS session FROM pg_locks w JOIN pg_stat_activity a USING (pid)
  WHERE w.locktype = 'advisory' AND NOT w.granted AND clock_timestamp() > w.waitstart + $1 * interval '1 s'
    AND EXISTS (SELECT 1 FROM pg_locks h WHERE h.pid = w.pid AND h.locktype = 'advisory' AND h.granted)]]

function Stress:look_at_lockers()
  if is_old then return end
  for _, row in ipairs(support.observe(HOLDS_AND_WAITS, 0.02 * support.slow)) do
    local p = self.processes[row.session:match "^stress (%d+%.%d+)"]
    if p and p.slot.shares then
      error(("a connection of %s holds locks, and waits for another:\n%s"):format(p.name, history.on_server(nil)), 0)
    end
  end
end

-- ---- strikes ----------------------------------------------------------------------------

local function later(seconds, fn)
  local timer = uv.new_timer()
  timer:start(math.floor(seconds * 1000 * support.slow), 0, function()
    timer:close()
    fn()
  end)
end

local function signal(p, name)
  if not p.status then p.handle:kill(name) end
end

-- A process that stops inside does not notice that its session ends meanwhile.
local function pause(p)
  signal(p, "sigstop")
  later(random(1, 30) / 1000, function() signal(p, "sigcont") end)
end

local strikes = {}

-- A volley hits statements that are over at once, too: releases, and the guard itself.
function strikes.cancel(self, _, row)
  self.note("strike", "nobody", "cancel")
  support.observe([[SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity, generate_series(1, $3::int)
    WHERE pid = $1 AND application_name = $2]], row.pid, row.session, random(2) == 1 and 1 or random(2, 300))
end

function strikes.terminate(self, p, row)
  if random(2) == 1 then pause(p) end
  self.note("strike", p.slot.shares and "pid" .. row.pid or row.session:match "%S+$", "terminate")
  support.observe([[SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE pid = $1 AND application_name = $2]], row.pid, row.session)
end

function strikes.kill(self, p)
  p.struck = true
  self.note("strike", p.name, "kill")
  signal(p, "sigkill")
end

function strikes.interrupt(self, p)
  if p.slot.shares then return strikes.kill(self, p) end -- which coroutine it met nobody would know
  if p.struck then return end -- the interpreter lets a second one kill it
  p.struck = true
  self.note("strike", p.name, "interrupt")
  signal(p, "sigint")
end

function strikes.pause(self, p)
  self.note("strike", "nobody", "pause")
  pause(p)
end

-- The kill -9 of one backend: the server ends all sessions, and begins again.
local function crash(self, backend_pid)
  local witness = support.connect()
  self.note("strike", "*", "crash")
  if uv.kill(backend_pid, "sigkill") then -- if it has not ended meanwhile
    support.wait_until("the end of the sessions", function() return not witness:alive() end)
    -- A new session, as one that is there already may not have ended yet.
    support.wait_until("the server", function() return (pcall(support.connect)) end, 60)
  end
  self.note "recovered"
end

local DECK = { "cancel", "cancel", "cancel", "cancel", "cancel", "cancel", "terminate", "terminate",
  "terminate", "terminate", "pause", "pause", "kill", "kill", "interrupt" }

-- Dealt, so that a short run has some of each.
function Stress:deal()
  local cards = self.cards
  if not cards or #cards == 0 then
    cards = { (table.unpack or unpack)(DECK) }
    self.cards = cards
  end
  return table.remove(cards, random(#cards))
end

function Stress:strike()
  local rows = support.observe [[SELECT pid, application_name AS session FROM pg_stat_activity
    WHERE application_name LIKE 'stress %']]
  if #rows == 0 then return end
  local row = rows[random(#rows)]
  if self.next_crash and core.now() > self.next_crash then
    crash(self, row.pid)
    self.next_crash = core.now() + 20
    return
  end
  local p = self.processes[row.session:match "^stress (%d+%.%d+)"]
  if p then strikes[self:deal()](self, p, row) end
end

-- ---- a run ------------------------------------------------------------------------------

--- workers: for each process, its program.
function Stress:run(workers, rounds)
  self.deadline = core.now() + SECONDS
  for number, worker in ipairs(workers) do
    self:start { number = number, started = 0, left = math.ceil(rounds / #workers),
      worker = "spec/faults/" .. worker .. ".lua", shares = worker == "owners" }
  end
  if LONG and not support.cannot_signal then self.next_crash = core.now() + 10 end
  while next(self.processes) or next(self.graves) do
    if core.now() > self.deadline + 30 * support.slow then
      error("not done in time; who holds and waits:\n" .. history.on_server(nil), 0)
    end
    self:strike()
    self:look_at_lockers()
    for _ = 1, random(5) do
      support.sleep(random() * 0.012 * support.slow)
      uv.run "nowait"
      for _, p in pairs(self.processes) do
        if p.status then self:bury(p) break end
      end
    end
    if next(self.graves) then self:visit_graves() end
  end
  for _, key in ipairs(KEYS) do
    local name = history.key(key)
    self.note("counter", name, support.read(self.folder .. "/counter." .. name))
  end
end

-- What the model says of all histories.
function Stress:check()
  local events = {}
  for name in lfs.dir(self.folder) do
    if name:find "^history" then
      local ok, why = model.parse(support.read(self.folder .. "/" .. name), events, true)
      if not ok then error(name .. ": " .. why, 0) end
    end
  end
  local counts, why, at = model.check(events)
  if counts then return counts end
  local said = { why, "What happened around it:" }
  for i, e in ipairs(events) do
    if e == at then
      for j = math.max(1, i - 40), math.min(#events, i + 10) do said[#said + 1] = "  " .. events[j].line end
    end
  end
  error(table.concat(said, "\n"), 0)
end

-- Whatever the outcome, no process stays behind.
function Stress:stop()
  for _, p in pairs(self.processes) do
    if not p.status then strikes.kill(self, p) end
  end
  support.wait_until("the end of all processes", function()
    uv.run "nowait"
    for _, p in pairs(self.processes) do
      if not p.status then return false end
    end
    return true
  end)
end

describe("mutual exclusion", function()
  after_each(support.finish)

  local function prove(workers, rounds, must_happen)
    local seed = tonumber(os.getenv "PGLOCKS_STRESS_SEED") or os.time()
    math.randomseed(seed)
    local since = support.log()
    local stress = new_stress(seed)
    local ran, err = pcall(stress.run, stress, workers, rounds)
    stress:stop()
    local agreed, counts = pcall(stress.check, stress)
    if not (ran and agreed) then
      error(("seed %d, histories in %s\n%s\n%s"):format(seed, stress.folder, ran and "" or tostring(err),
        agreed and "" or tostring(counts)), 0)
    end
    support.shell("rm -rf " .. stress.folder)
    local names, said = {}, {}
    for name in pairs(counts) do names[#names + 1] = name end
    table.sort(names)
    for i, name in ipairs(names) do said[i] = ("%s %d"):format(name, counts[name]) end
    print("  " .. table.concat(said, ", "))
    if since then assert.is_nil(since():find("you don't own", 1, true)) end
    assert.is_true((counts.grants or 0) > 0)
    if not LONG then return end
    assert.is_true(counts.rounds >= rounds, "not all rounds were done in time")
    for _, what in ipairs(must_happen) do
      assert.is_true((counts[what] or 0) > 0, "there was no: " .. what)
    end
  end

  it(("of %d processes that others strike, in %d rounds"):format(PROCESSES, ROUNDS), function()
    local workers = {}
    for i = 1, PROCESSES do workers[i] = "worker" end
    prove(workers, ROUNDS, { "timeout", "interrupted", "cancel", "terminate", "lost", "kill", "interrupt" })
  end)

  it("of many owners in a process, on few connections, beside processes with one of their own", function()
    local workers = { "owners", "owners", "worker", "owners", "worker" }
    prove(workers, LONG or math.floor(2000 * support.size),
      { "timeout", "deadlock", "cancel", "terminate", "lost", "kill" })
  end)
end)
