-- connect.lua: from a description to a connection made for holding locks: which hosts, within
-- which time, with which settings. The steps themselves are the core's.

local core = require "pglocks.core"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

local HOST_TIMEOUT = 5 -- seconds for each host, where connect_timeout does not say

-- The client must notice a vanished server before the server gives up a vanished client: here
-- after about 10 s, there after about 30 s.
local CLIENT_DEFAULTS = {
  fallback_application_name = "pglocks",
  keepalives = "1",
  keepalives_idle = "5",
  keepalives_interval = "2",
  keepalives_count = "3",
  tcp_user_timeout = "10000",
}

-- One round trip right after connecting: who answers (a pooler invents the pid that libpq was
-- told), whether it is a standby, and, unless it is a pooler, the settings: time-outs of the role
-- or the database must not end a holder or a waiter, and a vanished client must lose its locks.
-- Only what the server knows is set.
local HANDSHAKE = [[
SELECT pg_catalog.pg_backend_pid() AS backend_pid, pg_catalog.pg_is_in_recovery() AS standby,
  pg_catalog.count(pg_catalog.set_config(v.name, v.value, false)) AS settings
FROM (VALUES ('statement_timeout', '0'), ('lock_timeout', '0'), ('idle_session_timeout', '0'),
  ('idle_in_transaction_session_timeout', '0'), ('transaction_timeout', '0'),
  ('client_connection_check_interval', '5000'), ('tcp_keepalives_idle', '15'),
  ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'), ('tcp_user_timeout', '30000')
) v(name, value)
JOIN pg_catalog.pg_settings s ON s.name OPERATOR(pg_catalog.=) v.name
WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) $1::pg_catalog.int4]]

-- ---- descriptions -----------------------------------------------------------------------

local function seconds(value)
  return type(value) == "number" and value > 0 and value < math.huge
end

-- Our own options: what each must be, and how to say that.
local OPTIONS = {
  timeout = { seconds, "seconds, more than 0" },
  reply_timeout = { seconds, "seconds, more than 0" },
  on_lost = { function(v) return type(v) == "function" end, "a function" },
  release = { function(v) return v == "confirmed" or v == "deferred" end,
    '"confirmed" or "deferred"' },
  allow_standby = { function(v) return type(v) == "boolean" end, "a boolean" },
  pooled = { function(v) return v == "session" end, '"session"' },
  pool_size = { function(v) return type(v) == "number" and v >= 1 and v % 1 == 0 end,
    "an integer, at least 1" },
  scheduler = true, -- by scheduled.choose
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
  local address = string:match "^postgres%w*://([^?]*)"
  if address and address:find "[@/].*@" then return AMBIGUOUS_URI end
  local parsed = core.conninfo(string)
  if not parsed then return BAD_CONNINFO end
  for keyword, value in pairs(parsed) do keywords[keyword] = value end
end

--- Reads a description: nil, a conninfo string or URI, or a table of libpq's keywords and/or
--- `conninfo`, and our options.
---@param described? string|pglocks.description
---@param scheduler pglocks.scheduler|false where it does not name one
---@return table|nil keywords
---@return table|string options, or what is wrong
local function describe(described, scheduler)
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

-- libpq's own walk over several hosts ignores the time: so it is given one at a time.
local function each_host(keywords)
  local defaults = core.conninfo()
  local function given(keyword) return keywords[keyword] or defaults[keyword] or nil end
  local names, addresses, ports = split(given "host"), split(given "hostaddr"), split(given "port")
  local count = math.max(#names, #addresses)
  local attempts = {}
  for i = 1, count do
    local one = {}
    for keyword, value in pairs(CLIENT_DEFAULTS) do one[keyword] = value end
    for keyword, value in pairs(keywords) do one[keyword] = value end
    one.host = #names == count and names[i] or given "host"
    one.hostaddr = #addresses == count and addresses[i] or given "hostaddr"
    one.port = #ports == count and ports[i] or given "port"
    one.connect_timeout = nil -- ours
    attempts[i] = one
  end
  return attempts, tonumber(given "connect_timeout")
end

-- ---- connecting -------------------------------------------------------------------------

-- A host that answers with anything else would not be mended by another one.
local function try_next_host(err)
  return err.sqlstate == nil or err.sqlstate == "57P03" or err.sqlstate == "53300"
    or err.code == "standby"
end

local function handshake(conn, options, time_left)
  local row = scheduled.execute(conn, time_left, HANDSHAKE, conn.backend_pid)[1]
  if row.backend_pid ~= conn.backend_pid then
    core.configure(conn, { pooled = true, backend_pid = row.backend_pid })
    if options.pooled ~= "session" then
      core.raise("pooled", "this is a connection pooler, which may give one session to several"
        .. " clients; say pooled = \"session\" where it pools sessions only")
    end
    scheduled.execute(conn, time_left, HANDSHAKE, row.backend_pid)
  end
  if row.standby and not options.allow_standby then
    core.raise("standby", "this server is a standby, and its locks are its own")
  end
end

local function open(keywords, options, time_left)
  local scheduler = options.scheduler
  local began = core.now()
  local begin = scheduler and scheduler.connect or core.start.connect
  local conn, where = begin(keywords, time_left, options.on_lost)
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
  })
  ok, err = pcall(handshake, conn, options, math.max(0.001, time_left - (core.now() - began)))
  if ok then return conn end
  conn:close()
  if type(err) ~= "table" then error(err, 0) end -- Ctrl-C
  if err.code == "unknown" or err.code == "lost" then -- no lock was in question
    err.code, err.free_by, err.hint = "connect", nil, nil
  end
  return nil, err
end

--- Opens what `describe` has read, host after host.
---@return userdata connection
local function connect(keywords, options)
  local attempts, host_timeout = each_host(keywords)
  local deadline = core.now() + (options.timeout or math.huge)
  local messages, last = {}, nil
  if not host_timeout or host_timeout <= 0 then host_timeout = HOST_TIMEOUT end
  for _, one in ipairs(attempts) do
    local time_left = math.min(host_timeout, deadline - core.now())
    if time_left <= 0 then break end
    local conn, err = open(one, options, time_left)
    if conn then return conn end
    messages[#messages + 1], last = err.message, err
    if not try_next_host(err) then break end
  end
  last.message = table.concat(messages, "; ")
  error(last, 0)
end

return { describe = describe, connect = connect }
