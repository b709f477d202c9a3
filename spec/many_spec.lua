-- Many keys at once: all or nothing, whatever comes in between.

local pglocks = require "pglocks"
local support = require "spec.support"

local core = support.core

-- The numbers of the advisory locks that a backend holds.
local function held(pid)
  local list = {}
  for _, row in ipairs(support.pg_locks(pid)) do
    if row.granted then list[#list + 1] = tonumber(row.objid) end
  end
  table.sort(list)
  return list
end

local function texts(keys)
  local list = {}
  for i, key in ipairs(keys) do list[i] = tostring(key) end
  return list
end

local function numbers(count, first)
  local list = {}
  for i = 1, count do list[i] = (first or 1) + i - 1 end
  return list
end

-- Begins to wait, and returns when it does.
local function begin_waiting(conn, ...)
  support.begin(conn, "lock_all", ...)
  support.wait_until_waiting(conn.backend_pid)
end

describe("lock_all", function()
  after_each(support.finish)

  it("takes 64-bit keys ascending, then pairs, each once", function()
    local conn = support.connect()
    local lock = conn:lock_all { { 7, 42 }, "b", 5, { 7, -42 }, "a", 5, -3, { -7, 1 }, pglocks.key "a" }
    assert.same({ "-3848465438864589366", "-3", "5", "4477677635727087946", "(-7, 1)", "(7, -42)", "(7, 42)" },
      texts(lock.keys))
    assert.equal(7, #support.pg_locks(conn.backend_pid))
    assert.is_true(lock.acquired)
    assert.is_true(lock:held())
    assert.is_true(lock:check())
    assert.is_nil(lock.key)
    assert.is_nil(lock.name)
    assert.is_true(lock.waited >= 0)
    assert.equal("pglocks lock: 7 keys, exclusive, held", tostring(lock))
    assert.is_true(lock:release())
    assert.same({}, support.pg_locks(conn.backend_pid))
    assert.same({ nil, "not held" }, { lock:release() })
    assert.is_false(lock:held())
  end)

  it("waits in that order, and holds what comes before", function()
    local conn, other = support.connect(), support.connect()
    for _, case in ipairs { { 5, { 1, 3 } }, { 1, {} }, { 9, { 1, 3, 5 } } } do
      local busy = other:lock(case[1])
      begin_waiting(conn, { 9, 5, 1, 3 })
      assert.same(case[2], held(conn.backend_pid))
      busy:release()
      local lock = support.complete(conn)
      assert.same({ 1, 3, 5, 9 }, held(conn.backend_pid))
      assert.is_true(lock.waited > 0)
      lock:release()
    end
  end)

  it("locks the same as one by one", function()
    local conn, other = support.connect(), support.connect()
    local keys = { "x", 42, -1, { 7, 42 }, { -7, -42 }, { 2147483647, -2147483648 },
      -4294967296, 4294967295, pglocks.key("x", { namespace = "y" }) }
    for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true },
      { shared = true, timeout = 5 }, { shared = true, timeout = 0 } } do
      local shared = options.shared
      local lock = conn:lock_all(keys, options)
      local together = support.pg_locks(conn.backend_pid)
      assert.equal(#keys, #together)
      for _, key in ipairs(keys) do
        assert.same({ nil, "busy" }, { other:try_lock(key) })
        if shared then assert.is_true(other:try_lock(key, { shared = true }):release()) end
      end
      lock:release()
      local locks = {}
      for i, key in ipairs(keys) do locks[i] = conn:lock(key, { shared = shared }) end
      assert.same(together, support.pg_locks(conn.backend_pid))
      for _, one in ipairs(locks) do one:release() end
    end
  end)

  it("takes hash and namespace for its names", function()
    local conn = support.connect()
    local lock = conn:lock_all({ "some lock", "some lock" }, { hash = "django-pglocks" })
    assert.same({ "-205618829" }, texts(lock.keys))
    lock:release()
    local given = {}
    lock = conn:lock_all({ "one", "two" }, { namespace = "n", hash = function(name, namespace)
      given[#given + 1] = namespace .. name
      return #given
    end })
    assert.same({ "none", "ntwo" }, given)
    assert.same({ "1", "2" }, texts(lock.keys))
    local names = {}
    for _, one in ipairs(conn:locks()) do names[#names + 1] = one.name end
    table.sort(names)
    assert.same({ "one", "two" }, names)
  end)

  it("counts with the locks that are held already", function()
    local conn, other = support.connect(), support.connect()
    local five = conn:lock(5)
    local set = conn:lock_all { 5, 6 }
    local again = conn:lock_all { 6, 5 }
    local seven = conn:lock_all { 6, 7 }
    assert.same({ 5, 6, 7 }, held(conn.backend_pid))
    set:release()
    again:release()
    assert.same({ 5, 6, 7 }, held(conn.backend_pid))
    five:release()
    assert.same({ 6, 7 }, held(conn.backend_pid))
    assert.is_true(other:try_lock(5):release())
    seven:release()
    assert.same({}, held(conn.backend_pid))
  end)

  -- Another coroutine's scope ends, or a lock is collected.
  for what, outcome in pairs { ["is granted"] = true, fails = false } do
    it("keeps a key that another lock lets go while it waits for the rest, until it " .. what, function()
      for _, release in ipairs { "confirmed", "deferred" } do
        for _, options in ipairs { {}, { timeout = 20 }, { shared = true } } do
          local conn, other = support.connect { release = release }, support.connect()
          local first, busy = conn:lock(1, { shared = options.shared }), other:lock(2)
          begin_waiting(conn, { 1, 2 }, options)
          getmetatable(first).__close(first)
          assert.same({ nil, "busy" }, { other:try_lock(1) })
          if outcome then
            busy:release()
            local lock = support.complete(conn)
            assert.is_true(conn:ping())
            assert.is_true(lock:check())
            assert.same({ 1, 2 }, held(conn.backend_pid))
            lock:release()
          else
            support.observe("SELECT pg_cancel_backend($1)", conn.backend_pid)
            support.assert_code("interrupted", support.complete, conn)
            busy:release()
          end
          assert.is_true(conn:ping())
          assert.same({}, held(conn.backend_pid))
          assert.same({}, conn:locks())
        end
      end
    end)
  end

  it("keeps what was held before when it fails", function()
    local conn, other = support.connect(), support.connect()
    local five = conn:lock(5)
    local busy = other:lock(7)
    assert.same({ nil, "busy" }, { conn:try_lock_all { 4, 5, 6, 7, 8 } })
    assert.same({ 5 }, held(conn.backend_pid))
    support.assert_code("timeout", conn.lock_all, conn, { 4, 5, 6, 7, 8 }, { timeout = 0.05 })
    assert.same({ 5 }, held(conn.backend_pid))
    assert.is_true(five:check())
    assert.equal(1, #conn:locks())
    busy:release()
  end)

  it("keeps the other mode of its keys when it fails", function()
    local conn, other = support.connect(), support.connect()
    local busy = other:lock(3)
    for _, shared in ipairs { false, true } do
      local lock = conn:lock_all({ 1, 2 }, { shared = shared })
      support.assert_code("timeout", conn.lock_all, conn, { 1, 2, 3 }, { shared = not shared, timeout = 0.02 })
      assert.same({ nil, "busy" }, { conn:try_lock_all({ 1, 2, 3 }, { shared = not shared }) })
      assert.same({ 1, 2 }, held(conn.backend_pid))
      assert.is_true(lock:check())
      local both = conn:lock_all({ 2, 1 }, { shared = not shared })
      assert.is_true(both:check())
      assert.same({ 1, 1, 2, 2 }, held(conn.backend_pid))
      both:release()
      assert.is_true(lock:check())
      lock:release()
    end
    busy:release()
  end)

  it("has one deadline for all keys", function()
    local unit = 0.3 * support.slow
    local conn, first, second = support.connect(), support.connect(), support.connect()
    local a, b = first:lock(1), second:lock(2)
    local began = core.now()
    begin_waiting(conn, { 1, 2 }, { timeout = 2 * unit })
    support.sleep(began + 1.5 * unit - core.now())
    a:release()
    local err = support.assert_code("timeout", support.complete, conn)
    local seconds = core.now() - began
    assert.is_true(seconds >= 2 * unit and seconds < 3 * unit, seconds) -- 3.5 if each had its own
    assert.equal(("no lock on 2 keys within %.7g s"):format(2 * unit), err.message)
    assert.same({}, held(conn.backend_pid))
    b:release()
  end)

  it("does not wait for ever for a key that it comes to after its deadline", function()
    local conn, other = support.connect(), support.connect()
    local busy = other:lock(5000)
    assert.same({ nil, "timeout" }, { conn:try_lock_all(numbers(5000), { timeout = 0.001 }) })
    assert.same({}, held(conn.backend_pid))
    busy:release()
  end)

  it("leaves the connection's lock_timeout alone, also where it had to wait", function()
    local conn, other = support.connect(), support.connect()
    for _, transaction in ipairs { false, true } do
      if transaction then conn:query "BEGIN" end
      conn:lock_all({ 1, 2 }, { timeout = 5 }):release()
      local busy = other:lock(1)
      begin_waiting(conn, { 1, 2 }, { timeout = 20 })
      busy:release()
      support.complete(conn):release()
      assert.equal("0", conn:query("SHOW lock_timeout")[1].lock_timeout)
    end
    conn:query "ROLLBACK"
  end)

  it("leaves a lock that is held already the name it was taken by", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    conn:lock_all { pglocks.key "x", "y" }
    local names = {}
    for _, one in ipairs(conn:locks()) do names[tostring(one.key)] = one.name end
    assert.same({ [tostring(pglocks.key "x")] = "x", [tostring(pglocks.key "y")] = "y" }, names)
    assert.is_true(lock:release())
  end)

  it("is done by one statement", function()
    local conn, other = support.connect(), support.connect()
    local busy = other:lock(1000)
    for _, options in ipairs { {}, { timeout = 20 }, { shared = true } } do
      begin_waiting(conn, numbers(1000), options)
      assert.equal(999, #held(conn.backend_pid))
      support.observe("SELECT pg_cancel_backend($1)", conn.backend_pid)
      support.assert_code("interrupted", support.complete, conn)
    end
    busy:release()
  end)

  it("shows what it is for in a comment", function()
    local conn, other = support.connect(), support.connect()
    local busy = other:lock(2)
    core.start.lock_all(conn, { 1, 2, "x" }, { comment = "transfer" })
    support.wait_until_waiting(conn.backend_pid)
    local sql = support.observe("SELECT query FROM pg_stat_activity WHERE pid = $1", conn.backend_pid)[1].query
    assert.is_truthy(sql:find("^/%* pglocks 3 keys at .*many_spec.lua:%d+: transfer %*/ SELECT"), sql)
    busy:release()
    support.complete(conn):release()
  end)

  it("takes thousands", function()
    local conn, other = support.connect(), support.connect()
    local keys = {}
    for i = 1, 5000 do keys[i] = i % 2 == 0 and "key " .. i or { i, -i } end
    for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true } } do
      local lock = conn:lock_all(keys, options)
      assert.equal(5000, #lock.keys)
      assert.is_true(lock:check())
      assert.same({ nil, "busy" }, { other:try_lock_all { "free", "key 5000" } })
      assert.equal(5000, #conn:locks())
      lock:release()
      assert.same({}, held(conn.backend_pid))
    end
  end)

  it("takes few after many, and lets go of the many", function()
    local conn = support.connect()
    local many, few = conn:lock_all(numbers(5000)), conn:lock_all(numbers(40, 10001))
    assert.is_true(many:release())
    assert.same(numbers(40, 10001), held(conn.backend_pid))
    few:release()
  end)

  it("tells a 64-bit key from the pair of its halves", function()
    local conn, other = support.connect(), support.connect()
    local halves = conn:lock { 7, 42 }
    local busy = other:lock(30064771115)
    support.assert_code("timeout", conn.lock_all, conn, { 30064771114, 30064771115 }, { timeout = 0.02 })
    assert.equal(1, #held(conn.backend_pid))
    assert.is_true(halves:check())
    local lock = conn:lock_all { { 7, 42 }, 30064771114, { 7, 43 } }
    assert.is_true(lock:check())
    assert.equal(3, #held(conn.backend_pid))
    lock:release()
    assert.is_true(halves:check())
    busy:release()
  end)

  it("of one key is a lock on many", function()
    local conn = support.connect()
    local lock = conn:lock_all { "x" }
    assert.is_nil(lock.key)
    assert.same({ tostring(pglocks.key "x") }, texts(lock.keys))
    assert.equal("pglocks lock: 1 key, exclusive, held", tostring(lock))
    assert.same({ tostring(pglocks.key "y") }, texts(conn:lock("y").keys))
  end)

  it("ends with its scope, and when it is collected", function()
    local conn = support.connect()
    local lock = conn:lock_all { 1, 2, 3 }
    getmetatable(lock).__close(lock)
    assert.same({}, held(conn.backend_pid))
    conn:lock_all { 1, 2, 3 }
    collectgarbage()
    collectgarbage()
    support.wait_until("the release", function() return #held(conn.backend_pid) == 0 end)
    assert.same({}, conn:locks())
  end)

  it("raises argument errors that say which key", function()
    local conn = support.connect()
    local function says(expected, ...) support.assert_raises(expected, conn.lock_all, conn, ...) end
    says "bad argument #1 to"
    says "(list of keys expected, got nil)"
    says("(list of keys expected, got string)", "x")
    says("(at least one key expected, got an empty list)", {})
    says("(list of keys expected, got another table)", { a = 1 })
    says("(list of keys expected, got another table)", { 1, a = 1 })
    says("(keys[2]: integer, pair of integers or string expected, got boolean)", { 1, true })
    says("(keys[2]: number has no exact representation as a 64-bit integer)", { 1, 1.5 })
    says("(keys[1]: a pair of 32-bit integers expected, got another table)", { { 1, 2, 3 } })
    says("(keys[1]: a pair of 32-bit integers expected, [2] is out of range)", { { 1, 2147483648 } })
    says("(keys[1]: hash 'flyway': ", { "\xff" }, { hash = "flyway", namespace = "public" })
    says("(option 'namespace' is for names only)", { "x", 1 }, { namespace = "n" })
    says("(keys[2]: what the 'hash' function returned: integer, pair of integers or key expected, got string)",
      { "x", "y" }, { hash = function(name) return name == "x" and 1 or name end })
    says("unknown option 'timeuot'", { 1 }, { timeuot = 1 })
    says("(at most 1000000 keys expected)", numbers(1000001))
    local keys = { "short", "short" }
    says("the list of keys was changed meanwhile", keys, { hash = function()
      keys[1], keys[2] = ("long"):rep(9), ("long"):rep(9)
      return 1
    end })
    assert.same({}, held(conn.backend_pid))
  end)
end)

describe("try_lock_all", function()
  after_each(support.finish)

  it("takes all or nothing, at once or within its timeout", function()
    local conn, other = support.connect(), support.connect()
    for position = 1, 4 do
      local busy = other:lock(position)
      assert.same({ nil, "busy" }, { conn:try_lock_all { 4, 3, 2, 1 } })
      assert.same({}, held(conn.backend_pid))
      assert.same({ nil, "timeout" }, { conn:try_lock_all({ 4, 3, 2, 1 }, { timeout = 0.02 }) })
      assert.same({}, held(conn.backend_pid))
      busy:release()
    end
    assert.is_true(conn:try_lock_all({ 4, 3, 2, 1 }):release())
    assert.is_true(conn:try_lock_all({ 4, 3, 2, 1 }, { timeout = 5 }):release())
  end)

  it("writes nothing to the server's log when one is busy", function()
    local log = support.log()
    if not log then return pending "the server's log is elsewhere" end
    local conn, other = support.connect(), support.connect()
    local busy = other:lock(2)
    assert.same({ nil, "busy" }, { conn:try_lock_all { 1, 2, 3 } })
    assert.same({ nil, "timeout" }, { conn:try_lock_all({ 1, 2, 3 }, { timeout = 0.02 }) })
    support.observe "SELECT 1"
    assert.is_nil(log():find("own a lock", 1, true))
    busy:release()
  end)

  it("lets go of pairs and shared locks too when one is busy", function()
    local conn, other = support.connect(), support.connect()
    local busy = other:lock { 7, 42 }
    for _, shared in ipairs { false, true } do
      assert.same({ nil, "busy" }, { conn:try_lock_all({ 1, { 7, 41 }, { 7, 42 } }, { shared = shared }) })
      assert.same({}, held(conn.backend_pid))
    end
    local err = support.assert_code("timeout", conn.lock_all, conn, { 1, { 7, 42 } }, { timeout = 0 })
    assert.equal("no lock on 2 keys: somebody holds one of them", err.message)
    assert.is_nil(err.key)
    busy:release()
  end)

  it("does not pass those who wait", function()
    local conn, holder, waiter = support.connect(), support.connect(), support.connect()
    local shared = holder:lock(1, { shared = true })
    support.begin(waiter, "lock", 1)
    support.wait_until_waiting(waiter.backend_pid)
    assert.same({ nil, "busy" }, { conn:try_lock_all({ 1, 2 }, { shared = true }) })
    begin_waiting(conn, { 1, 2 }, { shared = true, timeout = 20 })
    shared:release()
    local lock = support.complete(waiter)
    assert.is_true(support.is_waiting(conn.backend_pid))
    lock:release()
    support.complete(conn):release()
  end)
end)

-- G26: whatever strikes at whichever element.
describe("G26: a set of locks", function()
  after_each(support.finish)

  local COUNT = 5

  for position = 1, COUNT do
    for _, options in ipairs { {}, { timeout = 20 } } do
      local case = ("at key %d%s"):format(position, options.timeout and ", with a timeout" or "")

      it("leaves nothing behind when it is cancelled " .. case, function()
        local conn, other = support.connect(), support.connect()
        local busy = other:lock(position)
        begin_waiting(conn, numbers(COUNT), options)
        assert.same(numbers(position - 1), held(conn.backend_pid))
        support.observe("SELECT pg_cancel_backend($1)", conn.backend_pid)
        local err = support.assert_code("interrupted", support.complete, conn)
        assert.equal("57014", err.sqlstate)
        assert.same({}, held(conn.backend_pid))
        assert.same({}, conn:locks())
        busy:release()
        assert.is_true(conn:lock_all(numbers(COUNT)):release())
      end)

      it("leaves nothing behind when its session is killed " .. case, function()
        local conn, other = support.connect(), support.connect()
        local busy = other:lock(position)
        begin_waiting(conn, numbers(COUNT), options)
        support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
        support.assert_code("lost", support.complete, conn)
        support.wait_until("its locks to go", function() return #held(conn.backend_pid) == 0 end)
        busy:release()
      end)
    end

    it("leaves nothing behind when conn:cancel() strikes at key " .. position, function()
      local conn, other = support.connect(), support.connect()
      local busy = other:lock(position)
      begin_waiting(conn, numbers(COUNT))
      assert.is_true(conn:cancel())
      support.assert_code("interrupted", support.complete, conn)
      assert.same({}, held(conn.backend_pid))
      busy:release()
    end)
  end

  it("leaves nothing behind after a deadlock, and keeps what was held before", function()
    local a, b = support.connect(), support.connect()
    local nine = b:lock(9)
    a:query "SET deadlock_timeout = '1min'"
    b:query "SET deadlock_timeout = '10ms'"
    begin_waiting(a, { 5, 9 })
    support.begin(b, "lock_all", { 4, 5, 6 })
    support.assert_code("deadlock", support.complete, b)
    assert.same({ 9 }, held(b.backend_pid))
    assert.is_true(nine:release())
    support.complete(a):release()
  end)

  -- The server begins to count; with the waiter's backend stopped the timeout passes and the lock is
  -- granted; what the server then says is the timeout.
  local function grant_unheard(conn, keys, busy)
    begin_waiting(conn, keys, { timeout = 0.2 * support.slow })
    support.signal("STOP", conn.backend_pid)
    support.sleep(0.2 * support.slow)
    busy:release()
    support.wait_until("the grant", function() return not support.is_waiting(conn.backend_pid) end)
    support.signal("CONT", conn.backend_pid)
  end

  local function grant_and_time_out(conn, keys, busy)
    grant_unheard(conn, keys, busy)
    return pcall(support.complete, conn)
  end

  it("row 10, waiting: adopts a timeout that got the last of them", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = support.connect(), support.connect()
    local ok, lock = grant_and_time_out(conn, { 1, 2, { 7, 42 } }, other:lock { 7, 42 })
    assert.is_true(ok, lock)
    assert.is_true(lock:check())
    assert.equal(3, #held(conn.backend_pid))
    lock:release()
  end)

  it("row 10, waiting: undoes a timeout that got one in the middle", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = support.connect(), support.connect()
    local ok, err = grant_and_time_out(conn, { 1, 2, 3 }, other:lock(2))
    assert.is_false(ok)
    assert.equal("timeout", err.code)
    assert.same({}, held(conn.backend_pid))
  end)

  -- The statement's timeout is adopted only when nobody has interrupted while the guard looked.
  it("row 10, waiting: lets go of a timeout that got the last of them, when conn:cancel() comes then", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = support.connect(), support.connect()
    local pid = conn.backend_pid
    local busy = other:lock(2)
    grant_unheard(conn, { 1, 2 }, busy)
    support.wait_until("the timeout", function()
      return support.observe("SELECT state FROM pg_stat_activity WHERE pid = $1", pid)[1].state == "idle"
    end)
    support.signal("STOP", pid) -- so that the guard is still to be answered
    support.core.step(conn)
    assert.is_true(conn:cancel())
    support.signal("CONT", pid)
    support.assert_code("interrupted", support.complete, conn)
    assert.same({}, held(pid))
    assert.same({}, conn:locks())
  end)

  -- Of the keys that a failed release left, the server may count 2.
  it("row 10, waiting: adopts no timeout while the release of one of them is in doubt", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn, other = support.connect { release = "deferred" }, support.connect()
    conn:lock(1):release()
    conn:ping()
    local busy, lock = other:lock(2), conn:lock(1)
    conn:query "DEALLOCATE pglocks_unlock_8"
    lock:release()
    grant_unheard(conn, { 1, 2 }, busy)
    support.assert_code("timeout", support.complete, conn)
    assert.same({}, held(conn.backend_pid))
  end)

  it("does not abort the transaction that it fails in", function()
    local conn, other = support.connect(), support.connect()
    local busy = other:lock(2)
    conn:query "BEGIN"
    assert.same({ nil, "timeout" }, { conn:try_lock_all({ 1, 2, 3 }, { timeout = 0.02 }) })
    assert.same({ nil, "busy" }, { conn:try_lock_all { 1, 2, 3 } })
    assert.same({}, held(conn.backend_pid))
    assert.equal(1, conn:query("SELECT 1 AS one")[1].one)
    conn:query "COMMIT"
    busy:release()
  end)

  it("is let go when the transaction ends that had failed", function()
    local conn = support.connect()
    local lock = conn:lock_all(numbers(100))
    local pairs_too = conn:lock_all({ 5, { 7, 42 } }, { shared = true })
    conn:query "BEGIN"
    support.assert_code("server", conn.query, conn, "SELECT 1/0")
    local err = support.assert_code("aborted_transaction", conn.lock_all, conn, { 1000, 1001 })
    assert.equal("the transaction is aborted: nothing was locked", err.message)
    support.assert_code("aborted_transaction", lock.check, lock) -- and asks nobody, who would refuse
    assert.is_true(lock:release())
    assert.is_true(pairs_too:release())
    assert.equal(102, #held(conn.backend_pid))
    conn:query "ROLLBACK"
    assert.same({}, held(conn.backend_pid))
    assert.same({}, conn:locks())
  end)

  it("is let go when that transaction ends, however many statements it refused and however many locks there are",
    function()
      local conn, locks = support.connect(), {}
      for i = 1, 100 do locks[i], locks[100 + i] = conn:lock(i), conn:lock { i, -i } end
      conn:query "BEGIN"
      support.assert_code("server", conn.query, conn, "SELECT 1/0")
      for _, lock in ipairs(locks) do assert.is_true(lock:release()) end
      for _ = 1, 60 do support.assert_code("aborted_transaction", conn.query, conn, "SELECT 1") end
      conn:query "ROLLBACK"
      assert.same({}, held(conn.backend_pid))
      assert.is_true(conn:ping())
    end)

  -- The release is not even prepared, so that there is no savepoint behind which to ask the guard.
  it("is let go when the transaction ends that its release has failed", function()
    local conn = support.connect()
    local lock = conn:lock_all { 1, 2, { 7, 42 } }
    conn:query "PREPARE pglocks_unlock_all AS SELECT 1"
    conn:query "BEGIN"
    support.assert_code("aborted_transaction", lock.release, lock)
    assert.equal(3, #held(conn.backend_pid))
    conn:query "ROLLBACK"
    assert.same({}, held(conn.backend_pid))
    assert.same({}, conn:locks())
  end)

  it("takes anew what was let go in doubt", function()
    local conn = support.connect { release = "deferred" }
    conn:lock_all({ 1, 2, 3 }):release()
    conn:ping()
    local lock = conn:lock_all { 1, 2, 3 }
    conn:query "DEALLOCATE pglocks_unlock_all"
    assert.is_true(lock:release())
    local again = conn:lock_all { 2, 3, 4 } -- behind the release, which fails
    assert.is_true(again:check())
    support.wait_until("the guard of the first", function()
      conn:ping()
      return #held(conn.backend_pid) == 3
    end)
    assert.same({ 2, 3, 4 }, held(conn.backend_pid))
    again:release()
    conn:ping()
    assert.same({}, held(conn.backend_pid))
  end)

  -- From now on the release of many keys lets go of them, and says so in a way that none does.
  local function answer_nonsense(conn)
    conn:query "DEALLOCATE pglocks_unlock_all"
    conn:query [[PREPARE pglocks_unlock_all(int8[], int4) AS
      SELECT 'nonsense' FROM unnest($1) k, pg_advisory_unlock(k) WHERE $2 > 0]]
  end

  -- What answers nonsense here has let go: a guard that came after the grant would let go of that.
  it("takes anew what a release let go that was not understood, whichever of its keys that was", function()
    for _, keys in ipairs { { 2, 3, 4 }, { 1, 2, 3 }, { 1, 3 } } do
      local conn = support.connect { release = "deferred" }
      conn:lock_all({ 1, 2 }):release()
      conn:ping()
      local lock = conn:lock_all { 2, 3 }
      answer_nonsense(conn)
      lock:release()
      local again = conn:lock_all(keys)
      conn:ping()
      assert.same(keys, held(conn.backend_pid))
      assert.is_true(again:check())
      conn:close()
    end
  end)

  it("is no loss when the guard finds nothing left of a release that was not understood", function()
    local told = {}
    local conn = support.connect { release = "deferred", on_lost = function(_, err) told[#told + 1] = err end }
    conn:lock_all({ 1, 2 }):release()
    conn:ping()
    local lock = conn:lock_all { 1, 2 }
    answer_nonsense(conn)
    lock:release()
    for _ = 1, 3 do conn:ping() end
    assert.same({}, told)
    assert.same({}, held(conn.backend_pid))
  end)

  it("counts anew what a deferred release has let go, though its answer was not yet read", function()
    local conn = support.connect { release = "deferred" }
    local one, two = conn:lock(1), conn:lock(2)
    one:release()
    support.wait_until("the release", function() return #held(conn.backend_pid) == 1 end)
    support.sleep(0.02) -- and its answer
    local lock = conn:lock_all { 1, 2 }
    conn:lock(3)
    assert.equal(3, #conn:locks())
    lock:release()
    two:release()
    conn:ping()
    assert.same({ 3 }, held(conn.backend_pid))
    assert.equal(1, #conn:locks())
  end)

  it("is let go by the guard after a release that failed", function()
    local conn = support.connect()
    for _, shared in ipairs { false, true } do
      conn:lock_all({ 1, 2 }, { shared = shared }):release()
      local lock = conn:lock_all({ 1, 2, { 7, 42 } }, { shared = shared })
      conn:query "DEALLOCATE ALL"
      assert.is_true(lock:release())
      assert.same({}, held(conn.backend_pid))
    end
  end)

  it("is unknown after an answer that no such statement has", function()
    for name, sql in pairs { lock_all = "SELECT false", timed_all = "SELECT 'many'", try_all = "SELECT NULL::bool",
      unlock_all = "SELECT 't'" } do
      local options = { timeout = name == "timed_all" and 5 or name == "try_all" and 0 or nil }
      local conn = support.connect()
      conn:lock_all({ 1, 2 }, options):release()
      local lock = name == "unlock_all" and conn:lock_all { 1, 2 }
      conn:query("DEALLOCATE pglocks_" .. name)
      conn:query(("PREPARE pglocks_%s(int8[], int4%s) AS %s"):format(name, name == "timed_all" and ", text" or "", sql))
      if lock then
        support.assert_code("unknown", lock.release, lock)
      else
        support.assert_code("unknown", conn.lock_all, conn, { 1, 2 }, options)
      end
      assert.is_false(conn:alive())
    end
  end)
end)

describe("a set of locks of which one was lost", function()
  after_each(support.finish)

  it("is lost when check() hears of it, and lets go of the rest", function()
    local conn = support.connect()
    local lock = conn:lock_all { 1, 2, 3 }
    local one, two = conn:lock(1), conn:lock(2)
    conn:query "SELECT pg_advisory_unlock(2)"
    assert.is_true(lock:held())
    support.assert_code("lost", lock.check, lock)
    assert.is_false(lock:held())
    assert.is_false(two:held())
    assert.is_true(one:held())
    assert.equal("pglocks lock: 3 keys, exclusive, lost", tostring(lock))
    support.assert_code("lost", lock.release, lock)
    conn:ping()
    assert.same({ 1 }, held(conn.backend_pid))
    assert.is_true(one:check())
    one:release()
    assert.same({}, held(conn.backend_pid))
  end)

  it("is lost with all that check() misses, for the other locks on these keys", function()
    local conn = support.connect()
    local lock = conn:lock_all { 1, 2, 3, 4 }
    local two, rest = conn:lock(2), conn:lock_all { 3, 4 }
    local one = conn:lock(1)
    conn:query "SELECT pg_advisory_unlock(2), pg_advisory_unlock(4)"
    local err = support.assert_code("lost", lock.check, lock)
    assert.is_nil(err.key)
    assert.is_false(two:held() or rest:held())
    assert.is_true(one:held())
    assert.same({ { 1, 2 }, { 3, 2 } }, (function()
      local list = {}
      for i, held_one in ipairs(conn:locks()) do list[i] = { held_one.key.objid, held_one.count } end
      table.sort(list, function(a, b) return a[1] < b[1] end)
      return list
    end)())
    assert.is_nil(support.assert_code("lost", lock.release, lock).key)
    assert.equal("2", tostring(support.assert_code("lost", two.release, two).key))
  end)

  it("is not held, rather than lost, for a check() during which its scope has ended", function()
    local conn = support.connect()
    local lock, two = conn:lock_all { 1, 2 }, conn:lock(2)
    conn:query "SELECT pg_advisory_unlock(2)"
    support.core.start.check(lock)
    getmetatable(lock).__close(lock)
    support.assert_code("not_held", support.complete, conn)
    assert.is_false(two:held())
    conn:ping()
    assert.same({}, held(conn.backend_pid))
  end)

  it("tells on_lost at the end of its scope, with the key", function()
    local told = {}
    local conn = support.connect { on_lost = function(_, err) told[#told + 1] = err end }
    local lock = conn:lock_all { 1, 2, 3 }
    conn:query "SELECT pg_advisory_unlock(2)"
    getmetatable(lock).__close(lock)
    assert.equal(1, #told)
    assert.equal("not_held", told[1].code)
    assert.equal("2", tostring(told[1].key))
    assert.same({}, held(conn.backend_pid))
  end)

  it("is lost with its session, also where its release is only counted", function()
    local conn = support.connect()
    local lock = conn:lock_all { 1, 2 }
    conn:lock_all { 1, 2 }
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the end", function()
      return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", conn.backend_pid) == 0
    end)
    support.assert_code("lost", lock.release, lock)
  end)

  it("lets go of the rest at the end of its scope, too, and when it is collected", function()
    local conn = support.connect()
    local lock = conn:lock_all { 1, 2, 3 }
    conn:query "SELECT pg_advisory_unlock(2)"
    support.assert_code("lost", lock.check, lock)
    getmetatable(lock).__close(lock)
    conn:ping()
    assert.same({}, held(conn.backend_pid))
    lock = conn:lock_all { 1, 2, 3 }
    conn:query "SELECT pg_advisory_unlock(2)"
    support.assert_code("lost", lock.check, lock)
    lock = nil -- luacheck: ignore 311
    collectgarbage()
    collectgarbage()
    support.wait_until("the release", function() return #held(conn.backend_pid) == 0 end)
  end)

  it("raises not_held when the release hears of it, with the key", function()
    local conn = support.connect()
    local lock = conn:lock_all { 1, 2, { 7, 42 } }
    conn:query "SELECT pg_advisory_unlock(7, 42)"
    local err = support.assert_code("not_held", lock.release, lock)
    assert.equal("(7, 42)", tostring(err.key))
    assert.same({}, held(conn.backend_pid))
    assert.same({}, conn:locks())
  end)

  it("tells on_lost of a deferred release, with the key", function()
    local told = {}
    local conn = support.connect { release = "deferred", on_lost = function(_, err) told[#told + 1] = err end }
    local lock = conn:lock_all { 1, 2, 3 }
    conn:query "SELECT pg_advisory_unlock(2)"
    assert.is_true(lock:release())
    conn:ping()
    conn:ping()
    assert.equal(1, #told)
    assert.equal("not_held", told[1].code)
    assert.equal("2", tostring(told[1].key))
    assert.same({}, held(conn.backend_pid))
  end)
end)

describe("the deferred release of a set of locks", function()
  after_each(support.finish)

  it("is sent at once, and close() waits for it", function()
    local conn = support.connect { release = "deferred" }
    local pid = conn.backend_pid
    local lock = conn:lock_all(numbers(1000))
    assert.is_true(lock:release())
    support.wait_until("the release", function() return #held(pid) == 0 end)
    conn:lock_all(numbers(1000))
    conn:close()
    assert.same({}, held(pid))
  end)

  -- More than a socket takes by itself, while its server reads nothing.
  it("leaves nothing in the client, however much there is to say", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = support.connect { release = "deferred" }
    local pid = conn.backend_pid
    local lock = conn:lock_all(numbers(20000))
    support.signal("STOP", pid)
    getmetatable(lock).__close(lock)
    support.signal("CONT", pid)
    support.wait_until("the release", function() return #held(pid) == 0 end)
  end)
end)

describe("a connection that many sets of locks were taken on", function()
  after_each(support.finish)

  -- In a process of its own, whose heap has no room left by other tests.
  local PROGRAM = [[
    local pglocks = require "pglocks"
    local conn, other = pglocks.connect { conninfo = ..., release = "deferred" }, pglocks.connect(...)
    local busy = other:lock(0)
    local function kilobytes()
      collectgarbage()
      collectgarbage()
      local file = io.open "/proc/self/statm"
      local pages = file:read "*a":match "^%d+ (%d+)"
      file:close()
      return tonumber(pages) * 4
    end
    local before
    for round = 1, 12 do
      local keys = {}
      for i = 1, 4000 do keys[i] = round * 4000 + i end
      conn:lock_all(keys):release()
      conn:ping()
      for i = 1, 4000 do keys[i] = -keys[i] end -- others, as any would find what is left of the first
      keys[#keys + 1] = 0
      assert(not conn:try_lock_all(keys))
      if round == 2 then before = kilobytes() end
    end
    print(kilobytes() - before)
    busy:release()
  ]]

  it("needs no more memory for those that are over", function()
    local process = support.spawn(PROGRAM, support.conninfo)
    local said = process.lines()
    process.close()
    local more = tonumber(said) -- 100 bytes for each key would be 4000
    assert.is_true(more ~= nil and (more < 2000 or support.slow > 1), said) -- a sanitizer keeps what is freed
  end)
end)

describe("lock_all by a function", function()
  after_each(support.finish)

  it("runs it with the locks, and releases them", function()
    local conn, other = support.connect(), support.connect()
    local pid = conn.backend_pid
    assert.same({ 2, 3 }, { conn:with_lock_all({ 2, 1 }, { timeout = 5 }, function(lock, ...)
      assert.same({ 1, 2 }, held(pid))
      return #lock.keys, ...
    end, 3) })
    assert.same({}, held(pid))
    assert.same({ true, 42 }, { conn:try_with_lock_all({ 2, 1 }, function() return 42 end) })
    support.assert_raises("of the function", conn.with_lock_all, conn, { 2, 1 }, function() error "of the function" end)
    assert.same({}, held(pid))
    local busy = other:lock(2)
    assert.same({ false, "busy" }, { conn:try_with_lock_all({ 2, 1 }, error) })
    busy:release()
  end)

  it("works on the module's connection", function()
    pglocks.setup(support.conninfo)
    local other = support.connect()
    local lock = pglocks.lock_all({ 1, 2 }, { timeout = 5 })
    assert.same({ nil, "busy" }, { other:try_lock_all { 2, 3 } })
    lock:release()
    assert.is_true(pglocks.try_lock_all({ 1, 2 }):release())
    assert.equal(2, pglocks.with_lock_all({ 1, 2 }, function(l) return #l.keys end))
    local busy = other:lock(2)
    assert.same({ nil, "busy" }, { pglocks.try_lock_all { 1, 2 } })
    assert.same({ false, "busy" }, { pglocks.try_with_lock_all({ 1, 2 }, error) })
    support.assert_raises("bad argument #2 to 'lock_all' (option 'using': unknown database 'nowhere')", function()
      local got = pglocks.lock_all({ 1 }, { using = "nowhere" })
      return got
    end)
    pglocks.setup { databases = { never = { conninfo = support.conninfo, port = "1", timeout = 0.1 } } }
    support.assert_raises("keys[2]", pglocks.lock_all, { 1, true }, { using = "never" }) -- before it connects
    busy:release()
    pglocks.setup {}
  end)
end)
