-- pglocks inside a real nginx with two workers, driven over HTTP by curl.

local support = require "spec.support"
local server = require "spec.nginx.server"

local core = support.core
local pg_locks, wait_until, observe = support.pg_locks, support.wait_until, support.observe

-- init_by_lua, then what each location does; `name` is the lock's, from the query string.
local SETUP = [[
  init_by_lua_block {
    %s
    local pglocks = require "pglocks"
    local conninfo = os.getenv "PGLOCKS_TEST_CONNINFO"
    pglocks.setup { databases = {
      default = conninfo,
      own = { conninfo = conninfo, dedicated = true, pool_size = 50 },
      small = { conninfo = conninfo, dedicated = true, pool_size = 2, timeout = 0.3 },
      confirmed = { conninfo = conninfo, release = "confirmed" },
      blocking = { conninfo = conninfo, scheduler = "blocking" },
    } }
    -- An error object says what it is.
    function answer(ok, ...)
      if ok then return ngx.say(...) end
      local err = ...
      ngx.status = 503
      ngx.say(type(err) == "table" and err.code or "error", " ", tostring(err))
    end
  }
]]

local PRELUDE = [[
  local pglocks = require "pglocks"
  local name = ngx.var.arg_name or "x"
  local using = ngx.var.arg_using
  local timeout = tonumber(ngx.var.arg_timeout)
  ngx.shared.begun:incr(name, 1, 0) -- a lock that comes next is asked for before anybody can see this
]]

local locations = {
  ["/ping"] = [[ ngx.say(ngx.worker.pid()) ]],

  ["/begun"] = [[ ngx.say(ngx.shared.begun:get(ngx.var.arg_of) or 0) ]],

  ["/lock"] = [[
    answer(pcall(pglocks.with_lock, name, { timeout = timeout, using = using }, function(lock)
      return tostring(lock)
    end))
  ]],

  ["/try"] = [[ answer(pcall(function()
    local lock, why = pglocks.try_lock(name, { timeout = timeout, using = using })
    if not lock then return why end
    lock:release()
    return "got it"
  end)) ]],

  -- Says its backend's locks, then holds as long as asked, and says whether it still does.
  ["/hold"] = [[
    local lock = pglocks.lock(name, { using = using })
    ngx.say "held"
    ngx.flush(true)
    -- Until the spec lets go of another lock, or for some seconds.
    if ngx.var.arg_gate then
      pglocks.with_lock(ngx.var.arg_gate, { shared = true }, function() end)
    else
      ngx.sleep(tonumber(ngx.var.arg_seconds) or 10)
    end
    ngx.say(tostring(lock:held()))
    local ok, err = pcall(lock.release, lock)
    ngx.say(ok and "released" or err.code .. " " .. tostring(err.sqlstate))
  ]],

  ["/pairs"] = [[ answer(pcall(function()
    for i = 1, tonumber(ngx.var.arg_n) do
      pglocks.with_lock(name .. i % 7, { using = using }, function(lock) assert(lock:held()) end)
    end
    return "done"
  end)) ]],

  -- Deaths of a request that holds a lock.
  ["/dies/exit"] = [[ pglocks.lock(name, { using = using }) ngx.exit(500) ]],
  ["/dies/error"] = [[ pglocks.lock(name, { using = using }) error "on purpose" ]],
  ["/dies/redirect"] = [[ pglocks.lock(name, { using = using }) return ngx.redirect "/ping" ]],
  ["/dies/exec"] = [[ pglocks.lock(name, { using = using }) return ngx.exec "/ping" ]],
  ["/dies/end"] = [[ pglocks.lock(name, { using = using }) ngx.say "ended" ]],
  ["/dies/abort"] = [[ pglocks.lock(name, { using = using }) ngx.say "held" ngx.flush(true) ngx.sleep(30) ]],
  ["/dies/thread"] = [[
    local thread = ngx.thread.spawn(function() pglocks.lock(name) end) -- waits
    ngx.sleep(0.1)
    ngx.say(tostring(ngx.thread.kill(thread)))
    ngx.flush(true)
    ngx.sleep(1)
  ]],
  ["/dies/scope"] = [[
    local ok, err = pcall(pglocks.with_lock, name, { using = using }, function() error("inside", 0) end)
    ngx.say(err)
  ]],

  -- Every kind of lock that a pool's connection can carry.
  ["/kinds"] = [[ answer(pcall(function()
    local said = {}
    local function say(what) said[#said + 1] = tostring(what) end
    local xact = { scope = "transaction", timeout = timeout, using = using }
    say(pglocks.with_lock(name, xact, function(lock) return lock.scope end))
    say(select(2, pcall(pglocks.with_lock, name, xact, function() error("inside", 0) end)))
    for _, strategy in ipairs { "notify", "poll" } do
      say(pglocks.with_lock(name, { strategy = strategy, timeout = timeout, using = using },
        function(lock) return lock:check() end))
    end
    say(pglocks.with_lock(name, { slots = 2, timeout = timeout, using = using },
      function(lock) return lock.slot <= 2 end))
    local own = name .. " of " .. ngx.var.connection -- nobody else reads
    say(pglocks.with_lock(own, { shared = true, timeout = timeout, using = using }, function(lock)
      return tostring(lock:upgrade { timeout = timeout }) .. " " .. tostring(lock:downgrade())
    end))
    return table.concat(said, ", ")
  end)) ]],

  ["/dies/transaction"] = [[ pglocks.lock(name, { scope = "transaction", using = using }) error "on purpose" ]],

  ["/own"] = [[ answer(pcall(function()
    local conn = pglocks.connect(os.getenv "PGLOCKS_TEST_CONNINFO")
    local lock = conn:lock(name)
    local n = conn:transaction(function(c) return c:query("SELECT 42 AS n")[1].n end)
    assert(lock:check())
    local busy
    local thread = ngx.thread.spawn(function() conn:query "SELECT pg_sleep(0.1)" end)
    busy = select(2, pcall(conn.ping, conn)).code
    ngx.thread.wait(thread)
    lock:release()
    conn:close()
    return n .. " " .. busy
  end)) ]],

  ["/foreign"] = [[
    if ngx.var.arg_keep then
      kept = pglocks.connect(os.getenv "PGLOCKS_TEST_CONNINFO")
      kept:lock(name)
      ngx.say "kept"
      ngx.flush(true)
      ngx.sleep(1)
      ngx.say(tostring(kept:ping()))
    else
      answer(pcall(kept.query, kept, "SELECT 1"))
    end
  ]],

  ["/big"] = [[ answer(pcall(function()
    local conn = pglocks.connect(os.getenv "PGLOCKS_TEST_CONNINFO")
    local rows = conn:query("SELECT repeat('x', 3000000) AS x, $1::text AS y", ("y"):rep(2000000))
    return #rows[1].x .. " " .. #rows[1].y
  end)) ]],

  ["/phases"] = { [[
    set_by_lua_block $in_set { return select(2, pcall(require "pglocks".lock, "phase")) }
    rewrite_by_lua_block { require "pglocks".with_lock("phase", function() ngx.ctx.rewrite = "ok" end) }
    access_by_lua_block { require "pglocks".with_lock("phase", function() ngx.ctx.access = "ok" end) }
    content_by_lua_block {
      ngx.say(ngx.ctx.rewrite, ngx.ctx.access, " ", ngx.var.in_set)
      ngx.ctx.lock = require "pglocks".lock "released in log"
    }
    log_by_lua_block {
      local ok, err = pcall(require "pglocks".lock, "phase")
      ngx.log(ngx.WARN, "in log: ", tostring(err))
      pcall(ngx.ctx.lock.release, ngx.ctx.lock)
    }
  ]] },

  ["/timer"] = [[
    local _, err = ngx.timer.at(0, function()
      pglocks.with_lock(name, function() ngx.sleep(0.2) end)
    end)
    ngx.say(tostring(err))
  ]],

  -- How often of n timers that take turns each has found the counter as it had left it.
  ["/timers"] = [[
    local n, count, ended = tonumber(ngx.var.arg_n), 0, 0
    for _ = 1, n do
      assert(ngx.timer.at(0, function()
        pglocks.with_lock(name, function()
          local before = count
          ngx.sleep(0.001)
          count = before + 1
        end)
        ended = ended + 1
      end))
    end
    while ended < n do ngx.sleep(0.01) end
    ngx.say(count)
  ]],
}

-- first: Lua that runs before pglocks is loaded.
local function settings(http, first)
  local all = {}
  for path, code in pairs(locations) do
    all[path] = type(code) == "table" and code or PRELUDE .. code
  end
  return { http = "lua_shared_dict begun 1m;" .. http .. SETUP:format(first or ""), locations = all }
end

local function waiting()
  return #observe "SELECT 1 AS one FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
end

-- How long after `happens` the server grants the lock to the next, who waits for it already.
local function freed_after(name, happens)
  local next_one = support.connect()
  support.begin(next_one, "lock", name)
  support.wait_until_waiting(next_one.backend_pid)
  happens()
  local began = core.now()
  local lock = support.complete(next_one)
  local seconds = core.now() - began
  lock:release()
  return seconds
end

local function holder_of(name)
  local key = require "pglocks".key(name)
  local rows = observe([[SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted
    AND classid = $1::bigint::oid AND objid = $2::bigint::oid]], key.classid, key.objid)
  return rows[1] and rows[1].pid
end

local function wait_until_held(name)
  wait_until("the lock to be held", function() return holder_of(name) end)
end

-- using: the database of the locks.
local function common(title, http, using)
  describe(title, function()
    local nginx

    setup(function() nginx = server.start(settings(http)) end)
    teardown(function() nginx:stop() end)
    after_each(support.finish)

    local function get(path) return nginx:get(path .. "&using=" .. using) end
    local function begin(path) return nginx:begin(path .. "&using=" .. using) end

    -- So many requests about this lock, all at once from now on.
    local function wait_until_begun(name, count, before)
      wait_until(count .. " requests", function()
        return tonumber((nginx:get("/begun?of=" .. name))) == before + count
      end)
    end

    local function begun(name) return tonumber((nginx:get("/begun?of=" .. name))) end

    it("locks and releases", function()
      for _ = 1, 5 do
        local body, status = get "/lock?name=x"
        assert.equal(200, status)
        assert.equal('pglocks lock: "x", exclusive, held\n', body)
      end
    end)

    it("has requests exclude each other, and try and time out", function()
      local gate = support.connect():lock "gate"
      local holder = begin "/hold?gate=gate&name=a"
      assert.equal("held", holder.line())
      assert.equal("busy\n", (get "/try?name=a"))
      assert.equal("timeout\n", (get "/try?name=a&timeout=0.05"))
      local body, status = get "/lock?name=a&timeout=0.05"
      assert.equal(503, status)
      assert.is_truthy(body:find("^timeout pglocks: timeout: no lock on \"a\" within 0%.%d+ s"), body)
      local before = begun "a"
      local waiter = begin "/lock?name=a"
      wait_until_begun("a", 1, before)
      gate:release()
      assert.equal("true\nreleased\n", holder.body())
      assert.equal('pglocks lock: "a", exclusive, held\n', waiter.body())
    end)

    it("goes on answering while requests wait", function()
      local conn = support.connect()
      local lock = conn:lock "w"
      local requests, before = {}, begun "w"
      for i = 1, 20 do requests[i] = begin "/lock?name=w" end
      wait_until_begun("w", 20, before)
      for _ = 1, 10 do assert.equal(200, select(2, nginx:get "/ping")) end
      lock:release()
      for i = 1, 20 do assert.equal('pglocks lock: "w", exclusive, held\n', requests[i].body()) end
    end)

    it("runs a connection of the request's own, with queries and transactions", function()
      assert.equal("42 busy_connection\n", (nginx:get "/own"))
      wait_until("its backend to end", function() return #pg_locks() == 0 end)
    end)

    it("carries large queries and answers", function()
      assert.equal("3000000 2000000\n", (nginx:get "/big"))
    end)

    for _, death in ipairs { "exit", "error", "redirect", "exec", "end", "transaction" } do
      it("frees the lock of a request that dies: " .. death, function()
        get("/dies/" .. death .. "?name=d")
        wait_until("the lock to be free", function() return not holder_of "d" end, 1)
      end)
    end

    it("carries every kind of lock, many at once", function()
      local expected = "transaction, inside, true, true, true, true true\n"
      assert.equal(expected, (get "/kinds?name=k&timeout=5"))
      local requests = {}
      for i = 1, 6 do requests[i] = begin("/kinds?name=k" .. i % 3 .. "&timeout=8") end
      for i = 1, 6 do assert.equal(expected, requests[i].body()) end
      wait_until("all to be free", function() return #pg_locks() == 0 end)
    end)

    it("frees the lock of a scope that fails, and keeps the error", function()
      assert.equal("inside\n", (get "/dies/scope?name=d"))
      wait_until("the lock to be free", function() return not holder_of "d" end, 1)
    end)

    it("frees the lock of a request whose client has gone", function()
      local request = begin "/dies/abort?name=d"
      assert.equal("held", request.line())
      assert.is_truthy(holder_of "d")
      freed_after("d", function() support.signal("KILL", request.pid) end)
    end)

    it("logs nothing at [error] but what the requests did themselves", function()
      for line in nginx:errors():gmatch "[^\n]+" do
        assert.is_truthy(line:find("on purpose", 1, true) or line:find("lua_code_cache is off", 1, true)
          or line:find "^%s", line)
      end
    end)
  end)
end

local function notices_loss(nginx, using)
  local gate = support.connect():lock "gate"
  local request = nginx:begin("/hold?gate=gate&name=l&using=" .. using)
  assert.equal("held", request.line())
  wait_until("it to wait", function() return waiting() == 1 end)
  observe("SELECT pg_terminate_backend($1)", holder_of "l")
  wait_until("its backend to end", function() return not holder_of "l" end)
  gate:release()
  assert.equal("false\nlost 57P01\n", request.body())
end

if not server.available() then
  describe("nginx", function()
    it("with ngx_lua", function() pending "libnginx-mod-http-lua is not installed" end)
  end)
  return
end

common("nginx", "", "default")
common("nginx, with a connection for each lock,", "", "own")
common("nginx with lua_code_cache off", "lua_code_cache off;", "default")

describe("nginx", function()
  local nginx

  setup(function()
    nginx = server.start(settings "")
  end)

  teardown(function() nginx:stop() end)
  after_each(support.finish)

  it("uses connections again, across requests", function()
    for _ = 1, 3 do nginx:get "/lock?using=confirmed" end
    local function backends()
      local pids = {}
      for _, row in ipairs(observe [[SELECT pid FROM pg_stat_activity WHERE application_name = 'pglocks'
        AND pid <> pg_backend_pid()]]) do pids[#pids + 1] = row.pid end
      return #pids
    end
    local before = backends()
    for _ = 1, 20 do assert.equal(200, select(2, nginx:get "/lock?using=confirmed")) end
    assert.is_true(backends() <= before + 1, "more connections than workers")
  end)

  it("runs many pairs in one request, deferred and confirmed", function()
    assert.equal("done\n", (nginx:get "/pairs?n=500"))
    assert.equal("done\n", (nginx:get "/pairs?n=500&using=confirmed"))
    assert.equal("done\n", (nginx:get "/pairs?n=500&using=own"))
    wait_until("all to be free", function() return #pg_locks() == 0 end)
  end)

  it("serves hundreds of requests at once", function()
    -- More than locks of a connection, or answers that can be collected, or connections.
    for _, using in ipairs { "default", "confirmed", "own" } do
      local statuses = nginx:get_many("/lock?name=[1-400]&using=" .. using, 120)
      assert.same({ ["200"] = 400 }, statuses)
      wait_until("all to be free", function() return #pg_locks() == 0 end)
    end
  end)

  it("queues when the pool is used up, and not without end", function()
    local holders, gate = {}, support.connect():lock "gate"
    -- Two workers have a pool each: so enough requests for both.
    for i = 1, 8 do holders[i] = nginx:begin(("/hold?gate=gate&name=p%d&using=small"):format(i)) end
    wait_until("some to hold", function() return #pg_locks() - waiting() >= 3 end) -- with the gate
    local refused = 0
    for _ = 1, 12 do
      local body, status = nginx:get "/try?name=q&using=small"
      if status == 503 then
        assert.is_truthy(body:find "^too_many_connections", body)
        refused = refused + 1
      end
    end
    gate:release()
    for i = 1, 8 do holders[i].body() end
    assert.is_true(refused > 0)
    assert.equal("got it\n", (nginx:get "/try?name=q&using=small"))
  end)

  it("frees the pool's place of a request that died", function()
    for _ = 1, 12 do nginx:get "/dies/end?name=d&using=small" end
    for _ = 1, 6 do nginx:get "/hold?seconds=0&name=p&using=small" end
    assert.equal(200, select(2, nginx:get "/lock?using=small"))
  end)

  it("takes a waiter whose light thread was killed out of the way", function()
    local holder = support.connect()
    local lock = holder:lock "t"
    local request = nginx:begin "/dies/thread?name=t"
    assert.equal("1", request.line())
    lock:release()
    wait_until("nobody to hold it", function() return not holder_of "t" end, 7)
    request.body()
  end)

  it("notices the loss of a held lock", function()
    notices_loss(nginx, "default")
    notices_loss(nginx, "own")
  end)

  it("keeps the connection of another request out of reach", function()
    for _ = 1, 20 do -- until both come to the same worker
      local first = nginx:begin "/foreign?keep=1&name=f"
      assert.equal("kept", first.line())
      local body = nginx:get "/foreign"
      assert.equal("true\n", first.body())
      if body:find "busy_connection" then return end
    end
    error "no two requests met in one worker"
  end)

  it("says in which phases it cannot wait", function()
    local body = nginx:get "/phases"
    assert.is_truthy(body:find "^okok pglocks: nginx cannot wait in set_by_lua", body)
    wait_until("the lock to end with its request", function() return #pg_locks() == 0 end, 1)
    wait_until("its log phase", function()
      local log = support.read(nginx.prefix .. "/error.log")
      return log:find("in log: pglocks: nginx cannot wait in log_by_lua", 1, true)
    end)
  end)

  it("locks in timers", function()
    assert.equal("nil\n", (nginx:get "/timer?name=timer"))
    wait_until_held "timer"
    wait_until("the timer to end", function() return not holder_of "timer" end)
  end)

  it("locks in many timers at once", function()
    assert.equal("80\n", (nginx:get "/timers?name=timers&n=80"))
    wait_until("all to be free", function() return #pg_locks() == 0 end)
  end)

  it("loses no waiter on reload", function()
    local lock = support.connect():lock "r"
    local request = nginx:begin "/lock?name=r"
    wait_until("the request to wait", function() return waiting() == 1 end)
    local holder = nginx:begin "/hold?seconds=0.5&name=h"
    assert.equal("held", holder.line())
    local old = nginx:workers()
    nginx:command "-s reload"
    wait_until("new workers", function()
      local now = nginx:workers()
      return #now == 2 and now[1] ~= old[1] and now[2] ~= old[2] and now[1] ~= old[2] and now[2] ~= old[1]
    end)
    assert.equal("true\nreleased\n", holder.body())
    lock:release()
    assert.equal('pglocks lock: "r", exclusive, held\n', request.body())
  end)

  it("frees the locks of a worker that is killed", function()
    local request = nginx:begin "/hold?name=k"
    assert.equal("held", request.line())
    freed_after("k", function()
      for _, pid in ipairs(nginx:workers()) do support.signal("KILL", pid) end
    end)
    request.body()
    wait_until("nginx to be back", function() return select(2, nginx:get "/ping") == 200 end)
  end)
end)

-- Not every ngx_lua tells the file descriptor of a cosocket.
describe("nginx without a look at cosockets", function()
  local nginx

  setup(function()
    nginx = server.start(settings("", [[
      local ffi = require "ffi"
      local cdef = ffi.cdef
      function ffi.cdef(text)
        if text:find("hack_fd", 1, true) then error "not in this version" end
        cdef(text)
      end
    ]]))
  end)

  teardown(function() nginx:stop() end)
  after_each(support.finish)

  it("locks and releases", function()
    assert.equal("done\n", (nginx:get "/pairs?n=100"))
    assert.equal('pglocks lock: "x", exclusive, held\n', (nginx:get "/lock"))
  end)

  it("notices the loss of a held lock", function()
    notices_loss(nginx, "default")
    notices_loss(nginx, "own")
  end)
end)
