-- Fencing tokens: the option `token`. The server of the specs has fsync off, where there are none: it
-- is switched on for all but the tests of that. Crashes are for spec/faults/token_spec.lua.

local loops = require "spec.loops"
local pglocks = require "pglocks"
local server = require "spec.faults.server"
local support = require "spec.support"

local connect, pg_locks, assert_code = support.connect, support.pg_locks, support.assert_code
local TOKEN = { token = true }
local unpack = table.unpack or unpack

-- Options of a lock, with those of TOKEN.
local function with_token(options)
  local all = { token = true }
  for name, value in pairs(options or {}) do all[name] = value end
  return all
end

-- Each is greater than the one before; that returns the last.
local function assert_increasing(first, ...)
  for i = 1, select("#", ...) do
    local token = (select(i, ...))
    assert.is_true(token > first, ("%s after %s"):format(token, first))
    first = token
  end
  return first
end

-- Of a conn:locks(), what holds how many times: { ["exclusive 42"] = 2 }.
local function counts(conn)
  local all = {}
  for _, held in ipairs(conn:locks()) do all[held.mode .. " " .. tostring(held.key)] = held.count end
  return all
end

-- Another connection may have it at once.
local function is_free(key, options)
  local other = connect()
  local lock = other:lock(key, options or { timeout = 0 })
  assert.is_true(lock:release())
  other:close()
end

-- The statement that draws becomes another one, and is there: so it is not prepared anew.
local function draw_by(conn, sql)
  conn:lock("warm", TOKEN):release()
  conn:query "DEALLOCATE pglocks_token"
  conn:query("PREPARE pglocks_token AS " .. sql)
end

-- Every way to take a lock; each returns it.
local WAYS = {
  lock = function(conn, options) return conn:lock(42, options) end,
  ["a name"] = function(conn, options) return conn:lock("invoice 42", options) end,
  ["a pair"] = function(conn, options) return conn:lock({ 7, 42 }, options) end,
  try_lock = function(conn, options) return assert(conn:try_lock(42, options)) end,
  lock_all = function(conn, options) return conn:lock_all({ 42, "x", { 7, 42 } }, options) end,
  try_lock_all = function(conn, options) return assert(conn:try_lock_all({ 42, { 7, 42 } }, options)) end,
  ["many of one"] = function(conn, options) return conn:lock_all({ 42 }, options) end,
}

local OPTIONS = {
  plain = {}, shared = { shared = true }, ["a timeout"] = { timeout = 5 }, ["timeout 0"] = { timeout = 0 },
  ["a comment"] = { comment = true },
}

local function each_way(test)
  for way, lock in pairs(WAYS) do
    for kind, options in pairs(OPTIONS) do
      test(("%s, %s"):format(way, kind), function(conn) return lock(conn, with_token(options)) end)
    end
  end
end

describe("a fencing token", function()
  setup(support.with_fsync)
  teardown(support.without_fsync)
  after_each(function()
    pglocks.setup {}
    support.finish()
  end)

  -- ---- where one is drawn ---------------------------------------------------------------

  it("is a number that grows with every hand-over of a key", function()
    local a, b = connect(), connect()
    local tokens = {}
    for i = 1, 20 do
      local lock = (i % 3 == 0 and a or b):lock("x", TOKEN)
      tokens[i] = lock.token
      assert.equal("number", type(lock.token))
      if math.type then assert.equal("integer", math.type(lock.token)) end
      assert.is_true(lock:check())
      assert.is_true(lock:release())
      assert.equal(tokens[i], lock.token)
    end
    assert_increasing(unpack(tokens))
  end)

  it("grows from one that lost its session to the next holder", function()
    local a, b = connect(), connect()
    local lost = a:lock("x", TOKEN)
    support.begin(b, "lock", "x", TOKEN)
    support.wait_until_waiting(b.backend_pid)
    support.observe("SELECT pg_terminate_backend($1)", a.backend_pid)
    assert_increasing(lost.token, support.complete(b).token)
    assert.is_false(lost:held())
  end)

  it("is nil for a lock that asked for none", function()
    local conn = connect()
    for _, options in ipairs { {}, { token = false }, { timeout = 1 } } do
      assert.is_nil(conn:lock("x", options).token)
    end
    assert.is_nil(connect():try_lock("x", TOKEN))
  end)

  each_way(function(case, take)
    it("is drawn by " .. case, function()
      local a, b = connect(), connect()
      local first = take(a)
      local before = first.token
      assert.is_true(first:check())
      first:release()
      assert_increasing(before, take(b).token)
    end)
  end)

  it("is one for all keys of lock_all", function()
    local conn = connect()
    local before = conn:lock("x", TOKEN)
    local lock = conn:lock_all({ "x", "y", { 7, 42 } }, TOKEN)
    assert_increasing(before.token, lock.token, conn:lock("y", TOKEN).token)
  end)

  it("is drawn anew by a re-entrant acquire, and each lock keeps its own", function()
    local conn = connect()
    local outer = conn:lock("x", TOKEN)
    local token = outer.token
    local inner = conn:lock("x", TOKEN)
    assert_increasing(token, inner.token, conn:lock_all({ "x", "y" }, TOKEN).token)
    assert.equal(token, outer.token)
    assert.equal(2, #pg_locks(conn.backend_pid))
    inner:release()
    outer:release()
    assert.is_true(conn:lock("x", TOKEN):release())
  end)

  it("is another one for each shared holder", function()
    local a, b = connect(), connect()
    local one, two = a:lock("x", { shared = true, token = true }), b:lock("x", { shared = true, token = true })
    assert_increasing(one.token, two.token)
    one:release()
    two:release()
    assert_increasing(two.token, a:lock("x", TOKEN).token)
  end)

  it("is drawn anew by upgrade and downgrade", function()
    local conn = connect()
    for _, lock in ipairs {
      conn:lock("x", { shared = true, token = true }), conn:lock_all({ "x", "y" }, { shared = true, token = true }) }
    do
      local first = lock.token
      assert.is_true(lock:upgrade())
      local second = lock.token
      assert.is_true(lock:downgrade())
      assert_increasing(first, second, lock.token)
      lock:release()
    end
    local without = conn:lock("x", { shared = true })
    assert.is_true(without:upgrade())
    assert.is_nil(without.token)
  end)

  it("is drawn when a timeout got the lock after all", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    for _, shared in ipairs { false, true } do
      local holder, waiter = connect(), connect()
      local pid = waiter.backend_pid
      local held = holder:lock("x", TOKEN)
      support.begin(waiter, "lock", "x", { token = true, shared = shared, timeout = 0.2 * support.slow })
      support.wait_until_waiting(pid)
      support.signal("STOP", pid)
      assert.is_true(support.is_waiting(pid)) -- else the machine was too slow
      support.sleep(0.3 * support.slow)
      held:release()
      support.wait_until("the grant", function() return pg_locks(pid)[1].granted end)
      support.signal("CONT", pid)
      local lock = support.complete(waiter)
      assert_increasing(held.token, lock.token)
      assert.is_true(lock:check())
      lock:release()
    end
  end)

  it("is there for a function that runs with the lock", function()
    local conn = connect()
    local function token(lock) return lock.token end
    local first = conn:with_lock("x", TOKEN, token)
    local _, second = conn:try_with_lock("x", TOKEN, token)
    local third = conn:with_lock_all({ "x", "y" }, TOKEN, token)
    local _, last = conn:try_with_lock_all({ "x", "y" }, TOKEN, token)
    assert_increasing(first, second, third, last)
  end)

  it("is drawn by the module's own functions", function()
    pglocks.setup(support.conninfo)
    local function token(lock) return lock.token end
    local one, two = pglocks.lock("x", TOKEN), pglocks.try_lock("x", TOKEN)
    local three, four = pglocks.lock_all({ "x", "y" }, TOKEN), pglocks.try_lock_all({ "x", "y" }, TOKEN)
    local five, six = pglocks.advisory_lock("x", TOKEN), pglocks.advisory_lock("x", { token = true, wait = false })
    local seven = pglocks.with_lock("x", TOKEN, token)
    local _, last = pglocks.try_with_lock("x", TOKEN, token)
    assert_increasing(one.token, two.token, three.token, four.token, five.token, six.token, seven, last)
    local other = connect()
    for _, lock in ipairs { one, two, three, four, five, six } do lock:release() end
    local held = other:lock("x", TOKEN)
    local without = pglocks.advisory_lock("x", { token = true, wait = false })
    assert.is_false(without.acquired)
    assert.is_nil(without.token)
    assert_increasing(last, held.token)
    pglocks.wrap("y", TOKEN, function() assert.equal(2, #pg_locks()) end)()
  end)

  for _, strategy in ipairs { "poll", "notify", "queue" } do
    it("is drawn by strategy " .. strategy, function()
      local a, b = connect(), connect()
      local held = a:lock("x", TOKEN)
      assert_code("timeout", b.lock, b, "x", { token = true, strategy = strategy, timeout = 0.02 })
      held:release()
      local lock = b:lock("x", { token = true, strategy = strategy, timeout = 5 })
      assert_increasing(held.token, lock.token, b:lock_all({ "x", "y" }, with_token { strategy = strategy }).token)
    end)
  end

  it("is drawn for the slot of a semaphore, and grows along each", function()
    local conns, last = { connect(), connect(), connect() }, {}
    for i = 1, 12 do
      local lock = conns[i % 3 + 1]:lock("x", { slots = 2, token = true })
      assert_increasing(last[lock.slot] or 0, lock.token)
      last[lock.slot] = lock.token
      lock:release()
    end
  end)

  for name, loop in pairs(loops) do
    it("is drawn in a coroutine, scheduler " .. name, function()
      local a, b = connect { scheduler = loop.scheduler }, connect { scheduler = loop.scheduler }
      local tokens = {}
      loop.run(function()
        local lock = a:lock("x", TOKEN)
        tokens[1] = lock.token
        loop.spawn(function()
          local later = b:lock("x", with_token { timeout = 10 })
          tokens[3] = later.token
          later:release()
          b:close()
        end)
        loop.sleep(0.01)
        tokens[2] = a:lock_all({ "x", "y" }, TOKEN).token
        lock:release()
        a:close()
      end)
      assert_increasing(tokens[1], tokens[2], tokens[3])
    end)
  end

  it("is drawn on a connection of a pool", function()
    local loop = loops.cqueues
    pglocks.setup { databases = { default = support.conninfo }, scheduler = loop.scheduler }
    local tokens = {}
    loop.run(function()
      for i = 1, 5 do
        loop.spawn(function()
          pglocks.with_lock("x", TOKEN, function(lock)
            tokens[#tokens + 1] = lock.token
            if i < 3 then loop.sleep(0.005) end
          end)
        end)
      end
    end)
    assert.equal(5, #tokens)
    assert_increasing(unpack(tokens))
  end)

  -- ---- what it is worth -----------------------------------------------------------------

  it("is on the server's disk before it is here, whatever the role says", function()
    finally(function() support.observe "DROP ROLE hasty" end)
    support.observe "CREATE ROLE hasty LOGIN"
    for _, value in ipairs { "off", "local", "remote_apply" } do
      support.observe("ALTER ROLE hasty SET synchronous_commit = " .. value)
      local conn = connect { user = "hasty" }
      for _ = 1, 20 do
        local lock = conn:lock("x", TOKEN)
        local flushed = support.observe [[SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint AS position]]
        assert.is_true(flushed[1].position >= lock.token)
        lock:release()
      end
      assert.equal(value, conn:query("SHOW synchronous_commit")[1].synchronous_commit)
      conn:close()
    end
  end)

  it("is drawn by a role that may only read", function()
    local conn = connect()
    conn:query "SET default_transaction_read_only = on"
    assert_increasing(0, conn:lock("x", TOKEN).token)
  end)

  it("past 2^53 has all its digits", function()
    if server.cannot_make then return pending(server.cannot_make) end
    local resetwal = os.getenv "PGLOCKS_TEST_BINDIR" .. "/pg_resetwal"
    if not io.open(resetwal) then return pending "there is no pg_resetwal" end
    finally(server.finish)
    local own = server.make "fsync = on"
    own:stop()
    server.shell("%s -l 000000010020000000000002 %s", resetwal, own.host)
    own:start()
    local conn = connect { conninfo = own.conninfo }
    local lock = conn:lock("x", TOKEN)
    assert.equal(support.is_jit and "string" or "integer", math.type and math.type(lock.token) or type(lock.token))
    local sql = "SELECT $1::bigint > 9007199254740992 AND $1::bigint <= pg_current_wal_flush_lsn() - '0/0' AS is_it"
    assert.is_true(conn:query(sql, lock.token)[1].is_it)
    local again = conn:lock("x", TOKEN)
    assert.equal(#"9007199254740993", #tostring(again.token))
    assert.is_true(tostring(again.token) > tostring(lock.token))
    conn:close()
  end)

  -- ---- a draw that fails ----------------------------------------------------------------

  local FAILURES = {
    ["an error"] = { "SELECT 1 / 0", "server", "22012" },
    ["nothing"] = { "SELECT NULL::numeric", "server" },
  }

  for name, failure in pairs(FAILURES) do
    local sql, code, sqlstate = unpack(failure)

    each_way(function(case, take)
      it(("lets the lock go when the draw says %s: %s"):format(name, case), function()
        local conn = connect()
        draw_by(conn, sql)
        local err = assert_code(code, take, conn)
        assert.equal(sqlstate, err.sqlstate)
        assert.same({}, pg_locks(conn.backend_pid))
        assert.same({}, conn:locks())
        conn:query "DEALLOCATE pglocks_token"
        assert.is_true(take(conn):check())
      end)
    end)

    it(("keeps what was held before when the draw says %s"):format(name), function()
      local conn = connect()
      local held = conn:lock(42)
      draw_by(conn, sql)
      assert_code(code, conn.lock, conn, 42, TOKEN)
      assert_code(code, conn.try_lock, conn, 42, with_token { timeout = 1 })
      assert_code(code, conn.lock_all, conn, { 42, 43 }, TOKEN)
      assert.same({ ["exclusive 42"] = 1 }, counts(conn))
      assert.equal(1, #pg_locks(conn.backend_pid))
      assert.is_true(held:check())
      assert.is_true(held:release())
      assert.same({}, pg_locks(conn.backend_pid))
    end)

    it(("leaves a lock as it was when its upgrade's draw says %s"):format(name), function()
      local conn = connect()
      local lock = conn:lock(42, { shared = true, token = true })
      local token = lock.token
      draw_by(conn, sql)
      assert_code(code, lock.upgrade, lock)
      assert.is_true(lock.shared)
      assert.equal(token, lock.token)
      assert.same({ ["shared 42"] = 1 }, counts(conn))
      assert.equal("ShareLock", pg_locks(conn.backend_pid)[1].mode)
      conn:query "DEALLOCATE pglocks_token"
      assert.is_true(lock:upgrade())
      draw_by(conn, sql)
      assert_code(code, lock.downgrade, lock)
      assert.is_false(lock.shared)
      assert.same({ ["exclusive 42"] = 1 }, counts(conn))
      assert.equal("ExclusiveLock", pg_locks(conn.backend_pid)[1].mode)
    end)

    it(("leaves no turnstile of a semaphore when the draw says %s"):format(name), function()
      local conn = connect()
      draw_by(conn, sql)
      assert_code(code, conn.lock, conn, "x", { slots = 2, token = true })
      assert.is_true(conn:ping())
      assert.same({}, pg_locks(conn.backend_pid))
    end)
  end

  -- The row has come, and then its transaction fails: a crash may take back what it says.
  it("is none of a statement that fails when it commits", function()
    local conn = connect()
    finally(function() support.observe "DROP TABLE once" end)
    conn:query "CREATE TABLE once (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
    draw_by(conn, "WITH written AS (INSERT INTO once VALUES (1), (1) RETURNING id) SELECT sum(id) FROM written")
    local held = conn:lock "y"
    for _, key in ipairs { "x", "y" } do
      local err = assert_code("server", conn.lock, conn, key, TOKEN)
      assert.equal("23505", err.sqlstate)
      assert.equal(1, #pg_locks(conn.backend_pid))
    end
    assert.is_true(held:release())
  end)

  it("is unknown where the server answers nothing at all", function()
    local conn = connect()
    draw_by(conn, "SELECT WHERE false")
    assert_code("unknown", conn.lock, conn, "x", TOKEN)
    assert.is_false(conn:alive())
    is_free("x", { timeout = 5 })
  end)

  -- ---- while it is drawn ----------------------------------------------------------------

  local SLEEP = "SELECT pg_sleep(60)"

  local function is_drawing(conn)
    return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'",
      conn.backend_pid) == 1
  end

  -- Begins an acquire whose draw goes on for long, and returns when that has begun.
  local function begin_to_draw(conn, method, key)
    draw_by(conn, SLEEP)
    support.begin(conn, method or "lock", key or "x", TOKEN)
    support.wait_until("the draw", function()
      support.core.step(conn)
      return is_drawing(conn)
    end)
  end

  it("lets the lock go for the one that waits for it", function()
    local conn, waiter = connect(), connect()
    begin_to_draw(conn)
    support.begin(waiter, "lock", "x", TOKEN)
    support.wait_until_waiting(waiter.backend_pid)
    assert.is_true(conn:cancel())
    assert_code("interrupted", support.complete, conn)
    assert.is_true(support.complete(waiter):check())
  end)

  for name, cancel in pairs {
    pg_cancel_backend = function(conn) support.observe("SELECT pg_cancel_backend($1)", conn.backend_pid) end,
    ["conn:cancel()"] = function(conn) assert.is_true(conn:cancel()) end,
  } do
    for way, case in pairs {
      lock = { "lock", "x" }, try_lock = { "try_lock", "x" }, many = { "lock_all", { "x", "y" } },
    } do
      it(("%s lets the lock go: %s"):format(name, way), function()
        local conn = connect()
        begin_to_draw(conn, case[1], case[2])
        cancel(conn)
        local err = assert_code("interrupted", support.complete, conn)
        assert.equal("57014", err.sqlstate)
        assert.same({}, pg_locks(conn.backend_pid))
        assert.same({}, conn:locks())
        conn:query "DEALLOCATE pglocks_token"
        assert.is_true(conn:lock("x", TOKEN):release())
      end)
    end

    it(name .. " keeps what was held before", function()
      local conn = connect()
      local held = conn:lock "x"
      begin_to_draw(conn)
      cancel(conn)
      assert_code("interrupted", support.complete, conn)
      assert.same({ [("exclusive %s"):format(pglocks.key "x")] = 1 }, counts(conn))
      assert.is_true(held:check())
      held:release()
      assert.same({}, pg_locks(conn.backend_pid))
    end)
  end

  it("conn:cancel() lets the lock go also when the draw is done, and its answer not read yet", function()
    for _, before in ipairs { false, true } do
      local conn = connect()
      local held = before and conn:lock "x"
      local position = support.observe("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint AS p")[1].p
      support.begin(conn, "lock", "x", TOKEN)
      support.wait_until("the draw", function() -- without a look at its answer
        if not before and #pg_locks(conn.backend_pid) == 1 then
          before = true
          support.core.step(conn)
        end
        return support.observe([[SELECT state = 'idle' AND query LIKE '%emit_message%'
          AND (pg_current_wal_flush_lsn() - '0/0')::bigint > $2 AS done
          FROM pg_stat_activity WHERE pid = $1]], conn.backend_pid, position)[1].done
      end)
      assert.is_true(conn:cancel())
      assert_code("interrupted", support.complete, conn)
      assert.equal(held and 1 or 0, #pg_locks(conn.backend_pid))
      assert.equal(held and 1 or 0, #conn:locks())
      if held then assert.is_true(held:release()) end
    end
  end)

  it("a session that is lost meanwhile is lost", function()
    local told = {}
    local conn = connect { on_lost = function(_, err, locks) told[#told + 1] = { err.code, #locks } end }
    local held = conn:lock "y"
    begin_to_draw(conn)
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    assert_code("lost", support.complete, conn)
    assert.same({ { "lost", 1 } }, told)
    assert.is_false(held:held())
    is_free("x", { timeout = 5 })
  end)

  it("is awaited no longer than reply_timeout, and then the connection is closed", function()
    local conn = connect { reply_timeout = 0.3 * support.slow }
    begin_to_draw(conn)
    local seconds = support.timed(assert_code, "unknown", support.complete, conn)
    assert.is_true(seconds < 2 * support.slow, seconds)
    assert.is_false(conn:alive())
    is_free("x", { timeout = 5 })
  end)

  it("a coroutine that is closed meanwhile leaves no lock", function()
    if not coroutine.close then return end
    local loop = loops.own
    local conn = connect { scheduler = loop.scheduler }
    loop.run(function()
      draw_by(conn, SLEEP)
      local thread = loop.spawn(function() conn:lock("x", TOKEN) end)()
      for _ = 1, 1000 do
        if is_drawing(conn) then break end
        loop.sleep(0.005)
      end
      assert.is_true(coroutine.close(thread))
      loop.forget(thread)
    end)
    assert.is_false(conn:alive())
    is_free("x", { timeout = 5 })
  end)

  -- A standby that must confirm, and is not there: then the draw waits in its COMMIT.
  it("is none that a standby must have and has not, when that wait is cancelled", function()
    if server.cannot_make then return pending(server.cannot_make) end
    finally(server.finish)
    local own = server.make "fsync = on\nsynchronous_standby_names = 'nobody'"
    local function waits(conn)
      support.core.step(conn)
      return #own:query("SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'SyncRep'",
        conn.backend_pid) == 1
    end
    local function locks() return #own:query "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'" end

    local conn = connect { conninfo = own.conninfo }
    support.begin(conn, "lock", "x", TOKEN)
    support.wait_until("the standby", function() return waits(conn) end)
    assert.is_true(conn:cancel())
    assert_code("interrupted", support.complete, conn)
    assert.equal(0, locks())

    local impatient = connect { conninfo = own.conninfo, reply_timeout = 0.3 * support.slow }
    assert_code("unknown", impatient.lock, impatient, "x", TOKEN)
    support.wait_until("the lock to be free", function() return locks() == 0 end)
    conn:close()
  end)

  -- ---- dropped statements ---------------------------------------------------------------

  it("is drawn by a statement that somebody has dropped, and the lock is not let go for that", function()
    local conn, waiter = connect(), connect()
    for _, statement in ipairs { "DEALLOCATE ALL", "DISCARD ALL", "DEALLOCATE pglocks_token" } do
      local before = conn:lock("x", TOKEN)
      before:release()
      conn:query(statement)
      support.begin(conn, "lock", "x", TOKEN)
      support.wait_until("the lock", function()
        return not support.core.step(conn) or #pg_locks(conn.backend_pid) == 1
      end)
      support.begin(waiter, "lock", "x", TOKEN)
      support.wait_until_waiting(waiter.backend_pid)
      local lock = support.complete(conn)
      assert.is_true(lock:check())
      assert.is_true(support.is_waiting(waiter.backend_pid))
      lock:release()
      local next_one = support.complete(waiter)
      assert_increasing(before.token, lock.token, next_one.token)
      next_one:release()
    end
  end)

  it("is drawn by a re-entrant acquire when somebody has dropped its statement", function()
    local conn = connect()
    for _, statement in ipairs { "DEALLOCATE ALL", "DEALLOCATE pglocks_token" } do
      local lock = conn:lock("x", TOKEN)
      conn:query(statement)
      local again = conn:lock("x", TOKEN)
      assert_increasing(lock.token, again.token)
      again:release()
      assert.is_true(lock:check())
      lock:release()
    end
  end)

  -- ---- where there is none --------------------------------------------------------------

  it("is none in an open transaction, where nothing is locked then", function()
    local conn = connect()
    conn:query "BEGIN"
    for _, take in pairs(WAYS) do
      local err = assert_code("server", take, conn, TOKEN)
      assert.is_truthy(err.message:find("inside a transaction", 1, true), err.message)
    end
    assert_code("server", conn.lock, conn, "x", { slots = 2, token = true })
    assert_code("server", conn.lock, conn, "x", { strategy = "notify", token = true })
    assert.same({}, conn:locks())
    assert.equal(1, conn:query("SELECT 1 AS one")[1].one) -- it goes on
    conn:query "COMMIT"
    assert.same({}, pg_locks(conn.backend_pid))

    conn:transaction(function() assert_code("server", conn.lock, conn, "x", TOKEN) end)
    local joined = conn:lock("y", { scope = "transaction" })
    assert_code("server", conn.lock, conn, "x", TOKEN)
    joined:release()
    assert.same({}, pg_locks(conn.backend_pid))

    conn:query "BEGIN"
    pcall(conn.query, conn, "SELECT 1 / 0")
    assert_code("server", conn.lock, conn, "x", TOKEN)
    conn:query "ROLLBACK"
    assert.is_true(conn:lock("x", TOKEN):release())
  end)

  it("is none in an open transaction for what is held, which stays as it is", function()
    local conn = connect()
    local lock = conn:lock(42, { shared = true, token = true })
    local token = lock.token
    conn:query "BEGIN"
    assert_code("server", conn.lock, conn, 42, { shared = true, token = true })
    assert_code("server", lock.upgrade, lock)
    conn:query "COMMIT"
    assert.same({ ["shared 42"] = 1 }, counts(conn))
    assert.equal(token, lock.token)
    assert.is_true(lock:upgrade())
    conn:query "BEGIN"
    assert_code("server", lock.downgrade, lock)
    conn:query "COMMIT"
    assert.same({ ["exclusive 42"] = 1 }, counts(conn))
  end)

  it("is none behind a pooler of transactions", function()
    local conn = connect { pooled = "transaction" }
    for _, take in pairs(WAYS) do
      assert_code("pooled", take, conn, TOKEN)
      assert_code("pooled", take, conn, with_token { scope = "session" })
    end
    assert_code("pooled", conn.lock, conn, "x", { slots = 2, token = true })
    assert.is_true(conn:ping())
    assert.same({}, pg_locks(conn.backend_pid))
    assert.equal(1, conn:query("SELECT 1 AS one")[1].one)
  end)

  it("is none with the scope of a transaction: an argument error", function()
    local conn = connect()
    local options = { scope = "transaction", token = true }
    for _, method in ipairs { "lock", "try_lock", "with_lock", "try_with_lock" } do
      support.assert_raises("option 'token': a lock of session scope expected", conn[method], conn, "x", options, print)
    end
    for _, method in ipairs { "lock_all", "try_lock_all" } do
      support.assert_raises("option 'token': a lock of session scope expected", conn[method], conn, { "x" }, options)
    end
    for _, name in ipairs { "lock", "try_lock", "advisory_lock", "wrap" } do
      support.assert_raises("option 'token': a lock of session scope expected", pglocks[name], "x", options, print)
    end
    for _, wrong in ipairs { 1, "true", {} } do
      local message = "option 'token': boolean expected, got " .. type(wrong)
      support.assert_raises(message, conn.lock, conn, "x", { token = wrong })
      support.assert_raises(message, conn.try_lock_all, conn, { "x" }, { token = wrong })
    end
    assert.same({}, conn:locks())
  end)
end)

describe("without fsync", function()
  after_each(support.finish)

  local REFUSED = "where fsync is off"

  local function it_without(name, fn)
    it(name, function()
      if support.observe("SHOW fsync")[1].fsync == "on" then return pending "this server has it" end
      fn()
    end)
  end

  each_way(function(case, take)
    it_without("a token is refused, and the lock let go: " .. case, function()
      local conn = connect()
      local err = assert_code("server", take, conn)
      assert.is_truthy(err.message:find(REFUSED, 1, true), err.message)
      assert.is_nil(err.sqlstate)
      assert.same({}, pg_locks(conn.backend_pid))
      assert.same({}, conn:locks())
    end)
  end)

  it_without("a token is refused, and what was held before stays", function()
    local conn = connect()
    local held = conn:lock "x"
    for _, again in ipairs { function() return conn:lock("x", TOKEN) end,
      function() return conn:try_lock("x", TOKEN) end,
      function() return conn:lock_all({ "x", "y" }, TOKEN) end } do
      local err = assert_code("server", again)
      assert.is_truthy(err.message:find(REFUSED, 1, true), err.message)
      assert.equal(1, #pg_locks(conn.backend_pid))
      assert.equal(1, conn:locks()[1].count)
    end
    assert.is_true(held:check())
    assert.is_true(held:release())
  end)

  it_without("a token is refused to a semaphore, a strategy and in a coroutine", function()
    local conn = connect()
    assert_code("server", conn.lock, conn, "x", { slots = 2, token = true })
    assert_code("server", conn.lock, conn, "x", { strategy = "poll", token = true })
    assert_code("server", conn.with_lock, conn, "x", TOKEN, function() error "it ran" end)
    assert.is_true(conn:ping())
    assert.same({}, pg_locks(conn.backend_pid))
    local loop = loops.cqueues
    local there = connect { scheduler = loop.scheduler }
    loop.run(function() assert_code("server", there.lock, there, "x", TOKEN) end)
    assert.same({}, pg_locks(there.backend_pid))
  end)
end)
