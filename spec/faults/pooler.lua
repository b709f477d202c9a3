--- A PgBouncer of a spec's own, in front of the server that all specs share.
---
---     pooler.start()
---     pglocks.connect { conninfo = pooler.conninfo "session", pooled = "session" }
---     pooler.stop()

local server = require "spec.faults.server"
local support = require "spec.support"

local wait_until = support.wait_until

local pooler = {}

local PROGRAM = "/usr/sbin/pgbouncer" -- Debian keeps it out of PATH
local PORT = 6432 -- the name of a socket in its folder, and nothing else

local CONF = [[
[databases]
%s
[pgbouncer]
unix_socket_dir = %s
listen_port = %d
auth_type = any
logfile = %s/log
%s
]]

-- One database for each mode. A second server connection is opened only while the first is taken.
local MODES = {
  session = "pool_mode=session pool_size=5",
  transaction = "pool_mode=transaction pool_size=2",
  statement = "pool_mode=statement pool_size=2",
}

--- Why there is none; nil: it can be started.
pooler.missing = server.cannot_make
  or not io.open(PROGRAM) and "pgbouncer is not installed"
  or nil

local running -- { folder =, pid = }

--- databases: by name, PgBouncer's settings of each; without it "session", "transaction" and
--- "statement", after their modes. They lead to the server of the specs, unless they say `host=`.
--- settings: more lines of its configuration.
function pooler.start(databases, settings)
  if pooler.missing then return end
  local folder = server.folder()
  local lines = {}
  for name, own in pairs(databases or MODES) do
    lines[#lines + 1] = ("%s = %s %s"):format(name, own:find("host=", 1, true) and "" or support.conninfo, own)
  end
  local file = assert(io.open(folder .. "/conf", "w"))
  file:write(CONF:format(table.concat(lines, "\n"), folder, PORT, folder, settings or ""))
  file:close()
  local pid = server.shell("sh -c '%s -q %s/conf >%s/said 2>&1 & echo $!'", PROGRAM, folder, folder)
  running = { folder = folder, pid = tonumber(pid) }
  -- Its socket is there before anybody listens. The name is that of its console, which opens no session.
  wait_until("pgbouncer", function()
    local conn = support.core.start.connect(support.core.conninfo(pooler.conninfo "pgbouncer"), 5)
    local ok, err = support.complete(conn)
    conn:close()
    return ok or not support.core.is_transient(err.message)
  end)
end

--- Its server connections go with it, and what is locked in them.
function pooler.stop()
  if not running then return end
  support.signal("TERM", running.pid)
  wait_until("pgbouncer's end", function() return support.has_ended(running.pid) end)
  support.shell("rm -rf " .. running.folder)
  running = nil
end

--- Of one of its databases.
function pooler.conninfo(database)
  return ("host=%s port=%d dbname=%s user=any"):format(running.folder, PORT, database)
end

return pooler
