-- Ctrl-C: the interpreter's own handler sets a hook, which raises "interrupted!" at once, however
-- long the wait would have been; the connection stays usable and nothing is left behind.

local support = require "spec.support"

-- Connects, says its backend's pid, runs the test's own lines, and tells what became of it.
local CHILD = [[
local pglocks = require "pglocks"
local conninfo = ...
local conn = pglocks.connect(conninfo)
io.stdout:setvbuf "line"
print(conn.backend_pid)
local ok, err = pcall(function() %s end)
print(ok, err)
print(conn:alive(), #conn:locks())
print(conn:lock "another":release())
io.read() -- stays until the parent has looked
]]

local function interrupted_while(body, waits)
  local child = support.spawn(CHILD:format(body), support.conninfo)
  local line = child.lines()
  local backend = assert(tonumber(line), line)
  waits(backend)
  support.signal("INT", child.pid)
  local seconds, outcome = support.timed(child.lines)
  return child, backend, outcome, seconds
end

local function ends(child)
  support.signal("TERM", child.pid)
  child.close()
end

describe("Ctrl-C", function()
  after_each(support.finish)

  local LOCK = 'conn:lock "held by the parent"'
  local waits_for_lock = {
    ["a lock"] = LOCK,
    ["a lock with a timeout"] = 'conn:lock("held by the parent", { timeout = 60 })',
    ["try_lock with a timeout"] = 'conn:try_lock("held by the parent", { timeout = 60 })',
    ["a lock inside a coroutine"] =
      "local co = coroutine.create(function() " .. LOCK .. " end)"
      .. " local _, e = coroutine.resume(co) error(e, 0)",
    ["with_lock"] = 'conn:with_lock("held by the parent", print)',
    ["a lock inside a transaction"] =
      "conn:transaction(function() " .. LOCK .. " end)",
  }

  for what, body in pairs(waits_for_lock) do
    it("ends the wait for " .. what, function()
      local holder = support.connect()
      local lock = holder:lock "held by the parent"
      local child, backend, outcome, seconds = interrupted_while(body, support.wait_until_waiting)
      assert.equal("false\tinterrupted!", outcome)
      assert.is_true(seconds < 1 * support.slow, seconds)
      assert.equal("true\t0", child.lines())
      assert.equal("true", child.lines())
      assert.same({}, support.pg_locks(backend))
      assert.is_true(lock:check())
      ends(child)
    end)
  end

  it("ends a query", function()
    local child, _, outcome = interrupted_while('conn:query "SELECT pg_sleep(60)"', function(pid)
      support.wait_until("the query to run", function()
        return #support.observe(
          "SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'", pid) == 1
      end)
    end)
    assert.equal("false\tinterrupted!", outcome)
    assert.equal("true\t0", child.lines())
    assert.equal("true", child.lines())
    ends(child)
  end)

  it("ends connecting to a server that says nothing", function()
    local socket = require "cqueues.socket"
    local listener = assert(socket.listen("127.0.0.1", 0))
    local _, _, port = listener:localname()
    local child = support.spawn([[
      local pglocks = require "pglocks"
      io.stdout:setvbuf "line"
      print "connecting"
      print(pcall(pglocks.connect, { host = "127.0.0.1", port = ..., connect_timeout = 60 }))
    ]], port)
    assert.equal("connecting", child.lines())
    support.wait_until("the connection", function() return listener:accept { timeout = 0 } end)
    support.signal("INT", child.pid)
    -- with a position, if the signal came before the wait did
    assert.is_truthy(child.lines():find "^false\t.*interrupted!$")
    child.close()
    listener:close()
  end)

  it("leaves the script as Ctrl-C always does, and frees what it held", function()
    local holder = support.connect()
    local lock = holder:lock "held by the parent"
    local child = support.spawn([[
      local conn = require "pglocks".connect((...))
      local kept = conn:lock "kept"
      io.stdout:setvbuf "line"
      print(conn.backend_pid)
      conn:lock "held by the parent"
    ]], support.conninfo)
    local backend = tonumber(child.lines())
    support.wait_until_waiting(backend)
    support.signal("INT", child.pid)
    assert.is_truthy(child.lines():find("interrupted!", 1, true))
    support.wait_until("its session to end", function() return #support.pg_locks(backend) == 0 end)
    child.close()
    assert.is_true(lock:release())
  end)
end)

describe("conn:cancel()", function()
  after_each(support.finish)

  it("ends the wait that is under way on the connection", function()
    local holder, waiter = support.connect(), support.connect()
    local lock = holder:lock "x"
    support.begin(waiter, "lock", "x")
    support.wait_until_waiting(waiter.backend_pid)
    assert.is_true(waiter:cancel())
    local ok, err = pcall(support.complete, waiter)
    assert.is_false(ok)
    assert.equal("interrupted", err.code)
    assert.is_true(waiter:ping())
    assert.same({}, support.pg_locks(waiter.backend_pid))
    lock:release()
  end)

  local function own_pid()
    local file = assert(io.open "/proc/self/stat")
    local pid = file:read "*n"
    file:close()
    return pid
  end

  local function count_threads()
    return select(2, support.shell(("ls /proc/%d/task"):format(own_pid())):gsub("\n", ""))
  end

  -- The program's handlers are Lua's, for the thread that it runs in.
  local function other_threads_block_signals()
    local pid, count = own_pid(), 0
    local masks = support.shell(("grep SigBlk /proc/%d/task/*/status"):format(pid))
    for thread, mask in masks:gmatch "task/(%d+)/status:SigBlk:%s*(%x+)" do
      if tonumber(thread) ~= pid then
        count = count + 1
        if not mask:find "[2367abef]$" then return false end -- SIGINT
      end
    end
    return count > 0
  end

  -- A request that reaches the server's process before the statement does is for nothing.
  it("ends a wait that begins only after the request has come", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = support.connect(), support.connect()
    local kept, busy = conn:lock "kept", other:lock "busy"
    local threads = count_threads()
    for _, begin in ipairs {
      function() support.begin(conn, "lock", "busy") end,
      function() support.begin(conn, "lock_all", { "busy", "free" }, { timeout = 20 }) end,
      function() support.begin(conn, "query", "SELECT pg_sleep(20)") end,
    } do
      support.signal("STOP", conn.backend_pid)
      begin()
      assert.is_true(conn:cancel())
      support.wait_until("the request to have come", function() return count_threads() == threads end)
      support.signal("CONT", conn.backend_pid)
      local seconds = support.timed(support.assert_code, "interrupted", support.complete, conn)
      assert.is_true(seconds < 5 * support.slow, seconds)
    end
    assert.is_true(kept:check())
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    kept:release()
    busy:release()
  end)

  it("sends nothing before its request has finished, which could hit that", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local core = support.core
    local file = assert(io.open(os.getenv "PGLOCKS_TEST_DATA" .. "/postmaster.pid"))
    local postmaster = tonumber(file:read "*l")
    file:close()
    local holder, waiter = support.connect(), support.connect()
    local lock = holder:lock "x"
    support.begin(waiter, "lock", "x")
    support.wait_until_waiting(waiter.backend_pid)
    local _, socket = core.step(waiter)
    support.signal("STOP", postmaster) -- the request now gets no answer
    local ok, err = pcall(function()
      assert.is_true(waiter:cancel())
      assert.is_true(other_threads_block_signals())
      support.observe("SELECT pg_cancel_backend($1)", waiter.backend_pid)
      support.wait_until("the answer to the lock", function()
        local _, fd = core.step(waiter)
        return fd ~= socket
      end)
      for _ = 1, 20 do
        assert.is_truthy(core.step(waiter)) -- not done: the guard has yet to be sent
        support.sleep(0.005)
      end
    end)
    support.signal("CONT", postmaster)
    assert.is_true(ok, err)
    support.assert_code("interrupted", support.complete, waiter)
    assert.is_true(waiter:ping())
    lock:release()
  end)

  it("says so when there is nothing to cancel, and never hits a later statement", function()
    local conn = support.connect()
    for _ = 1, 50 do
      assert.is_false(conn:cancel())
      assert.is_true(conn:lock "x":release())
    end
  end)
end)
