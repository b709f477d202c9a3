-- conn:all_locks(): what anybody holds in the database, and who waits.

local loops = require "spec.loops"
local pglocks = require "pglocks"
local server = require "spec.faults.server"
local support = require "spec.support"

local core = support.core
local assert_code, assert_raises, connect = support.assert_code, support.assert_raises, support.connect

--- Begins a wait, which `support.complete` ends.
local function wait_for(conn, key, options)
  support.begin(conn, "lock", key, options)
  support.wait_until_waiting(conn.backend_pid)
end

--- One field of each.
local function all(field, list)
  local values = {}
  for i, one in ipairs(list) do
    local value = one[field]
    values[i] = field == "key" and tostring(value) or value == nil and "nil" or value
  end
  return values
end

local function clock() return tonumber(support.observe("SELECT date_part('epoch', clock_timestamp()) AS t")[1].t) end

--- For a session that has an address, of a role without privileges.
local function over_tcp()
  return { host = "127.0.0.1", user = "scram_user", password = "secret of scram", application_name = "distant" }
end

describe("all_locks", function()
  after_each(function()
    pglocks.setup {}
    server.finish()
    support.finish()
  end)

  it("is empty where nobody holds anything", function()
    assert.same({}, connect():all_locks())
    assert.same({}, connect():all_locks {})
    assert.same({}, connect():all_locks(nil))
  end)

  it("lists who holds a lock and who waits for it", function()
    local holder, waiter = connect(), connect { application_name = "second" }
    local lock = holder:lock("invoice 42", { shared = true })
    local before = clock()
    wait_for(waiter, "invoice 42")
    local list = connect():all_locks()
    local since = list[2] and list[2].since
    if holder.server_version >= 140000 then
      assert.is_true(since >= before - 0.001 and since <= clock() + 0.001)
    else
      assert.is_nil(since)
    end
    local key = pglocks.key "invoice 42"
    for _, one in ipairs(list) do
      assert.is_true(one.key == key)
      one.key = nil
    end
    assert.same({
      { name = "invoice 42", mode = "shared", granted = true, pid = holder.backend_pid, application = "pglocks" },
      { name = "invoice 42", mode = "exclusive", granted = false, pid = waiter.backend_pid, application = "second",
        since = since, blocked_by = { holder.backend_pid } },
    }, list)
    lock:release()
    list = holder:all_locks()
    assert.same({ true, nil, nil }, { list[1].granted, list[1].since, list[1].blocked_by })
    support.complete(waiter):release()
    assert.same({}, holder:all_locks())
  end)

  it("lists keys in their order, and exactly", function()
    local conn, other = connect(), connect()
    local shown = {
      "-9223372036854775808", "-4294967297", "-1", "0", "1", "4294967295", "2147483648", "9007199254740993",
      "9223372036854775807", "(-2147483648, 0)", "(-1, -1)", "(-1, 0)", "(0, -2147483648)", "(0, 1)",
      "(7, 42)", "(2147483647, 2147483647)",
    }
    for _, key in ipairs(shown) do -- by foreign SQL, so that nothing here knows them
      conn:query(key:find "%(" and ("SELECT pg_advisory_lock" .. key) or ("SELECT pg_advisory_lock('%s')"):format(key))
    end
    -- 4294967295 is more than 2147483648 in its low half alone
    shown[6], shown[7] = shown[7], shown[6]
    local list = other:all_locks()
    assert.same(shown, all("key", list))
    for i, one in ipairs(list) do
      assert.is_true(i == 1 or list[i - 1].key < one.key)
      assert.same({ nil, "busy" }, { other:try_lock(one.key) })
      assert.same({ shown[i] }, all("key", other:all_locks { key = one.key }))
      assert.same({ shown[i] }, all("key", other:all_locks { key = one.key.value }))
    end
  end)

  it("lists what is granted before what waits, and that in the order of the queue", function()
    local writer, reader, watcher = connect(), connect(), connect()
    local holders, granted = {}, {}
    for i = 1, 6 do
      local conn = connect()
      holders[i], granted[i] = conn:lock(42, { shared = true }), conn.backend_pid
    end
    table.sort(granted)
    wait_for(writer, 42)
    wait_for(reader, 42, { shared = true })
    local pids, blocked_by = {}, {}
    for i, one in ipairs(watcher:all_locks()) do
      pids[i] = one.pid
      if one.blocked_by then table.sort(one.blocked_by) end
      blocked_by[one.pid] = one.blocked_by
    end
    local queue = { table.remove(pids, 7), table.remove(pids, 7) }
    if watcher.server_version < 140000 then queue = { writer.backend_pid, reader.backend_pid } end
    assert.same(granted, pids)
    assert.same({ writer.backend_pid, reader.backend_pid }, queue)
    assert.same({ [writer.backend_pid] = granted, [reader.backend_pid] = { writer.backend_pid } }, blocked_by)
    for _, lock in ipairs(holders) do lock:release() end
    support.complete(writer):release()
    support.complete(reader):release()
  end)

  it("lists both modes of one session", function()
    local conn = connect()
    local locks = { conn:lock "x", conn:lock("x", { shared = true }), conn:lock "x" }
    assert.same({ "exclusive", "shared" }, all("mode", conn:all_locks()))
    for _, lock in ipairs(locks) do lock:release() end
  end)

  it("lists nothing of other databases, and no other locks", function()
    local conn, elsewhere = connect(), connect { dbname = "template1" }
    local lock, other = conn:lock(1), elsewhere:lock(2)
    conn:query "BEGIN"
    conn:query "LOCK TABLE pg_catalog.pg_class IN ACCESS SHARE MODE"
    assert.same({ "1" }, all("key", conn:all_locks()))
    assert.same({ "2" }, all("key", elsewhere:all_locks()))
    conn:query "COMMIT"
    lock:release()
    other:release()
  end)

  it("lists a lock of a prepared transaction, which has no session", function()
    if server.cannot_make then return pending(server.cannot_make) end
    local own = server.make "max_prepared_transactions = 1"
    local conn, waiter = pglocks.connect(own.conninfo), pglocks.connect(own.conninfo)
    conn:query "BEGIN"
    conn:query "SELECT pg_advisory_xact_lock(42)"
    conn:query "PREPARE TRANSACTION 'a'"
    support.begin(waiter, "lock", 42)
    support.wait_until("the wait", function() return #conn:all_locks { granted = false } > 0 end)
    local list = conn:all_locks()
    assert.same({ "nil", waiter.backend_pid }, all("pid", list))
    assert.same({ "nil", "pglocks" }, all("application", list))
    assert.same({ 0 }, list[2].blocked_by)
    conn:query "ROLLBACK PREPARED 'a'"
    support.complete(waiter)
    conn:close()
    waiter:close()
  end)

  -- ---- sessions -------------------------------------------------------------------------

  it("shows an address where there is one", function()
    if not os.getenv "PGLOCKS_TEST_DATA" then return pending "this server knows no scram_user" end
    local conn = connect(over_tcp())
    local port = support.observe("SELECT client_port FROM pg_stat_activity WHERE pid = $1", conn.backend_pid)
    local lock = conn:lock "x"
    assert.same({ "127.0.0.1:" .. port[1].client_port }, all("client", connect():all_locks()))
    lock:release()
  end)

  it("shows no application where the session has no name", function()
    local conn = connect { application_name = "" }
    conn:query "SET application_name = ''"
    local lock = conn:lock "x"
    assert.same({ "nil" }, all("application", conn:all_locks()))
    lock:release()
  end)

  it("shows a role without privileges everything but the addresses of others", function()
    if not os.getenv "PGLOCKS_TEST_DATA" then return pending "this server knows no scram_user" end
    support.observe "CREATE ROLE somebody LOGIN"
    finally(function() support.observe "DROP ROLE somebody" end)
    local holder, own = connect(over_tcp()), connect { user = "somebody", application_name = "own" }
    local lock = holder:lock "x"
    wait_for(own, "x")
    local list = connect { user = "somebody" }:all_locks()
    assert.same({ holder.backend_pid, own.backend_pid }, all("pid", list))
    assert.same({ "distant", "own" }, all("application", list))
    assert.same({ "nil", "nil" }, all("client", list))
    assert.same({ holder.backend_pid }, list[2].blocked_by)
    assert.is_truthy(holder:all_locks()[1].client)
    lock:release()
    support.complete(own):release()
  end)

  -- ---- names ----------------------------------------------------------------------------

  it("knows the names of every connection of the process", function()
    local holder, waiter = connect(), connect()
    local odd = ("\0%s\255"):format(("x"):rep(1000))
    local locks = { holder:lock "x", holder:lock(odd), holder:lock(1), holder:lock { 1, 2 } }
    wait_for(waiter, odd)
    local names = {}
    for _, one in ipairs(connect():all_locks()) do
      names[tostring(one.key) .. tostring(one.granted)] = one.name or "none"
    end
    assert.same({
      [tostring(pglocks.key "x") .. "true"] = "x", [tostring(pglocks.key(odd)) .. "true"] = odd,
      [tostring(pglocks.key(odd)) .. "false"] = odd, ["1true"] = "none", ["(1, 2)true"] = "none",
    }, names)
    for _, lock in ipairs(locks) do lock:release() end
    support.complete(waiter):release()
  end)

  it("knows a name in a session that took the key by its number", function()
    local named, numbered = connect(), connect()
    local locks = { named:lock("x", { shared = true }), numbered:lock(pglocks.key "x", { shared = true }) }
    assert.same({ "x", "x" }, all("name", named:all_locks()))
    locks[1]:release()
    assert.same({ "nil" }, all("name", named:all_locks()))
    locks[2]:release()
  end)

  it("knows which of two names for one key is a session's own", function()
    local options = { hash = function() return 42 end, shared = true }
    local conns, locks = {}, {}
    for i = 1, 20 do
      conns[i] = connect()
      locks[i] = conns[i]:lock("name " .. i, options)
    end
    local names = {}
    for _, one in ipairs(conns[1]:all_locks()) do names[one.pid] = one.name end
    for i, conn in ipairs(conns) do assert.equal("name " .. i, names[conn.backend_pid]) end
    for _, lock in ipairs(locks) do lock:release() end
  end)

  it("knows the name of a lock whose release is on its way", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = connect { release = "deferred" }
    local lock = conn:lock "x"
    support.signal("STOP", conn.backend_pid)
    lock:release()
    assert.same({}, conn:locks())
    assert.same({ "x" }, all("name", connect():all_locks()))
    support.signal("CONT", conn.backend_pid)
  end)

  it("knows no name of another process", function()
    local other = support.spawn([[
      local conn = require "pglocks".connect((...))
      local lock = conn:lock("y", { timeout = 10 })
      print "holds"
      io.stdout:flush()
      require "system".sleep(600)
    ]], support.conninfo)
    finally(function()
      support.signal("KILL", other.pid)
      other.close()
    end)
    assert.equal("holds", other.lines())
    assert.same({ "nil" }, all("name", connect():all_locks { key = "y" }))
  end)

  -- The name is unknown once its connection is gone, by `ends`, though another session has the key.
  for how, ends in pairs {
    ["lost"] = function(conn)
      support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
      support.wait_until("the loss", function() return not conn:alive() end)
    end,
    ["closed"] = function(conn) conn:close() end,
    ["collected"] = function(conn) getmetatable(conn).__gc(conn) end,
  } do
    it("knows no name of a connection that was " .. how, function()
      local conn, foreign = pglocks.connect(support.conninfo), connect()
      local lock = conn:lock("x", { shared = true })
      foreign:query("SELECT pg_advisory_lock_shared($1)", tostring(pglocks.key "x"))
      assert.same({ "x", "x" }, all("name", foreign:all_locks()))
      ends(conn)
      assert.is_false(lock:held())
      assert.same({ "nil" }, all("name", foreign:all_locks { pid = foreign.backend_pid }))
      assert.is_nil(core.names(conn))
    end)
  end

  it("keeps no connection open", function()
    local pid = pglocks.connect(support.conninfo).backend_pid
    for _ = 1, 2 do collectgarbage() end
    support.wait_until("the end of the session", function()
      return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", pid) == 0
    end)
  end)

  -- ---- filters --------------------------------------------------------------------------

  it("lists what a filter lets through", function()
    local a, b, watcher = connect(), connect(), connect()
    local locks = { a:lock "x", a:lock(42), a:lock { 0, 42 }, b:lock("x", { namespace = "n" }),
      b:lock("x", { hash = "django-pglocks" }) }
    wait_for(b, 42)
    local function count(filter) return #watcher:all_locks(filter) end
    assert.equal(6, count())
    assert.equal(3, count { pid = a.backend_pid })
    assert.equal(3, count { pid = b.backend_pid })
    assert.equal(0, count { pid = watcher.backend_pid })
    assert.equal(5, count { granted = true })
    assert.equal(1, count { granted = false })
    assert.equal(2, count { key = 42 })
    assert.equal(1, count { key = { 0, 42 } })
    assert.equal(0, count { key = { 42, 0 } })
    assert.equal(0, count { key = "42" })
    assert.equal(2, count { key = pglocks.key(42) })
    assert.equal(1, count { key = 42, pid = a.backend_pid })
    assert.equal(1, count { key = 42, granted = false })
    assert.equal(0, count { key = 42, granted = false, pid = a.backend_pid })
    assert.same({ a.backend_pid }, all("pid", watcher:all_locks { key = "x" }))
    assert.same({ b.backend_pid }, all("pid", watcher:all_locks { key = "x", namespace = "n" }))
    assert.equal(1, count { key = "x", hash = "django-pglocks" })
    assert.equal(2, count { key = "any", hash = function() return 42 end })
    pglocks.setup { namespace = "n" }
    assert.same({ b.backend_pid }, all("pid", watcher:all_locks { key = "x" }))
    a:query("SELECT pg_advisory_unlock(42)")
    support.complete(b):release()
    for _, lock in ipairs(locks) do pcall(lock.release, lock) end
  end)

  it("raises for a filter that is none, before anything else", function()
    local conn = connect()
    conn:close() -- so that whatever was sent would raise `closed`
    for _, case in ipairs {
      { 42, "table of options expected, got number" },
      { "x", "table of options expected, got string" },
      { false, "table of options expected, got boolean" },
      { { keys = 42 }, "unknown option 'keys'" },
      { { "x" }, "unknown option '1'" },
      { { granted = 1 }, "option 'granted' must be a boolean" },
      { { pid = "42" }, "option 'pid' must be the number of a process" },
      { { pid = 0 }, "option 'pid' must be" },
      { { pid = 1.5 }, "option 'pid' must be" },
      { { pid = 2 ^ 31 }, "option 'pid' must be" },
      { { pid = 0 / 0 }, "option 'pid' must be" },
      { { key = true }, "option 'key': integer, pair of integers or string expected, got boolean" },
      { { key = false }, "option 'key': integer, pair of integers or string expected, got boolean" },
      { { key = 1.5 }, "option 'key': number has no exact representation" },
      { { key = {} }, "option 'key': a pair of 32-bit integers expected, got another table" },
      { { key = { 1, 2 ^ 31 } }, "option 'key': a pair of 32-bit integers expected, [2] is out of range" },
      { { key = 42, hash = "rails" }, "option 'hash' is for names only" },
      { { key = 42, namespace = "n" }, "option 'namespace' is for names only" },
      { { hash = "rails" }, "option 'hash' is for names only" },
      { { namespace = "n" }, "option 'namespace' is for names only" },
      { { key = "x", hash = "nothing" }, "option 'hash': unknown scheme 'nothing'" },
      { { key = "x", hash = 42 }, "option 'hash': name of a scheme or function expected, got number" },
      { { key = "x", hash = "rails", namespace = "n" }, "hash 'rails' takes no namespace" },
      { { key = "x", hash = function() return "y" end },
        "what the 'hash' function returned: integer, pair of integers or key expected, got string" },
    } do
      local function wrong() conn:all_locks(case[1]) end
      assert_raises(("all_locks_spec.lua:%d: bad argument #1 to 'all_locks' (%s"):format(
        debug.getinfo(wrong, "S").linedefined, case[2]), wrong)
    end
    assert_raises("mine", conn.all_locks, conn, { key = "x", hash = function() error "mine" end })
    assert_code("closed", conn.all_locks, conn)
  end)

  -- ---- the connection -------------------------------------------------------------------

  it("is asked within a transaction, of which it sees the newest sessions", function()
    local conn = connect()
    conn:transaction(function()
      assert.same({}, conn:all_locks())
      local late = connect { application_name = "late" }
      local lock = late:lock "x"
      assert.same({ "late" }, all("application", conn:all_locks()))
      lock:release()
      assert.same({}, conn:all_locks())
    end)
  end)

  it("raises in a transaction that has failed, and works after it", function()
    local conn = connect()
    local lock = conn:lock "x"
    conn:query "BEGIN"
    assert_code("server", conn.query, conn, "SELECT 1/0")
    local err = assert_code("aborted_transaction", conn.all_locks, conn)
    assert.equal("25P02", err.sqlstate)
    conn:query "ROLLBACK"
    assert.equal(1, #conn:all_locks())
    lock:release()
  end)

  it("raises on a connection that is lost, or in use", function()
    local conn, holder = connect(), connect()
    local lock = holder:lock "x"
    wait_for(conn, "x")
    assert_code("busy_connection", conn.all_locks, conn)
    lock:release()
    support.complete(conn):release()
    assert.same({}, conn:all_locks())
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the loss", function() return not conn:alive() end)
    assert_code("lost", conn.all_locks, conn)
  end)

  it("does not wait for ever for an answer", function()
    if support.cannot_signal then return pending(support.cannot_signal) end
    local conn = connect { reply_timeout = 0.2 }
    support.signal("STOP", conn.backend_pid)
    local took, err = support.timed(assert_code, "unknown", conn.all_locks, conn)
    support.signal("CONT", conn.backend_pid)
    assert.is_true(took < 5 * support.slow)
    assert.equal("unknown", err.code)
    assert_code("lost", conn.all_locks, conn)
  end)

  it("is for connections", function()
    assert_raises("pglocks connection expected, got string", core.connection.all_locks, "x")
    assert_raises("pglocks connection expected, got nil", core.connection.all_locks)
  end)

  for name, loop in pairs(loops) do
    it("waits in its coroutine under " .. name, function()
      loop.run(function()
        local holder = connect { scheduler = loop.scheduler }
        local waiter = connect { scheduler = loop.scheduler }
        local lock, done = holder:lock "x", false
        loop.spawn(function()
          waiter:lock("x", { timeout = 10 * support.slow }):release()
          done = true
        end)
        local deadline = core.now() + 10 * support.slow
        repeat
          assert(core.now() < deadline)
          loop.sleep(0.005)
        until #holder:all_locks { granted = false } == 1
        local list = holder:all_locks { key = "x" }
        assert.same({ "x", "x" }, all("name", list))
        assert.same({ holder.backend_pid }, list[2].blocked_by)
        local function wrong() holder:all_locks { pids = 1 } end
        assert_raises(("all_locks_spec.lua:%d: bad argument #1 to 'all_locks' (unknown option 'pids')"):format(
          debug.getinfo(wrong, "S").linedefined), wrong)
        assert_code("busy_connection", waiter.all_locks, waiter)
        lock:release()
        while not done do loop.sleep(0.005) end
        holder:close()
        waiter:close()
      end)
    end)
  end

  -- ---- many -----------------------------------------------------------------------------

  it("does work in proportion to the locks that there are", function()
    local conn = connect()
    local jit = rawget(_G, "jit") -- whose compiled code is not counted
    if jit then
      jit.off()
      jit.flush()
    end
    finally(function() if jit then jit.on() end end)
    local function instructions(count)
      local names = {}
      for i = 1, count do names[i] = "name " .. i end
      local lock, hundreds = conn:lock_all(names), 0
      debug.sethook(function() hundreds = hundreds + 1 end, "", 100)
      local list = conn:all_locks()
      debug.sethook()
      assert.equal(count, #list)
      for _, one in ipairs(list) do assert.is_true(one.key == pglocks.key(one.name)) end
      lock:release()
      return hundreds
    end
    instructions(10)
    local few = instructions(500)
    local many = instructions(2000)
    assert.is_true(few > 10 and many < 5 * few, ("%d, %d"):format(few, many))
  end)

  it("survives a collection of what it lists", function()
    local child = support.spawn([[
      local pglocks = require "pglocks"
      local conninfo, rounds = ...
      local conn = pglocks.connect(conninfo)
      for i = 1, rounds do
        if i % 5 == 0 then pglocks.connect(conninfo):lock("dropped " .. i) end -- and both are garbage
        conn:lock("dropped too " .. i % 50)
        for _, one in ipairs(conn:all_locks()) do assert(one.key and one.pid) end
      end
      print "survived"
    ]], support.conninfo, math.ceil(500 / support.slow))
    local lines = {}
    for line in child.lines do lines[#lines + 1] = line end
    child.close()
    assert.equal("survived", table.concat(lines, "\n"))
  end)
end)
