-- scope = "transaction": the lock ends with the transaction that it began, or that it joined.

local cqueues = require "cqueues"

local pglocks = require "pglocks"
local support = require "spec.support"

local core = support.core
local connect, observe, pg_locks = support.connect, support.observe, support.pg_locks
local assert_code, assert_raises, wait_until = support.assert_code, support.assert_raises, support.wait_until

local TRANSACTION = { scope = "transaction" }

local function with(options)
  local all = { scope = "transaction" }
  for name, value in pairs(options) do all[name] = value end
  return all
end

-- What its scope does when it ends without release().
local function close(lock, err) getmetatable(lock).__close(lock, err) end

local function state(conn)
  local row = observe("SELECT state, backend_xmin FROM pg_stat_activity WHERE pid = $1", conn.backend_pid)[1]
  return row.state, row.backend_xmin
end

local function assert_idle(conn)
  wait_until("the end of the transaction", function() return state(conn) == "idle" end)
  assert.is_false(core.in_transaction(conn))
  assert.same({}, pg_locks(conn.backend_pid))
  assert.same({}, conn:locks())
end

local function written() return observe("SELECT count(*) AS n FROM written")[1].n end

local function write(conn) conn:query "INSERT INTO written VALUES (1)" end

describe("a lock of the transaction's scope", function()
  setup(function()
    observe "CREATE TABLE written (i int, UNIQUE (i) DEFERRABLE INITIALLY DEFERRED)"
  end)
  teardown(function() observe "DROP TABLE written" end)
  before_each(function() observe "TRUNCATE written" end)
  after_each(function()
    pglocks.setup {}
    support.finish()
  end)

  -- ---- a transaction of its own -----------------------------------------------------------

  for name, options in pairs {
    ["without a timeout"] = {}, ["with a timeout"] = { timeout = 5 }, ["by a try"] = { timeout = 0 },
    ["shared"] = { shared = true }, ["with a comment"] = { comment = true },
  } do
    it("begins a transaction, which release() commits, " .. name, function()
      local conn = connect()
      for _, key in ipairs { "x", 42, { 7, 42 } } do
        observe "TRUNCATE written"
        local lock = conn:lock(key, with(options))
        assert.equal("transaction", lock.scope)
        assert.is_true(lock:held())
        assert.is_true(lock:check())
        assert.equal(1, #pg_locks(conn.backend_pid))
        assert.equal("idle in transaction", (state(conn)))
        write(conn)
        assert.equal(0, written())
        assert.same({ true }, { lock:release() })
        assert.equal(1, written())
        assert.is_false(lock:held())
        assert.same({ nil, "not held" }, { lock:release() })
        assert_code("not_held", lock.check, lock)
        assert_idle(conn)
      end
    end)
  end

  it("keeps others out, and lets them in", function()
    local conn, other = connect(), connect()
    local lock = conn:lock("x", TRANSACTION)
    assert.same({ nil, "busy" }, { other:try_lock "x" })
    support.begin(other, "lock", "x", TRANSACTION)
    support.wait_until_waiting(other.backend_pid)
    lock:release()
    local next_one = support.complete(other)
    assert.is_true(next_one:held())
    assert.is_true(next_one.waited > 0)
    next_one:release()
  end)

  it("holds no snapshot", function()
    local conn = connect()
    for _, options in ipairs { TRANSACTION, with { timeout = 5 }, with { timeout = 0 } } do
      local lock = conn:lock("x", options)
      local what, xmin = state(conn)
      assert.equal("idle in transaction", what)
      assert.is_nil(xmin)
      lock:release()
      lock = conn:lock_all({ "x", "y" }, options)
      assert.is_nil((select(2, state(conn))))
      lock:release()
    end
  end)

  it("takes one round trip to begin and to lock", function()
    local conn = connect()
    conn:lock("x", TRANSACTION):release()
    support.begin(conn, "lock", "x", TRANSACTION)
    wait_until("the lock", function() return #pg_locks(conn.backend_pid) == 1 end)
    wait_until("the answer", function() return (state(conn)) == "idle in transaction" end)
    assert.is_nil((core.step(conn))) -- it is all there
    core.finish(conn):release()
  end)

  -- ---- what rolls back --------------------------------------------------------------------

  it("is rolled back by the end of a scope without release()", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    write(conn)
    close(lock)
    assert.is_false(core.in_transaction(conn))
    assert.same({}, pg_locks())
    assert.equal(0, written())
    assert.is_false(lock:held())
    assert.same({ nil, "not held" }, { lock:release() })
    close(lock)
    assert_idle(conn)
  end)

  it("is rolled back by its collection", function()
    local conn = connect()
    conn:lock("x", TRANSACTION)
    write(conn)
    collectgarbage()
    collectgarbage()
    assert_idle(conn)
    assert.equal(0, written())
    write(conn) -- not in any transaction
    assert.equal(1, written())
  end)

  it("is rolled back by close()", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    write(conn)
    conn:close()
    assert.equal(0, written())
    assert.same({}, pg_locks())
    assert.is_false(lock:held())
  end)

  it("is committed when with_lock's function returns, and rolled back when it raises", function()
    local conn = connect()
    assert.equal("done", conn:with_lock("x", TRANSACTION, function(lock)
      assert.is_true(lock:held())
      write(conn)
      return "done"
    end))
    assert.equal(1, written())
    local thrown = {}
    assert.equal(thrown, support.raised(conn.with_lock, conn, "x", TRANSACTION, function()
      write(conn)
      error(thrown)
    end))
    assert.equal(1, written())
    assert_idle(conn)
    assert.same({ true, 7 }, { conn:try_with_lock("x", TRANSACTION, function() return 7 end) })
  end)

  it("is rolled back with the coroutine that has it, in an event loop", function()
    local conn = connect { scheduler = "cqueues" }
    local loop = cqueues.new()
    loop:wrap(function()
      local lock = conn:lock("x", TRANSACTION)
      write(conn)
      close(lock)
      conn:ping()
      assert.equal(0, written())
      assert_idle(conn)
      write(conn)
      assert.equal(1, written())
    end)
    assert(loop:loop())
  end)

  it("is rolled back as soon as a call of another coroutine on its connection is over", function()
    local conn, blocker = connect(), connect()
    local lock = conn:lock("x", TRANSACTION)
    local busy = blocker:lock "y"
    write(conn)
    support.begin(conn, "lock", "y", { timeout = 5 })
    support.wait_until_waiting(conn.backend_pid)
    close(lock)
    assert.is_false(lock:held())
    assert.equal(2, #pg_locks(conn.backend_pid))
    busy:release()
    local y = support.complete(conn)
    wait_until("the rollback", function() return #pg_locks(conn.backend_pid) == 1 end)
    assert.equal(0, written())
    assert.is_true(y:check())
    y:release()
  end)

  it("is not returned as held, nor confirmed, when the lock that began its transaction was let go", function()
    local conn, blocker = connect(), connect()
    for _, timeout in ipairs { false, 5 } do
      local lock, busy = conn:lock("x", TRANSACTION), blocker:lock "y"
      write(conn)
      support.begin(conn, timeout and "try_lock" or "lock", "y", with { timeout = timeout or nil })
      support.wait_until_waiting(conn.backend_pid)
      close(lock)
      busy:release()
      local err = support.raised(support.complete, conn)
      assert.equal("aborted_transaction", err.code)
      assert.equal(pglocks.key "y", err.key)
      assert_idle(conn)
    end
    local lock, joined = conn:lock("x", TRANSACTION), conn:lock("y", TRANSACTION)
    core.start.check(joined)
    close(lock)
    assert.equal("not_held", support.raised(support.complete, conn).code)
    assert_idle(conn)
    assert.equal(0, written())
  end)

  -- ---- joining ----------------------------------------------------------------------------

  it("joins the transaction of another, and is held until that ends", function()
    local conn = connect()
    local first, second = conn:lock("x", TRANSACTION), conn:lock("y", with { timeout = 5 })
    assert.same({ true, "held until the transaction ends" }, { second:release() })
    assert.is_false(second:held())
    assert.same({ nil, "not held" }, { second:release() })
    assert.equal(2, #pg_locks(conn.backend_pid))
    local third = conn:lock("z", TRANSACTION)
    close(third)
    assert.equal(3, #pg_locks(conn.backend_pid))
    assert.is_true(first:held())
    write(conn)
    local fourth = conn:lock("y", TRANSACTION) -- ours already
    assert.is_true(first:release())
    assert.equal(1, written())
    assert.is_false(fourth:held())
    assert.same({ nil, "not held" }, { fourth:release() })
    close(fourth)
    assert_idle(conn)
  end)

  it("joins conn:transaction, and says so", function()
    local conn = connect()
    local lock
    conn:transaction(function()
      lock = conn:lock("x", TRANSACTION)
      write(conn)
      assert.same({ true, "held until the transaction ends" }, { lock:release() })
      conn:with_lock("y", TRANSACTION, function() write(conn) end)
      assert.equal(2, #pg_locks(conn.backend_pid))
      conn:query "DELETE FROM written WHERE ctid IN (SELECT min(ctid) FROM written)"
    end)
    assert.equal(1, written())
    assert_idle(conn)
    assert_raises("oops", conn.transaction, conn, function()
      lock = conn:lock("x", TRANSACTION)
      write(conn)
      error "oops"
    end)
    assert.is_false(lock:held())
    assert.equal(1, written())
    assert_idle(conn)
  end)

  it("does not let conn:transaction begin inside it", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    assert_code("server", conn.transaction, conn, function() end)
    assert.is_true(lock:held())
    lock:release()
  end)

  it("ends with a COMMIT or ROLLBACK of the user's own", function()
    local conn = connect()
    for _, sql in ipairs { "COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "ROLLBACK AND CHAIN" } do
      local lock, joined = conn:lock("x", TRANSACTION), conn:lock("y", TRANSACTION)
      conn:query(sql)
      assert.is_false(lock:held())
      assert.is_false(joined:held())
      assert.same({}, conn:locks())
      assert.same({}, pg_locks(conn.backend_pid))
      assert.same({ nil, "not held" }, { lock:release() })
      assert.same({ nil, "not held" }, { joined:release() })
      if core.in_transaction(conn) then conn:query "ROLLBACK" end
    end
    assert_idle(conn)
  end)

  it("does not roll back the transaction that a CHAIN of the user's has begun", function()
    local conn = connect()
    for i, sql in ipairs { "ROLLBACK AND CHAIN", "COMMIT AND CHAIN" } do
      local lock, joined = conn:lock("x", TRANSACTION), conn:lock({ 7, 42 }, with { shared = true })
      conn:query(sql)
      close(lock)
      close(joined)
      assert.is_true(core.in_transaction(conn))
      conn:query("INSERT INTO written VALUES ($1)", i)
      conn:lock("x", TRANSACTION)
      conn:query "COMMIT"
      assert.equal(i, written())
      assert_idle(conn)
    end
  end)

  it("still rolls back after ROLLBACK TO a savepoint", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    conn:query "SAVEPOINT here"
    conn:lock({ 7, 42 }, TRANSACTION)
    conn:query "ROLLBACK TO here"
    write(conn)
    close(lock)
    assert_idle(conn)
    assert.equal(0, written())
  end)

  it("is known not to be held after ROLLBACK TO a savepoint before it", function()
    local conn = connect()
    conn:transaction(function()
      local before = conn:lock("before", TRANSACTION)
      conn:query "SAVEPOINT here"
      local locks = { conn:lock("x", TRANSACTION), conn:lock({ 7, 42 }, with { shared = true }) }
      local again = conn:lock("before", TRANSACTION)
      conn:query "ROLLBACK TO here"
      for _, lock in ipairs(locks) do
        assert.is_false(lock:held())
        assert_code("not_held", lock.check, lock)
        assert.same({ nil, "not held" }, { lock:release() })
      end
      assert.is_true(before:check())
      assert.is_true(again:held())
      assert.equal(1, #conn:locks())
      assert.is_true(conn:lock("x", TRANSACTION):check())
      conn:query "RELEASE here"
      assert.equal(2, #conn:locks())
    end)
  end)

  it("is lost with its session where nobody can tell which locks a ROLLBACK has left", function()
    observe "CREATE ROLE blind LOGIN"
    observe "CREATE DATABASE blind"
    finally(function()
      support.finish()
      observe "DROP DATABASE blind"
      observe "DROP ROLE blind"
    end)
    connect { dbname = "blind" }:query "REVOKE SELECT ON pg_catalog.pg_locks FROM PUBLIC"
    local told
    local conn = connect { dbname = "blind", user = "blind", on_lost = function(_, err) told = err end }
    local lock = conn:lock("x", TRANSACTION)
    conn:query "SAVEPOINT here"
    assert.equal("42501", assert_code("lost", conn.query, conn, "ROLLBACK TO here").sqlstate)
    assert.equal("42501", told.sqlstate)
    assert.is_false(conn:alive())
    assert.is_false(lock:held())
    assert_code("lost", lock.release, lock)
    local still_there = "SELECT 1 FROM pg_stat_activity WHERE usename = 'blind'"
    wait_until("the end of the session", function() return #observe(still_there) == 0 end)
  end)

  it("is listed with its scope and count", function()
    local conn = connect()
    local session = conn:lock "s"
    conn:lock("x", TRANSACTION)
    local lock = conn:lock("x", with { shared = true })
    conn:lock("x", TRANSACTION)
    local found = {}
    for _, held in ipairs(conn:locks()) do
      found[#found + 1] = ("%s %s %s %d"):format(held.name, held.mode, held.scope, held.count)
    end
    table.sort(found)
    assert.same({ "s exclusive session 1", "x exclusive transaction 2", "x shared transaction 1" }, found)
    assert.is_true(lock.shared)
    conn:query "COMMIT"
    assert.equal(1, #conn:locks())
    session:release()
  end)

  it("is not taken on a key that the connection holds in the other scope", function()
    local conn = connect()
    local session = conn:lock "x"
    for _, shared in ipairs { false, true } do
      assert_raises("bad argument #2", conn.lock, conn, "x", with { shared = shared })
      assert_raises("holds the key in session scope", conn.lock_all, conn, { "x", "y" }, with { shared = shared })
    end
    session:release()
    local lock = conn:lock("x", with { shared = true })
    assert_raises("bad argument #2 to 'try_lock'", function() conn:try_lock "x" end)
    assert_raises("until its transaction ends", conn.lock_all, conn, { "x", "y" })
    lock:release()
    conn:lock("x"):release()
    assert_idle(conn)
  end)

  -- ---- what fails -------------------------------------------------------------------------

  it("leaves no transaction behind when it was not to be had", function()
    local conn, other = connect(), connect()
    local busy = other:lock "x"
    for _, keys in ipairs { "x", { "w", "x", "y" } } do
      local all = type(keys) == "table" and "_all" or ""
      assert.same({ nil, "busy" }, { conn["try_lock" .. all](conn, keys, TRANSACTION) })
      assert_idle(conn)
      assert.same({ nil, "timeout" }, { conn["try_lock" .. all](conn, keys, with { timeout = 0.02 }) })
      assert_idle(conn)
      local err = assert_code("timeout", conn["lock" .. all], conn, keys, with { timeout = 0.02 })
      assert.equal("55P03", err.sqlstate)
      assert_idle(conn)
      assert_code("timeout", conn["lock" .. all], conn, keys, with { timeout = 0 })
      assert_idle(conn)
    end
    busy:release()
    conn:lock("x", TRANSACTION):release()
  end)

  it("neither aborts the user's transaction nor leaves its lock_timeout there", function()
    local conn, other = connect(), connect()
    local busy = other:lock "x"
    conn:transaction(function()
      conn:query "SET LOCAL lock_timeout = '42s'"
      write(conn)
      for _, keys in ipairs { "x", { "w", "x", "y" } } do
        local all = type(keys) == "table" and "_all" or ""
        assert.same({ nil, "busy" }, { conn["try_lock" .. all](conn, keys, TRANSACTION) })
        assert.same({}, pg_locks(conn.backend_pid))
        assert.same({ nil, "timeout" }, { conn["try_lock" .. all](conn, keys, with { timeout = 0.02 }) })
        assert_code("timeout", conn["lock" .. all], conn, keys, with { timeout = 0.02 })
        assert.same({}, pg_locks(conn.backend_pid))
        assert.equal("42s", conn:query("SHOW lock_timeout")[1].lock_timeout)
      end
      conn:lock("y", with { timeout = 5 })
      conn:lock_all({ "z", 1, { 1, 2 } }, with { timeout = 5 })
      conn:try_lock_all({ "a", 2, { 1, 3 } }, TRANSACTION)
      assert.equal("42s", conn:query("SHOW lock_timeout")[1].lock_timeout)
      assert.equal(7, #pg_locks(conn.backend_pid))
    end)
    assert.equal(1, written())
    busy:release()
    assert_idle(conn)
  end)

  it("sets lock_timeout back in a transaction of its own", function()
    local conn = connect()
    for _, take in ipairs { function() return conn:lock("x", with { timeout = 5 }) end,
      function() return conn:lock_all({ "x", "y" }, with { timeout = 5 }) end } do
      local lock = take()
      assert.equal("0", conn:query("SHOW lock_timeout")[1].lock_timeout)
      lock:release()
    end
  end)

  it("takes many locks, or none", function()
    local conn = connect()
    for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true },
      { shared = true, timeout = 5 }, { shared = true, timeout = 0 } } do
      local lock = conn:lock_all({ 42, "x", { 7, 42 }, 42 }, with(options))
      assert.equal(3, #lock.keys)
      assert.is_true(lock:check())
      assert.equal(3, #pg_locks(conn.backend_pid))
      local more = conn:lock_all({ 42, 43 }, with(options))
      assert.equal(4, #pg_locks(conn.backend_pid))
      assert.is_true(more:check())
      assert.is_true(lock:release())
      assert.is_false(more:held())
      assert_idle(conn)
    end
  end)

  it("keeps what it had when a wait for more fails", function()
    local conn, other = connect(), connect()
    local busy = other:lock "b"
    local lock = conn:lock("a", TRANSACTION)
    for _ = 1, 3 do
      assert_code("timeout", conn.lock_all, conn, { "a", "b", "c" }, with { timeout = 0.02 })
      assert.same({ nil, "busy" }, { conn:try_lock_all({ "a", "b", "c" }, TRANSACTION) })
    end
    assert.equal(1, #pg_locks(conn.backend_pid))
    assert.equal(1, conn:locks()[1].count)
    assert.is_true(lock:check())
    busy:release()
    assert.is_true(lock:release())
  end)

  -- ---- aborted transactions ---------------------------------------------------------------

  it("is not known to be held once a statement has failed, and its release rolls back (row 28, holding)", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    write(conn)
    assert_code("server", conn.query, conn, "SELECT 1 / 0")
    assert.same({}, pg_locks(conn.backend_pid)) -- so it is
    assert.is_false(lock:held())
    assert.same({}, conn:locks())
    assert_code("aborted_transaction", lock.check, lock)
    assert_code("aborted_transaction", conn.lock, conn, "y", TRANSACTION)
    assert_code("aborted_transaction", conn.lock, conn, "x", TRANSACTION) -- which it has
    assert_code("aborted_transaction", conn.try_lock_all, conn, { "y", "z" }, TRANSACTION)
    local err = assert_code("aborted_transaction", lock.release, lock)
    assert.equal(pglocks.key "x", err.key)
    assert_idle(conn)
    assert.equal(0, written())
  end)

  it("raises the first error, not what follows from it (row 28, releasing)", function()
    local conn = connect()
    local err = support.raised(conn.with_lock, conn, "x", TRANSACTION, function()
      conn:query "SELECT 1 / 0"
    end)
    assert.equal("22012", err.sqlstate)
    assert_idle(conn)
    err = support.raised(conn.transaction, conn, function()
      conn:with_lock("x", TRANSACTION, function() conn:query "SELECT 1 / 0" end)
    end)
    assert.equal("22012", err.sqlstate)
    assert_idle(conn)
    -- one that the function has caught
    assert_code("aborted_transaction", conn.with_lock, conn, "x", TRANSACTION, function()
      pcall(conn.query, conn, "SELECT 1 / 0")
    end)
    assert_idle(conn)
  end)

  it("is held on after ROLLBACK TO a savepoint that came after it", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    conn:query "SAVEPOINT here"
    assert_code("server", conn.query, conn, "SELECT 1 / 0")
    assert.is_false(lock:held())
    conn:query "ROLLBACK TO here"
    assert.is_true(lock:held())
    assert.is_true(lock:check())
    assert.is_true(lock:release())
  end)

  it("has session locks released inside it let go when it aborts (row 28, releasing)", function()
    local conn = connect()
    local session = conn:lock "s"
    local err = support.raised(conn.with_lock, conn, "x", TRANSACTION, function()
      pcall(conn.query, conn, "SELECT 1 / 0")
      assert.is_true(session:release())
      error "first"
    end)
    assert.is_truthy(tostring(err):find("first", 1, true))
    assert_idle(conn)
    session = conn:lock "s"
    conn:with_lock("x", TRANSACTION, function() assert.is_true(session:release()) end)
    assert_idle(conn)
    session = conn:lock "s"
    local lock = conn:lock("x", TRANSACTION)
    session:release()
    assert.equal(1, #pg_locks(conn.backend_pid))
    assert_code("server", conn.query, conn, "SELECT 1 / 0")
    close(lock)
    assert_idle(conn)
  end)

  it("lets session locks be taken inside it, which stay", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    local session = conn:lock("s", { timeout = 5 })
    lock:release()
    assert.is_true(session:check())
    assert.equal(1, #pg_locks(conn.backend_pid))
    session:release()
  end)

  -- ---- COMMIT -----------------------------------------------------------------------------

  it("raises what COMMIT fails with, and is free", function()
    local conn = connect()
    local lock = conn:lock("x", TRANSACTION)
    write(conn)
    write(conn) -- twice, which is found out at the end
    local err = assert_code("server", lock.release, lock)
    assert.equal("23505", err.sqlstate)
    assert.equal(pglocks.key "x", err.key)
    assert_idle(conn)
    assert.equal(0, written())
    local raised = assert_code("server", conn.with_lock, conn, "x", TRANSACTION, function()
      write(conn)
      write(conn)
    end)
    assert.equal("23505", raised.sqlstate)
    assert_idle(conn)
    lock = conn:lock_all({ "x", "y" }, TRANSACTION)
    write(conn)
    write(conn)
    err = assert_code("server", lock.release, lock)
    assert.equal("23505", err.sqlstate)
    assert.is_nil(err.key)
    assert_idle(conn)
  end)

  it("has an unknown outcome when the session is lost at COMMIT (row 8, releasing)", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local told = {}
    local conn = connect { on_lost = function(_, err, locks) told[#told + 1] = { err.code, #locks } end }
    local lock, witness = conn:lock("x", TRANSACTION), connect()
    support.signal("STOP", conn.backend_pid)
    core.start.release(lock)
    support.signal("KILL", conn.backend_pid)
    local err = support.raised(support.complete, conn)
    assert.equal("unknown", err.code)
    assert.is_truthy(err.message:find("commit", 1, true), err.message)
    assert.is_number(err.free_by)
    assert.same({ { "lost", 1 } }, told)
    assert.is_false(lock:held())
    wait_until("the crash", function() return not witness:alive() end) -- of all sessions
    wait_until("the server", function() return pcall(observe, "SELECT 1") end)
  end)

  it("is lost with its session, and then nothing is committed (row 8, holding)", function()
    local conn = connect()
    local lock, joined = conn:lock("x", TRANSACTION), conn:lock("y", TRANSACTION)
    write(conn)
    observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    wait_until("the loss", function() return not lock:held() end)
    assert_code("lost", joined.release, joined)
    assert_code("lost", lock.release, lock)
    assert.same({ nil, "not held" }, { lock:release() })
    assert.equal(0, written())
  end)

  it("is committed at once in an event loop, although releases are deferred there", function()
    local conn = connect { scheduler = "cqueues" }
    local loop = cqueues.new()
    loop:wrap(function()
      local lock = conn:lock("x", TRANSACTION)
      write(conn)
      assert.is_true(lock:release())
      assert.equal(1, written())
      lock = conn:lock("x", TRANSACTION)
      write(conn)
      assert_code("server", lock.release, lock)
      assert_idle(conn)
    end)
    assert(loop:loop())
  end)

  it("is committed later with release = \"deferred\", which on_lost tells when it fails", function()
    local told = {}
    local conn = connect {
      release = "deferred",
      on_lost = function(_, err, locks) told[#told + 1] = { err.code, err.sqlstate, err.key, #locks } end,
    }
    for _ = 1, 3 do
      local lock = conn:lock("x", TRANSACTION)
      assert.is_true(lock:release())
      assert.is_false(lock:held())
    end
    local lock = conn:lock("x", TRANSACTION)
    write(conn)
    assert.is_true(lock:release())
    conn:ping()
    assert.equal(1, written())
    lock = conn:lock("x", TRANSACTION)
    write(conn)
    assert.is_true(lock:release())
    assert.is_true(conn:ping())
    assert.is_true(conn:alive())
    assert.same({ { "server", "23505", pglocks.key "x", 0 } }, told)
    lock = conn:lock("x", TRANSACTION)
    pcall(conn.query, conn, "SELECT 1 / 0")
    assert_code("aborted_transaction", lock.release, lock) -- as is known already
    assert.is_true(conn:alive())
    assert.equal(1, #told)
    assert_idle(conn)
  end)

  -- ---- strikes ----------------------------------------------------------------------------

  it("leaves nothing behind when the wait is cancelled (row 9, waiting)", function()
    local conn, other = connect(), connect()
    local busy = other:lock "x"
    for _, options in ipairs { {}, { timeout = 5 } } do
      support.begin(conn, "lock", "x", with(options))
      support.wait_until_waiting(conn.backend_pid)
      observe("SELECT pg_cancel_backend($1)", conn.backend_pid)
      assert.equal("interrupted", support.raised(support.complete, conn).code)
      assert_idle(conn)

      conn:query "BEGIN"
      write(conn)
      support.begin(conn, "lock", "x", with(options))
      support.wait_until_waiting(conn.backend_pid)
      observe("SELECT pg_cancel_backend($1)", conn.backend_pid)
      assert.equal("interrupted", support.raised(support.complete, conn).code)
      conn:query "COMMIT"
      assert.equal(1, written())
      observe "TRUNCATE written"
      assert_idle(conn)
    end
    busy:release()
  end)

  it("is let go when cancel() comes with the grant, and else held until the transaction ends", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = connect(), connect()
    for _, joins in ipairs { false, true } do
      local busy = other:lock "x"
      if joins then conn:query "BEGIN" end
      support.begin(conn, "lock", "x", with { timeout = 5 })
      support.wait_until_waiting(conn.backend_pid)
      busy:release()
      wait_until("the grant", function() return (state(conn)) == "idle in transaction" end)
      assert.is_true(conn:cancel())
      local err = support.raised(support.complete, conn)
      assert.equal("interrupted", err.code)
      assert.equal(joins, err.message:find("until the transaction ends", 1, true) ~= nil)
      if joins then
        assert.equal("transaction", conn:locks()[1].scope)
        assert.equal(1, #pg_locks(conn.backend_pid))
        conn:query "COMMIT"
      end
      assert_idle(conn)
    end
  end)

  it("does not abort the user's transaction when cancel() comes with the grant", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = connect(), connect()
    local busy = other:lock "x"
    conn:query "BEGIN"
    write(conn)
    support.begin(conn, "lock", "x", { timeout = 5 })
    support.wait_until_waiting(conn.backend_pid)
    busy:release()
    wait_until("the grant", function() return (state(conn)) == "idle in transaction" end)
    assert.is_true(conn:cancel())
    assert.equal("interrupted", support.raised(support.complete, conn).code)
    assert.same({}, pg_locks(conn.backend_pid))
    conn:query "COMMIT"
    assert.equal(1, written())
    assert_idle(conn)
  end)

  it("has many that a try has got let go by cancel(), or held until the transaction ends", function()
    local conn = connect()
    for _, late in ipairs { false, true } do
      observe "TRUNCATE written"
      conn:query "BEGIN"
      write(conn)
      support.begin(conn, "try_lock_all", { "x", "y" }, TRANSACTION)
      wait_until("the answer", function()
        return #pg_locks(conn.backend_pid) == 2 and (state(conn)) == "idle in transaction"
      end)
      if late then assert.is_truthy((core.step(conn))) end -- its savepoint is being released
      assert.is_true(conn:cancel())
      local err = support.raised(support.complete, conn)
      assert.equal("interrupted", err.code)
      assert.equal(late, err.message:find("until the transaction ends", 1, true) ~= nil)
      assert.equal(late and 2 or 0, #pg_locks(conn.backend_pid))
      assert.equal(late and 2 or 0, #conn:locks())
      conn:query "COMMIT"
      assert.equal(1, written())
      assert_idle(conn)
    end
  end)

  it("reports a deadlock, and its transaction is gone (row 11, waiting)", function()
    local conn, other = connect(), connect()
    conn:query "SET deadlock_timeout = '20ms'" -- it looks first
    other:query "SET deadlock_timeout = '1min'"
    local mine, theirs = conn:lock("a", TRANSACTION), other:lock("b", TRANSACTION)
    support.begin(other, "lock", "a", TRANSACTION)
    support.wait_until_waiting(other.backend_pid)
    local first = support.raised(conn.lock, conn, "b", TRANSACTION)
    assert.equal("deadlock", first.code)
    assert.is_true(mine:check()) -- the savepoint has saved it
    mine:release()
    assert.is_true(support.complete(other):check())
    theirs:release()
    assert_idle(conn)
    assert_idle(other)
  end)

  it("is prepared anew when somebody has dropped its statement", function()
    local conn = connect()
    for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 } } do
      conn:lock("x", with(options)):release()
      conn:query "DEALLOCATE ALL"
      conn:lock("x", with(options)):release()
      conn:transaction(function()
        conn:lock("x", with(options))
        conn:query "DEALLOCATE ALL"
        conn:lock("y", with(options))
        assert.equal(2, #pg_locks(conn.backend_pid))
      end)
    end
    assert_idle(conn)
  end)

  it("is not held after the lock_timeout that struck with the grant (row 10, waiting)", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = connect(), connect()
    local busy = other:lock "x"
    support.begin(conn, "lock", "x", with { timeout = 0.1 })
    support.wait_until_waiting(conn.backend_pid)
    support.signal("STOP", conn.backend_pid)
    support.sleep(0.2)
    busy:release()
    support.signal("CONT", conn.backend_pid)
    local ok, lock = pcall(support.complete, conn)
    if ok then lock:release() else assert.equal("timeout", lock.code) end
    assert_idle(conn)
  end)

  -- ---- elsewhere --------------------------------------------------------------------------

  it("works in the module's functions, and in advisory_lock", function()
    pglocks.setup(support.conninfo)
    assert.equal("transaction", pglocks.with_lock("x", TRANSACTION, function(lock) return lock.scope end))
    local other = connect()
    local busy = other:lock "x"
    local lock = pglocks.advisory_lock("x", with { wait = false })
    assert.is_false(lock.acquired)
    assert.is_false(lock:held())
    busy:release()
    lock = pglocks.advisory_lock("x", with { wait = false })
    assert.is_true(lock.acquired)
    assert.is_true(lock:release())
    assert.same({}, pg_locks())
  end)

  it("gives its connection back to the pool", function()
    pglocks.setup { databases = { default = { conninfo = support.conninfo, pool_size = 1, scheduler = "cqueues" } } }
    local loop = cqueues.new()
    loop:wrap(function()
      for _ = 1, 3 do
        assert.is_true(pglocks.lock("x", with { timeout = 5 }):release())
        close(pglocks.lock("x", with { timeout = 5 }))
        assert.same({ true, 1 }, { pglocks.try_with_lock("x", TRANSACTION, function() return 1 end) })
      end
    end)
    assert(loop:loop())
  end)

  it("has its scope checked", function()
    local conn = connect()
    for _, scope in ipairs { "xact", "", 1, true } do
      assert_raises("bad argument #2 to 'lock' (option 'scope': \"session\" or \"transaction\" expected)",
        function() conn:lock("x", { scope = scope }) end)
      assert_raises("option 'scope'", conn.lock_all, conn, { "x" }, { scope = scope })
    end
    assert.equal("session", conn:lock("x", { scope = "session" }).scope)
  end)
end)
