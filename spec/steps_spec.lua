-- The engine's steps, driven from here with a poll of our own instead of the core's: what a
-- scheduler does.

local support = require "spec.support"
local cqueues = require "cqueues"
local core = support.core

-- Drives what was begun on `conn` to its end; counts the waits.
local function drive(conn)
  local waits = 0
  while true do
    local events, fd, seconds = core.step(conn)
    if not events then return waits end
    waits = waits + 1
    assert(events == "r" or events == "w" or events == "rw")
    assert(seconds >= 0)
    local timeout = seconds < math.huge and seconds or nil
    cqueues.poll({ pollfd = fd, events = events }, timeout)
  end
end

local function call(operation, conn, ...)
  core.start[operation](conn, ...)
  local waits = drive(conn)
  return waits, core.finish(conn)
end

local function connect()
  local keywords = core.conninfo(support.conninfo)
  local conn = core.start.connect(keywords, 5)
  assert.is_true(drive(conn) > 0)
  assert.is_true(core.finish(conn))
  return conn
end

describe("steps", function()
  after_each(support.finish)

  it("connect, lock, release and close", function()
    local conn = connect()
    local _, lock = call("lock", conn, "invoice 42")
    assert.is_true(lock:held())
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    assert.equal(conn, core.start.release(lock))
    drive(conn)
    assert.is_true(core.finish(conn))
    assert.same({}, support.pg_locks(conn.backend_pid))
    call("close", conn)
    assert.is_false(conn:alive())
  end)

  it("wait for a lock without blocking, and get it", function()
    local holder, waiter = support.connect(), connect()
    local lock = holder:lock "x"
    core.start.lock(waiter, "x")
    for _ = 1, 10 do -- nothing happens yet, and it does not block
      local events, fd = core.step(waiter)
      assert.equal("r", events)
      assert.is_number(fd)
    end
    lock:release()
    drive(waiter)
    assert.is_true(core.finish(waiter):held())
    waiter:close()
  end)

  it("time out", function()
    local holder, waiter = support.connect(), connect()
    local lock = holder:lock "x"
    local seconds = support.timed(function()
      local _, got, why = call("try_lock", waiter, "x", { timeout = 0.1 })
      assert.is_nil(got)
      assert.equal("timeout", why)
    end)
    assert.is_true(seconds >= 0.1)
    core.start.lock(waiter, "x", { timeout = 0.05 })
    drive(waiter)
    local ok, err = pcall(core.finish, waiter)
    assert.is_false(ok)
    assert.equal("timeout", err.code)
    lock:release()
    waiter:close()
  end)

  it("serve query, execute, ping, check and attempt as well", function()
    local conn = connect()
    local _, rows = call("query", conn, "SELECT $1::int AS n", 7)
    assert.same({ { n = 7 } }, rows)
    local _, _, tag = call("execute", conn, 5, "BEGIN")
    assert.equal("BEGIN", tag)
    local _, pinged = call("ping", conn)
    assert.is_true(pinged)
    local _, lock = call("attempt", conn, 42)
    assert.is_true(lock.acquired)
    core.start.check(lock)
    drive(conn)
    assert.is_true(core.finish(conn))
    call("close", conn)
  end)

  it("hold nothing from the moment that close has begun", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    core.start.close(conn)
    assert.is_false(lock:held() or conn:alive())
    assert.same({}, conn:locks())
    support.complete(conn)
  end)

  it("confirm no lock whose scope has ended meanwhile", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    core.start.check(lock)
    getmetatable(lock).__close(lock)
    support.assert_code("not_held", support.complete, conn)
  end)

  it("refuse a second operation meanwhile, and leave the first unharmed", function()
    local holder, conn = support.connect(), connect()
    local lock = holder:lock "x"
    core.start.lock(conn, "x")
    for _, second in ipairs {
      function() conn:lock "y" end, function() conn:try_lock "y" end,
      function() conn:with_lock("y", print) end, function() conn:query "SELECT 1" end,
      function() conn:ping() end, function() conn:close() end,
    } do
      local ok, err = pcall(second)
      assert.is_false(ok)
      assert.equal("busy_connection", err.code)
    end
    lock:release()
    drive(conn)
    assert.is_true(core.finish(conn):held())
    conn:close()
  end)

  it("let a scope end meanwhile: its lock is free when the operation is over", function()
    local holder, conn = support.connect(), connect()
    local lock, own = holder:lock "x", conn:lock "own"
    core.start.lock(conn, "x")
    getmetatable(own).__close(own)
    assert.is_false(own:held())
    lock:release()
    drive(conn)
    local got = core.finish(conn)
    conn:ping()
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    assert.is_true(got:check())
    conn:close()
  end)

  it("end at the deadline when the server says nothing", function()
    local socket = require "cqueues.socket"
    local listener = assert(socket.listen("127.0.0.1", 0))
    local _, _, port = listener:localname()
    local began = core.now()
    local conn = core.start.connect({ host = "127.0.0.1", port = tostring(port) }, 0.2)
    drive(conn)
    assert.is_true(core.now() - began >= 0.2)
    local ok, err = core.finish(conn)
    assert.is_nil(ok)
    assert.equal("connect", err.code)
    listener:close()
  end)

  it("learn of a lost session while they wait", function()
    local holder, waiter = support.connect(), connect()
    local lock = holder:lock "x"
    core.start.lock(waiter, "x")
    support.wait_until_waiting(waiter.backend_pid)
    support.observe("SELECT pg_terminate_backend($1)", waiter.backend_pid)
    drive(waiter)
    local ok, err = pcall(core.finish, waiter)
    assert.is_false(ok)
    assert.equal("lost", err.code)
    assert.equal("57P01", err.sqlstate)
    lock:release()
  end)

  it("send a release without waiting for its answer, and collect that with the next", function()
    local conn, other = connect(), support.connect()
    core.configure(conn, { deferred = true })
    for _ = 1, 100 do
      local _, lock = call("lock", conn, "x")
      core.start.release(lock)
      assert.is_nil(core.step(conn)) -- done already: nothing to wait for
      assert.is_true(core.finish(conn))
    end
    local lock = other:lock("x", { timeout = 5 })
    assert.is_true(lock:release())
    call("close", conn)
  end)
end)

describe("what many owners on one connection need", function()
  after_each(support.finish)

  local function closed_locks(...)
    local locks = {}
    for i, key in ipairs { ... } do locks[i] = core.closed_lock(key) end
    return locks
  end

  -- Those keys, each with a lock that has joined.
  local function held(conn, ...)
    local locks = closed_locks(...)
    local _, got = call("try_each", conn, locks)
    for _, lock in ipairs(locks) do assert.is_true(core.join(conn, lock, 0)) end
    core.let_go(got)
    return locks
  end

  local function raised(fn, ...)
    local ok, err = pcall(fn, ...)
    assert.is_false(ok)
    return type(err) == "table" and err.code or err
  end

  it("a try that is cancelled holds nothing, and leaves what others hold to them", function()
    local conn = connect()
    local first = held(conn, "x")[1]
    core.start.try_each(conn, closed_locks("x", "y", "z"))
    assert.is_true(conn:cancel())
    drive(conn)
    assert.equal("interrupted", raised(core.finish, conn))
    assert.equal(1, #conn:locks())
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    getmetatable(first).__close(first)
    call("ping", conn)
    assert.same({}, conn:locks())
    assert.same({}, support.pg_locks(conn.backend_pid))
    conn:close()
  end)

  it("a try that is cancelled lets go of what the others have let go meanwhile", function()
    local conn = connect()
    local first = held(conn, "x")[1]
    core.start.try_each(conn, closed_locks("x", "y"))
    assert.is_true(conn:cancel())
    core.let_go(first)
    drive(conn)
    assert.equal("interrupted", raised(core.finish, conn))
    call("ping", conn)
    assert.same({}, conn:locks())
    assert.same({}, support.pg_locks(conn.backend_pid))
    conn:close()
  end)

  it("nobody joins what close() has let go of", function()
    local conn, told = connect(), 0
    core.configure(conn, { scheduled = true, on_end = function() told = told + 1 end })
    local first, another = held(conn, "x")[1], core.closed_lock "x"
    core.start.close(conn)
    assert.is_false(core.join(conn, another, 0))
    assert.is_nil(core.standing(first))
    assert.is_nil(core.identity(first))
    getmetatable(first).__close(first)
    assert.equal(0, told)
    drive(conn)
    core.finish(conn)
  end)

  it("a key has one scope", function()
    local conn = connect()
    local _, lock = call("lock", conn, "x", { scope = "transaction" })
    local err = raised(core.start.try_each, conn, closed_locks("x", "y"))
    assert.is_truthy(err:find("until its transaction ends", 1, true), err)
    assert.is_true(lock:held())
    lock:release()
    conn:close()
  end)

  it("the end of a lock is told once, also where it is ended by who is told", function()
    local conn, told = connect(), 0
    core.configure(conn, {
      on_end = function(_, lock)
        told = told + 1
        getmetatable(lock).__close(lock)
      end,
    })
    local lock = held(conn, "x")[1]
    getmetatable(lock).__close(lock)
    assert.equal(1, told)
    assert.same({}, conn:locks())
    conn:close()
  end)

  it("the end of a lock that began a transaction is never put off", function()
    local conn = connect()
    local locks = held(conn, "a", "b", "c", "d", "e")
    local _, lock = call("lock", conn, "x", { scope = "transaction" })
    for i = 1, 5 do core.let_go(locks[i], true) end
    core.let_go(lock, true)
    call("ping", conn)
    assert.is_false(core.in_transaction(conn))
    assert.same({}, support.pg_locks(conn.backend_pid))
    conn:close()
  end)
end)
