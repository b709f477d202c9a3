-- What the module is to the program that loads it: what it links to, what it leaves alone, and
-- that it keeps silent.

local support = require "spec.support"

local function nm(flags)
  local path = assert(package.searchpath("pglocks.core", package.cpath))
  local pipe = assert(io.popen(("nm -D %s '%s'"):format(flags, path)))
  local names = {}
  for line in pipe:lines() do names[#names + 1] = line:match "([^ @]+)[^ ]*$" end
  pipe:close()
  return names
end

--- Runs `script` in another process; what it prints, which ought to be nothing. Its function
--- `done` must have been called.
local function prints(script)
  local path = os.tmpname()
  finally(function() os.remove(path) end)
  local process = support.spawn([[
    local conninfo, path = ...
    local function done()
      local file = assert(io.open(path, "w"))
      file:write "done"
      file:close()
    end
  ]] .. script, support.conninfo, path)
  local said = {}
  for line in process.lines do said[#said + 1] = line end
  process.close()
  local file = assert(io.open(path))
  if file:read "*a" ~= "done" then said[#said + 1] = "(it did not come to its end)" end
  file:close()
  return table.concat(said, "\n")
end

describe("the shared library", function()
  it("uses nothing of libpq that blocks, resets or hides a result", function()
    local names = nm "--undefined-only"
    local uses = {}
    for _, name in ipairs(names) do uses[name] = true end
    assert.is_true(uses.PQsendQueryPrepared and uses.PQconnectStartParams)
    for _, name in ipairs(names) do
      for _, pattern in ipairs {
        "^PQexec", "^PQprepare$", "^PQconnectdb", "^PQfn$", "^PQreset", "^PQsetdb", "^PQdescribe",
      } do
        assert.is_nil(name:find(pattern), name)
      end
    end
  end)

  it("exports its opening function alone", function()
    assert.same({ "luaopen_pglocks_core" }, nm "--defined-only")
  end)
end)

describe("requiring pglocks", function()
  it("sets no global, and loads nothing but its own modules", function()
    assert.equal("", prints [[
      local function copy(from)
        local to = {}
        for name, value in pairs(from) do to[name] = value end
        return to
      end
      local libraries = { "string", "table", "math", "io", "os", "debug", "coroutine", "package" }
      local before, loaded, inside = copy(_G), copy(package.loaded), {}
      for _, name in ipairs(libraries) do inside[name] = copy(_G[name]) end

      local function compare(what, now, then_, allowed)
        for name, value in pairs(now) do
          if then_[name] ~= value and not (allowed and tostring(name):find(allowed)) then
            print(what .. tostring(name) .. " is new or another one")
          end
        end
        for name in pairs(then_) do
          if now[name] == nil then print(what .. tostring(name) .. " is gone") end
        end
      end
      local function compare_all()
        compare("", _G, before)
        compare("package.loaded.", package.loaded, loaded, "^pglocks")
        for _, name in ipairs(libraries) do compare(name .. ".", _G[name], inside[name]) end
        if getmetatable(_G) then print "_G has a metatable" end
      end

      local pglocks = require "pglocks"
      compare_all()
      local conn = pglocks.connect(conninfo)
      conn:lock("x"):release()
      conn:close()
      compare_all()
      done()
    ]])
  end)

  it("again is harmless: connections, locks and keys of both go together", function()
    assert.equal("", prints [[
      local function load_anew()
        for name in pairs(package.loaded) do
          if name:find "^pglocks" then package.loaded[name] = nil end
        end
        return require "pglocks"
      end
      local pglocks = require "pglocks"
      assert(require "pglocks" == pglocks)
      local conn = pglocks.connect(conninfo)
      local lock = conn:lock "x"
      local another = load_anew()
      assert(another ~= pglocks)
      local other = another.connect(conninfo)
      assert(other:try_lock "x" == nil and lock:held() and lock:check())
      assert(pglocks.key "x" == another.key "x" and lock.key == another.key "x")
      assert(lock:release())
      for _, one in ipairs { conn, other } do
        assert(one:with_lock("x", function(held) return held:check() end))
        assert(one:transaction(function() return one:query("SELECT 1 AS one")[1].one end) == 1)
        local ok, err = pcall(one.query, one, "SELECT")
        assert(ok or tostring(err))
      end
      for _ = 1, 20 do load_anew() end
      conn, other, lock, pglocks, another = nil
      collectgarbage()
      done()
    ]])
  end)
end)

describe("an ordinary life", function()
  after_each(support.finish)

  it("prints nothing on stdout or stderr", function()
    assert.equal("", prints [[
      local pglocks = require "pglocks"
      local conn, other = pglocks.connect(conninfo), pglocks.connect { conninfo = conninfo, release = "deferred" }

      -- keys, locks and waits that end in every way
      for _, key in ipairs { 42, { 7, -42 }, "invoice 42", pglocks.key "invoice 42" } do
        for _, shared in ipairs { false, true } do
          local lock = conn:lock(key, { shared = shared, comment = true })
          assert(lock:held() and lock:check() and tostring(lock) and #conn:locks() == 1)
          assert(other:try_lock(key) == nil)
          assert(other:try_lock(key, { timeout = 0.002 }) == nil)
          local ok, err = pcall(other.lock, other, key, { timeout = 0.002 })
          assert(not ok and err.code == "timeout" and tostring(err))
          local nested = conn:lock(key, { shared = shared })
          assert(nested:release() and lock:release())
          assert(select(2, lock:release()) == "not held")
          other:lock(key, { shared = shared }):release()
        end
      end
      assert(conn:with_lock("x", function() return 7 end) == 7)
      assert(not pcall(conn.with_lock, conn, "x", error))
      assert(conn:try_with_lock("x", function() end))
      assert(not pcall(conn.lock, conn, "x", { timuot = 1 }))
      assert(not pcall(conn.lock, conn, 1.5))

      -- queries: notices, warnings and errors of the server among them
      conn:query "DO $$ BEGIN RAISE NOTICE 'a notice'; RAISE WARNING 'a warning'; RAISE INFO 'an info'; END $$"
      conn:query "SELECT pg_advisory_unlock(1)"
      conn:query "COMMIT"
      assert(not pcall(conn.query, conn, "SELEKT 1"))
      conn:transaction(function() return conn:query "SELECT 1" end)
      assert(not pcall(conn.transaction, conn, function() error "rolled back" end))
      assert(not pcall(conn.transaction, conn, function() conn:query "SELECT 1/0" end))
      assert(conn:ping() and conn:alive() and not conn:cancel() and tostring(conn))

      -- module-level locks
      pglocks.setup { databases = { default = conninfo } }
      pglocks.lock("y"):release()
      pglocks.with_lock("y", function() end)
      pglocks.wrap("y", function() end)()
      pglocks.advisory_lock("y", { wait = false }):release()
      assert(not pcall(pglocks.lock, "y", { using = "nowhere" }))

      -- locks and connections that are lost, never opened, or left to the collector
      local lock = other:lock "z"
      conn:query("SELECT pg_terminate_backend($1)", other.backend_pid)
      assert(not pcall(other.query, other, "SELECT pg_sleep(10)"))
      assert(not lock:held() and not other:alive())
      assert(not pcall(lock.release, lock))
      other:close()
      assert(not pcall(pglocks.connect, { host = "/nowhere", timeout = 0.1 }))
      assert(not pcall(pglocks.connect, "password=my s3cret"))
      other = pglocks.connect { conninfo = conninfo, on_lost = function() error "on_lost itself" end }
      conn:query("SELECT pg_terminate_backend($1)", other.backend_pid)
      assert(not pcall(other.query, other, "SELECT pg_sleep(10)"))
      other, lock = pglocks.connect(conninfo), nil
      other:lock "left behind"
      other = nil
      collectgarbage()
      collectgarbage()
      local scope = pglocks.connect(conninfo)
      getmetatable(scope).__close(scope)
      conn:lock "held at the end"
      done()
    ]])
  end)
end)
