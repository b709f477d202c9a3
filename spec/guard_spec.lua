-- A failed acquire may hold the lock. These tests stop a waiter's backend, so that the grant and
-- the failure happen while it cannot react to either: what it then says is always the failure.
-- Without the guard in src/lock.c every test of the first group leaves a lock behind.

local support = require "spec.support"

local KEYS = { ["a 64-bit key"] = -205618829, ["a pair"] = { 7, -42 } }
local MODES = { exclusive = false, shared = true }

local function each_key_and_mode(test)
  for kind, key in pairs(KEYS) do
    for mode, shared in pairs(MODES) do test(kind .. ", " .. mode, key, shared) end
  end
end

local function granted(pid)
  local rows = support.pg_locks(pid)
  return #rows == 1 and rows[1].granted
end

-- Begins to wait, and stops the backend while it does. A timeout that has struck before that is
-- doubled, and the wait begun again.
local function begin_and_stop(waiter, key, options)
  local pid = waiter.backend_pid
  support.begin(waiter, "lock", key, options)
  support.wait_until("the wait, or its timeout", function()
    return support.is_waiting(pid) or not support.core.step(waiter)
  end)
  support.signal("STOP", pid)
  if support.is_waiting(pid) then return end
  support.signal("CONT", pid)
  support.assert_code("timeout", support.complete, waiter)
  options.timeout = options.timeout * 2
  begin_and_stop(waiter, key, options)
end

-- Begins to wait for a lock; then, with the waiter's backend stopped, lets `fail` happen and the
-- lock be granted, in this order or the other, and the backend go on.
local function grant_and_fail(waiter, key, options, fail, fail_first)
  local lock = support.connect():lock(key)
  begin_and_stop(waiter, key, options)
  if fail_first then fail(options) end
  lock:release()
  support.wait_until("the grant", function() return granted(waiter.backend_pid) end)
  if not fail_first then fail(options) end
  support.signal("CONT", waiter.backend_pid)
  return pcall(support.complete, waiter)
end

-- Tokens are drawn where the log is written to the disk, which that of the specs' own server is not.
local function set_fsync(value)
  support.observe("ALTER SYSTEM SET fsync = " .. value)
  support.observe "SELECT pg_reload_conf()"
  support.wait_until("fsync", function() return support.observe("SHOW fsync")[1].fsync == value end)
end

-- The server began to count before the backend was stopped.
local function timeout_passes(options) support.sleep(options.timeout) end

describe("the guard, when the lock is granted at the moment of", function()
  after_each(support.finish)

  each_key_and_mode(function(case, key, shared)
    it("row 10, waiting: a timeout: adopts it (" .. case .. ")", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local waiter = support.connect()
      local ok, lock = grant_and_fail(waiter, key, { shared = shared, timeout = 0.1 },
        timeout_passes, true)
      assert.is_true(ok, lock)
      assert.is_true(lock.acquired)
      assert.is_true(lock:held())
      assert.is_true(lock:check())
      assert.is_true(granted(waiter.backend_pid))
      assert.is_true(lock:release())
      assert.same({}, support.pg_locks(waiter.backend_pid))
    end)

    for _, first in ipairs { true, false } do
      local order = first and "before" or "after"

      it("row 9, waiting: pg_cancel_backend " .. order .. " the grant: lets it go (" .. case .. ")", function()
        if support.cannot_signal then return pending(support.cannot_signal) end
        local waiter = support.connect()
        local ok, err = grant_and_fail(waiter, key, { shared = shared }, function()
          support.observe("SELECT pg_cancel_backend($1)", waiter.backend_pid)
        end, first)
        assert.is_false(ok)
        assert.equal("interrupted", err.code)
        assert.equal("57014", err.sqlstate)
        assert.same({}, support.pg_locks(waiter.backend_pid))
        assert.same({}, waiter:locks())
        assert.is_true(waiter:lock(key, { shared = shared }):release())
      end)

      it("conn:cancel() " .. order .. " the grant: lets it go (" .. case .. ")", function()
        if support.cannot_signal then return pending(support.cannot_signal) end
        local waiter = support.connect()
        local ok, err = grant_and_fail(waiter, key, { shared = shared }, function()
          assert.is_true(waiter:cancel())
        end, first)
        assert.is_false(ok)
        assert.equal("interrupted", err.code)
        assert.same({}, support.pg_locks(waiter.backend_pid))
        assert.is_true(waiter:lock(key, { shared = shared }):release())
      end)
    end

    it("pg_terminate_backend: knows that the session is lost (" .. case .. ")", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local waiter = support.connect()
      local pid = waiter.backend_pid
      local ok, err = grant_and_fail(waiter, key, { shared = shared }, function()
        support.observe("SELECT pg_terminate_backend($1)", pid)
      end)
      assert.is_false(ok)
      assert.equal("lost", err.code)
      assert.equal("57P01", err.sqlstate)
      assert.is_false(waiter:alive())
      support.wait_until("the lock to go with its session", function()
        return #support.pg_locks(pid) == 0
      end)
    end)
  end)

  it("a timeout inside a transaction: adopts it, and the transaction goes on", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local waiter = support.connect()
    waiter:query "BEGIN"
    local ok, lock = grant_and_fail(waiter, 1, { timeout = 0.1 }, timeout_passes, true)
    assert.is_true(ok, lock)
    assert.equal("0", waiter:query("SHOW lock_timeout")[1].lock_timeout)
    waiter:query "ROLLBACK"
    assert.is_true(lock:check())
    assert.is_true(lock:release())
  end)

  it("pg_cancel_backend inside a transaction: lets it go, and the transaction goes on", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local waiter = support.connect()
    waiter:query "BEGIN"
    local ok, err = grant_and_fail(waiter, 1, {}, function()
      support.observe("SELECT pg_cancel_backend($1)", waiter.backend_pid)
    end)
    assert.is_false(ok)
    assert.equal("interrupted", err.code)
    assert.same({}, support.pg_locks(waiter.backend_pid))
    assert.equal(1, waiter:query("SELECT 1 AS one")[1].one)
    waiter:query "COMMIT"
  end)
end)

describe("the guard", function()
  after_each(support.finish)

  it("finds nothing after an ordinary timeout, and the server logs no warning", function()
    local since = support.log()
    local holder, waiter = support.connect(), support.connect()
    for _, key in pairs(KEYS) do
      for _, shared in pairs(MODES) do
        local lock = holder:lock(key)
        local options = { shared = shared, timeout = 0.01 }
        assert.same({ nil, "timeout" }, { waiter:try_lock(key, options) })
        local ok, err = pcall(waiter.lock, waiter, key, options)
        assert.is_false(ok)
        assert.equal("timeout", err.code)
        assert.same({}, support.pg_locks(waiter.backend_pid))
        lock:release()
      end
    end
    if since then assert.is_nil(since():find("you don't own", 1, true)) end
  end)

  it("lets go after a release that failed", function()
    local conn = support.connect()
    conn:lock("warm"):release()
    for _, key in pairs(KEYS) do
      for _, shared in pairs(MODES) do
        local lock = conn:lock(key, { shared = shared })
        conn:query "DEALLOCATE ALL" -- the unlock statement is gone: the release fails
        assert.is_true(lock:release())
        assert.same({}, support.pg_locks(conn.backend_pid))
      end
    end
  end)

  it("lets go after a deferred release that failed", function()
    local conn = support.connect { release = "deferred" }
    conn:lock("warm"):release()
    local lock = conn:lock "again"
    conn:query "DEALLOCATE ALL"
    assert.is_true(lock:release())
    support.wait_until("the guard's work", function()
      conn:ping()
      return #support.pg_locks(conn.backend_pid) == 0
    end)
  end)

  it("lets go after a deferred release that failed while the connection waits for another lock",
    function()
      for _, options in ipairs { {}, { timeout = 20 }, { shared = true } } do
        local conn, other = support.connect { release = "deferred" }, support.connect()
        conn:lock("warm"):release()
        conn:ping()
        local busy = other:lock "busy"
        local lock = conn:lock "released"
        conn:query "DEALLOCATE pglocks_unlock_8" -- so that the release fails
        assert.is_true(lock:release())
        support.begin(conn, "lock", "busy", options)
        local taken = support.wait_until("the release", function()
          support.core.step(conn)
          return (other:try_lock "released")
        end)
        support.wait_until("the wait to go on", function()
          support.core.step(conn)
          return #support.pg_locks(conn.backend_pid) == 1
        end)
        support.wait_until_waiting(conn.backend_pid)
        busy:release()
        local got = support.complete(conn)
        assert.is_true(got:check())
        assert.equal(1, #support.pg_locks(conn.backend_pid))
        taken:release()
        got:release()
      end
    end)

  it("goes on to wait for what is left of the timeout, when it has let go of such a lock", function()
    local timeout = support.slow
    local conn, other = support.connect { release = "deferred" }, support.connect()
    conn:lock("warm"):release()
    conn:ping()
    local busy = other:lock "busy"
    local lock = conn:lock "released"
    conn:query "DEALLOCATE pglocks_unlock_8"
    lock:release()
    local began = support.core.now()
    support.begin(conn, "lock", "busy", { timeout = timeout })
    support.sleep(0.6 * timeout) -- only then it hears that the release has failed
    support.assert_code("timeout", support.complete, conn)
    local seconds = support.core.now() - began
    assert.is_true(seconds >= timeout and seconds < 1.4 * timeout, seconds)
    assert.is_true(other:lock("released", { timeout = 0 }):release())
    busy:release()
  end)

  -- The unlock fails and the lock behind it, in the same pipeline, succeeds: the server counts 2.
  it("settles a failed deferred release before the key is taken again", function()
    local conn = support.connect { release = "deferred" }
    conn:lock("warm"):release()
    local lock = conn:lock "again"
    conn:query "DEALLOCATE pglocks_unlock_8"
    lock:release()
    local again = conn:lock "again"
    assert.is_true(again:check())
    again:release()
    conn:ping()
    assert.same({}, support.pg_locks(conn.backend_pid))
  end)

  it("is no loss of other locks in a transaction that a failed deferred release has aborted", function()
    local conn = support.connect { release = "deferred" }
    conn:lock("warm"):release()
    local kept, lock = conn:lock "kept", conn:lock "released"
    conn:query "DEALLOCATE pglocks_unlock_8"
    conn:query "BEGIN"
    lock:release()
    support.assert_code("aborted_transaction", kept.check, kept)
    assert.is_true(kept:held())
    conn:query "ROLLBACK"
    assert.is_true(kept:check())
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    kept:release()
  end)

  it("gives up a lock that a failed deferred release kept, and that others wait for", function()
    local conn = support.connect { release = "deferred" }
    conn:lock("warm", { shared = true }):release()
    local lock = conn:lock("again", { shared = true })
    conn:query "DEALLOCATE pglocks_unlock_shared_8"
    lock:release()
    local other = support.connect()
    support.begin(other, "lock", "again") -- waits for what is left
    support.wait_until_waiting(other.backend_pid)
    assert.same({ nil, "timeout" }, { conn:try_lock("again", { shared = true, timeout = 0.05 }) })
    conn:ping()
    assert.same({}, support.pg_locks(conn.backend_pid))
    assert.is_true(support.complete(other):release())
  end)

  it("prepares its statements anew when somebody has dropped them", function()
    local conn = support.connect()
    for _, statement in ipairs { "DEALLOCATE ALL", "DISCARD ALL" } do
      conn:lock("invoice 42"):release()
      conn:query(statement)
      local lock = conn:lock("invoice 42", { timeout = 1 })
      assert.is_true(lock:check())
      assert.is_true(lock:release())
      assert.same({ nil, "not held" }, { lock:release() })
    end
  end)

  it("draws a token anew when somebody has dropped its statement, and keeps the lock meanwhile", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local before = support.observe("SHOW fsync")[1].fsync
    finally(function() set_fsync(before) end)
    set_fsync "on"
    local conn = support.connect()
    local function draw(...)
      local lock = conn[...](conn, select(2, ...))
      assert.is_truthy(lock.token)
      assert.is_true(lock:check())
      return lock
    end
    for _, options in ipairs { { token = true }, { token = true, timeout = 5 }, { token = true, timeout = 0 } } do
      local first = draw("lock", "x", options)
      conn:query "DEALLOCATE ALL"
      local again = draw("lock", "x", options) -- ours already
      conn:query "DEALLOCATE ALL"
      local all = draw("lock_all", { "x", "y" }, options)
      assert.is_true(all.token > again.token and again.token > first.token)
      for _, lock in ipairs { first, again, all } do assert.is_true(lock:release()) end
      assert.same({}, support.pg_locks(conn.backend_pid))
    end
    -- dropped when the lock was granted, and interrupted
    local lock = conn:lock("x", { token = true })
    conn:query "DEALLOCATE ALL"
    support.begin(conn, "lock", "x", { token = true })
    assert.is_true(conn:cancel())
    support.assert_code("interrupted", support.complete, conn)
    assert.is_true(lock:check())
    lock:release()
  end)

  it("row 11, waiting; row 11, holding: reports a deadlock, and the other locks are still held", function()
    local a, b = support.connect(), support.connect()
    local first, second = a:lock "first", b:lock "second"
    -- so that b, which comes last, is the victim
    a:query "SET deadlock_timeout = '1min'"
    b:query "SET deadlock_timeout = '10ms'"
    support.begin(a, "lock", "second")
    support.wait_until_waiting(a.backend_pid)
    support.begin(b, "lock", "first", { timeout = 10 })
    local ok, err = pcall(support.complete, b)
    assert.is_false(ok)
    assert.equal("deadlock", err.code)
    assert.equal("40P01", err.sqlstate)
    assert.equal(require "pglocks".key "first", err.key)
    assert.is_true(second:check())
    second:release()
    assert.is_true(support.complete(a):held())
    assert.is_true(first:check())
  end)
end)

-- Of a broken server; here, of statements that somebody has put in the place of ours.
describe("an answer that no such statement has", function()
  after_each(support.finish)

  for name, case in pairs {
    lock = { {}, "int8", { "SELECT WHERE false", "SELECT NULL::text", "SELECT false", "SELECT true" } },
    timed = { { timeout = 5 }, "int8, text", { "SELECT WHERE false", "SELECT NULL::text", "SELECT false" } },
    try = { { timeout = 0 }, "int8", { "SELECT WHERE false", "SELECT NULL::bool", "SELECT 'maybe'" } },
  } do
    local options, types, answers = case[1], case[2], case[3]

    it("is unknown, neither a grant nor a refusal: " .. name, function()
      for _, sql in ipairs(answers) do
        local conn = support.connect()
        conn:lock(42, options):release()
        conn:query(("DEALLOCATE pglocks_%s_8"):format(name))
        conn:query(("PREPARE pglocks_%s_8(%s) AS %s"):format(name, types, sql))
        local err = support.assert_code("unknown", conn.lock, conn, 42, options)
        assert.equal(60, err.free_by)
        assert.is_false(conn:alive())
      end
    end)
  end

  it("is unknown, and not not_held: release", function()
    for _, sql in ipairs { "SELECT WHERE false", "SELECT NULL::bool", "SELECT 'maybe'" } do
      for _, release in ipairs { "confirmed", "deferred" } do
        local told = {}
        local conn = support.connect { release = release, on_lost = function(_, err) told[#told + 1] = err.code end }
        conn:lock(42):release()
        local lock = conn:lock(42)
        conn:query "DEALLOCATE pglocks_unlock_8"
        conn:query("PREPARE pglocks_unlock_8(int8) AS " .. sql)
        if release == "confirmed" then
          support.assert_code("unknown", lock.release, lock)
          assert.is_false(conn:alive())
          assert.same({ "lost" }, told)
        else -- there the guard finds out
          assert.is_true(lock:release())
          assert.is_true(conn:ping() and conn:ping())
          assert.same({}, support.pg_locks(conn.backend_pid))
          assert.same({}, told)
        end
      end
    end
  end)
end)

describe("a release inside a transaction that has failed", function()
  after_each(support.finish)

  it("is done when the call that ends the transaction returns", function()
    local conn, other = support.connect(), support.connect()
    for _ = 1, 30 do
      local lock = conn:lock "x"
      conn:query "BEGIN"
      assert.is_false(pcall(conn.query, conn, "SELECT 1/0"))
      assert.is_true(lock:release())
      assert.same({ nil, "busy" }, { other:try_lock "x" })
      conn:query "ROLLBACK"
      assert.is_true(assert(other:try_lock "x"):release())
    end
  end)
end)

describe("the end of a scope", function()
  after_each(support.finish)

  it("tells on_lost when the server did not hold the lock any more", function()
    local told = {}
    local conn = support.connect { on_lost = function(_, err) told[#told + 1] = err end }
    local lock = conn:lock "x"
    conn:query "SELECT pg_advisory_unlock_all()"
    getmetatable(lock).__close(lock)
    assert.equal(1, #told)
    assert.equal("not_held", told[1].code)
    assert.equal(lock.key, told[1].key)
    assert.is_true(conn:ping())
  end)
end)

describe("a server that stops answering", function()
  after_each(support.finish)

  local function stopped(conn, fn)
    support.signal("STOP", conn.backend_pid)
    local seconds, ok, err = support.timed(pcall, fn)
    support.signal("CONT", conn.backend_pid)
    return seconds, ok, err
  end

  -- After so many seconds, and not much more.
  local function assert_unknown(after, seconds, ok, err)
    assert.is_false(ok)
    assert.equal("unknown", err.code)
    assert.is_true(seconds >= after and seconds < (after + 0.5) * support.slow, seconds)
  end

  it("row 3, waiting: ends a wait at timeout + reply_timeout with `unknown`", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect { reply_timeout = 0.3 }
    local seconds, ok, err = stopped(conn, function() conn:lock("x", { timeout = 0.2 }) end)
    assert_unknown(0.5, seconds, ok, err)
    assert.equal(60, err.free_by)
    assert.is_false(conn:alive())
  end)

  it("ends a wait without a timeout too, when it stops after the wait has failed", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local holder, waiter = support.connect(), support.connect { reply_timeout = 0.3 }
    local pid = waiter.backend_pid
    local lock = holder:lock "x"
    support.begin(waiter, "lock", "x")
    support.wait_until_waiting(pid)
    support.observe("SELECT pg_cancel_backend($1)", pid)
    support.wait_until("the cancel", function()
      return support.observe("SELECT state FROM pg_stat_activity WHERE pid = $1", pid)[1].state == "idle"
    end)
    support.signal("STOP", pid) -- and so the guard gets no answer
    local seconds, ok, err = support.timed(pcall, support.complete, waiter)
    support.signal("CONT", pid)
    assert_unknown(0.3, seconds, ok, err)
    lock:release()
  end)

  for operation, row in pairs { release = "row 3, releasing: ", check = "row 3, holding: " } do
    it(row .. "ends a " .. operation .. " at reply_timeout with `unknown`", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local lost = {}
      local conn = support.connect {
        reply_timeout = 0.3,
        on_lost = function(_, err) lost[#lost + 1] = err.code end,
      }
      local lock = conn:lock "x"
      assert_unknown(0.3, stopped(conn, function() lock[operation](lock) end))
      assert.is_false(lock:held())
      assert.same({ "lost" }, lost)
    end)
  end

  it("ends a check at its own timeout", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect()
    local lock = conn:lock "x"
    assert_unknown(0.2, stopped(conn, function() lock:check(0.2) end))
  end)

  for what, call in pairs {
    ["close()"] = function(conn) conn:close() end,
    ["the end of a connection's scope"] = function(conn) getmetatable(conn).__close(conn) end,
    ["the end of a lock's scope"] = function(_, lock) getmetatable(lock).__close(lock) end,
  } do
    it("ends " .. what .. " at reply_timeout, in silence", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local conn = support.connect { reply_timeout = 0.3 }
      local lock = conn:lock "x"
      local seconds, ok, err = stopped(conn, function() call(conn, lock) end)
      assert.is_true(ok, err)
      assert.is_true(seconds >= 0.3 and seconds < 0.8 * support.slow, seconds)
      assert.is_false(lock:held() or conn:alive())
    end)
  end

  it("ends the beginning of a transaction at reply_timeout with `unknown`", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect { reply_timeout = 0.3 }
    assert_unknown(0.3, stopped(conn, function() conn:transaction(print) end))
  end)

  it("ends a query whose end of a transaction has locks to let go, at reply_timeout with `unknown`", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect { reply_timeout = 0.3 }
    local lock = conn:lock "x"
    conn:query "BEGIN"
    support.assert_code("server", conn.query, conn, "SELECT 1/0")
    lock:release()
    support.begin(conn, "query", "ROLLBACK")
    support.wait_until("the rollback", function()
      return support.observe("SELECT state FROM pg_stat_activity WHERE pid = $1", conn.backend_pid)[1].state == "idle"
    end)
    assert_unknown(0.3, stopped(conn, function() support.complete(conn) end))
  end)

  it("row 3, idle: ends a ping at its own timeout", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect()
    assert_unknown(0.2, stopped(conn, function() conn:ping(0.2) end))
  end)

  it("row 3, holding: leaves a held lock held: nothing is known to be lost", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect()
    local lock = conn:lock "x"
    stopped(conn, function() assert.is_true(lock:held()) end)
    assert.is_true(lock:check())
  end)
end)
