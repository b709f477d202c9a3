--- What the specs of faults share: a connection in each phase of its life, at the moment when the
--- fault strikes.

local support = require "spec.support"

local phases = {}

local CONNECTING = [[
  local conninfo, options = ...
  local pglocks = require "pglocks"
  local described = assert((loadstring or load)("return " .. options))()
  described.conninfo = conninfo
  -- Of a connection that connect never returned, nobody is told.
  described.on_lost = function() print "on_lost was called" end
  local now = require "pglocks.core".now
  local began = now()
  io.stdout:setvbuf "no"
  print "begun"
  local ok, conn = pcall(pglocks.connect, described)
  local seconds = now() - began
  if ok then
    print(("connected - %.3f"):format(seconds))
    conn:lock("after connecting"):release()
  else
    assert(conn.free_by == nil) -- no lock was in question
    print(("%s %s %.3f"):format(conn.code or conn, conn.sqlstate or "-", seconds))
  end
]]

--- Connects in another process, because that blocks. `options`: the Lua source of a table. The
--- result has the process's `pid`, and wait(), which returns how that ended: "connected" or the
--- error's code; the SQLSTATE or "-"; the seconds that it took.
function phases.connecting(conninfo, options)
  local process = support.spawn(CONNECTING, conninfo, options or "{}")
  assert(process.lines() == "begun")
  local function wait()
    local line = process.lines()
    process.close()
    local outcome, sqlstate, seconds = line:match "^(%S+) (%S+) (%S+)$"
    return outcome or line, sqlstate, tonumber(seconds)
  end
  return { pid = process.pid, wait = wait }
end

--- The same, when it has come to its first statement, which waits for a lock of `blocker`, another
--- connection to that server. The result has stuck(), too: its backend's pid while it waits there.
--- `query`: of a third connection; without it, of the specs' own.
function phases.stuck_connecting(blocker, conninfo, options, query)
  query = query or support.observe
  query "SELECT" -- connects
  blocker:query "BEGIN"
  blocker:query "LOCK TABLE pg_catalog.pg_settings"
  local result = phases.connecting(conninfo, options)
  function result.stuck()
    local row = query("SELECT pid FROM pg_locks WHERE NOT granted AND locktype = 'relation'")[1]
    return row and row.pid
  end
  support.wait_until("the client to be connecting", result.stuck)
  return result
end

--- `waiter` waits in the server's queue for the lock that `holder` has: that lock. `query`: of
--- another connection to that server; without it, of the specs' own.
function phases.waiting(waiter, holder, key, options, query)
  local lock = holder:lock(key)
  local pid = waiter.backend_pid
  support.begin(waiter, "lock", key, options)
  support.wait_until("backend " .. pid .. " to wait for a lock", function()
    return #(query or support.observe)("SELECT 1 FROM pg_locks WHERE pid = $1 AND NOT granted", pid) > 0
  end)
  return lock
end

--- The release of a lock has been sent, and the backend is stopped, so that it has not read it.
--- The function that is returned lets it go on. `query`: on another server than that of the specs.
function phases.releasing(conn, lock, query)
  local pid = conn.backend_pid
  -- Its last answer is here, but it may not have returned from sending that: there it would not say
  -- why it ends.
  support.wait_until("backend " .. pid .. " to be idle", function()
    return #(query or support.observe)(
      "SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'ClientRead'", pid) > 0
  end)
  support.signal("STOP", pid)
  support.core.start.release(lock)
  return function() support.shell("kill -s CONT " .. pid) end -- it may have been killed
end

return phases
