-- Several processes that want the same locks at the same time, on one server. Every wait has a
-- timeout, so that a fault shows as a failure and never as a test that hangs.
-- `make contended` repeats these tests many times, each of them short.

local support = require "spec.support"
local model = require "spec.faults.model"

local core = support.core
local KEYS = { -205618829, { 7, -42 } }

local size = support.size
-- Under valgrind a process takes seconds to start.
local is_costly = support.slow >= 10
math.randomseed(os.time() + math.floor(core.now() * 1000) % 1000000)

--- So many rounds, or a part of them, as the size says.
local function rounds(count, at_least)
  return math.max(at_least or 5, math.floor(count * size))
end

-- ---- processes --------------------------------------------------------------------------

-- What each process is. `there(conn)` tells that it is there and waits for the others. A script
-- ends with the line "done", and numbers that count what happened; everything else that it prints
-- is an error's traceback.
local PROCESS = [[
local support = require "spec.support"
local number, path, rounds, seed, mode = ...
number, rounds = tonumber(number), tonumber(rounds)
math.randomseed(tonumber(seed))
io.stdout:setvbuf "line"
local function there(conn)
  print(conn.backend_pid)
  conn:lock("gate", { shared = true, timeout = 60 }):release()
  conn:ping()
end
local function main()
%s
end
local ok, err = xpcall(main, function(err) return debug.traceback(tostring(err), 2) end)
if not ok then print(err) end
]]

local function spawn(script, number, path, repeats, mode)
  return support.spawn(PROCESS:gsub("%%s", function() return script end), number, path or "",
    repeats or 0, math.random(2 ^ 30), mode or "")
end

--- The pid of its backend, which is the first line that it prints.
local function backend_of(process)
  local line = process.lines()
  local pid = tonumber(line)
  if pid then return pid end
  local said = { tostring(line) }
  for more in process.lines do said[#said + 1] = more end
  error(table.concat(said, "\n"), 0)
end

--- Starts `count` processes and lets them go when all of them are there.
local function start(count, script, path, repeats)
  local gate = support.connect():lock "gate"
  local processes = {}
  for i = 1, count do processes[i] = spawn(script, i, path, repeats) end
  for _, process in ipairs(processes) do
    process.backend_pid = backend_of(process)
    support.wait_until_waiting(process.backend_pid)
  end
  gate:release()
  support.wait_until("all of them to be through", function()
    return #support.observe([[SELECT 1 FROM pg_locks WHERE locktype = 'advisory'
      AND classid::int8 = $1 AND objid::int8 = $2]], gate.key.classid, gate.key.objid) == 0
  end)
  return processes
end

--- Waits for the end of all of them; the sums of what they counted.
local function finish(processes)
  local sums, wrong = {}, {}
  for i, process in ipairs(processes) do
    local said = {}
    for line in process.lines do said[#said + 1] = line end
    process.close()
    if #said ~= 1 or said[1]:sub(1, 4) ~= "done" then
      wrong[#wrong + 1] = ("process %d:\n%s"):format(i, table.concat(said, "\n"))
    else
      local column = 0
      for n in said[1]:gmatch "%d+" do
        column = column + 1
        sums[column] = (sums[column] or 0) + tonumber(n)
      end
    end
  end
  if #wrong > 0 then error(table.concat(wrong, "\n"), 0) end
  return sums
end

local function temporary()
  local path = os.tmpname()
  finally(function() os.remove(path) end)
  return path
end

local function write(path, text)
  local file = assert(io.open(path, "w"))
  file:write(text)
  file:close()
end

local read = support.read

-- ---- exclusion --------------------------------------------------------------------------

describe("processes that contend for a lock", function()
  after_each(support.finish)

  it("are alone while they hold it: no increment of a shared counter is lost", function()
    local path, processes, each = temporary(), is_costly and 4 or 8, rounds(100)
    write(path, "0")
    finish(start(processes, [[
      local function increment()
        local n = tonumber((assert(io.open(path)):read "*a"))
        local file = assert(io.open(path, "w"))
        file:write(("%d"):format(n + 1))
        file:close()
      end
      local conn = support.connect { release = number % 2 == 0 and "deferred" or "confirmed" }
      local forms = {
        [0] = function() conn:with_lock("counter", { timeout = 60 }, increment) end,
        function()
          local lock = conn:lock("counter", { timeout = 60 })
          increment()
          lock:release()
        end,
        function()
          local lock = assert(conn:try_lock("counter", { timeout = 60 }))
          increment()
          getmetatable(lock).__close(lock)
        end,
        function()
          for _ = 1, 20000 do
            if conn:try_with_lock("counter", { timeout = 0.003 }, increment) then return end
          end
          error "never got the lock"
        end,
      }
      there(conn)
      for _ = 1, rounds do forms[math.floor(number / 2) % 4]() end
      conn:close()
      print "done"
    ]], path, each))
    assert.equal(processes * each, tonumber(read(path)))
  end)

  for kind, key in pairs { ["a 64-bit key"] = "-205618829", ["a pair"] = "{ 7, -42 }" } do
    it("exclude each other as their modes say (" .. kind .. ")", function()
      local path, processes = temporary(), is_costly and 3 or 6
      finish(start(processes, "local KEY, PROCESSES = " .. key .. ", " .. processes .. [[

        local history = require "spec.faults.history"
        local write = history.writer(path)
        local function note(...) write(nil, number, ...) end
        local function all_inside()
          local file = assert(io.open(path))
          local _, count = file:read "*a":gsub(" grant ", "")
          file:close()
          return count >= PROCESSES
        end
        local conn = support.connect { release = number % 2 == 0 and "deferred" or "confirmed" }
        note("open", conn.backend_pid)
        there(conn)
        for round = 0, rounds do
          local shared = round == 0 or math.random(2) == 1
          local name, mode = history.key(KEY), shared and "shared" or "exclusive"
          note("invoke", round, name, mode)
          local lock = conn:lock(KEY, { shared = shared, timeout = 60 })
          note("grant", round, name, mode)
          if round == 0 then
            support.wait_until("all the readers", all_inside, 30)
          elseif math.random(3) == 1 then
            support.sleep(math.random() * 0.001)
          end
          note("release", round, name, mode)
          lock:release()
        end
        conn:ping()
        note("seen", history.on_client(conn), "|", history.on_server(conn.backend_pid))
        conn:close()
        note "close"
        print "done"
      ]], path, rounds(60)))
      local events = {}
      assert(model.parse(read(path), events))
      assert.equal(processes, assert(model.check(events)).readers_at_most)
    end)
  end

  if not is_costly then -- the queue is the server's: nothing of ours to look for
    it("are served in the order in which they came", function()
      for _ = 1, rounds(4, 1) do
        local path = os.tmpname()
        local holder = support.connect()
        local lock = holder:lock "queue"
        local waiters = {}
        -- a shared one does not overtake the exclusive one before it; two in a row go in together
        for i, mode in ipairs { "exclusive", "exclusive", "shared", "shared", "exclusive", "shared" } do
          waiters[i] = spawn([[
            local conn = support.connect()
            print(conn.backend_pid)
            local lock = conn:lock("queue",
              { shared = mode == "shared", timeout = number % 2 == 0 and 60 or nil })
            local file = assert(io.open(path, "a"))
            file:write(("%d"):format(number))
            file:close()
            lock:release()
            print "done"
          ]], i, path, 0, mode)
          support.wait_until_waiting(backend_of(waiters[i]))
        end
        lock:release()
        finish(waiters)
        local order = read(path)
        os.remove(path)
        assert.is_true(order == "123456" or order == "124356", order)
      end
    end)
  end
end)

-- ---- death ------------------------------------------------------------------------------

describe("kill -9", function()
  after_each(support.finish)

  local HOLDER = [[
    local conn = support.connect()
    local lock = conn:lock("x", { timeout = 60 })
    print(conn.backend_pid)
    support.sleep(60)
  ]]

  it("of a holder frees its lock for the waiter", function()
    for _, options in ipairs { {}, { timeout = 30 }, { shared = true, timeout = 30 } } do
      local holder = spawn(HOLDER)
      local backend_pid = backend_of(holder)
      local waiter = support.connect()
      support.begin(waiter, "lock", "x", options)
      support.wait_until_waiting(waiter.backend_pid)
      support.signal("KILL", holder.pid)
      local seconds, lock = support.timed(support.complete, waiter)
      assert.is_true(seconds < 5 * support.slow, seconds)
      assert.is_true(lock:check())
      assert.same({}, support.pg_locks(backend_pid))
      assert.is_true(lock:release())
      holder.close()
    end
  end)

  it("of a waiter leaves the lock to the next one", function()
    local lock = support.connect():lock "x"
    local killed = spawn [[
      local conn = support.connect()
      print(conn.backend_pid)
      conn:lock("x", { timeout = 60 })
      support.sleep(60)
    ]]
    support.wait_until_waiting(backend_of(killed))
    local waiter = support.connect()
    support.begin(waiter, "lock", "x", { timeout = 30 })
    support.wait_until_waiting(waiter.backend_pid)
    support.signal("KILL", killed.pid)
    killed.close()
    lock:release()
    local seconds, got = support.timed(support.complete, waiter)
    assert.is_true(seconds < 5 * support.slow, seconds)
    assert.is_true(got:check())
  end)
end)

-- ---- truth ------------------------------------------------------------------------------

-- What a process checks after each call: an outcome against pg_locks, as seen by another session.
local TRUTH = [[
local history = require "spec.faults.history"
local KEYS = { -205618829, { 7, -42 } }
local name = history.name
local function on_server(conn) return history.on_server(conn.backend_pid) end
]]

describe("the outcome of a call is what pg_locks says", function()
  after_each(support.finish)

  --- Fails if anybody has unlocked what he did not hold: the server warns of it in its log.
  local function watch_log()
    local since = support.log()
    return function()
      if since then assert.is_nil(since():find("you don't own", 1, true)) end
    end
  end

  it("where timeouts of a few milliseconds strike a busy key", function()
    local log_is_clean = watch_log()
    local counts = finish(start(4, TRUTH .. [[
      local conn = support.connect()
      local key = KEYS[1]
      local timeouts, granted = 0, 0
      there(conn)
      for round = 1, rounds do
        local shared = math.random(4) == 1
        local options = { shared = shared, timeout = math.random(1, 40) / 10000 }
        local outcome
        if round % 2 == 0 then
          local lock, why = conn:try_lock(key, options)
          outcome = lock
          assert(lock or why == "timeout")
        else
          local ok, got = pcall(conn.lock, conn, key, options)
          if ok then outcome = got else assert(got.code == "timeout", tostring(got)) end
        end
        local expected = outcome and name(shared, key) or "nothing"
        local got = on_server(conn)
        assert(got == expected, ("'%s' instead of '%s'"):format(got, expected))
        assert(#conn:locks() == (outcome and 1 or 0))
        if outcome then
          granted = granted + 1
          assert(outcome:held())
          if math.random(2) == 1 then support.sleep(math.random(10, 40) / 10000) end
          assert(outcome:release() == true)
          assert(not outcome:held())
          got = on_server(conn)
          assert(got == "nothing", got)
        else
          timeouts = timeouts + 1
        end
      end
      conn:close()
      print(("done %d %d"):format(timeouts, granted))
    ]], nil, rounds(200, 20)))
    assert.is_true(counts[1] > 0 and counts[2] > 0)
    log_is_clean()
  end)

  -- Locks are taken and released without a pause, and somebody cancels whatever runs.
  local CANCELLED = TRUTH .. [[
    local deferred = number % 2 == 0
    local told
    local conn = support.connect {
      release = deferred and "deferred" or "confirmed",
      on_lost = function(_, err) told = err end,
    }
    local own = conn:lock({ 1, number })
    local own_name = name(false, { 1, number })
    conn:query "SET lock_timeout = '20s'" -- so that a wait without a timeout is bounded, too

    --- Exactly `lock`, if there is one, and our own. A deferred release may still be under way.
    local function agree(lock)
      local expected = own_name
      if lock then
        local both = { own_name, name(lock.shared, lock.key) }
        table.sort(both)
        expected = table.concat(both, ", ")
      end
      assert(own:held() and #conn:locks() == (lock and 2 or 1))
      local got = on_server(conn)
      if deferred and got ~= expected then
        support.wait_until("the deferred releases", function()
          conn:ping()
          got = on_server(conn)
          return got == expected
        end)
      end
      if got ~= expected then error(("'%s' instead of '%s'"):format(got, expected), 2) end
    end

    --- Whatever may still be under way: this key and mode, now.
    local function agree_on(key, shared, held)
      local this = name(shared, key)
      local got = on_server(conn)
      if (got:find(this, 1, true) ~= nil) ~= held then
        error(("'%s' is %sheld, but '%s'"):format(this, held and "" or "not ", got), 2)
      end
    end

    local interrupted, timeouts, granted = 0, 0, 0

    --- Nothing but acquires and releases of a free key, at full speed.
    local function hurry()
      for _ = 1, math.random(30) do
        local options = { shared = math.random(2) == 1, timeout = math.random(0, 1) }
        local ok, lock = pcall(conn.try_lock, conn, { 2, number }, options)
        if ok then
          granted = granted + 1
          assert(lock:release() == true)
        else
          interrupted = interrupted + 1
          if type(lock) ~= "table" or lock.code ~= "interrupted" then error(lock) end
        end
      end
      agree()
    end

    there(conn)
    local deadline = support.core.now() + rounds / 1000
    while support.core.now() < deadline do
      local key, shared = KEYS[math.random(#KEYS)], math.random(3) == 1
      local waits = math.random(4)
      local timeout = waits == 1 and 0 or waits < 4 and math.random(1, 60) / 10000 or nil
      local options = { shared = shared, timeout = timeout }
      local method = timeout and math.random(2) == 1 and "try_lock" or "lock"
      local ok, lock, why = pcall(conn[method], conn, key, options)
      local got = ok and lock
      if math.random(2) == 1 then agree_on(key, shared, got and true or false) end
      if got then
        granted = granted + 1
        assert(lock:held() and lock.acquired)
      elseif ok then
        timeouts = timeouts + 1
        assert(lock == nil and why == (timeout > 0 and "timeout" or "busy"), tostring(why))
      elseif type(lock) == "table" and lock.code == "interrupted" then
        interrupted = interrupted + 1
        assert(lock.sqlstate == "57014")
      else
        timeouts = timeouts + 1
        if type(lock) ~= "table" or lock.code ~= "timeout" then error(lock) end
        assert(timeout, "a wait of 20 s")
      end
      if math.random(3) == 1 then agree(got) end
      if got then
        local nested = math.random(4) == 1 and conn:lock(key, options)
        if math.random(3) == 1 then support.sleep(math.random() * 0.004) end
        if nested then
          assert(nested:release() == true)
          agree_on(key, shared, true)
        end
        if math.random(4) == 1 then
          getmetatable(lock).__close(lock)
        else
          assert(lock:release() == true)
        end
        assert(not lock:held())
        if not deferred then agree_on(key, shared, false) end
        if math.random(3) == 1 then agree() end
      end
      if math.random(4) == 1 then hurry() end
      if told then error(told) end
    end
    agree()
    assert(own:check())
    own:release()
    conn:close()
    assert(support.pg_locks(conn.backend_pid)[1] == nil)
    if told then error(told) end
    print(("done %d %d %d"):format(interrupted, timeouts, granted))
  ]]

  -- The same in transactions that are rolled back: cancels hit the savepoints, too.
  local CANCELLED_INSIDE = TRUTH .. [[
    local conn = support.connect()
    local in_transaction = support.core.in_transaction
    local interrupted, timeouts, granted = 0, 0, 0
    there(conn)
    local deadline = support.core.now() + rounds / 1000
    while support.core.now() < deadline do
      local options = { shared = math.random(3) == 1, timeout = math.random(0, 40) / 10000 }
      repeat
        assert(conn:alive())
        pcall(conn.query, conn, "BEGIN")
      until in_transaction(conn)
      local ok, lock = pcall(conn.lock, conn, KEYS[math.random(#KEYS)], options)
      if ok then
        granted = granted + 1
        assert(lock:held() and #conn:locks() == 1)
        if math.random(2) == 1 then support.sleep(math.random() * 0.003) end
        local released, err = pcall(lock.release, lock)
        assert(released or err.code == "aborted_transaction", tostring(err))
        assert(not lock:held())
      elseif lock.code == "timeout" then
        timeouts = timeouts + 1
      else
        interrupted = interrupted + 1
        assert(lock.code == "interrupted" or lock.code == "aborted_transaction", tostring(lock))
      end
      repeat pcall(conn.query, conn, "ROLLBACK") until not in_transaction(conn)
      assert(#conn:locks() == 0)
      if on_server(conn) ~= "nothing" then
        support.wait_until("what could not be released inside", function()
          pcall(conn.ping, conn)
          return on_server(conn) == "nothing"
        end)
      end
    end
    conn:close()
    print(("done %d %d %d"):format(interrupted, timeouts, granted))
  ]]

  --- Cancels whatever the processes run, for so many seconds; what they counted.
  local function strike(script, seconds)
    local processes = start(4, script, nil, seconds * 1000)
    local pids = {}
    for i, process in ipairs(processes) do pids[i] = process.backend_pid end
    local deadline = core.now() + seconds
    repeat
      -- a volley hits statements that are over at once, too: releases, and the guard itself
      local volley = math.random(2) == 1 and 1 or math.random(2, 1000)
      support.observe("SELECT count(pg_cancel_backend($1)) FROM generate_series(1, $2::int)",
        pids[math.random(#pids)], volley)
      if math.random(2) == 1 then support.sleep(math.random() * 0.003) end
    until core.now() > deadline
    return finish(processes)
  end

  for where, script in pairs { [""] = CANCELLED, [" inside transactions"] = CANCELLED_INSIDE } do
    it("where pg_cancel_backend strikes waits and releases at random" .. where, function()
      local log_is_clean = watch_log()
      local interrupted, timeouts, granted = 0, 0, 0
      support.wait_until("every outcome", function()
        local counts = strike(script, math.max(0.3, 2 * math.min(1, size)) * support.slow)
        interrupted, timeouts, granted =
          interrupted + counts[1], timeouts + counts[2], granted + counts[3]
        return interrupted > 0 and timeouts > 0 and granted > 0
      end, 30)
      log_is_clean()
    end)
  end

  -- Many connections of this one process, each driven by a coroutine of its own.
  it("where conn:cancel() strikes waits at random", function()
    local log_is_clean = watch_log()
    local seconds = math.max(0.3, 2 * math.min(1, size)) * support.slow
    local deadline = core.now() + seconds
    local counts = { interrupted = 0, timeouts = 0, granted = 0 }

    local function seen_enough()
      return math.min(counts.interrupted, counts.timeouts, counts.granted) > 0
        or core.now() > deadline + 30 * support.slow
    end

    --- Drives what was begun; cancels it after `cancel_in` seconds. Whether it did, and what came.
    local function drive(conn, cancel_in)
      local began, cancelled = core.now(), false
      while core.step(conn) do
        if cancel_in and not cancelled and core.now() - began >= cancel_in then
          cancelled = conn:cancel()
          assert.is_true(cancelled)
        end
        coroutine.yield()
      end
      return cancelled, pcall(core.finish, conn)
    end

    local function holds(conn, lock, deferred)
      local function agrees()
        local rows = support.pg_locks(conn.backend_pid)
        local row = rows[1]
        return #rows == (lock and 1 or 0) and (not lock or row.granted
          and row.mode == (lock.shared and "ShareLock" or "ExclusiveLock")
          and row.objsubid == lock.key.objsubid)
      end
      assert.equal(lock and 1 or 0, #conn:locks())
      if not deferred then
        assert.is_true(agrees())
      elseif not agrees() then
        support.wait_until("the deferred releases", function() return conn:ping() and agrees() end)
      end
    end

    local function contend(deferred)
      local told
      local conn = support.connect {
        release = deferred and "deferred" or "confirmed",
        on_lost = function(_, err) told = err end,
      }
      conn:query "SET lock_timeout = '20s'"
      while core.now() < deadline or not seen_enough() do
        local waits = math.random(3)
        local timeout = waits == 1 and 0 or waits == 2 and math.random(1, 200) / 10000 or nil
        support.begin(conn, timeout and "try_lock" or "lock", KEYS[math.random(#KEYS)],
          { shared = math.random(3) == 1, timeout = timeout })
        -- 20 s would show in the counts: nobody else waits for ever
        local cancelled, ok, lock, why = drive(conn, math.random(2) == 1 and math.random() * 0.008)
        local got = ok and lock or nil
        if cancelled then
          assert.is_false(ok)
          assert.equal("interrupted", lock.code)
          counts.interrupted = counts.interrupted + 1
        elseif got then
          assert.is_true(lock:held())
          counts.granted = counts.granted + 1
        else
          assert.is_true(ok, tostring(lock))
          assert.equal(timeout > 0 and "timeout" or "busy", why)
          counts.timeouts = counts.timeouts + 1
        end
        if math.random(2) == 1 then holds(conn, got, deferred) end
        if got then
          for _ = 1, math.random(0, 3) do coroutine.yield() end
          assert.equal(conn, core.start.release(lock))
          local _, released, result = drive(conn)
          assert.is_true(released, tostring(result))
          assert.is_true(result)
          assert.is_false(lock:held())
          if math.random(2) == 1 then holds(conn, nil, deferred) end
        end
        assert.is_nil(told)
      end
      holds(conn, nil, deferred)
    end

    local contenders = {}
    for i = 1, 8 do
      contenders[i] = coroutine.create(function() contend(i % 2 == 0) end)
    end
    while #contenders > 0 do
      for i = #contenders, 1, -1 do
        local ok, err = coroutine.resume(contenders[i])
        if not ok then error(debug.traceback(contenders[i], tostring(err)), 0) end
        if coroutine.status(contenders[i]) == "dead" then table.remove(contenders, i) end
      end
      support.sleep(0.0003)
    end
    for what, count in pairs(counts) do assert.is_true(count > 0, what) end
    log_is_clean()
  end)
end)
