local pglocks = require "pglocks"
local support = require "spec.support"

local core = support.core
local unpack = table.unpack or unpack

local raised = support.raised
local assert_code = support.assert_code

--- Which statement this backend began last, and when: the same again means nothing was sent.
local function activity(conn)
  return support.observe([[SELECT query, query_start::text, state_change::text FROM pg_stat_activity
    WHERE pid = $1]], conn.backend_pid)[1]
end

local function modes(conn)
  local held = {}
  for i, row in ipairs(support.pg_locks(conn.backend_pid)) do held[i] = row.mode end
  return table.concat(held, " ")
end

--- A connection whose wait for `key`, held by another one, has begun.
local function waiter(key, options, connection_options)
  local conn = support.connect(connection_options)
  support.begin(conn, "lock", key, options)
  support.wait_until_waiting(conn.backend_pid)
  return conn
end

local function terminate(conn)
  support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
end

describe("a lock", function()
  after_each(support.finish)

  it("excludes other connections until it is released", function()
    local a, b = support.connect(), support.connect()
    local lock = a:lock "invoice 42"
    assert.is_true(lock:held())
    assert.same({ nil, "busy" }, { b:try_lock "invoice 42" })
    assert.is_true(lock:release())
    assert.is_truthy(b:try_lock "invoice 42")
  end)

  it("is granted to a waiter when it is released", function()
    local a = support.connect()
    local lock = a:lock "invoice 42"
    local b = waiter "invoice 42"
    lock:release()
    local granted = support.complete(b)
    assert.is_true(granted:held())
    assert.is_true(granted.waited > 0)
    assert.equal("ExclusiveLock", modes(b))
  end)

  it("excludes as its mode says", function()
    for _, case in ipairs {
      { false, false, false }, { false, true, false }, { true, false, false }, { true, true, true },
    } do
      local a, b = support.connect(), support.connect()
      local lock = a:lock({ 7, 42 }, { shared = case[1] })
      local other = b:try_lock({ 7, 42 }, { shared = case[2] })
      assert.equal(case[3], other ~= nil)
      lock:release()
      if other then other:release() end
    end
  end)

  it("tells what it is on", function()
    local conn = support.connect()
    local lock = conn:lock("a\0b", { shared = true })
    assert.is_true(lock.acquired)
    assert.is_true(lock.shared)
    assert.equal("a\0b", lock.name)
    assert.equal(pglocks.key "a\0b", lock.key)
    assert.is_true(lock.waited >= 0 and lock.waited < 5 * support.slow)
    assert.is_nil(lock.other)
    assert.is_false(pcall(function() lock.acquired = false end))
    for _, value in ipairs { 42, { 7, 42 }, pglocks.key "invoice 42" } do
      local other = conn:lock(value)
      assert.is_nil(other.name)
      assert.is_false(other.shared)
      assert.equal(pglocks.key(value), other.key)
    end
  end)

  it("says as a string what it is on, and whether it is held", function()
    local conn = support.connect()
    local lock = conn:lock "invoice 42"
    assert.equal('pglocks lock: "invoice 42", exclusive, held', tostring(lock))
    lock:release()
    assert.equal('pglocks lock: "invoice 42", exclusive, released', tostring(lock))
    local others = {
      ["pglocks lock: (7, -42), shared, held"] = conn:lock({ 7, -42 }, { shared = true }),
      ["pglocks lock: -205618829, exclusive, held"] = conn:lock(-205618829),
      ['pglocks lock: "a\\x00\\x22\\xE6\\x97\\xA5", exclusive, held'] = conn:lock 'a\0"日',
    }
    for expected, other in pairs(others) do assert.equal(expected, tostring(other)) end
    conn:close()
    for expected, other in pairs(others) do
      assert.equal((expected:gsub("held$", "released")), tostring(other))
    end
  end)

  it("is released once, and says so afterwards", function()
    local lock = support.connect():lock(42)
    assert.same({ true }, { lock:release() })
    assert.is_false(lock:held())
    for _ = 1, 3 do assert.same({ nil, "not held" }, { lock:release() }) end
    assert_code("not_held", lock.check, lock)
  end)

  it("is not held once its connection is closed", function()
    local conn = support.connect()
    local lock = conn:lock(42)
    conn:close()
    assert.same({}, support.pg_locks())
    assert.is_false(lock:held())
    assert.same({ nil, "not held" }, { lock:release() })
    assert_code("not_held", lock.check, lock)
    assert_code("closed", conn.lock, conn, 42)
    assert.same({}, conn:locks())
    conn:close()
  end)

  it("is confirmed by check in one round trip, and by held in none", function()
    local conn = support.connect()
    local lock = conn:lock { 7, 42 }
    local before = activity(conn)
    for _ = 1, 1000 do assert(lock:held() and conn:alive()) end
    assert.same(before, activity(conn))
    assert.is_true(lock:check())
    assert.is_true(lock:check(5))
    assert.not_same(before, activity(conn))
    for _, timeout in ipairs { -1, 0 / 0, math.huge, "5", {} } do
      assert.is_truthy(raised(lock.check, lock, timeout):find("bad argument #1", 1, true))
    end
  end)

  it("is listed by its connection", function()
    local conn = support.connect()
    assert.same({}, conn:locks())
    local lock = conn:lock "invoice 42"
    assert.same({ { key = lock.key, name = "invoice 42", mode = "exclusive", scope = "session", count = 1 } },
      conn:locks())
    local more = { lock, conn:lock("invoice 42"), conn:lock("invoice 42", { shared = true }), conn:lock { 7, 42 } }
    local listed = {}
    for i, row in ipairs(conn:locks()) do
      listed[i] = ("%s %s %s %d"):format(tostring(row.key), tostring(row.name), row.mode, row.count)
    end
    table.sort(listed)
    assert.same({
      "(7, 42) nil exclusive 1",
      "-8336654015406136946 invoice 42 exclusive 2",
      "-8336654015406136946 invoice 42 shared 1",
    }, listed)
    for _, held in ipairs(more) do held:release() end
    assert.same({}, conn:locks())
  end)

  it("is one of many on a connection", function()
    local conn, locks = support.connect(), {}
    for i = 1, 300 do locks[i] = conn:lock { i % 2, i } end
    assert.equal(300, #support.pg_locks(conn.backend_pid))
    assert.equal(300, #conn:locks())
    for i = 1, 300, 2 do assert.is_true(locks[i]:release()) end
    assert.equal(150, #support.pg_locks(conn.backend_pid))
    for i = 2, 300, 2 do assert.is_true(locks[i]:held() and locks[i]:release()) end
    assert.same({}, support.pg_locks(conn.backend_pid))
  end)
end)

describe("re-entrant locks", function()
  after_each(support.finish)

  it("are one row in pg_locks, free after the outermost", function()
    local a, b = support.connect(), support.connect()
    local locks = { a:lock "invoice 42" }
    local before = activity(a)
    for i = 2, 5 do locks[i] = i % 2 == 0 and a:lock "invoice 42" or a:try_lock("invoice 42", { timeout = 1 }) end
    assert.equal("ExclusiveLock", modes(a))
    for _, i in ipairs { 3, 1, 5, 2 } do
      assert.is_true(locks[i]:release())
      assert.is_false(locks[i]:held())
      assert.is_true(locks[4]:held())
      assert.same({ nil, "busy" }, { b:try_lock "invoice 42" })
    end
    assert.same(before, activity(a)) -- the server never counts
    assert.is_true(locks[4]:release())
    assert.is_truthy(b:try_lock "invoice 42")
  end)

  it("are counted for each mode", function()
    local a, b = support.connect(), support.connect()
    local exclusive, shared = { a:lock(42) }, { a:lock(42, { shared = true }) }
    exclusive[2], shared[2] = a:lock(42), a:lock(42, { shared = true })
    assert.equal("ExclusiveLock ShareLock", modes(a))
    exclusive[1]:release()
    shared[1]:release()
    assert.equal("ExclusiveLock ShareLock", modes(a))
    exclusive[2]:release()
    assert.equal("ShareLock", modes(a))
    assert.is_nil(b:try_lock(42))
    assert.is_truthy(b:try_lock(42, { shared = true })):release()
    shared[2]:release()
    assert.equal("", modes(a))
  end)

  it("are released one by one when nobody keeps them", function()
    local conn = support.connect()
    local outermost = conn:lock(42)
    local function nested() conn:lock(42) end
    nested()
    collectgarbage()
    collectgarbage()
    assert.equal(1, conn:locks()[1].count)
    assert.equal("ExclusiveLock", modes(conn))
    outermost:release()
  end)
end)

describe("the timeout of a lock", function()
  after_each(support.finish)

  it("must be a finite number of seconds, not negative", function()
    local conn = support.connect()
    for _, timeout in ipairs { -1, -1e-300, 0 / 0, math.huge, -math.huge, "010", "1", "", true, {}, print } do
      for _, method in ipairs { "lock", "try_lock" } do
        local message = raised(conn[method], conn, 42, { timeout = timeout })
        assert.is_truthy(message:find("bad argument #2", 1, true), message)
        assert.is_truthy(message:find("option 'timeout'", 1, true), message)
      end
    end
    assert.same({}, support.pg_locks(conn.backend_pid))
  end)

  it("is 0 for one try", function()
    local a, b = support.connect(), support.connect()
    local lock = a:lock "invoice 42"
    for _, options in ipairs { { timeout = 0 }, { timeout = -0.0 } } do
      local err = assert_code("timeout", b.lock, b, "invoice 42", options)
      assert.equal(lock.key, err.key)
      assert.equal('no lock on "invoice 42": somebody holds it', err.message)
      assert.same({ nil, "busy" }, { b:try_lock("invoice 42", options) })
    end
    lock:release()
    assert.is_true(b:lock("invoice 42", { timeout = 0 }):release())
  end)

  for _, timeout in ipairs { 1e-9, 0.0004, 0.4, 0.5, 1.5 } do
    it(("of %g s is waited for, and not much longer"):format(timeout), function()
      local a, b = support.connect(), support.connect()
      local lock = a:lock(42)
      local function assert_waited(seconds)
        assert.is_true(seconds >= timeout, seconds .. " s")
        assert.is_true(seconds < timeout + 1 * support.slow, seconds .. " s")
      end
      local seconds, nothing, why = support.timed(b.try_lock, b, 42, { timeout = timeout })
      assert_waited(seconds)
      assert.same({ nil, "timeout" }, { nothing, why })
      local err
      seconds, err = support.timed(assert_code, "timeout", b.lock, b, 42, { timeout = timeout })
      assert_waited(seconds)
      assert.equal("55P03", err.sqlstate)
      assert.equal(lock.key, err.key)
      lock:release()
      assert.is_true(b:lock(42, { timeout = timeout }):release()) -- the connection is as good as before
    end)
  end

  for _, timeout in ipairs { 2147483.647, 2147484, 1e300 } do
    it(("of %.10g s is waited for until it is cancelled"):format(timeout), function()
      local a = support.connect()
      local lock = a:lock(42)
      local b = waiter(42, { timeout = timeout })
      assert.is_true(b:cancel())
      assert_code("interrupted", support.complete, b)
      lock:release()
      assert.is_true(b:lock(42, { timeout = timeout }):release())
    end)
  end

  it("is sent to the server as whole milliseconds, never as 0, which would be for ever", function()
    local conn, logged = support.connect(), support.log()
    if not logged then return pending "the server's log cannot be read" end
    conn:query "SET log_statement = 'all'"
    for _, case in ipairs {
      { 1e-300, "1" }, { 1e-9, "1" }, { 0.0004, "1" }, { 0.001, "1" }, { 0.0011, "2" }, { 0.4, "400" },
      { 0.5, "500" }, { 1.5, "1500" }, { 2147483, "2147483000" }, { 2147483.647, "2147483000" },
      { 2147484, "2147483000" }, { 1e300, "2147483000" },
    } do
      for _, key in ipairs { 42, { 7, 42 } } do
        for _, shared in ipairs { true, false } do
          conn:try_lock(key, { timeout = case[1], shared = shared }):release()
          local text = logged()
          local parameters = text:match "execute pglocks_timed_[^\n]*\n[^\n]*[Pp]arameters: ([^\n]*)"
          assert.equal(case[2], parameters and parameters:match "'([^']*)'$", text)
        end
      end
    end
  end)

  it("leaves no lock_timeout behind", function()
    local conn = support.connect()
    conn:lock(42, { timeout = 5 }):release()
    assert.equal("0", conn:query("SHOW lock_timeout")[1].lock_timeout)
  end)

  it("without a number, lock waits for ever and try_lock not at all", function()
    local a = support.connect()
    local lock = a:lock(42)
    assert.same({ nil, "busy" }, { support.connect():try_lock(42) })
    local b = waiter(42)
    local _, _, left = core.step(b)
    assert.equal(math.huge, left)
    lock:release()
    assert.is_true(support.complete(b):release())
  end)
end)

describe("the options of a lock", function()
  after_each(support.finish)

  it("are refused when they are unknown or of a wrong type, before anything is sent", function()
    local conn = support.connect()
    conn:lock(42):release()
    local before = activity(conn)
    for expected, options in pairs {
      ["unknown option 'timeuot'"] = { timeuot = 1 },
      ["unknown option 'wait'"] = { wait = false },
      ["unknown option 'using'"] = { using = "default" },
      ["unknown option 'Shared'"] = { Shared = true },
      ["unknown option"] = { "shared" },
      ["option 'shared': boolean expected, got number"] = { shared = 1 },
      ["option 'shared': boolean expected, got string"] = { shared = "true" },
      ["option 'comment': string or boolean expected, got number"] = { comment = 1 },
      ["option 'hash': unknown scheme 'md5'"] = { hash = "md5" },
      ["option 'namespace': string, integer or list of strings expected, got table"] = { namespace = {} },
      ["option 'namespace' is for names only"] = { namespace = "app" },
      ["option 'hash' is for names only"] = { hash = "sha256" },
      ["table of options expected, got number"] = 5,
      ["table of options expected, got string"] = "shared",
      ["table of options expected, got boolean"] = true,
    } do
      for _, method in ipairs { "lock", "try_lock" } do
        local message = raised(conn[method], conn, 42, options)
        assert.is_truthy(message:find("bad argument #2", 1, true), message)
        assert.is_truthy(message:find(expected, 1, true), message)
      end
    end
    assert.same(before, activity(conn))
    assert.same({}, conn:locks())
  end)

  it("choose how a name is hashed", function()
    local conn = support.connect()
    for _, options in ipairs { { hash = "django-pglocks" }, { namespace = "app" }, { hash = "sha256" } } do
      local lock = conn:lock("some lock", options)
      assert.equal(pglocks.key("some lock", options), lock.key)
      assert.equal(lock.key.objid, support.pg_locks(conn.backend_pid)[1].objid)
      lock:release()
    end
  end)
end)

describe("a lock that nobody keeps", function()
  after_each(support.finish)

  local function wait_until_free(conn)
    support.wait_until("the locks to be free", function()
      collectgarbage()
      return modes(conn) == ""
    end)
  end

  it("is released when it is collected", function()
    local conn = support.connect()
    local function take()
      for i = 1, 10 do conn:lock { 7, i } end
    end
    take()
    wait_until_free(conn)
    assert.same({}, conn:locks())
    assert.is_true(conn:lock { 7, 1 } :release())
  end)

  it("is released with its connection, in whatever order they are collected", function()
    local pids = {}
    local function take(first, last)
      local conn = pglocks.connect(support.conninfo)
      pids[#pids + 1] = conn.backend_pid
      local ring = { conn }
      for i = first, last, first < last and 1 or -1 do ring[#ring + 1] = conn:lock { 7, i } end
      ring[#ring + 1] = ring
      return ring
    end
    for i = 1, 5 do take(i * 10, i * 10 + 5) end
    for i = 6, 10 do take(i * 10 + 5, i * 10) end
    support.wait_until("the sessions to end", function()
      collectgarbage()
      local left = 0
      for _, pid in ipairs(pids) do
        left = left + #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", pid)
      end
      return left == 0
    end)
  end)

  it("outlives a connection that only it knows", function()
    local function take()
      local conn = pglocks.connect(support.conninfo)
      return conn:lock(42), conn.backend_pid
    end
    local lock, pid = take()
    collectgarbage()
    collectgarbage()
    assert.is_true(lock:held() and lock:check())
    assert.equal(1, #support.pg_locks(pid))
    assert.is_true(lock:release())
  end)

  for _, name in ipairs { "__gc", "__close" } do
    it("is released once by " .. name .. ", however often that is called", function()
      local conn = support.connect()
      local outer, lock = conn:lock(42), conn:lock(42)
      for _ = 1, 3 do assert.equal(0, select("#", getmetatable(lock)[name](lock))) end
      assert.equal(1, conn:locks()[1].count)
      assert.is_true(outer:held())
      for _ = 1, 3 do getmetatable(outer)[name](outer) end
      wait_until_free(conn)
      for _, method in ipairs { "release", "held", "check" } do pcall(outer[method], outer) end
      for _, field in ipairs { "acquired", "shared", "key", "name", "waited" } do
        pcall(function() return outer[field] end)
      end
      pcall(tostring, outer)
      assert.is_true(conn:ping())
    end)

    it("survives " .. name .. " of its connection, however often that is called", function()
      local conn = pglocks.connect(support.conninfo)
      local lock = conn:lock(42)
      for _ = 1, 3 do assert.equal(0, select("#", getmetatable(conn)[name](conn))) end
      assert.is_false(lock:held())
      assert.equal("pglocks lock: 42, exclusive, released", tostring(lock))
      assert.is_not_true((select(2, pcall(lock.release, lock))))
      for method in pairs(core.connection) do pcall(conn[method], conn, 42, print) end
      assert.is_false(pcall(conn.lock, conn, 42))
      support.wait_until("the lock to be free", function() return #support.pg_locks() == 0 end)
    end)
  end

  it("ends what another coroutine waits for when the scope of the connection ends", function()
    local lock = support.connect():lock(42)
    local conn = waiter(42)
    getmetatable(conn).__close(conn)
    assert.same({}, { core.step(conn) }) -- done: nothing more to wait for
    assert_code("closed", core.finish, conn)
    assert_code("closed", conn.lock, conn, 43)
    assert.is_true(lock:held())
  end)
end)

describe("a metatable of ours", function()
  after_each(support.finish)

  --- Everything that can be called with a value of this metatable.
  local function functions_of(metatable, methods)
    local functions = {}
    for name, value in pairs(metatable) do
      if type(value) == "function" then functions[name] = value end
    end
    for name, value in pairs(methods) do functions[name] = value end
    return functions
  end

  it("makes no other userdata one of ours", function()
    local conn = support.connect()
    local lock, key, file = conn:lock(42), pglocks.key(42), io.tmpfile()
    local ours = {
      { conn, functions_of(getmetatable(conn), core.connection) },
      { lock, functions_of(getmetatable(lock), core.lock) },
      { key, functions_of(getmetatable(key), { key = pglocks.key }) },
    }
    local others = { file, conn, lock, key }
    if newproxy then others[#others + 1] = newproxy(true) end
    for _, case in ipairs(ours) do
      local metatable = getmetatable(case[1])
      for _, other in ipairs(others) do
        local before = getmetatable(other)
        if before ~= metatable then
          debug.setmetatable(other, metatable)
          for name, fn in pairs(case[2]) do
            local ok, err = pcall(fn, other, other, print)
            if name ~= "__gc" and name ~= "__close" and name ~= "__eq" and name ~= "nothing" then
              assert.is_false(ok, name)
              assert.is_truthy(err:find "expected, got userdata" or err:find "expected, got light", err)
            end
          end
          debug.setmetatable(other, before)
        end
      end
    end
    assert.is_true(lock:check())
    assert.equal(key, lock.key)
    assert.is_true(file:close())
  end)

  it("in the registry does no harm to other userdata either", function()
    local process = support.spawn [[
      require "pglocks"
      local metatables = {}
      for name, value in pairs(debug.getregistry()) do
        if type(name) == "string" and name:find "^pglocks" and type(value) == "table" then
          metatables[#metatables + 1] = value
        end
      end
      for _, metatable in ipairs(metatables) do
        local file = io.tmpfile()
        file:write "buffered"
        file:flush()
        debug.setmetatable(file, metatable)
        if newproxy then debug.setmetatable(newproxy(true), metatable) end
      end
      collectgarbage()
      collectgarbage()
      print(#metatables > 4 and "unharmed" or #metatables)
    ]]
    assert.equal("unharmed", process.lines())
    assert.is_nil(process.lines())
    process.close()
  end)

  it("gives clear errors for what is no userdata at all", function()
    local conn = support.connect()
    local lock = conn:lock(42)
    for _, value in ipairs { 42, "lock", {}, print, true } do
      local expected = " expected, got " .. type(value)
      assert.is_truthy(raised(lock.release, value):find("pglocks lock" .. expected, 1, true))
      assert.is_truthy(raised(conn.lock, value, 42):find("pglocks connection" .. expected, 1, true))
      assert.is_truthy(raised(conn.query, value, ""):find("pglocks connection" .. expected, 1, true))
    end
    assert.is_truthy(raised(conn.lock, lock, 42):find("pglocks connection expected, got userdata", 1, true))
  end)
end)

describe("a lock that foreign SQL let go", function()
  after_each(support.finish)

  for _, sql in ipairs { "DISCARD ALL", "SELECT pg_advisory_unlock_all()" } do
    -- Where our statements were prepared before, DISCARD ALL drops them too.
    for _, used in ipairs { false, true } do
      local place = (" (%s, on a %s connection)"):format(sql, used and "used" or "fresh")

      local function lose()
        local conn = support.connect()
        if used then
          conn:lock(1, { timeout = 5 }):release()
          conn:lock(1, { shared = true }):release()
          conn:try_lock(1):release()
        end
        local lock = conn:lock(42)
        local nested = conn:lock(42)
        conn:query(sql)
        return conn, lock, nested
      end

      local function assert_usable(conn)
        for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true } } do
          local lock = conn:lock(42, options)
          assert.equal(options.shared and "ShareLock" or "ExclusiveLock", modes(conn))
          assert.is_true(lock:check())
          assert.is_true(lock:release())
          assert.equal("", modes(conn))
        end
        assert.equal(1, conn:query("SELECT 1 AS one")[1].one)
      end

      it("row 24, releasing: is not released: release raises not_held" .. place, function()
        local conn, lock, nested = lose()
        nested:release()
        local err = assert_code("not_held", lock.release, lock)
        assert.equal(pglocks.key(42), err.key)
        assert.is_truthy(err.hint)
        assert.is_false(lock:held())
        assert.same({ nil, "not held" }, { lock:release() })
        assert.is_true(conn:alive())
        assert_usable(conn)
      end)

      it("row 24, holding: is found lost by check" .. place, function()
        local conn, lock, nested = lose()
        local err = assert_code("lost", lock.check, lock)
        assert.equal(pglocks.key(42), err.key)
        assert.is_false(lock:held())
        assert.is_false(nested:held())
        assert.same({}, conn:locks())
        assert.equal("pglocks lock: 42, exclusive, lost", tostring(nested))
        assert_code("lost", nested.check, nested)
        assert_usable(conn)
      end)

      it("is found lost by with_lock" .. place, function()
        local conn, lock, nested = lose()
        pcall(lock.check, lock)
        assert.is_false(nested:held())
        assert_code("not_held", conn.with_lock, conn, 42, function() conn:query(sql) end)
        assert_usable(conn)
      end)

      it("ends with its scope in silence" .. place, function()
        local conn, lock, nested = lose()
        for _, one in ipairs { nested, lock } do getmetatable(one).__close(one) end
        assert.is_false(lock:held())
        assert_usable(conn)
      end)
    end
  end

  it("raises lost when it is released after check has found that out", function()
    local conn = support.connect()
    local lock, nested = conn:lock(42), conn:lock(42)
    conn:query "SELECT pg_advisory_unlock_all()"
    assert_code("lost", nested.check, nested)
    for _, one in ipairs { lock, nested } do
      assert.equal(pglocks.key(42), assert_code("lost", one.release, one).key)
      assert.same({ nil, "not held" }, { one:release() })
    end
  end)

  it("is told from one whose prepared statement alone was dropped", function()
    local conn = support.connect()
    local lock = conn:lock(42)
    conn:lock(43):release()
    conn:query "DEALLOCATE ALL"
    assert.is_true(lock:check())
    assert.is_true(lock:release())
    assert.equal("", modes(conn))
  end)
end)

describe("a connection in use by one coroutine", function()
  after_each(support.finish)

  it("answers another one with busy_connection, and goes on", function()
    local a = support.connect()
    local lock = a:lock "invoice 42"
    local b = support.connect()
    local own = b:lock "own"
    support.begin(b, "lock", "invoice 42")
    support.wait_until_waiting(b.backend_pid)
    for method, arguments in pairs {
      lock = { 1 }, try_lock = { 1 }, with_lock = { 1, print }, try_with_lock = { 1, print },
      query = { "SELECT 1" }, ping = {}, close = {}, transaction = { print },
    } do
      local err = assert_code("busy_connection", b[method], b, unpack(arguments))
      assert.is_truthy(err.hint, method)
    end
    assert_code("busy_connection", own.release, own)
    assert_code("busy_connection", own.check, own)
    assert.is_true(own:held() and b:alive())
    assert.equal(1, #b:locks())
    lock:release()
    assert.is_true(support.complete(b):held())
    assert.is_true(own:release())
  end)

  it("lets the end of a scope through", function()
    local a = support.connect()
    local lock = a:lock "invoice 42"
    local b = support.connect()
    local own = b:lock "own"
    support.begin(b, "lock", "invoice 42")
    support.wait_until_waiting(b.backend_pid)
    getmetatable(own).__close(own)
    assert.is_false(own:held())
    lock:release()
    local granted = support.complete(b)
    assert.is_true(b:ping())
    assert.equal(1, #support.pg_locks(b.backend_pid))
    assert.is_true(granted:check())
  end)

  it("ends its wait when it is told to cancel", function()
    local lock = support.connect():lock "invoice 42"
    local b = waiter "invoice 42"
    assert.is_true(b:cancel())
    local err = assert_code("interrupted", support.complete, b)
    assert.equal(lock.key, err.key)
    assert.is_false(b:cancel())
    assert.same({}, support.pg_locks(b.backend_pid))
    lock:release()
    assert.is_true(b:lock("invoice 42"):release())
  end)
end)

describe("the comment of a lock", function()
  after_each(support.finish)

  --- What an administrator sees of a call, and what follows the comment.
  local function split(query)
    local comment, rest = query:match "^(/%*.-%*/) (SELECT .*)$"
    assert.is_truthy(comment, query)
    assert.is_nil(rest:find("[/;]"))
    assert.is_nil(comment:sub(3, -3):find("*", 1, true))
    assert.is_nil(comment:find("[^ -~]"))
    return comment, rest
  end

  it("shows who holds which lock, and where in the program", function()
    local conn = support.connect()
    local here = debug.getinfo(1, "l").currentline + 1
    local lock = conn:lock("invoice 42", { comment = true })
    local comment, rest = split(activity(conn).query)
    assert.equal(('/* pglocks "invoice 42" at spec/lock_spec.lua:%d */'):format(here), comment)
    assert.equal("SELECT pg_catalog.pg_advisory_lock($1)", rest)
    lock:release()
    conn:with_lock({ 7, 42 }, { comment = "nightly" }, function()
      assert.equal(("/* pglocks (7, 42) at spec/lock_spec.lua:%d: nightly */"):format(here + 5),
        (split(activity(conn).query)))
    end)
    for _, none in ipairs { false, "absent" } do
      conn:lock("invoice 42", { comment = none or nil }):release()
    end
  end)

  it("is none unless asked for", function()
    local conn = support.connect()
    for _, options in ipairs { {}, { comment = false } } do
      local lock = conn:lock("invoice 42", options)
      assert.equal("SELECT pg_catalog.pg_advisory_lock($1)", activity(conn).query)
      lock:release()
    end
  end)

  it("shows who waits for which lock", function()
    local lock = support.connect():lock "invoice 42"
    for _, options in ipairs { { comment = "nightly" }, { comment = "nightly", timeout = 60 } } do
      local b = waiter("invoice 42", options)
      local comment = split(activity(b).query)
      assert.is_truthy(comment:find('pglocks "invoice 42" at ', 1, true))
      assert.is_truthy(comment:find(": nightly */", 1, true))
      b:cancel()
      assert_code("interrupted", support.complete, b)
    end
    assert.is_true(lock:held())
  end)

  it("cannot be broken out of", function()
    local conn = support.connect()
    for _, text in ipairs {
      "*/ select 1; /*", "/* /* */", "a\0b", "'", '"', "\\", "\n-- ", "$1", "%s%n%d", "naïve-日本", "\255\254",
      ("*"):rep(1000), ("日"):rep(1000),
    } do
      for _, arguments in ipairs {
        { text, { comment = true } }, { "plain", { comment = text } }, { text, { comment = text, timeout = 5 } },
        { text, { comment = text, shared = true } },
      } do
        local lock = conn:lock(arguments[1], arguments[2])
        split(activity(conn).query)
        assert.is_true(lock:check())
        assert.is_true(lock:release())
      end
    end
    local elsewhere = load("local lock = (...):lock(42, { comment = true }) return lock", "@*/ select 1; /*")
    local lock = elsewhere(conn)
    assert.is_truthy(split(activity(conn).query):find("at \\x2A/ select 1; /\\x2A:1", 1, true))
    lock:release()
  end)
end)

describe("a connection with deferred releases", function()
  after_each(support.finish)

  it("takes and releases in the order it was told", function()
    local a, b = support.connect { release = "deferred" }, support.connect()
    for i = 1, 100 do
      local lock = a:lock { 7, i % 3 }
      assert.is_true(lock:held())
      assert.same({ true }, { lock:release() })
      assert.is_false(lock:held())
      assert.same({ nil, "not held" }, { lock:release() })
    end
    assert.is_true(a:ping())
    assert.equal("", modes(a))
    for i = 0, 2 do assert.is_truthy(b:try_lock { 7, i }) end
  end)

  it("releases before its next call, and without one", function()
    local a, b = support.connect { release = "deferred" }, support.connect()
    a:lock(42):release()
    assert.is_true(b:lock(42, { timeout = 10 }):release())
    local lock = a:lock(42)
    lock:release()
    lock = a:lock(42)
    assert.is_true(lock:check())
    assert.equal("ExclusiveLock", modes(a))
    assert.is_true(lock:release())
  end)

  it("leaves nothing when it is closed", function()
    for _ = 1, 20 do
      local conn = support.connect { release = "deferred" }
      local kept = conn:lock(43)
      conn:lock(42):release()
      conn:close()
      assert.is_false(kept:held())
      assert.same({}, support.pg_locks())
    end
  end)

  for _, sql in ipairs { "DISCARD ALL", "SELECT pg_advisory_unlock_all()" } do
    it("tells on_lost of a release that the server denies, after " .. sql, function()
      local told = {}
      local conn = support.connect { release = "deferred", on_lost = function(...) told[#told + 1] = { ... } end }
      conn:lock(1):release()
      local lock = conn:lock "invoice 42"
      conn:query(sql)
      assert.is_true(lock:release())
      for _ = 1, 3 do conn:ping() end
      conn:alive()
      assert.equal(1, #told)
      assert.equal(conn, told[1][1])
      assert.equal("not_held", told[1][2].code)
      assert.equal(lock.key, told[1][2].key)
      assert.same({}, told[1][3])
      assert.is_true(conn:lock("invoice 42"):release())
      conn:ping()
      assert.equal(1, #told)
    end)
  end

  it("tells on_lost of such a release when it is closed, too", function()
    local told = {}
    local conn = support.connect { release = "deferred", on_lost = function(_, err) told[#told + 1] = err.code end }
    local lock = conn:lock "invoice 42"
    conn:query "SELECT pg_advisory_unlock_all()"
    lock:release()
    conn:close()
    conn:close()
    assert.same({ "not_held" }, told)
  end)
end)

describe("a lost connection", function()
  after_each(support.finish)

  local function lose(on_lost)
    local conn = support.connect { on_lost = on_lost }
    local locks = { conn:lock "invoice 42", conn:lock "invoice 42", conn:lock({ 7, 42 }, { shared = true }) }
    terminate(conn)
    support.wait_until("the loss to be known", function() return not locks[1]:held() end)
    return conn, locks
  end

  it("calls on_lost once, with the error and the locks", function()
    local told = {}
    local conn, locks = lose(function(...) told[#told + 1] = { ... } end)
    for _ = 1, 3 do
      assert.is_false(conn:alive())
      for _, lock in ipairs(locks) do
        assert.is_false(lock:held())
        pcall(lock.check, lock)
        pcall(lock.release, lock)
      end
      pcall(conn.ping, conn)
    end
    conn:close()
    assert.equal(1, #told)
    local told_conn, err, lost = unpack(told[1])
    assert.equal(conn, told_conn)
    assert.equal("lost", err.code)
    assert.equal("57P01", err.sqlstate)
    assert.equal("string", type(err.message))
    table.sort(lost, function(a, b) return a.key < b.key end)
    assert.same({
      { key = pglocks.key "invoice 42", name = "invoice 42", mode = "exclusive", scope = "session", count = 2 },
      { key = pglocks.key { 7, 42 }, mode = "shared", scope = "session", count = 1 },
    }, lost)
  end)

  it("raises lost in everything, with what the server said", function()
    local conn, locks = lose()
    for method, arguments in pairs {
      lock = { 1 }, try_lock = { 1 }, with_lock = { 1, print }, try_with_lock = { 1, print },
      query = { "SELECT 1" }, ping = {}, transaction = { print },
    } do
      local err = assert_code("lost", conn[method], conn, unpack(arguments))
      assert.equal("57P01", err.sqlstate)
      assert.is_truthy(err.hint)
    end
    assert.equal("57P01", assert_code("lost", locks[1].check, locks[1]).sqlstate)
    for _, lock in ipairs(locks) do
      assert.equal("57P01", assert_code("lost", lock.release, lock).sqlstate)
      assert.same({ nil, "not held" }, { lock:release() })
    end
    assert.same({}, conn:locks())
    assert.equal('pglocks connection: lost, backend_pid ' .. conn.backend_pid, tostring(conn))
    conn:close()
    assert_code("closed", conn.ping, conn)
  end)

  it("does not take a nested lock for held, without asking anybody", function()
    local conn = support.connect()
    local lock = conn:lock(42)
    terminate(conn)
    support.wait_until("the session to end", function()
      return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", conn.backend_pid) == 0
    end)
    assert_code("lost", conn.lock, conn, 42)
    assert.is_false(lock:held())
  end)

  it("is not hidden by an error in on_lost", function()
    local conn, locks = lose(function() error "on_lost itself" end)
    assert.is_false(conn:alive())
    assert_code("lost", locks[1].release, locks[1])
    conn:close()
  end)

  it("ends a wait with the server's reason", function()
    local lock = support.connect():lock(42)
    local told = 0
    local b = waiter(42, nil, { on_lost = function() told = told + 1 end })
    terminate(b)
    assert.equal("57P01", assert_code("lost", support.complete, b).sqlstate)
    assert.is_false(b:alive())
    assert.equal(1, told)
    assert.is_true(lock:held())
  end)

  it("ends scopes in silence", function()
    local conn, locks = lose()
    for _, lock in ipairs(locks) do getmetatable(lock).__close(lock) end
    getmetatable(conn).__close(conn)
    assert.is_false(locks[1]:held())
  end)
end)
