-- resty.pglocks inside nginx: lua-resty-lock's contract, sentence by sentence.

local support = require "spec.support"
local server = require "spec.nginx.server"

if not server.available() then return end -- nginx_spec.lua says so

local pglocks = require "pglocks"
local observe, pg_locks, wait_until = support.observe, support.pg_locks, support.wait_until

local HTTP = [[
  init_by_lua_block {
    local conninfo = os.getenv "PGLOCKS_TEST_CONNINFO"
    local resty_pglocks = require "resty.pglocks"
    resty_pglocks.setup("locks", { conninfo = conninfo, application_name = "locks" })
    resty_pglocks.setup("others", conninfo)
    resty_pglocks.setup("deferred", { conninfo = conninfo, release = "deferred" })
    resty_pglocks.setup("unused", { conninfo = conninfo, application_name = "unused" })
    resty_pglocks.setup("nowhere", { host = "127.0.0.1", port = "1", timeout = 0.2 })
    require "pglocks".setup(conninfo)
    state = {} -- of the worker: a request's globals are its own, tables are not

    -- Every value, so that one is told from one and a nil.
    function say(...)
      local values = { ... }
      for i = 1, select("#", ...) do values[i] = tostring(values[i]) end
      ngx.say(table.concat(values, " "))
      ngx.flush(true)
    end

    -- Waits until the spec lets go of a lock of that name.
    function wait_for(gate)
      require "pglocks".with_lock(gate, { shared = true }, function() end)
    end
  }
  init_worker_by_lua_block {
    require "resty.pglocks".setup("of this worker", os.getenv "PGLOCKS_TEST_CONNINFO")
  }
]]

local PRELUDE = [[
  local resty_pglocks = require "resty.pglocks"
  local function new(opts, name) return assert(resty_pglocks:new(name or "locks", opts)) end
]]

local locations = {}

--- Makes a location of some code: its path.
local function location(code)
  locations[#locations + 1] = code
  return "/" .. #locations
end

local function all_locations()
  local all = {}
  for i, code in ipairs(locations) do
    all["= /" .. i] = type(code) == "table" and code or PRELUDE .. code
  end
  return all
end

local nginx

--- A test: the code says these lines.
local function says(title, code, ...)
  local path, expected = location(code), table.concat({ ... }, "\n") .. "\n"
  it(title, function() assert.equal(expected, (nginx:get(path))) end)
end

-- The rows of pg_locks of a key of the dictionary "locks".
local function rows_of(name)
  local key = pglocks.key(name, { namespace = "locks" })
  return observe([[SELECT pid, granted FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1
    AND classid = $1::bigint::oid AND objid = $2::bigint::oid]], key.classid, key.objid)
end

local function holder_of(name)
  local row = rows_of(name)[1]
  return row and row.granted and row.pid or nil
end

local function wait_until_free(name)
  wait_until(name .. " to be free", function() return #rows_of(name) == 0 end)
end

-- Holds a key of the dictionary "locks", in this process.
local function hold(name, options)
  return support.connect(options):lock(name, { namespace = "locks" })
end

local function wait_until_waited_for(name)
  wait_until("somebody to wait for " .. name, function()
    for _, row in ipairs(rows_of(name)) do
      if not row.granted then return true end
    end
  end)
end

local function backends_named(name)
  return #observe("SELECT 1 AS one FROM pg_stat_activity WHERE application_name = $1", name)
end

describe("resty.pglocks", function()
  setup(function() nginx = server.start { http = HTTP, locations = all_locations() } end)

  teardown(function()
    local errors = nginx:errors()
    nginx:stop()
    assert.equal("", errors)
  end)

  after_each(support.finish)

  -- ---- setup and new --------------------------------------------------------------------

  do
    local path = location [[
      local lock = new(nil, "unused")
      say(lock:lock "first")
      say(lock:unlock())
    ]]

    it("opens nothing before the first lock", function()
      assert.equal(0, backends_named "unused")
      assert.equal("0\n1\n", (nginx:get(path)))
      assert.equal(1, backends_named "unused")
    end)

    it("uses its connections again", function()
      for _ = 1, 8 do assert.equal("0\n1\n", (nginx:get(path))) end
      assert.is_true(backends_named "unused" <= 2, "more than workers")
    end)
  end

  says("takes what connect takes, in init_by_lua, init_worker_by_lua and later", [[
    resty_pglocks.setup("as a table", { conninfo = os.getenv "PGLOCKS_TEST_CONNINFO", pool_size = 1 })
    for _, name in ipairs { "locks", "of this worker", "as a table" } do say(new(nil, name):lock "a") end
  ]], "0", "0", "0")

  do
    local path = location [[
      say(pcall(resty_pglocks.setup, 42, ""))
      say(pcall(resty_pglocks.setup, "wrong", 42))
      say(pcall(resty_pglocks.setup, "wrong", { pasword = "secret" }))
      say(pcall(resty_pglocks.setup, "wrong", { scheduler = "blocking" }))
      say(resty_pglocks:new "wrong")
    ]]

    it("refuses other descriptions", function()
      local said = nginx:get(path)
      assert.is_truthy(said:find("^false [^\n]*bad argument #1 to '[^\n]*name of a dictionary expected, got number"
        .. ".*\nfalse [^\n]*conninfo string or table expected, got number"
        .. ".*\nfalse [^\n]*unknown key 'pasword'"
        .. ".*\nfalse [^\n]*'scheduler'"
        .. ".*\nnil dictionary not found\n$"), said)
    end)
  end

  says("does not find a dictionary that was not set up", [[
    say(resty_pglocks:new "nobody's")
    say(resty_pglocks:new(nil))
  ]], "nil dictionary not found", "nil dictionary not found")

  says("takes lua-resty-lock's options", [[
    local lock = new { timeout = 1, exptime = 2, step = 0.01, ratio = 3, max_step = 1 }
    say(lock.timeout, lock.exptime)
    say(new().timeout, new().exptime)
    say(new({ timeout = 60 }).timeout, new({ timeout = 60, exptime = 0 }).timeout, new({ exptime = 2 }).timeout)
  ]], "1 2", "5 30", "30 60 5")

  do
    local path = location [[
      for _, opts in ipairs { { timeout = "5" }, { exptime = {} }, { step = true }, { ratio = "2" },
          { max_step = "x" }, { timeout = 0/0 }, { exptime = math.huge }, { exptime = -1 }, { timeuot = 5 }, 5 } do
        local ok, err = pcall(function() resty_pglocks:new("locks", opts) end)
        say(ok, (err:match "bad argument #2 to 'new' (.*)"))
      end
    ]]

    it("names an option that is not a number", function()
      assert.equal([[
false (option 'timeout': number expected, got string)
false (option 'exptime': number expected, got table)
false (option 'step': number expected, got boolean)
false (option 'ratio': number expected, got string)
false (option 'max_step': number expected, got string)
false (option 'timeout': number expected, got nan)
false (option 'exptime': number expected, got inf)
false (option 'exptime': seconds, at least 0, expected)
false (unknown option 'timeuot')
false (table of options expected, got number)
]], (nginx:get(path):gsub("-nan", "nan")))
    end)
  end

  -- ---- lock -----------------------------------------------------------------------------

  says("locks and unlocks, with one value each", [[
    local lock = new()
    for _ = 1, 2 do
      say(lock:lock "a")
      say(lock:unlock())
    end
  ]], "0", "1", "0", "1")

  do
    local path = location [[
      local elapsed = { new():lock "a" }
      say(#elapsed, elapsed[1] > 0 and elapsed[1] < 5)
    ]]

    it("waits, and says how long", function()
      local held = hold "a"
      local request = nginx:begin(path)
      wait_until_waited_for "a"
      held:release()
      assert.equal("1 true\n", request.body())
    end)
  end

  says("locks no nil", [[
    say(new():lock())
    say(new():lock(nil))
    say(new():lock(false))
  ]], "nil nil key", "nil nil key", "nil nil key")

  says("has one lock at a time", [[
    local lock = new()
    say(lock:lock "a")
    say(lock:lock "a")
    say(lock:lock "b")
    say(lock:unlock())
    say(lock:lock "b")
  ]], "0", "nil locked", "nil locked", "1", "0")

  do
    local path = location [[
      local lock = new()
      local thread = ngx.thread.spawn(function() say(lock:lock "a") end)
      say(lock:lock "b")
      ngx.thread.wait(thread)
      wait_for "gate"
      say(lock:unlock())
    ]]

    it("has one, too, where two light threads lock it", function()
      local held, gate = hold "a", support.connect():lock "gate"
      local request = nginx:begin(path)
      assert.equal("0", request.line())
      wait_until_waited_for "a"
      held:release()
      assert.equal("nil locked", request.line())
      wait_until_free "a"
      gate:release()
      assert.equal("1\n", request.body())
    end)
  end

  do
    local path = location [[ say(new({ timeout = 0.05 }):lock "a") ]]
    local once = location [[
      say(new({ timeout = 0 }):lock "a")
      say(new({ timeout = -1 }):lock "a")
    ]]
    local bounded = location [[ say(new({ timeout = 60, exptime = 0.05 }):lock "a") ]]

    it("times out", function()
      hold "a"
      local seconds, said = support.timed(nginx.get, nginx, path)
      assert.equal("nil timeout\n", said)
      assert.is_true(seconds >= 0.05, "only " .. seconds)
    end)

    it("tries once when timeout is 0, or less", function()
      local held = hold "a"
      local seconds, said = support.timed(nginx.get, nginx, once)
      assert.equal("nil timeout\nnil timeout\n", said)
      assert.is_true(seconds < 5, "as many as " .. seconds)
      held:release()
      assert.equal("0\nnil timeout\n", (nginx:get(once)))
    end)

    it("waits no longer than exptime", function()
      hold "a"
      local seconds, said = support.timed(nginx.get, nginx, bounded)
      assert.equal("nil timeout\n", said)
      assert.is_true(seconds < 10, "as many as " .. seconds)
    end)
  end

  says("has objects of one request exclude each other", [[
    local one, other = new(), new { timeout = 0.01 }
    say(one:lock "a")
    say(other:lock "a")
    say(one:unlock())
    say(other:unlock())
    say(other:lock "a")
  ]], "0", "nil timeout", "1", "nil unlocked", "0")

  do
    local path = location [[
      local values = { new(nil, "nowhere"):lock "a" }
      say(values[1], type(values[2]), (values[2]:match "pglocks: connect"))
    ]]

    it("says what went wrong as text", function()
      assert.equal("nil string pglocks: connect\n", (nginx:get(path)))
    end)
  end

  says("takes a number for the name that it is written as", [[
    say(new():lock(42))
    say(new({ timeout = 0 }):lock "42")
    say(new({ timeout = 0 }):lock(42))
    say(new({ timeout = 0 }):lock(43))
  ]], "0", "nil timeout", "nil timeout", "0")

  do
    local path = location [[
      for _, key in ipairs { true, {}, say } do
        local ok, err = pcall(function() new():lock(key) end)
        say(ok, (err:match "bad argument #1 to 'lock' (.*)"))
      end
    ]]

    it("refuses other keys", function()
      assert.equal([[
false (string or number as the key expected, got boolean)
false (string or number as the key expected, got table)
false (string or number as the key expected, got function)
]], (nginx:get(path)))
    end)
  end

  says("keeps dictionaries apart", [[
    say(new(nil, "locks"):lock "a")
    say(new(nil, "others"):lock "a")
    say(new({ timeout = 0 }, "others"):lock "a")
  ]], "0", "0", "nil timeout")

  do
    local path = location [[ say(new({ timeout = 0 }):lock(ngx.var.arg_key)) ]]

    it("excludes pglocks.lock with the dictionary's namespace", function()
      hold "a"
      assert.equal("nil timeout\n", (nginx:get(path .. "?key=a")))
      assert.equal("0\n", (nginx:get(path .. "?key=b")))
    end)
  end

  -- ---- unlock ---------------------------------------------------------------------------

  for _, name in ipairs { "locks", "deferred" } do
    do
      local path = location(([[
        local lock = new(nil, %q)
        say(lock:lock "a")
        say(lock:unlock())
        wait_for "gate"
      ]]):format(name))

      it("frees the lock while the request goes on, of " .. name, function()
        local gate = support.connect():lock "gate"
        local request = nginx:begin(path)
        assert.equal("0", request.line())
        assert.equal("1", request.line())
        wait_until("the gate's lock alone", function()
          local rows = pg_locks()
          return #rows == 2 and rows[1].objid == rows[2].objid
        end)
        gate:release()
        request.body()
      end)
    end
  end

  says("leaves the key free, for one who tries once, too", [[
    local one, two, other = new(), new(), new { timeout = 0 }
    local failed = 0
    for _ = 1, 200 do
      one:lock "a"
      two:lock "b"
      two:unlock() -- so that a second connection is there, which asks beside the first
      one:unlock()
      if other:lock "a" ~= 0 or other:unlock() ~= 1 then failed = failed + 1 end
    end
    say(failed)
  ]], "0")

  says("unlocks once", [[
    local lock = new()
    say(lock:unlock())
    say(lock:lock "a")
    say(lock:unlock())
    say(lock:unlock())
  ]], "nil unlocked", "0", "1", "nil unlocked")

  for _, name in ipairs { "locks", "deferred" } do
    local path = location(([[
      local lock = new(nil, %q)
      say(lock:lock "lost")
      wait_for "gate"
      local values = { lock:unlock() }
      say(#values, values[1], type(values[2]), (values[2]:match "pglocks: lost" or values[2]))
      say(lock:unlock())
      say(lock:lock "lost")
    ]]):format(name))

    it("does not pretend to unlock what was lost, of " .. name, function()
      local gate = support.connect():lock "gate"
      local request = nginx:begin(path)
      assert.equal("0", request.line())
      local key = pglocks.key("lost", { namespace = name })
      local pid = observe("SELECT pid FROM pg_locks WHERE objid = $1::bigint::oid", key.objid)[1].pid
      observe("SELECT pg_terminate_backend($1)", pid)
      wait_until("its backend to end", function() return #pg_locks(pid) == 0 end)
      gate:release()
      assert.equal("2 nil string pglocks: lost", request.line())
      assert.equal("nil unlocked\n0\n", request.body())
    end)
  end

  do
    local kept = location [[
      state.late = new()
      say(state.late:lock "late")
    ]]
    local late = location [[ if state.late then say(state.late:unlock()) else say "another worker" end ]]

    it("says that it is unlocked when its request has ended", function()
      assert.equal("0\n", (nginx:get(kept)))
      wait_until_free "late"
      local said
      wait_until("that worker", function()
        said = nginx:get(late)
        return said ~= "another worker\n"
      end)
      assert.equal("nil unlocked\n", said)
    end)
  end

  -- ---- expire and exptime ---------------------------------------------------------------

  says("expires later, with one value", [[
    local lock = new { exptime = 10 }
    say(lock:expire())
    say(lock:lock "a")
    say(lock:expire(100))
    say(math.ceil(lock.dict:ttl "a"))
    say(lock:expire(nil))
    say(math.ceil(lock.dict:ttl "a"))
    say(lock:expire(0))
    say(lock.dict:ttl "a")
    say(lock:unlock())
    say(lock:expire())
  ]], "nil unlocked", "0", "true", "100", "true", "10", "true", "0", "1", "nil unlocked")

  do
    local path = location [[
      for _, time in ipairs { "1", {}, -1, 0/0, math.huge } do
        local ok, err = pcall(function() new():expire(time) end)
        say(ok, (err:match "bad argument #1 to 'expire' (.*)"))
      end
    ]]

    it("refuses other times", function()
      assert.equal([[
false (seconds, at least 0, expected, got string)
false (seconds, at least 0, expected, got table)
false (seconds, at least 0, expected, got -1)
false (seconds, at least 0, expected, got nan)
false (seconds, at least 0, expected, got inf)
]], (nginx:get(path):gsub("-nan", "nan")))
    end)
  end

  do
    local path = location [[
      local lock = new { exptime = 0.2 }
      say(lock:lock "a")
      wait_for "gate"
      say(lock.dict:ttl "a")
      say(lock:expire())
      say(lock:unlock())
      say(lock:lock "a")
      say(lock:unlock())
    ]]

    it("ends a hold at exptime, while the request goes on", function()
      local gate = support.connect():lock "gate"
      local request = nginx:begin(path)
      assert.equal("0", request.line())
      assert.is_truthy(holder_of "a")
      wait_until_free "a"
      gate:release()
      assert.equal("nil not found\nnil not found\nnil unlocked\n0\n1\n", request.body())
    end)
  end

  -- Without being woken, who looks at the clock does so once a second.
  says("ends a hold in time", [[
    local long, short, shortest = new(), new { exptime = 0.01 }, 1
    say(long:lock "long")
    for _ = 1, 4 do
      short:lock "short"
      local began = ngx.now()
      while short.dict:ttl "short" do
        ngx.sleep(0.001)
        ngx.update_time()
      end
      shortest = math.min(shortest, ngx.now() - began)
    end
    say(shortest < 0.5)
    say(long:unlock())
  ]], "0", "true", "1")

  -- Who looks at the clock was about to stop.
  says("ends a hold that began when there had been none for a while", [[
    local lock = new { exptime = 0.5 }
    for _ = 1, 3 do
      say(lock:lock "a")
      say(lock:unlock())
      ngx.sleep(0.6)
      say(lock:lock "a")
      while lock.dict:ttl "a" do ngx.sleep(0.01) end
      say(lock:unlock())
    end
  ]], "0", "1", "0", "nil unlocked", "0", "1", "0", "nil unlocked", "0", "1", "0", "nil unlocked")

  do
    local path = location [[
      local renewed, short = new { exptime = 0.1 }, new { exptime = 0.1 }
      say(renewed:lock "renewed")
      say(renewed:expire(30))
      say(short:lock "short")
      wait_for "gate"
      say(renewed:unlock())
    ]]

    it("ends no hold that was renewed", function()
      local gate = support.connect():lock "gate"
      local request = nginx:begin(path)
      for _, line in ipairs { "0", "true", "0" } do assert.equal(line, request.line()) end
      wait_until_free "short" -- which was to end after it
      assert.is_truthy(holder_of "renewed")
      gate:release()
      assert.equal("1\n", request.body())
    end)
  end

  do
    local path = location [[
      local long, short = new { exptime = 600 }, new()
      say(long:lock "long") -- the next look at the clock is far away
      say(short:lock "short")
      say(short:expire(0.01))
      wait_for "gate"
    ]]

    it("ends a hold that was made shorter", function()
      local gate = support.connect():lock "gate"
      local request = nginx:begin(path)
      for _, line in ipairs { "0", "0", "true" } do assert.equal(line, request.line()) end
      wait_until_free "short"
      assert.is_truthy(holder_of "long")
      gate:release()
      request.body()
    end)
  end

  do
    local path = location [[
      local late, same = new { exptime = 0.05 }, new { exptime = 0.05 }
      say(late:lock "a")
      say(same:lock "b")
      wait_for "gate"
      local other = new()
      say(other:lock "a")
      say(same:lock "b")
      say(same:expire(30))
      say(late:expire())
      say(late:unlock())
      wait_for "another gate"
      say(other:unlock())
      say(same:unlock())
    ]]

    it("leaves alone what somebody else took after exptime, and what the same object took", function()
      local gate, another = support.connect():lock "gate", support.connect():lock "another gate"
      local request = nginx:begin(path)
      assert.equal("0\n0", request.line() .. "\n" .. request.line())
      wait_until_free "a"
      wait_until_free "b"
      gate:release()
      for _, line in ipairs { "0", "0", "true", "nil not found", "nil unlocked" } do
        assert.equal(line, request.line())
      end
      assert.is_truthy(holder_of "a")
      assert.is_truthy(holder_of "b")
      another:release()
      assert.equal("1\n1\n", request.body())
    end)
  end

  do
    local path = location [[
      local lock = new()
      say(lock:lock "a")
      wait_for "gate"
      say(lock:expire())
      say(lock.dict:ttl "a")
    ]]

    it("does not prolong what was lost", function()
      local gate = support.connect():lock "gate"
      local request = nginx:begin(path)
      assert.equal("0", request.line())
      local pid = holder_of "a"
      observe("SELECT pg_terminate_backend($1)", pid)
      wait_until("its backend to end", function() return #pg_locks(pid) == 0 end)
      gate:release()
      assert.equal("nil not found\nnil not found\n", request.body())
    end)
  end

  -- ---- the end of objects and of requests -----------------------------------------------

  do
    local path = location [[
      local function leave() say(new({ exptime = tonumber(ngx.var.arg_exptime) }):lock "a") end
      leave()
      wait_for "gate"
      collectgarbage()
      collectgarbage()
      say "collected"
      wait_for "another gate"
    ]]

    for _, exptime in ipairs { 600, 0 } do
      it("frees the lock of an object that is collected, with exptime = " .. exptime, function()
        local gate, another = support.connect():lock "gate", support.connect():lock "another gate"
        local request = nginx:begin(path .. "?exptime=" .. exptime)
        assert.equal("0", request.line())
        assert.is_truthy(holder_of "a")
        gate:release()
        assert.equal("collected", request.line())
        wait_until_free "a"
        another:release()
        request.body()
      end)
    end
  end

  do
    local path = location [[
      kept = new()
      say(kept:lock "a")
    ]]

    it("ends a hold with the request that took it", function()
      assert.equal("0\n", (nginx:get(path)))
      wait_until_free "a"
    end)
  end

  -- ---- how it is called -----------------------------------------------------------------

  do
    local path = location [[
      local lock = resty_pglocks:new("locks", { exptime = 10, timeout = 0 })
      say(resty_pglocks.lock(lock, "a"))
      say(math.ceil(lock.dict:ttl "a"), lock.dict:ttl "b")
      say(resty_pglocks.expire(lock))
      say(resty_pglocks.lock(resty_pglocks:new("locks", { timeout = 0 }), "a"))
      say(lock:unlock "a")
    ]]

    it("serves callers such as Kong", function()
      assert.equal("0\n10 nil not found\ntrue\nnil timeout\n1\n", (nginx:get(path)))
    end)
  end

  says("knows the holds of numbers, too", [[
    local lock = new()
    say(lock:lock(42))
    say(math.ceil(lock.dict:ttl(42)), math.ceil(lock.dict:ttl "42"))
    say(new(nil, "others").dict:ttl(42))
  ]], "0", "30 30", "nil not found")

  -- What lua-resty-lock's users write around one line, which says which module it is.
  says("runs a program that was written for resty.lock", [[
    local resty_lock = require "resty.pglocks"
    local cache = {}
    local function fetch(key)
      local lock, err = resty_lock:new "locks"
      if not lock then return nil, err end
      local elapsed, failed = lock:lock(key)
      if not elapsed then return nil, failed end
      local value = cache[key]
      if not value then
        ngx.sleep(0.001)
        value = "fetched"
        cache[key] = value
      else
        value = "found"
      end
      local ok, wrong = lock:unlock()
      if not ok then return nil, wrong end
      return value
    end
    local values, threads = {}, {}
    for i = 1, 5 do
      threads[i] = ngx.thread.spawn(function() table.insert(values, fetch "x") end)
    end
    for i = 1, 5 do ngx.thread.wait(threads[i]) end
    say(unpack(values))
  ]], "fetched found found found found")

  -- ---- phases ---------------------------------------------------------------------------

  for _, phase in ipairs { "rewrite", "access" } do
    local path = location { ([[
      %s_by_lua_block {
        ngx.ctx.lock = require "resty.pglocks":new "locks"
        ngx.ctx.elapsed = ngx.ctx.lock:lock "a"
      }
      content_by_lua_block {
        say(ngx.ctx.elapsed)
        say(ngx.ctx.lock:unlock())
      }
    ]]):format(phase) }

    it("locks in " .. phase .. " and unlocks in content", function()
      assert.equal("0\n1\n", (nginx:get(path)))
    end)
  end

  for _, phase in ipairs { "header_filter", "body_filter", "log" } do
    local path = location { ([[
      content_by_lua_block {
        ngx.ctx.lock = require "resty.pglocks":new "locks"
        ngx.ctx.lock:lock "a"
        ngx.print "held"
      }
      %s_by_lua_block {
        if not ngx.ctx.lock then return end
        local ok, err = ngx.ctx.lock:unlock()
        local elapsed, refused = require "resty.pglocks":new "locks":lock "b"
        ngx.ctx.lock = nil
        ngx.log(ngx.NOTICE, "%s: ", tostring(ok), " ", tostring(err), "; ", tostring(elapsed), " ", refused)
      }
    ]]):format(phase, phase) }

    it("unlocks in " .. phase .. ", where nothing can be waited for", function()
      assert.equal("held", (nginx:get(path)))
      local line = wait_until("its line in the log", function()
        return support.read(nginx.prefix .. "/error.log"):match("[^\n]* " .. phase .. ": [^\n]*")
      end)
      assert.is_truthy(line:find(": 1 nil; nil pglocks: nginx cannot wait in " .. phase, 1, true), line)
      wait_until_free "a"
    end)
  end

  do
    local path = location [[
      ngx.ctx.lock = new()
      say(ngx.ctx.lock:lock "a")
      local lock = ngx.ctx.lock
      assert(ngx.timer.at(0, function() unlocked = { lock:unlock() } end))
      while not unlocked do ngx.sleep(0.001) end
      say(unpack(unlocked))
      unlocked = nil
      wait_for "gate"
    ]]

    it("unlocks in a timer what a request holds", function()
      local gate = support.connect():lock "gate"
      local request = nginx:begin(path)
      assert.equal("0", request.line())
      assert.equal("1", request.line())
      wait_until_free "a"
      gate:release()
      request.body()
    end)
  end

  do
    local path = location [[
      local said
      assert(ngx.timer.at(0, function()
        local lock = new()
        local elapsed = lock:lock "a"
        said = { elapsed, lock:expire(), lock:unlock() }
      end))
      while not said do ngx.sleep(0.001) end
      say(unpack(said))
    ]]

    it("locks in a timer", function() assert.equal("0 true 1\n", (nginx:get(path))) end)
  end

  -- ---- workers --------------------------------------------------------------------------

  do
    local path = location [[
      local lock = new { exptime = 600 }
      say(lock:lock "a")
      wait_for "gate"
      say(lock:unlock())
    ]]
    local idle = location [[ say(new():lock "b") ]]

    it("lets a worker end on reload, after the holds that requests have", function()
      for _ = 1, 4 do nginx:get(idle) end -- both workers look at the clock
      local gate = support.connect():lock "gate"
      local request = nginx:begin(path)
      assert.equal("0", request.line())
      local old = nginx:workers()
      nginx:command "-s reload"
      wait_until("one of the old workers to end", function()
        return support.has_ended(old[1]) or support.has_ended(old[2])
      end)
      assert.is_truthy(holder_of "a")
      gate:release()
      assert.equal("1\n", request.body())
      wait_until("the other", function()
        return support.has_ended(old[1]) and support.has_ended(old[2])
      end)
    end)
  end
end)
