-- The end of a session, from one backend to the whole server, in each phase of a connection.

local pglocks = require "pglocks"
local phases = require "spec.faults.phases"
local server = require "spec.faults.server"
local support = require "spec.support"

-- A connection that writes down what it is told.
local function listening(options)
  local told = {}
  options = options or {}
  function options.on_lost(_, err, locks) told[#told + 1] = { err, locks } end
  return support.connect(options), told
end

local function is_lost(conn, lock, told, sqlstates)
  support.wait_until("the loss", function() return not lock:held() end)
  assert.is_false(conn:alive())
  assert.equal(1, #told)
  assert.equal("lost", told[1][1].code)
  assert.is_truthy(sqlstates[told[1][1].sqlstate or "none"], told[1][1].sqlstate)
  assert.equal(1, #told[1][2])
  local err = support.assert_code("lost", lock.release, lock)
  assert.equal(told[1][1].sqlstate, err.sqlstate)
  support.assert_code("lost", conn.query, conn, "SELECT 1")
  assert.equal(1, #told)
end

-- After its loss the next lock of the module's functions is on a new connection, that holds nothing.
local function reopens(conninfo, lose)
  pglocks.setup { databases = { default = { conninfo = conninfo, timeout = 20 } } }
  local before = pglocks.lock "before"
  local nothing = pglocks.lock "idle"
  nothing:release()
  before:release()
  lose(before)
  local lock = pglocks.lock("after", { timeout = 5 })
  assert.is_true(lock:check())
  lock:release()
  pglocks.setup {}
end

describe("a session that is ended", function()
  after_each(support.finish)

  local function terminate(pid) support.observe("SELECT pg_terminate_backend($1)", pid) end

  it("row 8, connecting: is tried again until the deadline, and then an error", function()
    local result = phases.stuck_connecting(support.connect(), support.conninfo, "{ timeout = 1.5 }")
    local pid = result.stuck()
    terminate(pid)
    support.wait_until("another try", function() return (result.stuck() or pid) ~= pid end)
    local outcome, _, seconds = result.wait()
    assert.equal("connect", outcome)
    assert.is_true(seconds >= 1.4 and seconds < 2 * support.slow, seconds)
  end)

  it("row 8, waiting: raises lost with the SQLSTATE", function()
    local conn, told = listening()
    phases.waiting(conn, support.connect(), "x")
    terminate(conn.backend_pid)
    local err = support.assert_code("lost", support.complete, conn)
    assert.equal("57P01", err.sqlstate)
    assert.equal(1, #told)
  end)

  it("row 8, waiting: transaction_timeout, too", function()
    local conn = support.connect()
    if conn.server_version < 170000 then return end
    conn:query "BEGIN"
    conn:query "SET LOCAL transaction_timeout = '300ms'"
    phases.waiting(conn, support.connect(), "x")
    assert.equal("25P04", support.assert_code("lost", support.complete, conn).sqlstate)
  end)

  it("row 8, holding: is known at the next look, once, and with the reason", function()
    local conn, told = listening()
    local lock = conn:lock "x"
    terminate(conn.backend_pid)
    is_lost(conn, lock, told, { ["57P01"] = true })
  end)

  it("row 8, holding: the idle time-outs, too", function()
    for name, sqlstate in pairs {
      idle_in_transaction_session_timeout = "25P03", idle_session_timeout = "57P05",
      transaction_timeout = "25P04",
    } do
      local conn, told = listening()
      if #conn:query("SELECT 1 FROM pg_settings WHERE name = $1", name) > 0 then
        local lock = conn:lock "x"
        conn:query(("SET %s = '50ms'"):format(name))
        if name ~= "idle_session_timeout" then conn:query "BEGIN" end
        is_lost(conn, lock, told, { [sqlstate] = true })
      end
    end
  end)

  it("row 8, releasing: true where the unlock was answered, and lost where not", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, told = listening()
    local lock = conn:lock "x"
    local go_on = phases.releasing(conn, lock)
    terminate(conn.backend_pid)
    go_on()
    local ok, err = pcall(support.complete, conn)
    if not ok then assert.same({ "lost", "57P01" }, { err.code, err.sqlstate }) end
    assert.same({ nil, "not held" }, { lock:release() })
    support.wait_until("the loss", function() return not conn:alive() end)
    assert.equal(1, #told)

    conn, told = listening()
    lock = conn:lock "x"
    assert.is_true(lock:release())
    terminate(conn.backend_pid)
    support.wait_until("the loss", function() return not conn:alive() end)
    assert.same({ nil, "not held" }, { lock:release() })
    assert.equal(0, #told[1][2])
  end)

  it("row 8, idle: the module's functions connect anew", function()
    reopens(support.conninfo, function(lock)
      local conn = support.core.connection_of(lock)
      terminate(conn.backend_pid)
      support.wait_until("the loss", function() return not conn:alive() end)
    end)
  end)
end)

describe("a server that ends all sessions", function()
  local primary

  setup(function()
    if server.cannot_make then return end
    primary = server.make "restart_after_crash = on\n"
  end)
  teardown(server.finish)
  after_each(support.finish)

  local function query(...) return primary:query(...) end

  local function start() primary:begin_start() end

  local function kill(pid) support.signal("KILL", pid) end

  local function crash() -- of another backend: all are ended, and the server starts anew
    query "SELECT" -- connects, if need be
    local other = primary.observer
    kill(other.backend_pid)
    support.wait_until("the crash", function() return not other:alive() end)
  end

  -- Has a stopped backend a signal that it will obey first, or has it gone?
  local function is_struck(pid)
    local file = io.open(("/proc/%d/status"):format(pid))
    local status = file and file:read "*a" or ""
    if file then file:close() end
    return not status:find "ShdPnd:%s*0+\n"
  end

  local CRASHED = { ["57P02"] = true }
  local STOPPED = { ["57P01"] = true }
  local QUIT = { ["57P01"] = true, ["57P02"] = true, none = true } -- which depends on the version

  local function connect() return listening { conninfo = primary.conninfo, timeout = 20 } end

  local ways = {
    ["12"] = {
      { lose = crash, sqlstates = CRASHED, start = function() end },
      { lose = kill, sqlstates = { none = true }, start = function() end },
    },
    ["13"] = {
      { lose = function() primary:begin "-m fast stop" end, sqlstates = STOPPED, start = start },
      { lose = function() primary:begin "-m immediate stop" end, sqlstates = QUIT, start = start },
    },
  }

  for row, title in pairs { ["12"] = "kill -9 of a backend", ["13"] = "a stop" } do
    local function it_happens(phase, what, test)
      it(("row %s, %s: %s"):format(row, phase, what), function()
        if server.cannot_make then return pending(server.cannot_make) end
        for _, way in ipairs(ways[row]) do
          primary:ensure()
          test(way)
        end
      end)
    end

    it_happens("connecting", title .. " is over before the deadline", function(way)
      local conn = connect()
      local struck = phases.stuck_connecting(conn, primary.conninfo, "{ timeout = 20 }", query)
      way.lose(conn.backend_pid)
      support.wait_until("the loss", function() return not conn:alive() end)
      local begun_then = phases.connecting(primary.conninfo, "{ timeout = 20 }")
      way.start()
      assert.equal("connected", (struck.wait()))
      assert.equal("connected", (begun_then.wait()))
    end)

    it_happens("waiting", title .. " raises lost", function(way)
      local conn, holder = connect(), connect()
      phases.waiting(conn, holder, "x", nil, query)
      way.lose(conn.backend_pid)
      local ok, result = pcall(support.complete, conn)
      if ok then -- the holder's session was ended first: granted, and then lost
        support.wait_until("the loss", function() return not result:held() end)
        result = support.raised(result.release, result)
      end
      assert.equal("lost", result.code)
      assert.is_truthy(way.sqlstates[result.sqlstate or "none"], result.sqlstate)
      way.start()
    end)

    it_happens("holding", title .. " is known at the next look", function(way)
      local conn, told = connect()
      local lock = conn:lock "x"
      way.lose(conn.backend_pid)
      is_lost(conn, lock, told, way.sqlstates)
      way.start()
    end)

    it_happens("releasing", title .. " raises lost", function(way)
      local conn, told = connect()
      local lock = conn:lock "x"
      local go_on = phases.releasing(conn, lock, query)
      way.lose(conn.backend_pid)
      support.wait_until("the signal", function() return is_struck(conn.backend_pid) end)
      go_on()
      local err = support.assert_code("lost", support.complete, conn)
      assert.is_truthy(way.sqlstates[err.sqlstate or "none"], tostring(err))
      assert.is_false(lock:held())
      assert.equal(1, #told)
      way.start()
    end)

    it_happens("idle", title .. " makes the module's functions connect anew", function(way)
      reopens(primary.conninfo, function(lock)
        local conn = support.core.connection_of(lock)
        way.lose(conn.backend_pid)
        support.wait_until("the loss", function() return not conn:alive() end)
        way.start()
      end)
    end)
  end
end)
