-- A lease: a holder that neither works nor pings for so long loses its session.

local pglocks = require "pglocks"
local support = require "spec.support"

describe("a lease", function()
  after_each(support.finish)

  local LEASE = 0.3

  local function connect() return support.connect { lease = LEASE } end

  local function older_than_14()
    return support.observe("SELECT current_setting('server_version_num')::int AS v")[1].v < 140000
  end

  it("of a holder that is silent ends, and the next one gets the lock", function()
    if older_than_14() then return support.assert_code("server", connect) end
    local conn = connect()
    local lock = conn:lock "x"
    local seconds, got = support.timed(function() return support.connect():lock("x", { timeout = 10 }) end)
    assert.is_true(got:check())
    assert.is_true(seconds >= LEASE * 0.5 and seconds < (LEASE + 1) * support.slow, seconds)
    assert.is_false(lock:held())
    assert.equal("57P05", support.assert_code("lost", lock.release, lock).sqlstate)
  end)

  it("is renewed by every ping, and by waiting", function()
    if older_than_14() then return end
    local conn = connect()
    local lock = conn:lock "x"
    for _ = 1, 10 do
      support.sleep(LEASE / 3)
      assert.is_true(conn:ping())
    end
    assert.is_true(lock:check())
    local held = support.connect():lock "y"
    support.assert_code("timeout", conn.lock, conn, "y", { timeout = 2 * LEASE })
    assert.is_true(lock:check())
    held:release()
  end)

  it("ends inside a transaction, too", function()
    if older_than_14() then return end
    local conn = connect()
    local lock = conn:lock "x"
    conn:query "BEGIN"
    support.wait_until("the end of the lease", function() return not lock:held() end)
    assert.equal("25P03", support.assert_code("lost", lock.release, lock).sqlstate)
  end)

  it("is none unless asked for", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    support.sleep(2 * LEASE)
    assert.is_true(lock:check())
  end)
end)

describe("a connection in which the server would be the first to give up", function()
  local function refused(options)
    options.host, options.timeout = "db.invalid", 0.1
    local message = support.raised(pglocks.connect, options)
    assert.equal("string", type(message))
    return message
  end

  it("is refused", function()
    for _, options in ipairs {
      { keepalives = 0 }, { keepalives_idle = 0 }, { keepalives_idle = 60 },
      { tcp_user_timeout = 30000 }, { tcp_user_timeout = 0, keepalives_count = 40 },
    } do
      assert.is_truthy(refused(options):find("the client would notice a vanished server", 1, true))
    end
    assert.is_truthy(refused({ lease = 5 }):find("'lease' must be more than the 10 s", 1, true))
    assert.is_truthy(refused({ lease = 0 }):find("'lease' must be seconds, more than 0", 1, true))
  end)

  it("is not refused where it would not, or there is no network", function()
    for _, options in ipairs {
      { keepalives_idle = 1, keepalives_interval = 1, tcp_user_timeout = 2000, lease = 3 },
      { tcp_user_timeout = 0 }, { tcp_user_timeout = 20000 }, { lease = 12 },
      { host = "/nowhere", keepalives = 0, lease = 0.1 },
    } do
      options.host, options.port, options.timeout = options.host or "127.0.0.1", 1, 0.05
      support.assert_code("connect", pglocks.connect, options)
    end
  end)
end)
