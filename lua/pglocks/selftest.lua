-- selftest.lua: what an address can be trusted with, found out by two connections to it.
--
-- No connection here holds anything outside an open transaction: a pooler does not hand on a session
-- in which one is open, but ends it. So nothing is left behind, whenever we die. No session's
-- settings are changed, and there is no named statement.

local core = require "pglocks.core"
local opening = require "pglocks.connect"
local run = require "pglocks.scope"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

-- ---- statements -------------------------------------------------------------------------

local WITHIN_REPLY_TIMEOUT = nil

-- Which session answers, of which server: a standby has the identifier of its primary, but started at
-- another time. And the halves of a key that nobody else uses.
local ASK = [[
SELECT pg_catalog.pg_backend_pid() AS pid, pg_catalog.pg_is_in_recovery() AS standby,
  (pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time())
    OPERATOR(pg_catalog.*) 1000000::pg_catalog.float8)::pg_catalog.int8 AS started,
  pg_catalog.floor(pg_catalog.random() OPERATOR(pg_catalog.*) 4294967296::pg_catalog.float8)
    ::pg_catalog.int8 AS high,
  pg_catalog.floor(pg_catalog.random() OPERATOR(pg_catalog.*) 4294967296::pg_catalog.float8)
    ::pg_catalog.int8 AS low]]

-- On the halves of a key.
local function call(name)
  return ("SELECT pg_catalog.%s(($1::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32)"
    .. " OPERATOR(pg_catalog.|) $2::pg_catalog.int8) AS answer"):format(name)
end

local TAKE = { session = call "pg_try_advisory_lock", transaction = call "pg_try_advisory_xact_lock" }
local UNLOCK = call "pg_advisory_unlock"
local SHOWN = [[
SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_locks l
  WHERE l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
    AND l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted
    AND l.mode OPERATOR(pg_catalog.=) 'ExclusiveLock' AND l.objsubid OPERATOR(pg_catalog.=) 1
    AND l.classid OPERATOR(pg_catalog.=) $1::pg_catalog.oid
    AND l.objid OPERATOR(pg_catalog.=) $2::pg_catalog.oid) AS answer]]

local function execute(conn, sql, ...)
  return scheduled.execute(conn, WITHIN_REPLY_TIMEOUT, sql, ...)[1]
end

-- ---- sessions ---------------------------------------------------------------------------

-- A test in progress:
--   address       the keywords of the host that the first connection came to
--   first, second its connections
--   invented      the first was told another pid than that of its session: by a pooler
--   started       when the server that answered first was
--   heard         by pid: the connection that this session answered
--   pid           by connection: the session that answered it
--   moves         a connection was answered by more than one session, or a session answered both
--   several       servers were found where one was expected
--   waits         the second connection is there, and waits for its first answer

-- Of whom a session is, that no pid says: close() ends an open transaction, and lets go of nothing in
-- a session that may hold the locks of others.
local NOBODY = 0

local function note(test, conn, row)
  if row.started ~= test.started then test.several = true end
  local who, pid = test.heard[row.pid], test.pid[conn]
  if who and who ~= conn or pid and pid ~= row.pid then test.moves = true end
  test.heard[row.pid], test.pid[conn] = conn, row.pid
end

local function ask(test, conn) note(test, conn, execute(conn, ASK)) end

-- In the place of the handshake of a connection for locks, which would refuse.
local function greet_first(test, conn, options, seconds, keywords)
  local told = conn.backend_pid
  core.configure(conn, { pooled = "session", backend_pid = NOBODY })
  local row = scheduled.execute(conn, seconds, ASK)[1]
  test.server_version, test.standby = conn.server_version, row.standby
  if row.standby and not options.allow_standby then -- another host may be none
    core.raise("standby", "this server is a standby, and its locks are its own")
  end
  test.invented, test.started, test.key = told ~= row.pid, row.started, { row.high, row.low }
  test.address = {}
  for keyword, value in pairs(keywords) do test.address[keyword] = value end
  note(test, conn, row)
end

local function greet_second(test, conn, _, seconds)
  core.configure(conn, { pooled = "session", backend_pid = NOBODY })
  test.waits = true
  local row = scheduled.execute(conn, seconds, ASK)[1]
  test.waits = false
  note(test, conn, row)
end

local function open(test, keywords, options, greet)
  return opening.connect(keywords, {
    scheduler = options.scheduler, timeout = options.timeout, reply_timeout = options.reply_timeout,
    allow_standby = options.allow_standby,
    handshake = function(...) greet(test, ...) end,
  })
end

-- Where the first one is. A second one that is let in, and then waits for its first answer, waits for
-- a session that a pooler has not got.
local function open_second(test, keywords, options)
  test.address.connect_timeout = keywords.connect_timeout
  local ok, opened = pcall(open, test, test.address, options, greet_second)
  if ok then return opened end
  if type(opened) == "table" then
    opened.message = "a second connection, beside one that was opened: " .. opened.message
    if test.waits then opened.code = "unknown" end
  end
  error(opened, 0)
end

-- ---- pooling ----------------------------------------------------------------------------

local function rollback(conn) execute(conn, "ROLLBACK") end

local function begin(test, conn)
  execute(conn, "BEGIN")
  ask(test, conn)
end

-- Does BEGIN end the connection?
local function is_thrown_out(conn)
  local ok, err = pcall(execute, conn, "BEGIN")
  if ok then return false end
  if type(err) ~= "table" or err.code ~= "lost" then error(err, 0) end
  return true, err
end

-- Are there transactions? Not where statements are pooled: PgBouncer closes the connection that begins
-- one, and that without a word.
local function has_transactions(test)
  local thrown_out, err = is_thrown_out(test.second)
  if not thrown_out then
    rollback(test.second)
    return true
  end
  ask(test, test.first) -- raises if it is not BEGIN that ended the second one
  if not is_thrown_out(test.first) then error(err, 0) end
  return false
end

-- Others may use the pooler meanwhile, and by chance leave us the same session.
local ROUNDS = 3

-- Is the first connection always answered by the same session? While a transaction of the second one
-- occupies the session that was used last, a pooler of transactions has to answer from another one;
-- and after it, in whatever order it goes through its sessions.
local function look_for_moves(test)
  for _ = 1, ROUNDS do
    begin(test, test.second)
    ask(test, test.first)
    rollback(test.second)
    ask(test, test.first)
    if test.moves then return end
  end
end

-- ---- locks ------------------------------------------------------------------------------

-- The role may not, the function is not there, or does nothing but say so.
local REFUSALS = { ["42501"] = true, ["42883"] = true, ["0A000"] = true }

local function answer(test, conn, sql) return execute(conn, sql, test.key[1], test.key[2]).answer end

-- Whether the second connection is given the lock; it does not keep it.
local function is_given_second(test, scope)
  local conn = test.second
  begin(test, conn)
  local given = answer(test, conn, TAKE[scope])
  if given and scope == "session" then answer(test, conn, UNLOCK) end
  rollback(conn)
  return given
end

-- Nil: a lock of that scope excludes, shows and ends. Otherwise what is wrong with it.
local function try_lock(test, scope)
  local conn = test.first
  begin(test, conn)
  local given = answer(test, conn, TAKE[scope])
  local shown = answer(test, conn, SHOWN)
  local shared = is_given_second(test, scope)
  if scope == "session" then answer(test, conn, UNLOCK) else rollback(conn) end
  local free = is_given_second(test, scope)
  if scope == "session" then rollback(conn) end
  return not given and "was refused, although nobody had it"
    or shared and "was given to two connections at once"
    or not shown and "was given, but pg_locks does not show it"
    or not free and "did not become free when it was released"
    or nil
end

-- The same, where the server may refuse the functions.
local function what_is_wrong(test, scope)
  local ok, result = pcall(try_lock, test, scope)
  if ok then return result end
  if type(result) ~= "table" or not REFUSALS[result.sqlstate] then error(result, 0) end
  for _, conn in ipairs { test.first, test.second } do
    if core.in_transaction(conn) then rollback(conn) end
  end
  return "is refused by the server: " .. result.message
end

-- ---- results ----------------------------------------------------------------------------

local Result = {}

function Result:__tostring() return self.message end

local KINDS = {
  ["direct"] = { session = true, transaction = true,
    message = "This is a direct connection to the server: session locks and transaction locks can be"
      .. " trusted." },
  ["session pooling"] = { session = true, transaction = true, pooled = "session",
    message = "A connection pooler is in between that pools sessions: session locks and transaction"
      .. " locks can be trusted. Connect with pooled = \"session\"." },
  ["transaction pooling"] = { session = false, transaction = true, pooled = "transaction",
    message = "A connection pooler is in between that pools transactions: session locks cannot be"
      .. " trusted, transaction locks can. Connect directly, or with pooled = \"transaction\"." },
  ["statement pooling"] = { session = false, transaction = false,
    message = "A connection pooler is in between that pools statements: no lock can be trusted."
      .. " Connect directly, or have it pool sessions or transactions." },
  ["standby"] = { session = false, transaction = false,
    message = "This server is a standby: its locks are its own, and exclude nobody on the primary."
      .. " Connect to the primary." },
  ["several servers"] = { session = false, transaction = false,
    message = "Two connections to this address came to two servers, whose locks do not exclude each"
      .. " other. Connect to the address of one of them." },
}

local function result(test, kind)
  local found = { kind = kind, server_version = test.server_version }
  for field, value in pairs(KINDS[kind]) do found[field] = value end
  return setmetatable(found, Result)
end

-- wrong: by scope, what is.
local function without_locks(test, wrong, tried)
  local found = { kind = "no locks", server_version = test.server_version }
  local said = {}
  for _, scope in ipairs(tried) do
    found[scope] = not wrong[scope]
    said[#said + 1] = wrong[scope] and ("a %s lock %s"):format(scope, wrong[scope])
  end
  found.session = found.session or false
  found.message = ("The advisory locks of this server cannot be trusted: %s."
    .. " Connect to a server where they work."):format(table.concat(said, ", and "))
  return setmetatable(found, Result)
end

-- ---- the test ---------------------------------------------------------------------------

local function examine(test, keywords, options)
  test.first = open(test, keywords, options, greet_first)
  if test.standby then return result(test, "standby") end
  test.second = open_second(test, keywords, options)
  if test.several then return result(test, "several servers") end

  if not has_transactions(test) then return result(test, "statement pooling") end
  if not test.moves then look_for_moves(test) end

  local tried, wrong = { "transaction" }, {}
  if not test.moves then
    tried[2] = "session"
    -- These are ours alone: close() may let go of what is held there.
    for _, conn in ipairs { test.first, test.second } do
      core.configure(conn, { backend_pid = test.pid[conn] })
    end
  end
  for _, scope in ipairs(tried) do wrong[scope] = what_is_wrong(test, scope) end
  if test.several then return result(test, "several servers") end
  if next(wrong) then return without_locks(test, wrong, tried) end
  return result(test, test.moves and "transaction pooling" or test.invented and "session pooling" or "direct")
end

-- An error as connecting would raise it.
local function told(test, err)
  if type(err) ~= "table" then return err end
  if err.code == "standby" then return nil end
  if err.code == "unknown" and test.invented then
    local ok, full = pcall(core.raise, "too_many_connections", ("the connection pooler%s did not answer"
      .. " one of two connections in time: it may have too few sessions of the server, or none is free")
      :format(test.moves and ", which pools transactions," or ""))
    return not ok and full
  elseif err.code == "unknown" or err.code == "lost" then
    err.code, err.free_by, err.hint = "connect", nil, nil
  end
  return err
end

local function each_connection(test, close)
  for _, which in ipairs { "first", "second" } do
    if test[which] then close(test[which]) end
  end
end

-- When the coroutine ends inside, nobody waits.
local Test = {}

function Test:__close()
  each_connection(self, function(conn) getmetatable(conn).__close(conn) end)
end

local function pass(_, ...) return ... end

local function examine_and_close(test, keywords, options)
  local ok, found = pcall(examine, test, keywords, options)
  each_connection(test, function(conn) conn:close() end)
  if ok then return found end
  local err = told(test, found)
  if err == nil then return result(test, "standby") end
  error(err, 0)
end

--- Tests what `opening.describe` has read.
---@param keywords table<string, string>
---@param options table
---@return pglocks.trust
return function(keywords, options)
  local test = setmetatable({ heard = {}, pid = {} }, Test)
  return run(test, pass, examine_and_close, test, keywords, options)
end
