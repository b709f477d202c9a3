-- Lockers: many owners on few connections, under every event loop of spec/loops.lua.

local support = require "spec.support"
local loops = require "spec.loops"
local pglocks = require "pglocks"
local process = require "process"

local observe, pg_locks, wait_in = support.observe, support.pg_locks, support.wait_in

local CONNINFO = os.getenv "PGLOCKS_TEST_CONNINFO"

local function close(what) getmetatable(what).__close(what) end

local function sessions()
  return observe("SELECT pid FROM pg_stat_activity WHERE application_name = 'locker' ORDER BY backend_start")
end

local function under(name, loop)
  local lockers = {}

  local function locker(options)
    local described = { conninfo = CONNINFO, application_name = "locker", scheduler = loop.spawning or loop.scheduler }
    for option, value in pairs(options or {}) do described[option] = value end
    lockers[#lockers + 1] = pglocks.locker(described)
    return lockers[#lockers]
  end

  local function test(title, body)
    it(title, function()
      loop.run(function()
        body()
        for _, one in ipairs(lockers) do one:close() end
      end)
    end)
  end

  local function wait_for(what, condition) return wait_in(loop, what, condition) end

  -- One connection of a locker, in the server's queue.
  local function wait_until_queued()
    wait_for("a backend to wait", function()
      return #observe [[SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE locktype = 'advisory' AND NOT granted AND application_name = 'locker']] == 1
    end)
  end

  -- Begins a coroutine, which has done what it can do without waiting when this returns.
  local function begin(fn)
    local has_begun
    loop.spawn(function()
      has_begun = true
      fn()
    end)
    while not has_begun do loop.sleep(0.001) end
  end

  -- Coroutines that take the lock one after the other: `order` is filled as they get it, and each goes on
  -- when it is told to.
  local function queue(one, key, options_of, order)
    for i, options in ipairs(options_of) do
      begin(function()
        local lock, why = one[options.method or "lock"](one, key, options.lock)
        order[#order + 1] = lock and i or why
        if not lock then return end
        wait_for("turn " .. i .. " to end", function() return options.done end)
        lock:release()
      end)
    end
  end

  describe("a locker under " .. name, function()
    after_each(function()
      for _, one in ipairs(lockers) do close(one) end
      lockers = {}
      collectgarbage "restart"
      support.finish()
      support.wait_until("no session to be left behind", function() return #sessions() == 0 end)
    end)

    -- ---- owners ---------------------------------------------------------------------------

    test("gives locks to owners of their own, on one connection", function()
      local one = locker()
      local a, b = one:lock "a", one:lock "b"
      assert.is_true(a:held() and b:held())
      assert.equal(0, a.waited)
      assert.equal(1, #sessions())
      assert.equal(2, #pg_locks(sessions()[1].pid))
      local lock, why
      loop.spawn(function() lock, why = one:try_lock "a" end)
      wait_for("an answer", function() return why end)
      assert.is_nil(lock)
      assert.equal("busy", why)
      assert.is_true(a:check())
      assert.is_true(a:release())
      assert.same({ nil, "not held" }, { a:release() })
      assert.is_false(a:held())
      lock = one:lock "a"
      assert.is_true(lock:held())
      assert.equal("a", lock.name)
      assert.is_true(lock.acquired)
      lock:release()
      b:release()
    end)

    test("excludes other sessions, and is excluded by them", function()
      local one, other = locker(), support.connect()
      local lock = one:lock "x"
      assert.same({ nil, "busy" }, { other:try_lock "x" })
      lock:release()
      local theirs = other:lock "x"
      assert.same({ nil, "busy" }, { one:try_lock "x" })
      local err = support.assert_code("timeout", one.lock, one, "x", { timeout = 0 })
      assert.is_truthy(err.message:find('"x"', 1, true))
      assert.equal(pglocks.key "x", err.key)
      theirs:release()
      lock = one:try_lock "x"
      assert.is_true(lock:check())
      lock:release()
    end)

    test("shares a lock among owners: the server sees one", function()
      local one = locker()
      local locks = {}
      for i = 1, 3 do loop.spawn(function() locks[i] = one:lock("x", { shared = true }) end) end
      wait_for("the locks", function() return locks[1] and locks[2] and locks[3] end)
      assert.equal(1, #pg_locks())
      assert.same({ nil, "busy" }, { one:try_lock "x" })
      locks[1]:release()
      locks[3]:release()
      assert.same({ nil, "busy" }, { one:try_lock "x" })
      assert.equal(1, #one:locks())
      assert.equal(1, one:locks()[1].count)
      locks[2]:release()
      local lock = one:try_lock "x"
      assert.is_true(lock:held())
      lock:release()
    end)

    test("two who try for a shared lock at once both get it", function()
      local one, got = locker(), {}
      for i = 1, 2 do loop.spawn(function() got[i] = one:try_lock("x", { shared = true }) or "busy" end) end
      wait_for("both", function() return got[1] and got[2] end)
      assert.is_true(got[1]:held() and got[2]:held())
    end)

    test("with_lock and its kin work, and pass errors on", function()
      local one = locker()
      assert.equal(42, one:with_lock("x", function(lock, n)
        assert.is_true(lock:held())
        return n + 1
      end, 41))
      assert.same({ true, "ran" }, { one:try_with_lock("x", function() return "ran" end) })
      assert.same({ "mine" }, support.raised(one.with_lock, one, "x", function() error({ "mine" }, 0) end))
      assert.equal(2, one:with_lock_all({ 1, 2 }, function(lock) return #lock.keys end))
      wait_for("all locks to be free", function() return #pg_locks() == 0 end)
    end)

    test("wrong arguments name the argument and the method", function()
      local one = locker()
      local err = support.raised(function() one:lock {} end)
      assert.is_truthy(err:find("locker_spec.lua:%d+: bad argument #1 to 'lock'"), err)
      err = support.raised(function() one:try_lock("x", { timeuot = 1 }) end)
      assert.is_truthy(err:find("bad argument #2 to 'try_lock' (unknown option 'timeuot')", 1, true), err)
      wait_for("no connection", function() return #sessions() == 0 end)
    end)

    -- ---- the queue ------------------------------------------------------------------------

    test("hands a key on in the order of the queue, and the server sees one holder", function()
      local one, order = locker { handovers = 100, handover_time = 100 }, {}
      local lock = one:lock "x"
      local turns = {}
      for i = 1, 5 do turns[i] = {} end
      queue(one, "x", turns, order)
      assert.equal(1, #pg_locks())
      lock:release()
      for i = 1, 5 do
        wait_for("turn " .. i, function() return #order == i end)
        assert.equal(1, #pg_locks())
        turns[i].done = true
      end
      assert.same({ 1, 2, 3, 4, 5 }, order)
      assert.equal(1, #sessions())
    end)

    test("who comes to share stands behind who waits to be alone", function()
      local one, order = locker(), {}
      local lock = one:lock("x", { shared = true })
      local turns = { {}, { lock = { shared = true } }, { lock = { shared = true } }, {} }
      queue(one, "x", turns, order)
      assert.same({ nil, "busy" }, { one:try_lock("x", { shared = true }) })
      lock:release()
      wait_for("the first", function() return #order == 1 end)
      turns[1].done = true
      wait_for("both who share", function() return #order == 3 end)
      assert.not_equal(4, order[3])
      turns[2].done, turns[3].done = true, true
      wait_for("the last", function() return #order == 4 end)
      turns[4].done = true
      table.sort(order) -- the two who share woke in any order
      assert.same({ 1, 2, 3, 4 }, order)
    end)

    test("times out in the queue, and the others move up", function()
      local one, order = locker(), {}
      local lock = one:lock "x"
      queue(one, "x", { { lock = { timeout = 0.1 }, method = "try_lock" }, { done = true } }, order)
      wait_for("the first to give up", function() return order[1] end)
      assert.same({ "timeout" }, order)
      lock:release()
      wait_for("the second", function() return order[2] end)
      assert.same({ "timeout", 2 }, order)
    end)

    test("lets another session have the key after so many turns", function()
      local one, other = locker { handovers = 2, handover_time = 100 }, support.connect { scheduler = loop.scheduler }
      local order, got = {}, nil
      local lock = one:lock "x"
      loop.spawn(function()
        got = other:lock "x"
        order[#order + 1] = "other"
        got:release()
      end)
      wait_for("the other one to wait", function() return support.is_waiting(other.backend_pid) end)
      local turns = {}
      for i = 1, 5 do turns[i] = { done = true } end
      queue(one, "x", turns, order)
      lock:release()
      wait_for("all", function() return #order == 6 end)
      assert.same({ 1, 2, "other", 3, 4, 5 }, order)
    end)

    test("lets another session have the key after so long", function()
      local one, other = locker { handovers = 1000, handover_time = 0 }, support.connect { scheduler = loop.scheduler }
      local order = {}
      local lock = one:lock "x"
      loop.spawn(function()
        local got = other:lock "x"
        order[#order + 1] = "other"
        got:release()
      end)
      wait_for("the other one to wait", function() return support.is_waiting(other.backend_pid) end)
      queue(one, "x", { { done = true } }, order)
      lock:release()
      wait_for("both", function() return #order == 2 end)
      assert.same({ "other", 1 }, order)
    end)

    test("lets another session be alone, however many come to share", function()
      local one, other = locker { handovers = 0 }, support.connect { scheduler = loop.scheduler }
      local lock, got = one:lock("x", { shared = true }), nil
      loop.spawn(function() got = other:lock "x" end)
      wait_for("the other one to wait", function() return support.is_waiting(other.backend_pid) end)
      assert.same({ nil, "busy" }, { one:try_lock("x", { shared = true }) })
      local later
      begin(function() later = one:lock("x", { shared = true }) end)
      lock:release()
      wait_for("the other one", function() return got end)
      assert.is_nil(later)
      got:release()
      wait_for("the later one", function() return later end)
      later:release()
    end)

    test("shares again when the other session has given up", function()
      local one, other = locker { handovers = 0 }, support.connect { scheduler = loop.scheduler }
      local lock, why, later = one:lock("x", { shared = true }), nil, nil
      loop.spawn(function() why = select(2, other:try_lock("x", { timeout = 0.5 * support.slow })) end)
      wait_for("the other one to wait", function() return support.is_waiting(other.backend_pid) end)
      begin(function() later = one:lock("x", { shared = true }) end)
      support.assert_code("deadlock", one.lock, one, "x", { shared = true }) -- behind who waits for this one
      assert.is_nil(later)
      wait_for("both", function() return later and why end)
      assert.equal("timeout", why)
      assert.is_true(lock:check())
      lock:release()
      later:release()
    end)

    test("two who try to share past the bound both get it", function()
      local one, got = locker { handovers = 0 }, {}
      local lock = one:lock("x", { shared = true })
      for i = 1, 2 do loop.spawn(function() got[i] = one:try_lock("x", { shared = true }) or "busy" end) end
      wait_for("both", function() return got[1] and got[2] end)
      assert.is_true(got[1]:held() and got[2]:held())
      lock:release()
    end)

    test("shares on past the bound when nobody else waits", function()
      local one = locker { handovers = 0 }
      local first = one:lock("x", { shared = true })
      local second = one:lock("x", { shared = true, timeout = 5 })
      local third = one:try_lock("x", { shared = true })
      assert.is_true(second:held() and third:held())
      for _ = 1, 50 do -- the server's answer may be there before anybody waits for it
        local seconds, lock = support.timed(one.try_lock, one, "x", { shared = true })
        assert.is_true(lock:held() and seconds < 5)
        lock:release()
      end
      assert.is_true(first:held())
    end)

    test("gives a key whose last lock is collected while it is looked at", function()
      local one = locker()
      local lock = one:lock "x"
      local link = one.turns.links[1]
      function link:is_alive()
        self.is_alive = nil
        close(lock)
        return true
      end
      local again = one:lock "x"
      assert.is_nil(rawget(link, "is_alive"))
      assert.is_true(again:check())
      again:release()
    end)

    test("forgets keys that nobody wants, and no others", function()
      local one, got = locker(), nil
      local kept = one:lock "kept"
      begin(function() got = one:lock "kept" end)
      for i = 1, 2500 do one:lock(i):release() end
      local known = 0
      for _ in pairs(one.turns.entries) do known = known + 1 end
      assert.is_true(known < 1010, known)
      assert.same({ nil, "busy" }, { one:try_lock "kept" })
      assert.is_nil(got)
      kept:release()
      wait_for("the lock", function() return got end)
      got:release()
    end)

    -- ---- waiting at the server ------------------------------------------------------------

    test("waits for another session on a connection of its own, and no other owner waits with it", function()
      local one, other = locker(), support.connect()
      local kept = one:lock "kept"
      local theirs = other:lock "x"
      local got
      begin(function() got = one:lock "x" end)
      wait_until_queued()
      assert.equal(2, #sessions())
      local lock = one:lock "y" -- on the first one
      assert.equal(2, #pg_locks(sessions()[1].pid))
      theirs:release()
      wait_for("the lock", function() return got end)
      assert.is_true(got.waited > 0)
      assert.is_true(got:check())
      got:release()
      lock:release()
      kept:release()
    end)

    test("never waits on the connection whose try has just got another key", function()
      local one, other = locker { max_connections = 2, locks_per_connection = 3 }, support.connect()
      local kept, got, theirs = {}, {}, other:lock_all { "x", "z" }
      for i = 1, 3 do kept[i] = one:lock(i) end
      for _, key in ipairs { "x", "y", "z" } do -- on the second one, together
        loop.spawn(function() got[key] = one:lock(key) end)
      end
      wait_for("y", function() return got.y end)
      got.y:release()
      wait_for("y to be free", function()
        local lock = other:try_lock "y"
        return lock and lock:release()
      end)
      theirs:release()
      wait_for("the others", function() return got.x and got.z end)
      for _, lock in ipairs { kept[1], kept[2], kept[3], got.x, got.z } do lock:release() end
    end)

    for _, release in ipairs { "deferred", "confirmed" } do
      test("waits on a connection as soon as the last lock there is released: " .. release, function()
        local one, other = locker { max_connections = 2, release = release }, support.connect()
        function one.turns.poll() end -- would find the key a little later
        local kept, x, y = one:lock "kept", other:lock "x", other:lock "y"
        local got_x, got_y
        begin(function() got_x = one:lock "x" end)
        wait_until_queued()
        begin(function() got_y = one:lock "y" end)
        wait_for("y to have nobody who waits for it", function() return one.turns.starved[1] end)
        x:release()
        wait_for("x", function() return got_x end)
        local seconds = support.timed(got_x.release, got_x)
        assert.is_true(seconds < 15, seconds) -- it waits for no other key
        wait_until_queued()
        y:release()
        wait_for("y", function() return got_y end)
        got_y:release()
        kept:release()
      end)
    end

    test("never waits on a connection that holds a lock", function()
      local one, other = locker { locks_per_connection = 1 }, support.connect()
      local theirs, a, b = other:lock "x", one:lock "a", one:lock "b"
      local got
      loop.spawn(function() got = one:lock "x" end)
      wait_until_queued()
      for _, lock in ipairs(pg_locks()) do
        if not lock.granted then assert.equal(1, #pg_locks(lock.pid)) end
      end
      theirs:release()
      wait_for("the lock", function() return got end)
      for _, lock in ipairs { a, b, got } do lock:release() end
    end)

    test("is one waiter to the server, however many wait", function()
      local one, other, order = locker(), support.connect(), {}
      local theirs = other:lock "x"
      queue(one, "x", { { done = true }, { done = true }, { done = true } }, order)
      wait_until_queued()
      theirs:release()
      wait_for("all", function() return #order == 3 end)
      assert.same({ 1, 2, 3 }, order)
    end)

    test("times out at the server, and leaves no waiter and no lock behind", function()
      local one, other = locker(), support.connect()
      local theirs = other:lock "x"
      local seconds, err = support.timed(support.assert_code, "timeout", one.lock, one, "x", { timeout = 0.1 })
      assert.is_true(seconds >= 0.1 and seconds < 5)
      assert.equal(pglocks.key "x", err.key)
      assert.same({ nil, "timeout" }, { one:try_lock("x", { timeout = 0.05 }) })
      wait_for("nobody to wait", function() return #pg_locks() == 1 end)
      theirs:release()
      local lock = one:try_lock "x"
      assert.is_true(lock:held())
      lock:release()
    end)

    test("queues locally where every connection waits, and gets its turn", function()
      local one, other = locker { max_connections = 2 }, support.connect()
      local x, y = other:lock "x", other:lock "y"
      local got = {}
      for _, key in ipairs { "x", "y" } do
        loop.spawn(function()
          local lock = one:lock(key, { timeout = 20 })
          got[#got + 1] = key
          lock:release()
        end)
      end
      wait_until_queued()
      assert.same({ nil, "timeout" }, { one:try_lock("y", { timeout = 0.05 }) })
      assert.equal(2, #sessions())
      local free = one:lock "z" -- one connection is always left for tries
      free:release()
      assert.equal(2, #sessions())
      y:release() -- nobody waits for it at the server
      wait_for("y", function() return got[1] end)
      assert.same({ "y" }, got)
      x:release()
      wait_for("x", function() return got[2] end)
    end)

    test("opens another connection for more locks than one shall hold", function()
      local one, locks = locker { locks_per_connection = 10, max_connections = 3 }, {}
      for i = 1, 25 do one:lock(i):release() end
      assert.equal(1, #sessions())
      for i = 1, 25 do locks[i] = one:lock(i) end
      assert.equal(3, #sessions())
      for i = 26, 60 do locks[i] = one:lock(i) end
      assert.equal(3, #sessions())
      assert.equal(60, #pg_locks())
      for _, lock in ipairs(locks) do lock:release() end
      wait_for("all locks to be free", function() return #pg_locks() == 0 end)
    end)

    -- ---- deadlocks ------------------------------------------------------------------------

    test("a cycle of owners raises deadlock at once", function()
      local one = locker()
      local a = one:lock "a"
      local err = support.assert_code("deadlock", one.lock, one, "a")
      assert.equal(pglocks.key "a", err.key)
      assert.is_truthy(err.message:find('"a"', 1, true))
      local asks, others
      begin(function()
        local b = one:lock "b"
        asks = true
        others = one:lock "a"
        others:release()
        b:release()
      end)
      wait_for("b to be taken", function() return asks end)
      support.assert_code("deadlock", one.lock, one, "b")
      support.assert_code("deadlock", one.try_lock, one, "b", { timeout = 5 })
      assert.same({ nil, "busy" }, { one:try_lock "b" })
      a:release()
      wait_for("the other one", function() return others end)
    end)

    -- ---- ends -----------------------------------------------------------------------------

    test("a scope that ends neither waits nor yields, and hands on", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local one, got = locker { handover_time = 100 }, nil
      local lock = one:lock "x"
      begin(function() got = one:lock "x" end)
      support.signal("STOP", sessions()[1].pid)
      local co = coroutine.create(function() close(lock) end)
      local ok, err = coroutine.resume(co)
      local ended = coroutine.status(co)
      wait_for("the next one", function() return got end) -- needs no server
      support.signal("CONT", sessions()[1].pid)
      assert.is_true(ok, err)
      assert.equal("dead", ended)
      assert.is_false(lock:held())
      assert.is_true(got:check())
      got:release()
    end)

    test("a lock that is collected is handed on", function()
      local one, taken, got = locker(), nil, nil
      begin(function()
        one:lock "x"
        taken = true
      end)
      wait_for("the lock", function() return taken end)
      begin(function() got = one:lock "x" end)
      wait_for("the next one", function()
        collectgarbage()
        return got
      end)
      got:release()
    end)

    test("a lock that is collected while its key is asked for is not the end of those who ask", function()
      local scheduler = loop.spawning or require("pglocks.scheduler." .. loop.scheduler)
      local collects = false
      local one = locker { scheduler = setmetatable({
        living = function()
          if collects then collectgarbage() end
        end,
      }, { __index = scheduler }) }
      local taken
      loop.spawn(function()
        one:lock "x"
        taken = true
      end)
      wait_for("the lock", function() return taken end)
      loop.sleep(0.01)
      collects = true
      local lock = one:lock("x", { timeout = 5 })
      collects = false
      assert.is_true(lock:check())
      assert.same({ nil, "busy" }, { one:try_lock "x" })
      lock:release()
      wait_for("all locks to be free", function() return #pg_locks() == 0 end)
    end)

    test("a coroutine that is closed leaves the queue, and what it held is handed on", function()
      if not coroutine.close or name == "cqueues" then return end -- closes none of its coroutines
      local one, order = locker(), {}
      local lock = one:lock "x"
      local waiting = loop.spawn(function() one:lock "x" end)
      local turns = { {}, { done = true } }
      queue(one, "x", turns, order)
      assert.is_true(coroutine.close(waiting()))
      if loop.forget then loop.forget(waiting()) end
      lock:release()
      wait_for("the next one", function() return order[1] end)
      turns[1].done = true
      wait_for("the one after that", function() return order[2] end)
      -- The last of a queue, with whom nobody waits for the server any more.
      local other = support.connect()
      local theirs = other:lock "y"
      waiting = loop.spawn(function() one:lock "y" end)
      wait_until_queued()
      assert.is_true(coroutine.close(waiting()))
      if loop.forget then loop.forget(waiting()) end
      wait_for("the server's queue to be left", function() return #pg_locks() == 1 end)
      theirs:release()
    end)

    test("a lock that was granted to a coroutine that ended meanwhile is handed on", function()
      if not coroutine.close or name == "cqueues" then return end
      local one, got = locker(), nil
      local lock = one:lock "x"
      local waiting = loop.spawn(function() one:lock "x" end)
      lock:release() -- to that one, which has not heard of it yet
      assert.is_true(coroutine.close(waiting()))
      if loop.forget then loop.forget(waiting()) end
      begin(function() got = one:lock("x", { timeout = 5 }) end)
      wait_for("the next one", function() return got end)
      got:release()
    end)

    test("a coroutine that is closed while it asks for its lock leaves the connection to others", function()
      if not coroutine.close or name == "cqueues" then return end
      if support.cannot_signal then return pending(support.cannot_signal) end
      local one = locker { release = "confirmed" }
      local kept = one:lock "kept"
      local pid = sessions()[1].pid
      for _, method in ipairs { "check", "release", "upgrade", "draw" } do
        local lock = one:lock("x", { shared = true })
        support.signal("STOP", pid)
        local asking = loop.spawn(function()
          if method == "draw" then return one:lock("drawn", { token = true }) end
          lock[method](lock)
        end)
        loop.sleep(0.02)
        assert.is_true(coroutine.close(asking()))
        if loop.forget then loop.forget(asking()) end
        support.signal("CONT", pid)
        loop.sleep(0.02)
        assert.is_true(kept:check())
        close(lock)
        lock = one:lock "x"
        assert.is_true(lock:check())
        lock:release()
      end
      kept:release()
    end)

    test("the end of a lock that could not be told is found out", function()
      local one, got = locker(), nil
      local lock = one:lock "x"
      support.core.let_go(lock) -- as without memory for more
      local again = one:try_lock "x"
      assert.is_true(again:check())
      begin(function() got = one:lock("x", { timeout = 5 }) end)
      support.core.let_go(again)
      wait_for("who waits", function() return got end)
      got:release()
    end)

    -- ---- loss -----------------------------------------------------------------------------

    test("a lost connection loses its own locks alone", function()
      local told = {}
      local one = locker {
        locks_per_connection = 2,
        on_lost = function(self, err, locks) told[#told + 1] = { self, err, locks } end,
      }
      local a, b, c = one:lock "a", one:lock "b", one:lock "c"
      assert.equal(2, #sessions())
      observe("SELECT pg_terminate_backend($1)", sessions()[1].pid)
      wait_for("on_lost", function() return told[1] end)
      assert.equal(one, told[1][1])
      assert.equal("57P01", told[1][2].sqlstate)
      assert.equal(2, #told[1][3])
      assert.is_false(a:held())
      assert.is_false(b:held())
      assert.is_true(c:check())
      support.assert_code("lost", a.release, a)
      assert.same({ nil, "not held" }, { a:release() })
      support.assert_code("lost", b.check, b)
      close(b)
      local again = one:lock "a"
      assert.is_true(again:check())
      again:release()
      c:release()
      assert.equal(1, #told)
    end)

    test("500 locks are lost with their connection, and told of once", function()
      local told, locks = {}, {}
      local one = locker {
        locks_per_connection = 500,
        on_lost = function(_, _, lost) told[#told + 1] = lost end,
      }
      for i = 1, 501 do locks[i] = one:lock(i) end
      observe("SELECT pg_terminate_backend($1)", sessions()[1].pid)
      wait_for("on_lost", function() return told[1] end)
      local keys = {}
      for _, lock in ipairs(told[1]) do keys[tostring(lock.key)] = lock.count end
      for i = 1, 500 do
        assert.equal(1, keys[tostring(locks[i].key)])
        assert.is_false(locks[i]:held())
      end
      assert.equal(500, #told[1])
      assert.is_true(locks[501]:check())
      for i = 1, 500 do one:lock(i):release() end
      locks[501]:release()
      assert.equal(1, #told)
    end)

    test("who waits for a lost holder gets the key on another connection", function()
      local one, got = locker(), nil
      local lock = one:lock "x"
      begin(function() got = one:lock("x", { timeout = 10 }) end)
      observe("SELECT pg_terminate_backend($1)", sessions()[1].pid)
      wait_for("the next one", function() return got end)
      assert.is_false(lock:held())
      assert.is_true(got:check())
      got:release()
    end)

    test("a waiter hears of the loss of the connection that waits for it", function()
      local one, other, err = locker(), support.connect(), nil
      local theirs = other:lock "x"
      loop.spawn(function() err = support.raised(one.lock, one, "x") end)
      wait_until_queued()
      observe [[SELECT pg_terminate_backend(pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE locktype = 'advisory' AND NOT granted AND application_name = 'locker']]
      wait_for("the error", function() return err end)
      assert.equal("lost", err.code)
      assert.equal("57P01", err.sqlstate)
      assert.equal(pglocks.key "x", err.key)
      theirs:release()
      one:lock("x"):release()
    end)

    test("opens another connection when an idle one was lost", function()
      local one = locker()
      one:lock("x"):release()
      observe("SELECT pg_terminate_backend($1)", sessions()[1].pid)
      wait_for("the backend to end", function() return #sessions() == 0 end)
      local lock = one:lock "x"
      assert.is_true(lock:check())
      lock:release()
    end)

    test("who needs another connection than one that waits hears why it cannot be opened", function()
      local one, other, got = locker { max_connections = 2 }, support.connect(), nil
      local theirs = other:lock "x"
      begin(function() got = one:lock "x" end)
      wait_until_queued()
      one:lock("y"):release()
      local port = one.keywords.port
      one.keywords.port, one.options.timeout = "1", 0.2
      observe [[SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'locker'
        AND wait_event_type IS DISTINCT FROM 'Lock']]
      wait_for("the backend to end", function() return #sessions() == 1 end)
      for _ = 1, 3 do
        support.assert_code("connect", one.lock, one, "y")
        support.assert_code("connect", one.try_lock, one, "y")
      end
      one.keywords.port, one.options.timeout = port, nil
      local lock = one:lock "y"
      theirs:release()
      wait_for("x", function() return got end)
      got:release()
      lock:release()
    end)

    test("all who wait hear why no connection can be opened", function()
      local one, codes = locker { host = "/nonexistent", timeout = 0.2 }, {}
      for _ = 1, 3 do
        loop.spawn(function() table.insert(codes, support.raised(one.lock, one, "x").code) end)
      end
      wait_for("all", function() return #codes == 3 end)
      assert.same({ "connect", "connect", "connect" }, codes)
    end)

    -- ---- modes, tokens --------------------------------------------------------------------

    test("upgrades and downgrades", function()
      local one, got = locker(), nil
      local lock = one:lock("x", { shared = true })
      local other = one:lock("x", { shared = true })
      assert.same({ nil, "busy" }, { lock:upgrade() })
      other:release()
      assert.is_true(lock:upgrade())
      assert.is_false(lock.shared)
      wait_for("the shared lock to be let go", function() return #pg_locks() == 1 end)
      assert.equal("ExclusiveLock", pg_locks()[1].mode)
      begin(function() got = one:lock("x", { shared = true }) end)
      assert.is_nil(got)
      assert.is_true(lock:downgrade())
      wait_for("who shares", function() return got end)
      assert.is_true(lock:held())
      wait_for("the exclusive lock to be let go", function() return #pg_locks() == 1 end)
      assert.equal("ShareLock", pg_locks()[1].mode)
      lock:release()
      assert.is_true(got:check())
      got:release()
    end)

    test("an upgrade waits for other holders, and for nothing when the lock is released", function()
      local one, changed, err = locker(), nil, nil
      local lock, other = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      begin(function() changed = lock:upgrade { timeout = 5 } end)
      assert.same({ nil, "busy" }, { one:try_lock("x", { shared = true }) }) -- nobody joins meanwhile
      other:release()
      wait_for("the upgrade", function() return changed end)
      assert.is_true(lock:check())
      lock:release()
      lock, other = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      begin(function() err = support.raised(lock.upgrade, lock, { timeout = 5 }) end)
      lock:release()
      other:release()
      other = one:lock "x"
      wait_for("the error", function() return err end)
      assert.equal("not_held", err.code)
      assert.is_true(other:check())
      assert.same({ nil, "busy" }, { one:try_lock("x", { shared = true }) })
      other:release()
    end)

    test("nobody joins those who share while one of them waits to be alone", function()
      local one, alone, why, later = locker { handover_time = 100 }, nil, nil, {}
      local lock, other = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      begin(function() alone = lock:upgrade { timeout = 10 } end)
      begin(function() later[1] = one:lock("x", { shared = true }) end)
      begin(function() why = select(2, one:try_lock("x", { timeout = 0.05 })) end)
      begin(function() later[2] = one:lock("x", { shared = true }) end)
      wait_for("who gave up", function() return why end)
      assert.same({}, later)
      other:release()
      wait_for("the upgrade", function() return alone end)
      assert.same({}, later)
      lock:release()
      wait_for("the others", function() return later[1] and later[2] end)
      later[1]:release()
      later[2]:release()
    end)

    test("an upgrade that fails lets others share as before", function()
      local one, other = locker { handover_time = 100 }, support.connect { scheduler = loop.scheduler }
      local lock, theirs, is_over = one:lock("x", { shared = true }), other:lock("x", { shared = true }), nil
      loop.spawn(function()
        theirs:upgrade { timeout = 10 }
        is_over = true
      end)
      wait_for("their upgrade to wait", function() return support.is_waiting(other.backend_pid) end)
      support.assert_code("deadlock", lock.upgrade, lock)
      local got = one:lock("x", { shared = true, timeout = 5 })
      assert.is_true(got:check())
      got:release()
      lock:release()
      wait_for("their upgrade", function() return is_over end)
      theirs:release()
    end)

    test("draws tokens", function()
      support.with_fsync()
      local one = locker()
      local first = one:lock("x", { token = true })
      local token = first.token
      first:release()
      local second = one:lock("x", { token = true })
      assert.is_true(second.token > token)
      assert.equal(1, #pg_locks())
      second:release()
      wait_for("all locks to be free", function() return #pg_locks() == 0 end)
      support.without_fsync()
    end)

    -- ---- what takes a connection of its own ----------------------------------------------

    test("semaphores, strategies and locks of a transaction have connections of their own", function()
      local one = locker()
      local a, b = one:lock("x", { slots = 2 }), one:lock("x", { slots = 2 })
      assert.equal(3, a.slot + b.slot)
      local polled = one:lock("y", { strategy = "poll" })
      local transaction = one:lock("z", { scope = "transaction" })
      assert.same({ nil, "busy" }, { one:try_lock "y" })
      assert.same({ nil, "busy" }, { one:try_lock "z" })
      local shown = one:lock("s", { comment = "why" })
      assert.same({ nil, "busy" }, { one:try_lock "s" })
      assert.same({}, one:locks())
      for _, lock in ipairs { a, b, polled, transaction, shown } do assert.is_true(lock:release()) end
      local all = one:lock_all { "y", "z" }
      assert.same({ nil, "busy" }, { one:try_lock "y" })
      all:release()
    end)

    -- ---- release, close -------------------------------------------------------------------

    test("release = \"confirmed\" waits until the lock is free", function()
      local one = locker { release = "confirmed" }
      for _ = 1, 20 do
        local lock = one:lock "x"
        assert.is_true(lock:release())
        assert.same({}, pg_locks())
      end
    end)

    test("who was given a lock in the moment of closing does not have it", function()
      local one, err = locker(), nil
      local lock = one:lock "x"
      begin(function() err = support.raised(one.lock, one, "x") end)
      lock:release() -- to that one, which has not heard of it yet
      close(one)
      wait_for("the error", function() return err end)
      assert.equal("closed", err.code)
    end)

    test("closing frees the locks, and ends the waits", function()
      local one, other, codes = locker(), support.connect(), {}
      local theirs = other:lock "y"
      local lock = one:lock "x"
      for _, key in ipairs { "x", "y" } do
        loop.spawn(function() table.insert(codes, support.raised(one.lock, one, key).code) end)
      end
      wait_until_queued()
      one:close()
      assert.equal(1, #pg_locks())
      wait_for("both", function() return #codes == 2 end)
      assert.same({ "closed", "closed" }, codes)
      assert.is_false(lock:held())
      assert.same({ nil, "not held" }, { lock:release() })
      assert.is_false(one:alive())
      support.assert_code("closed", one.lock, one, "x")
      one:close()
      theirs:release()
    end)

    test("lists what it holds, and what all hold", function()
      local one = locker()
      local a, b = one:lock "a", one:lock({ 1, 2 }, { shared = true })
      assert.equal(2, #one:locks())
      local names = {}
      for _, lock in ipairs(one:all_locks()) do names[tostring(lock.key)] = lock.mode end
      assert.equal("shared", names["(1, 2)"])
      a:release()
      b:release()
    end)

    -- ---- what happens meanwhile -------------------------------------------------------------

    test("lets the next share, when who wanted to be alone has given up", function()
      local one, other = locker(), support.connect()
      local theirs = other:lock("x", { shared = true })
      local why, got
      begin(function() why = select(2, one:try_lock("x", { timeout = 0.3 })) end)
      begin(function() got = one:lock("x", { shared = true, timeout = 6 * support.slow }) end)
      wait_until_queued()
      wait_for("the first to give up", function() return why end)
      local began = support.core.now()
      wait_for("the next", function() return got end)
      assert.is_true(support.core.now() - began < 3)
      got:release()
      theirs:release()
    end)

    test("asks whether a lock is free before its connection waits for another key", function()
      local one, other = locker { max_connections = 2, release = "confirmed" }, support.connect()
      local kept, x, y, got, taken, is_over = one:lock "kept", other:lock "x", other:lock "y", nil, nil, nil
      function one.turns.poll() end
      collectgarbage "stop"
      loop.spawn(function()
        one:lock "garbage"
        taken = true
      end)
      wait_for("garbage", function() return taken end)
      begin(function() got = one:lock "x" end)
      wait_until_queued()
      x:release()
      wait_for("x", function() return got end)
      begin(function()
        local lock = one:try_lock("y", { timeout = 4 * support.slow })
        if lock then lock:release() end
        is_over = true
      end)
      wait_for("a key that none waits for", function() return one.turns.starved[1] end)
      local advance = one.turns.advance
      function one.turns.advance(...)
        advance(...)
        collectgarbage()
      end
      assert.is_true(support.timed(got.release, got) < 1.5 * support.slow)
      y:release()
      wait_for("who waits for y", function() return is_over end)
      kept:release()
    end)

    test("what a connection is asked for that has just ended is refused", function()
      local one, said, told = locker(), nil, nil
      local lock = one:lock "x"
      local link = one.turns.links[1]
      wait_for("the connection to rest", function() return not link.driven end)
      link:close() -- as what is collected meanwhile may find it lost
      begin(function() said = support.raised(link.call, link, function() end) end)
      link:ask { lock = lock, shared = false, done = function(_, _, _, err) told = err end }
      wait_for("both answers", function() return said and told end)
      assert.equal("closed", said.code)
      assert.equal("closed", told.code)
    end)

    test("opens nothing when a lock is collected while it is closed", function()
      local one, errors, taken = locker(), 0, nil
      collectgarbage "stop"
      loop.spawn(function()
        one:lock "garbage"
        taken = true
      end)
      wait_for("garbage", function() return taken end)
      local lock, scheduler = one:lock "x", one.turns.scheduler
      for _, key in ipairs { "x", "x", "garbage", "garbage" } do
        begin(function()
          support.assert_code("closed", one.lock, one, key)
          errors = errors + 1
        end)
      end
      one.turns.scheduler = setmetatable({
        wake = function(token)
          collectgarbage()
          scheduler.wake(token)
        end,
      }, { __index = scheduler })
      one:close()
      wait_for("all", function() return errors == 4 end)
      assert.same({}, one.turns.links)
      assert.is_false(lock:held())
    end)

    for _, key in ipairs { "x", "y" } do
      test("ends at once, and opens nothing, when on_lost closes it in the call for a lock on " .. key, function()
        local one, said
        one = locker { on_lost = function() one:close() end }
        local lock = one:lock "x"
        local link = one.turns.links[1]
        wait_for("the connection to rest", function() return not link.driven end)
        observe("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'locker'")
        local began = support.core.now()
        begin(function() said = support.raised(one.lock, one, key, { timeout = 3 * support.slow }) end)
        wait_for("an answer", function() return said end)
        assert.equal("closed", said.code)
        assert.is_true(support.core.now() - began < 2 * support.slow)
        assert.same({}, one.turns.links)
        assert.is_false(lock:held())
      end)
    end

    test("raises closed to who asks about a lock while the release of another was refused", function()
      local one, said = locker { on_lost = function() end }, nil
      local a, b = one:lock "a", one:lock "b"
      local link, query = one.turns.links[1], support.core.scheduled.connection.query
      link:call(query, "SELECT pg_advisory_unlock($1)", tostring(a.key))
      a:release()
      begin(function() pcall(link.call, link, query, "SELECT pg_sleep(2)") end)
      begin(function() said = support.raised(b.check, b) end)
      wait_for("the query to run", function()
        return #observe "SELECT 1 AS one FROM pg_stat_activity WHERE wait_event = 'PgSleep'" == 1
      end)
      close(one)
      wait_for("an answer", function() return said end)
      assert.equal("closed", said.code)
    end)

    test("a confirmed release raises its own error when the key is released again meanwhile", function()
      local one, err, again = locker { release = "confirmed", handovers = 0 }, nil, nil
      local lock = one:lock "a"
      one.turns.links[1]:call(support.core.scheduled.connection.query, "SELECT pg_advisory_unlock_all()")
      begin(function() again = one:lock("a"):release() end)
      begin(function() err = support.raised(lock.release, lock) end)
      wait_for("both", function() return err and again end)
      assert.equal("not_held", err.code)
    end)

    test("a confirmed release raises its own error when the key is taken again before it returns", function()
      local one, err, again = locker { release = "confirmed", handovers = 0 }, nil, nil
      local lock = one:lock "a"
      local entry, advance = one.turns.entries[support.core.identity(lock)], one.turns.advance
      one.turns.links[1]:call(support.core.scheduled.connection.query, "SELECT pg_advisory_unlock_all()")
      begin(function() again = one:lock "a" end)
      function one.turns.advance(...)
        one.turns.advance = nil
        advance(...)
        while not entry.link do loop.sleep(0.001) end -- as when the answer is there at once
      end
      begin(function() err = support.raised(lock.release, lock) end)
      wait_for("both", function() return err and again end)
      assert.equal("not_held", err.code)
      again:release()
    end)

    test("keeps no word of refused releases that nobody confirms", function()
      local one = locker()
      local locks = { one:lock "a", one:lock "b", one:lock "c" }
      local link = one.turns.links[1]
      link:call(support.core.scheduled.connection.query, "SELECT pg_advisory_unlock_all()")
      for _, lock in ipairs(locks) do lock:release() end
      one:lock("d"):release()
      wait_for("rest", function() return not link.driven end)
      assert.same({}, link.releases)
    end)

    test("each of several confirmed releases raises what became of its own lock", function()
      local one, errors = locker { release = "confirmed" }, {}
      local locks = { one:lock "a", one:lock "b", one:lock "c" }
      one.turns.links[1]:call(support.core.scheduled.connection.query, "SELECT pg_advisory_unlock_all()")
      for i, lock in ipairs(locks) do
        loop.spawn(function() errors[i] = support.raised(lock.release, lock) end)
      end
      wait_for("all", function() return errors[1] and errors[2] and errors[3] end)
      for i, lock in ipairs(locks) do
        assert.equal("not_held", errors[i].code)
        assert.equal(lock.key, errors[i].key)
      end
    end)

    test("does what begins while it looks for the last time whether its connection was lost", function()
      local one, got = locker(), nil
      one:lock("x"):release()
      local link, connection = one.turns.links[1], support.core.connection
      local alive, calls = connection.alive, 0
      connection.alive = function(conn)
        local is_alive = alive(conn)
        if conn == link.conn and link.driven and not link.tries[1] and link.doing == 0 then
          calls = calls + 1
          if calls == 2 then -- as from on_lost
            begin(function() got = one:try_lock("y", { timeout = 2 * support.slow }) or "timeout" end)
          end
        end
        return is_alive
      end
      one:lock("z"):release()
      wait_for("y", function() return got end)
      connection.alive = alive
      assert.not_equal("timeout", got)
      got:release()
    end)

    test("lets others share after two upgrades that failed", function()
      local one, a, b = locker { handover_time = 100 }, nil, nil
      local l1, l2 = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      begin(function() a = { l1:upgrade { timeout = 0.1 } } end)
      begin(function() b = { l2:upgrade { timeout = 0.4 } } end)
      wait_for("both", function() return a and b end)
      assert.same({ nil, "busy" }, { a[1], a[2] })
      assert.same({ nil, "busy" }, { b[1], b[2] })
      local got
      begin(function() got = one:try_lock("x", { shared = true, timeout = 1 }) or "timeout" end)
      wait_for("an answer", function() return got end)
      l1:release()
      l2:release()
      assert.not_equal("timeout", got)
      got:release()
    end)

    test("lets others share after an upgrade whose lock was released", function()
      local one, err = locker { handover_time = 100 }, nil
      local l1, l2 = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      begin(function() err = support.raised(l1.upgrade, l1, { timeout = 5 }) end)
      l1:release()
      wait_for("the error", function() return err end)
      assert.equal("not_held", err.code)
      local got
      begin(function() got = one:try_lock("x", { shared = true, timeout = 1 }) or "timeout" end)
      wait_for("an answer", function() return got end)
      l2:release()
      assert.not_equal("timeout", got)
      got:release()
    end)

    test("lets nobody share with who is being upgraded", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local one, a, b, c = locker { handover_time = 100 }, nil, nil, nil
      local l1, l2 = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      begin(function() a = { l1:upgrade { timeout = 0.1 } } end)
      begin(function() b = { l2:upgrade { timeout = 10 } } end)
      wait_for("the first", function() return a end)
      local pid = sessions()[1].pid
      support.signal("STOP", pid)
      l1:release()
      wait_for("the second to ask", function() return one.turns.links[1].doing > 0 end)
      begin(function() c = one:try_lock("x", { shared = true, timeout = 3 * support.slow }) end)
      loop.sleep(0.1)
      support.signal("CONT", pid)
      wait_for("the upgrade", function() return b end)
      local both = not l2.shared and l2:held() and c and c:held()
      l2:release()
      wait_for("who shares", function() return c end)
      c:release()
      assert.is_falsy(both)
    end)

    test("lets nobody share with who is being upgraded, also when nobody was kept out for so long", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local one, upgraded = locker { handover_time = 100 }, nil
      local lock = one:lock("x", { shared = true })
      local pid = sessions()[1].pid
      support.signal("STOP", pid)
      begin(function() upgraded = lock:upgrade { timeout = 10 * support.slow } end)
      wait_for("it to ask", function() return one.turns.links[1].doing > 0 end)
      one.turns.entries[support.core.identity(lock)].changes = nil -- as after some time
      local other = one:lock("x", { shared = true })
      support.signal("CONT", pid)
      wait_for("its answer", function() return one.turns.links[1].doing == 0 end)
      assert.is_true(lock.shared)
      other:release()
      wait_for("the upgrade", function() return upgraded end)
      assert.is_false(lock.shared)
      lock:release()
    end)

    test("lets others share when the coroutine of an upgrade has ended", function()
      if not loop.forget then return end
      local one, got = locker { handover_time = 100 }, nil
      local l1, l2 = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      local co = loop.spawn(function() l1:upgrade { timeout = 60 * support.slow } end)()
      local entry = one.turns.entries[support.core.identity(l1)]
      wait_for("nobody to join", function() return entry.changes end)
      if coroutine.close then coroutine.close(co) end
      loop.forget(co)
      local attempt, ends = next(entry.changes)
      assert.is_true(ends < support.core.now() + 5)
      entry.changes[attempt] = support.core.now() + 0.01 -- for the rest of that time nothing happens
      begin(function() got = one:lock("x", { shared = true, timeout = 20 * support.slow }) end)
      wait_for("who shares", function() return got end)
      for _, lock in ipairs { l1, l2, got } do lock:release() end
    end)

    test("lets nobody share while one is being upgraded, when the upgrade of another ends", function()
      local one, a, b, c = locker { handover_time = 100 }, nil, nil, nil
      local l1, l2 = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      local entry = one.turns.entries[support.core.identity(l1)]
      begin(function() b = l2:upgrade { timeout = 10 * support.slow } end)
      wait_for("nobody to join", function() return entry.changes end)
      begin(function() a = support.raised(l1.upgrade, l1, { timeout = 10 * support.slow }) end)
      begin(function() c = one:lock("x", { shared = true }) end)
      l1:release()
      wait_for("the end of the first", function() return a end)
      assert.is_true(b or c == nil)
      wait_for("the upgrade", function() return b end)
      assert.is_nil(c)
      l2:release()
      wait_for("who shares", function() return c end)
      c:release()
    end)

    test("is exclusive when it is upgraded twice at once", function()
      local one, a, b = locker(), nil, nil
      local lock = one:lock("x", { shared = true })
      begin(function() a = lock:upgrade { timeout = 2 } end)
      begin(function() b = lock:upgrade { timeout = 2 } end)
      wait_for("both", function() return a ~= nil and b ~= nil end)
      local shared = lock.shared
      lock:release()
      assert.is_false(shared)
    end)

    test("a try does not wait for an upgrade", function()
      if support.cannot_signal then return pending(support.cannot_signal) end
      local one, up = locker { handovers = 0 }, nil
      local lock, second = one:lock("x", { shared = true }), one:lock("x", { shared = true })
      local pid = sessions()[2].pid
      support.signal("STOP", pid)
      local began, seconds = support.core.now(), nil
      begin(function()
        one:try_lock("x", { shared = true })
        seconds = support.core.now() - began
      end)
      begin(function() up = { lock:upgrade { timeout = 5 * support.slow } } end)
      support.signal("CONT", pid)
      wait_for("the try", function() return seconds end)
      second:release()
      wait_for("the upgrade", function() return up end)
      lock:release()
      assert.is_true(seconds < 2 * support.slow, seconds)
    end)

    test("a poll that cannot begin is begun again, and costs nobody his locks", function()
      local has_failed, one, got
      one = locker { max_connections = 2, scheduler = setmetatable({
        spawn = function(fn)
          if one.turns.polls and not has_failed then
            has_failed = true
            error("no more timers", 0)
          end
          return loop.spawn(fn)
        end,
      }, { __index = loop.spawning or require("pglocks.scheduler." .. loop.scheduler) }) }
      local y, other = one:lock "y", support.connect()
      local theirs = other:lock_all { "x", "z" }
      begin(function() one:lock("x", { timeout = 20 * support.slow }):release() end)
      wait_until_queued()
      begin(function() got = one:lock("z", { timeout = 20 * support.slow }) end)
      wait_for("a poll to fail", function() return has_failed end)
      assert.is_true(y:held())
      wait_for("another one", function() return one.turns.polls end)
      theirs:release()
      wait_for("who waits", function() return got end)
      got:release()
      y:release()
    end)

    test("opens nothing for a key that no connection waited for, when it is closed", function()
      local one, other = locker { max_connections = 2 }, support.connect()
      local y, theirs, errors = one:lock "y", other:lock_all { "x", "z" }, {}
      begin(function() errors.x = support.raised(one.lock, one, "x") end)
      wait_until_queued()
      begin(function() errors.z = support.raised(one.lock, one, "z") end)
      wait_for("a key that none waits for", function() return one.turns.starved[1] end)
      one:close()
      wait_for("both", function() return errors.x and errors.z end)
      assert.same({ "closed", "closed" }, { errors.x.code, errors.z.code })
      assert.same({}, one.turns.links)
      assert.is_false(y:held())
      theirs:release()
    end)

    test("opens nothing for who was left out, and comes back when it is closed", function()
      local one, err = locker(), nil
      local lock, got = one:lock "x", nil
      begin(function() err = support.raised(function() got = one:lock("x", { timeout = 3 }) end) end)
      for _, entry in pairs(one.turns.entries) do if entry.first then entry.first.left_at = 0 end end
      lock:release()
      one:close()
      wait_for("an end", function() return err or got end)
      assert.is_nil(got)
      assert.equal(pglocks.key "x", err.key)
    end)

    -- ---- many -----------------------------------------------------------------------------

    test("1,000 locks at once on 10 connections", function()
      local one, locks = locker(), {}
      for i = 1, 1000 do loop.spawn(function() table.insert(locks, (one:lock(i))) end) end
      wait_for("all", function() return #locks == 1000 end)
      assert.equal(1000, #pg_locks())
      wait_for("ten sessions", function() return #sessions() <= 10 end) -- those of other tests may be ending
      for _, lock in ipairs(locks) do lock:release() end
      wait_for("all locks to be free", function() return #pg_locks() == 0 end)
    end)

    -- (x1 + x2 + ...)^2 / n (x1^2 + x2^2 + ...): 1 when all have got the same.
    local function jain(counts)
      local sum, squares = 0, 0
      for _, count in ipairs(counts) do sum, squares = sum + count, squares + count ^ 2 end
      return sum ^ 2 / (#counts * squares)
    end

    test("turns are fair among coroutines and among lockers, whoever shares", function()
      local all, turns, over, finished = { locker(), locker(), locker() }, { {}, {}, {} }, false, 0
      for l, one in ipairs(all) do
        for i = 1, 8 do
          turns[l][i] = 0
          loop.spawn(function()
            while not over do
              local lock = one:lock("x", { shared = i % 4 == 0 })
              turns[l][i] = turns[l][i] + 1
              loop.sleep(0.001)
              lock:release()
            end
            finished = finished + 1
          end)
        end
      end
      loop.sleep(1 * support.slow)
      over = true
      wait_for("all", function() return finished == 24 end)
      local sums, said = {}, ""
      for l, counts in ipairs(turns) do
        sums[l] = 0
        for _, count in ipairs(counts) do sums[l] = sums[l] + count end
        said = said .. (" %.3f"):format(jain(counts))
        assert.is_true(jain(counts) > 0.7, "coroutines:" .. said)
      end
      assert.is_true(jain(sums) > 0.7, "lockers: " .. jain(sums))
      print(("  Jain's index: of lockers %.3f, of coroutines%s"):format(jain(sums), said))
    end)

    test("owners of few keys exclude each other", function()
      local one, holders, finished = locker(), {}, 0
      for i = 1, 20 do
        loop.spawn(function()
          for round = 1, 10 do
            local key, shared = (i + round) % 3, (i * round) % 4 == 0
            local lock = one:lock(key, { shared = shared })
            local state = holders[key] or { shared = 0, exclusive = 0 }
            holders[key] = state
            local mode = shared and "shared" or "exclusive"
            state[mode] = state[mode] + 1
            assert(state.exclusive == 0 or (state.exclusive == 1 and state.shared == 0))
            if round % 3 == 0 then loop.sleep(0.0001) end
            assert(state.exclusive == 0 or (state.exclusive == 1 and state.shared == 0))
            state[mode] = state[mode] - 1
            assert(lock:release())
          end
          finished = finished + 1
        end)
      end
      wait_for("all", function() return finished == 20 end)
    end)
  end)
end

under("cqueues", loops.cqueues)
under("luv", loops.luv)
under("a scheduler of the user's own", loops.own)

describe("pglocks.locker", function()
  after_each(support.finish)

  it("refuses what no locker can do, and names it", function()
    local function refused(what, described)
      local err = support.raised(function() pglocks.locker(described) end)
      assert.is_truthy(err:find("bad argument #1 to 'locker'", 1, true), err)
      assert.is_truthy(err:find(what, 1, true), err)
    end
    refused("scheduler", CONNINFO)
    refused("scheduler", { scheduler = "blocking" })
    refused("spawn", { scheduler = loops.own.scheduler })
    refused("pooled", { scheduler = "luv", pooled = "transaction" })
    refused("lease", { scheduler = "luv", lease = 10 })
    local wrong_ones = { max_connections = 1, locks_per_connection = 0, handovers = -1, handover_time = 0 / 0 }
    for option, wrong in pairs(wrong_ones) do
      refused(option, { scheduler = "luv", [option] = wrong })
    end
  end)

  it("works outside of a running loop", function()
    for _, scheduler in ipairs { "cqueues", "luv" } do
      local one, other = pglocks.locker { conninfo = CONNINFO, scheduler = scheduler }, support.connect()
      local lock = one:lock "x"
      assert.is_true(lock:check())
      assert.same({ nil, "busy" }, { one:try_lock "x" })
      assert.is_true(lock:release())
      local theirs = other:lock "x"
      assert.same({ nil, "timeout" }, { one:try_lock("x", { timeout = 0.05 }) })
      theirs:release()
      loops[scheduler].run(function() lock = one:lock "x" end)
      assert.same({ nil, "timeout" }, { one:try_lock("x", { timeout = 0.05 }) })
      assert.is_true(lock:release())
      assert.is_true(one:lock("x"):release())
      one:close()
      assert.same({}, pg_locks())
      other:close()
    end
  end)

  it("belongs to the process that used it", function()
    local one = pglocks.locker { conninfo = CONNINFO, scheduler = "luv" }
    local lock = one:lock "x"
    local pid = process.fork()
    if pid == 0 then
      local ok, err = pcall(one.lock, one, "y")
      process.exit(not ok and err.code == "forked" and not lock:held() and 0 or 1)
    end
    assert.equal(0, process.wait(pid))
    assert.is_true(lock:check())
    one:close()
  end)
end)
