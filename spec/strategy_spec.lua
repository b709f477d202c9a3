-- The option `strategy`: waiting by tries, with notifications or without, that holds no snapshot.

local support = require "spec.support"
local loops = require "spec.loops"
local pglocks = require "pglocks"
local scheduled = require "pglocks.scheduled"

local core = support.core
local pg_locks, wait_until, assert_code = support.pg_locks, support.wait_until, support.assert_code

-- ---- what can be seen of a waiter ---------------------------------------------------------

local function channels(conn) return #conn:query "SELECT pg_listening_channels()" end

-- Holds nothing but `count` locks, and listens to nothing.
local function assert_holds_only(count, conn)
  conn:ping() -- what was only sent has been done
  assert.equal(count, #pg_locks(conn.backend_pid))
  assert.equal(count, #conn:locks())
  assert.equal(0, channels(conn))
end

local function activity(pid)
  return support.observe("SELECT state, query, backend_xmin FROM pg_stat_activity WHERE pid = $1", pid)[1]
end

-- Is it in a pause between two tries?
local function is_pausing(pid)
  local now = activity(pid)
  return now.state == "idle" and now.query:find("try_advisory", 1, true)
end

local function channel(key) return "pglocks " .. tostring(core.marker(pglocks.key(key))) end

-- ---- pauses -----------------------------------------------------------------------------

local hear = scheduled.hear
local pauses = {} -- seconds of each, by connection

local longest -- if not nil, of all pauses: then only a notification ends one

local function never_poll() longest = 60 end

local function begin_pauses()
  function scheduled.hear(conn, seconds)
    pauses[conn] = pauses[conn] or {}
    table.insert(pauses[conn], seconds)
    return hear(conn, longest or seconds)
  end
end

local function finish()
  scheduled.hear, pauses, longest = hear, {}, nil
  pglocks.setup {}
  support.finish()
end

-- ---- ways to hold a lock, and to let it go ----------------------------------------------

-- Each takes a lock on `key` and returns what ends it.
local holders = {
  ["release()"] = function(conn, key)
    local lock = conn:lock(key)
    return function() lock:release() end
  end,
  ["release() of a shared lock"] = function(conn, key)
    local lock = conn:lock(key, { shared = true })
    return function() lock:release() end
  end,
  ["the outermost release()"] = function(conn, key)
    local outer, inner = conn:lock(key), conn:lock(key)
    return function()
      inner:release()
      outer:release()
    end
  end,
  ["the end of a scope"] = function(conn, key)
    local lock = conn:lock(key)
    return function() getmetatable(lock).__close(lock) end
  end,
  ["collection"] = function(conn, key)
    local lock = conn:lock(key)
    return function()
      lock = lock and nil
      collectgarbage()
      collectgarbage()
    end
  end,
  ["close()"] = function(conn, key)
    conn:lock(key)
    return function() conn:close() end
  end,
  ["close() of a scope"] = function(conn, key)
    conn:lock(key)
    return function() getmetatable(conn).__close(conn) end
  end,
  ["lock_all"] = function(conn, key)
    local keys = { key }
    for i = 1, 31 do keys[#keys + 1] = i end
    local lock = conn:lock_all(keys)
    return function() lock:release() end
  end,
  ["a change of mode"] = function(conn, key)
    local lock = conn:lock(key)
    lock:downgrade()
    lock:upgrade()
    return function() lock:release() end
  end,
  ["release() in transaction scope"] = function(conn, key)
    local lock = conn:lock(key, { scope = "transaction" })
    return function() lock:release() end
  end,
  ["a rollback at the end of a scope"] = function(conn, key)
    local lock = conn:lock(key, { scope = "transaction" })
    return function() getmetatable(lock).__close(lock) end
  end,
  ["COMMIT"] = function(conn, key)
    conn:query "BEGIN"
    conn:lock(key, { scope = "transaction" })
    return function() conn:query "COMMIT" end
  end,
  ["ROLLBACK"] = function(conn, key)
    conn:query "BEGIN"
    conn:lock(key, { scope = "transaction" })
    return function() conn:query "ROLLBACK" end
  end,
  ["release() inside a transaction, when that ends"] = function(conn, key)
    conn:query "BEGIN"
    local lock = conn:lock(key)
    return function()
      lock:release()
      conn:query "COMMIT"
    end
  end,
  ["release() in a failed transaction, when that ends"] = function(conn, key)
    local lock = conn:lock(key)
    conn:query "BEGIN"
    pcall(conn.query, conn, "SELECT 1/0")
    return function()
      lock:release()
      conn:query "ROLLBACK"
    end
  end,
}

-- Of conn:transaction, in a coroutine, which the end of the lock goes on with.
local function in_transaction(goes_well, scope)
  return function(conn, key)
    local body = coroutine.create(function()
      pcall(conn.transaction, conn, function()
        conn:lock(key, { scope = scope })
        coroutine.yield()
        if not goes_well then error("no", 0) end
      end)
    end)
    assert(coroutine.resume(body))
    return function() assert(coroutine.resume(body)) end
  end
end

local blocking_holders = {
  ["conn:transaction"] = in_transaction(true, "transaction"),
  ["conn:transaction that raises"] = in_transaction(false, "transaction"),
}
for name, hold in pairs(holders) do blocking_holders[name] = hold end

-- ---- in a loop --------------------------------------------------------------------------

local function under(name, loop)
  local function connect(options)
    local described = { scheduler = loop.scheduler }
    for option, value in pairs(options or {}) do described[option] = value end
    return support.connect(described)
  end

  local function wait_in(what, condition) support.wait_in(loop, what, condition) end

  -- A test whose body is a coroutine of the loop.
  local function test(title, body)
    it(title, function() loop.run(body) end)
  end

  -- Begins a wait in a coroutine of its own; the result gets `lock` and `why`, or `err`, and `at`.
  local function begin(conn, method, key, options)
    local wait = {}
    pauses[conn] = nil
    loop.spawn(function()
      local ok, lock, why = pcall(conn[method], conn, key, options)
      wait.at = core.now()
      if ok then wait.lock, wait.why = lock, why else wait.err = lock end
      wait.over = true
    end)
    wait_in("the wait", function() return wait.over or pauses[conn] end)
    local began = core.now() -- shorter holds are not announced
    wait_in("a while", function() return core.now() - began > 0.002 end)
    return wait
  end

  local function ended(wait)
    wait_in("the end of the wait", function() return wait.over end)
    return wait
  end

  describe("strategy, " .. name .. ":", function()
    before_each(begin_pauses)
    after_each(finish)

    for what, hold in pairs(blocking_holders) do
      test("notify hears of " .. what, function()
        never_poll()
        local holder, waiter = support.connect(), connect()
        local let_go = hold(holder, "x")
        local wait = begin(waiter, "lock", "x", { strategy = "notify" })
        local before = core.now()
        let_go()
        ended(wait)
        assert.is_true(wait.lock:check())
        assert.is_true(wait.at - before < 0.4 * support.slow, wait.at - before)
        assert_holds_only(1, waiter)
        wait.lock:release()
      end)
    end

    for what, hold in pairs(holders) do
      test("notify hears of " .. what .. " of a connection with a scheduler", function()
        never_poll()
        local holder, waiter = connect(), connect()
        local let_go = hold(holder, "x")
        local wait = begin(waiter, "lock", "x", { strategy = "notify" })
        let_go()
        assert.is_true(ended(wait).lock:check())
        wait.lock:release()
      end)
    end

    test("notify hears of a scheduled conn:transaction that raises", function()
      never_poll()
      local holder, waiter = connect(), connect()
      local holds, go_on
      loop.spawn(function()
        pcall(holder.transaction, holder, function()
          holder:lock("x", { scope = "transaction" })
          holds = true
          wait_in("the word", function() return go_on end)
          error("no", 0)
        end)
      end)
      wait_in("the lock", function() return holds end)
      local wait = begin(waiter, "lock", "x", { strategy = "notify" })
      go_on = true
      assert.is_true(ended(wait).lock:check())
    end)

    for _, release in ipairs { "confirmed", "deferred" } do
      test("notify hears of a release that is " .. release, function()
        never_poll()
        local holder, waiter = support.connect { release = release }, connect()
        for _ = 1, 5 do
          local lock = holder:lock "x"
          local wait = begin(waiter, "lock", "x", { strategy = "notify" })
          lock:release()
          ended(wait).lock:release()
          waiter:ping()
        end
        assert_holds_only(0, waiter)
      end)
    end

    test("notify hears of each key of lock_all, and waits for many", function()
      never_poll()
      local keys = {}
      for i = 1, 30 do keys[i] = i end
      keys[31], keys[32] = "name", { 7, 42 }
      local holder, waiter = support.connect(), connect()
      for _, key in ipairs { 1, 30, "name", { 7, 42 } } do
        local lock = holder:lock(key)
        local wait = begin(waiter, "lock_all", keys, { strategy = "notify" })
        wait_in("its markers", function() return #pg_locks(waiter.backend_pid) >= 32 end)
        lock:release()
        assert.equal(32, #ended(wait).lock.keys)
        assert.is_true(wait.lock:check())
        assert_holds_only(32, waiter)
        wait.lock:release()
        waiter:ping()
      end
    end)

    test("all who wait are woken, and one after the other gets it", function()
      local holder, waits = support.connect(), {}
      local lock = holder:lock "x"
      for i = 1, 4 do waits[i] = begin(connect(), "lock", "x", { strategy = "notify" }) end
      lock:release()
      for _ = 1, 4 do
        local one
        wait_in("one of them", function()
          for i, wait in ipairs(waits) do
            if wait.over then one = i end
          end
          return one
        end)
        assert.is_true(waits[one].lock:check())
        waits[one].lock:release()
        table.remove(waits, one)
      end
    end)

    -- ---- who tells nobody ---------------------------------------------------------------

    for _, strategy in ipairs { "notify", "poll" } do
      test(strategy .. " notices plain SQL, and a session that ended", function()
        local waiter = connect()
        local other = pglocks.connect(support.conninfo)
        local key = tostring(pglocks.key "x")
        for _, let_go in ipairs {
          function() other:query("SELECT pg_advisory_unlock($1)", key) end,
          function() support.observe("SELECT pg_terminate_backend($1)", other.backend_pid) end,
        } do
          other:query("SELECT pg_advisory_lock($1)", key)
          local wait = begin(waiter, "lock", "x", { strategy = strategy })
          let_go()
          local before = core.now()
          ended(wait)
          assert.is_true(wait.at - before < 1.5 * support.slow, wait.at - before)
          assert_holds_only(1, waiter)
          wait.lock:release()
          waiter:ping()
        end
      end)

      -- ---- snapshots --------------------------------------------------------------------

      test(strategy .. " holds no snapshot, and CREATE INDEX CONCURRENTLY works beside it", function()
        local holder, waiter, builder = support.connect(), connect(), connect()
        builder:query "CREATE TABLE IF NOT EXISTS indexed (n int)"
        builder:query "SET statement_timeout = '20s'"
        local lock = holder:lock "x"
        local wait = begin(waiter, "lock", "x", { strategy = strategy })
        local seen = 0
        wait_in("looks between two tries", function()
          local now = activity(waiter.backend_pid)
          if now.state ~= "active" then
            assert.equal("idle", now.state)
            assert.is_nil(now.backend_xmin)
            seen = seen + 1
          end
          return seen >= 20
        end)
        builder:query "CREATE INDEX CONCURRENTLY indexed_n ON indexed (n)"
        builder:query "DROP TABLE indexed"
        assert.is_nil(wait.over)
        lock:release()
        ended(wait).lock:release()
      end)

      -- ---- how waits end ------------------------------------------------------------------

      for method, key in pairs { lock = "x", try_lock = "x", lock_all = { "x", "y" }, try_lock_all = { "x", 7 } } do
        test(method .. " with " .. strategy .. " keeps to its timeout, and leaves nothing behind", function()
          local holder, waiter = support.connect(), connect()
          local lock = holder:lock "x"
          for _, timeout in ipairs { 0.3, 0.0004 } do
            local options = { strategy = strategy, timeout = timeout }
            local seconds, ok, got, why = support.timed(pcall, waiter[method], waiter, key, options)
            assert.is_true(seconds >= timeout and seconds < timeout + 0.5 * support.slow, seconds)
            if method:find "^try" then
              assert.is_true(ok)
              assert.is_nil(got)
              assert.equal("timeout", why)
            else
              assert.is_false(ok)
              assert.equal("timeout", got.code)
              assert.equal(method == "lock" and pglocks.key "x" or nil, got.key)
              local what = method == "lock" and '"x"' or "2 keys"
              assert.equal(("no lock on %s within %g s"):format(what, timeout), got.message)
            end
            waiter:ping()
            assert_holds_only(0, waiter)
          end
          lock:release()
        end)
      end

      test(strategy .. " ends when its session is terminated, at once, and tells of no lock", function()
        never_poll()
        local lost
        local holder = support.connect()
        local waiter = connect { on_lost = function(_, _, locks) lost = locks end }
        holder:lock "x"
        local wait = begin(waiter, "lock", "x", { strategy = strategy })
        local before = core.now()
        support.observe("SELECT pg_terminate_backend($1)", waiter.backend_pid)
        assert.equal("lost", ended(wait).err.code)
        assert.equal("57P01", wait.err.sqlstate)
        assert.is_true(wait.at - before < 1 * support.slow)
        assert.same({}, lost)
      end)

      test(strategy .. " ends by conn:cancel()", function()
        never_poll()
        local holder, waiter = support.connect(), connect()
        local lock = holder:lock "x"
        local wait = begin(waiter, "lock", "x", { strategy = strategy })
        assert_code("busy_connection", waiter.lock, waiter, "y")
        assert.same({}, waiter:locks())
        assert.is_true(waiter:cancel())
        assert.equal("interrupted", ended(wait).err.code)
        waiter:ping()
        assert_holds_only(0, waiter)
        lock:release()
      end)

      test(strategy .. " inside a transaction polls, and harms it not", function()
        local holder, waiter = support.connect(), connect()
        local lock = holder:lock "x"
        waiter:query "BEGIN"
        waiter:query "CREATE TEMPORARY TABLE t (n int)"
        for _, scope in ipairs { "session", "transaction" } do
          assert.same({ nil, "timeout" },
            { waiter:try_lock("x", { strategy = strategy, timeout = 0.05, scope = scope }) })
        end
        assert.same({}, pg_locks(waiter.backend_pid))
        local options = { strategy = strategy, scope = "transaction" }
        local wait = begin(waiter, "lock", "x", options)
        lock:release()
        assert.is_true(ended(wait).lock:check())
        waiter:query "INSERT INTO t VALUES (1)"
        waiter:query "COMMIT"
        assert.same({ { n = 1 } }, waiter:query "SELECT n FROM t")
        assert_holds_only(0, waiter)
      end)

      for _, ends in ipairs { "release", "rollback" } do
        test(strategy .. " in transaction scope listens to nothing after its " .. ends, function()
          local holder, waiter = support.connect(), connect()
          local lock = holder:lock "x"
          local wait = begin(waiter, "lock", "x", { strategy = strategy, scope = "transaction" })
          lock:release()
          assert.equal("transaction", ended(wait).lock.scope)
          waiter:ping()
          assert.is_true(core.in_transaction(waiter))
          assert.equal(1, #pg_locks(waiter.backend_pid))
          if ends == "release" then wait.lock:release() else getmetatable(wait.lock).__close(wait.lock) end
          waiter:ping()
          assert.is_false(core.in_transaction(waiter))
          assert_holds_only(0, waiter)
        end)
      end

      test(strategy .. " polls behind a pooler of transactions", function()
        local holder, waiter = support.connect(), connect()
        core.configure(waiter, { pooled = "transaction", lease = 0 })
        local lock = holder:lock "x"
        assert.same({ nil, "timeout" }, { waiter:try_lock("x", { strategy = strategy, timeout = 0.1 }) })
        local wait = begin(waiter, "lock", "x", { strategy = strategy })
        lock:release()
        assert.equal("transaction", ended(wait).lock.scope)
        wait.lock:release()
        assert_holds_only(0, waiter)
      end)

      test(strategy .. " of the module's own locks gives its connection back", function()
        pglocks.setup { databases = { default = { conninfo = support.conninfo, pool_size = 2 } },
          scheduler = loop.scheduler }
        local turns, inside = 0, false
        local function turn()
          pglocks.with_lock("x", { strategy = strategy, timeout = 10 }, function()
            assert.is_false(inside)
            inside = true
            loop.sleep(0.005)
            inside = false
            turns = turns + 1
          end)
        end
        for _ = 1, 6 do loop.spawn(turn) end
        wait_in("their turns", function() return turns == 6 end)
        assert.same({ false, "timeout" }, { pglocks.with_lock("y", function()
          return pglocks.try_with_lock("y", { strategy = strategy, timeout = 0.05 }, error)
        end) })
        wait_in("the end of all locks", function() return #pg_locks() == 0 end)
      end)
    end

    -- A coroutine of cqueues goes on only by its controller.
    if name ~= "luv" then return end

    test("a coroutine that was closed waits no longer", function()
      never_poll()
      local holder, waiter = support.connect(), connect()
      local lock = holder:lock "x"
      local co = coroutine.create(function() pcall(waiter.lock, waiter, "x", { strategy = "notify" }) end)
      assert(coroutine.resume(co))
      wait_in("its marker", function() return #pg_locks(waiter.backend_pid) == 1 end)
      local close = rawget(coroutine, "close") -- Lua 5.4
      if close then close(co) else waiter:cancel() end
      wait_in("its marker to go", function() return #pg_locks(waiter.backend_pid) == 0 end)
      lock:release()
    end)
  end)
end

under("cqueues", loops.cqueues)
under("luv", loops.luv)

-- ---- without a loop ---------------------------------------------------------------------

describe("strategy", function()
  before_each(begin_pauses)
  after_each(finish)

  it("of a queue holds a snapshot, as the others do not", function()
    local holder, waiter = support.connect(), support.connect()
    holder:lock "x"
    support.begin(waiter, "lock", "x", { timeout = 20 })
    support.wait_until_waiting(waiter.backend_pid)
    assert.is_truthy(activity(waiter.backend_pid).backend_xmin)
    waiter:cancel()
    assert_code("interrupted", support.complete, waiter)
  end)

  it("is the same for a free lock, and for one try", function()
    local conn, other = support.connect(), support.connect()
    for _, strategy in ipairs { "queue", "notify", "poll" } do
      local options = { strategy = strategy }
      local lock = conn:lock("x", options)
      assert.is_true(lock:held())
      assert.equal("x", lock.name)
      assert.is_true(lock.waited < 1)
      assert.same({ nil, "busy" }, { other:try_lock("x", options) })
      assert.same({ nil, "busy" }, { other:try_lock_all({ "x" }, options) })
      assert.same({ nil, "busy" }, { other:try_lock("x", { strategy = strategy, timeout = 0 }) })
      local err = assert_code("timeout", other.lock, other, "x", { strategy = strategy, timeout = 0 })
      assert.is_truthy(err.message:find("somebody holds it", 1, true))
      local again = conn:lock("x", options)
      again:release()
      assert.is_true(lock:check())
      lock:release()
      assert.equal("done", conn:with_lock("x", options, function() return "done" end))
      assert.same({ true, 7 }, { conn:try_with_lock_all({ 1, 2 }, options, function() return 7 end) })
      assert.same({}, pg_locks(conn.backend_pid))
      assert.equal(0, channels(conn))
    end
  end)

  it("works for callers without a loop", function()
    pglocks.setup(support.conninfo)
    for _, strategy in ipairs { "queue", "notify", "poll" } do
      local child = support.spawn([[
        local conn = require "pglocks".connect((...))
        local lock = conn:lock "x"
        print "holds"
        io.stdout:flush()
        conn:query "SELECT pg_sleep(0.2)"
        lock:release()
      ]], support.conninfo)
      assert.equal("holds", child.lines())
      local seconds, waited = support.timed(pglocks.with_lock, "x", { strategy = strategy, timeout = 10 },
        function(lock) return lock.waited end)
      assert.is_true(seconds >= waited and waited > 0.05, waited)
      child.close()
    end
  end)

  it("with a release goes straight on", function()
    local conn = support.connect()
    pglocks.setup(support.conninfo)
    local lock = pglocks.advisory_lock("x", { strategy = "notify", wait = false })
    assert.is_true(lock.acquired)
    assert.is_nil((conn:try_lock("x", { strategy = "poll", timeout = 0.01 })))
    lock:release()
  end)

  it("pauses longer and longer, half a second at most, and begins anew when it has heard", function()
    local holder, waiter = support.connect(), support.connect()
    holder:lock "x"
    for strategy, limit in pairs { poll = 0.25, notify = 0.5 } do
      pauses[waiter] = nil
      assert.is_nil((waiter:try_lock("x", { strategy = strategy, timeout = 1.5 })))
      local these, most = pauses[waiter], 0
      for _, seconds in ipairs(these) do most = math.max(most, seconds) end
      assert.is_true(these[1] <= 0.001, these[1])
      assert.is_true(most <= limit and most >= limit / 2, most)
      assert.is_true(#these < 30, #these)
    end
    local told, pause = false, scheduled.hear
    function scheduled.hear(conn, seconds)
      if seconds > 0.1 and not told then
        support.observe("SELECT pg_notify($1, '')", channel "x")
        told = #pauses[waiter] + 1
      end
      return pause(conn, seconds)
    end
    pauses[waiter] = nil
    assert.is_nil((waiter:try_lock("x", { strategy = "notify", timeout = 1 })))
    assert.is_true(pauses[waiter][told + 1] <= 0.001, pauses[waiter][told + 1])
  end)

  it("is told of nothing that nobody asked for", function()
    local holder, listener, marker = support.connect(), support.connect(), support.connect()
    listener:query(('LISTEN "%s"'):format(channel "x"))
    local function heard_after_hold(seconds)
      local lock = holder:lock "x"
      support.sleep(seconds)
      lock:release()
      holder:ping()
      listener:ping()
      return core.hear(listener, 0)
    end
    assert.is_false(heard_after_hold(0.005))
    local marked = marker:lock(core.marker(pglocks.key "x"), { shared = true })
    assert.is_true(heard_after_hold(0.005))
    marked:release()
    assert.is_false(heard_after_hold(0.005))
  end)

  it("announces no lock that was held for less than a millisecond", function()
    local holder, listener = support.connect { release = "deferred" }, support.connect()
    listener:query(('LISTEN "%s"'):format(channel "x"))
    local marked = listener:lock(core.marker(pglocks.key "x"), { shared = true })
    local short = 0
    for _ = 1, 1000 do
      local before = core.now()
      holder:lock("x"):release()
      local seconds = core.now() - before
      holder:ping()
      listener:ping()
      local heard = core.hear(listener, 0)
      if seconds < 0.001 then
        assert.is_false(heard)
        short = short + 1
      end
      if short == 20 then break end
    end
    assert.is_true(short > 0)
    marked:release()
  end)

  it("is an argument error where it is none of the three, and names the call", function()
    local conn = support.connect()
    for _, wrong in ipairs { "quue", 1, true, "queue\0" } do
      support.assert_raises("bad argument #2 to 'lock' (option 'strategy': \"queue\", \"notify\" or \"poll\" expected",
        function() conn:lock("x", { strategy = wrong }) end)
    end
    for _, method in ipairs { "lock", "try_lock", "lock_all", "try_lock_all" } do
      local function call(key, options) assert(conn[method](conn, key, options)) end
      for _, strategy in ipairs { "queue", "notify", "poll" } do
        local err = support.raised(call, true, { strategy = strategy, timeout = 1 })
        assert.is_truthy(err:find "spec/strategy_spec.lua:%d+: bad argument #1 to '", err)
        support.assert_raises("unknown option 'timeuot'", call, { "x" }, { strategy = strategy, timeuot = 1 })
      end
    end
  end)

  it("outlasts no timeout by getting ready to hear of many keys", function()
    local holder, waiter, keys = support.connect(), support.connect(), {}
    for i = 1, 32 do keys[i] = i end
    holder:lock(32)
    local listen = scheduled.listen
    finally(function() scheduled.listen = listen end)
    function scheduled.listen(...) -- over a slow network
      support.sleep(0.02)
      return listen(...)
    end
    local seconds, lock = support.timed(waiter.try_lock_all, waiter, keys, { strategy = "notify", timeout = 0.1 })
    assert.is_nil(lock)
    assert.is_true(seconds < 0.3 * support.slow, seconds)
    assert_holds_only(0, waiter)
  end)

  it("raises what a connection that is over raises", function()
    local conn = support.connect()
    conn:close()
    for _, strategy in ipairs { "notify", "poll" } do
      assert_code("closed", conn.lock, conn, "x", { strategy = strategy })
    end
  end)

  for _, strategy in ipairs { "notify", "poll" } do
    it("ends by Ctrl-C: " .. strategy, function()
      local holder = support.connect()
      local lock = holder:lock "held by the parent"
      local child = support.spawn([[
        local pglocks = require "pglocks"
        local conninfo, strategy = ...
        local scheduled = require "pglocks.scheduled"
        local hear = scheduled.hear
        function scheduled.hear(c) return hear(c, 60) end
        local conn = pglocks.connect(conninfo)
        io.stdout:setvbuf "line"
        print(conn.backend_pid)
        print(pcall(conn.lock, conn, "held by the parent", { strategy = strategy }))
        print(conn:alive(), #conn:locks(), #conn:query "SELECT pg_listening_channels()")
        io.read()
      ]], support.conninfo, strategy)
      local backend = tonumber(child.lines())
      wait_until("the pause", function()
        return is_pausing(backend) and #pg_locks(backend) == (strategy == "notify" and 1 or 0)
      end)
      support.signal("INT", child.pid)
      local seconds, outcome = support.timed(child.lines)
      -- With a position where it strikes just before the pause, in Lua.
      assert.is_truthy(outcome:find "^false\t.*interrupted!$", outcome)
      assert.is_true(seconds < 1 * support.slow, seconds)
      assert.equal("true\t0\t0", child.lines())
      assert.same({}, pg_locks(backend))
      support.signal("TERM", child.pid)
      child.close()
      lock:release()
    end)
  end
end)
