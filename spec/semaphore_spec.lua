-- The option `slots`: a lock that so many may hold at once.

local support = require "spec.support"
local loops = require "spec.loops"
local pglocks = require "pglocks"
local scheduled = require "pglocks.scheduled"

local core = support.core
local pg_locks, wait_until, assert_code = support.pg_locks, support.wait_until, support.assert_code

local STRATEGIES = { "queue", "notify", "poll" }

local function channels(conn) return #conn:query "SELECT pg_listening_channels()" end

-- Only these locks, no turnstile and no marker; and it listens to nothing.
local function assert_holds_only(count, conn)
  conn:ping()
  assert.equal(count, #pg_locks(conn.backend_pid))
  assert.equal(count, #conn:locks())
  assert.equal(0, channels(conn))
end

local TURN = { hash = "sha256", namespace = "pglocks turn" }
local function turnstile(name) return pglocks.key(tostring(pglocks.key(name)), TURN) end

-- Does somebody have the turnstile of `name`, or wait for it?
local function at_turnstile(name, pid)
  local key, found = turnstile(name), {}
  for _, row in ipairs(pg_locks(pid)) do
    if row.classid == key.classid and row.objid == key.objid then found[#found + 1] = row end
  end
  return found[1] and found
end

local function waits_first(pid, name)
  wait_until("the turnstile", function()
    local rows = at_turnstile(name, pid)
    return rows and rows[1].granted and rows[1].mode == "ExclusiveLock"
  end)
end

local hear = scheduled.hear

local wait_in = support.wait_in

describe("a semaphore", function()
  after_each(function()
    scheduled.hear = hear
    pglocks.setup {}
    support.finish()
  end)

  -- ---- slots ------------------------------------------------------------------------------

  it("has as many holders as slots, each with a number of its own", function()
    for _, slots in ipairs { 1, 2, 7 } do
      local taken, locks, conns = {}, {}, {}
      for i = 1, slots do
        conns[i] = support.connect()
        locks[i] = conns[i]:lock("x", { slots = slots })
        assert.is_true(locks[i]:check())
        assert.equal(i % 1, 0)
        assert.is_true(locks[i].slot >= 1 and locks[i].slot <= slots)
        assert.is_nil(taken[locks[i].slot])
        taken[locks[i].slot] = true
        assert_holds_only(1, conns[i])
      end
      local other = support.connect()
      assert.same({ nil, "busy" }, { other:try_lock("x", { slots = slots }) })
      assert.same({ nil, "busy" }, { other:try_lock("x", { slots = slots, timeout = 0 }) })
      local err = assert_code("timeout", other.lock, other, "x", { slots = slots, timeout = 0 })
      assert.equal(pglocks.key "x", err.key)
      assert.equal('no lock on "x": somebody holds it', err.message)
      assert_holds_only(0, other)
      for i, lock in ipairs(locks) do
        local slot = lock.slot
        lock:release()
        assert.equal(slot, lock.slot)
        local got = other:try_lock("x", { slots = slots })
        assert.equal(slot, got.slot)
        got:release()
        locks[i] = conns[i]:lock("x", { slots = slots })
        assert.equal(slot, locks[i].slot)
      end
      for _, lock in ipairs(locks) do lock:release() end
    end
  end)

  it("gives several locks of one connection a slot each", function()
    local conn, other = support.connect(), support.connect()
    local a, b = conn:lock("x", { slots = 3 }), conn:lock("x", { slots = 3 })
    assert.is_true(a.slot ~= b.slot)
    assert_holds_only(2, conn)
    local c = other:lock("x", { slots = 3 })
    assert.equal(6, a.slot + b.slot + c.slot)
    assert.is_nil((other:try_lock("x", { slots = 3 })))
    a:release()
    assert.is_true(b:check())
    local d = other:try_lock("x", { slots = 3 })
    assert.is_true(d:held())
    for _, lock in ipairs { b, c, d } do lock:release() end
  end)

  it("is of a key, a pair or a name, by whatever scheme, and of one name apart from others", function()
    local conn, other = support.connect(), support.connect()
    for _, key in ipairs { 7, { 7, 42 }, "7" } do
      local lock = conn:lock(key, { slots = 1 })
      assert.is_nil((other:try_lock(key, { slots = 1 })))
      for _, free in ipairs { 8, { 7, 43 }, "8" } do other:try_lock(free, { slots = 1 }):release() end
      other:lock(key):release() -- and apart from an ordinary lock
      lock:release()
    end
    local lock = conn:lock("x", { slots = 1, hash = "rails", namespace = nil })
    assert.is_nil((other:try_lock("x", { slots = 1, hash = "rails" })))
    other:try_lock("x", { slots = 1 }):release()
    lock:release()
    lock = conn:lock("x", { slots = 1, namespace = "a" })
    other:try_lock("x", { slots = 1, namespace = "b" }):release()
    lock:release()
    pglocks.setup { hash = "django-pglocks" }
    assert.equal("x", conn:with_lock("x", { slots = 1 }, function() return "x" end))
  end)

  it("is a deadlock for who has all of its slots, and waits", function()
    local conn = support.connect()
    local a, b = conn:lock("x", { slots = 2 }), conn:lock("x", { slots = 2 })
    for _, strategy in ipairs(STRATEGIES) do
      local err = assert_code("deadlock", conn.lock, conn, "x", { slots = 2, strategy = strategy })
      assert.equal(pglocks.key "x", err.key)
      assert_code("deadlock", conn.try_lock, conn, "x", { slots = 2, strategy = strategy, timeout = 5 })
      assert.same({ nil, "busy" }, { conn:try_lock("x", { slots = 2, strategy = strategy }) })
    end
    assert.is_true(a:check())
    assert.is_true(b:check())
    assert_holds_only(2, conn)
    a:release()
    conn:lock("x", { slots = 2 }):release()
    b:release()
  end)

  it("works with the functions, the module's own, and a comment", function()
    pglocks.setup(support.conninfo)
    local other = support.connect()
    pglocks.with_lock("x", { slots = 2, comment = "why" }, function(lock)
      assert.is_true(lock.slot == 1 or lock.slot == 2)
      local ran, slot = other:try_with_lock("x", { slots = 2 }, function(l) return l.slot end)
      assert.is_true(ran)
      assert.equal(3, slot + lock.slot)
      local second = other:lock("x", { slots = 2 })
      assert.same({ false, "timeout" },
        { support.connect():try_with_lock("x", { slots = 2, timeout = 0.01 }, error) })
      second:release()
    end)
    assert.equal(1, pglocks.wrap("y", { slots = 1 }, function() return 1 end)())
    local lock = pglocks.advisory_lock("x", { slots = 1 })
    assert.equal(1, lock.slot)
    lock:release()
    assert.is_nil(other:lock("x").slot)
  end)

  it("is refused where it makes no sense, before anything is sent", function()
    local conn = support.connect()
    local function refused(expected, method, key, options)
      support.assert_raises(expected, function() assert(conn[method](conn, key, options)) end)
    end
    for _, slots in ipairs { 0, -1, 1.5, 1001, 0 / 0, math.huge, "3", true } do
      refused("option 'slots': integer from 1 to 1000 expected", "lock", "x", { slots = slots })
    end
    refused("option 'slots': an exclusive lock", "lock", "x", { slots = 2, shared = true })
    refused("option 'slots': an exclusive lock of session scope", "try_lock", "x",
      { slots = 2, scope = "transaction" })
    refused("option 'slots': one key expected", "lock_all", { "x" }, { slots = 2 })
    refused("option 'slots': one key expected", "try_lock_all", { "x" }, { slots = 2 })
    refused("bad argument #1 to '", "lock", true, { slots = 2 })
    refused("bad argument #1 to '", "lock", 1.5, { slots = 2 })
    pglocks.setup(support.conninfo)
    support.assert_raises("with wait = false", pglocks.advisory_lock, "x", { slots = 2, wait = false })
    assert.same({}, pg_locks(conn.backend_pid))
  end)

  it("is refused behind a pooler of transactions, which shares sessions", function()
    local conn = support.connect()
    core.configure(conn, { pooled = "transaction", lease = 0 })
    for _, options in ipairs { { slots = 2 }, { slots = 2, timeout = 1 }, { slots = 2, strategy = "notify" } } do
      assert_code("pooled", conn.lock, conn, "x", options)
    end
    assert.is_false(core.in_transaction(conn))
    assert.same({}, pg_locks(conn.backend_pid))
  end)

  it("stays exclusive, slot by slot", function()
    local conn = support.connect()
    local lock = conn:lock("x", { slots = 2 })
    assert_code("server", lock.downgrade, lock)
    assert.is_true(lock:upgrade())
    assert.is_true(lock:check())
    assert_holds_only(1, conn)
    lock:release()
  end)

  it("ends the slot of a lock that was collected, and of a scope", function()
    local conn = support.connect()
    for _, slots in ipairs { 1, 2 } do
      for _ = 1, slots do conn:lock("x", { slots = slots }) end
      collectgarbage()
      collectgarbage()
      for _ = 1, slots do conn:lock("x", { slots = slots }) end
      collectgarbage()
      collectgarbage()
      local lock = conn:lock("x", { slots = slots })
      getmetatable(lock).__close(lock)
      assert_holds_only(0, conn)
    end
  end)

  it("works inside a transaction, and outlives it", function()
    local conn, other = support.connect(), support.connect()
    local busy = other:lock("x", { slots = 2 })
    conn:query "BEGIN"
    conn:query "CREATE TEMPORARY TABLE t (n int)"
    local lock = conn:lock("x", { slots = 2 })
    for _, strategy in ipairs(STRATEGIES) do
      assert.same({ nil, "timeout" }, { conn:try_lock("x", { slots = 2, timeout = 0.05, strategy = strategy }) })
    end
    conn:query "COMMIT"
    assert.is_true(lock:check())
    assert.same({}, conn:query "SELECT n FROM t")
    assert_holds_only(1, conn)
    lock:release()
    busy:release()
  end)

  it("draws tokens, or has no slot where they cannot be drawn", function()
    local conn = support.connect()
    local fsync = conn:query("SHOW fsync")[1].fsync
    local function switch(value)
      support.observe("ALTER SYSTEM SET fsync = " .. value)
      support.observe "SELECT pg_reload_conf()"
      wait_until("fsync to be " .. value, function() return conn:query("SHOW fsync")[1].fsync == value end)
    end
    finally(function() switch(fsync) end)
    switch "off"
    for _, options in ipairs {
      { token = true, slots = 2 }, { token = true, slots = 2, strategy = "notify", timeout = 1 },
    } do
      assert_code("server", conn.lock, conn, "x", options)
      assert_holds_only(0, conn)
      assert.is_nil(at_turnstile "x")
    end
    switch "on"
    local last = 0
    for _ = 1, 3 do
      local lock = conn:lock("x", { token = true, slots = 2 })
      assert.is_true(lock.token > last)
      last = lock.token
      lock:release()
    end
    local lock = conn:lock("x", { token = true, shared = true })
    assert.is_true(lock.token > last)
    last = lock.token
    assert.is_true(lock:upgrade())
    assert.is_true(lock.token > last)
    lock:release()
  end)

  -- ---- tries --------------------------------------------------------------------------------

  -- Not one of these may be turned away: there are as many slots.
  it("is never busy for as many tries at once as it has slots", function()
    local children, gate = {}, support.connect():lock "gate"
    for i = 1, 3 do
      children[i] = support.spawn([[
        local conn = require "pglocks".connect((...))
        print(conn.backend_pid)
        io.stdout:flush()
        conn:lock("gate", { shared = true, timeout = 60 })
        local busy = 0
        for _ = 1, tonumber((select(2, ...))) do
          local lock = conn:try_lock("x", { slots = 3 })
          if lock then lock:release() else busy = busy + 1 end
        end
        print(busy)
      ]], support.conninfo, math.ceil(400 * math.min(1, support.size)))
      support.wait_until_waiting(tonumber(children[i].lines()))
    end
    gate:release()
    for i = 1, 3 do
      assert.equal("0", children[i].lines())
      children[i].close()
    end
  end)

  -- Another takes what was free when we looked, having let go of what was not: so a slot was always free.
  it("looks again when it was too late for what was free", function()
    local conn, other = support.connect(), support.connect()
    local locks = { other:lock("x", { slots = 2 }) }
    local execute = scheduled.execute
    local looks = 0
    function scheduled.execute(c, seconds, ...)
      local rows = execute(c, seconds, ...)
      looks = looks + 1
      if looks == 1 then
        local second = other:lock("x", { slots = 2 })
        locks[1]:release()
        locks[1] = second
      end
      return rows
    end
    local ok, lock
    for _ = 1, 100 do -- the first slot that it tries is as good as any
      ok, lock = pcall(conn.try_lock, conn, "x", { slots = 2 })
      if not ok or not lock or looks > 0 then break end
      lock:release()
    end
    scheduled.execute = execute
    assert.is_true(ok, lock)
    assert.is_true(looks > 1)
    assert.is_truthy(lock)
    lock:release()
    locks[1]:release()
  end)

  it("does not look for ever where a slot was unlocked behind its back", function()
    local conn, other = support.connect(), support.connect()
    local lock, second = conn:lock("x", { slots = 2 }), other:lock("x", { slots = 2 })
    conn:query("SELECT pg_advisory_unlock_all()")
    local got = conn:try_lock("x", { slots = 2 })
    assert.is_nil(got)
    assert_code("lost", lock.check, lock)
    conn:try_lock("x", { slots = 2 }):release()
    second:release()
  end)

  -- ---- waiting ------------------------------------------------------------------------------

  for _, strategy in ipairs(STRATEGIES) do
    it("keeps to its timeout, first in the turnstile or behind another: " .. strategy, function()
      local holder, first, second = support.connect(), support.connect(), support.connect()
      local lock = holder:lock("x", { slots = 1 })
      local function times_out(conn)
        for _, timeout in ipairs { 0.2, 0.0004 } do
          local options = { slots = 1, strategy = strategy, timeout = timeout }
          local seconds, got, why = support.timed(conn.try_lock, conn, "x", options)
          assert.is_nil(got)
          assert.equal("timeout", why)
          assert.is_true(seconds >= timeout and seconds < timeout + 0.5 * support.slow, seconds)
          local err = assert_code("timeout", conn.lock, conn, "x", options)
          assert.equal(('no lock on "x" within %g s'):format(timeout), err.message)
          assert_holds_only(0, conn)
        end
      end
      times_out(first)
      local child = support.spawn([[
        local conn = require "pglocks".connect((...))
        print(conn.backend_pid)
        io.stdout:flush()
        local lock = conn:lock("x", { slots = 1, strategy = (select(2, ...)), timeout = 60 })
        print(lock.slot, lock.waited > 0.1)
        lock:release()
      ]], support.conninfo, strategy)
      local backend = tonumber(child.lines())
      waits_first(backend, "x")
      times_out(second)
      assert.same({ nil, "busy" }, { second:try_lock("x", { slots = 1 }) })
      lock:release()
      assert.equal("1\ttrue", child.lines())
      child.close()
      assert.is_nil(at_turnstile "x")
    end)

    it("ends by Ctrl-C, first in the turnstile or behind another: " .. strategy, function()
      local holder = support.connect()
      local lock = holder:lock("x", { slots = 1 })
      local function spawn()
        local child = support.spawn([[
          local conninfo, strategy = ...
          local conn = require "pglocks".connect(conninfo)
          io.stdout:setvbuf "line"
          print(conn.backend_pid)
          print(pcall(conn.lock, conn, "x", { slots = 1, strategy = strategy }))
          print(conn:alive(), #conn:locks(), #conn:query "SELECT pg_listening_channels()")
          io.read()
        ]], support.conninfo, strategy)
        return child, tonumber(child.lines())
      end
      local first, first_backend = spawn()
      waits_first(first_backend, "x")
      local second, second_backend = spawn()
      wait_until("the second to wait", function()
        if strategy == "queue" then return support.is_waiting(second_backend) end
        local now = support.observe("SELECT state, query FROM pg_stat_activity WHERE pid = $1", second_backend)[1]
        return now.state == "idle" and now.query:find("try_advisory", 1, true)
      end)
      for child, backend in pairs { [second] = second_backend, [first] = first_backend } do
        support.signal("INT", child.pid)
        local seconds, outcome = support.timed(child.lines)
        assert.is_truthy(outcome:find "^false\t.*interrupted!$", outcome)
        assert.is_true(seconds < 1 * support.slow)
        assert.equal("true\t0\t0", child.lines())
        assert.same({}, pg_locks(backend))
        support.signal("TERM", child.pid)
        child.close()
      end
      assert.is_nil(at_turnstile "x")
      lock:release()
    end)
  end

  it("gets the slot of a holder that was killed, or lost its session", function()
    for _, strategy in ipairs(STRATEGIES) do
      for _, how in ipairs { "kill", "terminate" } do
        local child = support.spawn([[
          local conn = require "pglocks".connect((...))
          local lock = conn:lock("x", { slots = 1 })
          print(conn.backend_pid)
          io.stdout:flush()
          conn:query "SELECT pg_sleep(60)"
        ]], support.conninfo)
        local backend = tonumber(child.lines())
        local conn = support.connect()
        assert.is_nil((conn:try_lock("x", { slots = 1 })))
        if how == "kill" then support.signal("KILL", child.pid) end
        support.observe("SELECT pg_terminate_backend($1)", backend)
        local lock = conn:lock("x", { slots = 1, strategy = strategy, timeout = 5 })
        assert_holds_only(1, conn)
        lock:release()
        child.close()
      end
    end
  end)

  it("lets the next one in when the first at the turnstile was killed", function()
    local holder, conn = support.connect(), support.connect()
    local lock = holder:lock("x", { slots = 1 })
    for _, strategy in ipairs(STRATEGIES) do
      local child = support.spawn([[
        local conn = require "pglocks".connect((...))
        print(conn.backend_pid)
        io.stdout:flush()
        conn:lock("x", { slots = 1 })
      ]], support.conninfo)
      local backend = tonumber(child.lines())
      waits_first(backend, "x")
      support.signal("KILL", child.pid)
      local _, why = conn:try_lock("x", { slots = 1, strategy = strategy, timeout = 0.05 })
      assert.equal("timeout", why)
      child.close()
      wait_until("its turn to be over", function() return not at_turnstile "x" end)
    end
    lock:release()
  end)

  it("raises lost when the waiter's session ends, and leaves nothing", function()
    local lost, holder = nil, support.connect()
    local lock = holder:lock("x", { slots = 1 })
    for _, strategy in ipairs(STRATEGIES) do
      local conn = support.connect { on_lost = function(_, _, locks) lost = locks end }
      function scheduled.hear(c) -- in its first pause
        support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
        return hear(c, 60)
      end
      local seconds, err = support.timed(assert_code, "lost", conn.lock, conn, "x",
        { slots = 1, strategy = strategy })
      scheduled.hear = hear
      assert.equal("57P01", err.sqlstate)
      assert.is_true(seconds < 2 * support.slow)
      assert.same({}, lost)
      wait_until("its turn to be over", function() return not at_turnstile "x" end)
    end
    assert.is_true(lock:check())
    lock:release()
  end)

  -- ---- turns --------------------------------------------------------------------------------

  it("comes to those who wait in their order", function()
    local holder = support.connect()
    local locks = { holder:lock("x", { slots = 2 }), holder:lock("x", { slots = 2 }) }
    local order = {}
    loops.cqueues.run(function()
      local waiting = 0
      for i = 1, 5 do
        local conn = support.connect { scheduler = "cqueues" }
        loops.cqueues.spawn(function()
          local lock = conn:lock("x", { slots = 2, timeout = 20 })
          order[#order + 1] = i
          loops.cqueues.sleep(0.01)
          lock:release()
          waiting = waiting - 1
        end)
        waiting = waiting + 1
        wait_in(loops.cqueues, "its turn to be asked for", function() return at_turnstile("x", conn.backend_pid) end)
      end
      -- Who comes later takes no slot before them.
      locks[1]:release()
      wait_in(loops.cqueues, "the first of them", function() return #order > 0 end)
      assert.is_nil((support.connect():try_lock("x", { slots = 2 })))
      -- One slot goes around: of two that come free at once, any waiter may hear first.
      wait_in(loops.cqueues, "all of them", function() return waiting == 0 end)
      locks[2]:release()
    end)
    assert.same({ 1, 2, 3, 4, 5 }, order)
  end)

  for _, strategy in ipairs { "queue", "notify" } do
    it("is heard of by all who wait, with " .. strategy, function()
      local holder = support.connect()
      local lock = holder:lock("x", { slots = 1 })
      loops.cqueues.run(function()
        function scheduled.hear(conn) return hear(conn, 60) end
        local got = 0
        for _ = 1, 3 do
          local conn = support.connect { scheduler = "cqueues" }
          loops.cqueues.spawn(function()
            local mine = conn:lock("x", { slots = 1, strategy = strategy })
            loops.cqueues.sleep(0.005)
            got = got + 1
            mine:release()
          end)
          wait_in(loops.cqueues, "the wait", function() return #pg_locks(conn.backend_pid) > 0 end)
        end
        loops.cqueues.sleep(0.01)
        local before = core.now()
        lock:release()
        wait_in(loops.cqueues, "all of them", function() return got == 3 end)
        assert.is_true(core.now() - before < 1 * support.slow, core.now() - before)
      end)
    end)
  end

  -- Processes that want a slot all the time, for so many seconds: how many turns each had, and what
  -- anybody saw too many of.
  local WORKER = [[
    local pglocks = require "pglocks"
    local core = require "pglocks.core"
    local conninfo, seconds, slots, path = ...
    slots = tonumber(slots)
    local conn = pglocks.connect(conninfo)
    print(conn.backend_pid)
    io.stdout:flush()
    conn:lock("gate", { shared = true, timeout = 60 }):release()
    local turns, wrong, ends = 0, 0, core.now() + seconds
    while core.now() < ends do
      local lock = conn:lock("x", { slots = slots, timeout = 30 })
      local name = path .. "." .. lock.slot
      local taken = io.open(name) -- nobody else may have this slot
      if taken then wrong = wrong + 1 taken:close() end
      io.open(name, "w"):close()
      core.sleep(0.002)
      os.remove(name)
      lock:release()
      turns = turns + 1
    end
    print(turns, wrong, #conn:query "SELECT 1 FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'")
  ]]

  it("starves nobody: 8 processes have as many turns of 2 slots", function()
    local gate, path, workers = support.connect():lock "gate", os.tmpname(), {}
    local seconds = 1.5 * math.max(1, support.slow)
    for i = 1, 8 do
      workers[i] = support.spawn(WORKER, support.conninfo, seconds, 2, path)
      support.wait_until_waiting(tonumber(workers[i].lines()))
    end
    gate:release()
    local sum, squares, least = 0, 0, math.huge
    for i = 1, 8 do
      local line = workers[i].lines()
      local turns, wrong, left = line:match "^(%d+)\t(%d+)\t(%d+)$"
      assert.equal("0", wrong, line)
      assert.equal("0", left, line)
      turns = tonumber(turns)
      sum, squares, least = sum + turns, squares + turns * turns, math.min(least, turns)
      workers[i].close()
    end
    os.remove(path)
    assert.is_nil(at_turnstile "x")
    local jain = sum * sum / (8 * squares)
    assert.is_true(jain > 0.98 and least >= sum / 8 * 0.7, ("%d turns, Jain %g, least %d"):format(sum, jain, least))
  end)

  -- ---- loops --------------------------------------------------------------------------------

  for _, name in ipairs { "cqueues", "luv" } do
    local loop = loops[name]
    for _, strategy in ipairs(STRATEGIES) do
      it("lets in so many coroutines of " .. name .. ", with " .. strategy, function()
        pglocks.setup { databases = { default = { conninfo = support.conninfo, pool_size = 6 } },
          scheduler = loop.scheduler }
        local inside, most, turns = 0, 0, 0
        loop.run(function()
          for _ = 1, 12 do
            loop.spawn(function()
              pglocks.with_lock("x", { slots = 2, strategy = strategy, timeout = 20 }, function(lock)
                assert.is_true(lock.slot == 1 or lock.slot == 2)
                inside = inside + 1
                most = math.max(most, inside)
                loop.sleep(0.005)
                inside = inside - 1
              end)
              turns = turns + 1
            end)
          end
          wait_in(loop, "their turns", function() return turns == 12 end)
          wait_in(loop, "the end of all locks", function() return #pg_locks() == 0 end)
        end)
        assert.equal(2, most)
      end)
    end
  end

  it("ends by conn:cancel(), and by the end of its coroutine", function()
    local close = rawget(coroutine, "close") -- Lua 5.4
    local holder = support.connect()
    local lock = holder:lock("x", { slots = 1 })
    for _, strategy in ipairs(STRATEGIES) do
      for _, how in ipairs { "cancel", close and "close" } do
        loops.luv.run(function()
          local conn, err = support.connect { scheduler = "luv" }, nil
          local co = coroutine.create(function()
            err = support.raised(conn.lock, conn, "x", { slots = 1, strategy = strategy })
          end)
          assert(coroutine.resume(co))
          wait_in(loops.luv, "the wait", function() return at_turnstile("x", conn.backend_pid) end)
          if how == "cancel" then
            wait_in(loops.luv, "something to cancel", function() return conn:cancel() end)
            wait_in(loops.luv, "the error", function() return err end)
            assert.equal("interrupted", err.code)
            assert_holds_only(0, conn)
          else
            close(co)
          end
          wait_in(loops.luv, "the end of its turn", function() return not at_turnstile "x" end)
        end)
      end
    end
    lock:release()
  end)
end)
