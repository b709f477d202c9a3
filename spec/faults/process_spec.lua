-- What may happen to the client's own process: death, a pause, fork, exit, signals, a wrong clock.

local phases = require "spec.faults.phases"
local pglocks = require "pglocks"
local process = require "process"
local support = require "spec.support"

local function is_free(key) return support.connect():lock(key, { timeout = 10 * support.slow }):release() end

local function sessions(pid)
  return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", pid)
end

-- Lua source before that of another process: `conn`, and `lock` on "x".
local HOLDS = [[
  package.path = "./?.lua;" .. package.path
  io.stdout:setvbuf "no"
  local support = require "spec.support"
  local conn = require "pglocks".connect { conninfo = support.conninfo, reply_timeout = 20 }
  local lock = conn:lock "x"
  print(conn.backend_pid)
]]

local function spawn(script)
  local child = support.spawn(HOLDS .. script)
  child.backend_pid = tonumber(child.lines())
  return child
end

-- In its script: it stops until somebody lets it go on.
local STOP_SELF = [[ os.execute("kill -s STOP " .. io.open("/proc/self/stat"):read "*n") ]]

local function wait_until_stopped(child)
  support.wait_until("the process to stop", function()
    return support.read(("/proc/%d/stat"):format(child.pid)):find(") T ", 1, true)
  end)
end

describe("kill -9 of the client", function()
  after_each(support.finish)

  it("row 17, waiting: it leaves the queue, at once where the server looks for its clients", function()
    local held = support.connect():lock "y"
    local child = spawn [[
      if conn.server_version >= 140000 then conn:query "SET client_connection_check_interval = 500" end
      conn:lock "y"
    ]]
    support.wait_until_waiting(child.backend_pid)
    support.signal("KILL", child.pid)
    child.close()
    if support.connect().server_version >= 140000 then
      support.wait_until("it to leave", function() return sessions(child.backend_pid) == 0 end)
    end
    held:release()
    support.wait_until("it to leave", function() return sessions(child.backend_pid) == 0 end)
    is_free "y"
  end)

  it("row 17, holding: its locks are free", function()
    local child = spawn "support.sleep(60)"
    support.signal("KILL", child.pid)
    assert.is_true(support.timed(is_free, "x") < 5 * support.slow)
    child.close()
  end)

  it("row 17, releasing: its locks are free", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local child = spawn(STOP_SELF .. [[ print "releases" lock:release() ]])
    wait_until_stopped(child)
    support.signal("STOP", child.backend_pid)
    support.signal("CONT", child.pid)
    assert.equal("releases", child.lines())
    support.signal("KILL", child.pid)
    child.close()
    support.signal("CONT", child.backend_pid)
    is_free "x"
  end)
end)

-- A connection that nobody drives for a while is what a stopped process has: the kernel goes on.
describe("a long pause of the client", function()
  after_each(support.finish)

  it("row 18, connecting: is an error on waking up, where the deadline has passed", function()
    local began = support.core.now()
    local result = phases.stuck_connecting(support.connect(), support.conninfo, "{ timeout = 0.5 }")
    support.signal("STOP", result.pid)
    support.wait_until("the deadline to pass", function() return support.core.now() > began + 1.5 end)
    support.signal("CONT", result.pid)
    local outcome, _, seconds = result.wait()
    assert.equal("connect", outcome)
    assert.is_true(seconds < 3 * support.slow, seconds)
  end)

  it("row 18, waiting: a grant that is found after the deadline is kept", function()
    local conn = support.connect { reply_timeout = 0.1 }
    local held = phases.waiting(conn, support.connect(), "x", { timeout = support.slow })
    held:release()
    support.wait_until("the grant", function()
      local row = support.pg_locks(conn.backend_pid)[1]
      return row and row.granted
    end)
    local deadline = support.core.now() + support.slow + 0.2
    support.wait_until("the deadline to pass", function() return support.core.now() > deadline end)
    local lock = support.complete(conn)
    assert.is_true(lock:held())
    assert.is_true(lock:release())
  end)

  it("row 18, holding: a loss meanwhile is seen at the first look", function()
    local child = spawn(STOP_SELF .. [[ print(lock:held()) ]])
    wait_until_stopped(child)
    support.observe("SELECT pg_terminate_backend($1)", child.backend_pid)
    support.wait_until("its end", function() return sessions(child.backend_pid) == 0 end)
    support.signal("CONT", child.pid)
    assert.equal("false", child.lines())
    child.close()
  end)

  it("row 18, releasing: an answer that is found after the deadline counts", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect { reply_timeout = 0.2 }
    local lock = conn:lock "x"
    support.core.start.release(lock)
    support.wait_until("the release", function() return #support.pg_locks(conn.backend_pid) == 0 end)
    local deadline = support.core.now() + 0.3
    support.wait_until("the deadline to pass", function() return support.core.now() > deadline end)
    assert.is_true(support.complete(conn))
    assert.is_true(conn:ping())
  end)

  it("row 18, idle: nothing happens", function()
    local child = spawn([[ lock:release() ]] .. STOP_SELF .. [[ print(conn:ping(), conn:lock("y"):held()) ]])
    wait_until_stopped(child)
    support.signal("CONT", child.pid)
    assert.equal("true\ttrue", child.lines())
    child.close()
  end)
end)

-- ---- fork -------------------------------------------------------------------------------

local function over_network(options)
  options.host, options.user, options.password = "127.0.0.1", "scram_user", "secret of scram"
  options.conninfo = support.conninfo
  return options
end

for way, options in pairs { ["a Unix socket"] = {}, TLS = over_network { sslmode = "require" } } do
  describe("fork, over " .. way, function()
    if options.sslmode and not os.getenv "PGLOCKS_TEST_DATA" then
      it("row 19", function() pending "this server is not ours to give a certificate" end)
      return
    end
    setup(function() if options.sslmode then support.with_tls() end end)
    teardown(function() if options.sslmode then support.without_tls() end end)
    after_each(support.finish)

    local function connect()
      local conn = support.connect(options)
      if options.sslmode then
        assert.is_true(conn:query("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")[1].ssl)
      end
      return conn
    end

    -- Runs in a child, which says by its exit status whether all was as it should.
    local function in_child(fn)
      local pid = process.fork()
      if pid == 0 then
        local ok, result = pcall(fn)
        if not ok then io.stderr:write(tostring(result), "\n") end
        process.exit(ok and 0 or 1)
      end
      return pid
    end

    local function refuses(fn, ...)
      local ok, err = pcall(fn, ...)
      assert(not ok and err.code == "forked", err)
    end

    local function refuses_all(conn, lock)
      refuses(conn.lock, conn, "y")
      refuses(conn.query, conn, "SELECT 1")
      refuses(conn.ping, conn)
      refuses(conn.all_locks, conn)
      if lock then
        refuses(lock.release, lock)
        refuses(lock.check, lock)
        assert(not lock:held(), "held in the child")
      end
      assert(not conn:alive(), "alive in the child")
      assert(not conn:cancel(), "cancelled in the child")
    end

    -- Everything that a child may do to its parent's connection, and must not.
    local function collect_and_close(conn, lock)
      if lock then getmetatable(lock).__close(lock) end
      getmetatable(conn).__gc(conn)
      collectgarbage()
      collectgarbage()
    end

    it("row 19, connecting: of what was begun before, the child hears nothing", function()
      local keywords = {}
      for name, value in pairs(support.core.conninfo(support.conninfo)) do keywords[name] = value end
      for name, value in pairs(options) do if name ~= "conninfo" then keywords[name] = value end end
      local conn = support.core.start.connect(keywords, 10)
      local child = in_child(function()
        refuses_all(conn)
        collect_and_close(conn)
      end)
      assert.equal(0, process.wait(child))
      assert.is_true(support.complete(conn))
      assert.is_true(conn:ping())
      conn:close()
    end)

    it("row 19, waiting: the parent waits on, and gets the lock", function()
      local conn = connect()
      local held = phases.waiting(conn, support.connect(), "x")
      local child = in_child(function()
        refuses_all(conn)
        collect_and_close(conn)
      end)
      assert.equal(0, process.wait(child))
      held:release()
      assert.is_true(support.complete(conn):check())
    end)

    it("row 19, holding: the child owns nothing, and its end changes nothing", function()
      local conn = connect()
      local lock = conn:lock "x"
      local child = in_child(function()
        refuses_all(conn, lock)
        collect_and_close(conn, lock)
      end)
      assert.equal(0, process.wait(child))
      assert.is_true(lock:check())
      assert.same({ nil, "busy" }, { support.connect():try_lock "x" })
      assert.is_true(lock:release())
    end)

    it("row 19, holding: the child knows none of its parent's names", function()
      local lock = connect():lock "x"
      local child = in_child(function()
        local own = pglocks.connect(support.conninfo)
        local list = own:all_locks()
        assert(#list == 1 and list[1].name == nil)
        own:close()
      end)
      assert.equal(0, process.wait(child))
      assert.equal("x", support.connect():all_locks()[1].name)
      assert.is_true(lock:release())
    end)

    it("row 19, holding: of a killed parent it is free at once, though its child lives", function()
      local parent = support.spawn(([[
        package.path = "./?.lua;" .. package.path
        local support, process = require "spec.support", require "process"
        local conn = require "pglocks".connect { conninfo = support.conninfo, host = %s, user = %s,
          password = "secret of scram", sslmode = %s }
        local lock = conn:lock "x"
        local child = process.fork()
        if child == 0 then
          support.sleep(60)
          process.exit(0)
        end
        io.stdout:setvbuf "no"
        print(child)
        support.sleep(60)
      ]]):format(options.host and '"127.0.0.1"' or "nil", options.user and '"scram_user"' or "nil",
        options.sslmode and '"require"' or "nil"))
      local child = tonumber(parent.lines())
      finally(function()
        support.signal("KILL", child)
        parent.close()
      end)
      support.signal("KILL", parent.pid)
      assert.is_true(support.timed(is_free, "x") < 1 * support.slow)
      support.signal("CONT", child) -- it lives
    end)

    it("row 19, releasing: the parent gets its answer", function()
      local conn = connect()
      local lock = conn:lock "x"
      support.core.start.release(lock)
      local child = in_child(function()
        refuses_all(conn, lock)
        collect_and_close(conn, lock)
      end)
      assert.equal(0, process.wait(child))
      assert.is_true(support.complete(conn))
      is_free "x"
    end)

    it("row 19, idle: parent and child go their ways", function()
      local conn = connect()
      local child = in_child(function()
        refuses_all(conn)
        collect_and_close(conn)
        local own = pglocks.connect(options.conninfo and options or support.conninfo)
        own:lock("x"):release()
        own:close()
      end)
      assert.equal(0, process.wait(child))
      assert.is_true(conn:ping())
      assert.is_true(conn:lock("x"):release())
    end)
  end)
end

-- ---- ends of a program ------------------------------------------------------------------

describe("a program that ends", function()
  after_each(support.finish)

  it("row 21, holding: frees its locks, however it does", function()
    for _, ending in ipairs {
      "os.exit(0, true)", "os.exit(0, false)", "os.exit(3)", "error 'fails'",
      "coroutine.wrap(function() conn:lock 'y' coroutine.yield() end)() collectgarbage()",
      "lock, conn = nil, nil collectgarbage() collectgarbage()",
    } do
      local child = spawn(ending)
      child.close()
      support.wait_until("the end of the session", function() return sessions(child.backend_pid) == 0 end)
      is_free "x"
    end
  end)

  it("row 21, releasing: once, whoever calls it how often", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    local metatable = getmetatable(lock)
    assert.is_true(lock:release())
    for _ = 1, 3 do
      metatable.__close(lock)
      metatable.__gc(lock)
    end
    assert.is_false(pcall(lock.held, lock))
    assert.is_true(conn:ping())
    local other = conn:lock "y"
    metatable.__gc(other)
    support.wait_until("the release", function() return #support.pg_locks(conn.backend_pid) == 0 end)
    for _ = 1, 3 do
      metatable.__gc(other)
      metatable.__close(other)
    end
    assert.is_true(conn:ping())
  end)

  it("row 21, idle: leaves no session", function()
    for _, ending in ipairs { "os.exit(0, true)", "os.exit(0, false)", "conn = nil collectgarbage()" } do
      local child = spawn("lock:release() lock = nil " .. ending)
      child.close()
      support.wait_until("the end of the session", function() return sessions(child.backend_pid) == 0 end)
    end
    local conn = pglocks.connect(support.conninfo)
    local pid = conn.backend_pid
    for _ = 1, 3 do getmetatable(conn).__gc(conn) end
    support.wait_until("the end of the session", function() return sessions(pid) == 0 end)
    assert.is_false(pcall(conn.ping, conn))
  end)
end)

-- ---- signals ----------------------------------------------------------------------------

describe("a signal every millisecond", function()
  before_each(function() process.alarm(1) end)
  after_each(function()
    process.alarm(0)
    support.finish()
  end)

  local function interrupted(fn)
    local before = process.alarm(1)
    fn()
    support.wait_until("signals", function() return process.alarm(1) > before end)
  end

  it("row 26, connecting: it connects", function()
    interrupted(function() assert.is_true(support.connect():ping()) end)
    local refused = { host = "127.0.0.1", port = 1, timeout = 0.3 }
    local seconds, ok = support.timed(pcall, pglocks.connect, refused)
    assert.is_false(ok)
    assert.is_true(seconds >= 0.2 and seconds < 1 * support.slow, seconds)
  end)

  it("row 26, waiting: it gets the lock, and keeps its deadline", function()
    local conn = support.connect()
    local lock = phases.waiting(conn, support.connect(), "x", { timeout = 0.3 })
    local seconds
    interrupted(function()
      seconds = support.timed(function() support.assert_code("timeout", support.complete, conn) end)
    end)
    assert.is_true(seconds < 0.8 * support.slow, seconds)
    support.begin(conn, "lock", "x")
    support.wait_until_waiting(conn.backend_pid)
    interrupted(function()
      lock:release()
      assert.is_true(support.complete(conn):check())
    end)
  end)

  it("row 26, holding: it holds", function()
    local lock = support.connect():lock "x"
    interrupted(function() assert.is_true(lock:held() and lock:check()) end)
  end)

  it("row 26, releasing: it releases", function()
    local conn = support.connect()
    interrupted(function()
      for _ = 1, 200 do assert.is_true(conn:lock("x"):release()) end
    end)
  end)

  it("row 26, idle: nothing happens; a dead server is no SIGPIPE", function()
    local conn = support.connect()
    interrupted(function() assert.is_true(conn:ping()) end)
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the end of the session", function() return sessions(conn.backend_pid) == 0 end)
    for _ = 1, 3 do support.assert_code("lost", conn.query, conn, "SELECT 1") end
  end)
end)

-- ---- the clock --------------------------------------------------------------------------

describe("a wall clock that jumps", function()
  after_each(support.finish)

  local child

  setup(function()
    child = support.spawn_with("env LD_PRELOAD=build/jumping_clock.so", [[
      package.path = "./?.lua;" .. package.path
      io.stdout:setvbuf "no"
      local support = require "spec.support"
      local pglocks = require "pglocks"
      local first, second = os.time(), os.time()
      print(math.abs(first - second) > 3600)
      local function line(...) print(select("#", ...) == 1 and tostring(...) or table.concat({ ... }, " ")) end
      local function timed(fn)
        local seconds, result = support.timed(fn)
        return ("%.2f "):format(seconds) .. tostring(result)
      end
      local conn = pglocks.connect(support.conninfo)
      line(timed(function()
        local _, err = pcall(pglocks.connect, { host = "127.0.0.1", port = 1, timeout = 0.4 })
        return err.code
      end))
      local other = pglocks.connect(support.conninfo)
      local held = other:lock "x"
      line(timed(function() return select(2, conn:try_lock("x", { timeout = 0.4 })) end))
      held:release()
      local lock = conn:lock("x", { timeout = 10 })
      line(timed(function() return lock:held() and lock:check(5) end))
      line(timed(function() return lock:release() end))
      line(timed(function() return conn:ping(5) end))
    ]])
  end)

  teardown(function() child.close() end)

  -- What the next phase of the program did, and in which time.
  local function expect(what, least, most)
    local seconds, outcome = child.lines():match "^(%S+) (%S+)$"
    assert.equal(what, outcome)
    assert.is_true(tonumber(seconds) >= least and tonumber(seconds) < most * support.slow, seconds)
  end

  it("row 27, connecting: the deadline is kept", function()
    assert.equal("true", child.lines()) -- it does jump
    expect("connect", 0.3, 1)
  end)
  it("row 27, waiting: the time-out is kept", function() expect("timeout", 0.4, 0.9) end)
  it("row 27, holding: it holds", function() expect("true", 0, 0.5) end)
  it("row 27, releasing: it releases", function() expect("true", 0, 0.5) end)
  it("row 27, idle: the connection stays", function() expect("true", 0, 0.5) end)
end)
