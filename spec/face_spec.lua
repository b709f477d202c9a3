local pglocks = require "pglocks"
local support = require "spec.support"

local core = support.core
local server = core.conninfo(support.conninfo)
local unpack = table.unpack or unpack

local function pack(...) return { n = select("#", ...), ... } end

local raised = support.raised
local assert_code = support.assert_code

--- The one backend that holds or awaits advisory locks now; nil if there is none.
local function holder()
  local locks = support.pg_locks()
  for _, row in ipairs(locks) do assert.equal(locks[1].pid, row.pid) end
  return locks[1] and locks[1].pid
end

local function finish()
  pglocks.setup {}
  support.finish()
end

describe("setup", function()
  after_each(finish)

  it("names databases, of which the others are not touched", function()
    pglocks.setup { databases = { default = support.conninfo, broken = "host=/nowhere" } }
    assert.is_true(pglocks.lock(42):release())
    assert.is_true(pglocks.lock(42, { using = "default" }):release())
    assert_code("connect", pglocks.lock, 42, { using = "broken", timeout = 0.1 })
    assert.is_truthy(raised(pglocks.lock, 42, { using = "another" }):find("unknown database 'another'", 1, true))
    assert.is_true(pglocks.lock(42):release())
  end)

  it("takes a description as connect does", function()
    for _, described in ipairs {
      support.conninfo, { conninfo = support.conninfo },
      { conninfo = support.conninfo, application_name = "named", release = "deferred" },
      { host = server.host, port = tonumber(server.port), dbname = server.dbname, user = server.user },
      ("postgresql://%s@/%s?host=%s&port=%s"):format(server.user, server.dbname, server.host, server.port),
    } do
      pglocks.setup { databases = { default = described } }
      local lock = pglocks.lock(42)
      assert.is_true(lock:check())
      lock:release()
    end
  end)

  it("with a conninfo string sets the default database alone", function()
    pglocks.setup(support.conninfo)
    assert.is_true(pglocks.lock(42):release())
    assert.is_truthy(raised(pglocks.lock, 42, { using = "reports" }):find("unknown database", 1, true))
  end)

  it("leaves the default database to the environment when it names none", function()
    local script = os.tmpname()
    local file = assert(io.open(script, "w"))
    file:write [[
      local pglocks = require "pglocks"
      print(pglocks.lock(42):release())
      pglocks.setup { databases = { other = "host=/nowhere" } }
      print(pglocks.lock(42):release(), pglocks.connect():ping())
    ]]
    file:close()
    local pipe = io.popen(("PGHOST='%s' PGPORT=%s PGDATABASE=%s PGUSER=%s %s %s 2>&1"):format(server.host, server.port,
      server.dbname, server.user, os.getenv "PGLOCKS_TEST_LUA" or "lua", script))
    local printed = pipe:read "*a"
    pipe:close()
    os.remove(script)
    assert.equal("true\ntrue\ttrue\n", printed)
  end)

  it("starts afresh each time, and lets what is held be", function()
    pglocks.setup(support.conninfo)
    local lock = pglocks.lock(42)
    local pid = holder()
    pglocks.setup(support.conninfo)
    collectgarbage()
    collectgarbage()
    assert.is_true(lock:check())
    assert.same({ nil, "busy" }, { pglocks.try_lock(42) }) -- another connection, so another owner
    assert.equal(pid, holder())
    lock:release()
    lock = pglocks.lock(42)
    assert.not_equal(pid, holder())
    lock:release()
  end)

  it("that fails changes nothing", function()
    pglocks.setup { databases = { default = support.conninfo }, hash = "django-pglocks" }
    local lock = pglocks.lock "some lock"
    for _, settings in ipairs {
      "nonsense", { nonsense = true }, { databases = { default = "host=/nowhere", other = 5 } },
      { databases = { default = "host=/nowhere" }, hash = "md5" }, { databases = { "host=/nowhere" } }, {
        hash = "django-pglocks", namespace = "a", databases = {},
      },
    } do
      assert.is_truthy(raised(pglocks.setup, settings):find("bad argument #1", 1, true))
    end
    local nested = pglocks.lock "some lock"
    assert.equal(pglocks.key(-205618829), nested.key)
    assert.equal(1, #support.pg_locks())
    nested:release()
    assert.is_true(lock:release())
  end)

  it("names the key that it does not know", function()
    for _, name in ipairs { "database", "Databases", "conninfo", "host", "using", "timeout" } do
      assert.is_truthy(raised(pglocks.setup, { [name] = "x" }):find(("unknown key '%s'"):format(name), 1, true))
    end
    assert.is_truthy(raised(pglocks.setup, { support.conninfo }):find("unknown key '1'", 1, true))
  end)
end)

describe("a module-level lock", function()
  before_each(function()
    pglocks.setup { databases = { default = support.conninfo, again = support.conninfo } }
  end)
  after_each(finish)

  it("is of one connection for each name", function()
    local locks = { pglocks.lock(1), pglocks.lock(2), pglocks.try_lock(1), pglocks.advisory_lock(3) }
    assert.is_truthy(holder())
    pglocks.with_lock(1, function() assert.equal(3, #support.pg_locks(holder())) end)
    assert.same({ nil, "busy" }, { pglocks.try_lock(1, { using = "again" }) })
    locks[5] = pglocks.lock(5, { using = "again" })
    local pids = {}
    for _, row in ipairs(support.pg_locks()) do pids[row.pid] = (pids[row.pid] or 0) + 1 end
    local counts = {}
    for _, count in pairs(pids) do counts[#counts + 1] = count end
    table.sort(counts)
    assert.same({ 1, 3 }, counts)
    for _, lock in ipairs(locks) do assert.is_true(lock:release()) end
  end)

  it("has the options of a connection's lock", function()
    local other = support.connect()
    local held = other:lock("invoice 42", { namespace = "app" })
    assert.same({ nil, "busy" }, { pglocks.try_lock("invoice 42", { namespace = "app" }) })
    assert.same({ nil, "timeout" }, { pglocks.try_lock("invoice 42", { namespace = "app", timeout = 0.01 }) })
    assert_code("timeout", pglocks.lock, "invoice 42", { namespace = "app", timeout = 0.01 })
    assert.is_true(pglocks.lock("invoice 42"):release())
    held:release()
    held = other:lock(42, { shared = true })
    assert.is_nil(pglocks.try_lock(42))
    assert.is_true(pglocks.lock(42, { shared = true, comment = true }):release())
    held:release()
  end)

  it("gets a new connection after the old one was lost, which holds nothing", function()
    local lost = pglocks.lock(42)
    local pid = holder()
    support.observe("SELECT pg_terminate_backend($1)", pid)
    support.wait_until("the loss", function() return not lost:held() end)
    assert.same({}, support.pg_locks())
    local lock = pglocks.lock(43)
    assert.not_equal(pid, holder())
    assert.equal(1, #support.pg_locks())
    assert.is_false(lost:held())
    assert_code("lost", lost.check, lost)
    assert_code("lost", lost.release, lost)
    assert.is_true(lock:release())
  end)

  it("is refused without a connection, and had as soon as there can be one", function()
    pglocks.setup "host=/nowhere"
    for _, timeout in ipairs { 0.2, 0.4 } do -- of the lock: connecting is a part of it
      local seconds = support.timed(assert_code, "connect", pglocks.lock, 42, { timeout = timeout })
      assert.is_true(seconds < timeout + 0.5 * support.slow, seconds)
    end
    assert_code("connect", pglocks.with_lock, 42, { timeout = 0.1 }, print)
    pglocks.setup(support.conninfo)
    assert.is_true(pglocks.lock(42):release())
  end)

  it("has timed out when that time is over before anybody has said why there is no connection", function()
    local listener = assert(require "cqueues.socket".listen("127.0.0.1", 0))
    local _, _, port = listener:localname()
    pglocks.setup { databases = { default = { host = "127.0.0.1", port = port } } }
    assert_code("timeout", pglocks.lock, 42, { timeout = 0.1 })
    assert.same({ nil, "timeout" }, { pglocks.try_lock(42, { timeout = 0.1 }) })
    assert.same({ false, "timeout" }, { pglocks.try_with_lock(42, { timeout = 0.1 }, print) })
    listener:close()
  end)

  it("does not change the options it is given", function()
    local options = { using = "again", shared = true, timeout = 5, wait = true }
    pglocks.advisory_lock(42, options):release()
    assert.same({ using = "again", shared = true, timeout = 5, wait = true }, options)
  end)
end)

describe("advisory_lock, as in django-pglocks,", function()
  local second = "pglocks_second"
  setup(function() support.observe("CREATE DATABASE " .. second) end)
  teardown(function() support.observe(("DROP DATABASE %s WITH (FORCE)"):format(second)) end)

  before_each(function()
    pglocks.setup {
      databases = { default = support.conninfo, reports = { conninfo = support.conninfo, dbname = second } },
      hash = "django-pglocks",
    }
  end)
  after_each(finish)

  local other -- what another process of the system does
  before_each(function() other = support.connect() end)
  local function is_free(key, shared)
    local lock = other:try_lock(key, { shared = shared })
    return lock ~= nil and lock:release()
  end

  for lock_id, django in pairs {
    ["some lock"] = "pg_try_advisory_lock(-205618829)",
    [4294967296] = "pg_try_advisory_lock(4294967296)",
    [{ 7, -42 }] = "pg_try_advisory_lock(7, -42)",
  } do
    it("takes the same lock as django-pglocks for a " .. type(lock_id), function()
      local function django_gets_it() return other:query(("SELECT %s AS got"):format(django))[1].got end
      local lock = pglocks.advisory_lock(lock_id)
      assert.is_true(lock.acquired)
      assert.is_false(django_gets_it())
      lock:release()
      assert.is_true(django_gets_it())
      assert.is_false(pglocks.advisory_lock(lock_id, { wait = false }).acquired)
    end)
  end

  it("waits until the lock is had, unless told otherwise", function()
    for _, options in ipairs { {}, { wait = true }, { wait = true, timeout = 60 }, { shared = true } } do
      other:query "SELECT pg_advisory_lock(42)"
      assert.same({ nil, "busy" }, { pglocks.try_lock(42) })
      support.begin(other, "query", "SELECT pg_sleep(0.2), pg_advisory_unlock(42)")
      local lock = pglocks.advisory_lock(42, options)
      assert.is_true(lock.acquired)
      assert.is_true(lock:held())
      support.complete(other)
      assert.is_true(lock:release())
    end
    assert_code("timeout", function()
      other:lock(42)
      pglocks.advisory_lock(42, { timeout = 0.01 })
    end)
  end)

  it("with wait = false returns at once, and the body tells by acquired", function()
    local lock = pglocks.advisory_lock(42, { wait = false })
    assert.is_true(lock.acquired)
    assert.is_false(is_free(42))
    assert.is_true(lock:release())
    assert.is_true(is_free(42))

    local held = other:lock(42)
    lock = pglocks.advisory_lock(42, { wait = false })
    assert.is_false(lock.acquired)
    assert.is_false(lock:held())
    assert.equal(held.key, lock.key)
    assert.equal("pglocks lock: 42, exclusive, not held", tostring(lock))
    assert_code("not_held", lock.check, lock)
  end)

  it("with wait = false releases nothing that it did not get", function()
    local held = other:lock(42)
    local lock = pglocks.advisory_lock(42, { wait = false })
    assert.same({ nil, "not held" }, { lock:release() })
    getmetatable(lock).__close(lock)
    lock = nil -- luacheck: no unused
    collectgarbage()
    assert.is_true(held:check())
    assert.equal(other.backend_pid, holder())
  end)

  it("with wait = false releases no other lock of the same program either", function()
    local outer = pglocks.advisory_lock(42)
    local inner = pglocks.advisory_lock(42, { wait = false })
    assert.is_true(inner.acquired) -- stacks, as in PostgreSQL
    assert.is_true(inner:release())
    assert.is_true(outer:held())
    assert.is_false(is_free(42))
    outer:release()
    assert.is_true(is_free(42))
  end)

  it("takes a shared lock when told so", function()
    local lock = pglocks.advisory_lock("some lock", { shared = true })
    assert.is_true(lock.shared)
    assert.is_true(is_free("some lock", true))
    assert.is_false(is_free "some lock")
    assert.is_true(pglocks.advisory_lock("some lock", { shared = true, wait = false, using = "reports" }).acquired)
    lock:release()
    local held = other:lock("some lock", { shared = true })
    assert.is_true(pglocks.advisory_lock("some lock", { shared = true, wait = false }).acquired)
    assert.is_false(pglocks.advisory_lock("some lock", { shared = false, wait = false }).acquired)
    held:release()
  end)

  it("takes an exclusive lock unless told so", function()
    for _, options in ipairs { {}, { shared = false } } do
      local lock = pglocks.advisory_lock(42, options)
      assert.is_false(lock.shared)
      assert.is_false(is_free(42, true))
      lock:release()
    end
  end)

  it("takes the lock in the database that using names", function()
    local function database_of_locks()
      return support.observe([[SELECT string_agg(datname, ' ' ORDER BY datname) AS names
        FROM pg_locks l JOIN pg_database d ON d.oid = l.database WHERE locktype = 'advisory']])[1].names
    end
    local held = other:lock "some lock"
    local lock = pglocks.advisory_lock("some lock", { using = "reports" })
    assert.is_true(lock.acquired)
    assert.equal(second .. " " .. server.dbname, database_of_locks())
    held:release()
    assert.equal(second, database_of_locks())
    local default = pglocks.advisory_lock("some lock", { wait = false })
    assert.is_true(default.acquired)
    assert.equal(second .. " " .. server.dbname, database_of_locks())
    lock:release()
    assert.equal(server.dbname, database_of_locks())
    default:release()
  end)

  it("is released when its body ends, normally or with an error, as a decorator too", function()
    local import = pglocks.wrap("some lock", function(fail)
      assert.is_false(is_free "some lock")
      if fail then error "in the body" end
    end)
    import(false)
    assert.is_true(is_free "some lock")
    assert.is_truthy(raised(import, true):find "in the body")
    assert.is_true(is_free "some lock")
  end)
end)

for where, owner in pairs {
  ["of the module"] = function()
    pglocks.setup(support.conninfo)
    return function(method, ...) return pglocks[method](...) end
  end,
  ["of a connection"] = function()
    local conn = support.connect()
    return function(method, ...) return conn[method](conn, ...) end
  end,
} do
  local call, other
  local function begin() call, other = owner(), support.connect() end
  local function is_free(key)
    local lock = other:try_lock(key)
    return lock ~= nil and lock:release()
  end

  describe("with_lock " .. where, function()
    before_each(begin)
    after_each(finish)

    it("calls its function with the lock, the arguments, and all that they are", function()
      for _, options in ipairs { false, { timeout = 5 }, { shared = true } } do
        local function body(lock, ...)
          assert.is_true(lock:held())
          assert.equal("invoice 42", lock.name)
          assert.is_false(is_free "invoice 42")
          return nil, select("#", ...), ...
        end
        local returned
        if options then
          returned = pack(call("with_lock", "invoice 42", options, body, nil, "b", nil))
        else
          returned = pack(call("with_lock", "invoice 42", body, nil, "b", nil))
        end
        assert.same({ n = 5, nil, 3, nil, "b", nil }, returned)
        assert.is_true(is_free "invoice 42")
      end
      assert.same({ n = 0 }, pack(call("with_lock", 42, function() end)))
      assert.same({ n = 1 }, pack(call("with_lock", 42, nil, function() return nil end)))
      local many = {}
      for i = 1, 200 do many[i] = i end
      assert.same({ n = 200, unpack(many) }, pack(call("with_lock", 42, function(_, ...) return ... end, unpack(many))))
    end)

    it("takes whatever can be called", function()
      local callable = setmetatable({}, { __call = function(_, lock, a) return lock:held(), a end })
      assert.same({ true, "a" }, { call("with_lock", 42, callable, "a") })
      assert.same({ true, "a" }, { call("with_lock", 42, { shared = true }, callable, "a") })
    end)

    it("row 20, holding: keeps the error of its function, whatever that is, and releases before it goes on", function()
      for _, thrown in ipairs { setmetatable({}, {}), "a string", 42, true } do
        assert.equal(thrown, raised(call, "with_lock", 42, function() error(thrown, 0) end))
        assert.is_true(is_free(42))
      end
      assert.same({ n = 2, false }, pack(pcall(call, "with_lock", 42, function() error() end)))
      assert.is_true(is_free(42))
    end)

    it("never calls its function without the lock", function()
      local called = false
      local function body() called = true end
      other:lock(42)
      assert_code("timeout", call, "with_lock", 42, { timeout = 0 }, body)
      assert_code("timeout", call, "with_lock", 42, { timeout = 0.01 }, body)
      assert.is_false(pcall(call, "with_lock", {}, body))
      assert.is_false(pcall(call, "with_lock", 43, { timeuot = 1 }, body))
      assert.is_false(called)
    end)

    it("stacks", function()
      call("with_lock", 42, function()
        call("with_lock", 42, function() assert.is_false(is_free(42)) end)
        assert.is_false(is_free(42))
      end)
      assert.is_true(is_free(42))
    end)

    it("lets its function release, and yield", function()
      assert.equal("early", call("with_lock", 42, function(lock)
        assert.is_true(lock:release())
        assert.is_true(is_free(42))
        return "early"
      end))
      local thread = coroutine.wrap(function()
        return call("with_lock", 42, function() return coroutine.yield "inside" end)
      end)
      assert.equal("inside", thread())
      assert.is_false(is_free(42))
      assert.equal("after", thread "after")
      assert.is_true(is_free(42))
    end)

    it("raises lost when the lock was lost meanwhile, unless its function raised", function()
      local function lose(lock)
        support.observe("SELECT pg_terminate_backend($1)", holder())
        support.wait_until("the loss", function() return not lock:held() end)
      end
      assert.equal("57P01", assert_code("lost", call, "with_lock", 42, lose).sqlstate)
      begin()
      local thrown = {}
      assert.equal(thrown, raised(call, "with_lock", 42, function(lock)
        lose(lock)
        error(thrown)
      end))
    end)
  end)

  describe("try_with_lock " .. where, function()
    before_each(begin)
    after_each(finish)

    it("returns true and what its function returned", function()
      local function body(lock, ...)
        assert.is_true(lock:held())
        return nil, ...
      end
      assert.same({ n = 4, true, nil, "b", nil }, pack(call("try_with_lock", 42, body, "b", nil)))
      assert.same({ n = 4, true, nil, "b", nil },
        pack(call("try_with_lock", 42, { shared = true }, body, "b", nil)))
      assert.same({ n = 1, true }, pack(call("try_with_lock", 42, nil, function() end)))
      assert.is_true(is_free(42))
    end)

    it("returns false and why it could not have the lock, without calling", function()
      other:lock(42)
      local function body() error "called" end
      assert.same({ n = 2, false, "busy" }, pack(call("try_with_lock", 42, body)))
      assert.same({ n = 2, false, "busy" }, pack(call("try_with_lock", 42, { timeout = 0 }, body)))
      assert.same({ n = 2, false, "timeout" }, pack(call("try_with_lock", 42, { timeout = 0.01 }, body)))
    end)

    it("keeps the error of its function, and releases before it goes on", function()
      local thrown = {}
      assert.equal(thrown, raised(call, "try_with_lock", 42, function() error(thrown) end))
      assert.is_true(is_free(42))
    end)
  end)
end

describe("wrap", function()
  before_each(function() pglocks.setup(support.conninfo) end)
  after_each(finish)

  it("makes a function that locks at every call, and passes all through", function()
    local other = support.connect()
    local add = pglocks.wrap("import", { timeout = 0 }, function(...)
      assert.equal(1, #support.pg_locks())
      return select("#", ...), ...
    end)
    assert.same({}, support.pg_locks())
    for _ = 1, 3 do
      assert.same({ n = 4, 3, nil, "b", nil }, pack(add(nil, "b", nil)))
      assert.same({}, support.pg_locks())
    end
    local held = other:lock "import"
    assert_code("timeout", add)
    held:release()
    assert.same({ n = 1, 0 }, pack(add()))
  end)

  it("makes a function that may call itself", function()
    local factorial
    factorial = pglocks.wrap(42, function(n) return n <= 1 and 1 or n * factorial(n - 1) end)
    assert.equal(120, factorial(5))
    assert.same({}, support.pg_locks())
  end)

  it("keeps the error of its function", function()
    local thrown = {}
    assert.equal(thrown, raised(pglocks.wrap(42, function() error(thrown) end)))
    assert.same({}, support.pg_locks())
  end)

  it("finds out about wrong arguments at once", function()
    assert.is_truthy(raised(pglocks.wrap, {}, print):find("bad argument #1", 1, true))
    assert.is_truthy(raised(pglocks.wrap, 42, { hash = "sha256" }, print):find("bad argument #2", 1, true))
    assert.is_truthy(raised(pglocks.wrap, 42, { timeout = 5 }):find("bad argument #3", 1, true))
  end)
end)
