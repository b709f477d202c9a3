-- Connections that a scheduler waits for, under every event loop of spec/loops.lua: whatever works
-- without one works there, and while it waits the loop goes on.

local support = require "spec.support"
local loops = require "spec.loops"
local pglocks = require "pglocks"

local core = support.core
local pg_locks, wait_until = support.pg_locks, support.wait_until

local wait_in = support.wait_in

local function wait_until_waiting(loop, conn)
  wait_in(loop, "backend " .. conn.backend_pid .. " to wait", function()
    return support.is_waiting(conn.backend_pid)
  end)
end

local function wait_until_free(loop)
  wait_in(loop, "all locks to be free", function() return #pg_locks() == 0 end)
end

local function under(name, loop)
  local function connect(options)
    local described = { scheduler = loop.scheduler }
    for option, value in pairs(options or {}) do described[option] = value end
    return support.connect(described)
  end

  -- A test whose body is a coroutine of the loop.
  local function test(title, body)
    it(title, function() loop.run(body) end)
  end

  describe("scheduler " .. name, function()
    after_each(function()
      pglocks.setup {}
      support.finish()
    end)

    -- ---- the calls ------------------------------------------------------------------------

    test("connects, locks, checks, releases and closes", function()
      local conn = connect()
      local lock = conn:lock "invoice 42"
      assert.is_true(lock:held())
      assert.is_true(lock:check())
      assert.equal(1, #pg_locks(conn.backend_pid))
      assert.is_true(lock:release())
      local again, why = lock:release()
      assert.is_nil(again)
      assert.equal("not held", why)
      assert.is_true(conn:ping())
      assert.same({}, pg_locks(conn.backend_pid))
      assert.same({}, conn:locks())
      conn:close()
      assert.is_false(conn:alive())
      conn:close()
    end)

    test("says not_held of a lock that was released while it was asked about", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local conn = connect()
      local lock, other = conn:lock "x", conn:lock "x"
      local asks, err
      support.signal("STOP", conn.backend_pid) -- no answer comes before its time
      loop.spawn(function()
        asks = true
        err = support.raised(lock.check, lock)
      end)
      wait_in(loop, "the question", function() return asks end)
      getmetatable(lock).__close(lock)
      support.signal("CONT", conn.backend_pid)
      wait_in(loop, "the check", function() return err end)
      assert.equal("not_held", err.code)
      assert.is_true(other:check())
      assert.is_true(other:release())
    end)

    test("takes many keys at once", function()
      local conn, other = connect(), connect()
      local busy = other:lock(3)
      assert.same({ nil, "busy" }, { conn:try_lock_all { 1, 2, 3 } })
      local waited
      loop.spawn(function() waited = conn:lock_all({ 1, 2, 3 }, { timeout = 20 }) end)
      wait_in(loop, "the wait", function() return support.is_waiting(conn.backend_pid) end)
      busy:release()
      wait_in(loop, "the locks", function() return waited end)
      assert.is_true(waited:check())
      assert.is_true(waited:release())
      assert.equal(2, conn:with_lock_all({ 1, 2 }, function(lock) return #lock.keys end))
      assert.is_true(conn:ping())
      assert.same({}, pg_locks(conn.backend_pid))
    end)

    test("runs queries and transactions", function()
      local conn = connect()
      assert.same({ { n = 7 } }, conn:query("SELECT $1::int AS n", 7))
      conn:query "CREATE TEMPORARY TABLE t (n int)"
      assert.equal("done", conn:transaction(function(c)
        c:query "INSERT INTO t VALUES (1)"
        return "done"
      end))
      local err = support.raised(conn.transaction, conn, function(c)
        c:query "INSERT INTO t VALUES (2)"
        error("no", 0)
      end)
      assert.equal("no", err)
      assert.is_false(core.in_transaction(conn))
      support.assert_code("server", conn.transaction, conn, function(c) c:query "SELECT 1/0" end)
      assert.same({ { n = 1 } }, conn:query "SELECT n FROM t")
    end)

    test("holds the lock while a function runs, and after it no longer", function()
      local conn, other = connect(), connect()
      local got = conn:with_lock("x", { timeout = 5 }, function(lock, n)
        assert.is_true(lock:held())
        assert.is_nil((other:try_lock "x"))
        loop.sleep(0.001)
        return n + 1
      end, 41)
      assert.equal(42, got)
      local ran, why = conn:try_with_lock("x", function() return "ran" end)
      assert.is_true(ran)
      assert.equal("ran", why)
      local err = support.raised(conn.with_lock, conn, "x", function() error({ "mine" }, 0) end)
      assert.same({ "mine" }, err)
      wait_until_free(loop)
    end)

    test("names the line and the method of a wrong argument", function()
      local conn = connect()
      local function wrong() conn:lock {} end
      local line = debug.getinfo(wrong, "S").linedefined
      local err = support.raised(wrong)
      assert.is_truthy(err:find(("scheduler_spec.lua:%d: bad argument #1 to 'lock'"):format(line), 1, true), err)
      err = support.raised(function() conn:lock("x", { timeuot = 1 }) end)
      assert.is_truthy(err:find("unknown option 'timeuot'", 1, true))
    end)

    test("connecting fails at the deadline, and for a wrong host", function()
      local listener = assert(require "cqueues.socket".listen("127.0.0.1", 0))
      local _, _, port = listener:localname()
      local seconds, err = support.timed(support.raised, pglocks.connect, {
        hostaddr = "127.0.0.1", port = port, timeout = 0.2, scheduler = loop.scheduler })
      assert.equal("connect", err.code)
      assert.is_true(seconds >= 0.2)
      listener:close()
      support.assert_code("connect", pglocks.connect, {
        host = "/nonexistent", timeout = 0.3, scheduler = loop.scheduler })
    end)

    it("works outside coroutines, too", function()
      local conn = connect()
      local lock = conn:lock "x"
      assert.is_true(lock:check())
      assert.is_true(lock:release())
      conn:close()
    end)

    -- ---- waiting --------------------------------------------------------------------------

    test("waits while others go on, and takes over at once", function()
      local holder, waiter = connect(), connect()
      local lock, ticks, got = holder:lock "x", 0, nil
      loop.spawn(function() got = waiter:lock "x" end)
      wait_until_waiting(loop, waiter)
      for _ = 1, 5 do
        loop.sleep(0.001)
        ticks = ticks + 1
      end
      assert.is_nil(got)
      assert.equal(5, ticks)
      lock:release()
      wait_in(loop, "the lock", function() return got end)
      assert.is_true(got:held())
      assert.is_true(got.waited > 0)
      got:release()
    end)

    test("times out", function()
      local holder, waiter = connect(), connect()
      local lock = holder:lock "x"
      local seconds, err = support.timed(support.assert_code, "timeout", waiter.lock, waiter, "x", { timeout = 0.1 })
      assert.is_true(seconds >= 0.1)
      assert.equal("55P03", err.sqlstate)
      local got, why = waiter:try_lock("x", { timeout = 0.05 })
      assert.is_nil(got)
      assert.equal("timeout", why)
      got, why = waiter:try_lock "x"
      assert.is_nil(got)
      assert.equal("busy", why)
      lock:release()
      assert.is_true(waiter:lock("x", { timeout = 5 }):held())
    end)

    test("does not wait beyond its deadline for a server that says nothing", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local conn = connect { reply_timeout = 0.2 * support.slow }
      support.signal("STOP", conn.backend_pid)
      local ok, err = pcall(conn.lock, conn, "x", { timeout = 0.1 })
      support.signal("CONT", conn.backend_pid)
      assert.is_false(ok)
      assert.equal("unknown", err.code)
      assert.equal(60, err.free_by)
    end)

    test("refuses a second coroutine on one connection, and the first is unharmed", function()
      local holder, waiter = connect(), connect()
      local lock, got = holder:lock "x", nil
      loop.spawn(function() got = waiter:lock "x" end)
      wait_until_waiting(loop, waiter)
      for _, method in ipairs { "lock", "try_lock", "query" } do
        support.assert_code("busy_connection", waiter[method], waiter, "SELECT 1")
      end
      support.assert_code("busy_connection", waiter.ping, waiter)
      support.assert_code("busy_connection", waiter.close, waiter)
      assert.is_true(waiter:alive())
      lock:release()
      wait_in(loop, "the lock", function() return got end)
      assert.is_true(got:check())
      got:release()
    end)

    test("ends a wait with cancel(), and the connection stays usable", function()
      local holder, waiter = connect(), connect()
      local lock, err = holder:lock "x", nil
      local kept = waiter:lock "kept"
      loop.spawn(function() err = support.raised(waiter.lock, waiter, "x") end)
      wait_until_waiting(loop, waiter)
      assert.is_true(waiter:cancel())
      wait_in(loop, "the wait to end", function() return err end)
      assert.equal("interrupted", err.code)
      assert.is_true(kept:check())
      assert.is_false(waiter:cancel())
      lock:release()
    end)

    test("ends a wait when another coroutine closes the connection", function()
      local holder, waiter = connect(), connect()
      local lock, err = holder:lock "x", nil
      loop.spawn(function() err = support.raised(waiter.lock, waiter, "x") end)
      wait_until_waiting(loop, waiter)
      getmetatable(waiter).__close(waiter)
      wait_in(loop, "the wait to end", function() return err end)
      assert.equal("closed", err.code)
      lock:release()
    end)

    -- ---- scopes ---------------------------------------------------------------------------

    -- A server that is stopped cannot answer: whoever waits for it stays.
    test("a scope that ends neither waits nor yields", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local conn, other = connect(), connect()
      local lock, second = conn:lock "x", other:lock "y"
      support.signal("STOP", conn.backend_pid)
      support.signal("STOP", other.backend_pid)
      local co = coroutine.create(function()
        getmetatable(lock).__close(lock)
        getmetatable(other).__close(other)
      end)
      local ok, err = coroutine.resume(co)
      local ended = coroutine.status(co)
      support.signal("CONT", conn.backend_pid)
      support.signal("CONT", other.backend_pid)
      assert.is_true(ok, err)
      assert.equal("dead", ended)
      assert.is_false(lock:held())
      assert.is_false(second:held())
      wait_until_free(loop)
      assert.is_true(conn:ping())
    end)

    test("release() is deferred, and confirmed if that is asked for", function()
      local deferred, confirmed = connect(), connect { release = "confirmed" }
      for _ = 1, 50 do
        local lock = confirmed:lock "x"
        lock:release()
        assert.same({}, pg_locks(confirmed.backend_pid))
      end
      local lock = deferred:lock "x"
      support.observe("SELECT 1")
      local conn = deferred
      conn:query "SELECT pg_advisory_unlock_all()"
      assert.is_true(lock:release()) -- sent; that the server knows nothing of it is not known yet
      conn:ping()
    end)

    -- Releases locks on 1 to n that the server does not hold any more, and waits until so many have been told.
    local function release_in_vain(conn, n, told)
      local locks = {}
      for i = 1, n do locks[i] = conn:lock(i) end
      conn:query "SELECT pg_advisory_unlock_all()"
      for _, lock in ipairs(locks) do getmetatable(lock).__close(lock) end
      wait_in(loop, "on_lost", function()
        conn:ping()
        return told() >= n
      end)
      conn:ping()
    end

    test("each bad release is told to on_lost", function()
      local told = {}
      local conn = connect { on_lost = function(_, err) told[#told + 1] = err end }
      release_in_vain(conn, 8, function() return #told end)
      assert.equal(8, #told)
      local keys = {}
      for _, err in ipairs(told) do
        assert.equal("not_held", err.code)
        keys[tostring(err.key)] = true
      end
      for i = 1, 8 do assert.is_true(keys[tostring(i)]) end
      assert.same({}, conn:locks())
      conn:close()
    end)

    test("on_lost may use its connection, and is told of one thing after the other", function()
      local told, depth, deepest, errors = 0, 0, 0, {}
      local conn = connect {
        on_lost = function(conn)
          told, depth = told + 1, depth + 1
          deepest = math.max(deepest, depth)
          local ok, err = pcall(conn.alive, conn)
          errors[#errors + 1] = not ok and err or nil
          collectgarbage()
          depth = depth - 1
        end,
      }
      release_in_vain(conn, 300, function() return told end)
      assert.same({}, errors)
      assert.equal(300, told)
      assert.equal(1, deepest)
      conn:close()
    end)

    test("a coroutine that died of an error, or was left alone, keeps no lock", function()
      local conn = connect()
      if name ~= "cqueues" then return end -- elsewhere a coroutine that waits is the loop's
      local auxlib = require "cqueues.auxlib"
      do
        local co = coroutine.create(function()
          local lock = conn:lock "x"
          error(lock:held() and "died" or "no lock", 0)
        end)
        local left = auxlib.wrap(function()
          local lock = conn:lock "y"
          coroutine.yield(lock:held())
        end)
        local _, err = auxlib.resume(co)
        assert.equal("died", err)
        assert.is_true(left())
        assert.equal(2, #pg_locks(conn.backend_pid))
      end
      collectgarbage()
      collectgarbage()
      wait_until_free(loop)
      assert.is_true(conn:ping())
    end)

    test("a coroutine that is closed while it waits leaves the queue", function()
      if not coroutine.close or name == "cqueues" then return end -- closes none of its coroutines
      local holder, waiter = connect(), connect()
      local lock = holder:lock "x"
      local thread = loop.spawn(function() waiter:lock "x" end)
      wait_until_waiting(loop, waiter)
      local pid = waiter.backend_pid
      assert.is_true(coroutine.close(thread()))
      if loop.forget then loop.forget(thread()) end
      wait_in(loop, "the queue to be left", function() return #pg_locks(pid) == 0 end)
      support.assert_code("lost", waiter.ping, waiter)
      assert.is_true(lock:check())
    end)

    test("a transaction whose coroutine is closed is rolled back", function()
      if not coroutine.close or name == "cqueues" then return end
      local conn = connect()
      conn:query "CREATE TEMPORARY TABLE t (n int)"
      local inside
      local thread = loop.spawn(function()
        conn:transaction(function()
          conn:query "INSERT INTO t VALUES (1)"
          inside = true
          loop.sleep(1000)
        end)
      end)
      wait_in(loop, "the transaction", function() return inside end)
      assert.is_true(coroutine.close(thread()))
      if loop.forget then loop.forget(thread()) end
      assert.is_false(core.in_transaction(conn))
      assert.same({}, conn:query "SELECT n FROM t")
    end)

    test("a call that cannot wait where it is costs nothing", function()
      local conn = connect()
      local lock = conn:lock "x"
      if not coroutine.isyieldable or name == "own" then return end
      local err = support.raised(table.sort, { 1, 2 }, function() conn:ping() end)
      assert.is_truthy(tostring(err):find("nothing can wait here", 1, true), tostring(err))
      assert.is_true(lock:check())
    end)

    -- ---- loss -----------------------------------------------------------------------------

    test("a waiter learns of the loss of its session", function()
      local holder, waiter = connect(), connect()
      local lock, err = holder:lock "x", nil
      loop.spawn(function() err = support.raised(waiter.lock, waiter, "x") end)
      wait_until_waiting(loop, waiter)
      support.observe("SELECT pg_terminate_backend($1)", waiter.backend_pid)
      wait_in(loop, "the loss", function() return err end)
      assert.equal("lost", err.code)
      assert.equal("57P01", err.sqlstate)
      lock:release()
    end)

    test("a holder's loss is told to on_lost without a call, once", function()
      if name == "own" then return end -- it begins no coroutines for us: told in the next call
      local told = {}
      local conn = connect { on_lost = function(c, err, locks) told[#told + 1] = { c, err, locks } end }
      local lock = conn:lock "x"
      support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
      wait_in(loop, "on_lost", function() return #told > 0 end)
      assert.equal(conn, told[1][1])
      assert.equal("57P01", told[1][2].sqlstate)
      assert.equal("x", told[1][3][1].name)
      assert.is_false(lock:held())
      support.assert_code("lost", lock.release, lock)
      loop.sleep(0.05)
      assert.equal(1, #told)
    end)

    test("being watched keeps no connection open", function()
      local conn = connect { on_lost = function() end }
      conn:lock "x"
      conn:close() -- the loop then ends, which the test waits for
    end)

    -- ---- many -----------------------------------------------------------------------------

    it("many coroutines wait while a ticker goes on", function()
      local n = math.ceil(math.max(20, 100 * support.size))
      local got, ticks = 0, 0
      loop.run(function()
        local holder = connect()
        local lock = holder:lock "x"
        local conns = {}
        for i = 1, n do
          conns[i] = connect()
          loop.spawn(function()
            local mine = conns[i]:lock "x"
            got = got + 1
            mine:release()
            conns[i]:close()
          end)
        end
        wait_in(loop, "all to wait", function()
          return #support.observe "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted" == n
        end)
        for _ = 1, 50 do
          loop.sleep(0.01)
          ticks = ticks + 1
        end
        assert.equal(0, got)
        lock:release()
      end)
      assert.equal(50, ticks)
      assert.equal(n, got)
    end)
  end)

  -- ---- module-level locks -----------------------------------------------------------------

  describe("module-level locks under " .. name, function()
    before_each(function()
      pglocks.setup {
        scheduler = loop.spawning or loop.scheduler,
        databases = {
          default = { conninfo = support.conninfo, dedicated = true, pool_size = 3 },
          patient = { conninfo = support.conninfo, dedicated = true, pool_size = 1, timeout = 0.2 },
          shared = support.conninfo,
          reserved = { conninfo = support.conninfo, scheduler = loop.scheduler },
        },
      }
    end)

    after_each(function()
      pglocks.setup {}
      collectgarbage()
      support.finish()
    end)

    local function holders()
      local pids = {}
      for _, row in ipairs(pg_locks()) do pids[row.pid] = true end
      return pids
    end

    test("of many keys are one owner's", function()
      local entered = 0
      for _ = 1, 2 do -- and so one of the pool's three is left
        loop.spawn(function()
          for _ = 1, 5 do
            pglocks.with_lock_all({ "x", "y", 42 }, { timeout = 20 }, function()
              entered = entered + 1
              assert.same({ nil, "busy" }, { pglocks.try_lock_all { "y" } })
            end)
          end
        end)
      end
      wait_in(loop, "all", function() return entered == 10 and next(holders()) == nil end)
      support.assert_raises("keys[2]", pglocks.lock_all, { 1, true })
    end)

    test("exclude coroutines from each other", function()
      local inside, most, entered = 0, 0, 0
      for _ = 1, 10 do
        loop.spawn(function()
          for _ = 1, 10 do
            pglocks.with_lock("x", function()
              inside, entered = inside + 1, entered + 1
              most = math.max(most, inside)
              loop.sleep(0.0005)
              inside = inside - 1
            end)
          end
        end)
      end
      wait_in(loop, "all", function() return entered == 100 and inside == 0 end)
      assert.equal(1, most)
    end)

    test("are owners of their own, each on a connection, which is used again", function()
      local a, b = pglocks.lock "a", pglocks.lock "b"
      assert.is_nil((pglocks.try_lock "a"))
      local pids, n = holders(), 0
      for _ in pairs(pids) do n = n + 1 end
      assert.equal(2, n)
      a:release()
      b:release()
      for _ = 1, 10 do
        local lock = pglocks.lock "c"
        for pid in pairs(holders()) do assert.is_true(pids[pid]) end
        lock:release()
      end
    end)

    test("share a connection where none is to be dedicated, through a locker", function()
      local a, b = pglocks.lock("a", { using = "shared" }), pglocks.lock("b", { using = "shared" })
      local n = 0
      for _ in pairs(holders()) do n = n + 1 end
      assert.equal(1, n)
      assert.same({ nil, "busy" }, { pglocks.try_lock("a", { using = "shared" }) })
      support.assert_code("deadlock", pglocks.lock, "a", { using = "shared" })
      local attempted = pglocks.advisory_lock("a", { using = "shared", wait = false })
      assert.is_false(attempted.acquired)
      assert.is_false(attempted:held())
      assert.same({ nil, "not held" }, { attempted:release() })
      assert.is_truthy(tostring(attempted):find '"a"')
      a:release()
      attempted = pglocks.advisory_lock("a", { using = "shared", wait = false })
      assert.is_true(attempted.acquired)
      assert.is_true(attempted:release())
      assert.equal("done", pglocks.with_lock("a", { using = "shared" }, function() return "done" end))
      b:release()
    end)

    test("have a connection each where the scheduler cannot begin a coroutine", function()
      local a, b = pglocks.lock("a", { using = "reserved" }), pglocks.lock("b", { using = "reserved" })
      local n = 0
      for _ in pairs(holders()) do n = n + 1 end
      assert.equal(name == "own" and 2 or 1, n)
      a:release()
      b:release()
    end)

    test("wait for a connection of the pool, in turn", function()
      local locks, order = {}, {}
      for i = 1, 3 do locks[i] = pglocks.lock(i) end
      for i = 4, 6 do
        loop.spawn(function()
          local lock = pglocks.lock(i)
          order[#order + 1] = i
          lock:release()
        end)
        loop.sleep(0.005) -- until it has come to the queue
      end
      assert.same({}, order)
      getmetatable(locks[1]).__close(locks[1])
      wait_in(loop, "the queue", function() return #order == 3 end)
      assert.same({ 4, 5, 6 }, order)
      locks[2]:release()
      locks[3]:release()
    end)

    test("do not wait for a connection without end", function()
      local lock = pglocks.lock("x", { using = "patient" })
      local err = support.assert_code("too_many_connections", pglocks.lock, "y", { using = "patient" })
      assert.is_truthy(err.message:find("all 1 connections", 1, true))
      support.assert_code("timeout", pglocks.lock, "y", { using = "patient", timeout = 0.05 })
      local got, why = pglocks.try_lock("y", { using = "patient", timeout = 0.05 })
      assert.is_nil(got)
      assert.equal("timeout", why)
      lock:release()
      assert.is_true(pglocks.lock("y", { using = "patient" }):release())
    end)

    test("spend their timeout on both queues together", function()
      local first = pglocks.lock("x", { using = "patient" })
      local elsewhere = support.connect():lock "y"
      loop.spawn(function()
        loop.sleep(0.1)
        first:release()
      end)
      local seconds = support.timed(support.assert_code, "timeout", pglocks.lock, "y",
        { using = "patient", timeout = 0.15 })
      assert.is_true(seconds >= 0.15)
      assert.is_true(seconds < 0.25 * support.slow)
      elsewhere:release()
    end)

    test("give their connection back when they fail, are collected, or are lost", function()
      local elsewhere = support.connect():lock "x"
      for _ = 1, 5 do
        assert.is_nil((pglocks.try_lock("x", { using = "patient" })))
        support.assert_code("timeout", pglocks.lock, "x", { using = "patient", timeout = 0.01 })
        local attempted = pglocks.advisory_lock("x", { using = "patient", wait = false })
        assert.is_false(attempted.acquired)
      end
      elsewhere:release()
      do
        local lock = pglocks.lock("x", { using = "patient" })
        assert.is_true(lock:held())
        lock = nil -- luacheck: ignore
      end
      collectgarbage()
      collectgarbage()
      assert.is_true(pglocks.lock("y", { using = "patient" }):release())
      local lock = pglocks.lock("y", { using = "patient" })
      local pid = next(holders())
      support.observe("SELECT pg_terminate_backend($1)", pid)
      wait_in(loop, "the loss", function() return not lock:held() end)
      support.assert_code("lost", lock.release, lock)
      local after = pglocks.lock("y", { using = "patient" })
      assert.are_not.equal(pid, next(holders()))
      assert.is_true(after:release())
    end)

    test("give their connection back when their coroutine ends while it waits", function()
      if not coroutine.close or name == "cqueues" then return end
      local elsewhere = support.connect():lock "x"
      local thread = loop.spawn(function() pglocks.lock("x", { using = "patient" }) end)
      wait_in(loop, "the wait", function() return #pg_locks() == 2 end)
      assert.is_true(coroutine.close(thread()))
      if loop.forget then loop.forget(thread()) end
      assert.is_true(pglocks.lock("y", { using = "patient" }):release())
      elsewhere:release()
    end)

    test("come in all their forms", function()
      assert.equal(3, pglocks.with_lock("x", { timeout = 5 }, function(_, a) return a + 1 end, 2))
      assert.is_true((pglocks.try_with_lock("x", function() end)))
      assert.equal("in.csv", pglocks.wrap("x", function(path) return path end)("in.csv"))
      local lock = pglocks.advisory_lock("x", { wait = false })
      assert.is_true(lock.acquired)
      local other = pglocks.advisory_lock("x", { wait = false })
      assert.is_false(other.acquired)
      lock:release()
      local shared = pglocks.advisory_lock("x", { shared = true })
      assert.is_true(shared.shared)
      shared:release()
      local err = support.raised(pglocks.lock, "x", { timeuot = 1 })
      assert.is_truthy(err:find("timeuot", 1, true))
      support.raised(pglocks.lock, "x", { using = "nowhere" })
    end)
  end)
end

under("cqueues", loops.cqueues)
if support.slow < 10 then -- under valgrind one is enough: they share all but the wait
  under("luv", loops.luv)
  under("own", loops.own)
end

-- ---- the option -----------------------------------------------------------------------------

describe("the option scheduler", function()
  after_each(function() pglocks.setup {} end)

  it("must be known, and complete", function()
    local wrong = {
      ["got \"epoll\""] = "epoll",
      ["got number"] = 7,
      ["it has no function 'wait'"] = {},
      ["it has no function 'token'"] = {
        wait = print, sleep = print, now = print, park = print, wake = print },
    }
    for message, scheduler in pairs(wrong) do
      local err = support.raised(pglocks.connect, { scheduler = scheduler })
      assert.is_truthy(err:find(message, 1, true), err)
      err = support.raised(pglocks.setup, { scheduler = scheduler })
      assert.is_truthy(err:find(message, 1, true), err)
    end
    for option, value in pairs { pool_size = 2, dedicated = true, handovers = 1, max_connections = 2 } do
      local err = support.raised(pglocks.connect, { [option] = value })
      assert.is_truthy(err:find(("option '%s' is one of setup's databases"):format(option), 1, true), err)
    end
    support.assert_raises("option 'dedicated' is one of setup's databases", pglocks.locker, { dedicated = true })
    local err
    err = support.raised(pglocks.connect, { pool_size = 0 })
    assert.is_truthy(err:find("option 'pool_size' must be an integer, at least 1", 1, true))
  end)

  it("of a connection goes before that of setup", function()
    pglocks.setup { scheduler = "luv", databases = {
      default = { conninfo = support.conninfo, scheduler = "blocking" } } }
    local lock = pglocks.lock "x"
    assert.is_true(pglocks.lock "x":release()) -- the same owner
    assert.is_true(lock:release())
  end)
end)

describe("luv", function()
  it("that was not loaded on the main thread is refused, instead of crashing", function()
    local process = support.spawn([[
      local pglocks = require "pglocks"
      print(coroutine.resume(coroutine.create(function()
        pglocks.connect { scheduler = "luv" }
      end)))
    ]])
    local said = process.lines()
    process.close()
    assert.is_truthy(said:find("luv must be loaded on the main thread", 1, true), said)
  end)

  it("lets a callback upgrade or release nothing of a locker's, where it would have to wait", function()
    local uv, errors = require "luv", {}
    loops.luv.run(function()
      local locker = pglocks.locker {
        conninfo = os.getenv "PGLOCKS_TEST_CONNINFO", scheduler = "luv", release = "confirmed",
      }
      local lock, timer = locker:lock("x", { shared = true }), uv.new_timer()
      timer:start(0, 0, function()
        for _, method in ipairs { "upgrade", "release" } do errors[#errors + 1] = support.raised(lock[method], lock) end
        timer:close()
      end)
      support.wait_in(loops.luv, "both", function() return errors[2] end)
      assert.is_true(lock:check())
      assert.is_true(lock.shared)
      assert.is_true(lock:release())
      locker:close()
    end)
    for i = 1, 2 do assert.is_truthy(errors[i].message:find("nothing can wait in a callback", 1, true)) end
  end)

  it("lets a callback release a locker's lock where the key stays with others", function()
    local uv, released, got = require "luv", {}, nil
    loops.luv.run(function()
      local locker = pglocks.locker {
        conninfo = os.getenv "PGLOCKS_TEST_CONNINFO", scheduler = "luv", release = "confirmed", handover_time = 100,
      }
      local a, b, timer = locker:lock("x", { shared = true }), locker:lock("x", { shared = true }), uv.new_timer()
      local c = locker:lock "y"
      loops.luv.spawn(function() got = locker:lock "y" end)
      timer:start(0, 0, function()
        for i, lock in ipairs { a, c } do released[i] = lock:release() end
        timer:close()
      end)
      support.wait_in(loops.luv, "both", function() return released[2] and got end)
      assert.same({ true, true }, released)
      assert.is_true(b:release())
      assert.is_true(got:release())
      locker:close()
    end)
  end)

  it("has nothing left to wait for when it cannot wait for a descriptor", function()
    local uv, scheduler = require "luv", require "pglocks.scheduler.luv"
    local new_poll = uv.new_poll -- which itself leaks what it cannot make
    function uv.new_poll() return nil, "EBADF: bad file descriptor" end
    local ok, err = coroutine.resume(coroutine.create(function() scheduler.wait(99999, "r", 1) end))
    uv.new_poll = new_poll
    assert.is_false(ok)
    assert.equal("EBADF: bad file descriptor", err)
    assert.is_falsy(uv.loop_alive())
  end)
end)

-- ---- Ctrl-C ---------------------------------------------------------------------------------

-- A loop is left as any program of it is: the error comes out of it, or ends the program.
local INTERRUPTED = [[
  local pglocks = require "pglocks"
  local conninfo, scheduler = ...
  local function main()
    local conn = pglocks.connect { conninfo = conninfo, scheduler = scheduler }
    local held = conn:lock("held by " .. scheduler)
    print(conn.backend_pid)
    io.stdout:flush()
    conn:lock "x"
  end
  if scheduler == "cqueues" then
    local loop = require "cqueues".new()
    loop:wrap(main)
    print(pcall(loop.loop, loop))
  else
    local uv = require "luv"
    assert(coroutine.resume(coroutine.create(main)))
    uv.run()
  end
]]

-- What is closed last on the main thread must be gone before Lua is.
describe("a program whose main thread waits", function()
  after_each(support.finish)

  for _, scheduler in ipairs { "cqueues", "luv" } do
    it("ends as it should under " .. scheduler, function()
      local path = os.tmpname()
      local file = assert(io.open(path, "w"))
      file:write(([[
        require "%s"
        local pglocks = require "pglocks"
        local conn = pglocks.connect { conninfo = %q, scheduler = "%s" }
        conn:lock("x"):release()
        conn:close()
        print "done"
      ]]):format(scheduler, support.conninfo, scheduler))
      file:close()
      local lines, status = support.run_program(path)
      os.remove(path)
      assert.same({ "done" }, lines)
      assert.equal(0, status)
    end)
  end
end)

describe("Ctrl-C", function()
  after_each(support.finish)

  it("ends programs that wait under cqueues and luv, and their locks", function()
    local conn = support.connect()
    local lock, struck = conn:lock "x", {}
    for _, scheduler in ipairs { "cqueues", "luv" } do
      local process = support.spawn(INTERRUPTED, support.conninfo, scheduler)
      local pid = tonumber(process.lines())
      support.wait_until_waiting(pid)
      support.signal("INT", process.pid)
      local said = {}
      for line in process.lines do said[#said + 1] = line end
      process.close()
      said = table.concat(said, "\n")
      -- LuaJIT interrupts coroutines, too. Struck just after a wait, cqueues complains first that the
      -- connection, which this closed, is gone.
      assert.is_truthy(said:find("interrupted!", 1, true)
        or rawget(_G, "jit") and said:find("false\t.*Bad file descriptor"), said)
      struck[scheduler] = pid
    end
    -- Until PostgreSQL 13 the queue keeps the place of a client that is gone, and grants it the lock.
    -- Later ones look every 5 s.
    if conn.server_version < 140000 then lock:release() end
    for scheduler, pid in pairs(struck) do
      wait_until(scheduler .. "'s locks to be free", function() return #pg_locks(pid) == 0 end)
    end
    lock:release()
  end)
end)
