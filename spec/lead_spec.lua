-- pglocks.lead: one process, or coroutine, leads; a lost term ends, and the candidate stands again.

local loops = require "spec.loops"
local pglocks = require "pglocks"
local server = require "spec.faults.server"
local support = require "spec.support"

local core = support.core
local pg_locks, raised, wait_until = support.pg_locks, support.raised, support.wait_until

local NAME = "candidate of the specs" -- by which its sessions are found

-- Of a candidate that tries often, on the specs' server.
local function options(more)
  local all = { database = { conninfo = support.conninfo, application_name = NAME }, interval = 0.01 }
  for option, value in pairs(more or {}) do all[option] = value end
  return all
end

local function database(more)
  local described = { conninfo = support.conninfo, application_name = NAME }
  for option, value in pairs(more) do described[option] = value end
  return described
end

local function sessions()
  return support.observe("SELECT pid, query FROM pg_stat_activity WHERE application_name = $1", NAME)
end

local function terminate()
  assert(#support.observe([[SELECT pg_terminate_backend(pid) FROM pg_stat_activity a
    WHERE application_name = $1 AND EXISTS (SELECT 1 FROM pg_locks l WHERE l.pid = a.pid AND locktype = 'advisory')]],
    NAME) == 1)
end

-- Ends the leader's session, and returns when that is known.
local function depose(term)
  terminate()
  wait_until("the loss", function() return not term:is_leader() end)
end

local function finish()
  pglocks.setup {}
  server.finish()
  support.finish()
  wait_until("the candidates' sessions to end", function() return #sessions() == 0 end)
end

-- ---- a plain program --------------------------------------------------------------------

describe("a leader", function()
  after_each(finish)

  it("returns what its function returned, and has let go then", function()
    local function lead(term, ...)
      assert.is_true(term:is_leader())
      assert.is_true(term:check())
      assert.equal(1, term.number)
      assert.equal(1, #pg_locks())
      assert.equal(pglocks.key("x").objid, pg_locks()[1].objid)
      return term, nil, ...
    end
    local term, none, a, b, c = pglocks.lead("x", options(), lead, 1, nil, 3)
    assert.same({}, pg_locks())
    assert.same({ nil, 1, nil, 3 }, { none, a, b, c })
    assert.is_false(term:is_leader())
    assert.is_false(term:sleep(60))
    assert.same({ false }, { term:check() })
  end)

  it("takes the lock's options, and its function without any", function()
    pglocks.setup { databases = { default = support.conninfo, other = database {} } }
    pglocks.lead("some lock", { hash = "django-pglocks", interval = 0.5 }, function()
      assert.equal(1, pg_locks()[1].objsubid)
      assert.equal(pglocks.key(-205618829).objid, pg_locks()[1].objid)
    end)
    assert.equal(7, pglocks.lead("x", function() return #sessions() == 0 and 7 end))
    assert.equal(1, pglocks.lead({ 7, 42 }, { using = "other" }, function() return #sessions() end))
    assert.is_nil(pglocks.lead("x", setmetatable({}, { __call = function() end })))
  end)

  it("is another one when it was killed", function()
    local CANDIDATE = [[
      local pglocks = require "pglocks"
      io.stdout:setvbuf "no"
      local conninfo, name = ...
      pglocks.lead("x", { database = { conninfo = conninfo, application_name = name }, interval = 0.1 },
        function(term)
          print(require "pglocks.core".now())
          repeat until not term:sleep(60)
        end)
    ]]
    local first = support.spawn(CANDIDATE, support.conninfo, "the first")
    assert(tonumber(first.lines()))
    local second = support.spawn(CANDIDATE, support.conninfo, NAME)
    wait_until("the second one's try", function()
      local session = sessions()[1]
      return session and session.query:find "pg_try_advisory_lock"
    end)
    assert.equal(1, #pg_locks())
    local killed = core.now()
    support.signal("KILL", first.pid)
    local led = tonumber(second.lines())
    assert.is_true(led > killed)
    assert.is_true(led < killed + 5 * support.slow)
    support.signal("KILL", second.pid)
    first.close()
    second.close()
  end)

  it("is told of its loss in its next call, and stands again with a higher number", function()
    local told, numbers = {}, {}
    local result = pglocks.lead("x", options {
      on_elected = function(term) numbers[#numbers + 1] = term.number end,
      on_lost = function(term, err) told[#told + 1] = { term.number, err.code, err.sqlstate, term:is_leader() } end,
    }, function(term)
      if term.number == 3 then return "done" end
      if term.number == 1 then depose(term) else terminate() assert.is_false(term:sleep(60)) end
      assert.equal(term.number, #told)
      assert.is_false((term:check()))
      return "not done"
    end)
    assert.equal("done", result)
    assert.same({ 1, 2, 3 }, numbers)
    assert.same({ { 1, "lost", "57P01", false }, { 2, "lost", "57P01", false } }, told)
  end)

  it("asks the server with check(), which returns a loss", function()
    local function lead(term)
      if term.number > 1 then return "again" end
      assert.is_true(term:check(5))
      assert.is_truthy(raised(function() term:check(-1) end):find "bad argument #1 to 'check' ")
      assert.is_true(term:is_leader())
      support.observe("SELECT pg_terminate_backend($1)", pg_locks()[1].pid)
      wait_until("the end", function() return #pg_locks() == 0 end)
      local leads, err = term:check()
      assert.is_false(leads)
      assert.equal("lost", err.code)
      assert.equal(err, select(2, term:check()))
    end
    assert.equal("again", pglocks.lead("x", options(), lead))
  end)

  it("has not led when its session was gone at the end", function()
    local told = 0
    local result = pglocks.lead("x", options { on_lost = function() told = told + 1 end }, function(term)
      if term.number == 1 then
        terminate()
        wait_until("the end", function() return #pg_locks() == 0 end)
      end
      return term.number
    end)
    assert.equal(2, result)
    assert.equal(1, told)
  end)

  it("does not call the function when on_elected took too long", function()
    local called = {}
    pglocks.lead("x", options { on_elected = function(term) if term.number == 1 then depose(term) end end },
      function(term) called[#called + 1] = term.number end)
    assert.same({ 2 }, called)
  end)

  it("waits without a place in the server's queue, and without a word in its log", function()
    local held = support.connect():lock "x"
    local log = support.log()
    if not log then return pending "the server's log cannot be read" end
    local tries, looks = 0, 0
    local holder_gone
    pglocks.lead("x", options {
      stop = function()
        looks = looks + 1
        if sessions()[1] and not holder_gone then
          if sessions()[1].query:find "pg_try_advisory_lock" then tries = tries + 1 end
          assert.equal(1, #pg_locks())
          if tries == 5 then holder_gone = held:release() end
        end
      end,
    }, function() end)
    assert.is_true(holder_gone)
    assert.equal("", log())
  end)

  it("waits in the server's queue with a timeout", function()
    local held = support.connect():lock "x"
    local child = support.spawn([[
      local pglocks = require "pglocks"
      io.stdout:setvbuf "no"
      print(pglocks.lead("x", { database = { conninfo = ..., application_name = "queued" }, interval = 60,
        timeout = 60 }, function() return "has led" end))
    ]], support.conninfo)
    wait_until("it to wait", function()
      return #support.observe "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted" == 1
    end)
    held:release()
    assert.is_true(support.timed(function() assert.equal("has led", child.lines()) end) < 5 * support.slow)
    child.close()
  end)

  it("queues again at once when a try has timed out", function()
    local held, looks = support.connect():lock "x", 0
    local function stop()
      looks = looks + 1
      if looks == 3 then held:release() end
    end
    assert.is_true(support.timed(pglocks.lead, "x", options { interval = 60, timeout = 0.01, stop = stop },
      function() end) < 5 * support.slow)
  end)

  it("calls the description's own on_lost, too", function()
    local told = {}
    pglocks.setup { databases = { default = database {
      pool_size = 3, on_lost = function(conn, err, locks) told[#told + 1] = { conn:alive(), err.code, #locks } end,
    } } }
    pglocks.lead("x", function(term) if term.number == 1 then depose(term) end end)
    assert.same({ { false, "lost", 1 } }, told)
  end)

  it("leaves no session and no lock to the collector", function()
    collectgarbage "stop"
    finally(function() collectgarbage "restart" end)
    pglocks.lead("x", options(), function() end)
    pcall(pglocks.lead, "x", options(), error)
    wait_until("the sessions to end", function() return #sessions() == 0 end)
  end)

  -- ---- the end ----------------------------------------------------------------------------

  it("is stopped while it waits", function()
    local held, looks = support.connect():lock "x", 0
    local function stop()
      looks = looks + 1
      return looks == 10 -- only once
    end
    assert.same({ nil, "stopped" }, { pglocks.lead("x", options { stop = stop }, error) })
    assert.same({ nil, "stopped" }, { pglocks.lead("x", options { stop = function() return true end }, error) })
    assert.is_true(held:check())
  end)

  it("is stopped while it waits for the next try", function()
    local held = support.connect():lock "x"
    local began = core.now()
    local function stop() return core.now() > began + 0.2 end
    assert.same({ nil, "stopped" }, { pglocks.lead("x", options { interval = 1000, stop = stop }, error) })
    assert.is_true(held:release())
  end)

  it("is stopped while it leads", function()
    local stops, number = false, nil
    assert.equal("stopped", pglocks.lead("x", options { stop = function() return stops end }, function(term)
      assert.is_true(term:sleep(0))
      assert.is_true(term:sleep(0.15))
      stops = true
      assert.is_false(term:is_leader())
      assert.is_false(term:sleep(60))
      assert.is_true(term:check()) -- it has the lock still
      stops = false
      assert.is_false(term:is_leader()) -- once is for good
      return "stopped"
    end))
    stops = false
    assert.same({ nil, "stopped" }, { pglocks.lead("x", options { stop = function() return stops end }, function(term)
      number = term.number
      stops = true
      depose(term)
      return "lost"
    end) })
    assert.equal(1, number)
  end)

  it("is woken from its sleep when it is stopped", function()
    local began = core.now()
    local seconds = support.timed(pglocks.lead, "x", options { stop = function() return core.now() > began + 0.2 end },
      function(term) assert.is_false(term:sleep(60)) end)
    assert.is_true(seconds < 2 * support.slow, seconds)
  end)

  it("is ended by Ctrl-C, as every program", function()
    local held = support.connect():lock "x"
    local child = support.spawn([[
      local pglocks = require "pglocks"
      io.stdout:setvbuf "no"
      print(pcall(pglocks.lead, "x", { database = { conninfo = ..., application_name = "waits" } }, print))
    ]], support.conninfo)
    wait_until("its try", function()
      return #support.observe [[SELECT 1 FROM pg_stat_activity
        WHERE application_name = 'waits' AND query LIKE '%pg_try_advisory_lock%']] == 1
    end)
    support.signal("INT", child.pid)
    assert.is_truthy(child.lines():find "^false\t.*interrupted!$")
    child.close()
    held:release()
  end)

  -- ---- errors -----------------------------------------------------------------------------

  it("lets go when its function raises, and the error goes on as it is", function()
    local thrown, told = {}, 0
    local callbacks = { on_lost = function() told = told + 1 end }
    assert.equal(thrown, raised(pglocks.lead, "x", options(callbacks), function() error(thrown) end))
    assert.same({}, pg_locks())
    assert.equal(0, told)
    assert.equal(thrown, raised(pglocks.lead, "x", options(callbacks), function()
      terminate()
      wait_until("the end", function() return #pg_locks() == 0 end)
      error(thrown)
    end))
    assert.equal(1, told)
    if not support.is_jit then
      local function deep_inside() error "broken" end
      local _, traceback = xpcall(pglocks.lead, debug.traceback, "x", options(), function() deep_inside() end)
      assert.is_truthy(traceback:find "deep_inside")
    end
  end)

  it("lets go when on_elected raises, and never calls the function", function()
    local thrown, called = {}, false
    assert.equal(thrown, raised(pglocks.lead, "x", options { on_elected = function() error(thrown) end },
      function() called = true end))
    assert.same({}, pg_locks())
    assert.is_false(called)
  end)

  it("goes on when on_lost raises, and raises that when its function has ended", function()
    local thrown, ended = {}, 0
    local callbacks = { on_lost = function() error(thrown) end }
    assert.equal(thrown, raised(pglocks.lead, "x", options(callbacks), function(term)
      depose(term)
      ended = ended + 1
    end))
    assert.equal(1, ended)
    assert.equal("first", raised(pglocks.lead, "x", options(callbacks), function(term)
      depose(term)
      error("first", 0)
    end))
  end)

  it("raises what stop and on_retry raise", function()
    local thrown = {}
    local function throw() error(thrown) end
    assert.equal(thrown, raised(pglocks.lead, "x", options { stop = throw }, print))
    local held = support.connect():lock "x"
    assert.equal(thrown, raised(pglocks.lead, "x",
      options { stop = function() if #sessions() > 0 then throw() end end }, print))
    assert.equal(thrown, raised(pglocks.lead, "x",
      options { database = { host = "/nowhere", timeout = 0.01 }, on_retry = throw }, print))
    held:release()
  end)

  it("raises at once what only a person can mend", function()
    local function no_retry(err) error("tries again after " .. tostring(err)) end
    for sqlstate, described in pairs {
      ["3D000"] = { dbname = "no such database" }, ["28000"] = { user = "no such role" },
    } do
      local err = raised(pglocks.lead, "x", options { database = database(described), on_retry = no_retry }, print)
      assert.equal(sqlstate, err.sqlstate, tostring(err))
    end
    support.assert_code("server", pglocks.lead, "x", options { database = database { scheduler = {
      sleep = error, now = core.now, token = error, park = error, wake = error,
      wait = function() core.raise("server", "nothing can wait here") end,
    } }, on_retry = no_retry }, print)
  end)

  it("tries again what an administrator has interrupted or ended while it waits", function()
    local held = support.connect():lock "x"
    local retried, asked = {}, 0
    pglocks.lead("x", options {
      on_retry = function(err, seconds)
        retried[#retried + 1] = err.code
        assert.is_true(seconds > 0)
        if #retried == 2 then held:release() end
      end,
      stop = function()
        local session = sessions()[1]
        if session and asked == #retried and asked < 2 then
          asked = asked + 1
          support.observe("SELECT pg_terminate_backend($1)", session.pid)
          wait_until("its end", function() return #sessions() == 0 end)
        end
        return false
      end,
    }, function(term) assert.equal(1, term.number) end)
    assert.same({ "lost", "lost" }, retried)
  end)

  it("raises argument errors before it connects", function()
    local function fails(what, key, described, fn)
      described.database = described.database or { host = "/nowhere" }
      local err = raised(function() pglocks.lead(key, described, fn) end)
      assert.is_truthy(err:find("lead_spec.lua:%d+: bad argument #%d to 'lead' "), err)
      assert.is_truthy(err:find(what, 1, true), err)
    end
    fails("#1 to 'lead' (integer, pair of integers or string", true, {}, print)
    fails("#2 to 'lead' (unknown option 'timeuot'", "x", { timeuot = 1 }, print)
    fails("option 'shared': leaders exclude each other", "x", { shared = true }, print)
    fails("option 'slots': leaders exclude each other", "x", { slots = 2 }, print)
    fails("option 'timeout'", "x", { timeout = "soon" }, print)
    fails("hash", "x", { hash = "md5" }, print)
    for _, interval in ipairs { 0, -1, 0 / 0, math.huge, "1" } do
      fails("option 'interval' must be seconds, more than 0", "x", { interval = interval }, print)
    end
    for _, option in ipairs { "on_elected", "on_lost", "on_retry", "stop" } do
      fails(("option '%s' must be a function"):format(option), "x", { [option] = true }, print)
    end
    fails("option 'database': unknown key 'nonsense'", "x", { database = { nonsense = true } }, print)
    fails("option 'database': option 'pool_size'", "x", { database = { pool_size = 3 } }, print)
    fails("option 'database' or 'using' expected, got both", "x", { using = "default" }, print)
    fails("#3 to 'lead' (function expected, got nil)", "x", {}, nil)
    for wrong, what in pairs { [5] = "must be the name of a database", nowhere = "unknown database 'nowhere'" } do
      local err = raised(function() pglocks.lead("x", { using = wrong }, print) end)
      assert.is_truthy(err:find(what, 1, true), err)
    end
    local err = raised(function() pglocks.lead("x", 5, print) end)
    assert.is_truthy(err:find("#2 to 'lead' (table of options or function expected, got number)", 1, true), err)
    pglocks.lead("x", options(), function(term)
      for _, seconds in ipairs { -1, 0 / 0, "1" } do
        err = raised(function() term:sleep(seconds) end)
        assert.is_truthy(err:find("bad argument #1 to 'sleep' (seconds", 1, true), err)
      end
    end)
  end)

  -- ---- servers ----------------------------------------------------------------------------

  it("stands again when its server has been restarted", function()
    if server.cannot_make then return pending(server.cannot_make) end
    local own, told, retried = server.make(), {}, {}
    local result = pglocks.lead("x", {
      database = { conninfo = own.conninfo, timeout = 0.2 },
      on_lost = function(term, err) told[#told + 1] = { term.number, err.sqlstate } end,
      on_retry = function(err)
        retried[#retried + 1] = err.code
        if #retried == 2 then own:start() end
      end,
    }, function(term)
      if term.number == 1 then
        own:stop()
        assert.is_false(term:sleep(60))
      end
      return term.number
    end)
    assert.equal(2, result)
    assert.same({ { 1, "57P01" } }, told)
    assert.same({ "connect", "connect" }, retried)
  end)

  it("stands again when its session has gone without a word", function()
    if server.cannot_make then return pending(server.cannot_make) end
    local own, retried, killed = server.make(), {}, false
    local holder = pglocks.connect(own.conninfo)
    holder:lock "x" -- until the server restarts, because one of its processes was killed
    pglocks.lead("x", {
      database = { conninfo = own.conninfo, application_name = NAME },
      on_retry = function(err) retried[#retried + 1] = err.code .. (err.sqlstate or "") end,
      stop = function()
        if killed then return false end
        local session = own:query("SELECT pid FROM pg_stat_activity WHERE application_name = $1", NAME)[1]
        killed = session ~= nil
        if killed then support.signal("KILL", session.pid) end
        return false
      end,
    }, function(term) assert.equal(1, term.number) end)
    assert.equal("lost", retried[1])
    holder:close()
  end)

  it("waits for a standby's promotion", function()
    if server.cannot_make then return pending(server.cannot_make) end
    local primary = server.make()
    local standby, retried = primary:standby(), {}
    assert.equal("led", pglocks.lead("x", {
      database = standby.conninfo,
      on_retry = function(err)
        retried[#retried + 1] = err.code
        standby:promote()
      end,
    }, function() return "led" end))
    assert.same({ "standby" }, retried)
  end)
end)

-- ---- pauses -----------------------------------------------------------------------------

describe("the pause of a candidate", function()
  after_each(finish)

  -- A scheduler in whose sleep no time passes but on its own clock.
  local clock, slept, longest
  local scheduler = {}
  for name, fn in pairs(loops.own.scheduler) do scheduler[name] = fn end
  function scheduler.now() return clock end
  function scheduler.sleep(seconds)
    clock, slept, longest = clock + seconds, slept + seconds, math.max(longest, seconds)
  end
  scheduler.spawn = nil
  before_each(function() clock, slept, longest = 1000, 0, 0 end)

  local function assert_within(pause, nominal)
    assert.is_true(pause >= nominal / 2 - 1e-6 and pause <= nominal + 1e-6, pause .. " of " .. nominal)
  end

  it("doubles from 0.1 s up to 10 s, and differs", function()
    local pauses, before = {}, 0
    pglocks.lead("x", {
      database = { host = "/nowhere", timeout = 0.01, scheduler = scheduler },
      on_retry = function(err, seconds)
        assert.equal("connect", err.code)
        if pauses[1] then assert.is_true(math.abs(slept - before - pauses[#pauses]) < 1e-6) end
        before = slept
        pauses[#pauses + 1] = seconds
      end,
      stop = function() return #pauses == 12 and slept - before > 1 end,
    }, error)
    assert.is_true(slept - before < 1.2) -- of the last one
    local shares = {}
    for i, pause in ipairs(pauses) do
      local nominal = math.min(0.1 * 2 ^ (i - 1), 10)
      assert_within(pause, nominal)
      shares[i] = pause / nominal
    end
    table.sort(shares)
    assert.is_true(shares[#shares] - shares[1] > 0.01)
    assert.is_true(longest <= 0.1 + 1e-6) -- it looks at `stop` in between
  end)

  it("begins anew after a term that lasted", function()
    local pauses, before = {}, 0
    pglocks.lead("x", options { database = database { scheduler = scheduler } }, function(term)
      pauses[term.number] = slept - before
      if term.number == 6 then return end
      if term.number == 4 then clock = clock + 10 end
      depose(term)
      before = slept
    end)
    for i, nominal in ipairs { 0, 0.1, 0.2, 0.4, 0.1, 0.2 } do assert_within(pauses[i], nominal) end
  end)

  it("from one try to the next is at most the interval", function()
    local holder = support.connect()
    local held, looks = holder:lock "x", 0
    local pauses, before, query_start = {}, 0, nil
    pglocks.lead("x", options {
      interval = 7, database = database { scheduler = scheduler },
      stop = function()
        looks = looks + 1
        local row = support.observe([[SELECT query_start::text AS at FROM pg_stat_activity
          WHERE application_name = $1 AND query LIKE '%pg_try_advisory_lock%']], NAME)[1]
        if row and row.at ~= query_start then
          if query_start then pauses[#pauses + 1] = slept - before end
          query_start, before = row.at, slept
        end
        return #pauses == 3
      end,
    }, error)
    for _, pause in ipairs(pauses) do assert_within(pause, 7) end
    held:release()
  end)
end)

-- ---- event loops ------------------------------------------------------------------------

local function under(name, loop)
  local function in_loop(more)
    return options { database = database { scheduler = loop.scheduler }, on_elected = more and more.on_elected,
      on_lost = more and more.on_lost, stop = more and more.stop, interval = more and more.interval or 0.01 }
  end

  local function wait_in(what, condition) support.wait_in(loop, what, condition) end

  local function test(title, body)
    it(title, function() loop.run(body) end)
  end

  describe("a leader under " .. name, function()
    after_each(finish)

    test("is one coroutine at a time", function()
      local leading, most, led, ticks = 0, 0, 0, 0
      for _ = 1, 3 do
        loop.spawn(function()
          assert.equal("led", pglocks.lead("x", in_loop(), function(term)
            leading = leading + 1
            most = math.max(most, leading)
            assert.is_true(term:sleep(0.15))
            leading = leading - 1
            return "led"
          end))
          led = led + 1
        end)
      end
      wait_in("all of them", function() ticks = ticks + 1 return led == 3 end)
      assert.equal(1, most)
      assert.is_true(ticks > 10)
    end)

    test("hears of its loss without a call, and stands again", function()
      local told = {}
      assert.equal(2, pglocks.lead("x", in_loop {
        on_lost = function(term, err) told[#told + 1] = { term.number, err.code, err.sqlstate, term:is_leader() } end,
      }, function(term)
        if term.number == 1 then
          terminate()
          -- A scheduler of the user's that cannot begin coroutines has nobody watch.
          wait_in("on_lost", function()
            if name == "own" then term:is_leader() end
            return #told > 0
          end)
        end
        return term.number
      end))
      assert.same({ { 1, "lost", "57P01", false } }, told)
    end)

    test("is stopped by another coroutine, while it waits and while it leads", function()
      local stops, leads, results = false, false, {}
      local function stop() return stops end
      for i = 1, 2 do
        loop.spawn(function()
          results[i] = { pglocks.lead("x", in_loop { stop = stop, interval = 1000 }, function(term)
            leads = true
            repeat until not term:sleep(1000)
            return "led"
          end) }
        end)
      end
      wait_in("a leader and a candidate", function()
        local tried = 0
        for _, session in ipairs(sessions()) do
          if session.query:find "pg_try_advisory_lock" then tried = tried + 1 end
        end
        return tried == 2 and leads
      end)
      stops = true
      wait_in("their ends", function() return results[1] and results[2] end)
      if results[1][1] == nil then results[1], results[2] = results[2], results[1] end
      assert.same({ { "led" }, { nil, "stopped" } }, results)
    end)

    test("lets go when its function raises", function()
      local thrown = {}
      assert.equal(thrown, raised(pglocks.lead, "x", in_loop(), function() error(thrown) end))
      wait_in("the lock to be free", function() return #pg_locks() == 0 end)
    end)

    test("lets go after a check that another coroutine is in", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local checked, asks
      assert.equal("done", pglocks.lead("x", in_loop(), function(term)
        local pid = pg_locks()[1].pid
        support.signal("STOP", pid) -- no answer comes before its time
        loop.spawn(function()
          asks = true
          checked = term:check()
        end)
        loop.spawn(function()
          loop.sleep(0.1) -- the function has returned, and its release is refused until the answer
          support.signal("CONT", pid)
        end)
        wait_in("the question", function() return asks end)
        return "done"
      end))
      wait_in("the answer", function() return checked end)
      assert.same({}, pg_locks())
    end)

    test("on a connection of setup's scheduler", function()
      pglocks.setup { databases = { default = database { pool_size = 1 } }, scheduler = loop.scheduler }
      local other
      assert.equal("led", pglocks.lead("x", function(term)
        loop.spawn(function() other = term:is_leader() end)
        assert.is_true(term:sleep(0.05))
        return "led"
      end))
      wait_in("the other", function() return other ~= nil end)
      assert.is_true(other)
    end)
  end)
end

for name, loop in pairs(loops) do under(name, loop) end

if coroutine.close then
  describe("a leader's coroutine that is closed", function()
    after_each(finish)

    it("lets go", function()
      loops.own.run(function()
        local leads
        local co = loops.own.spawn(function()
          pglocks.lead("x", options { database = database { scheduler = loops.own.scheduler } }, function(term)
            leads = true
            repeat until not term:sleep(1000)
          end)
        end)()
        while not leads do loops.own.sleep(0.005) end
        loops.own.forget(co)
        coroutine.close(co)
        while #pg_locks() > 0 do loops.own.sleep(0.005) end
      end)
    end)
  end)
end
