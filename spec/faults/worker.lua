-- A process of spec/faults/stress_spec.lua: sessions one after the other, each with a number of
-- rounds. It writes what it does to a history of its own, for spec/faults/model.lua.
--   worker.lua PROCESS FOLDER ROUNDS SECONDS SEED
-- It ends after these rounds, or some, when the clock of core.now() says SECONDS.
-- What is protected, for each key: FOLDER/counter.KEY, "COUNT SECTION", and FOLDER/inside.KEY, a
-- folder with a file for each section that is inside. Neither has any protection but the locks.

local cqueues = require "cqueues"
local pglocks = require "pglocks"
local support = require "spec.support"
local history = require "spec.faults.history"
local protected = require "spec.faults.protected"

local core = support.core
local random = math.random

local process, folder, rounds, deadline, seed = ...
rounds, deadline = tonumber(rounds), tonumber(deadline)
math.randomseed(tonumber(seed))

local forms, FORMS = protected.forms, protected.FORMS
local KEYS = { -205618829, { 7, -42 }, "some lock" }

local write = history.writer(folder .. "/history." .. process)
local owner -- the session that is open: "PROCESS.1", "PROCESS.2", ...
local sessions, sections = 0, 0

local function note_at(seconds, ...) write(seconds, owner, ...) end
local function note(...) write(nil, owner, ...) end

local function is_over() return sections >= rounds or sections >= 4 and core.now() > deadline end

-- ---- errors -----------------------------------------------------------------------------

local STOP = setmetatable({}, { __tostring = function() return "an error inside, on purpose" end })

local function is_interrupt(err)
  return type(err) == "string" and err:find("interrupted!", 1, true) ~= nil
end

local function code_of(err) return type(err) == "table" and err.code end

-- What a cancel hits is asked again.
local function persist(fn, ...)
  while true do
    local ok, result = pcall(fn, ...)
    if ok then return result end
    if code_of(result) ~= "interrupted" then error(result, 0) end
  end
end

-- ---- rounds -----------------------------------------------------------------------------

-- What the connection says, and what the server says. Releases that nobody waited for may be under
-- way: the server is given time for them, and no time for anything else.
local function look(session)
  local conn, client, server, ok = session.conn
  local patience = core.now() + 5 * support.slow
  repeat
    if session.patient then persist(conn.ping, conn) end
    client = history.on_client(conn)
    ok, server = pcall(history.on_server, conn.backend_pid)
    if not ok then -- only a server that goes down does that: ours is one of its sessions
      if is_interrupt(server) then error(server, 0) end
      support.wait_until("the loss of the session", function() return not conn:alive() end)
    end
    -- The end of a session is sent to its client before its locks are freed for others: whoever
    -- sees them gone, and hears of no end, has found a lie.
    if not conn:alive() then persist(conn.ping, conn) end
  until client == server or not session.patient or core.now() > patience
  session.patient = session.deferred
  note("seen", client, "|", server)
end

local function timeout(depth)
  local kind = random(8)
  if kind == 1 then return 0 end
  if kind < 6 or depth > 0 then return random(1, 30) / 1000 end
  if kind == 6 then return 20 * support.slow end
end

local FAILURES = { timeout = true, interrupted = true, deadlock = true }

local function round(session, depth)
  local conn, key, shared = session.conn, KEYS[random(#KEYS)], random(3) == 1
  local form, options = FORMS[random(#FORMS)], { shared = shared, timeout = timeout(depth) }
  local name, mode = history.key(key), shared and "shared" or "exclusive"
  sections = sections + 1
  local n, granted = sections, false

  local function inside(lock)
    note("grant", n, name, mode)
    granted = true
    protected.work({ folder = folder, process = process }, session.sleep, note, owner, n, name, shared)
    -- A lock inside another one: of the same owner, to be counted, or of another key.
    if depth < 2 and random(6) == 1 then round(session, depth + 1) end
    if random(8) == 1 then look(session) end
    if random(4) == 1 then
      local asked = core.now()
      assert(persist(lock.check, lock) == true)
      note_at(asked, "confirm", n, name, mode)
    end
    note("release", n, name, mode)
    if form ~= "lock" and form ~= "try_lock" and random(16) == 1 then error(STOP, 0) end
  end

  note("invoke", n, name, mode)
  local ok, outcome = pcall(forms[form], conn, key, options, inside)
  if ok and granted then
    assert(outcome == true)
    if form == "scope" then -- its end tells nobody, and with a scheduler it does not even wait
      session.patient = session.patient or session.scheduled
    elseif depth == 0 and (not session.deferred or random(2) == 1) then
      -- (A lock inside another one may only be counted: that proves nothing.)
      if session.deferred then persist(conn.ping, conn) end
      if not session.told[1] then note("free", n, name, mode) end
    end
  elseif ok then
    note("fail", n, name, mode, outcome)
  elseif outcome == STOP and granted then
    session.patient = session.patient or session.scheduled
  elseif not granted and FAILURES[code_of(outcome)] then
    note("fail", n, name, mode, outcome.code)
  else
    error(outcome, 0)
  end
end

-- ---- sessions ---------------------------------------------------------------------------

-- Somebody strikes while we connect, or the server is down.
local RETRY = { connect = true, interrupted = true, lost = true }

local function connect(session)
  local patience = core.now() + 60 * support.slow
  while true do
    sessions = sessions + 1
    owner = process .. "." .. sessions
    local began, told = core.now(), {}
    local ok, conn = pcall(pglocks.connect, {
      conninfo = support.conninfo,
      application_name = "stress " .. owner,
      release = session.deferred and "deferred" or "confirmed",
      scheduler = session.scheduled and "cqueues" or "blocking",
      reply_timeout = 10 * support.slow,
      on_lost = function(_, err) told[#told + 1] = err end,
    })
    if ok then
      note_at(began, "open", conn.backend_pid) -- struck since, it may be lost
      return conn, told
    end
    if not RETRY[code_of(conn)] or core.now() > patience then error(conn, 0) end
    session.sleep(0.05)
  end
end

local function run(session)
  local conn, told = connect(session)
  session.told = told -- by on_lost
  session.conn = conn

  local ok, err = pcall(function()
    persist(conn.query, conn, "SET deadlock_timeout = '15ms'")
    for _ = 1, random(10, 60) do
      if is_over() then break end
      round(session, 0)
      if random(6) == 1 then look(session) end
      if told[1] then error(told[1], 0) end
    end
    look(session)
  end)
  session.conn = nil
  if not ok then
    if code_of(err) ~= "lost" then error(err, 0) end
    assert(not conn:alive() and #conn:locks() == 0, "lost, but alive")
    assert(#told == 1, "on_lost was called " .. #told .. " times")
    note "lost"
    conn:close()
  else
    pcall(conn.close, conn) -- it may be struck now: that it left nothing behind is known
    note "close"
  end
end

local current

local function main()
  while not is_over() do
    local session = { deferred = random(2) == 1, scheduled = random(3) == 1 }
    session.patient = session.deferred
    session.sleep = session.scheduled and cqueues.sleep or support.sleep
    current = session
    if session.scheduled then
      local loop, over, ok, err = cqueues.new(), false, nil, nil
      loop:wrap(function()
        ok, err = pcall(run, session)
        over = true
      end)
      loop:wrap(function()
        while not over do
          cqueues.sleep(random() * 0.02)
          if session.conn then session.conn:cancel() end
        end
      end)
      -- On LuaJIT Ctrl-C may surface within a coroutine, and then as any failure of the loop. The
      -- model sees to it that nothing else passes for Ctrl-C.
      local looped, why = loop:loop()
      if not looped then error("interrupted! " .. tostring(why), 0) end
      if not ok then error(err, 0) end
    else
      run(session)
    end
  end
end

-- Where Ctrl-C struck is not known, but that the connection and the server agree.
local function after_interrupt(session)
  local conn = session and session.conn
  if not conn then return end
  note "interrupted"
  if session.scheduled then return end -- nobody drives it on; the end of this process ends it
  session.patient = true
  local ok, err = pcall(look, session)
  if not ok then
    if code_of(err) ~= "lost" then error(err, 0) end
    note "lost"
  else
    note "close"
  end
  conn:close()
end

local function traced(err)
  return (type(err) == "table" or is_interrupt(err)) and err or debug.traceback(tostring(err), 2)
end

local ok, err = xpcall(main, traced)
if not ok and is_interrupt(err) then ok, err = xpcall(after_interrupt, traced, current) end
if not ok then
  note("error", (tostring(err):gsub("%s+", " ")))
  os.exit(1)
end
