--- Waits inside nginx (OpenResty's ngx_lua), where it is the default.
---
--- libpq never sees the network: what it takes for the server is a socketpair, and the bytes are
--- carried between that and a cosocket of nginx. Waiting stops no other request; and because nginx
--- closes the cosocket when its request ends, however it ends, PostgreSQL frees the locks of a
--- request that died at once, and not when its garbage is collected.
---
--- A cosocket belongs to one request. Between two of them it lies in a keepalive pool of its own; and a
--- connection that many requests share belongs to a timer, which lives as long as the connection does.

local core = require "pglocks.core"
local semaphore = require "ngx.semaphore"
local get_request = require "resty.core.base".get_request

core.own_source(debug.getinfo(1, "S").source)

local ngx, math = ngx, math
local take, give, awaits = core.take, core.give, core.awaits

-- Seconds. A read goes on in slices, because cancel() and close() of another light thread only show
-- between two of them, and because nginx must have a timer pending to finish a request on reload.
local SLICE = 5
local KEEPALIVE = 60
local RECEIVED_AT_MOST = 65536 -- bytes
local RESTS = 0.5 -- at most, of a shared connection with nothing to do: until it looks whether to end
local LOOKS = 0.05 -- from one look for requests that have ended to the next
local SELDOM = 10 -- looks, for those that only wait
local OVERDUE = 1 -- a timer that has not begun for so long never will
local A_DAY = 86400000 -- milliseconds

---@type pglocks.scheduler
local scheduler = { now = core.now, sleep = ngx.sleep }

-- ---- phases -----------------------------------------------------------------------------

local CAN_WAIT = {
  rewrite = true, server_rewrite = true, access = true, content = true, timer = true,
  ssl_cert = true, ssl_session_fetch = true, ssl_client_hello = true,
}

local function can_wait() return CAN_WAIT[ngx.get_phase()] end

scheduler.can_wait = can_wait

local function check_phase()
  if can_wait() then return end
  error(("pglocks: nginx cannot wait in %s_by_lua: lock in rewrite, access, content or timer,"
    .. " or from ngx.timer.at"):format(ngx.get_phase()), 0)
end

-- ---- timers -----------------------------------------------------------------------------

-- While lua_max_running_timers of them run, nginx drops every other that is due, and only its log hears of it. So
-- what has not begun in time is begun once more, by whoever waits, and by every connection's timer. By function: when
-- it counts as dropped.
local unbegun = {}

local function begin(fn)
  unbegun[fn] = core.now() + OVERDUE
  return ngx.timer.at(0, function()
    if not unbegun[fn] then return end -- twice
    unbegun[fn] = nil
    fn()
  end)
end

local function begin_overdue()
  local now = core.now()
  for fn, overdue_at in pairs(unbegun) do
    if now >= overdue_at then begin(fn) end
  end
end

--- Begins a light thread that belongs to no request.
function scheduler.spawn(fn)
  local ok, err = begin(fn)
  if ok then return end
  unbegun[fn] = nil
  core.raise("server", "nginx: no timer can begin: " .. tostring(err))
end

-- ---- the pump ---------------------------------------------------------------------------

-- By connection: { socket = the cosocket or nil between requests, request =, address = what to
-- connect to, rest = received, but not taken by libpq yet, pool =, idle_since =; and of one that is shared
-- signal = a semaphore, posted when there is something to do, reader = a light thread }
local pumps = setmetatable({}, { __mode = "k" })

local function send_all(conn, pump)
  local bytes = take(conn)
  while bytes do
    if not pump.socket or not pump.socket:send(bytes) then
      give(conn, nil, pump.socket ~= nil) -- libpq then sees the end
      return
    end
    bytes = #bytes == 16384 and take(conn)
  end
end

local function deliver(conn, pump, bytes)
  local taken = give(conn, bytes)
  pump.rest = taken < #bytes and bytes:sub(taken + 1) or nil
end

local function receive(conn, pump, seconds)
  pump.socket:settimeout(math.max(1, math.ceil(seconds * 1000)))
  local bytes, err = pump.socket:receiveany(RECEIVED_AT_MOST)
  if bytes then
    deliver(conn, pump, bytes)
  elseif err ~= "timeout" then
    give(conn, nil, err ~= "closed")
  end
end

function scheduler.wait(_, events, seconds, conn)
  local pump = pumps[conn]
  send_all(conn, pump)
  if pump.rest then
    deliver(conn, pump, pump.rest)
  elseif pump.signal then
    pump.signal:wait(math.min(seconds or SLICE, SLICE))
  elseif events == "r" and pump.socket then
    receive(conn, pump, math.min(seconds or SLICE, SLICE))
  end
end

function scheduler.flush(conn)
  local pump = pumps[conn]
  if pump.socket then send_all(conn, pump) end
end

-- ---- looking without waiting ------------------------------------------------------------

-- The file descriptor of a cosocket, where this ngx_lua tells it.
local descriptor_of, is_readable, shut_down
do
  local ok, ffi = pcall(require, "ffi")
  ok = ok and pcall(ffi.cdef, [[
    int ngx_http_lua_ffi_socket_tcp_hack_fd(void *u, int fd, unsigned char *err, size_t *errlen);
    struct pglocks_pollfd { int fd; short events, revents; };
    int poll(struct pglocks_pollfd *fds, unsigned long nfds, int timeout);
    int shutdown(int fd, int how);
  ]])
  ok = ok and pcall(function() return ffi.C.ngx_http_lua_ffi_socket_tcp_hack_fd end)
  if ok then
    local message, length = ffi.new "unsigned char[128]", ffi.new "size_t[1]"
    local fds = ffi.new "struct pglocks_pollfd[1]"
    local POLLIN = 1
    function descriptor_of(socket)
      length[0] = 128
      return ffi.C.ngx_http_lua_ffi_socket_tcp_hack_fd(socket[1], -1, message, length)
    end
    function is_readable(socket)
      fds[0].fd, fds[0].events = descriptor_of(socket), POLLIN
      return fds[0].fd >= 0 and ffi.C.poll(fds, 1, 0) > 0
    end
    local SHUT_RDWR = 2
    function shut_down(socket)
      local fd = descriptor_of(socket)
      if fd >= 0 then ffi.C.shutdown(fd, SHUT_RDWR) end
    end
  end
end

--- Has nginx closed the cosocket, because its request has ended? Asks from any request.
function scheduler.is_gone(conn)
  local socket = pumps[conn].socket
  return socket ~= nil and socket:getreusedtimes() == nil
end

-- What has arrived and nobody has read: the server may have ended the session.
function scheduler.look(conn)
  local pump = pumps[conn]
  if scheduler.is_gone(conn) then
    give(conn)
  elseif pump.socket and core.is_idle(conn) and can_wait() and pump.request == get_request()
    and (not is_readable or is_readable(pump.socket)) then
    receive(conn, pump, 0.001)
  end
end

-- ---- connecting -------------------------------------------------------------------------

-- What a cosocket connects to, how libpq would name it in a message, and which password is for it:
-- libpq will see an address that is not the server's.
local function address_of(keywords)
  local function given(keyword) return keywords[keyword] ~= "" and keywords[keyword] or nil end
  local host, port = given "hostaddr" or given "host" or core.default_host(), given "port" or "5432"
  local name = given "host" or host
  local password = given "password" or core.password {
    host = name, port = port, dbname = keywords.dbname, user = keywords.user,
    passfile = keywords.passfile, service = keywords.service,
  }
  if host:sub(1, 1) == "/" then
    local path = ("%s/.s.PGSQL.%s"):format(host, port)
    return { "unix:" .. path }, ('connection to server on socket "%s" failed: '):format(path), password
  end
  return { host, tonumber(port) },
    ('connection to server at "%s", port %s failed: '):format(name, port), password
end

local function connect_socket(pump, pool_options, seconds)
  local socket, address = ngx.socket.tcp(), pump.address
  local ok, err
  socket:settimeout(math.max(1, math.ceil(seconds * 1000)))
  if address[2] then
    ok, err = socket:connect(address[1], address[2], pool_options)
  else
    ok, err = socket:connect(address[1], pool_options)
  end
  if ok then return socket end
  return nil, err
end

-- The server's queue of connections to a Unix socket may be full for a moment.
local FULL, SHORTLY = "resource temporarily unavailable", 0.01

local connections = 0

--- In the place of core.start.connect.
---@return pglocks.connection|nil
---@return string what a message about the connection begins with; or why there is none
function scheduler.connect(keywords, seconds)
  check_phase()
  local deadline = core.now() + seconds
  local address, where, password = address_of(keywords)
  connections = connections + 1
  local pump = {
    address = address,
    request = get_request(),
    pool = ("pglocks %d %d"):format(ngx.worker.pid(), connections),
  }
  local socket, err
  repeat
    if err then ngx.sleep(SHORTLY) end
    socket, err = connect_socket(pump, { pool = pump.pool, pool_size = 1 }, deadline - core.now())
  until socket or err ~= FULL or core.now() > deadline
  if not socket then return nil, where .. err end
  if descriptor_of then core.keep_alive(descriptor_of(socket), keywords) end
  pump.socket = socket

  local libpq = { gssencmode = "disable", password = password }
  for keyword, value in pairs(keywords) do
    if keyword ~= "port" and keyword ~= "hostaddr" and keyword ~= "gssencmode" and keyword ~= "password" then
      libpq[keyword] = value
    end
  end
  if not address[2] then libpq.host, libpq.sslmode = "localhost", "disable" end -- a Unix socket
  local conn = core.start.connect(libpq, math.max(0.001, deadline - core.now()), true)
  pumps[conn] = pump
  return conn, where
end

--- Before an operation: may it be waited for, here? Without a connection: may any?
function scheduler.enter(conn)
  check_phase()
  if conn and pumps[conn].request ~= get_request() then
    core.raise("busy_connection", "this connection belongs to another request")
  end
end

-- ---- between requests -------------------------------------------------------------------

-- A release was sent, its request goes on, and the answer is still to come. nginx closes a pooled
-- cosocket when anything arrives on it. So one of these light threads takes it over: a post wakes
-- one before nginx polls again, so that the answer cannot come before. They end when there was
-- nothing to do for a while, because a worker that is to stop waits for them.
local COLLECTORS, COLLECTORS_STAY = 32, 1
local work, jobs, collectors = semaphore.new(), {}, 0

local function attach(conn, pump)
  pump.socket = connect_socket(pump, { pool = pump.pool, pool_size = 1 }, KEEPALIVE)
  pump.request = get_request()
  if pump.socket and (pump.socket:getreusedtimes() or 0) > 0 then return true end
  if pump.socket then pump.socket:close() end -- nginx had closed the old one
  pump.socket = nil
  give(conn)
  core.connection.alive(conn)
end

local function detach(conn, pump)
  local ok = pump.socket:setkeepalive(KEEPALIVE * 1000, 1)
  pump.socket, pump.idle_since = nil, core.now()
  if ok then return true end
  give(conn)
  core.connection.alive(conn)
end

local function collect_one(job)
  local conn, pump = job.conn, pumps[job.conn]
  if attach(conn, pump) then
    local deadline = core.now() + job.seconds
    while awaits(conn) and core.connection.alive(conn) and core.now() < deadline do
      receive(conn, pump, deadline - core.now())
      core.connection.alive(conn)
    end
    if core.connection.alive(conn) and not awaits(conn) then
      detach(conn, pump)
    else
      pump.socket:close()
      give(conn)
    end
  end
  job.done(conn)
end

local function collect()
  local last = core.now()
  while core.now() - last < COLLECTORS_STAY do
    if work:wait(COLLECTORS_STAY) then
      last = core.now()
      local job = table.remove(jobs, 1)
      if not pcall(collect_one, job) then
        give(job.conn)
        pcall(job.done, job.conn)
      end
    end
  end
  collectors = collectors - 1
end

local function begin_collectors()
  for _ = 1, COLLECTORS do ngx.thread.spawn(collect) end
end

local function start_collectors()
  if collectors > 0 then return begin_overdue() end
  collectors = COLLECTORS
  if not pcall(scheduler.spawn, begin_collectors) then collectors = 0 end
end

--- May a release be sent without waiting for its answer? Only if somebody will collect that.
function scheduler.can_collect()
  if work:count() < 0 then return true end
  start_collectors()
  return false
end

--- Puts a connection away, for the next request: calls done(conn) when it can be used, or is lost.
--- Never waits.
function scheduler.detach(conn, seconds, done)
  local pump = pumps[conn]
  if not can_wait() or pump.request ~= get_request() then
    -- Its cosocket cannot be used here, and is closed when its request ends: what the server holds
    -- for it need not wait for that.
    if shut_down and pump.socket then shut_down(pump.socket) end
    give(conn)
    core.connection.alive(conn)
    return done(conn)
  end
  send_all(conn, pump)
  if not awaits(conn) then
    detach(conn, pump)
    return done(conn)
  end
  if work:count() < 0 and detach(conn, pump) then
    jobs[#jobs + 1] = { conn = conn, seconds = seconds, done = done }
    work:post(1)
    return
  end
  if pump.socket then pump.socket:close() end -- the session ends, and with it what it holds
  give(conn)
  core.connection.alive(conn)
  done(conn)
end

--- Takes a connection for this request. False: it was lost meanwhile.
function scheduler.attach(conn)
  local pump = pumps[conn]
  if core.now() - pump.idle_since > KEEPALIVE - 1 then
    give(conn)
    core.connection.alive(conn)
    return false
  end
  return attach(conn, pump) == true
end

-- ---- shared connections -----------------------------------------------------------------

--- There is something to do on a shared connection.
function scheduler.rouse(conn)
  local signal = pumps[conn].signal
  if signal and signal:count() < 1 then signal:post(1) end
end

local function read_on(conn, pump)
  pump.socket:settimeout(A_DAY)
  while true do
    local bytes, err = pump.socket:receiveany(RECEIVED_AT_MOST)
    if bytes then
      deliver(conn, pump, bytes)
    elseif err ~= "timeout" then
      give(conn, nil, err ~= "closed")
      return scheduler.rouse(conn)
    end
    scheduler.rouse(conn)
    while pump.rest do ngx.sleep(SHORTLY) end
  end
end

--- From now on the calling light thread has a connection that requests share: it sends, and a reader of
--- its own receives.
function scheduler.keep(conn)
  local pump = pumps[conn]
  pump.signal = semaphore.new()
  pump.reader = ngx.thread.spawn(read_on, conn, pump)
end

--- The end of that: nginx waits for a timer's light threads.
function scheduler.leave(conn)
  local pump = pumps[conn]
  ngx.thread.kill(pump.reader)
  pump.socket:close()
  pump.socket = nil
  give(conn)
end

local lives, lives_begun, is_watching = {}, 0, false

-- Without lua_code_cache every request has a Lua of its own, which stays as long as this does: who has seen
-- one request alone does not stay for others.
local function is_wanted(idle)
  return not idle or not ngx.worker.exiting() and idle < KEEPALIVE and (lives_begun > 1 or next(lives) ~= nil)
end

--- Sends what was written, and waits until there may be something to do. idle: for so many seconds nothing
--- was held; or nil. False: the connection is to be closed.
function scheduler.rest(conn, idle)
  local pump = pumps[conn]
  begin_overdue()
  send_all(conn, pump)
  if pump.rest then deliver(conn, pump, pump.rest) end
  if not is_wanted(idle) then return false end
  pump.signal:wait(RESTS)
  return true
end

-- ---- the ends of requests ---------------------------------------------------------------

-- Of each that has asked for a lock: { socket =, things = see below, has_locks = looked at often }. nginx closes the
-- sockets of a request with it; to this one nothing is ever sent.

local function has_locks(life)
  for thing in pairs(life.things) do
    local ok, id = pcall(core.identity, thing) -- of a ticket, and of one that is being collected, an error
    if ok and id then return true end
  end
  return false
end

-- The end of one may add another: what is handed on to somebody who has died with it.
local function end_things(life)
  local thing = next(life.things)
  while thing do
    life.things[thing] = nil
    pcall(getmetatable(thing).__close, thing)
    thing = next(life.things)
  end
end

local function is_anybody_busy()
  for life in pairs(lives) do
    if next(life.things) then return true end
  end
  return false
end

local function look_at(life, also_at_others)
  life.has_locks = life.has_locks and has_locks(life)
  -- Somebody else's socket raises an error; one that nginx has closed does not.
  if (life.has_locks or also_at_others) and pcall(life.socket.close, life.socket) then
    lives[life] = nil
    end_things(life)
  end
end

local function watch()
  local round = 0
  while next(lives) and (not ngx.worker.exiting() or is_anybody_busy()) do
    ngx.sleep(LOOKS)
    round = round + 1
    for life in pairs(lives) do look_at(life, round % SELDOM == 0) end
  end
  is_watching = false
end

local function keep_watching()
  if is_watching then return end
  scheduler.spawn(watch)
  is_watching = true
end

local LIFE = {} -- a key in ngx.ctx

--- The life of the calling request. things: those with a `__close` that is called when it ends, however it
--- ends, as keys. has_locks: to be set when a lock comes to them.
function scheduler.living()
  local ctx = ngx.ctx
  local life = rawget(ctx, LIFE) -- not that of the TLS handshake, which a request's ngx.ctx falls back to
  if life then
    keep_watching()
    return life
  end
  local socket = ngx.socket.udp()
  local ok, err = socket:setpeername("127.0.0.1", 9)
  if not ok then core.raise("server", "nginx: no socket: " .. tostring(err)) end
  life = { socket = socket, things = setmetatable({}, { __mode = "k" }), has_locks = false }
  rawset(ctx, LIFE, life)
  lives[life], lives_begun = true, lives_begun + 1
  keep_watching()
  return life
end

-- ---- parking ----------------------------------------------------------------------------

local tokens = setmetatable({}, { __mode = "k" }) -- by coroutine

function scheduler.token()
  check_phase()
  local token = semaphore.new()
  tokens[coroutine.running()] = token
  return token
end

function scheduler.park(seconds)
  local token, deadline = tokens[coroutine.running()], core.now() + (seconds or 1e6)
  repeat
    begin_overdue()
    local left = math.max(0, deadline - core.now())
    if token:wait(next(unbegun) and math.min(left, OVERDUE) or left) then return true end
  until core.now() >= deadline
  return false
end

function scheduler.wake(token) token:post(1) end

return scheduler
