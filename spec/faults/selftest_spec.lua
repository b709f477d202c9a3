-- What pglocks.selftest says of each kind of address, and that it leaves nothing behind there.

local cqueues = require "cqueues"
local uv = require "luv"

local pglocks = require "pglocks"
local pooler = require "spec.faults.pooler"
local server = require "spec.faults.server"
local support = require "spec.support"

local assert_code, wait_until = support.assert_code, support.wait_until

-- What it found, as a table without the text, which must be there, and is what tostring gives.
local function found(described)
  local result = pglocks.selftest(described)
  assert.is_truthy(result.message:find "%.$", result.message)
  assert.equal(result.message, tostring(result))
  assert.equal(support.observe "SELECT current_setting('server_version_num')::int AS n"[1].n, result.server_version)
  return { kind = result.kind, session = result.session, transaction = result.transaction, pooled = result.pooled },
    result.message
end

local DIRECT = { kind = "direct", session = true, transaction = true }
local POOLED = {
  session = { kind = "session pooling", session = true, transaction = true, pooled = "session" },
  transaction = { kind = "transaction pooling", session = false, transaction = true, pooled = "transaction" },
  statement = { kind = "statement pooling", session = false, transaction = false },
}
local STANDBY = { kind = "standby", session = false, transaction = false }
local SEVERAL = { kind = "several servers", session = false, transaction = false }
local function no_locks(session, transaction)
  return { kind = "no locks", session = session, transaction = transaction }
end

local NAME = "a selftest" -- application_name of those whose sessions are counted

local function sessions()
  return support.observe("SELECT pid FROM pg_stat_activity WHERE application_name = $1", NAME)
end

-- No lock, no transaction, and of a direct connection no session. Their end takes the server a moment.
local function wait_for_nothing()
  wait_until("no lock", function() return #support.pg_locks() == 0 end)
  wait_until("no transaction", function()
    return #support.observe [[SELECT 1 FROM pg_stat_activity
      WHERE backend_type = 'client backend' AND xact_start IS NOT NULL AND pid <> pg_backend_pid()]] == 0
  end)
  wait_until("no session", function() return #sessions() == 0 end)
end

local function it_with_pooler(name, fn)
  it(name, pooler.missing and function() pending(pooler.missing) end or fn)
end

--- A client of the pooler that holds a session of the server, until it is closed or says COMMIT.
local function occupy(mode)
  local conn = support.core.start.connect(support.core.conninfo(pooler.conninfo(mode)), 10)
  assert.is_true(support.complete(conn))
  conn:query "BEGIN"
  return conn, conn:query("SELECT pg_backend_pid() AS pid")[1].pid
end

-- ---- servers ------------------------------------------------------------------------------

describe("the selftest of a direct address", function()
  after_each(support.finish)

  it("says so, and leaves nothing", function()
    local log = support.log()
    assert.same(DIRECT, (found { conninfo = support.conninfo, application_name = NAME }))
    wait_for_nothing()
    if log then assert.equal("", log()) end
  end)

  it("says so whatever the description says", function()
    assert.same(DIRECT, (found { conninfo = support.conninfo, pooled = "session" }))
    assert.same(DIRECT, (found { conninfo = support.conninfo, release = "deferred", lease = 60 }))
  end)

  it("finds the address in the environment", function()
    local process = support.spawn_with(support.environment(), 'print(require "pglocks".selftest().kind)')
    assert.equal("direct", process.lines())
    process.close()
  end)

  it("is one for each time", function()
    for _ = 1, 20 do assert.equal("direct", pglocks.selftest(support.conninfo).kind) end
  end)

  it("has no need of locks that others leave free, and is not in their way", function()
    local lock = support.connect():lock "x"
    assert.same(DIRECT, (found(support.conninfo)))
    assert.is_true(lock:check())
  end)

  it("raises for wrong arguments, what connect would", function()
    for _, wrong in ipairs { 42, { timeuot = 5 }, { pool_size = 5 }, "port=x", { pooled = "statement" } } do
      local _, expected = pcall(function() pglocks.connect(wrong) end)
      local message = support.raised(function() pglocks.selftest(wrong) end)
      assert.equal(expected:gsub("^.-: ", ""):gsub("'connect'", "'selftest'"), (message:gsub("^.-: ", "")))
    end
  end)

  it("raises what connect raises where there is no server", function()
    local seconds, err = support.timed(assert_code, "connect", pglocks.selftest, { host = "/nowhere", timeout = 0.2 })
    assert.is_truthy(err.message:find("/nowhere", 1, true), err.message)
    assert.is_true(seconds < 1 * support.slow, seconds)
  end)

  it("shows no password", function()
    local port = support.core.conninfo(support.conninfo).port
    for _, described in ipairs {
      { host = "127.0.0.1", port = port, user = "scram_user", dbname = "postgres", password = "canary" },
      ("postgresql://scram_user:canary@127.0.0.1:%s/postgres"):format(port),
    } do
      local err = support.raised(pglocks.selftest, described)
      for _, text in pairs(err) do assert.is_nil(tostring(text):find("canary", 1, true), text) end
      assert.equal("connect", err.code)
    end
  end)

  it("works with a role that may do nothing, over TCP and with a password", function()
    assert.same(DIRECT, (found {
      host = "127.0.0.1", port = support.core.conninfo(support.conninfo).port, user = "scram_user",
      dbname = "postgres", password = "secret of scram",
    }))
  end)
end)

describe("the selftest of", function()
  local primary, standby

  setup(function()
    if server.cannot_make then return end
    primary = server.make()
    standby = primary:standby()
  end)
  teardown(server.finish)
  after_each(function()
    pooler.stop()
    support.finish()
  end)

  local function it_with_servers(name, fn)
    it(name, server.cannot_make and function() pending(server.cannot_make) end or fn)
  end

  local function hosts(...)
    local names = {}
    for i = 1, select("#", ...) do names[i] = select(i, ...).host end
    return { host = table.concat(names, ","), port = primary.port, dbname = "postgres", user = "postgres" }
  end

  it_with_servers("a standby says so", function()
    assert.same(STANDBY, (found(hosts(standby))))
    assert.same(STANDBY, (found(hosts(standby, standby))))
    local described = hosts(standby, primary)
    described.allow_standby = true
    assert.same(STANDBY, (found(described)))
    wait_until("no session there", function()
      return #standby:query [[SELECT 1 FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()]] == 0
    end)
  end)

  it_with_servers("several hosts is that of the one that connect would take", function()
    assert.same(DIRECT, (found(hosts(standby, primary))))
    assert.same(DIRECT, (found(hosts(primary, standby))))
    local described = hosts(standby, { host = "/nowhere" })
    described.timeout = 0.3
    local err = support.raised(pglocks.selftest, described)
    assert.is_truthy(err.message:find("is a standby", 1, true), err.message)
    assert.is_truthy(err.message:find("/nowhere", 1, true), err.message)
  end)

  it_with_pooler("a pooler in front of a standby says so", function()
    pooler.start { session = ("pool_mode=session host=%s port=%d dbname=postgres user=postgres")
      :format(standby.host, standby.port) }
    assert.same(STANDBY, (found(pooler.conninfo "session")))
  end)

  for _, mode in ipairs { "session", "transaction" } do
    it_with_pooler(("an address behind which there are two servers says so, by %s"):format(mode), function()
      local other = server.make()
      pooler.start { both = ("pool_mode=%s host=%s,%s port=%d dbname=postgres user=postgres")
        :format(mode, primary.host, other.host, primary.port) }
      for _ = 1, 3 do assert.same(SEVERAL, (found(pooler.conninfo "both"))) end
      for _, one in ipairs { primary, other } do
        assert.same({}, one:query "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'")
      end
    end)
  end
end)

-- ---- poolers ------------------------------------------------------------------------------

describe("the selftest of a pooler", function()
  after_each(function()
    pooler.stop()
    support.finish()
  end)

  for mode, expected in pairs(POOLED) do
    it_with_pooler(("that pools by %s says so, and leaves nothing"):format(mode), function()
      pooler.start(nil, "server_reset_query=") -- which would clean up behind us
      for _, said in ipairs { {}, { pooled = "session" } } do
        said.conninfo = pooler.conninfo(mode)
        assert.same(expected, (found(said)))
      end
      wait_for_nothing()
    end)
  end

  for _, settings in ipairs { "server_round_robin=0", "server_round_robin=1" } do
    for _, count in ipairs { 1, 2, 3, 40 } do -- more than a test asks
      it_with_pooler(("that pools by transaction says so, with %d sessions and %s"):format(count, settings), function()
        pooler.start({ transaction = "pool_mode=transaction pool_size=40" }, settings)
        local clients = {}
        for i = 1, count do clients[i] = occupy "transaction" end
        for _, conn in ipairs(clients) do conn:query "COMMIT" end
        for _ = 1, 5 do assert.same(POOLED.transaction, (found(pooler.conninfo "transaction"))) end
      end)
    end
  end

  it_with_pooler("leaves the sessions of others as they were", function()
    pooler.start()
    local function state(conn)
      return { conn:query [[SELECT name, setting FROM pg_settings
          WHERE source = 'session' AND name <> 'application_name' ORDER BY name]], -- the pooler sets that
        conn:query "SELECT name FROM pg_prepared_statements",
        conn:query "SELECT objid, mode FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()" }
    end
    local before, clients = {}, {}
    for i = 1, 2 do
      local conn, pid = occupy "transaction"
      conn:query "SET statement_timeout = '42s'"
      conn:query("SELECT pg_advisory_lock($1)", i)
      before[pid], clients[i] = state(conn), conn
    end
    for _, conn in ipairs(clients) do conn:query "COMMIT" end

    assert.same(POOLED.transaction, (found(pooler.conninfo "transaction")))
    for i = 1, 2 do
      clients[i]:query "BEGIN"
      local pid = clients[i]:query("SELECT pg_backend_pid() AS pid")[1].pid
      assert.same(before[pid], state(clients[i]))
    end
    for _, conn in ipairs(clients) do
      conn:query "SELECT pg_advisory_unlock_all()"
      conn:query "COMMIT"
    end
  end)

  for _, mode in ipairs { "session", "transaction" } do
    it_with_pooler(("that has one session to give, by %s, ends in time and says why"):format(mode), function()
      pooler.start { small = ("pool_mode=%s pool_size=1"):format(mode) }
      local seconds, err = support.timed(assert_code, "too_many_connections", pglocks.selftest,
        { conninfo = pooler.conninfo "small", timeout = 0.5, reply_timeout = 0.5 })
      assert.is_true(seconds < 2 * support.slow, seconds)
      assert.is_truthy(err.message:find("sessions of the server", 1, true), err.message)
      assert.equal(mode == "transaction", err.message:find("pools transactions", 1, true) ~= nil)
      wait_for_nothing()
      occupy "small":close() -- who comes next has a session
    end)
  end

  it_with_pooler("that has one session, by statement, needs no second one", function()
    pooler.start { small = "pool_mode=statement pool_size=1" }
    assert.same(POOLED.statement, (found(pooler.conninfo "small")))
  end)
end)

-- ---- a database that is not as it should be -------------------------------------------------

local SCRATCH = "pglocks_scratch"
local scratch = support.conninfo .. " dbname=" .. SCRATCH .. " application_name='" .. NAME .. "'"

--- A database whose functions are its own: those of the server cannot be replaced, but renamed.
local function make_scratch()
  support.observe("CREATE DATABASE " .. SCRATCH)
  return support.connect { dbname = SCRATCH }
end

local function drop_scratch()
  support.finish()
  support.observe(("DROP DATABASE IF EXISTS %s WITH (FORCE)"):format(SCRATCH))
end

--- Puts a function of the same arguments in the place of one of the server's, which is called
--- `real_...` from then on.
local function replace(conn, name, body)
  conn:query "SET allow_system_table_mods = on"
  conn:query(("ALTER FUNCTION pg_catalog.%s(bigint) RENAME TO real_%s"):format(name, name))
  conn:query(("CREATE FUNCTION pg_catalog.%s(bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN %s END $$")
    :format(name, body))
end

local SESSION, TRANSACTION, UNLOCK = "pg_try_advisory_lock", "pg_try_advisory_xact_lock", "pg_advisory_unlock"

describe("the selftest of a server whose locks", function()
  after_each(drop_scratch)

  -- How the server is made to lie, what works then, and what the message says.
  local lies = {
    ["of sessions do nothing"] = { function(conn)
      replace(conn, SESSION, "RETURN true;")
      replace(conn, UNLOCK, "RETURN true;")
    end, no_locks(false, true), "a session lock was given to two connections at once" },
    ["of transactions do nothing"] = { function(conn)
      replace(conn, TRANSACTION, "RETURN true;")
    end, no_locks(true, false), "a transaction lock was given to two connections at once" },
    ["do nothing"] = { function(conn)
      for _, name in ipairs { SESSION, UNLOCK, TRANSACTION } do replace(conn, name, "RETURN true;") end
    end, no_locks(false, false), "at once, and a session lock was given" },
    ["are never given"] = { function(conn)
      for _, name in ipairs { SESSION, TRANSACTION } do replace(conn, name, "RETURN false;") end
    end, no_locks(false, false), "although nobody had it" },
    ["are not shown"] = { function(conn)
      conn:query "SET allow_system_table_mods = on"
      conn:query "ALTER VIEW pg_catalog.pg_locks RENAME TO real_locks"
      conn:query "CREATE VIEW pg_catalog.pg_locks AS SELECT * FROM real_locks WHERE locktype <> 'advisory'"
    end, no_locks(false, false), "pg_locks does not show it" },
    ["are not released"] = { function(conn)
      replace(conn, UNLOCK, "RETURN true;")
    end, no_locks(false, true), "did not become free" },
    ["are not there"] = { function(conn)
      conn:query "SET allow_system_table_mods = on"
      for _, name in ipairs { SESSION, TRANSACTION } do
        conn:query(("ALTER FUNCTION pg_catalog.%s(bigint) RENAME TO real_%s"):format(name, name))
      end
    end, no_locks(false, false), "function pg_catalog.pg_try_advisory_lock(bigint) does not exist" },
    ["are not implemented"] = { function(conn)
      replace(conn, SESSION, "RAISE feature_not_supported USING MESSAGE = 'not yet';")
    end, no_locks(false, true), "a session lock is refused by the server: not yet" },
  }
  for what, lie in pairs(lies) do
    it(what .. " says so", function()
      lie[1](make_scratch())
      local result, message = found(scratch)
      assert.same(lie[2], result)
      assert.is_truthy(message:find(lie[3], 1, true), message)
      wait_for_nothing()
    end)
  end

  it("are not for the role says so", function()
    local conn = make_scratch()
    conn:query(("REVOKE EXECUTE ON FUNCTION pg_catalog.%s(bigint) FROM PUBLIC"):format(SESSION))
    local result, message = found(scratch .. " user=scram_user")
    assert.same(no_locks(false, true), result)
    assert.is_truthy(message:find("permission denied for function pg_try_advisory_lock", 1, true), message)
  end)

  it_with_pooler("are behind a pooler of transactions is asked for no lock of a session", function()
    finally(pooler.stop)
    replace(make_scratch(), SESSION, "RAISE 'a session was locked';")
    pooler.start({ scratch = "pool_mode=transaction pool_size=5 dbname=" .. SCRATCH }, "server_round_robin=1")
    local clients = {}
    for i = 1, 3 do clients[i] = occupy "scratch" end
    for _, conn in ipairs(clients) do conn:query "COMMIT" end
    assert.same(POOLED.transaction, (found(pooler.conninfo "scratch")))
  end)

  it("are hidden by functions and operators of somebody else is still the server's", function()
    local conn = make_scratch()
    conn:query "CREATE SCHEMA evil"
    for name in pairs { pg_try_advisory_lock = 1, pg_try_advisory_xact_lock = 1, pg_advisory_unlock = 1 } do
      conn:query(("CREATE FUNCTION evil.%s(bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true'"):format(name))
    end
    for _, of in ipairs { "bigint", "float8", "oid", "text" } do
      conn:query(("CREATE FUNCTION evil.never(%s, %s) RETURNS boolean LANGUAGE sql AS 'SELECT false'"):format(of, of))
      conn:query(("CREATE OPERATOR evil.= (FUNCTION = evil.never, LEFTARG = %s, RIGHTARG = %s)"):format(of, of))
    end
    conn:query(("ALTER DATABASE %s SET search_path = evil, pg_catalog"):format(SCRATCH))
    assert.same(DIRECT, (found(scratch)))
  end)
end)

-- ---- in the middle --------------------------------------------------------------------------

local RUN = [[
  io.stdout:setvbuf "no"
  local conninfo, seconds = ...
  local ok, result = pcall(require "pglocks".selftest, { conninfo = conninfo, reply_timeout = tonumber(seconds) })
  print(ok and result.kind or result.code or result)
  print(result)
]]

describe("a selftest in the middle", function()
  local gate

  -- From here on, whoever has taken a lock by this function waits at the gate.
  local function close_gate(name)
    local conn = make_scratch()
    conn:query "CREATE TABLE gate ()"
    replace(conn, name, ("PERFORM pg_catalog.real_%s($1); PERFORM 1 FROM public.gate; RETURN true;"):format(name))
    gate = support.connect { dbname = SCRATCH }
    gate:query "BEGIN"
    gate:query "LOCK TABLE public.gate"
  end

  -- The backend that waits there, and holds an advisory lock.
  local function stuck()
    local rows = support.observe [[SELECT pid FROM pg_locks WHERE NOT granted AND locktype = 'relation'
      INTERSECT SELECT pid FROM pg_locks WHERE granted AND locktype = 'advisory']]
    return rows[1] and rows[1].pid
  end

  local function wait_until_stuck()
    return wait_until("it to have a lock", stuck)
  end

  local function spawn(conninfo, seconds) return support.spawn(RUN, conninfo, seconds or "10") end

  after_each(function()
    if gate then gate:close() end
    gate = nil
    pooler.stop()
    drop_scratch()
  end)

  -- Where it may be: in a lock of either scope, directly and through poolers.
  local places = {}
  for _, mode in ipairs { "direct", "session", "transaction" } do
    for _, name in ipairs { TRANSACTION, SESSION } do
      if not (mode == "transaction" and name == SESSION) then
        places[#places + 1] = { title = ("%s, in %s"):format(mode, name), mode = mode, name = name }
      end
    end
  end

  local function it_in_each(what, fn)
    for _, place in ipairs(places) do
      local define = place.mode == "direct" and it or it_with_pooler
      define(("%s (%s)"):format(what, place.title), function()
        close_gate(place.name)
        if place.mode == "direct" then return fn(scratch) end
        -- With nothing that cleans up a session for the next client.
        pooler.start({ scratch = ("pool_mode=%s pool_size=2 dbname=%s"):format(place.mode, SCRATCH) },
          "server_reset_query=")
        fn(pooler.conninfo "scratch", true)
      end)
    end
  end

  it_in_each("that is killed leaves nothing", function(conninfo)
    local process = spawn(conninfo)
    wait_until_stuck()
    support.signal("KILL", process.pid)
    process.close()
    gate:query "ROLLBACK" -- its backend waits for that, and sees then that it is alone
    wait_for_nothing()
  end)

  it_in_each("whose session is ended raises, and leaves nothing", function(conninfo)
    local process = spawn(conninfo)
    support.observe("SELECT pg_terminate_backend($1)", wait_until_stuck())
    assert.equal("connect", process.lines())
    process.close()
    gate:query "ROLLBACK"
    wait_for_nothing()
  end)

  it_in_each("whose statement is cancelled raises, and leaves nothing", function(conninfo)
    local process = spawn(conninfo)
    support.observe("SELECT pg_cancel_backend($1)", wait_until_stuck())
    assert.equal("interrupted", process.lines())
    process.close()
    wait_until("no lock", function() return #support.pg_locks() == 0 end)
    gate:query "ROLLBACK"
    wait_for_nothing()
  end)

  it_with_pooler("whose statement is cancelled leaves others their locks", function()
    close_gate(TRANSACTION)
    pooler.start { scratch = "pool_mode=transaction pool_size=2 dbname=" .. SCRATCH }
    local others, pids = {}, {}
    for i = 1, 2 do
      others[i], pids[i] = occupy "scratch"
      others[i]:query "SELECT pg_advisory_lock_shared(42)"
    end
    for _, conn in ipairs(others) do conn:query "COMMIT" end
    local process = spawn(pooler.conninfo "scratch")
    support.observe("SELECT pg_cancel_backend($1)", wait_until_stuck())
    assert.equal("interrupted", process.lines())
    process.close()
    for _, pid in ipairs(pids) do assert.equal(1, #support.pg_locks(pid)) end
  end)

  it_in_each("that gets no answer raises in time, and leaves nothing", function(conninfo, pooled)
    local process = spawn(conninfo, "0.3")
    local seconds, code = support.timed(process.lines)
    assert.equal(pooled and "too_many_connections" or "connect", code)
    assert.is_true(seconds < 3 * support.slow, seconds)
    process.close()
    gate:query "ROLLBACK"
    wait_for_nothing()
  end)

  it("of a coroutine that is left alone leaves nothing", function()
    close_gate(SESSION)
    local loop = cqueues.new()
    loop:wrap(function() pglocks.selftest { conninfo = scratch, scheduler = "cqueues" } end)
    wait_until("it to have a lock", function()
      assert(loop:step(0))
      return stuck()
    end)
    loop = nil -- luacheck: ignore
    gate:query "ROLLBACK"
    collectgarbage()
    collectgarbage()
    wait_for_nothing()
  end)
end)

-- ---- event loops ----------------------------------------------------------------------------

describe("the selftest in an event loop", function()
  after_each(drop_scratch)

  -- It waits, for a lock on a table, until the loop has ticked.
  local function close_gate()
    local conn = make_scratch()
    conn:query "CREATE TABLE gate ()"
    replace(conn, TRANSACTION, "PERFORM 1 FROM public.gate; RETURN pg_catalog.real_pg_try_advisory_xact_lock($1);")
    conn:query "BEGIN"
    conn:query "LOCK TABLE public.gate"
    return conn
  end

  it("of cqueues lets others go on", function()
    local gate, kind = close_gate(), nil
    local loop = cqueues.new()
    loop:wrap(function() kind = pglocks.selftest { conninfo = scratch, scheduler = "cqueues" }.kind end)
    loop:wrap(function()
      for _ = 1, 20 do cqueues.sleep(0.005) end
      assert.is_nil(kind)
      gate:query "ROLLBACK"
    end)
    assert(loop:loop())
    assert.equal("direct", kind)
  end)

  it("of luv lets others go on", function()
    local gate, kind = close_gate(), nil
    coroutine.wrap(function() kind = pglocks.selftest { conninfo = scratch, scheduler = "luv" }.kind end)()
    local timer = uv.new_timer()
    timer:start(100, 0, function()
      timer:close()
      assert.is_nil(kind)
      gate:query "ROLLBACK"
    end)
    uv.run()
    assert.equal("direct", kind)
  end)

  it("is that of setup where the description has none", function()
    finally(function() pglocks.setup {} end)
    local waited = 0
    local scheduler = {}
    for name, fn in pairs(require "pglocks.scheduler.cqueues") do scheduler[name] = fn end
    function scheduler.wait(...)
      waited = waited + 1
      return require "pglocks.scheduler.cqueues".wait(...)
    end
    pglocks.setup { scheduler = scheduler }
    assert.equal("direct", pglocks.selftest(support.conninfo).kind)
    assert.is_true(waited > 0)
  end)
end)
