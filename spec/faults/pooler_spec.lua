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
    for _, one in ipairs { conn, direct } do
      local list = one:all_locks { key = "x" }
      assert.same({ conn.backend_pid, beside.backend_pid }, { list[1].pid, list[2].pid })
      assert.same({ conn.backend_pid }, list[2].blocked_by)
      assert.equal("x", list[2].name)
    end
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

  it_with_pooler("gives fencing tokens, and refuses them without fsync", function()
    finally(support.without_fsync)
    local conn, direct = connect "session", support.connect()
    if direct:query("SHOW fsync")[1].fsync == "off" then
      assert_code("server", conn.lock, conn, "x", { token = true })
      assert.same({}, support.pg_locks())
    end
    support.with_fsync()
    wait_until("fsync", function()
      return conn:query("SHOW fsync")[1].fsync == "on" and direct:query("SHOW fsync")[1].fsync == "on"
    end)
    local last = 0
    for _, one in ipairs { conn, direct, conn, conn } do
      local lock = one:lock("x", { token = true })
      assert.is_true(lock.token > last)
      last = lock.token
      lock:release()
    end
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

describe("a pooler of transactions, said to be one,", function()
  local observe, pg_locks = support.observe, support.pg_locks

  -- Time-outs of the role that would end any holder, or waiter.
  local function set_hostile(value)
    for _, name in ipairs { "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout" } do
      observe(("ALTER ROLE CURRENT_USER %s"):format(value and ("SET %s = '%s'"):format(name, value)
        or "RESET " .. name))
    end
  end

  local function connect_to(options)
    options = options or {}
    options.conninfo, options.pooled = conninfo "transaction", "transaction"
    return support.connect(options)
  end

  before_each(function() start() end)
  after_each(function()
    if not pooler.missing then set_hostile(nil) end
    pglocks.setup {}
    support.finish()
    stop()
  end)

  -- Of every server's session that it has.
  local function assert_untouched()
    local first, second = connect_to(), connect_to()
    first:query "BEGIN" -- takes one of both
    local pids = {}
    for i, conn in ipairs { first, second } do
      pids[i] = conn:query("SELECT pg_backend_pid() AS pid")[1].pid
      assert.equal(0, conn:query("SELECT count(*) AS n FROM pg_prepared_statements")[1].n)
      assert.equal(0, conn:query("SELECT count(*) AS n FROM pg_settings WHERE source = 'session'"
        .. " AND name NOT IN ('application_name', 'client_encoding', 'DateStyle', 'TimeZone')")[1].n)
      assert.equal(0, conn:query("SELECT count(*) AS n FROM pg_listening_channels() c")[1].n)
      assert.same({}, pg_locks(pids[i]))
    end
    assert.not_equal(pids[1], pids[2])
    first:query "COMMIT"
  end

  it_with_pooler("gives locks of transactions, that exclude others there and elsewhere", function()
    local conn, beside, direct = connect_to(), connect_to(), support.connect()
    assert.is_true(conn.is_pooled)
    local lock = conn:lock "x"
    assert.equal("transaction", lock.scope)
    assert.is_true(lock:check())
    assert.equal(1, #pg_locks())
    for _, other in ipairs { beside, direct } do
      assert.same({ nil, "busy" }, { other:try_lock "x" })
      assert.same({ nil, "timeout" }, { other:try_lock("x", { timeout = 0.05 }) })
      assert_code("timeout", other.lock_all, other, { 42, "x" }, { timeout = 0.05 })
      assert.same({ nil, "busy" }, { other:try_lock_all { 42, "x" } })
      assert.same({ nil, "timeout" }, { other:try_lock("x", { timeout = 0.05, strategy = "notify" }) })
    end
    wait_until("the marker's end", function() return #pg_locks() == 1 end)
    support.begin(beside, "lock", "x", { timeout = 5 })
    wait_until("the wait", function() return #pg_locks() == 2 end)
    assert.is_true(lock:release())
    lock = support.complete(beside)
    assert.is_true(lock:release())
    for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true }, { comment = true } } do
      local all = conn:lock_all({ 42, "x", { 7, 42 } }, options)
      assert.equal(3, #pg_locks())
      assert.is_true(all:check())
      assert.is_true(all:release())
      assert.is_true(conn:lock({ 7, 42 }, options):release())
    end
    assert_untouched()
  end)

  it_with_pooler("has no lock ended by time-outs of the role, and leaves no setting behind", function()
    set_hostile "150ms"
    local conn, beside = connect_to(), connect_to()
    local lock = conn:lock "x"
    assert.same({ nil, "timeout" }, { beside:try_lock("x", { timeout = 0.4 }) })
    assert.is_true(lock:check())
    conn:query "SELECT pg_sleep(0.3)"
    assert.is_true(lock:release())
    conn:transaction(function()
      conn:query "SELECT pg_sleep(0.3)"
      assert.same({ true, "held until the transaction ends" }, { conn:lock("x"):release() })
    end)
    assert.equal("150ms", conn:query("SHOW statement_timeout")[1].statement_timeout)
    assert_untouched()
  end)

  it_with_pooler("refuses what it cannot carry (row 23, holding)", function()
    local conn = connect_to()
    for _, options in ipairs { { scope = "session" }, { token = true }, { slots = 2 } } do
      local err = assert_code("pooled", conn.lock, conn, "x", options)
      assert.is_truthy(err.message:find("pooler of transactions", 1, true), err.message)
    end
    assert_code("pooled", conn.lock_all, conn, { "x" }, { scope = "session" })
    assert.same({}, pg_locks())
    conn:lock("x"):release()
  end)

  it_with_pooler("has everything rolled back, and let go, that was not committed", function()
    local conn = connect_to()
    observe "CREATE TABLE pooled (i int)"
    finally(function() observe "DROP TABLE pooled" end)
    local lock = conn:lock "x"
    conn:query "INSERT INTO pooled VALUES (1)"
    getmetatable(lock).__close(lock)
    pcall(conn.with_lock, conn, "x", function()
      conn:query "INSERT INTO pooled VALUES (1)"
      error "oops"
    end)
    conn:lock "y"
    collectgarbage()
    collectgarbage()
    assert.is_true(conn:ping())
    conn:lock "z"
    conn:query "INSERT INTO pooled VALUES (1)"
    conn:close()
    wait_until("the end", function() return #pg_locks() == 0 end)
    assert.equal(0, observe("SELECT count(*) AS n FROM pooled")[1].n)
    assert_untouched()
  end)

  it_with_pooler("frees the lock of a client that was killed, and forgets one that waited", function()
    local script = [[
      local conn = require "pglocks".connect { conninfo = ..., pooled = "transaction" }
      local lock = conn:lock "x"
      print "held"
      io.stdout:flush()
      require "system".sleep(60)
    ]]
    local holder = support.spawn(script, conninfo "transaction")
    assert.equal("held", holder.lines())
    local waiter = support.spawn(script, conninfo "transaction")
    wait_until("the wait", function() return #pg_locks() == 2 end)
    support.signal("KILL", waiter.pid)
    waiter.close()
    support.signal("KILL", holder.pid)
    holder.close()
    wait_until("the locks' end", function() return #pg_locks() == 0 end, 15)
    connect_to():lock("x", { timeout = 5 }):release()
  end)

  it_with_pooler("works for the module's functions, and in an event loop", function()
    local described = { conninfo = conninfo "transaction", pooled = "transaction" }
    pglocks.setup { databases = { default = described } }
    assert.equal("transaction", pglocks.with_lock("x", { timeout = 5 }, function(lock) return lock.scope end))
    pglocks.setup { databases = { default = described }, scheduler = "cqueues" }
    local loop, most, inside = cqueues.new(), 0, 0
    for _ = 1, 5 do
      loop:wrap(function()
        pglocks.with_lock("x", { timeout = 5 }, function()
          inside = inside + 1
          most = math.max(most, inside)
          cqueues.sleep(0.01)
          inside = inside - 1
        end)
      end)
    end
    assert(loop:loop())
    assert.equal(1, most)
  end)

  it_with_pooler("is not needed: a direct connection does the same", function()
    local conn = support.connect { pooled = "transaction" }
    assert.equal("transaction", conn:lock("x").scope)
    assert_code("pooled", conn.lock, conn, "y", { scope = "session" })
  end)

  it_with_pooler("counts a lease in its transactions", function()
    if support.connect().server_version < 140000 then
      assert_code("server", connect_to, { lease = 0.3 })
      return
    end
    local conn = connect_to { lease = 0.3 }
    local lock = conn:lock "x"
    wait_until("the end of the lease", function() return #pg_locks() == 0 end)
    wait_until("the loss", function() return not lock:held() end)
    assert_code("lost", lock.release, lock)
  end)
end)
