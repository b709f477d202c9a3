-- A hot standby, its promotion, and an old primary that nobody has told. The numbers are those of
-- the table of faults.

local pglocks = require "pglocks"
local server = require "spec.faults.server"
local support = require "spec.support"

local assert_code, wait_until = support.assert_code, support.wait_until

--- Connects to the first of these servers that is right.
local function hosts(...)
  local names = {}
  for i = 1, select("#", ...) do names[i] = select(i, ...).host end
  return { host = table.concat(names, ","), port = (...).port, dbname = "postgres", user = "postgres" }
end

local function connect(described, allow_standby)
  return support.connect {
    conninfo = described.conninfo, host = described.host, port = described.port, timeout = described.timeout,
    dbname = "postgres", user = "postgres", allow_standby = allow_standby,
  }
end

--- What is raised by a call that finds no server but a standby.
local function assert_refused(...)
  local err = support.raised(...)
  assert.is_truthy(err.code == "standby" or err.code == "connect", err.code)
  assert.is_truthy(err.message:find("is a standby", 1, true), err.message)
  return err
end

--- Which of these servers the connection has come to.
local function is_on(conn, where)
  return conn:query("SELECT current_setting('data_directory') AS folder")[1].folder == where.host
end

--- Ours on a server: all but the one that looks.
local function sessions(where)
  return #where:query [[SELECT 1 FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()]]
end

local function it_with_servers(name, fn)
  it(name, server.cannot_make and function() pending(server.cannot_make) end or fn)
end

describe("a hot standby", function()
  local primary, standby

  setup(function()
    if server.cannot_make then return end
    primary = server.make()
    standby = primary:standby()
  end)
  teardown(server.finish)
  after_each(support.finish)

  it_with_servers("is refused, and no session is left there (row 14, connecting)", function()
    local err = assert_code("standby", pglocks.connect, standby.conninfo)
    assert.is_truthy(tostring(err):find("standby", 1, true))
    wait_until("its session to end", function() return sessions(standby) == 0 end)
  end)

  it_with_servers("is passed by for the next host, the primary (row 14, connecting)", function()
    local conn = connect(hosts(standby, primary))
    assert.is_true(is_on(conn, primary))
    assert.is_true(conn:lock("x"):check())
    wait_until("the session there to end", function() return sessions(standby) == 0 end)
  end)

  it_with_servers("is refused where no other host is right (row 14, connecting)", function()
    assert_code("standby", connect, hosts(standby, standby))
    local nowhere = { host = "/nowhere", port = standby.port }
    for _, described in ipairs { hosts(standby, nowhere), hosts(nowhere, standby) } do
      described.timeout = 1
      local seconds, err = support.timed(assert_refused, connect, described)
      assert.is_truthy(err.message:find("/nowhere", 1, true), err.message)
      assert.is_true(seconds > 0.9, seconds) -- as long as that one may come to be there
    end
  end)

  it_with_servers("is refused to the module's own functions (row 14, connecting)", function()
    finally(function() pglocks.setup {} end)
    pglocks.setup(standby.conninfo)
    for _ = 1, 2 do assert_code("standby", pglocks.lock, "x") end
    pglocks.setup { databases = { default = hosts(standby, primary) } }
    assert.is_true(pglocks.lock("x"):release())
  end)

  it_with_servers("with allow_standby has locks of its own, which exclude nobody on the primary"
    .. " (row 14, connecting)", function()
    local conn, beside, there = connect(standby, true), connect(standby, true), connect(primary)
    assert.is_true(is_on(conn, standby))
    local lock = conn:lock "x"
    assert.is_true(lock:check())
    assert.same({ nil, "busy" }, { beside:try_lock "x" })

    local other = there:lock("x", { timeout = 0 })
    assert.is_true(other:check())
    assert.is_true(lock:check())
    assert.is_true(other:release())
    assert.is_true(lock:release())
    assert.is_true(beside:lock("x", { timeout = 0 }):release())
  end)

  it_with_servers("with allow_standby has no fencing tokens, and no lock is left then", function()
    local conn = connect(standby, true)
    local held = conn:lock "held"
    for _, take in ipairs {
      function() return conn:lock("x", { token = true }) end,
      function() return conn:lock("held", { token = true }) end,
      function() return conn:try_lock_all({ "held", "x", "y" }, { token = true }) end,
    } do
      assert_code("standby", take)
      assert.equal(1, #conn:locks())
      assert.equal(1, #conn:query "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'")
    end
    assert.is_true(held:check())
    assert.is_true(held:release())
    assert.is_falsy(support.read(standby.host .. "/log"):find("during recovery", 1, true))
  end)

  it_with_servers("with allow_standby has waiters that poll, because nobody can be told there", function()
    local conn, beside = connect(standby, true), connect(standby, true)
    local lock = conn:lock "x"
    for _, options in ipairs { { strategy = "notify" }, { slots = 1, strategy = "notify" }, { slots = 1 } } do
      local slot = options.slots and conn:lock("x", { slots = 1 })
      options.timeout = 0.1
      assert.same({ nil, "timeout" }, { beside:try_lock("x", options) })
      if slot then slot:release() end
    end
    lock:release()
    assert.is_true(beside:lock("x", { strategy = "notify" }):check())
  end)
end)

describe("after a promotion", function()
  local primary, standby

  before_each(function()
    if server.cannot_make then return end
    primary = server.make()
    standby = primary:standby()
  end)
  after_each(function()
    pglocks.setup {}
    support.finish()
    server.finish()
  end)

  it_with_servers("several hosts lead to the new primary, and not before (row 15, connecting)", function()
    primary:stop()
    local described = hosts(primary, standby)
    described.timeout = 1
    assert_refused(connect, described)
    standby:promote()
    for _, either in ipairs { hosts(primary, standby), hosts(standby, primary) } do
      local conn = connect(either)
      assert.is_true(is_on(conn, standby))
      assert.is_true(conn:lock("x", { timeout = 0 }):check())
      conn:close()
    end
  end)

  it_with_servers("who waits on the old primary, which is alive, waits on and gets the lock there"
    .. " (row 15, waiting)", function()
    local holder, waiter = connect(primary), connect(primary)
    local lock = holder:lock "x"
    support.begin(waiter, "lock", "x")
    local function waits()
      return #primary:query([[SELECT 1 FROM pg_stat_activity
        WHERE pid = $1 AND wait_event_type = 'Lock']], waiter.backend_pid) == 1
    end
    wait_until("it to wait", waits)
    standby:promote()
    assert.is_true(connect(hosts(standby, primary)):lock("x", { timeout = 0 }):check())

    assert.is_true(waits())
    assert.is_true(lock:check())
    assert.is_true(lock:release())
    assert.is_true(support.complete(waiter):check())
  end)

  it_with_servers("a holder on the old primary holds beside one on the new, until its session ends"
    .. " (row 15, holding)", function()
    local told = {}
    local holder = support.connect {
      conninfo = primary.conninfo,
      on_lost = function(_, err, locks) told[#told + 1] = { err.code, #locks } end,
    }
    local lock = holder:lock "x"
    standby:promote()
    local second = connect(hosts(standby, primary)):lock("x", { timeout = 0 })
    -- Two holders. No server knows of the other one, and the client asks only its own.
    assert.is_true(lock:check())
    assert.is_true(second:check())
    assert.same({}, told)

    primary:stop "immediate"
    wait_until("the loss", function() return not lock:held() end)
    assert.is_false(holder:alive())
    assert.same({ { "lost", 1 } }, told)
    assert_code("lost", lock.release, lock)
    assert_code("lost", holder.lock, holder, "x")
    assert.is_true(second:check())
    assert.same({ { "lost", 1 } }, told)
  end)

  it_with_servers("to a synchronous standby, fencing tokens grow, and the old primary draws none", function()
    primary:query "ALTER SYSTEM SET fsync = on"
    standby:query "ALTER SYSTEM SET fsync = on"
    primary:query "ALTER SYSTEM SET synchronous_standby_names = '*'"
    for _, each in ipairs { primary, standby } do
      each:query "SELECT pg_reload_conf()"
      wait_until("fsync", function() return each:query("SHOW fsync")[1].fsync == "on" end)
    end
    wait_until("the standby to be waited for", function()
      return #primary:query "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'" == 1
    end)
    local holder = support.connect { conninfo = primary.conninfo, reply_timeout = 2 * support.slow }
    local lock
    for _ = 1, 20 do lock = holder:lock("x", { token = true }) end
    standby:promote()
    local second = connect(hosts(standby)):lock("x", { token = true, timeout = 0 })
    assert.is_true(second.token > lock.token)
    assert.is_true(lock:check()) -- two holders; but the token of one is lower
    assert_code("unknown", holder.lock, holder, "x", { token = true })
    assert.is_false(lock:held())
  end)

  it_with_servers("the module's own functions go to the new primary, once it is one (row 15, idle)", function()
    local described = hosts(primary, standby)
    described.timeout = 1
    pglocks.setup { databases = { default = described } }
    pglocks.lock("x"):release()
    primary:stop()
    assert_refused(pglocks.lock, "x")
    standby:promote()

    local lock = pglocks.lock("x", { timeout = 0 })
    assert.is_true(lock:check())
    assert.equal(1, #standby:query "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted")
    assert.is_true(lock:release())
  end)

  it_with_servers("a session of allow_standby sees it, and its locks exclude from then on", function()
    local conn = connect(standby, true)
    local lock = conn:lock "x"
    local function in_recovery()
      -- PostgreSQL 13 has no in_hot_standby.
      return conn:query([[SELECT pg_is_in_recovery() AS told,
        coalesce(current_setting('in_hot_standby', true), 'none') AS setting]])[1]
    end
    local none = conn.server_version < 140000 and "none"
    assert.same({ told = true, setting = none or "on" }, in_recovery())
    standby:promote()
    assert.same({ told = false, setting = none or "off" }, in_recovery())

    assert.is_true(lock:check())
    local other = connect(hosts(standby))
    assert.same({ nil, "busy" }, { other:try_lock "x" })
    assert.is_true(lock:release())
    assert.is_true(other:lock("x", { timeout = 0 }):release())
  end)
end)
