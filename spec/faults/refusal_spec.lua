-- A server that has no room, or is about to stop: whoever is in, stays in.

local pglocks = require "pglocks"
local phases = require "spec.faults.phases"
local server = require "spec.faults.server"
local support = require "spec.support"

local function connect(own, timeout)
  return support.connect { conninfo = own.conninfo, timeout = timeout }
end

local function it_with_servers(name, fn)
  it(name, server.cannot_make and function() pending(server.cannot_make) end or fn)
end

-- What a session does that nothing has happened to.
local function still_works(conn)
  assert.is_true(conn:ping())
  local lock = conn:lock "afterwards"
  assert.is_true(lock:check())
  assert.is_true(lock:release())
end

describe("a server without a free connection", function()
  local full, fill

  local ROOM = 4

  setup(function()
    if server.cannot_make then return end
    full = server.make(([[
      max_connections = %d
      max_wal_senders = 0
      superuser_reserved_connections = 0
    ]]):format(ROOM))
  end)
  teardown(server.finish)

  before_each(function() fill = {} end)
  after_each(function()
    for _, conn in ipairs(fill) do conn:close() end
    support.finish()
  end)

  -- Takes all that is left. The server counts a session for a moment longer than it lives.
  local function fill_up(left)
    support.wait_until("room", function()
      local ok, conn = pcall(pglocks.connect, { conninfo = full.conninfo, timeout = 0.3 })
      if ok then fill[#fill + 1] = conn end
      return #fill == left
    end)
  end

  it_with_servers("row 1, connecting: is tried until the deadline, then too_many_connections", function()
    fill_up(ROOM)
    local seconds, ok, err = support.timed(pcall, pglocks.connect, { conninfo = full.conninfo, timeout = 0.5 })
    assert.is_false(ok)
    assert.same({ "too_many_connections", "53300" }, { err.code, err.sqlstate })
    assert.is_true(seconds >= 0.4 and seconds < 1 * support.slow, seconds)

    local result = phases.connecting(full.conninfo, "{ timeout = 20 }")
    table.remove(fill):close()
    assert.equal("connected", (result.wait()))
  end)

  it_with_servers("row 1, connecting: the reason stays when at last the server says nothing", function()
    fill_up(ROOM)
    local function refusals() return select(2, support.read(full.host .. "/log"):gsub("too many clients", "")) end
    local before = refusals()
    local postmaster = support.read(full.host .. "/postmaster.pid"):match "%d+"
    local result = phases.connecting(full.conninfo, "{ timeout = 1.5 }")
    finally(function() support.signal("CONT", postmaster) end)
    support.wait_until("a refusal", function() return refusals() > before end)
    support.signal("STOP", postmaster)
    local outcome, sqlstate = result.wait()
    assert.same({ "too_many_connections", "53300" }, { outcome, sqlstate })
  end)

  it_with_servers("row 1, connecting: a server that is not there yet, or refuses for now", function()
    local own = server.make()
    own:stop()
    local seconds, ok, err = support.timed(pcall, pglocks.connect, { conninfo = own.conninfo, timeout = 0.5 })
    assert.is_false(ok)
    assert.equal("connect", err.code)
    assert.is_true(seconds >= 0.4 and seconds < 1 * support.slow, seconds)
    local result = phases.connecting(own.conninfo, "{ timeout = 20 }")
    own:start()
    assert.equal("connected", (result.wait()))

    -- A standby that lets nobody in says the same as a server that starts: 57P03.
    own:query "ALTER SYSTEM SET hot_standby = off"
    own:stop()
    support.shell(("%s touch %s/standby.signal"):format(os.getenv "PGLOCKS_TEST_AS_SERVER" or "", own.host))
    own:begin_start()
    support.wait_until("the refusal", function()
      local _, refusal = pcall(pglocks.connect, { conninfo = own.conninfo, timeout = 0.3 })
      return refusal.sqlstate == "57P03"
    end)
    result = phases.connecting(own.conninfo, "{ timeout = 20 }")
    own:promote()
    assert.equal("connected", (result.wait()))
  end)

  it_with_servers("row 1, holding: is nothing to a holder", function()
    local conn = connect(full)
    local lock = conn:lock "x"
    fill_up(ROOM - 1)
    assert.is_true(lock:held())
    assert.is_true(lock:check())
  end)

  it_with_servers("row 1, releasing: is nothing to a release", function()
    local conn = connect(full)
    local lock = conn:lock "x"
    fill_up(ROOM - 1)
    assert.is_true(lock:release())
    assert.is_true(fill[1]:lock("x", { timeout = 5 }):release())
  end)

  it_with_servers("row 1, idle: the module's functions connect when there is room", function()
    pglocks.setup { databases = { default = { conninfo = full.conninfo, timeout = 0.3 } } }
    fill_up(ROOM)
    support.assert_code("too_many_connections", pglocks.lock, "x")
    table.remove(fill):close()
    support.wait_until("room", function()
      local ok, lock = pcall(pglocks.lock, "x")
      return ok and lock:release()
    end)
    pglocks.setup {}
  end)
end)

describe("a server that stops when all have left, or reads its configuration anew", function()
  local own

  setup(function() if not server.cannot_make then own = server.make() end end)
  teardown(server.finish)
  after_each(support.finish)

  -- What happens, and returns when it has begun.
  local WAYS = {
    smart = function()
      if own.observer then own.observer:close() end
      own:begin "-m smart stop"
      support.wait_until("the stop to begin", function()
        return support.read(own.host .. "/postmaster.pid"):find "stopping"
      end)
    end,
    reload = function()
      local before = own:query("SELECT pg_conf_load_time()::text AS t")[1].t
      own:pg_ctl "reload"
      support.wait_until("the reload", function()
        return own:query("SELECT pg_conf_load_time()::text AS t")[1].t ~= before
      end)
    end,
  }

  local function it_happens(title, test)
    it_with_servers(title, function()
      for way, happen in pairs(WAYS) do
        own:ensure()
        test(happen, way)
        support.finish()
      end
    end)
  end

  it_happens("row 13b, connecting: is refused by the one, and not by the other", function(happen, way)
    local conn = connect(own) -- keeps it up
    happen()
    local ok, err = pcall(connect, own, 0.3)
    assert.equal(way == "reload", ok)
    if not ok then assert.same({ "connect", "57P03" }, { err.code, err.sqlstate }) end
    still_works(conn)
  end)

  it_happens("row 13b, waiting: the wait goes on", function(happen)
    local conn = connect(own)
    local lock = phases.waiting(conn, connect(own), "x", nil, function(...) return own:query(...) end)
    happen()
    lock:release()
    assert.is_true(support.complete(conn):check())
  end)

  it_happens("row 13b, holding: the lock is held", function(happen)
    local lock = connect(own):lock "x"
    happen()
    assert.is_true(lock:held())
    assert.is_true(lock:check())
  end)

  it_happens("row 13b, releasing: it is released", function(happen)
    local conn = connect(own)
    local lock = conn:lock "x"
    local go_on = phases.releasing(conn, lock, function(...) return own:query(...) end)
    happen()
    go_on()
    assert.is_true(support.complete(conn))
    still_works(conn)
  end)

  it_happens("row 13b, idle: the session stays", function(happen)
    local conn = connect(own)
    happen()
    still_works(conn)
  end)
end)

describe("a full lock table", function()
  local full, conn, filler

  setup(function()
    if server.cannot_make then return end
    full = server.make "max_locks_per_transaction = 10\nmax_connections = 10\nmax_wal_senders = 0\n"
  end)
  teardown(server.finish)
  after_each(support.finish)

  before_each(function()
    if not full then return end
    conn, filler = connect(full), connect(full)
  end)

  -- A failed statement keeps the locks that it has taken.
  local function fill_up()
    local err = support.assert_code("too_many_locks", filler.query, filler,
      "SELECT pg_advisory_lock(i) FROM generate_series(1000, 1000000) i")
    assert.equal("53200", err.sqlstate)
  end

  local function empty() filler:query "SELECT pg_advisory_unlock_all()" end

  it_with_servers("row 16, connecting: is refused with the SQLSTATE, or connects", function()
    fill_up()
    local ok, err = pcall(connect, full, 2)
    if not ok then assert.same({ "connect", "53200" }, { err.code, err.sqlstate }) end
    empty()
    still_works(connect(full))
  end)

  it_with_servers("row 16, waiting: is too_many_locks, and nothing is held", function()
    fill_up()
    for _, key in ipairs { "x", { 7, 42 } } do
      for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true } } do
        local err = support.assert_code("too_many_locks", conn.lock, conn, key, options)
        assert.same({ "53200", pglocks.key(key) }, { err.sqlstate, err.key })
        assert.same({}, conn:locks())
      end
    end
    empty()
    assert.same({}, conn:query("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"))
    still_works(conn)
  end)

  it_with_servers("row 16, waiting: is too_many_locks in the middle of many, and none of them is held", function()
    local kept = conn:lock(1)
    local keys = {}
    for i = 1, 100000 do keys[i] = i end
    for _, options in ipairs { {}, { timeout = 5 }, { timeout = 0 }, { shared = true } } do
      local err = support.assert_code("too_many_locks", conn.lock_all, conn, keys, options)
      assert.equal("53200", err.sqlstate)
      assert.is_nil(err.key)
      assert.equal(1, #conn:locks())
      assert.equal(1, #conn:query("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"))
    end
    assert.is_true(kept:check())
    still_works(conn)
  end)

  it_with_servers("row 16, holding: is nothing to a holder", function()
    local lock = conn:lock "x"
    fill_up()
    assert.is_true(lock:held())
    assert.is_true(lock:check())
    assert.is_true(conn:lock("x"):release())
    assert.is_true(lock:check())
  end)

  it_with_servers("row 16, releasing: is nothing to a release", function()
    local lock = conn:lock "x"
    fill_up()
    assert.is_true(lock:release())
    assert.is_true(filler:lock("x", { timeout = 0 }):release())
  end)

  it_with_servers("row 16, idle: the session stays", function()
    fill_up()
    assert.is_true(conn:ping())
    empty()
    still_works(conn)
  end)
end)
