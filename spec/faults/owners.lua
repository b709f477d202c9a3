-- A process of spec/faults/stress_spec.lua, as spec/faults/worker.lua, but with many owners: one locker
-- after the other, whose locks many coroutines take.
--   owners.lua PROCESS FOLDER ROUNDS SECONDS SEED
-- Each lock is an owner "pidPID.PROCESS.LOCKER.xN" of the history, which is known by name when it is
-- granted; what was not granted belongs to the owner "PROCESS.LOCKER", as does what is left at the end.

local cqueues = require "cqueues"
local uv = require "luv"
local pglocks = require "pglocks"
local support = require "spec.support"
local history = require "spec.faults.history"
local protected = require "spec.faults.protected"

local core = support.core
local random = math.random

local process, folder, rounds, deadline, seed = ...
rounds, deadline = tonumber(rounds), tonumber(deadline)
math.randomseed(tonumber(seed))

local KEYS = { -205618829, { 7, -42 }, "some lock" }
local PLACE = { folder = folder, process = process }
local PATIENCE = 5 * support.slow -- beyond a timeout
local CAN_CLOSE = rawget(coroutine, "close") ~= nil

local write = history.writer(folder .. "/history." .. process)
local lockers, sections = 0, 0

local function is_over() return sections >= rounds or sections >= 20 and core.now() > deadline end

local STOP = setmetatable({}, { __tostring = function() return "an error inside, on purpose" end })

local function code_of(err) return type(err) == "table" and err.code end

-- What a cancel hits is asked again.
local function persist(fn, ...)
  while true do
    local ok, result = pcall(fn, ...)
    if ok then return result end
    if code_of(result) ~= "interrupted" then error(result, 0) end
  end
end

-- What nobody expected.
local function traced(err) return debug.traceback(tostring(err), 2) end

-- ---- loops ------------------------------------------------------------------------------

-- Where coroutines can be closed while they wait, `spawn` returns them.
local loops = {}

function loops.cqueues(main)
  local loop, failure = cqueues.new(), nil
  local function spawn(fn)
    loop:wrap(function()
      local ok, err = xpcall(fn, traced)
      if not ok then failure = failure or { err } end
    end)
  end
  spawn(function() main(spawn, cqueues.sleep) end)
  while not loop:empty() and not failure do assert(loop:step()) end
  if failure then error(failure[1], 0) end
end

function loops.luv(main)
  local failure
  local function spawn(fn)
    local co = coroutine.create(function()
      local ok, err = xpcall(fn, traced)
      if not ok then failure = failure or { err } end
    end)
    assert(coroutine.resume(co))
    return CAN_CLOSE and co or nil
  end
  local sleep = require "pglocks.scheduler.luv".sleep
  spawn(function() main(spawn, sleep) end)
  while not failure and uv.run "once" do end
  if failure then error(failure[1], 0) end
end

-- ---- what a locker has ------------------------------------------------------------------

local Session = {} -- of one locker
Session.__index = Session

function Session:note_at(seconds, ...) write(seconds, self.name, ...) end

-- What was granted and not let go, on a connection of the locker, by key and mode. lingers: until it is
-- collected.
function Session:count(section, n, lingers)
  local on = self.held[section.pid] or {}
  local what = history.name(section.shared, section.key)
  self.held[section.pid] = on
  on[what] = (on[what] or 0) + n
  if lingers then self.asked[what] = (self.asked[what] or 0) + 1 end
end

-- on_lost: exactly once of a connection, with the locks that are held on it. Those that were granted to a
-- coroutine which has yet to go on, or are changing their mode, only the locker knows of.
function Session:lost(err, locks)
  self.losses = self.losses + 1
  local told = {}
  for _, lock in ipairs(locks) do told[history.name(lock.mode == "shared", lock.key)] = lock.count end
  local function explains(on)
    for what, n in pairs(on) do
      if n > 0 and not self.changing[what] and (told[what] or 0) < n then return false end
    end
    for what, n in pairs(told) do
      if n > (on[what] or 0) + (self.asked[what] or 0) and not self.changing[what] then return false end
    end
    return true
  end
  if explains {} then return end -- none of those that are known
  for pid, on in pairs(self.held) do
    if not self.over[pid] and explains(on) then
      local known = false
      for section in pairs(self.open) do
        if section.pid == pid then
          known = true
          if core.lock.held(section.lock) then error("on_lost was told of a lock that is held", 0) end
        end
      end
      if known then
        self.over[pid] = true
        return
      end
    end
  end
  local said = {}
  for what, n in pairs(told) do said[#said + 1] = what .. " * " .. n end
  self.wrong = self.wrong or ("on_lost (%s) was told of what no connection held: %s"):format(tostring(err),
    table.concat(said, ", "))
end

-- ---- rounds -----------------------------------------------------------------------------

-- Each coroutine has the sections it is in, for who closes it.
local function begin(session, me, lock, asked, key, shared)
  session.owners = session.owners + 1
  local pid = core.connection_of(lock).backend_pid
  local section = {
    pid = pid, owner = ("pid%d.%s.x%d"):format(pid, session.name, session.owners), n = 1, lock = lock, key = key,
    name = history.key(key), shared = shared, mode = shared and "shared" or "exclusive",
  }
  -- Another thread of time than that of the file: whatever a strike hits, it was there before.
  write(asked, section.owner, "open", pid)
  write(asked, section.owner, "invoke", 1, section.name, section.mode)
  write(nil, section.owner, "grant", 1, section.name, section.mode)
  me[#me + 1] = section
  session.open[section] = true
  session:count(section, 1)
  return section
end

local function note(section, event, ...)
  write(nil, section.owner, event, section.n, section.name, ...)
end

local function leave(session, section, how)
  if not session.open[section] then return end
  session.open[section] = nil
  -- (In another mode than it was asked for it is held until its release, which may be told of the loss.)
  session:count(section, -1, how == "dropped" or section.n > 1)
  if how == "lost" then
    write(nil, section.owner, "lost")
  else
    if not section.between then note(section, "release", section.mode) end
    write(nil, section.owner, "close")
  end
end

local function work(session, section)
  protected.work(PLACE, session.sleep, function(...) write(nil, section.owner, ...) end, section.owner,
    section.n, section.name, section.shared)
end

local function check(section)
  local asked = core.now()
  assert(persist(section.lock.check, section.lock) == true)
  write(asked, section.owner, "confirm", section.n, section.name, section.mode)
end

-- (Two who both want more than they have are a deadlock to the server.)
local UNCHANGED = { interrupted = true, deadlock = true }

-- Another mode is another section of the same owner. Who becomes alone has shared until then; who will
-- share is alone no longer as soon as he asks.
local function change(session, section)
  local names = { history.name(true, section.key), history.name(false, section.key) }
  for _, name in ipairs(names) do session.changing[name] = (session.changing[name] or 0) + 1 end
  local is_upgrade, before = section.shared, core.now()
  if not is_upgrade then note(section, "release", section.mode) end
  section.between = not is_upgrade
  local ok, got = pcall(section.lock[is_upgrade and "upgrade" or "downgrade"], section.lock)
  for _, name in ipairs(names) do
    session.changing[name] = session.changing[name] > 1 and session.changing[name] - 1 or nil
  end
  if not ok and not UNCHANGED[code_of(got)] then error(got, 0) end
  if is_upgrade and not (ok and got) then return end
  session:count(section, -1)
  local last, last_mode = section.n, section.mode
  section.shared, section.n = section.lock.shared, last + 1
  section.mode = section.shared and "shared" or "exclusive"
  session:count(section, 1)
  local at = section.shared and before or core.now()
  write(at, section.owner, "invoke", section.n, section.name, section.mode)
  write(at, section.owner, "grant", section.n, section.name, section.mode)
  if is_upgrade then write(at, section.owner, "release", last, section.name, last_mode) end
  section.between = false
  work(session, section)
end

local function timeout(depth)
  local kind = random(10)
  if kind == 1 then return 0 end
  if kind < 6 or depth > 0 then return random(1, 30) / 1000 end
  if kind < 8 then return random(1, 10) / 10 end
  if kind == 8 then return 20 * support.slow end
end

local NOT_GRANTED = { busy = true, timeout = true, interrupted = true, deadlock = true, lost = true }

local function round(session, me, depth)
  local key, shared = KEYS[random(#KEYS)], random(3) == 1
  local form, options = protected.FORMS[random(#protected.FORMS)], { shared = shared, timeout = timeout(depth) }
  local asked, section = core.now(), nil
  local what = history.name(shared, key)
  sections = sections + 1

  local function in_time()
    local took, limit = core.now() - asked, (options.timeout or 30) + PATIENCE
    if took > limit then error(("%s took %.3f s, not %.3f"):format(form, took, limit), 0) end
  end

  local function inside(lock)
    section = begin(session, me, lock, asked, key, shared)
    in_time()
    work(session, section)
    if depth < 2 and random(5) == 1 then round(session, me, depth + 1) end
    if random(5) == 1 then change(session, section) end
    if random(8) == 1 then session.sleep(random() * 0.02) end
    if random(2) == 1 then check(section) end
    leave(session, section)
    if form ~= "lock" and form ~= "try_lock" and random(16) == 1 then error(STOP, 0) end
  end

  session.asked[what] = (session.asked[what] or 0) + 1
  local from
  local ok, outcome = xpcall(protected.forms[form], function(err)
    from = debug.traceback(tostring(err), 2)
    return err
  end, session.locker, key, options, inside)
  session.asked[what] = session.asked[what] - 1
  local code = ok and outcome or code_of(outcome)
  if section then
    table.remove(me)
    if not ok and outcome ~= STOP then
      if code ~= "lost" then error(from, 0) end
      os.remove(protected.mark(PLACE, section.owner, section.n, section.name))
      leave(session, section, "lost")
    end
  elseif NOT_GRANTED[code] or code == "connect" then
    in_time()
    session.failed = session.failed + 1
    local mode = shared and "shared" or "exclusive"
    session:note_at(asked, "invoke", session.failed, history.key(key), mode)
    session:note_at(nil, "fail", session.failed, history.key(key), mode, code == "connect" and "lost" or code)
  else
    error(from or outcome, 0)
  end
end

-- A coroutine that keeps nothing of its lock: what collects it releases it.
local function drop(session, me)
  local asked = core.now()
  local key = KEYS[random(#KEYS)]
  local what = history.name(false, key)
  session.asked[what] = (session.asked[what] or 0) + 1
  local ok, lock = pcall(session.locker.try_lock, session.locker, key)
  session.asked[what] = session.asked[what] - 1
  if not ok and not NOT_GRANTED[code_of(lock)] and code_of(lock) ~= "connect" then error(lock, 0) end
  if not ok or not lock then return end
  local section = begin(session, me, lock, asked, key, false)
  work(session, section)
  leave(session, section, "dropped")
  table.remove(me)
end

-- Closes a coroutine wherever it is; what it was in is over before.
local function close(session, me)
  for i = #me, 1, -1 do
    os.remove(protected.mark(PLACE, me[i].owner, me[i].n, me[i].name))
    leave(session, me[i], "dropped")
  end
  session.living[me] = nil
  local ok, err = coroutine.close(me.co)
  if not ok then error(err, 0) end
  session.closed = session.closed + 1
end

-- ---- lockers ----------------------------------------------------------------------------

local function one_of(...) return (select(random(select("#", ...)), ...)) end

local function new_session(loop)
  lockers = lockers + 1
  local session = setmetatable({
    name = process .. "." .. lockers, owners = 0, failed = 0, losses = 0, closed = 0,
    held = {}, over = {}, open = {}, asked = {}, changing = {}, living = {},
  }, Session)
  session.locker = pglocks.locker {
    conninfo = support.conninfo, application_name = "stress " .. session.name, scheduler = loop,
    max_connections = one_of(2, 3, 5), locks_per_connection = one_of(1, 2, 100),
    handovers = one_of(0, 1, 3, 32), handover_time = one_of(0, 0.002, 0.005, 0.05),
    release = one_of("deferred", "confirmed"), reply_timeout = 10 * support.slow,
    on_lost = function(_, err, locks) session:lost(err, locks) end,
  }
  session:note_at(nil, "open", 0)
  return session
end

local function live(session, me)
  while not session.ends do
    if random(20) == 1 then drop(session, me) else round(session, me, 0) end
    if random(3) == 1 then session.sleep(random() * 0.01) end
  end
  session.living[me] = nil
end

local function begin_coroutine(session)
  local me = {}
  session.living[me] = true
  me.co = session.spawn(function() live(session, me) end)
end

local function on_server(session)
  return support.observe([[SELECT pid, granted FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND application_name = $1]], "stress " .. session.name)
end

-- What is left is looked at until it is gone, or for too long.
local function look_back(session)
  local patience = core.now() + PATIENCE
  local client, server
  repeat
    collectgarbage()
    session.sleep(0.005)
    client, server = history.on_client(session.locker), #on_server(session) == 0 and "nothing" or "something"
  until client == server or core.now() > patience
  session:note_at(nil, "seen", client, "|", server)
end

local function run(session, spawn, sleep)
  session.spawn, session.sleep = spawn, sleep
  local until_when = core.now() + 0.3 + random() * 1.2
  for _ = 1, random(2, 30) do begin_coroutine(session) end
  while core.now() < until_when and not is_over() do
    sleep(random() * 0.02)
    local list = {}
    for me in pairs(session.living) do list[#list + 1] = me end
    local me = list[random(#list)]
    if me and me.co and random(2) == 1 then
      close(session, me)
      begin_coroutine(session)
    end
    if session.wrong then error(session.wrong, 0) end
  end
  session.ends = true
  local patience = core.now() + 30 + 2 * PATIENCE
  while next(session.living) do
    if core.now() > patience then error("a coroutine is stuck", 0) end
    sleep(0.002)
  end
  look_back(session)
  if session.wrong then error(session.wrong, 0) end
  session:note_at(nil, "close")
  session.locker:close()
end

local ok, err = xpcall(function()
  repeat
    local loop = one_of("cqueues", "luv")
    local session = new_session(loop)
    loops[loop](function(...) run(session, ...) end)
  until is_over()
end, traced)
if not ok then
  write(nil, process .. "." .. lockers, "error", (tostring(err):gsub("%s+", " ")))
  print(err)
  os.exit(1)
end
