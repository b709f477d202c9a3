local pglocks = require "pglocks"
local support = require "spec.support"

local core = support.core

local function raised(...)
  local ok, err = pcall(...)
  assert.is_false(ok, "an error was expected")
  return err
end

describe("the scope of a lock", function()
  local conn, other
  before_each(function() conn, other = support.connect(), support.connect() end)
  after_each(support.finish)

  local function is_free(key)
    local lock = other:try_lock(key)
    return lock ~= nil and lock:release()
  end

  --- Inside the scope of a lock on 42.
  local function inside() assert.is_false(is_free(42)) end

  local thrown = setmetatable({}, { __tostring = function() return "thrown" end })

  local ways = {
    ["its end"] = function()
      do
        local lock <close> = conn:lock(42)
        inside()
        assert.is_true(lock:held())
      end
      assert.is_true(is_free(42))
    end,
    ["break"] = function()
      for i = 1, 3 do
        local _ <close> = conn:lock(42)
        inside()
        if i == 2 then break end
      end
      assert.is_true(is_free(42))
    end,
    ["goto"] = function()
      do
        local _ <close> = conn:lock(42)
        inside()
        goto out
      end
      ::out::
      assert.is_true(is_free(42))
    end,
    ["goto backwards"] = function()
      local round = 0
      ::again::
      round = round + 1
      assert.is_true(is_free(42))
      local _ <close> = conn:lock(42)
      inside()
      if round < 3 then goto again end
    end,
    ["return"] = function()
      local function body(...)
        local _ <close> = conn:lock(42)
        inside()
        return nil, is_free(42), ...
      end
      assert.same({ nil, false, "a", nil, n = 4 }, table.pack(body("a", nil)))
    end,
    ["error"] = function()
      assert.equal(thrown, raised(function()
        local _ <close> = conn:lock(42)
        inside()
        error(thrown)
      end))
    end,
    ["an error deep inside"] = function()
      local function deep(n)
        local _ <close> = conn:lock(42)
        inside()
        if n == 0 then error(thrown) end
        deep(n - 1)
      end
      assert.equal(thrown, raised(deep, 5))
    end,
    ["an error in a scope within, which raises another"] = function()
      local second = {}
      assert.equal(second, raised(function()
        local _ <close> = conn:lock(42)
        local bad <close> = setmetatable({}, { __close = function(_, err) -- luacheck: ignore bad
          assert.equal(thrown, err)
          inside()
          error(second)
        end })
        error(thrown)
      end))
    end,
    ["an error of a runtime"] = function()
      assert.is_truthy(raised(function()
        local _ <close> = conn:lock(42)
        return (nil).field
      end):find "attempt to index")
    end,
    ["coroutine.close"] = function()
      local thread = coroutine.create(function()
        local _ <close> = conn:lock(42)
        coroutine.yield()
      end)
      assert.is_true(coroutine.resume(thread))
      inside()
      assert.same({ true }, { coroutine.close(thread) })
    end,
    ["coroutine.close after an error"] = function()
      local thread = coroutine.create(function()
        local _ <close> = conn:lock(42)
        error(thrown)
      end)
      assert.same({ false, thrown }, { coroutine.resume(thread) })
      inside()
      assert.same({ false, thrown }, { coroutine.close(thread) })
    end,
    ["coroutine.wrap, which closes after an error"] = function()
      local thread = coroutine.wrap(function()
        local _ <close> = conn:lock(42)
        coroutine.yield()
        error(thrown)
      end)
      thread()
      inside()
      assert.equal(thrown, raised(thread))
    end,
    ["the end of a loop whose fourth value it is"] = function()
      local function locked(n)
        return function(_, i) if i < n then return i + 1 end end, nil, 0, conn:lock(42)
      end
      local sum = 0
      for i in locked(4) do
        inside()
        sum = sum + i
      end
      assert.equal(10, sum)
      assert.is_true(is_free(42))
      for i in locked(4) do
        if i == 2 then break end
      end
      assert.is_true(is_free(42))
      assert.equal(thrown, raised(function()
        for _ in locked(4) do error(thrown) end
      end))
    end,
    ["with_lock"] = function()
      assert.equal(thrown, raised(conn.with_lock, conn, 42, function()
        inside()
        error(thrown)
      end))
    end,
    ["coroutine.close inside with_lock"] = function()
      local thread = coroutine.create(function() conn:with_lock(42, coroutine.yield) end)
      assert.is_true(coroutine.resume(thread))
      inside()
      assert.is_true(coroutine.close(thread))
    end,
    ["the scope of its connection"] = function()
      do
        local own <close> = pglocks.connect(support.conninfo)
        own:lock(42)
        inside()
      end
      assert.same({}, support.pg_locks())
    end,
    ["scopes of both, in either order"] = function()
      do
        local own <close> = pglocks.connect(support.conninfo)
        local lock <close> = own:lock(42) -- luacheck: ignore lock
        inside()
      end
      assert.same({}, support.pg_locks())
      local lock
      do
        local own <close> = pglocks.connect(support.conninfo)
        lock = own:lock(42)
      end
      do local _ <close> = lock end
      assert.is_false(lock:held())
    end,
    ["its end, after it was released by hand"] = function()
      do
        local lock <close> = conn:lock(42)
        assert.is_true(lock:release())
        assert.is_true(is_free(42))
        other:lock(42)
      end
      assert.same({ "ExclusiveLock" }, { support.pg_locks(other.backend_pid)[1].mode })
      other:query "SELECT pg_advisory_unlock_all()"
    end,
    ["its end, where try_lock got nothing"] = function()
      local held = other:lock(42)
      do
        local lock <close> = conn:try_lock(42)
        assert.is_nil(lock)
      end
      do
        local lock <close> = core.attempt(conn, 42)
        assert.is_false(lock.acquired)
      end
      assert.is_true(held:check())
      held:release()
    end,
  }

  for way, run in pairs(ways) do
    it("row 20, holding: is left by " .. way, function()
      run()
      assert.is_true(is_free(42))
      assert.same({}, conn:locks())
      assert.is_true(conn:ping())
    end)
  end

  it("is left in an aborted transaction without masking the error that aborted it", function()
    local err = raised(conn.transaction, conn, function()
      local _ <close> = conn:lock(42)
      conn:query "SELECT 1/0"
    end)
    assert.equal("22012", err.sqlstate)
    support.wait_until("the release", function() return #support.pg_locks(conn.backend_pid) == 0 end)
    assert.is_true(is_free(42))
  end)

  --- The server ends the session; whether the client has noticed is another matter.
  local function kill()
    support.observe("SELECT pg_terminate_backend($1)", conn.backend_pid)
    support.wait_until("the session to end", function()
      return #support.observe("SELECT 1 FROM pg_stat_activity WHERE pid = $1", conn.backend_pid) == 0
    end)
  end

  for way, run in pairs {
    ["a scope"] = function()
      local _ <close> = conn:lock(42)
      kill()
      error(thrown)
    end,
    ["scopes of many locks"] = function()
      local a <close> = conn:lock(1) -- luacheck: ignore a
      local b <close> = conn:lock(1) -- luacheck: ignore b
      local c <close> = conn:lock { 7, 42 } -- luacheck: ignore c
      kill()
      error(thrown)
    end,
    ["the scope of the connection"] = function()
      local own <close> = conn
      own:lock(42)
      kill()
      error(thrown)
    end,
    ["with_lock"] = function()
      conn:with_lock(42, function()
        kill()
        error(thrown)
      end)
    end,
    ["try_with_lock"] = function()
      conn:try_with_lock(42, function()
        kill()
        error(thrown)
      end)
    end,
    ["a transaction"] = function()
      conn:transaction(function()
        local _ <close> = conn:lock(42)
        kill()
        error(thrown)
      end)
    end,
  } do
    it("keeps the error that leaves it when the server is dead: " .. way, function()
      local told = 0
      conn:close()
      conn = support.connect { on_lost = function() told = told + 1 error "in on_lost" end }
      assert.equal(thrown, raised(run))
      assert.is_false(conn:alive())
      assert.equal(1, told)
    end)
  end

  it("is left in silence when the server is dead and nothing was raised", function()
    do
      local _ <close> = conn:lock(42)
      kill()
    end
    assert.is_false(conn:alive())
  end)

  it("neither hides nor cuts the traceback of an error in a function that runs inside", function()
    local function innermost() error "here" end
    local function body() innermost() end
    for _, method in ipairs { "with_lock", "try_with_lock" } do
      local _, traceback = xpcall(conn[method], debug.traceback, conn, 42, body)
      assert.is_truthy(traceback:find("in upvalue 'innermost'", 1, true), traceback)
      local line = debug.getinfo(body, "S").linedefined
      assert.is_truthy(traceback:find(("scope_spec.lua:%d: in"):format(line), 1, true), traceback)
    end
    local _, traceback = xpcall(conn.transaction, debug.traceback, conn, body)
    assert.is_truthy(traceback:find("in upvalue 'innermost'", 1, true), traceback)
    pglocks.setup(support.conninfo)
    for _, fn in ipairs { pglocks.wrap(42, body), function() pglocks.with_lock(42, body) end } do
      _, traceback = xpcall(fn, debug.traceback)
      assert.is_truthy(traceback:find("in upvalue 'innermost'", 1, true), traceback)
    end
    pglocks.setup {}
  end)
end)

describe("the synopsis", function()
  after_each(function()
    pglocks.setup {}
    support.finish()
  end)

  -- As in the documentation, but for the conninfo strings and what is done inside.
  local synopsis = [[
local conn <close> = pglocks.connect "postgresql:///app"
do
  local lock <close> = conn:lock "invoice 42"
  seen(lock)
end
do
  local lock <close> = conn:try_lock("nightly", { timeout = 2.5 })
  if not lock then return end
  seen(lock)
end

pglocks.setup { databases = { default = "postgresql:///app", reports = "postgresql:///dw" } }
do local lock <close> = pglocks.lock({ 7, 42 }, { shared = true, using = "reports" }) seen(lock) end

do
  local lock <close> = pglocks.advisory_lock("some lock", { wait = false })
  if lock.acquired then seen(lock) end
end

pglocks.with_lock("invoice 42", { timeout = 5 }, function(lock) seen(lock) end)
local ran, result = pglocks.try_with_lock("nightly", function(lock) seen(lock) return "a result" end)
local import = pglocks.wrap("import", { timeout = 60 }, function(path) seen(path) return path end)
return ran, result, import "a path"
]]

  it("runs", function()
    local seen = {}
    local function see(lock)
      seen[#seen + 1] = type(lock) == "string" and lock or tostring(lock)
      assert.equal(1, #support.pg_locks())
    end
    local source = synopsis:gsub("postgresql:///%a+", support.conninfo)
    local returned = table.pack(assert(load("local pglocks, seen = ...\n" .. source))(pglocks, see))
    assert.same({ true, "a result", "a path", n = 3 }, returned)
    assert.same({
      'pglocks lock: "invoice 42", exclusive, held', 'pglocks lock: "nightly", exclusive, held',
      "pglocks lock: (7, 42), shared, held", 'pglocks lock: "some lock", exclusive, held',
      'pglocks lock: "invoice 42", exclusive, held', 'pglocks lock: "nightly", exclusive, held', "a path",
    }, seen)
    assert.same({}, support.pg_locks())
  end)

  it("returns where it says so when the lock is not to be had", function()
    local held = support.connect():lock "nightly"
    local source = synopsis:gsub("postgresql:///%a+", support.conninfo):gsub("2%.5", "0.05")
    local seen = {}
    local function see(lock) seen[#seen + 1] = lock.name end
    assert.equal(0, select("#", assert(load("local pglocks, seen = ...\n" .. source))(pglocks, see)))
    assert.same({ "invoice 42" }, seen)
    assert.equal("nightly", held:check() and held.name)
  end)
end)
