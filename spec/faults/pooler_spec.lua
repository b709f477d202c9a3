-- Through PgBouncer. What it pools must be sessions, or two clients share one, and the locks in it.
-- The numbers are those of the table of faults.

local cqueues = require "cqueues"

local phases = require "spec.faults.phases"
local pglocks = require "pglocks"
local pooler = require "spec.faults.pooler"
local support = require "spec.support"

local assert_code, wait_until = support.assert_code, support.wait_until

local start, stop, conninfo = pooler.start, pooler.stop, pooler.conninfo

local function it_with_pooler(name, fn)
  it(name, pooler.missing and function() pending(pooler.missing) end or fn)
end

--- A connection that takes the word of whoever says that sessions are pooled.
local function connect(mode, options)
  options = options or {}
  options.conninfo, options.pooled = conninfo(mode), "session"
  return support.connect(options)
end

--- One that asks the pooler for nothing.
local function connect_without_a_look(mode)
  local conn = support.core.start.connect(support.core.conninfo(conninfo(mode)), 10)
  assert.is_true(support.complete(conn))
  return conn
end

describe("a pooler", function()
  before_each(function() start() end)
  after_each(function()
    pglocks.setup {}
    stop()
    support.finish()
  end)

  for _, mode in ipairs { "transaction", "statement", "session" } do
    it_with_pooler(("that pools by %s is refused (row 23, connecting)"):format(mode), function()
      local err = assert_code("pooled", pglocks.connect, conninfo(mode))
      assert.is_truthy(err.message:find("connection pooler", 1, true), err.message)
      assert.is_truthy(err.message:find('pooled = "session"', 1, true), err.message)
      assert.is_truthy(err.hint:find("direct connection", 1, true), err.hint)

      pglocks.setup(conninfo(mode))
      for _ = 1, 2 do assert_code("pooled", pglocks.lock, "x") end
      assert.same({}, support.pg_locks())
    end)
  end

  it_with_pooler("that is refused keeps the settings of its sessions (row 23, connecting)", function()
    local other = connect_without_a_look "transaction"
    other:query "SET statement_timeout = '42s'"
    assert_code("pooled", pglocks.connect, conninfo "transaction")
    assert.equal("42s", other:query("SHOW statement_timeout")[1].statement_timeout)
    other:close()
  end)
end)

describe("a pooler of sessions, said to be one,", function()
  before_each(function() start() end)
  after_each(function()
    support.finish() -- before it stops: releases must have reached the server
    stop()
  end)

  it_with_pooler("gives locks that are the session's, and exclude others there and elsewhere", function()
    local conn, beside, direct = connect "session", connect "session", support.connect()
    assert.is_true(conn.is_pooled)
    assert.is_false(direct.is_pooled)
    assert.not_equal(conn.backend_pid, beside.backend_pid)
    assert.equal(conn:query("SELECT pg_backend_pid() AS pid")[1].pid, conn.backend_pid)
    assert.equal("0", conn:query("SHOW statement_timeout")[1].statement_timeout)

    local lock, shared = conn:lock "x", conn:lock({ 7, 42 }, { shared = true })
    assert.is_true(lock:check())
    assert.equal(2, #support.pg_locks(conn.backend_pid))
    for _, other in ipairs { beside, direct } do
      assert.same({ nil, "busy" }, { other:try_lock "x" })
      assert.same({ nil, "timeout" }, { other:try_lock("x", { timeout = 0.05 }) })
      assert_code("timeout", other.lock, other, { 7, 42 }, { timeout = 0.05 })
      assert.is_true(other:lock({ 7, 42 }, { shared = true, timeout = 0 }):release())
    end

    support.begin(beside, "lock", "x")
    support.wait_until_waiting(beside.backend_pid)
    assert.is_true(lock:release())
    assert.is_true(support.complete(beside):release())
    assert.is_true(direct:lock("x", { timeout = 0 }):release())
    assert.is_true(shared:release())
    assert.same({}, support.pg_locks())
  end)

  it_with_pooler("gives many locks at once", function()
    local conn, direct = connect "session", support.connect()
    for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true } } do
      local lock = conn:lock_all({ 42, "x", { 7, 42 } }, options)
      assert.is_true(lock:check())
      assert.equal(3, #support.pg_locks(conn.backend_pid))
      assert.is_true(lock:release())
      assert.same({}, support.pg_locks())
    end
    local busy = direct:lock { 7, 42 }
    assert.same({ nil, "busy" }, { conn:try_lock_all { 42, "x", { 7, 42 } } })
    assert_code("timeout", conn.lock_all, conn, { 42, "x", { 7, 42 } }, { timeout = 0.05 })
    assert.same({}, support.pg_locks(conn.backend_pid))
    busy:release()
  end)

  it_with_pooler("has locks freed by deferred releases, by close() and by the client's end", function()
    local other = support.connect()
    local conn = connect("session", { release = "deferred" })
    for _ = 1, 20 do assert.is_true(conn:lock("x"):release()) end
    other:lock("x", { timeout = 5 }):release()
    assert.is_true(conn:ping())

    local lock = conn:lock "x"
    conn:close()
    assert.is_false(lock:held())
    other:lock("x", { timeout = 0 }):release()

    local process = support.spawn([[
      local conn = require "pglocks".connect { conninfo = ..., pooled = "session" }
      local lock = conn:lock "x"
      print(conn.backend_pid)
      io.stdout:flush()
      require "system".sleep(60)
    ]], conninfo "session")
    assert.equal(1, #support.pg_locks(tonumber(process.lines())))
    support.signal("KILL", process.pid)
    process.close()
    other:lock("x", { timeout = 5 }):release()
  end)

  it_with_pooler("passes cancel() on", function()
    local lock = support.connect():lock "x"
    local waiter = connect("session", { scheduler = "cqueues" })
    local loop, err = cqueues.new(), nil
    loop:wrap(function() err = support.raised(waiter.lock, waiter, "x") end)
    loop:wrap(function()
      while not support.is_waiting(waiter.backend_pid) do cqueues.sleep(0.005) end
      assert.is_true(waiter:cancel())
    end)
    assert(loop:loop())
    assert.equal("interrupted", err.code)
    assert.is_true(waiter:alive())
    assert.equal(1, #support.pg_locks())
    lock:release()
    assert.is_true(waiter:lock("x", { timeout = 0 }):release())
    assert.is_true(waiter:ping())
  end)

  it_with_pooler("tells that the session behind it is lost", function()
    local told = {}
    local conn = connect("session", {
      on_lost = function(_, err, locks) told[#told + 1] = { err.code, #locks } end,
    })
    local lock = conn:lock "x"
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    wait_until("the loss", function() return not lock:held() end)
    assert.same({ { "lost", 1 } }, told)
    assert_code("lost", lock.release, lock)
    assert.same({}, support.pg_locks())
  end)
end)

describe("a pooler of transactions, said to pool sessions,", function()
  before_each(function() start() end)
  after_each(function()
    stop()
    support.finish()
  end)

  local KEY = 42

  -- The server's session that `conn` came to is somebody else's from now on, and `conn` will be heard
  -- by another one, of which this returns the pid. There, somebody else has locked KEY, shared.
  local function replace(conn)
    local occupant = connect "transaction"
    occupant:query "BEGIN"
    assert.equal(conn.backend_pid, occupant:query("SELECT pg_backend_pid() AS pid")[1].pid)
    local stranger = connect "transaction"
    stranger:query("SELECT pg_advisory_lock_shared($1)", KEY)
    local pid = stranger:query("SELECT pg_backend_pid() AS pid")[1].pid
    assert.not_equal(conn.backend_pid, pid)
    return pid
  end

  -- What is locked where, of the advisory locks.
  local function locked(pid)
    local modes = {}
    for _, row in ipairs(support.pg_locks(pid)) do modes[#modes + 1] = row.objid .. " " .. row.mode end
    return modes
  end
  local SHARED = { KEY .. " ShareLock" }

  it_with_pooler("is refused when it changes sessions meanwhile (row 23, connecting)", function()
    local occupant, next_one, blocker = connect "transaction", connect "transaction", support.connect()
    occupant:query "BEGIN"
    local client = phases.stuck_connecting(blocker, conninfo "transaction", '{ pooled = "session" }')
    support.begin(next_one, "query", "BEGIN") -- gets the client's session as soon as that is free
    connect_without_a_look("transaction"):close() -- and by now the pooler knows of it
    blocker:query "COMMIT"
    support.complete(next_one)
    occupant:query "COMMIT"
    assert.equal("pooled", (client.wait()))
    next_one:query "COMMIT"
  end)

  it_with_pooler("has nobody's locks released by a release (row 23, releasing)", function()
    local told = {}
    local conn = connect("transaction", { on_lost = function(_, err) told[#told + 1] = tostring(err) end })
    local lock = conn:lock(KEY, { shared = true })
    assert.same(SHARED, locked(conn.backend_pid))
    local other = replace(conn)

    assert_code("pooled", lock.release, lock)
    assert.same(SHARED, locked(other))
    assert.same(SHARED, locked(conn.backend_pid))
    assert.is_false(lock:held())
    assert.is_false(conn:alive())
    assert.same({ nil, "not held" }, { lock:release() })
    assert_code("lost", conn.lock, conn, KEY, { shared = true })
    assert.equal(1, #told)
    assert.is_truthy(told[1]:find("pooler", 1, true), told[1])
  end)

  it_with_pooler("has nobody's locks released by a deferred release, whose connection tells it"
    .. " (row 23, releasing)", function()
    local told = {}
    local conn = connect("transaction", {
      release = "deferred", on_lost = function(_, err) told[#told + 1] = tostring(err) end,
    })
    local lock = conn:lock(KEY, { shared = true })
    local other = replace(conn)
    assert.is_true(lock:release())
    wait_until("the answer", function() return not conn:alive() end)
    assert.equal(1, #told)
    assert.is_truthy(told[1]:find("pooler", 1, true), told[1])
    assert.same(SHARED, locked(other))
  end)

  it_with_pooler("has nobody's locks released by close() (row 23, releasing)", function()
    local conn = connect "transaction"
    local lock = conn:lock(KEY, { shared = true })
    local other = replace(conn)
    conn:close()
    assert.is_false(lock:held())
    assert.same(SHARED, locked(other))
  end)

  for name, call in pairs {
    ["a check"] = function(_, lock) lock:check() end,
    ["a lock"] = function(conn) conn:lock(KEY + 1) end,
    ["a lock with a timeout"] = function(conn) conn:lock(KEY + 1, { timeout = 5 }) end,
    ["a try_lock"] = function(conn) conn:try_lock(KEY + 1) end,
    ["a lock_all"] = function(conn) conn:lock_all { KEY + 1, KEY + 2 } end,
    ["a lock_all with a timeout"] = function(conn) conn:lock_all({ KEY + 1, KEY + 2 }, { timeout = 5 }) end,
    ["a try_lock_all"] = function(conn) conn:try_lock_all { KEY + 1, KEY + 2 } end,
    ["a shared try_lock"] = function(conn) conn:try_lock(KEY + 1, { shared = true }) end,
  } do
    it_with_pooler(("has nobody's locks taken for one's own, and none left behind, by %s (row 23, holding)")
      :format(name), function()
      local conn = connect "transaction"
      local lock = conn:lock(KEY, { shared = true })
      local other = replace(conn)
      assert_code("pooled", call, conn, lock)
      assert.is_false(lock:held())
      assert.is_false(conn:alive())
      assert.same(SHARED, locked(other))
    end)
  end
end)
