local support = require "spec.support"
local pglocks = require "pglocks"

local keywords = support.core.conninfo(support.conninfo)

local function setting(conn, name)
  return conn:query("SELECT current_setting($1, true) AS value", name)[1].value
end

describe("connect", function()
  after_each(support.finish)

  local function works(described)
    local conn = pglocks.connect(described)
    assert.is_true(conn:ping())
    conn:close()
  end

  it("takes a conninfo string", function() works(support.conninfo) end)

  it("takes a URI", function()
    works(("postgresql://%s@/%s?host=%s&port=%s"):format(
      keywords.user, keywords.dbname, keywords.host:gsub("/", "%%2F"), keywords.port))
  end)

  it("takes a table of libpq's keywords, and numbers for their values", function()
    local described = { port = tonumber(keywords.port) }
    for _, name in ipairs { "host", "dbname", "user" } do described[name] = keywords[name] end
    works(described)
  end)

  it("takes a table with conninfo, keywords that override it, and options", function()
    local conn = pglocks.connect {
      conninfo = support.conninfo, application_name = "nightly", timeout = 5, reply_timeout = 2,
    }
    assert.equal("nightly", setting(conn, "application_name"))
    conn:close()
  end)

  it("takes nothing: the environment of libpq", function()
    local env = ("PGHOST=%s PGPORT=%s PGUSER=%s PGDATABASE=%s"):format(
      keywords.host, keywords.port, keywords.user, keywords.dbname)
    local pipe = io.popen(env .. " " .. (os.getenv "PGLOCKS_TEST_LUA" or "lua")
      .. [[ -e 'print(require "pglocks".connect():ping())' 2>&1]])
    assert.equal("true", pipe:read "*l")
    pipe:close()
  end)

  it("tells the backend's pid and the server's version", function()
    local conn = support.connect()
    assert.equal(conn:query("SELECT pg_backend_pid() AS pid")[1].pid, conn.backend_pid)
    assert.equal(conn:query("SELECT current_setting('server_version_num')::int AS v")[1].v,
      conn.server_version)
    assert.is_false(conn.is_pooled)
  end)

  it("makes the settings of a connection that holds locks, whatever the role says", function()
    local version = support.connect().server_version
    local timeouts = { "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout" }
    if version >= 140000 then timeouts[#timeouts + 1] = "idle_session_timeout" end
    if version >= 170000 then timeouts[#timeouts + 1] = "transaction_timeout" end
    support.observe "CREATE ROLE hasty LOGIN SUPERUSER"
    finally(function() support.observe "DROP ROLE hasty" end)
    for _, name in ipairs(timeouts) do
      support.observe(("ALTER ROLE hasty SET %s = '100ms'"):format(name))
    end
    local conn = support.connect { user = "hasty" }
    for _, name in ipairs(timeouts) do assert.equal("0", setting(conn, name)) end
    assert.equal(version >= 140000 and "5s" or nil, setting(conn, "client_connection_check_interval"))
    local holder = support.connect()
    local lock = holder:lock "x"
    support.begin(conn, "lock", "x")
    support.wait_until_waiting(conn.backend_pid)
    support.sleep(0.2)
    lock:release()
    local got = support.complete(conn)
    support.sleep(0.2)
    assert.is_true(got:check())
    conn:close()
  end)

  it("makes those for a vanished client where there is a network", function()
    local conn = support.connect { host = "127.0.0.1" }
    assert.equal("15", setting(conn, "tcp_keepalives_idle"))
    assert.equal("5", setting(conn, "tcp_keepalives_interval"))
    assert.equal("3", setting(conn, "tcp_keepalives_count"))
    assert.equal("30000", (setting(conn, "tcp_user_timeout"):gsub("30s", "30000")))
  end)
end)

describe("connecting to several hosts", function()
  after_each(support.finish)

  local socket = require "cqueues.socket"

  -- Accepts in the kernel, and never says a word.
  local function silent_server()
    local listener = assert(socket.listen("127.0.0.1", 0))
    local _, _, port = listener:localname()
    finally(function() listener:close() end)
    return tostring(port)
  end

  it("goes on to the next when one refuses", function()
    local conn = support.connect { host = "/nowhere," .. keywords.host }
    assert.is_true(conn:ping())
  end)

  it("row 2, connecting: goes on to the next when one says nothing for connect_timeout", function()
    local conn
    local port = silent_server()
    local seconds = support.timed(function()
      conn = support.connect {
        host = "127.0.0.1," .. keywords.host, port = port .. "," .. keywords.port,
        connect_timeout = 1,
      }
    end)
    assert.is_true(conn:ping())
    assert.is_true(seconds >= 1 and seconds < 2 * support.slow, seconds)
  end)

  it("row 3, connecting: gives up at the deadline over all of them", function()
    local port = silent_server()
    local seconds, ok, err = support.timed(pcall, pglocks.connect, {
      host = "127.0.0.1,127.0.0.1,127.0.0.1", port = port, timeout = 0.3,
    })
    assert.is_false(ok)
    assert.equal("connect", err.code)
    assert.is_true(seconds >= 0.3 and seconds < 0.8 * support.slow, seconds)
  end)

  it("does not try another one when the first knows the role, and refuses it", function()
    local ok, err = pcall(pglocks.connect, {
      host = keywords.host .. ",/nowhere", port = keywords.port, dbname = keywords.dbname,
      user = "nobody of that name",
    })
    assert.is_false(ok)
    assert.equal("28000", err.sqlstate)
    assert.is_nil(err.message:find("nowhere", 1, true))
  end)
end)

describe("a connection", function()
  after_each(support.finish)

  it("frees its locks before close() returns", function()
    local other = support.connect()
    for i = 1, 50 do
      local conn = support.connect()
      conn:lock(i)
      conn:lock({ i, i }, { shared = true })
      conn:close()
      assert(other:lock(i, { timeout = 0 })):release()
      assert(other:lock({ i, i }, { timeout = 0 })):release()
    end
  end)

  it("frees them too when it closes inside a transaction, also an aborted one", function()
    for _, sql in ipairs { "SELECT 1", "SELECT 1/0" } do
      local conn = support.connect()
      conn:lock "x"
      conn:query "BEGIN"
      pcall(conn.query, conn, sql)
      conn:close()
      assert.same({}, support.pg_locks())
    end
  end)

  it("closes once, and says so to whoever uses it afterwards", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    conn:close()
    conn:close()
    assert.is_false(conn:alive())
    assert.is_false(lock:held())
    assert.same({ nil, "not held" }, { lock:release() })
    assert.same({}, conn:locks())
    for _, method in ipairs { "lock", "try_lock", "query" } do
      local ok, err = pcall(conn[method], conn, "SELECT 1")
      assert.is_false(ok)
      assert.equal("closed", err.code)
    end
    assert.is_truthy(tostring(conn):find("closed", 1, true))
  end)

  it("closes when it is collected, with its locks", function()
    local pid
    do
      local conn = pglocks.connect(support.conninfo)
      pid = conn.backend_pid
      conn:lock "x"
    end
    collectgarbage()
    collectgarbage()
    support.wait_until("its session to end", function()
      return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", pid) == 0
    end)
  end)

  it("is kept alive by its locks", function()
    local lock = pglocks.connect(support.conninfo):lock "x"
    collectgarbage()
    collectgarbage()
    assert.is_true(lock:check())
    assert.is_true(lock:release())
  end)

  it("has a slow session when a thousand locks are held, and still releases them all", function()
    local conn = support.connect()
    local locks = {}
    for i = 1, 1000 do locks[i] = conn:lock(i) end
    assert.equal(1000, #conn:locks())
    assert.equal(1000, #support.pg_locks(conn.backend_pid))
    for i = 1, 1000 do assert.is_true(locks[i]:release()) end
    assert.same({}, support.pg_locks(conn.backend_pid))
  end)
end)

describe("a lost session", function()
  after_each(support.finish)

  local function wait_for_loss(conn)
    support.wait_until("the loss", function() return not conn:alive() end)
  end

  it("is noticed without a round trip, once, and with the reason", function()
    local told = {}
    local conn = support.connect {
      on_lost = function(lost, err, locks) told[#told + 1] = { lost, err, locks } end,
    }
    local lock, nested = conn:lock "invoice 42", conn:lock "invoice 42"
    local shared = conn:lock({ 7, 42 }, { shared = true })
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the loss", function() return not lock:held() end)
    assert.is_false(nested:held())
    assert.is_false(shared:held())
    assert.is_false(conn:alive())
    assert.equal(1, #told)
    assert.equal(conn, told[1][1])
    assert.equal("lost", told[1][2].code)
    assert.equal("57P01", told[1][2].sqlstate)
    local held = {}
    for _, one in ipairs(told[1][3]) do
      held[tostring(one.key)] = ("%s %s %s %d"):format(one.name, one.mode, one.scope, one.count)
    end
    assert.same({
      [tostring(pglocks.key "invoice 42")] = "invoice 42 exclusive session 2",
      ["(7, 42)"] = "nil shared session 1",
    }, held)

    for _, attempt in ipairs {
      function() lock:release() end, function() conn:lock "x" end, function() shared:check() end,
      function() conn:query "SELECT 1" end, function() conn:ping() end,
    } do
      local ok, err = pcall(attempt)
      assert.is_false(ok)
      assert.equal("lost", err.code)
      assert.equal("57P01", err.sqlstate)
    end
    assert.same({ nil, "not held" }, { lock:release() })
    assert.equal(1, #told)
    conn:close()
    assert.equal(1, #told)
  end)

  it("is noticed in the next call, if that is a release, a check or a lock", function()
    for _, call in ipairs {
      function(_, lock) lock:release() end,
      function(_, lock) lock:check() end,
      function(conn) conn:lock "another" end,
      function(conn) conn:lock "x" end, -- held already: no round trip
      function(conn) conn:ping() end,
    } do
      local told = 0
      local conn = support.connect { on_lost = function() told = told + 1 end }
      local lock = conn:lock "x"
      support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
      support.wait_until("the backend's end", function()
        return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1",
          conn.backend_pid) == 0
      end)
      local ok, err = pcall(call, conn, lock)
      assert.is_false(ok)
      assert.equal("lost", err.code)
      assert.equal(1, told)
    end
  end)

  it("is noticed in a release that asks nobody", function()
    for _, options in ipairs { {}, { release = "deferred" } } do
      local told = 0
      function options.on_lost() told = told + 1 end
      local conn = support.connect(options)
      local lock = conn:lock "x"
      if not options.release then lock = conn:lock "x" end -- which is only counted
      support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
      support.wait_until("the backend's end", function()
        return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", conn.backend_pid) == 0
      end)
      assert.equal("57P01", support.assert_code("lost", lock.release, lock).sqlstate)
      assert.equal(1, told)
    end
  end)

  it("is noticed when idle_session_timeout ends it", function()
    local conn = support.connect()
    if conn.server_version < 140000 then -- has none
      assert.equal("42704", support.assert_code("server", conn.query, conn, "SHOW idle_session_timeout").sqlstate)
      return
    end
    conn:lock "x"
    conn:query "SET idle_session_timeout = '50ms'"
    wait_for_loss(conn)
    local ok, err = pcall(conn.lock, conn, "y")
    assert.is_false(ok)
    assert.equal("57P05", err.sqlstate)
  end)

  it("does not let what on_lost raises hide anything", function()
    local conn = support.connect { on_lost = function() error "from on_lost" end }
    local lock = conn:lock "x"
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the loss", function() return not lock:held() end)
    local ok, err = pcall(lock.release, lock)
    assert.is_false(ok)
    assert.equal("lost", err.code)
  end)

  it("never takes a lock anew by itself", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    wait_for_loss(conn)
    local other = support.connect()
    assert.is_true(other:lock("x", { timeout = 5 }):held())
    assert.is_false(lock:held())
    assert.is_false(conn:alive())
  end)
end)
