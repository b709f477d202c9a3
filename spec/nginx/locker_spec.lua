-- What the requests of one worker share: its connections, and the turns of a key.

local support = require "spec.support"
local server = require "spec.nginx.server"

if not server.available() then return end -- nginx_spec.lua says so

local observe, pg_locks, wait_until = support.observe, support.pg_locks, support.wait_until

local HTTP = [[
  init_by_lua_block {
    pglocks = require "pglocks"
    local conninfo = os.getenv "PGLOCKS_TEST_CONNINFO"
    pglocks.setup { databases = {
      default = {
        conninfo = conninfo, application_name = "shared", handovers = 100, handover_time = 100,
        on_lost = function(_, err, locks) ngx.log(ngx.NOTICE, "lost ", #locks, " ", err.sqlstate) end,
      },
    } }
    state = { begun = 0, held = {}, dies = {} } -- a request's globals are its own, tables are not
  }
]]

local locations = {
  ["/begun"] = [[ ngx.say(state.begun) ]],

  -- Holds until it is told to die, in some way.
  ["/hold"] = [[
    local name = ngx.var.arg_name or "x"
    state.begun = state.begun + 1
    local lock = pglocks.lock(name, { shared = ngx.var.arg_shared and true })
    if ngx.var.arg_kept then state.held[name] = lock end
    ngx.say "held"
    ngx.flush(true)
    while not state.dies[name] do ngx.sleep(0.005) end
    local how = state.dies[name]
    state.dies[name] = nil
    if how == "exit" then ngx.exit(ngx.OK) elseif how == "error" then error "on purpose" end
    if how == "release" then ngx.say(tostring(lock:release())) else ngx.say(tostring(lock:held())) end
  ]],

  ["/die"] = [[ state.dies[ngx.var.arg_name or "x"] = ngx.var.arg_how or "end" ]],

  -- By another request than the one that took it.
  ["/release"] = [[ ngx.say(tostring(state.held[ngx.var.arg_name]:release())) ]],
  ["/held"] = [[ ngx.say(tostring(state.held[ngx.var.arg_name]:held())) ]],

  ["/wait"] = [[
    state.begun = state.begun + 1
    local ok, lock = pcall(pglocks.lock, ngx.var.arg_name or "x")
    if not ok then error(tostring(lock)) end
    ngx.say(string.format("%.3f", lock.waited))
    lock:release()
  ]],

  ["/many"] = [[
    local locks = {}
    for i = 1, tonumber(ngx.var.arg_n) do locks[i] = pglocks.lock(i) end
    ngx.say(#locks)
  ]],

  ["/deadlock"] = [[
    local lock = pglocks.lock "x"
    local _, err = pcall(pglocks.lock, "x")
    ngx.say(err.code)
  ]],

  ["/check"] = [[
    local lock = pglocks.lock(ngx.var.arg_name, { shared = true })
    ngx.say(tostring(lock:check()), " ", tostring(lock:upgrade()), " ", tostring(lock:downgrade()))
    lock:release()
  ]],

  -- Locks once, and again when its worker is to end.
  ["/again"] = [[
    local function lock_once() pglocks.lock("x"):release() end
    lock_once()
    for _ = 1, 2 do collectgarbage() end
    ngx.say "released"
    ngx.flush(true)
    while not ngx.worker.exiting() do ngx.sleep(0.005) end
    ngx.sleep(0.2) -- nobody is busy in it
    state.held.again = pglocks.lock "x"
  ]],

  -- While as many timers run as may.
  ["/dropped"] = [[
    local is_over = false
    for _ = 1, tonumber(ngx.var.arg_n) do
      ngx.timer.at(0, function() while not is_over do ngx.sleep(0.005) end end)
    end
    while ngx.timer.running_count() < tonumber(ngx.var.arg_n) do ngx.sleep(0.005) end
    local _, why = pglocks.try_lock("x", { timeout = 0.2 })
    is_over = true
    while ngx.timer.running_count() > 0 do ngx.sleep(0.005) end
    local lock, why_not = pglocks.try_lock("x", { timeout = 5 })
    ngx.say(why, " ", why_not or tostring(lock:release()))
  ]],

  -- Light threads of one request, which dies: one holds, all others wait.
  ["/threads"] = [[
    state.held.threads = { pglocks.lock "x" }
    for i = 2, tonumber(ngx.var.arg_n) do
      ngx.thread.spawn(function()
        state.held.threads[i] = pglocks.lock "x"
        ngx.sleep(1000)
      end)
    end
    ngx.sleep(0.02)
    ngx.exit(ngx.OK)
  ]],

  -- Upgrades where nothing can wait, and says afterwards what that did.
  ["/phase"] = { [[
    content_by_lua_block {
      state.held.phase = pglocks.lock("x", { shared = true })
      ngx.say "locked"
      ngx.flush(true)
      state.held.phase:check()
      ngx.say(state.said, " ", tostring(state.held.phase.shared))
      state.held.phase:release()
    }
    header_filter_by_lua_block {
      state.said = select(2, pcall(state.held.phase.upgrade, state.held.phase)):match "cannot wait in header_filter"
    }
  ]] },

  ["/timers"] = [[ ngx.say(ngx.timer.running_count()) ]],

  -- Leaves a lock behind that nobody can begin to watch.
  ["/unwatched"] = [[
    local is_over = false
    local n = tonumber(ngx.var.arg_n)
    while ngx.timer.running_count() < n do
      ngx.timer.at(0, function() while not is_over do ngx.sleep(0.005) end end)
      ngx.sleep(0.005)
    end
    state.held.x = pglocks.lock "x"
    ngx.sleep(0.05) -- nginx drops it in its next turn
    is_over = true
  ]],

  -- A timer that holds, again and again, for as long as the worker lives.
  ["/daemon"] = [[
    ngx.timer.at(0, function()
      while not ngx.worker.exiting() do
        pglocks.with_lock("daemon", function() ngx.sleep(0.001) end)
      end
    end)
  ]],
}

local function sessions()
  return observe("SELECT pid FROM pg_stat_activity WHERE application_name = 'shared' ORDER BY backend_start")
end

local function running(http)
  return server.start { http = (http or "") .. HTTP, workers = 1, locations = locations }
end

describe("a TLS handshake of nginx's", function()
  it("locks, and what it leaves behind is free when it is over", function()
    local folder = assert(support.shell "mktemp -d":match "%S+")
    support.shell(("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=db.example -keyout %s/key -out %s/crt")
      :format(folder, folder))
    local nginx = server.start { workers = 1, locations = locations, http = HTTP .. ([[
      server {
        listen unix:%s/tls ssl;
        ssl_certificate %s/crt;
        ssl_certificate_key %s/key;
        ssl_certificate_by_lua_block {
          pglocks.with_lock("y", function(lock) state.checked = lock:check() end)
          state.held.x = pglocks.lock "x"
        }
        location / {
          content_by_lua_block {
            local lock = pglocks.lock "z"
            ngx.sleep(0.2) -- what the handshake left behind has ended
            ngx.say(tostring(state.checked), " ", tostring(state.held.x:held()), " ", tostring(lock:held()))
          }
        }
      }
    ]]):format(folder, folder, folder) }
    local said = support.shell(("curl -sk -m 30 --unix-socket %s/tls https://localhost/"):format(folder))
    assert.equal("true false true\n", said)
    assert.is_truthy(tonumber((nginx:get "/wait")))
    assert.equal("false\n", (nginx:get "/held?name=x"))
    local errors = nginx:errors()
    nginx:stop()
    support.shell("rm -rf " .. folder)
    support.finish()
    assert.equal("", errors)
  end)
end)

describe("the requests of a worker", function()
  local nginx
  before_each(function() nginx = running() end)
  after_each(function()
    local errors = nginx:errors():gsub("[^\n]*on purpose[^\n]*", ""):gsub("\n", "")
    nginx:stop()
    support.finish()
    assert.equal("", errors)
  end)

  local function hold(arguments)
    local request = nginx:begin("/hold?" .. arguments)
    assert.equal("held", request.line())
    return request
  end

  local function wait_until_begun(count)
    wait_until(count .. " requests", function() return tonumber((nginx:get "/begun")) == count end)
  end

  it("share one connection, and are owners of their own", function()
    local a, b = hold "name=a", hold "name=b"
    assert.equal(1, #sessions())
    assert.equal(2, #pg_locks())
    assert.equal("deadlock\n", (nginx:get "/deadlock"))
    nginx:get "/die?name=a&how=release"
    nginx:get "/die?name=b&how=release"
    assert.equal("true\n", a.body())
    assert.equal("true\n", b.body())
    wait_until("all to be free", function() return #pg_locks() == 0 end)
    assert.equal("1000\n", (nginx:get "/many?n=1000"))
    wait_until("all to be free", function() return #pg_locks() == 0 end)
    assert.is_true(#sessions() <= 10)
  end)

  for _, how in ipairs { "end", "exit", "error" } do
    it("get what one of them leaves behind, and keep their own: " .. how, function()
      local dying, other = hold "name=x", hold "name=other"
      local waiting = nginx:begin "/wait"
      wait_until_begun(3)
      nginx:get("/die?how=" .. how)
      assert.is_truthy(tonumber(waiting.body()))
      assert.is_truthy(dying.body())
      wait_until("x to be free", function() return #pg_locks() == 1 end)
      assert.equal(1, #sessions())
      nginx:get "/die?name=other"
      assert.equal("true\n", other.body())
      wait_until("all to be free", function() return #pg_locks() == 0 end)
    end)
  end

  it("do not stand behind one that has gone while it waited", function()
    local holder = hold "name=x"
    local gone, waiting = nginx:begin "/wait", nginx:begin "/wait"
    wait_until_begun(3)
    support.signal("KILL", gone.pid)
    nginx:get "/die?how=release"
    assert.equal("true\n", holder.body())
    assert.is_true(tonumber(waiting.body()) < 3)
    wait_until("all to be free", function() return #pg_locks() == 0 end)
  end)

  -- Its connection is closed; what the server still has of it lets go as soon as it is granted.
  it("get no lock any more when they have gone while the server had them wait", function()
    local conn = support.connect()
    local lock = conn:lock "x"
    local gone = nginx:begin "/wait"
    wait_until("it to wait", function() return #pg_locks() == 2 end)
    support.signal("KILL", gone.pid)
    lock:release()
    assert.is_truthy(tonumber((nginx:get "/wait")))
  end)

  it("release each other's locks, and see whether they are held", function()
    local holder = hold "name=x&kept=1"
    assert.equal("true\n", (nginx:get "/held?name=x"))
    assert.equal("true\n", (nginx:get "/release?name=x"))
    assert.equal("false\n", (nginx:get "/held?name=x"))
    wait_until("it to be free", function() return #pg_locks() == 0 end)
    nginx:get "/die"
    assert.equal("false\n", holder.body())
  end)

  it("leave nothing behind in any of their light threads", function()
    for _, n in ipairs { 33, 65, 65, 65, 129 } do
      nginx:get("/threads?n=" .. n)
      wait_until("it to be free", function() return #pg_locks() == 0 end)
    end
  end)

  it("do nothing where they cannot wait for it", function()
    assert.equal("locked\ncannot wait in header_filter true\n", (nginx:get "/phase"))
  end)

  it("check, upgrade and downgrade", function()
    assert.equal("true true true\n", (nginx:get "/check?name=x"))
  end)

  it("hear of a loss at once, and go on with another connection", function()
    local a, b = hold "name=a", hold "name=b"
    observe("SELECT pg_terminate_backend($1)", sessions()[1].pid)
    wait_until("on_lost", function()
      return support.read(nginx.prefix .. "/error.log"):find("lost 2 57P01", 1, true)
    end)
    nginx:get "/die?name=a"
    nginx:get "/die?name=b"
    assert.equal("false\n", a.body())
    assert.equal("false\n", b.body())
    assert.is_truthy(tonumber((nginx:get "/wait?name=a")))
  end)

  it("hold on through a reload; the old worker then ends", function()
    local holder = hold "name=x"
    local waiting, old = nginx:begin "/wait", nginx:workers()[1]
    nginx:get "/daemon"
    wait_until_begun(2)
    nginx:command "-s reload"
    wait_until("a new worker", function()
      local now = nginx:workers()
      return #now == 1 and now[1] ~= old
    end)
    local later = nginx:begin "/wait" -- in the new one
    wait_until("it to wait", function()
      return #observe "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted" == 1
    end)
    support.signal("TERM", holder.pid) -- nobody can ask the old one any more: its client goes, and so does its lock
    assert.is_truthy(tonumber(waiting.body()))
    assert.is_truthy(tonumber(later.body()))
    wait_until("the old worker to end", function() return support.has_ended(old) end)
    wait_until("its sessions to end", function() return #sessions() <= 1 end)
  end)

  it("are watched when they lock while their worker is to end", function()
    local request, old = nginx:begin "/again", nginx:workers()[1]
    assert.equal("released", request.line())
    nginx:command "-s reload"
    assert.equal("", request.body())
    wait_until("it to be free", function() return #pg_locks() == 0 end)
    wait_until("the worker to end", function() return support.has_ended(old) end)
  end)

  it("end with their worker when nginx quits or is killed", function()
    nginx:get "/wait"
    local worker = nginx:workers()[1]
    nginx:command "-s quit"
    wait_until("the worker to end", function() return support.has_ended(worker) end)
    wait_until("its sessions to end", function() return #sessions() == 0 end)
  end)
end)

describe("nginx whose lua_max_running_timers have run out", function()
  local nginx
  before_each(function() nginx = running "lua_max_running_timers 3;" end)
  after_each(function()
    local errors = nginx:errors()
    nginx:stop()
    support.finish()
    assert.is_truthy(errors:find("lua_max_running_timers are not enough", 1, true))
  end)

  it("begins what it has dropped when there is room", function()
    assert.equal("timeout true\n", (nginx:get "/dropped?n=3"))
    wait_until("all to be free", function() return #pg_locks() == 0 end)
  end)

  it("frees what a request has left behind whom nobody watched", function()
    for _ = 1, 2 do nginx:get "/wait" end -- the connection stays
    wait_until("nobody to watch", function() return (nginx:get "/timers") == "1\n" end)
    nginx:get "/unwatched?n=3"
    wait_until("all to be free", function() return #pg_locks() == 0 end)
  end)
end)

describe("nginx with lua_code_cache off", function()
  it("keeps no connection for a Lua that nobody needs any more", function()
    local nginx = running "lua_code_cache off;"
    for _ = 1, 20 do assert.is_truthy(tonumber((nginx:get "/wait"))) end
    wait_until("all sessions to end", function() return #sessions() == 0 end)
    nginx:stop()
    support.finish()
  end)
end)
