-- What other SQL, other coroutines and other people's settings do to a session.

local phases = require "spec.faults.phases"
local support = require "spec.support"

local unpack = table.unpack or unpack

local function cancel(pid) support.observe("SELECT pg_cancel_backend($1)", pid) end

describe("pg_cancel_backend", function()
  after_each(support.finish)

  it("row 9, connecting: is an error with the SQLSTATE", function()
    local result = phases.stuck_connecting(support.connect(), support.conninfo)
    cancel(result.stuck())
    local outcome, sqlstate = result.wait()
    assert.same({ "interrupted", "57014" }, { outcome, sqlstate })
  end)

  it("row 9, holding: of an idle holder is ignored", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    cancel(conn.backend_pid)
    assert.is_true(lock:held())
    assert.is_true(lock:check())
    assert.is_true(conn:ping())
    assert.is_true(lock:release())
  end)

  -- A statement of somebody's in the place of ours: it unlocks, and one can watch it.
  local SLEEPING = {
    before = "SELECT pg_advisory_unlock%s($1) FROM pg_sleep(60)",
    after = "SELECT CASE WHEN pg_advisory_unlock%s($1) THEN pg_sleep(60) IS NOT NULL END",
  }

  for order, sql in pairs(SLEEPING) do
    it(("row 9, releasing: %s the unlock: leaves nothing"):format(order), function()
      for _, mode in ipairs { "", "_shared" } do
        local conn = support.connect()
        local options = { shared = mode == "_shared" }
        conn:lock("x", options):release()
        local lock = conn:lock("x", options)
        conn:query(("DEALLOCATE pglocks_unlock%s_8"):format(mode))
        conn:query(("PREPARE pglocks_unlock%s_8(int8) AS "):format(mode) .. sql:format(mode))
        support.core.start.release(lock)
        support.wait_until("the release", function()
          return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'",
            conn.backend_pid) == 1
        end)
        cancel(conn.backend_pid)
        assert.is_true(support.complete(conn))
        assert.is_false(lock:held())
        assert.same({}, support.pg_locks(conn.backend_pid))
        assert.is_true(conn:ping())
      end
    end)
  end

  it("row 9, releasing: of what close() has sent: is sent again", function()
    local conn, blocker = support.connect(), support.connect()
    local pid = conn.backend_pid
    finally(function() blocker:close() end)
    conn:lock "x"
    -- Since when its statement, if that waits.
    local function waits_since()
      local row = support.observe([[SELECT query_start::text AS since FROM pg_stat_activity
        WHERE pid = $1 AND wait_event_type = 'Lock' AND state = 'active']], pid)[1]
      return row and row.since
    end
    -- From then on nobody can look up a function that his session does not know yet.
    waits_since()
    cancel(blocker.backend_pid)
    blocker:query "BEGIN"
    blocker:query "LOCK TABLE pg_catalog.pg_proc"
    support.core.start.close(conn)
    local since = support.wait_until("the unlock to wait", waits_since)
    cancel(pid)
    support.wait_until("another one", function()
      support.core.step(conn)
      return (waits_since() or since) ~= since
    end)
    blocker:close()
    support.complete(conn)
    assert.is_true(support.connect():lock("x", { timeout = 0 }):release())
  end)

  it("row 9, idle: is ignored", function()
    local conn = support.connect()
    cancel(conn.backend_pid)
    assert.is_true(conn:ping())
    assert.is_true(conn:lock("x"):release())
  end)
end)

describe("statement_timeout", function()
  after_each(support.finish)

  it("row 9, waiting: that the program sets itself, is an error that holds nothing", function()
    local conn = support.connect()
    local held = support.connect():lock "x"
    conn:query "SET statement_timeout = '50ms'"
    for _, options in ipairs { {}, { timeout = 5 }, { shared = true } } do
      local err = support.assert_code("interrupted", conn.lock, conn, "x", options)
      assert.equal("57014", err.sqlstate)
      assert.same({}, support.pg_locks(conn.backend_pid))
    end
    held:release()
    assert.is_true(conn:lock("x"):release())
  end)
end)

describe("a second coroutine", function()
  after_each(support.finish)

  local function refused(conn, lock)
    support.assert_code("busy_connection", conn.lock, conn, "z")
    support.assert_code("busy_connection", conn.ping, conn)
    support.assert_code("busy_connection", conn.close, conn)
    if lock then support.assert_code("busy_connection", lock.check, lock) end
  end

  it("row 25, connecting: is refused, and the connection comes about", function()
    local conn = support.core.start.connect(support.core.conninfo(support.conninfo), 10)
    refused(conn)
    assert.is_true(support.complete(conn))
    assert.is_true(conn:ping())
    conn:close()
  end)

  it("row 25, waiting: is refused, and the first one gets its lock", function()
    local conn = support.connect()
    local own = conn:lock "own"
    local held = phases.waiting(conn, support.connect(), "x")
    refused(conn, own)
    held:release()
    assert.is_true(support.complete(conn):check())
    assert.is_true(own:check())
  end)

  it("row 25, holding: uses the connection, and the lock is held", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    coroutine.wrap(function() conn:query "SELECT 1" end)()
    coroutine.wrap(function() conn:lock("y"):release() end)()
    assert.is_true(lock:check())
  end)

  it("row 25, releasing: is refused, and the lock is released", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect()
    local own, lock = conn:lock "own", conn:lock "x"
    local go_on = phases.releasing(conn, lock)
    refused(conn, own)
    go_on()
    assert.is_true(support.complete(conn))
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    assert.is_true(own:check())
  end)

  it("row 25, idle: uses the connection", function()
    local conn = support.connect()
    coroutine.wrap(function() assert.is_true(conn:ping()) end)()
    assert.is_true(conn:ping())
  end)
end)

describe("an aborted transaction", function()
  after_each(support.finish)

  local function aborted()
    local conn = support.connect()
    local lock = conn:lock "x"
    conn:query "BEGIN"
    support.assert_code("server", conn.query, conn, "SELECT 1/0")
    return conn, lock
  end

  it("row 28, waiting: is told before anything is sent", function()
    local conn = aborted()
    local held = support.connect():lock "y"
    support.assert_code("aborted_transaction", conn.lock, conn, "y")
    support.assert_code("aborted_transaction", conn.try_lock, conn, "y", { timeout = 1 })
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    conn:query "ROLLBACK"
    held:release()
    assert.is_true(conn:lock("y"):release())
  end)

  it("row 28, holding: keeps the lock", function()
    local conn, lock = aborted()
    assert.is_true(lock:held())
    assert.equal(1, #support.pg_locks(conn.backend_pid))
    support.assert_code("aborted_transaction", lock.check, lock)
    conn:query "ROLLBACK"
    assert.is_true(lock:check())
  end)

  it("row 28, releasing: releases when it ends", function()
    for _, release in ipairs {
      function(lock) assert.is_true(lock:release()) end,
      function(lock) getmetatable(lock).__close(lock) end,
    } do
      local conn, lock = aborted()
      release(lock)
      assert.is_false(lock:held())
      assert.equal(1, #support.pg_locks(conn.backend_pid)) -- until then nobody else has it
      conn:query "ROLLBACK"
      assert.same({}, support.pg_locks(conn.backend_pid))
    end
  end)

  it("row 28, idle: is no reason to end the session", function()
    local conn, lock = aborted()
    lock:release()
    assert.is_true(conn:ping() and conn:alive())
    conn:query "ROLLBACK"
    assert.is_true(conn:lock("z"):release())
  end)
end)

describe("a hostile role and schema", function()
  after_each(function()
    support.finish()
    assert.is_false(support.observe("SELECT is_called FROM evil.uses")[1].is_called)
  end)

  local HASTY = 0.2 -- seconds, of every time-out
  local conn

  setup(function()
    support.observe "CREATE ROLE hostile LOGIN SUPERUSER"
    for _, name in ipairs {
      "statement_timeout", "lock_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout",
      "transaction_timeout",
    } do
      if #support.observe("SELECT 1 FROM pg_settings WHERE name = $1", name) > 0 then
        support.observe(("ALTER ROLE hostile SET %s = '%gms'"):format(name, HASTY * 1000))
      end
    end
    support.observe "ALTER ROLE hostile SET search_path = evil, pg_catalog"
    support.observe "CREATE SCHEMA evil"
    support.observe "CREATE SEQUENCE evil.uses"
    local function create(name, result, arguments)
      support.observe(([[CREATE FUNCTION evil.%s(%s) RETURNS %s LANGUAGE sql
        AS $$SELECT nextval('evil.uses'); SELECT NULL::pg_catalog.%s$$]]):format(name, arguments, result, result))
    end
    for name, result in pairs {
      pg_advisory_lock = "void", pg_advisory_unlock = "bool", pg_try_advisory_lock = "bool",
      pg_advisory_lock_shared = "void", pg_advisory_unlock_shared = "bool",
      pg_try_advisory_lock_shared = "bool",
    } do
      create(name, result, "int8")
      create(name, result, "int4, int4")
    end
    create("pg_advisory_unlock_all", "void", "")
    create("pg_backend_pid", "int4", "")
    create("pg_is_in_recovery", "bool", "")
    create("set_config", "text", "text, text, bool")
    create("version", "text", "")
    create("current_setting", "text", "text")
    create("pg_logical_emit_message", "pg_lsn", "bool, text, text")
    create("count", "int8", "text")
    create("pg_blocking_pids", "int4", "int4")
    create("pg_stat_clear_snapshot", "void", "")
    create("date_part", "float8", "text, timestamptz")
    create("current_database", "name", "")
    create("int4eq", "bool", "int4, int4")
    for i, operator in ipairs {
      { "=", "bool", "int4", "int4" }, { "=", "bool", "int2", "int4" }, { "=", "bool", "oid", "oid" },
      { "=", "bool", "text", "text" }, { "<>", "bool", "text", "text" }, { "~~", "bool", "text", "text" },
      { "=", "bool", "name", "name" }, { "=", "bool", "bool", "bool" }, { "=", "bool", "int2", "int2" },
      { "<<", "int8", "int8", "int4" }, { ">>", "int8", "int8", "int4" }, { "|", "int8", "int8", "int8" },
      { "-", "numeric", "pg_lsn", "pg_lsn" },
    } do
      local name, result, left, right = unpack(operator)
      create("operator" .. i, result, left .. ", " .. right)
      support.observe(("CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.operator%d)")
        :format(name, left, right, i))
    end
    for _, type in ipairs { "int4", "int8", "text", "int2", "oid", "bool", "float8" } do
      support.observe(("CREATE DOMAIN evil.%s AS pg_catalog.%s CHECK (false)"):format(type, type))
    end
    support.observe "CREATE TABLE evil.pg_locks (pid int)"
    support.observe "CREATE TABLE evil.pg_settings (name text)"
    support.observe "CREATE TABLE evil.pg_stat_activity (pid int)"
    support.observe "CREATE TABLE evil.pg_database (oid oid)"
  end)

  teardown(function()
    support.observe "DROP SCHEMA evil CASCADE"
    support.observe "DROP ROLE hostile"
  end)

  before_each(function() conn = support.connect { user = "hostile" } end)

  local function wait_longer() support.sleep(3 * HASTY) end

  local function holds(n) assert.equal(n, #support.pg_locks(conn.backend_pid)) end

  it("row 29, connecting: connects, with settings of its own", function()
    assert.equal("evil, pg_catalog", conn:query("SHOW search_path")[1].search_path)
    assert.equal("0", conn:query("SHOW statement_timeout")[1].statement_timeout)
  end)

  it("row 29, waiting: waits on, and gets a real lock", function()
    local held = phases.waiting(conn, support.connect(), "x")
    wait_longer()
    held:release()
    local lock = support.complete(conn)
    holds(1)
    assert.is_true(lock:check())
    for _, key in ipairs { 7, { 7, 42 } } do
      for _, options in ipairs { {}, { timeout = 1 }, { timeout = 0 }, { shared = true } } do
        local one = conn:lock(key, options)
        holds(2)
        assert.is_true(one:release())
        holds(1)
      end
    end
  end)

  it("draws fencing tokens of the server's", function()
    support.with_fsync()
    finally(support.without_fsync)
    conn = support.connect { user = "hostile" }
    local first, second = conn:lock("x", { token = true }), conn:lock("y", { token = true })
    assert.is_true(second.token > first.token)
    holds(2)
  end)

  it("row 29, holding: holds on", function()
    local lock = conn:lock "x"
    conn:query "BEGIN"
    wait_longer()
    assert.is_true(lock:held())
    conn:query "COMMIT"
    wait_longer()
    assert.is_true(lock:check())
    holds(1)
  end)

  it("row 29, holding: sees all locks, and who waits for them", function()
    local held = phases.waiting(conn, support.connect(), "x")
    local watcher = support.connect { user = "hostile" }
    for _ = 1, 2 do
      assert.equal(2, #watcher:all_locks())
      assert.equal(conn.backend_pid, watcher:all_locks { key = "x", granted = false }[1].pid)
      assert.equal(1, #watcher:all_locks { pid = conn.backend_pid }[1].blocked_by)
      watcher:query "BEGIN"
    end
    watcher:query "COMMIT"
    held:release()
    support.complete(conn):release()
  end)

  it("row 29, releasing: releases, and after an error the guard does", function()
    for name, types in pairs {
      unlock_8 = "bigint", unlock_44 = "int, int", unlock_shared_8 = "bigint", unlock_shared_44 = "int, int",
    } do
      local key, options = name:find "44" and { 7, 42 } or 7, { shared = name:find "shared" ~= nil }
      conn:lock(key, options):release()
      local lock = conn:lock(key, options)
      holds(1)
      conn:query("DEALLOCATE pglocks_" .. name)
      conn:query(("PREPARE pglocks_%s(%s) AS SELECT 1 / 0"):format(name, types))
      assert.is_true(lock:release())
      holds(0)
    end
  end)

  it("row 29, idle: the session stays", function()
    wait_longer()
    assert.is_true(conn:ping())
  end)
end)
