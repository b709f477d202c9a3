--- What a process of the specs does to prove what it says: it writes a history, in the format of
--- spec/faults/model.lua, and looks at pg_locks through another session.

local support = require "spec.support"
local pglocks = require "pglocks"

local history = {}

--- A key as pg_locks shows it, in one word.
function history.key(key)
  key = pglocks.key(key)
  return ("%d:%d:%d"):format(key.classid, key.objid, key.objsubid)
end

--- "exclusive 0:42:1"
function history.name(shared, key)
  return (shared and "shared " or "exclusive ") .. history.key(key)
end

local function list(names)
  table.sort(names)
  return #names > 0 and table.concat(names, ", ") or "nothing"
end

--- What the server says that the session `pid` holds, or waits for.
function history.on_server(pid)
  local names = {}
  for _, row in ipairs(support.pg_locks(pid)) do
    local mode = not row.granted and "waits for"
      or ({ ExclusiveLock = "exclusive", ShareLock = "shared" })[row.mode] or row.mode
    names[#names + 1] = ("%s %s:%s:%d"):format(mode, row.classid, row.objid, row.objsubid)
  end
  return list(names)
end

--- What the connection says that it holds.
function history.on_client(conn)
  local names = {}
  for _, lock in ipairs(conn:locks()) do
    names[#names + 1] = history.name(lock.mode == "shared", lock.key)
  end
  return list(names)
end

--- A writer of events, `note(seconds or nil, owner, event, ...)`. Each is in the file when it
--- returns, in one write(2): a kill -9 of this process, or another writer of the file, takes none.
function history.writer(path)
  local file = assert(io.open(path, "a"))
  file:setvbuf "no"
  return function(seconds, ...)
    local line = ("%.9f %s\n"):format(seconds or support.core.now(), table.concat({ ... }, " "))
    assert(file:write(line))
  end
end

return history
