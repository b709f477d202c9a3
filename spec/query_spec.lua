local pglocks = require "pglocks"
local support = require "spec.support"

local core = support.core

local raised = support.raised

--- Of a query or another method of the connection.
local function assert_error(code, sqlstate, conn, method, ...)
  local err = raised(conn[method], conn, ...)
  assert.same({ code, sqlstate }, type(err) == "table" and { err.code, err.sqlstate } or err)
  return err
end

local function value(conn, sql, ...) return conn:query("SELECT " .. sql .. " AS value", ...)[1].value end

--- An integer past what LuaJIT's numbers can tell apart comes as its digits there.
local function big(digits) return support.is_jit and digits or math.tointeger(digits) end

describe("a query", function()
  after_each(support.finish)

  it("returns values of Lua's types where there are such, and text otherwise", function()
    local conn = support.connect()
    for _, case in ipairs {
      { "1::int2", 1 }, { "(-32768)::int2", -32768 }, { "2147483647::int4", 2147483647 },
      { "(-2147483648)::int4", -2147483648 }, { "42::int8", 42 }, { "4294967295::oid", 4294967295 },
      { "9007199254740992::int8", support.is_jit and 2 ^ 53 or math.tointeger(2 ^ 53) },
      { "9007199254740993::int8", big "9007199254740993" },
      { "-9007199254740993::int8", big "-9007199254740993" },
      { "9223372036854775807::int8", big "9223372036854775807" },
      { "(-9223372036854775808)::int8", big "-9223372036854775808" },
      { "true", true }, { "false", false }, { "NULL", nil }, { "NULL::int8", nil }, { "NULL::bool", nil },
      { "''", "" }, { "'naïve-日本'", "naïve-日本" }, { "'42'", "42" }, { "'t'::\"char\"", "t" },
      { "'a'::name", "a" }, { "1.5::float8", "1.5" }, { "'NaN'::float4", "NaN" }, { "1.10::numeric", "1.10" },
      { "'\\x00ff'::bytea", "\\x00ff" }, { "DATE '2024-02-29'", "2024-02-29" }, { "ARRAY[1,NULL]", "{1,NULL}" },
      { "'{\"a\": 1}'::jsonb", '{"a": 1}' }, { "ROW(1,'b')", "(1,b)" }, { "INTERVAL '90 min'", "01:30:00" },
    } do
      local result = value(conn, "(" .. case[1] .. ")")
      assert.same({ type(case[2]), case[2] }, { type(result), result }, case[1])
      if math.type then assert.equal(math.type(case[2]), math.type(result)) end
    end
  end)

  it("returns rows in order, as tables by the name of the column", function()
    local conn = support.connect()
    assert.same({ { i = 1, odd = true }, { i = 2, odd = false }, { i = 3, odd = true } },
      conn:query "SELECT i, i % 2 = 1 AS odd FROM generate_series(1, 3) i")
    assert.same({ { ["?column?"] = 1, ["two words"] = "b" } }, conn:query [[SELECT 1, 'b' AS "two words"]])
    assert.same({}, conn:query "SELECT 1 WHERE false")
    assert.same({ {} }, conn:query "SELECT")
    for _, sql in ipairs {
      "", "-- nothing", "CREATE TEMP TABLE t (n int)", "INSERT INTO t VALUES (1)", "SET TIME ZONE 0",
    } do
      assert.same({}, conn:query(sql))
    end
    assert.same({ { n = 1 } }, conn:query "UPDATE t SET n = n RETURNING n")
    assert.equal(1, select("#", conn:query "SELECT 1"))
  end)

  it("takes nil, booleans, numbers and strings as parameters", function()
    local conn = support.connect()
    for _, case in ipairs {
      { "int8", 42, "42" }, { "int8", -42.0, "-42" }, { "int4", -0.0, "0" },
      { "int8", 2 ^ 53, "9007199254740992" }, { "int8", -2 ^ 53, "-9007199254740992" },
      { "int8", big "9223372036854775807", "9223372036854775807" },
      { "int8", big "-9223372036854775808", "-9223372036854775808" },
      { "numeric", 2 ^ 31, "2147483648" }, { "float8", 1.5, "1.5" }, { "float8", 0.1, "0.1" },
      { "float8", 1 / 3, "0.3333333333333333" }, { "float8", 1e300, "1e+300" }, { "float8", 5e-324, "5e-324" },
      { "float8", 0 / 0, "NaN" }, { "float8", math.huge, "Infinity" }, { "float8", -math.huge, "-Infinity" },
      { "bool", true, "true" }, { "bool", false, "false" }, { "text", true, "t" }, { "text", 42, "42" },
      { "text", "", "" }, { "text", "NULL", "NULL" }, { "text", "'; DROP TABLE t; --", "'; DROP TABLE t; --" },
      { "text", "naïve-日本", "naïve-日本" }, { "int8", "42", "42" }, { "text", nil, nil }, { "bool", nil, nil },
    } do
      local result = value(conn, ("$1::%s::text"):format(case[1]), case[2])
      assert.same({ case[3] }, { result }, case[1] .. " " .. tostring(case[2]))
    end
  end)

  it("takes nil among the parameters, and at their end", function()
    local conn = support.connect()
    local sql = "concat_ws(',', coalesce($1::text, 'nil'), coalesce($2::text, 'nil'), coalesce($3::text, 'nil'))"
    assert.equal("nil,b,nil", value(conn, sql, nil, "b", nil))
    assert.equal("nil,nil,nil", value(conn, sql, nil, nil, nil))
    assert_error("server", "08P01", conn, "query", "SELECT $1::int, $2::int", 1)
  end)

  it("takes up to 64 parameters", function()
    local conn, sum, parameters = support.connect(), {}, {}
    for i = 1, 64 do sum[i], parameters[i] = ("$%d::int"):format(i), i end
    local unpack = table.unpack or unpack
    assert.equal(64 * 65 / 2, value(conn, table.concat(sum, "+"), unpack(parameters)))
    parameters[65] = 65
    assert.is_truthy(raised(conn.query, conn, "SELECT 1", unpack(parameters)):find "at most 64 parameters")
    assert.is_true(conn:ping())
  end)

  it("moves large values both ways", function()
    local conn = support.connect()
    local large = ("naïve-日本 "):rep(2 ^ 18)
    assert.is_true(large == value(conn, "$1::text", large))
    assert.equal(50000, #conn:query "SELECT i, repeat('x', 100) AS x FROM generate_series(1, 50000) i")
  end)

  it("that fails says why, and leaves the connection as it was", function()
    local conn = support.connect()
    local lock = conn:lock(42)
    conn:query "CREATE TEMP TABLE t (n int PRIMARY KEY)"
    conn:query "INSERT INTO t VALUES (1)"
    for sql, sqlstate in pairs {
      ["nonsense"] = "42601", ["SELECT 1/0"] = "22012", ["SELECT * FROM nowhere"] = "42P01",
      ["INSERT INTO t VALUES (1)"] = "23505", ["SELECT $1::int"] = "08P01", ["SELECT 'a'::int"] = "22P02",
      ["DO $$ BEGIN RAISE 'mine' USING ERRCODE = 'ZZ001'; END $$"] = "ZZ001",
      ["SELECT 1; SELECT 2"] = "42601", ["DELETE FROM t; DELETE FROM t"] = "42601",
    } do
      local err = assert_error("server", sqlstate, conn, "query", sql)
      assert.is_true(#err.message > 0)
      assert.equal(1, value(conn, "(SELECT count(*) FROM t)"))
    end
    assert.is_true(lock:check())
  end)

  for _, sql in ipairs { "COPY (SELECT 1) TO STDOUT", "COPY t FROM STDIN", "COPY t (n) FROM STDIN BINARY" } do
    it("that starts COPY raises, and closes the connection: " .. sql, function()
      local told = {}
      local conn = support.connect { on_lost = function(...) told[#told + 1] = { ... } end }
      local lock = conn:lock(42)
      conn:query "CREATE TEMP TABLE t (n int)"
      local err = assert_error("server", "0A000", conn, "query", sql)
      assert.is_truthy(err.message:find "COPY")
      assert.is_false(conn:alive())
      assert.is_false(lock:held())
      assert.equal("lost", raised(conn.query, conn, "SELECT 1").code)
      assert.equal("lost", raised(lock.release, lock).code)
      assert.equal(1, #told)
      assert.equal(lock.key, told[1][3][1].key)
    end)
  end

  it("is not disturbed by notices and notifications", function()
    local conn = support.connect()
    conn:query "LISTEN news"
    support.observe "SELECT pg_notify('news', 'hello')"
    conn:query "DO $$ BEGIN FOR i IN 1..1000 LOOP RAISE WARNING 'a warning'; END LOOP; END $$"
    assert.is_true(conn:alive())
    assert.equal(1, value(conn, "1"))
  end)
end)

describe("ping", function()
  after_each(support.finish)

  it("is a round trip in every state of a transaction", function()
    local conn = support.connect()
    assert.is_true(conn:ping())
    conn:query "BEGIN"
    assert.is_true(conn:ping(5))
    pcall(conn.query, conn, "SELECT 1/0")
    assert.is_true(conn:ping())
    conn:query "ROLLBACK"
    assert.is_true(conn:ping())
  end)
end)

describe("a transaction", function()
  before_each(function() support.observe "CREATE UNLOGGED TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)" end)
  after_each(function()
    support.finish()
    support.observe "DROP TABLE t"
  end)

  local function insert(conn, n) conn:query("INSERT INTO t VALUES ($1)", n) end

  --- What is committed.
  local function committed()
    return support.observe("SELECT coalesce(string_agg(n::text, ' ' ORDER BY n), '') AS all FROM t")[1].all
  end

  local function is_open(conn) return core.in_transaction(conn) end

  it("is committed when its function returns, and returns what that returned", function()
    local conn = support.connect()
    local function pack(...) return { n = select("#", ...), ... } end
    assert.same({ n = 4, nil, "b", nil, nil }, pack(conn:transaction(function(passed, a, b, c)
      assert.equal(conn, passed)
      assert.same({ nil, 2, nil }, { a, b, c })
      assert.is_true(is_open(conn))
      insert(conn, 1)
      assert.equal("", committed())
      return nil, "b", nil, nil
    end, nil, 2, nil)))
    assert.is_false(is_open(conn))
    assert.equal("1", committed())
    assert.same({ n = 0 }, pack(conn:transaction(function() end)))
  end)

  it("is rolled back when its function raises, which goes on as it was", function()
    local conn = support.connect()
    local object = setmetatable({}, { __tostring = function() return "an object" end })
    for _, thrown in ipairs { object, "a string", 42, true } do
      assert.equal(thrown, raised(conn.transaction, conn, function()
        insert(conn, 1)
        error(thrown, 0)
      end))
      assert.is_false(is_open(conn))
    end
    assert.same({ false }, { pcall(conn.transaction, conn, function()
      insert(conn, 1)
      error()
    end) })
    local failed
    assert.equal(raised(conn.transaction, conn, function()
      insert(conn, 1)
      failed = raised(conn.query, conn, "SELECT 1/0")
      error(failed, 0)
    end), failed)
    assert.equal("22012", failed.sqlstate)
    assert.equal("", committed())
    assert.equal(1, value(conn, "1"))
  end)

  it("is not begun inside another, which goes on", function()
    local conn = support.connect()
    conn:transaction(function()
      insert(conn, 1)
      assert.is_truthy(assert_error("server", nil, conn, "transaction", print).message:find "open")
      insert(conn, 2)
    end)
    assert.equal("1 2", committed())
    conn:query "BEGIN"
    assert_error("server", nil, conn, "transaction", print)
    conn:query "COMMIT"
  end)

  it("raises aborted_transaction where it would commit what had failed", function()
    local conn = support.connect()
    assert_error("aborted_transaction", nil, conn, "transaction", function()
      insert(conn, 1)
      pcall(conn.query, conn, "SELECT 1/0")
    end)
    assert.is_false(is_open(conn))
    assert.equal("", committed())
    assert.is_true(conn:lock(42):release())
  end)

  it("raises what the server finds at the commit", function()
    local conn = support.connect()
    assert_error("server", "23505", conn, "transaction", function()
      insert(conn, 1)
      insert(conn, 1)
    end)
    assert.is_false(is_open(conn))
    assert.equal("", committed())
  end)

  it("keeps the first error when the session ends inside it", function()
    local conn = support.connect()
    local thrown = {}
    assert.equal(thrown, raised(conn.transaction, conn, function()
      support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
      support.wait_until("the loss", function() return not conn:alive() end)
      error(thrown)
    end))
    assert_error("lost", "57P01", conn, "query", "COMMIT")
  end)

  it("is rolled back by close, which frees the locks", function()
    local conn = support.connect()
    conn:query "BEGIN"
    insert(conn, 1)
    conn:lock(42)
    pcall(conn.query, conn, "SELECT 1/0")
    conn:close()
    assert.same({}, support.pg_locks())
    assert.equal("", committed())
  end)
end)

describe("a lock inside a transaction", function()
  after_each(support.finish)

  local forms = { {}, { timeout = 5 }, { timeout = 0 }, { shared = true }, { timeout = 5, comment = true } }

  it("stays when the transaction is rolled back, as when it is committed", function()
    for _, ending in ipairs { "COMMIT", "ROLLBACK" } do
      for _, options in ipairs(forms) do
        local conn = support.connect()
        conn:query "BEGIN"
        local lock = conn:lock(42, options)
        conn:query(ending)
        assert.is_true(lock:held() and lock:check())
        assert.equal(1, #support.pg_locks(conn.backend_pid))
        assert.is_true(lock:release())
        conn:close()
      end
    end
  end)

  it("stays when the transaction is rolled back by an error", function()
    local conn = support.connect()
    local lock
    pcall(conn.transaction, conn, function()
      lock = conn:lock(42)
      error "rolled back"
    end)
    assert.is_true(lock:check())
    assert.is_true(lock:release())
  end)

  it("is free at once when it is released", function()
    local a, b = support.connect(), support.connect()
    a:transaction(function()
      assert.is_true(a:lock(42):release())
      assert.is_true(b:lock(42, { timeout = 0 }):release())
      a:with_lock(42, function() assert.is_nil(b:try_lock(42)) end)
      assert.is_truthy(b:try_lock(42)):release()
    end)
  end)

  it("changes neither the transaction's settings nor its savepoints", function()
    local conn = support.connect()
    conn:query "CREATE TEMP TABLE t (n int)"
    conn:transaction(function()
      conn:query "SET LOCAL lock_timeout = '7s'"
      conn:query "SAVEPOINT pglocks"
      conn:query "INSERT INTO t VALUES (1)"
      for _, options in ipairs(forms) do
        local lock = conn:lock(42, options)
        assert.equal("7s", conn:query("SHOW lock_timeout")[1].lock_timeout)
        assert.is_true(lock:check())
        assert.is_true(lock:release())
      end
      assert.equal(1, value(conn, "(SELECT count(*) FROM t)"))
      conn:query "ROLLBACK TO SAVEPOINT pglocks"
      assert.equal(0, value(conn, "(SELECT count(*) FROM t)"))
      conn:query "INSERT INTO t VALUES (2)"
    end)
    assert.equal(2, value(conn, "(SELECT n FROM t)"))
    assert.equal("0", conn:query("SHOW lock_timeout")[1].lock_timeout)
  end)

  it("that is not to be had does not abort it", function()
    local holder, conn = support.connect(), support.connect()
    local lock = holder:lock { 7, 42 }
    conn:query "CREATE TEMP TABLE t (n int)"
    conn:transaction(function()
      conn:query "INSERT INTO t VALUES (1)"
      assert.same({ nil, "busy" }, { conn:try_lock { 7, 42 } })
      assert.same({ nil, "timeout" }, { conn:try_lock({ 7, 42 }, { timeout = 0.05 }) })
      assert_error("timeout", "55P03", conn, "lock", { 7, 42 }, { timeout = 0.05 })
      support.begin(conn, "lock", { 7, 42 })
      support.wait_until_waiting(conn.backend_pid)
      assert.is_true(conn:cancel())
      assert.equal("interrupted", raised(support.complete, conn).code)
      assert.equal("0", conn:query("SHOW lock_timeout")[1].lock_timeout)
      assert.equal(1, value(conn, "(SELECT count(*) FROM t)"))
      lock:release()
      assert.is_true(conn:lock({ 7, 42 }, { timeout = 5 }):release())
    end)
    assert.equal(1, value(conn, "(SELECT count(*) FROM t)"))
    assert.same({}, support.pg_locks())
  end)

  it("does not abort it as the victim of a deadlock", function()
    local holder, conn = support.connect(), support.connect()
    local lock = holder:lock(1)
    conn:query "SET deadlock_timeout = '50ms'"
    holder:query "SET deadlock_timeout = '1h'"
    conn:transaction(function()
      local own = conn:lock(2)
      support.begin(holder, "lock", 2)
      support.wait_until_waiting(holder.backend_pid)
      assert_error("deadlock", "40P01", conn, "lock", 1)
      assert.equal(1, value(conn, "1"))
      assert.is_true(own:check())
      assert.is_true(own:release())
    end)
    assert.is_true(support.complete(holder):release())
    lock:release()
  end)

  it("that is aborted raises aborted_transaction, and sends nothing", function()
    local conn = support.connect()
    conn:lock(42):release()
    conn:query "BEGIN"
    pcall(conn.query, conn, "SELECT 1/0")
    local function activity()
      return support.observe("SELECT query, query_start::text, state_change::text FROM pg_stat_activity WHERE pid = $1",
        conn.backend_pid)
    end
    local before = activity()
    for _, options in ipairs(forms) do
      for _, method in ipairs { "lock", "try_lock" } do
        local err = assert_error("aborted_transaction", nil, conn, method, 42, options)
        assert.equal(pglocks.key(42), err.key)
      end
      assert_error("aborted_transaction", nil, conn, "with_lock", 42, options, print)
      assert_error("aborted_transaction", nil, conn, "try_with_lock", 42, options, print)
    end
    assert.same(before, activity())
    assert_error("aborted_transaction", "25P02", conn, "query", "SELECT 1")
    conn:query "ROLLBACK"
    assert.is_true(conn:lock(42):release())
  end)

  it("that was aborted is released when it has ended", function()
    for _, deferred in ipairs { "confirmed", "deferred" } do
      local conn = support.connect { release = deferred }
      conn:query "BEGIN"
      local locks = { conn:lock(42), conn:lock { 7, 42 }, conn:lock(42, { shared = true }) }
      pcall(conn.query, conn, "SELECT 1/0")
      for _, lock in ipairs(locks) do
        assert.is_true(lock:release())
        assert.is_false(lock:held())
        assert.same({ nil, "not held" }, { lock:release() })
      end
      assert.same({}, conn:locks())
      assert.equal(3, #support.pg_locks(conn.backend_pid))
      conn:query "ROLLBACK"
      support.wait_until("the releases", function() return #support.pg_locks(conn.backend_pid) == 0 end)
      assert.is_true(conn:lock(42):release())
    end
  end)

  it("that was aborted is taken anew after it has ended, and held once", function()
    local a, b = support.connect(), support.connect()
    a:query "BEGIN"
    local lock = a:lock(42)
    pcall(a.query, a, "SELECT 1/0")
    lock:release()
    a:query "ROLLBACK"
    lock = a:lock(42)
    assert.is_true(lock:check())
    assert.is_nil(b:try_lock(42))
    lock:release()
    assert.is_truthy(b:try_lock(42))
  end)

  it("does not mask the error that aborted it", function()
    local conn = support.connect()
    local failed
    assert.equal(raised(conn.transaction, conn, function()
      conn:with_lock(42, function()
        conn:lock(43)
        failed = raised(conn.query, conn, "SELECT 1/0")
        error(failed, 0)
      end)
    end), failed)
    assert.equal("22012", failed.sqlstate)
    collectgarbage()
    support.wait_until("the releases", function() return #support.pg_locks(conn.backend_pid) == 0 end)
  end)
end)
