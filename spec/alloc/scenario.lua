-- What spec/alloc/alloc.c runs: steps in which allocations fail, and what must be true after each.

local alloc, conninfo, malloc_fails = ...

-- Without memory LuaJIT's compiler crashes at times, and so does libgcc, which it tells of each trace.
if rawget(_G, "jit") then require "jit".off() end

-- LuaJIT itself does not survive a failure in loading this, which key.value does when it needs it.
if rawget(_G, "jit") then require "ffi" end

local pglocks = require "pglocks"
local core = require "pglocks.core"

local conn
local losses -- calls of on_lost, for the step that loses its session

-- libpq swallows the end of an answer that it has no memory for, and only a deadline helps then.
local function connect()
  return pglocks.connect { conninfo = conninfo, timeout = malloc_fails and 1 or 10,
    reply_timeout = malloc_fails and 0.1 or 10,
    on_lost = function() losses = (losses or 0) + 1 end }
end

local function collect()
  collectgarbage()
  collectgarbage()
end

local function wait_until(what, condition)
  for _ = 1, 5000 do
    if condition() then return end
    alloc.pause()
  end
  alloc.wrong("waited in vain for " .. what)
end

-- ---- what must be true ------------------------------------------------------------------

local function rows(pid)
  return table.concat(alloc.look([[
    SELECT format('%s %s %s %s', classid, objid, objsubid, mode) FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND pid = $1::int ORDER BY 1]], tostring(pid)), ", ")
end

-- As `rows` shows them: { keys =, shared = }, each once.
local function shown(locks)
  local keys, list = {}, {}
  for _, lock in ipairs(locks) do
    for _, key in ipairs(lock.keys) do
      keys[("%.0f %.0f %d %s"):format(key.classid, key.objid, key.objsubid,
        lock.shared and "ShareLock" or "ExclusiveLock")] = true
    end
  end
  for key in pairs(keys) do list[#list + 1] = key end
  table.sort(list)
  return table.concat(list, ", ")
end

local function held(locks)
  local list = {}
  for _, lock in ipairs(locks) do list[#list + 1] = lock:held() and lock or nil end
  return shown(list)
end

local function listed()
  local list = conn:locks()
  for _, one in ipairs(list) do one.keys, one.shared = { one.key }, one.mode == "shared" end
  return shown(list)
end

-- Lua 5.4 forgets a finalizer that it has no memory to call: such a lock is the connection's alone,
-- until that closes.
local finalizer_forgotten = false

local function check_open(locks)
  collect()
  local pid = tostring(conn.backend_pid)
  local ok, err = pcall(conn.ping, conn) -- and so every release has been answered
  if not ok then return alloc.wrong("the connection is of no use: " .. tostring(err)) end
  if core.in_transaction(conn) or #alloc.look([[SELECT 1 FROM pg_stat_activity
    WHERE pid = $1::int AND xact_start IS NOT NULL]], pid) > 0 then
    alloc.wrong "a transaction was left open"
  end
  local known, there = held(locks), rows(pid)
  if listed() ~= there then
    alloc.wrong(("locks() knows of {%s}, the server of {%s}"):format(listed(), there))
  elseif known ~= there and not finalizer_forgotten then
    alloc.wrong(("held() knows of {%s}, the server of {%s}"):format(known, there))
  end
end

local function check_over(locks, pid)
  if held(locks) ~= "" then alloc.wrong "locks are held without a session" end
  wait_until("the locks to go with the session", function() return rows(pid) == "" end)
end

-- ---- a step -----------------------------------------------------------------------------

local function is_lock(value) return type(value) == "userdata" and value.held ~= nil end

-- prepare(conn) returns a lock, or nothing; the step is call(conn, lock), and may return another
-- lock. With `ends`, it may close the connection.
local function step(name, prepare, call, ends)
  if alloc.is_over(name) then return end
  if not (conn and conn:alive()) then conn = connect() end
  local pid = conn.backend_pid
  local locks = { (prepare(conn)) }
  local ok, result = alloc.attempt(name, call, conn, locks[1])
  if ok and is_lock(result) then locks[#locks + 1] = result end
  result = nil -- luacheck: ignore 311
  collect()
  if conn:alive() then
    check_open(locks)
    if not ok then -- the same call works once there is memory again
      ok, result = pcall(call, conn, locks[1])
      if not ok then alloc.wrong("does not work again: " .. tostring(result)) end
      if ok and is_lock(result) then locks[#locks + 1] = result end
      if conn:alive() then check_open(locks) end
    end
    for _, lock in ipairs(locks) do
      ok, result = pcall(lock.release, lock)
      if not ok and conn:alive() then alloc.wrong("release: " .. tostring(result)) end
    end
    if conn:alive() then check_open(locks) end
  else
    if not ends then
      alloc.lost()
      if not malloc_fails then alloc.wrong "the session was given up" end
    end
    check_over(locks, pid)
  end
end

local function nothing() end
local function lock_held(c) return c:lock "held" end

-- ---- the steps --------------------------------------------------------------------------

if not alloc.is_over "connect" then
  local ok, result = alloc.attempt("connect", connect)
  if ok then
    conn = result
    check_open {}
  elseif not malloc_fails and type(result) ~= "string" then
    alloc.wrong("connect: " .. tostring(result))
  end
  collect()
end

step("lock by name, with a timeout", nothing, function(c) return c:lock("name", { timeout = 5 }) end)

step("lock with a comment", nothing, function(c) return c:lock("name", { comment = "why" }) end)

step("shared lock on a pair", nothing, function(c) return c:lock({ 7, -42 }, { shared = true }) end)

step("lock by a scheme of one's own", nothing, function(c)
  return c:lock("name", { namespace = { "a", "b" }, hash = function(name) return { #name, 42 } end })
end)

-- A lack of memory is not one of ffi.
step("value of a key", lock_held, function(_, lock)
  if type(lock.key.value) == "string" then error "a string of digits" end
end)

step("nested lock", lock_held, function(c) return c:lock "held" end)

step("lock that times out", lock_held, function(c)
  local ok, err = pcall(c.lock, c, { 1, 2 }, { timeout = 0.001 })
  if ok or type(err) ~= "table" or err.code ~= "timeout" then error(err, 0) end
end)

local MANY = { "held", 42, { 7, 42 }, "name" }
for i = 1, 40 do MANY[#MANY + 1] = i end -- more than there is always room for

local MANY_OTHERS = {}
for i = 1, 40 do MANY_OTHERS[i] = { 1000, i } end

step("lock_all", lock_held, function(c) return c:lock_all(MANY, { timeout = 5 }) end)

step("release of many", function(c) return c:lock_all(MANY) end, function(_, lock) lock:release() end)

step("lock_all that times out", lock_held, function(c)
  local ok, err = pcall(c.lock_all, c, { 7, { 1, 2 } }, { timeout = 0.001 })
  if ok or type(err) ~= "table" or err.code ~= "timeout" then error(err, 0) end
end)

step("try_lock", nothing, function(c) return (c:try_lock "free") end)

step("try_lock of what is taken", lock_held, function(c)
  if c:try_lock { 1, 2 } then error "taken twice" end
end)

step("with_lock", lock_held, function(c)
  return c:with_lock("within", function(lock) return lock.key.objid end)
end)

step("with_lock whose function raises", lock_held, function(c)
  pcall(c.with_lock, c, "within", function() error { "an error of the program" } end)
end)

step("lock by tries", nothing, function(c) return c:lock("name", { strategy = "notify" }) end)

step("lock by tries that times out", lock_held, function(c)
  local ok, err = pcall(c.lock, c, { 1, 2 }, { strategy = "notify", timeout = 0.003 })
  if ok or type(err) ~= "table" or err.code ~= "timeout" then error(err, 0) end
end)

local SEMAPHORE = { slots = 2, strategy = "poll" }

step("semaphore", nothing, function(c) return c:lock("name", SEMAPHORE) end)

step("semaphore without a free slot", function(c)
  return c:lock("name", SEMAPHORE)
end, function(c)
  local second = c:lock("name", SEMAPHORE)
  if c:try_lock("name", SEMAPHORE) then error "taken thrice" end
  return second
end)

step("upgrade", function(c) return c:lock("name", { shared = true }) end, function(_, lock)
  lock:upgrade { timeout = 5 }
end)

step("downgrade of many", function(c) return c:lock_all { "name", 42, { 7, 42 } } end, function(_, lock)
  lock:downgrade()
end)

step("check", lock_held, function(_, lock) return lock:check() end)

step("held and locks", lock_held, function(c, lock)
  return lock:held() and #c:locks() .. tostring(lock) .. tostring(lock.key)
end)

step("query", lock_held, function(c)
  return #c:query("SELECT i, repeat('x', i) AS t FROM generate_series(1, $1::int) i", 50)
end)

step("query that fails", lock_held, function(c)
  local ok, err = pcall(c.query, c, "SELECT 1/0")
  if ok or type(err) ~= "table" or err.sqlstate ~= "22012" then error(err, 0) end
end)

step("transaction", lock_held, function(c)
  return c:transaction(function()
    c:query "SELECT 1"
    c:lock("in the transaction", { timeout = 5 }):release()
  end)
end, true)

step("transaction that fails", lock_held, function(c)
  pcall(c.transaction, c, function()
    c:lock "in the transaction"
    c:query "SELECT 1/0"
  end)
end, true)

local XACT = { scope = "transaction", timeout = 5 }

step("with_lock of the transaction's scope", lock_held, function(c)
  return c:with_lock("x", XACT, function()
    c:query "SELECT 1"
    return #c:lock_all(MANY_OTHERS, XACT).keys
  end)
end, true)

step("with_lock of the transaction's scope, whose function raises", lock_held, function(c)
  pcall(c.with_lock, c, "x", XACT, function() error { "an error of the program" } end)
end, true)

step("lock of the transaction's scope that times out", lock_held, function(c)
  local ok, err = pcall(c.lock, c, { 1, 2 }, { scope = "transaction", timeout = 0.001 })
  if ok or type(err) ~= "table" or err.code ~= "timeout" then error(err, 0) end
end)

step("release", lock_held, function(_, lock) lock:release() end)

step("release of a nested lock", function(c)
  c:lock "held"
  return c:lock "held"
end, function(_, lock) lock:release() end)

finalizer_forgotten = rawget(_G, "jit") == nil
step("collection of a lock", function(c)
  c:lock "dropped"
end, function() collectgarbage() end)
finalizer_forgotten = false
if conn and conn:alive() and #conn:locks() > 0 then
  conn:close()
  wait_until("the end of that session's locks", function() return rows(conn.backend_pid) == "" end)
end

step("close", lock_held, function(c) c:close() end, true)

if not alloc.is_over "loss" then
  if not (conn and conn:alive()) then conn = connect() end
  local lock, pid = conn:lock "lost", tostring(conn.backend_pid)
  losses = nil
  alloc.look("SELECT pg_terminate_backend($1::int)", pid)
  wait_until("the end of the session", function()
    return #alloc.look("SELECT 1 FROM pg_stat_activity WHERE pid = $1::int", pid) == 0
  end)
  alloc.attempt("loss", function() return lock:held() end)
  wait_until("held() to be false", function() return not lock:held() end)
  if losses ~= 1 then alloc.wrong("on_lost was called " .. tostring(losses) .. " times") end
end

-- And lua_close finds a lock that is held.
if conn and conn:alive() then conn:lock "left to lua_close" end
