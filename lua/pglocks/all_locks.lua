-- all_locks.lua: the advisory locks of a whole database, as its server sees them.

local core = require "pglocks.core"
local opening = require "pglocks.connect"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

-- ---- the filter -------------------------------------------------------------------------

local function is_pid(value)
  return type(value) == "number" and value >= 1 and value <= 2147483647 and value % 1 == 0
end

-- What each option must be, and how to say that; `true`: the core looks.
local OPTIONS = {
  key = true, hash = true, namespace = true,
  pid = { is_pid, "the number of a process" },
  granted = { function(v) return type(v) == "boolean" end, "a boolean" },
}

local function check_filter(filter)
  if type(filter) ~= "table" then
    core.raise_argument(1, ("table of options expected, got %s"):format(type(filter)))
  end
  for name, value in pairs(filter) do
    local option = OPTIONS[name]
    if not option then
      core.raise_argument(1, ("unknown option '%s'"):format(tostring(name)))
    elseif option ~= true and not option[1](value) then
      core.raise_argument(1, ("option '%s' must be %s"):format(name, option[2]))
    end
  end
end

-- ---- the question -----------------------------------------------------------------------

-- In the order of keys: as an int4, an oid is the number that it was made of. For pg_blocking_pids the
-- server's whole lock table stands still: so it is called for waiters only. And int4eq, where an
-- operator would have the planner look through all sessions anew for each lock of the pid.
local SQL = [[
SELECT l.classid, l.objid, l.objsubid, l.pid, l.granted,
  l.mode OPERATOR(pg_catalog.=) 'ShareLock' AS shared,
  a.application_name, a.client_addr, a.client_port,
  %s AS since,
  CASE WHEN NOT l.granted THEN pg_catalog.pg_blocking_pids(l.pid) END AS blocked_by
FROM pg_catalog.pg_locks l
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid
WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'
  AND l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database d
    WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())
  AND ($1::pg_catalog.int4 IS NULL OR pg_catalog.int4eq(l.pid, $1))
  AND ($2::pg_catalog.bool IS NULL OR l.granted OPERATOR(pg_catalog.=) $2)
  AND ($3::pg_catalog.oid IS NULL OR l.classid OPERATOR(pg_catalog.=) $3)
  AND ($4::pg_catalog.oid IS NULL OR l.objid OPERATOR(pg_catalog.=) $4)
  AND ($5::pg_catalog.int2 IS NULL OR l.objsubid OPERATOR(pg_catalog.=) $5)
ORDER BY l.objsubid, l.classid::pg_catalog.int4,
  CASE WHEN l.objsubid OPERATOR(pg_catalog.=) 1 THEN l.objid::pg_catalog.int8 ELSE l.objid::pg_catalog.int4 END,
  l.granted DESC, since, l.pid, shared]]

local SINCE = SQL:format "CASE WHEN NOT l.granted THEN pg_catalog.date_part('epoch', l.waitstart) END"
local WITHOUT_SINCE = SQL:format "NULL::pg_catalog.float8"

local WITHIN_REPLY_TIMEOUT = nil

local function ask(conn, filter, key)
  -- A transaction goes on seeing the sessions that it saw first.
  if core.in_transaction(conn) then
    scheduled.execute(conn, WITHIN_REPLY_TIMEOUT, "SELECT pg_catalog.pg_stat_clear_snapshot()")
  end
  local rows = scheduled.execute(conn, WITHIN_REPLY_TIMEOUT,
    conn.server_version >= 140000 and SINCE or WITHOUT_SINCE, filter.pid, filter.granted,
    key and key.classid, key and key.objid, key and key.objsubid)
  return rows
end

-- ---- the answer -------------------------------------------------------------------------

-- The names that this process knows: those of all its connections, and of each by its pid. One key may
-- have several names; in a row of our own it is the one that its session knows.
local function known_names()
  local all, of = {}, {}
  for conn in pairs(opening.connections) do
    local names, pid = core.names(conn)
    if names then of[pid] = names end
    for key, name in pairs(names or {}) do all[key] = name end
  end
  return all, of
end

local function address(row)
  if not row.client_addr then return nil end
  local host = row.client_addr:find(":", 1, true) and "[" .. row.client_addr .. "]" or row.client_addr
  return ("%s:%d"):format(host, row.client_port)
end

-- Of an int4[] as text.
local function numbers(text)
  local list = {}
  for digits in text:gmatch "%d+" do list[#list + 1] = tonumber(digits) end
  return list
end

local function listed(row, names, names_of)
  local key = core.key_shown(row.classid, row.objid, row.objsubid)
  local shown = tostring(key)
  local own = names_of[row.pid]
  return {
    key = key,
    name = own and own[shown] or names[shown],
    mode = row.shared and "shared" or "exclusive",
    granted = row.granted,
    pid = row.pid,
    application = row.application_name ~= "" and row.application_name or nil,
    client = address(row),
    since = row.since and tonumber(row.since),
    blocked_by = row.blocked_by and numbers(row.blocked_by),
  }
end

--- Every advisory lock of the database that the connection is in, those too that are waited for, as far
--- as `filter` lets them through.
---@param filter? pglocks.filter
---@return pglocks.listed[]
function core.connection:all_locks(filter)
  if filter == nil then filter = {} end
  check_filter(filter)
  local rows = ask(self, filter, core.key_among(filter))
  local names, names_of = known_names()
  for i, row in ipairs(rows) do rows[i] = listed(row, names, names_of) end
  return rows
end
