-- lock:upgrade() and lock:downgrade(): a lock that changes its mode, and is held all the time.

local support = require "spec.support"
local loops = require "spec.loops"
local pglocks = require "pglocks"

local core = support.core
local pg_locks, assert_code = support.pg_locks, support.assert_code

-- Locks of a connection: "ExclusiveLock 1", one a line, and what conn:locks() says of them.
local function rows(conn)
  conn:ping()
  local list = {}
  for i, row in ipairs(pg_locks(conn.backend_pid)) do list[i] = row.mode end
  table.sort(list)
  return table.concat(list, " ")
end

local function counts(conn)
  local list = {}
  for i, held in ipairs(conn:locks()) do list[i] = ("%s %d"):format(held.mode, held.count) end
  table.sort(list)
  return table.concat(list, ", ")
end

local X, S = "ExclusiveLock", "ShareLock"

local wait_in = support.wait_in

local function wait_until_waiting(loop, conn)
  wait_in(loop, "the wait", function() return support.is_waiting(conn.backend_pid) end)
end

local function shared(conn, key) return conn:lock(key or "x", { shared = true }) end

describe("a lock that changes its mode", function()
  after_each(function()
    pglocks.setup {}
    support.finish()
  end)

  -- ---- alone --------------------------------------------------------------------------------

  it("is exclusive after an upgrade, and shared after a downgrade", function()
    local conn, other = support.connect(), support.connect()
    for _, key in ipairs { "x", 7, { 7, 42 } } do
      local lock = shared(conn, key)
      local name, at, waited = lock.name, lock.key, lock.waited
      assert.is_true(lock:upgrade())
      assert.is_false(lock.shared)
      assert.equal(X, rows(conn))
      assert.equal("exclusive 1", counts(conn))
      assert.equal(name, conn:locks()[1].name)
      assert.is_nil((other:try_lock(key, { shared = true })))
      assert.is_true(lock:check())
      assert.is_true(lock:upgrade()) -- it is already
      assert.is_true(lock:upgrade { timeout = 1 })
      assert.equal("exclusive 1", counts(conn))
      assert.is_true(lock:downgrade())
      assert.is_true(lock.shared)
      assert.equal(S, rows(conn))
      assert.equal("shared 1", counts(conn))
      assert.equal(name, conn:locks()[1].name)
      assert.is_true(lock:downgrade())
      other:lock(key, { shared = true }):release()
      assert.is_nil((other:try_lock(key)))
      assert.same({ name, at, waited }, { lock.name, lock.key, lock.waited })
      assert.is_true(lock:check())
      assert.is_true(lock:release())
      assert.same({ nil, "not held" }, { lock:release() })
      assert.equal("", rows(conn))
    end
  end)

  it("has its new mode in what shows it", function()
    local lock = shared(support.connect())
    assert.is_truthy(tostring(lock):find("shared, held", 1, true))
    lock:upgrade()
    assert.is_truthy(tostring(lock):find("exclusive, held", 1, true))
    lock:release()
  end)

  it("is one of many on a key: each counts in its own mode", function()
    local conn = support.connect()
    local a, b, c = shared(conn), shared(conn), conn:lock "x"
    assert.equal("exclusive 1, shared 2", counts(conn))
    assert.equal(X .. " " .. S, rows(conn))
    a:upgrade()
    assert.equal("exclusive 2, shared 1", counts(conn))
    c:release()
    assert.equal("exclusive 1, shared 1", counts(conn))
    assert.equal(X .. " " .. S, rows(conn))
    b:upgrade()
    assert.equal("exclusive 2", counts(conn))
    assert.equal(X, rows(conn))
    a:downgrade()
    assert.equal("exclusive 1, shared 1", counts(conn))
    assert.equal(X .. " " .. S, rows(conn))
    b:release()
    assert.equal("shared 1", counts(conn))
    assert.equal(S, rows(conn))
    assert.is_true(a:check())
    a:release()
    assert.equal("", rows(conn))
  end)

  it("has all of its keys in the new mode, or in the old", function()
    local conn, other = support.connect(), support.connect()
    local keys = { "a", 7, { 7, 42 } }
    for i = 100, 140 do keys[#keys + 1] = i end
    local lock = conn:lock_all(keys, { shared = true })
    local own = conn:lock(7)
    assert.is_true(lock:upgrade())
    assert.is_false(lock.shared)
    assert.equal(44, #pg_locks(conn.backend_pid))
    assert.is_nil((other:try_lock({ 7, 42 }, { shared = true })))
    assert.is_true(lock:downgrade())
    assert.equal(45, #pg_locks(conn.backend_pid))
    local reads = other:lock(120, { shared = true })
    assert.same({ nil, "busy" }, { lock:upgrade() })
    assert.is_true(lock.shared)
    assert.equal(45, #pg_locks(conn.backend_pid))
    assert.is_true(lock:check())
    for _, key in ipairs(keys) do
      if key ~= 7 then other:lock(key, { shared = true }):release() end
    end
    reads:release()
    own:release()
    assert.is_true(lock:upgrade())
    lock:release()
    assert.equal("", rows(conn))
  end)

  it("is released once by a scope, and by the collector", function()
    local conn = support.connect()
    local lock = shared(conn)
    lock:upgrade()
    getmetatable(lock).__close(lock)
    assert.equal("", rows(conn))
    lock = conn:lock "x"
    lock:downgrade()
    lock = nil -- luacheck: ignore 311
    collectgarbage()
    collectgarbage()
    assert.equal("", rows(conn))
  end)

  it("is released by a deferred release", function()
    local conn, other = support.connect { release = "deferred" }, support.connect()
    for _ = 1, 20 do
      local lock = shared(conn)
      assert.is_true(lock:upgrade())
      assert.is_true(lock:downgrade())
      assert.is_true(lock:upgrade())
      lock:release()
      other:lock("x", { timeout = 5 }):release()
    end
    assert.equal("", rows(conn))
  end)

  -- ---- beside others ------------------------------------------------------------------------

  it("stays shared while others share it", function()
    local conn, other = support.connect(), support.connect()
    local lock, reads = shared(conn), shared(other)
    assert.same({ nil, "busy" }, { lock:upgrade() })
    for _, timeout in ipairs { 0, 0.0001, 0.15 } do
      local seconds, ok, why = support.timed(lock.upgrade, lock, { timeout = timeout })
      assert.is_nil(ok)
      assert.equal("busy", why)
      assert.is_true(seconds >= timeout and seconds < timeout + 0.5 * support.slow, seconds)
      assert.is_true(lock.shared)
      assert.equal(S, rows(conn))
      assert.equal("shared 1", counts(conn))
      assert.is_true(lock:check())
    end
    reads:release()
    assert.is_true(lock:upgrade())
    lock:release()
  end)

  it("gets it within the timeout, when the last of them lets go", function()
    loops.cqueues.run(function()
      local conn, other = support.connect { scheduler = "cqueues" }, support.connect()
      local lock, reads = shared(conn), shared(other)
      local done
      loops.cqueues.spawn(function() done = lock:upgrade { timeout = 20 } end)
      wait_until_waiting(loops.cqueues, conn)
      reads:release()
      wait_in(loops.cqueues, "its end", function() return done end)
      assert.equal(X, rows(conn))
      lock:release()
    end)
  end)

  it("comes before a writer that is queued, up and down", function()
    local conn, writer = support.connect(), support.connect()
    local lock = shared(conn)
    support.begin(writer, "lock", "x", { timeout = 20 })
    support.wait_until_waiting(writer.backend_pid)
    assert.is_true(lock:upgrade())
    local seconds = support.timed(lock.downgrade, lock)
    assert.is_true(seconds < 1 * support.slow, seconds)
    assert.is_true(lock.shared)
    assert.equal(S, rows(conn))
    assert.is_true(support.is_waiting(writer.backend_pid))
    assert.is_true(lock:upgrade())
    lock:release()
    support.complete(writer):release()
  end)

  it("lets readers in that are queued", function()
    local conn, reader = support.connect(), support.connect()
    local lock = conn:lock "x"
    support.begin(reader, "lock", "x", { shared = true, timeout = 20 })
    support.wait_until_waiting(reader.backend_pid)
    lock:downgrade()
    local reads = support.complete(reader)
    assert.same({ nil, "busy" }, { lock:upgrade() })
    reads:release()
    lock:release()
  end)

  -- Two who wait for each other's shared lock: row 11.
  it("reports a deadlock of two who upgrade, and both stay shared", function()
    loops.cqueues.run(function()
      local conns, locks, results = {}, {}, {}
      for i = 1, 2 do
        conns[i] = support.connect { scheduler = "cqueues" }
        locks[i] = shared(conns[i])
      end
      assert.same({ nil, "busy" }, { locks[1]:upgrade() })
      for i = 1, 2 do
        loops.cqueues.spawn(function()
          local ok, result, why = pcall(locks[i].upgrade, locks[i], { timeout = 20 })
          results[i] = { ok = ok, result = result, why = why }
          if not ok then -- held still, and the other waits for it
            locks[i]:check()
            assert.is_true(locks[i].shared)
            assert.equal(S, rows(conns[i]))
            locks[i]:release()
          end
        end)
      end
      wait_in(loops.cqueues, "both", function() return results[1] and results[2] end)
      local loser = results[1].ok and 2 or 1
      assert.equal("deadlock", results[loser].result.code)
      assert.same({ ok = true, result = true }, results[3 - loser])
      assert.equal(X, rows(conns[3 - loser]))
      locks[3 - loser]:release()
    end)
  end)

  -- A process that tries all the time, in each of the modes that must not be had.
  it("is at no instant free", function()
    local conn = support.connect()
    local lock, enough = conn:lock "x", support.connect():lock "enough"
    local child = support.spawn([[
      local conn = require "pglocks".connect((...))
      io.stdout:setvbuf "line"
      local tries, got = 0, 0
      while not conn:try_lock "enough" do
        local lock = conn:try_lock "x"
        if lock then got = got + 1 lock:release() end
        tries = tries + 1
        if tries == 1 then print "tries" end
      end
      print(got)
    ]], support.conninfo)
    assert.equal("tries", child.lines())
    for _ = 1, math.ceil(300 * math.min(1, support.size)) do
      lock:downgrade()
      repeat until lock:upgrade()
    end
    enough:release()
    assert.equal("0", child.lines())
    child.close()
    lock:release()
  end)

  -- ---- transactions -------------------------------------------------------------------------

  it("of a transaction's scope is upgraded, and not downgraded", function()
    local conn, other = support.connect(), support.connect()
    local reads = shared(other)
    conn:transaction(function()
      conn:query "CREATE TEMPORARY TABLE t (n int)"
      local lock = conn:lock("x", { shared = true, scope = "transaction" })
      assert.same({ nil, "busy" }, { lock:upgrade() })
      conn:query "INSERT INTO t VALUES (1)"
      reads:release()
      assert.is_true(lock:upgrade())
      assert.is_false(lock.shared)
      assert_code("server", lock.downgrade, lock)
      assert.is_true(lock:check())
      assert.is_nil((other:try_lock("x", { shared = true })))
    end)
    assert.same({ { n = 1 } }, conn:query "SELECT n FROM t")
    assert.equal("", rows(conn))
  end)

  it("that began its transaction ends it still", function()
    local conn = support.connect()
    conn:query "CREATE TEMPORARY TABLE t (n int)"
    for _, ends in ipairs { "release", "__close" } do
      local lock = conn:lock("x", { shared = true, scope = "transaction" })
      assert.is_true(lock:upgrade())
      assert.is_true(core.in_transaction(conn))
      conn:query "INSERT INTO t VALUES (1)"
      if ends == "release" then lock:release() else getmetatable(lock).__close(lock) end
      assert.is_false(core.in_transaction(conn))
      assert.equal("", rows(conn))
    end
    assert.same({ { n = 1 } }, conn:query "SELECT n FROM t")
  end)

  it("in session scope changes inside a transaction, and outlives its end", function()
    local conn = support.connect()
    for _, ends in ipairs { "COMMIT", "ROLLBACK" } do
      local lock = shared(conn)
      conn:query "BEGIN"
      assert.is_true(lock:upgrade())
      conn:query(ends)
      assert.equal(X, rows(conn))
      conn:query "BEGIN"
      assert.is_true(lock:downgrade())
      conn:query(ends)
      assert.equal(S, rows(conn))
      assert.is_true(lock:check())
      lock:release()
    end
  end)

  it("raises in a failed transaction, and stays as it was", function()
    local conn = support.connect()
    local lock = shared(conn)
    conn:query "BEGIN"
    pcall(conn.query, conn, "SELECT 1/0")
    assert_code("aborted_transaction", lock.upgrade, lock)
    conn:query "ROLLBACK"
    assert.is_true(lock.shared)
    assert.is_true(lock:check())
    lock:release()
    assert.equal("", rows(conn))
  end)

  -- ---- what is over -------------------------------------------------------------------------

  it("raises what is true of one that is not held", function()
    local conn = support.connect()
    local lock = shared(conn)
    lock:release()
    assert_code("not_held", lock.upgrade, lock)
    assert_code("not_held", lock.downgrade, lock)
    local busy = support.connect():lock "x"
    pglocks.setup(support.conninfo)
    local none = pglocks.advisory_lock("x", { wait = false })
    assert.is_false(none.acquired)
    assert_code("not_held", none.upgrade, none)
    busy:release()
    lock = conn:lock "x"
    conn:query "SELECT pg_advisory_unlock_all()"
    pcall(lock.check, lock)
    assert_code("lost", lock.downgrade, lock)
    lock = conn:lock "y"
    conn:close()
    assert_code("not_held", lock.downgrade, lock)
    assert.is_false(lock.shared)
  end)

  it("raises lost when its session was terminated, before and while it waits", function()
    local conn, other = support.connect(), support.connect()
    local lock = shared(conn)
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the loss", function() return not lock:held() end)
    assert_code("lost", lock.upgrade, lock)
    assert_code("lost", lock.downgrade, lock)
    local reads = shared(other)
    loops.cqueues.run(function()
      local waiter = support.connect { scheduler = "cqueues" }
      local waits, err = shared(waiter), nil
      loops.cqueues.spawn(function() err = support.raised(waits.upgrade, waits, { timeout = 20 }) end)
      wait_until_waiting(loops.cqueues, waiter)
      support.observe("SELECT pg_terminate_backend($1)", waiter.backend_pid)
      wait_in(loops.cqueues, "its end", function() return err end)
      assert.equal("lost", err.code)
      assert.is_false(waits:held())
    end)
    reads:release()
  end)

  for _, name in ipairs { "cqueues", "luv" } do
    local loop = loops[name]
    it("changes on a connection that " .. name .. " waits for", function()
      loop.run(function()
        local conn = support.connect { scheduler = loop.scheduler }
        local lock = shared(conn)
        assert.is_true(lock:upgrade())
        assert.equal(X, rows(conn))
        assert.is_true(lock:downgrade())
        assert.equal(S, rows(conn))
        assert.is_true(lock:release())
        assert.equal("", rows(conn))
      end)
    end)

    it("was released meanwhile, by a scope in another coroutine: " .. name, function()
      loop.run(function()
        local conn, other = support.connect { scheduler = loop.scheduler }, support.connect()
        local reads = shared(other)
        local lock, err = shared(conn), nil
        loop.spawn(function() err = support.raised(lock.upgrade, lock, { timeout = 20 }) end)
        wait_until_waiting(loop, conn)
        assert_code("busy_connection", lock.release, lock)
        getmetatable(lock).__close(lock)
        reads:release()
        wait_in(loop, "its end", function() return err end)
        assert.equal("not_held", err.code)
        assert.equal("", rows(conn))
        assert.equal("", counts(conn))
      end)
    end)

    it("stays shared when its wait is cancelled: " .. name, function()
      loop.run(function()
        local conn, other = support.connect { scheduler = loop.scheduler }, support.connect()
        local reads = shared(other)
        local lock, err = shared(conn), nil
        loop.spawn(function() err = support.raised(lock.upgrade, lock, { timeout = 20 }) end)
        wait_until_waiting(loop, conn)
        conn:cancel()
        wait_in(loop, "its end", function() return err end)
        assert.equal("interrupted", err.code)
        assert.is_true(lock.shared)
        assert.equal(S, rows(conn))
        assert.is_true(lock:check())
        lock:release()
        reads:release()
      end)
    end)

    it("keeps its connection from the pool: " .. name, function()
      pglocks.setup { databases = { default = { conninfo = support.conninfo, dedicated = true, pool_size = 1 } },
        scheduler = loop.scheduler }
      loop.run(function()
        local lock = pglocks.lock("x", { shared = true })
        lock:upgrade()
        lock:downgrade()
        assert.same({ nil, "timeout" }, { pglocks.try_lock("y", { timeout = 0.05 }) })
        lock:release()
        pglocks.with_lock("y", { timeout = 5 }, function() end)
        wait_in(loop, "the end of all locks", function() return #pg_locks() == 0 end)
      end)
    end)
  end

  it("is an argument error to upgrade otherwise", function()
    local conn = support.connect()
    local lock = shared(conn)
    local function refused(expected, options)
      support.assert_raises("bad argument #1 to 'upgrade' (" .. expected, function() lock:upgrade(options) end)
    end
    refused("table of options expected, got number", 1)
    refused("table of options expected, got boolean", false)
    refused("unknown option 'timeuot'", { timeuot = 1 })
    refused("unknown option '1'", { 1 })
    for _, timeout in ipairs { -1, 0 / 0, math.huge, "1" } do
      refused("option 'timeout': finite number of seconds, not negative, expected", { timeout = timeout })
    end
    assert.is_true(lock:upgrade { timeout = 1e300 })
    assert.is_true(lock:downgrade())
    lock:release()
  end)
end)
