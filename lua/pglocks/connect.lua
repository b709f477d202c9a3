-- connect.lua: from a description to a connection made for holding locks: which hosts, within
-- which time, with which settings. The steps themselves are the core's.

local core = require "pglocks.core"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

-- Seconds.
local HOST_TIMEOUT = 5 -- for each host, where connect_timeout does not say
local FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1 -- between two rounds over the hosts
local TOO_LATE = 0.05 -- before the deadline, for another round
local LONGEST_LEASE = 2147483647 -- milliseconds, as PostgreSQL counts them
local SERVER_FREES = 30 -- a vanished client's locks, by the settings below

-- The client must notice a vanished server before the server gives up a vanished client: here
-- after about 10 s, there after about 30 s (SERVER_FREES).
local CLIENT_DEFAULTS = {
  fallback_application_name = "pglocks",
  keepalives = "1",
  -- Often, because what was last heard before the network stopped may be that old already: so a
  -- silence of 7 s is always survived.
  keepalives_idle = "2",
  keepalives_interval = "1",
  keepalives_count = "8",
  tcp_user_timeout = "10000",
}

-- One round trip right after connecting: who answers (a pooler invents the pid that libpq was
-- told), whether it is a standby, and, unless it is a pooler, the settings: time-outs of the role
-- or the database must not end a holder or a waiter, and a vanished client must lose its locks.
-- Only what the server knows is set; and a server elsewhere than on Linux may refuse to look whether
-- a client that waits is still there, and with that the whole statement.
local HANDSHAKE = [[
SELECT pg_catalog.pg_backend_pid() AS backend_pid, pg_catalog.pg_is_in_recovery() AS standby,
  pg_catalog.count(pg_catalog.set_config(v.name, v.value, false)) AS settings
FROM (VALUES ('statement_timeout', '0'), ('lock_timeout', '0'), ('transaction_timeout', '0'),
  ('idle_session_timeout', $2::pg_catalog.text),
  ('idle_in_transaction_session_timeout', $2::pg_catalog.text),
  ('client_connection_check_interval', '5000'), ('tcp_keepalives_idle', '15'),
  ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'), ('tcp_user_timeout', '30000')
) v(name, value)
JOIN pg_catalog.pg_settings s ON s.name OPERATOR(pg_catalog.=) v.name
WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) $1::pg_catalog.int4
  AND (v.name OPERATOR(pg_catalog.<>) 'client_connection_check_interval'
    OR pg_catalog.version() OPERATOR(pg_catalog.~~) '%linux%')]]

-- ---- descriptions -----------------------------------------------------------------------

local function seconds(value)
  return type(value) == "number" and value > 0 and value < math.huge
end

local function is_boolean(value) return type(value) == "boolean" end

local function at_least(least)
  return { function(v) return type(v) == "number" and v >= least and v % 1 == 0 and v < math.huge end,
    ("an integer, at least %d"):format(least) }
end

-- Our own options: what each must be, and how to say that.
local OPTIONS = {
  timeout = { seconds, "seconds, more than 0" },
  reply_timeout = { seconds, "seconds, more than 0" },
  on_lost = { function(v) return type(v) == "function" end, "a function" },
  release = { function(v) return v == "confirmed" or v == "deferred" end,
    '"confirmed" or "deferred"' },
  allow_standby = { is_boolean, "a boolean" },
  lease = { seconds, "seconds, more than 0" },
  pooled = { function(v) return v == "session" or v == "transaction" end,
    '"session" or "transaction"' },
  scheduler = true, -- by scheduled.choose
  dedicated = { is_boolean, "a boolean" },
  handovers = at_least(0),
  handover_time = { function(v) return type(v) == "number" and v >= 0 and v < math.huge end,
    "seconds, 0 or more" },
  locks_per_connection = at_least(1),
  max_connections = at_least(2),
  pool_size = at_least(1),
}

-- Those that make no sense everywhere.
local LOCKERS = { "setup's databases and of lockers", locker = true, database = true }
local ONLY_OF = {
  dedicated = { "setup's databases", database = true },
  handovers = LOCKERS, handover_time = LOCKERS, locks_per_connection = LOCKERS, max_connections = LOCKERS,
  pool_size = LOCKERS,
}

-- What is wrong must not be quoted: it may be a part of a password.
local BAD_CONNINFO = "conninfo string that libpq can parse expected"

local function add_table(described, keywords, options)
  local known = core.conninfo()
  for name, value in pairs(described) do
    local option = OPTIONS[name]
    if name == "scheduler" then
      local scheduler, wrong = scheduled.choose(value)
      if wrong then return "option 'scheduler': " .. wrong end
      options.scheduler = scheduler
    elseif option then
      if not option[1](value) then
        return ("option '%s' must be %s"):format(name, option[2])
      end
      options[name] = value
    elseif name ~= "conninfo" then
      if type(name) ~= "string" or known[name] == nil then
        return ("unknown key '%s'"):format(tostring(name))
      elseif type(value) ~= "string" and type(value) ~= "number" then
        return ("keyword '%s' must be a string or a number"):format(name)
      end
      keywords[name] = type(value) == "number" and ("%.14g"):format(value) or value
    end
  end
end

-- A password with an unescaped @ or / in it would turn up, in parts, as the host, the port or the
-- database, and in messages about them.
local AMBIGUOUS_URI = "URI with %40 and %2F for @ and / in the user's name and password expected"

local function add_conninfo(string, keywords)
  if type(string) ~= "string" or string:find("\0", 1, true) then return BAD_CONNINFO end
  local address = string:match "^postgres%w*://(.*)"
  local place = address and (address:match "^[^@/]*@(.*)" or address:match "/.*")
  if place and place:match("^[^?]*"):find("@", 1, true) then return AMBIGUOUS_URI end
  local parsed = core.conninfo(string)
  if not parsed then return BAD_CONNINFO end
  for keyword, value in pairs(parsed) do keywords[keyword] = value end
end

-- Only a network can part a client from its server without a word.
local function is_remote(keywords)
  local host = keywords.host or core.conninfo().host or ""
  for name in (keywords.hostaddr or host .. ","):gmatch "([^,]+)" do
    if not name:find "^[/@]" then return true end
  end
  return false
end

-- Seconds after which the client's kernel gives up a connection whose server does not answer: by
-- TCP_USER_TIMEOUT at the next keepalive probe, or else after so many probes.
local function noticed_after(keywords)
  local function number(keyword)
    return tonumber(keywords[keyword] or CLIENT_DEFAULTS[keyword]) or 0
  end
  local idle, interval = number "keepalives_idle", number "keepalives_interval"
  local count, user_timeout = number "keepalives_count", number "tcp_user_timeout" / 1000
  if number "keepalives" == 0 or idle <= 0 or interval <= 0 then return math.huge end
  if user_timeout > 0 then
    return idle + math.max(1, math.ceil((user_timeout - idle) / interval)) * interval
  end
  return count > 0 and idle + count * interval or math.huge
end

-- What is wrong with the times, if anything: the server must never be the first to give up.
local function check_times(keywords, options)
  if not is_remote(keywords) then return end
  local noticed = noticed_after(keywords)
  if noticed >= SERVER_FREES then
    return ("keepalives and tcp_user_timeout: the client would notice a vanished server %s, and must"
      .. " before the server frees its locks, after %g s")
      :format(noticed < math.huge and ("after %g s"):format(noticed) or "never", SERVER_FREES)
  elseif options.lease and options.lease <= noticed then
    return ("option 'lease' must be more than the %g s after which the client notices a vanished"
      .. " server: shorten keepalives_idle, keepalives_interval and tcp_user_timeout first")
      :format(noticed)
  end
end

--- Reads a description: nil, a conninfo string or URI, or a table of libpq's keywords and/or
--- `conninfo`, and our options.
---@param described? string|pglocks.description
---@param scheduler pglocks.scheduler|false where it does not name one
---@param of "connection"|"database"|"locker"  what is described
---@return table|nil keywords
---@return table|string options, or what is wrong
local function describe(described, scheduler, of)
  local keywords, options, wrong = {}, {}, nil
  if type(described) == "string" then
    wrong = add_conninfo(described, keywords)
  elseif type(described) == "table" then
    if described.conninfo ~= nil then wrong = add_conninfo(described.conninfo, keywords) end
    wrong = wrong or add_table(described, keywords, options)
  elseif described ~= nil then
    wrong = ("conninfo string or table expected, got %s"):format(type(described))
  end
  if not wrong and keywords.port and keywords.port:find "[^%d,]" then
    wrong = "keyword 'port' must be a number"
  end
  for name in pairs(options) do
    local only = ONLY_OF[name]
    if only and not only[of] then wrong = ("option '%s' is one of %s"):format(name, only[1]) end
  end
  wrong = wrong or check_times(keywords, options)
  if wrong then return nil, wrong end
  if options.scheduler == nil then options.scheduler = scheduler end
  return keywords, options
end

-- ---- hosts ------------------------------------------------------------------------------

local function split(list)
  local items = {}
  for item in ((list or "") .. ","):gmatch "([^,]*)," do items[#items + 1] = item end
  return items
end

-- libpq's own walk over several hosts, and over the addresses of one, ignores the time: so it is
-- given one address at a time. `resolves`: the names are somebody else's to look up.
local function each_address(keywords, resolves)
  local defaults = core.conninfo()
  local function given(keyword) return keywords[keyword] or defaults[keyword] or nil end
  local names, addresses, ports = split(given "host"), split(given "hostaddr"), split(given "port")
  local count = math.max(#names, #addresses)
  local attempts = {}
  for i = 1, count do
    local host = #names == count and names[i] or given "host"
    local address = #addresses == count and addresses[i] or given "hostaddr"
    if address == "" then address = nil end -- there is none in the list, or no list
    local found = not address and not resolves and core.addresses(host) or { address or false }
    for _, one in ipairs(found) do
      local attempt = {}
      for keyword, value in pairs(CLIENT_DEFAULTS) do attempt[keyword] = value end
      for keyword, value in pairs(keywords) do attempt[keyword] = value end
      attempt.host, attempt.hostaddr = host, one or nil
      attempt.port = #ports == count and ports[i] or given "port"
      attempt.connect_timeout = nil -- ours
      attempts[#attempts + 1] = attempt
    end
  end
  return attempts, tonumber(given "connect_timeout")
end

-- ---- connecting -------------------------------------------------------------------------

-- A server that stops, crashes, starts, or has too many clients.
local TRANSIENT = { ["57P01"] = true, ["57P02"] = true, ["57P03"] = true, ["53300"] = true }

-- May it have gone by at the next try?
local function is_transient(err)
  if err.sqlstate then return TRANSIENT[err.sqlstate] end
  return core.is_transient(err.message)
end

-- What a server refuses for good, another host would refuse as well.
local function try_next_host(err) return err.sqlstate == nil or is_transient(err) end

local NOBODY = 0 -- a backend_pid

local function handshake(conn, options, time_left)
  local idle = "0"
  if options.lease then
    if conn.server_version < 140000 then
      core.raise("server", "a lease needs PostgreSQL 14 or newer")
    end
    idle = ("%.0f"):format(math.min(math.ceil(options.lease * 1000), LONGEST_LEASE))
  end
  -- Of a session that others get, nothing is set.
  local kept = options.pooled == "transaction" and NOBODY or conn.backend_pid
  local row = scheduled.execute(conn, time_left, HANDSHAKE, kept, idle)[1]
  if options.pooled == "transaction" then
    core.configure(conn, { pooled = "transaction", lease = options.lease })
  elseif row.backend_pid ~= conn.backend_pid then
    core.configure(conn, { pooled = "session", backend_pid = row.backend_pid })
    if options.pooled ~= "session" then
      core.raise("pooled", "this is a connection pooler, which may give one session to several"
        .. " clients; say pooled = \"session\" where it pools sessions only, or pooled = \"transaction\"")
    end
    local own = scheduled.execute(conn, time_left, HANDSHAKE, row.backend_pid, idle)[1]
    if own.backend_pid ~= row.backend_pid then
      core.raise("pooled", "this connection pooler does not keep to one session")
    end
  end
  if row.standby and not options.allow_standby then
    core.raise("standby", "this server is a standby, and its locks are its own")
  end
end

-- All that this Lua has opened, as keys.
local connections = setmetatable({}, { __mode = "k" })

local function open(keywords, options, time_left)
  local scheduler = options.scheduler
  local began = core.now()
  local begin = scheduler and scheduler.connect or core.start.connect
  local conn, where = begin(keywords, time_left)
  if not conn then return nil, select(2, pcall(core.raise, "connect", where)) end
  if scheduler then scheduled.adopt(conn, scheduler) end
  local ok, err = scheduled.run(conn)
  if not ok then
    err.message = (where or "") .. err.message
    return nil, err
  end
  core.configure(conn, {
    reply_timeout = options.reply_timeout,
    deferred = options.release == "deferred" or scheduler and options.release == nil,
    commits_deferred = options.release == "deferred",
  })
  ok, err = pcall(options.handshake or handshake, conn, options,
    math.max(0.001, time_left - (core.now() - began)), keywords)
  if ok then
    core.configure(conn, { on_lost = options.on_lost }) -- nobody is told of one that was never his
    connections[conn] = true
    return conn
  end
  conn:close()
  if type(err) ~= "table" then error(err, 0) end -- Ctrl-C
  if err.code == "unknown" or err.code == "lost" then -- no lock was in question
    err.code, err.free_by, err.hint = "connect", nil, nil
  end
  return nil, err
end

-- One round over the addresses: a connection, or what they all said, and whether to try again.
local function walk(attempts, options, host_timeout, deadline)
  local messages, last, again = {}, nil, false
  for _, one in ipairs(attempts) do
    local time_left = math.min(host_timeout, deadline - core.now())
    if time_left <= 0 then break end
    local conn, err = open(one, options, time_left)
    if conn then return conn end
    messages[#messages + 1], last = err.message, err
    again = again or is_transient(err)
    if not try_next_host(err) then
      again = false
      break
    end
  end
  if last then last.message = table.concat(messages, "; ") end
  return nil, last, again
end

--- Opens what `describe` has read: address after address, and again from the first one while a
--- server may only be starting, stopping or full, until the time is over.
---@param keywords table<string, string>
---@param options table  `handshake`: of the selftest, in the place of that for locks
---@param limit? number  seconds that a caller has left, where that is less than the options say
---@return pglocks.connection|nil connection  nil: that was too little to hear of anything wrong
local function connect(keywords, options, limit)
  local scheduler = options.scheduler
  local attempts, host_timeout = each_address(keywords, scheduler and scheduler.connect)
  if not host_timeout or host_timeout <= 0 then host_timeout = HOST_TIMEOUT end
  local patience = math.min(options.timeout or host_timeout * #attempts, limit or math.huge)
  local deadline = core.now() + patience
  local sleep = scheduler and scheduler.sleep or core.sleep
  local pause, reason, heard = FIRST_PAUSE, nil, false
  while true do
    local conn, err, again = walk(attempts, options, host_timeout, deadline)
    if conn then return conn end
    local left = deadline - core.now()
    -- A round that ran out of time had none to hear why.
    if err and (not reason or left > 0) then reason, heard = err, left > 0 or not again end
    if not again or left < TOO_LATE then
      if patience == limit and not heard then return nil end
      if not reason then core.raise("connect", ("no connection within %.3g s"):format(patience)) end
      error(reason, 0)
    end
    -- Not all at once, where many wait for one server; the program's random numbers are its own.
    local jitter = core.now() * 1e5 % 1
    sleep(math.min(pause * (0.5 + jitter), left / 2))
    pause = math.min(pause * 2, LONGEST_PAUSE)
  end
end

return { describe = describe, connect = connect, connections = connections, only_of = ONLY_OF }
