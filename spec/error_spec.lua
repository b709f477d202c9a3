local pglocks = require "pglocks"
local support = require "spec.support"

local core = support.core

local raised = support.raised

local server = core.conninfo(support.conninfo)

--- The server's TCP port, which the role scram_user needs a password for.
local function over_tcp(password, dbname)
  return { host = "127.0.0.1", port = server.port, dbname = dbname or server.dbname, user = "scram_user",
    password = password }
end

local function cannot_use_tcp()
  if os.getenv "PGLOCKS_TEST_DATA" then return false end
  pending "this server knows no scram_user"
  return true
end

describe("an error object", function()
  after_each(support.finish)

  it("tells in fields and as a string what failed", function()
    local a, b = support.connect(), support.connect()
    local lock = a:lock "invoice 42"
    local err = raised(b.lock, b, "invoice 42", { timeout = 0.01 })
    assert.equal("table", type(err))
    assert.equal("timeout", err.code)
    assert.equal('no lock on "invoice 42" within 0.01 s', err.message)
    assert.equal("55P03", err.sqlstate)
    assert.equal(lock.key, err.key)
    assert.is_nil(err.hint)
    assert.equal('pglocks: timeout: no lock on "invoice 42" within 0.01 s (SQLSTATE 55P03)', tostring(err))

    err = raised(b.lock, b, "invoice 42", { timeout = 0 })
    assert.is_nil(err.sqlstate)
    assert.equal('pglocks: timeout: no lock on "invoice 42": somebody holds it', tostring(err))
  end)

  it("shows a name in one printable line, however long and strange", function()
    local a, b = support.connect(), support.connect()
    for _, name in ipairs { "a\0b\n\27[31m", 'quote " and \\', "naïve-日本", ("x"):rep(2 ^ 16), "\255" } do
      local lock = a:lock(name)
      local err = raised(b.lock, b, name, { timeout = 0 })
      assert.is_nil(tostring(err):find "[^ -~]")
      assert.is_true(#err.message < 512)
      assert.equal(lock.key, err.key)
    end
  end)

  it("is a string too where nobody catches it, and nothing else is printed", function()
    local process = support.spawn([[
      local pglocks = require "pglocks"
      local conn = pglocks.connect(...)
      conn:query "DO $$ BEGIN RAISE NOTICE 'a notice'; RAISE WARNING 'a warning'; END $$"
      conn:query "ROLLBACK"
      conn:query "SELECT 1/0"
    ]], support.conninfo)
    local printed = process.lines()
    process.close()
    assert.is_truthy(printed:find("pglocks: server: division by zero (SQLSTATE 22012)", 1, true), printed)
  end)

  it("has a code for what the server refuses", function()
    local conn = support.connect()
    for _, case in ipairs {
      { "SELECT 1/0", "server", "22012" },
      { "nonsense", "server", "42601" },
      { "SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(10)", "interrupted", "57014" },
      { "DO $$ BEGIN SET ROLE pg_monitor; PERFORM * FROM pg_authid; END $$", "permission", "42501" },
    } do
      local err = raised(conn.query, conn, case[1])
      assert.same({ case[2], case[3] }, { err.code, err.sqlstate })
      assert.is_nil(err.key)
    end
    assert.is_true(conn:alive())
  end)

  it("tells the victim of a deadlock, whose other locks stay held", function()
    local conns, locks, victim = {}, {}, nil
    for i = 1, 2 do
      conns[i] = support.connect()
      conns[i]:query "SET deadlock_timeout = '100ms'"
      locks[i] = conns[i]:lock { 7, i }
    end
    support.begin(conns[1], "lock", { 7, 2 })
    support.begin(conns[2], "lock", { 7, 1 })
    support.wait_until("a deadlock", function()
      for i = 1, 2 do
        if not core.step(conns[i]) then victim = victim or i end
      end
      return victim
    end)
    local err = raised(support.complete, conns[victim])
    assert.same({ "deadlock", "40P01" }, { err.code, err.sqlstate })
    assert.equal(pglocks.key { 7, 3 - victim }, err.key)
    assert.is_truthy(err.hint:find "held")
    assert.is_true(locks[victim]:check())
    assert.is_true(locks[victim]:release())
    assert.is_true(support.complete(conns[3 - victim]):check())
  end)
end)

describe("an argument error", function()
  after_each(function()
    pglocks.setup {}
    support.finish()
  end)

  --- Calls in a file of the user's: what is raised must name its line 2.
  local function assert_raises(expected, call)
    pglocks.setup(support.conninfo)
    local conn = support.connect()
    local user = assert(load("local pglocks, conn, lock = ...\n" .. call, "@user.lua"))
    local message = raised(user, pglocks, conn, conn:lock(1))
    assert.equal("string", type(message))
    assert.equal("user.lua:2: bad argument " .. expected, message)
  end

  local KEY = "integer, pair of integers or string expected, got "
  for _, case in ipairs {
    { "conn:lock()", "#1 to 'lock' (" .. KEY .. "nil)" },
    { "conn:lock(true)", "#1 to 'lock' (" .. KEY .. "boolean)" },
    { "conn:lock(1.5)", "#1 to 'lock' (number has no exact representation as a 64-bit integer)" },
    { "conn:lock({})", "#1 to 'lock' (a pair of 32-bit integers expected, got another table)" },
    { "conn:lock('a', 5)", "#2 to 'lock' (table of options expected, got number)" },
    { "conn:lock('a', { timeuot = 1 })", "#2 to 'lock' (unknown option 'timeuot')" },
    { "conn:lock('a', { timeout = -1 })",
      "#2 to 'lock' (option 'timeout': finite number of seconds, not negative, expected)" },
    { "conn:lock(1, { hash = 'sha256' })", "#2 to 'lock' (option 'hash' is for names only)" },
    { "conn:try_lock(print)", "#1 to 'try_lock' (" .. KEY .. "function)" },
    { "conn:try_lock('a', { using = 'b' })", "#2 to 'try_lock' (unknown option 'using')" },
    { "conn:with_lock(true, print)", "#1 to 'with_lock' (" .. KEY .. "boolean)" },
    { "conn:with_lock('a')", "#2 to 'with_lock' (function expected, got nil)" },
    { "conn:with_lock('a', nil, 5)", "#3 to 'with_lock' (function expected, got number)" },
    { "conn:with_lock('a', {}, {})", "#3 to 'with_lock' (function expected, got table)" },
    { "conn:with_lock('a', { timeuot = 1 }, print)", "#2 to 'with_lock' (unknown option 'timeuot')" },
    { "conn:try_with_lock(true, print)", "#1 to 'try_with_lock' (" .. KEY .. "boolean)" },
    { "conn:try_with_lock('a')", "#2 to 'try_with_lock' (function expected, got nil)" },
    { "conn:try_with_lock('a', {}, 'b')", "#3 to 'try_with_lock' (function expected, got string)" },
    { "conn:try_with_lock('a', { wait = true }, print)", "#2 to 'try_with_lock' (unknown option 'wait')" },
    { "conn:transaction()", "#1 to 'transaction' (function expected, got nil)" },
    { "conn:transaction('COMMIT')", "#1 to 'transaction' (function expected, got string)" },
    { "conn:query()", "#1 to 'query' (SQL as a string expected, got no value)" },
    { "conn:query(5)", "#1 to 'query' (SQL as a string expected, got number)" },
    { "conn:query('SELECT 1\\0')",
      "#1 to 'query' (string without NUL expected: PostgreSQL's text has none)" },
    { "conn:query('SELECT $1, $2', 1, {})",
      "#3 to 'query' (nil, boolean, number or string expected, got table)" },
    { "conn:ping('x')", "#1 to 'ping' (timeout: number of seconds expected, got string)" },
    { "conn:ping(-1)", "#1 to 'ping' (timeout: finite number of seconds, not negative, expected)" },
    { "lock:check('x')", "#1 to 'check' (timeout: number of seconds expected, got string)" },
    { "pglocks.lock(true)", "#1 to 'lock' (" .. KEY .. "boolean)" },
    { "pglocks.lock('a', 5)", "#2 to 'lock' (table of options expected, got number)" },
    { "pglocks.lock('a', { timeuot = 1 })", "#2 to 'lock' (unknown option 'timeuot')" },
    { "pglocks.lock('a', { wait = false })", "#2 to 'lock' (unknown option 'wait')" },
    { "pglocks.lock('a', { using = 'nowhere' })", "#2 to 'lock' (option 'using': unknown database 'nowhere')" },
    { "pglocks.lock('a', { using = 5 })",
      "#2 to 'lock' (option 'using': name of a database expected, got number)" },
    { "pglocks.try_lock({ 1 })",
      "#1 to 'try_lock' (a pair of 32-bit integers expected, got another table)" },
    { "pglocks.try_lock('a', { hash = 'md5' })", "#2 to 'try_lock' (option 'hash': unknown scheme 'md5')" },
    { "pglocks.with_lock('a')", "#2 to 'with_lock' (function expected, got nil)" },
    { "pglocks.with_lock(true, print)", "#1 to 'with_lock' (" .. KEY .. "boolean)" },
    { "pglocks.with_lock('a', { using = 'b' }, print)",
      "#2 to 'with_lock' (option 'using': unknown database 'b')" },
    { "pglocks.try_with_lock('a')", "#2 to 'try_with_lock' (function expected, got nil)" },
    { "pglocks.try_with_lock('a', {}, 5)", "#3 to 'try_with_lock' (function expected, got number)" },
    { "pglocks.wrap('a')", "#2 to 'wrap' (function expected, got nil)" },
    { "pglocks.wrap('a', {}, 5)", "#3 to 'wrap' (function expected, got number)" },
    { "pglocks.wrap(true, print)", "#1 to 'wrap' (" .. KEY .. "boolean)" },
    { "pglocks.advisory_lock(true)", "#1 to 'advisory_lock' (" .. KEY .. "boolean)" },
    { "pglocks.advisory_lock('a', 5)", "#2 to 'advisory_lock' (table of options expected, got number)" },
    { "pglocks.advisory_lock('a', { wait = 1 })",
      "#2 to 'advisory_lock' (option 'wait': boolean expected, got number)" },
    { "pglocks.advisory_lock('a', { wait = false, timeout = 1 })",
      "#2 to 'advisory_lock' (option 'timeout' waits, and wait = false does not)" },
    { "pglocks.advisory_lock('a', { wait = false, using = 'b' })",
      "#2 to 'advisory_lock' (option 'using': unknown database 'b')" },
    { "pglocks.key(true)", "#1 to 'key' (" .. KEY .. "boolean)" },
    { "pglocks.connect(5)", "#1 to 'connect' (conninfo string or table expected, got number)" },
    { "pglocks.connect 'nonsense'", "#1 to 'connect' (conninfo string that libpq can parse expected)" },
    { "pglocks.connect { nonsense = 1 }", "#1 to 'connect' (unknown key 'nonsense')" },
    { "pglocks.connect { timeout = 0 }", "#1 to 'connect' (option 'timeout' must be seconds, more than 0)" },
    { "pglocks.connect { release = 'now' }",
      "#1 to 'connect' (option 'release' must be \"confirmed\" or \"deferred\")" },
    { "pglocks.connect { host = true }", "#1 to 'connect' (keyword 'host' must be a string or a number)" },
    { "pglocks.setup()", "#1 to 'setup' (conninfo string or table expected, got nil)" },
    { "pglocks.setup 'nonsense'",
      "#1 to 'setup' (databases.default: conninfo string that libpq can parse expected)" },
    { "pglocks.setup { hsah = 'sha256' }", "#1 to 'setup' (unknown key 'hsah')" },
    { "pglocks.setup { databases = 5 }",
      "#1 to 'setup' (databases: table of descriptions by name expected)" },
    { "pglocks.setup { databases = { 'dbname=app' } }",
      "#1 to 'setup' (databases: names as strings expected)" },
    { "pglocks.setup { databases = { app = { nonsense = 1 } } }",
      "#1 to 'setup' (databases.app: unknown key 'nonsense')" },
    { "pglocks.setup { hash = 'md5' }", "#1 to 'setup' (option 'hash': unknown scheme 'md5')" },
  } do
    local call, expected = case[1], case[2]
    it("names argument, function and line of the caller: " .. call, function() assert_raises(expected, call) end)
  end

  it("sees a NUL in the name of an option or of a scheme", function()
    local conn = support.connect()
    for _, options in ipairs { { ["shared\0x"] = true }, { hash = "sha256\0x" } } do
      assert.is_truthy(raised(conn.lock, conn, "a", options):find "bad argument #2")
      assert.is_truthy(raised(pglocks.key, "a", options):find "bad argument #2")
    end
    assert.same({}, conn:locks())
  end)

  it("names the line of a call of what wrap made", function()
    local user = load("local import = (...).wrap('a', { using = 'b' }, print)\nimport()", "@user.lua")
    assert.is_truthy(raised(user, pglocks):find "^user.lua:2: bad argument #2 to '[%w_]+' %(option 'using'")
  end)

  it("names the line of the caller in a coroutine too", function()
    local conn = support.connect()
    local user = load("local conn = ...\nconn:with_lock(true, print)", "@user.lua")
    local _, message = coroutine.resume(coroutine.create(user), conn)
    assert.equal("user.lua:2: bad argument #1 to 'with_lock' (" .. KEY .. "boolean)", message)
  end)

  it("names no function that the caller does not know, after a tail call", function()
    local conn = support.connect()
    for _, call in ipairs {
      "conn:with_lock('a')", "conn:transaction()", "conn:try_with_lock('a', {})", "conn:with_lock(true, print)",
      "pglocks.with_lock('a')", "pglocks.lock(true)", "pglocks.setup(5)", "pglocks.setup { hash = 'md5' }",
      "pglocks.connect(5)", "pglocks.wrap('a')", "pglocks.advisory_lock(1, { wait = 5 })",
    } do
      local user = load("local pglocks, conn = ...\nlocal function tail() return " .. call
        .. " end\nlocal result = tail() return result", "@user.lua")
      local message = raised(user, pglocks, conn)
      local position, name = message:match "^user.lua:(%d): bad argument #%d to '([%w_?]+)'"
      assert.equal("3", position, message)
      -- LuaJIT gives the called function the name of the one that the tail call replaced
      local replaced = support.is_jit and name == "tail"
      assert.is_truthy(replaced or name == "?" or name == call:match "[.:]([%w_]+)", message)
    end
  end)
end)

describe("connecting", function()
  after_each(support.finish)

  local function refused(described)
    local err = raised(pglocks.connect, described)
    assert.equal("connect", err.code)
    assert.is_nil(tostring(err):find "[\n\r]")
    assert.is_true(#err.message > 0)
    return err
  end

  it("is refused where nobody listens", function()
    assert.is_nil(refused({ host = "127.0.0.1", port = 1, timeout = 0.2 }).sqlstate)
    assert.is_nil(refused({ host = "/nowhere", timeout = 0.2 }).sqlstate)
    assert.is_truthy(refused("host=/nowhere connect_timeout=1").message:find "/nowhere")
  end)

  it("is refused where there is no time for any", function()
    assert.is_truthy(refused({ host = "/nowhere", timeout = 1e-9 }).message:find "no connection within")
    refused { host = "/nowhere", timeout = 0.0005 } -- which may be enough to hear why
  end)

  it("tells what every one of several hosts said", function()
    local message = refused({ host = "/nowhere,127.0.0.1", port = "5432,1", timeout = 0.2 }).message
    assert.is_truthy(message:find("/nowhere", 1, true))
    assert.is_truthy(message:find("127.0.0.1", 1, true))
  end)

  it("tells the SQLSTATE with which the server refused", function()
    for sqlstate, change in pairs {
      ["3D000"] = { dbname = "no such database" }, ["28000"] = { user = "no such role" },
    } do
      local described = { host = server.host, port = server.port, dbname = server.dbname, user = server.user }
      for keyword, value in pairs(change) do described[keyword] = value end
      local err = refused(described)
      assert.equal(sqlstate, err.sqlstate)
      assert.is_truthy(err.message:find "no such")
      assert.is_truthy(tostring(err):find("SQLSTATE " .. sqlstate, 1, true))
    end
  end)

  it("is refused with a wrong password, which is not told", function()
    if cannot_use_tcp() then return end
    local err = refused(over_tcp "wrong canary")
    assert.equal("28P01", err.sqlstate)
    assert.is_nil(tostring(err):find "canary")
    assert.is_nil(refused(over_tcp(nil)).sqlstate)
    local conn = pglocks.connect(over_tcp "secret of scram")
    assert.equal("scram_user", conn:query("SELECT current_user::text AS name")[1].name)
    assert.is_nil(tostring(conn):find "secret")
    conn:close()
  end)

  it("keeps a password to itself that occurs in what the server says", function()
    if cannot_use_tcp() then return end
    for _, password in ipairs { "scram_user", "authentication", "127.0.0.1", "failed:" } do
      assert.is_nil(tostring(refused(over_tcp(password))):find(password, 1, true))
    end
    -- The right password, and an error after it.
    local err = refused(over_tcp("secret of scram", "secret of scram"))
    assert.equal("3D000", err.sqlstate)
    assert.is_nil(tostring(err):find "secret")
  end)
end)

describe("a password", function()
  -- Each has a canary where a password, or a part of it, may stand: "@", "/" and blanks in a password
  -- that nobody escaped end up in host, port and database.
  local corpus = {
    "password=CANARY",
    "password=my CANARY",
    "password='CANARY",
    "password='my' CANARY'",
    "password=CANARY nonsense=1",
    "password=CANARY host",
    "password CANARY",
    "passwordCANARY",
    "CANARY",
    "password=CANARY\\",
    "password='CANARY\\'",
    "password=CANARY\0",
    "password=CANARY\0host=localhost",
    "host=localhost password=my=CANARY port",
    "CANARY=1",
    "password=CANARY port=CANARY",
    "password=CANARY sslmode=CANARY",
    "u:CANARY@word@localhost",
    "u:my@CANARY@localhost",
    "postgresql://u:CANARY/word@localhost",
    "postgresql://u:my/CANARY@localhost",
    "postgresql://u:CANARY@word@localhost",
    "postgresql://u:my@CANARY@localhost",
    "postgresql://u:my@CANARY@localhost:1/db",
    "postgresql://u:my#CANARY@localhost",
    "postgresql://u:my?CANARY@localhost",
    "postgresql://u:?@CANARY@localhost/d",
    "postgresql://u:my?word@CANARY@localhost",
    "postgresql://u:my?password=CANARY@localhost",
    "postgresql://u:CANARY@localhost:port/db",
    "postgresql://u:CANARY@[::1",
    "postgresql://u:CANARY@[::1]nonsense/db",
    "postgresql://u:my[CANARY@localhost",
    "postgresql://u:my:CANARY@localhost:99999/db",
    "postgresql://u:%zzCANARY@localhost",
    "postgresql://u:CANARY%00@localhost",
    "postgresql://u:CANARY%@localhost",
    "postgresql://u:CANARY@localhost/db?nonsense=1",
    "postgresql://u:CANARY@localhost/db?nonsense",
    "postgresql://u:p@localhost/db?password=CANARY&nonsense=1",
    "postgresql://u:p@localhost/db?password=CANARY=1",
    "postgresql://u:p@localhost/db?password=my&CANARY",
    "postgresql://u:p@localhost/db?password=my&CANARY=1",
    "postgresql://u:p@localhost/db?password=my%zzCANARY",
    "postgresql://u:CANARY@127.0.0.1:1/db",
    "postgresql://u:CANARY@%2Fnowhere/db",
  }

  it("is in no error, whatever is wrong with the conninfo string around it", function()
    local process = support.spawn([==[
      local pglocks = require "pglocks"
      local function show(value)
        if type(value) == "table" then
          for name, field in pairs(value) do print(name, (tostring(field):gsub("\n", "\\n"))) end
        end
        print((tostring(value):gsub("\n", "\\n")))
      end
      for i = 1, select("#", ...) do
        local conninfo = select(i, ...):gsub("\\0", "\0")
        print("--", i)
        local keywords, wrong = require "pglocks.connect".describe(conninfo)
        show(not keywords and wrong)
        show(select(2, pcall(pglocks.connect, { conninfo = conninfo, timeout = 0.02 })))
        show(select(2, pcall(pglocks.connect, { conninfo = conninfo, password = "CANARY", port = "nonsense" })))
        show(select(2, pcall(pglocks.setup, conninfo)))
        show(select(2, pcall(pglocks.lock, 42, { timeout = 0.02 })))
        show(select(2, pcall(pglocks.setup, { databases = { other = conninfo } })))
        show(select(2, pcall(pglocks.lock, 42, { using = "other", timeout = 0.02 })))
      end
      show(select(2, pcall(pglocks.connect, { password = { "CANARY" } })))
      show(select(2, pcall(pglocks.connect, { password = "CANARY", nonsense = "CANARY" })))
      show(select(2, pcall(pglocks.connect, { password = "CANARY", timeout = "CANARY" })))
      show(select(2, pcall(pglocks.connect, { "password=CANARY" })))
      show(select(2, pcall(pglocks.connect, { conninfo = { "CANARY" } })))
      print "the end"
    ]==], (table.unpack or unpack)((function()
      local escaped = {}
      for i, conninfo in ipairs(corpus) do escaped[i] = conninfo:gsub("%z", "\\0") end
      return escaped
    end)()))
    local case, leaks, last = 0, {}, nil
    for line in process.lines do
      case = tonumber(line:match "^%-%-%s+(%d+)$") or case
      if line:find "CANARY" then
        local leak = ("%s: %s"):format(corpus[case], line:match "%s(.*)" or line)
        leaks[leak] = true
      end
      last = line
    end
    process.close()
    assert.same({}, leaks)
    assert.equal("the end", last)
    assert.equal(#corpus, case)
  end)

  it("is in no line of the server's log, no notice and no tostring", function()
    local since = support.log()
    if not since then return pending "the server's log cannot be read" end
    local described = over_tcp "secret of scram"
    local said = {}
    local function say(_, err, locks) said[#said + 1] = tostring(err) .. tostring(locks[1] and locks[1].name) end
    described.on_lost = say
    local conn = pglocks.connect(described)
    local lock = conn:lock("x", { comment = true })
    said[#said + 1] = tostring(conn) .. tostring(lock)
    conn:query "DO $$ BEGIN RAISE WARNING 'a warning'; END $$"
    said[#said + 1] = tostring(support.raised(conn.query, conn, "SELECT 1/0"))
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the loss", function() return not conn:alive() end)
    said[#said + 1] = tostring(support.raised(lock.release, lock))
    described.password = "wrong secret"
    said[#said + 1] = tostring(support.raised(pglocks.connect, described))
    said[#said + 1] = since()
    assert.is_nil(table.concat(said, "\n"):find "secret")
  end)
end)
