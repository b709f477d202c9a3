--- PostgreSQL advisory locks, released when a scope ends.
---
---     local pglocks = require "pglocks"
---     local conn <close> = pglocks.connect "postgresql:///app"
---     local lock <close> = conn:lock "invoice 42"

local core = require "pglocks.core"
require "pglocks.all_locks"
local opening = require "pglocks.connect"
local locker = require "pglocks.locker"
local pool = require "pglocks.pool"
local scheduled = require "pglocks.scheduled"
require "pglocks.patience"
require "pglocks.modes"
local run = require "pglocks.scope"

core.own_source(debug.getinfo(1, "S").source)

local pglocks = { _VERSION = "pglocks scm" }

-- ---- calls that run a function ----------------------------------------------------------

local function callable(value)
  local metatable = type(value) ~= "function" and getmetatable(value)
  return type(value) == "function"
    or type(metatable) == "table" and type(metatable.__call) == "function"
end

local function check_function(argument, value)
  if not callable(value) then
    core.raise_argument(argument, ("function expected, got %s"):format(type(value)))
  end
end

-- Says `return through(f(...))` where `return f(...)`, a tail call, would drop our function from
-- the stack, and its name from an argument error.
local function through(...) return ... end

local function release(lock, ...)
  lock:release()
  return ...
end

local function release_true(lock, ...)
  lock:release()
  return true, ...
end

-- The options, if there are any, the function, and how many arguments these are.
local function body(options, fn)
  if callable(options) then return nil, options, 1 end
  if options ~= nil and type(options) ~= "table" then
    core.raise_argument(2, ("table of options or function expected, got %s"):format(type(options)))
  end
  check_function(options == nil and fn == nil and 2 or 3, fn)
  return options, fn, 2
end

-- Of a connection, or of `program` below. method: its `lock` or `lock_all`.
local function with(owner, method, key, ...)
  local options, fn, count = body(...)
  local lock = owner[method](owner, key, options)
  return run(lock, release, fn, lock, select(count + 1, ...))
end

-- method: its `try_lock` or `try_lock_all`.
local function try_with(owner, method, key, ...)
  local options, fn, count = body(...)
  local lock, why = owner[method](owner, key, options)
  if not lock then return false, why end
  return run(lock, release_true, fn, lock, select(count + 1, ...))
end

--- Calls `fn(lock, ...)` while holding the lock; waits as `lock` does.
---@return any ... what fn returned
function core.connection:with_lock(key, ...) return through(with(self, "lock", key, ...)) end

--- Calls `fn(lock, ...)` while holding the locks; waits as `lock_all` does.
---@return any ... what fn returned
function core.connection:with_lock_all(keys, ...)
  return through(with(self, "lock_all", keys, ...))
end

--- Calls `fn(lock, ...)` if the lock is to be had, as `try_lock` says.
---@return boolean ran  true and what fn returned; or false and "busy" or "timeout"
function core.connection:try_with_lock(key, ...)
  return through(try_with(self, "try_lock", key, ...))
end

--- Calls `fn(lock, ...)` if the locks are to be had, as `try_lock_all` says.
---@return boolean ran  true and what fn returned; or false and "busy" or "timeout"
function core.connection:try_with_lock_all(keys, ...)
  return through(try_with(self, "try_lock_all", keys, ...))
end

-- ---- transactions -----------------------------------------------------------------------

local Transaction = {}

-- An error is in flight, and must not be masked. Where a scheduler waits, nothing does here.
function Transaction:__close()
  local conn = self.conn
  if not core.in_transaction(conn) then return end
  core.rollback(conn)
  if not scheduled.of(conn) then pcall(conn.ping, conn) end
end

local function begin(conn, fn, ...)
  scheduled.begin(conn)
  return fn(conn, ...)
end

local function commit(transaction, ...)
  scheduled.commit(transaction.conn)
  return ...
end

--- Calls `fn(conn, ...)` inside a transaction: COMMIT when it returns, ROLLBACK when it raises.
---@return any ... what fn returned
function core.connection.transaction(conn, fn, ...)
  check_function(1, fn)
  if core.in_transaction(conn) then
    core.raise("server", "a transaction is open on this connection already")
  end
  return run(setmetatable({ conn = conn }, Transaction), commit, begin, conn, fn, ...)
end

-- ---- connections ------------------------------------------------------------------------

local default_scheduler = scheduled.default()

local function describe(described, of)
  local keywords, options = opening.describe(described, default_scheduler, of)
  if not keywords then core.raise_argument(1, options) end
  return keywords, options
end

--- Opens a connection of its own. Raises connect, too_many_connections, standby, pooled.
---
---     local conn <close> = pglocks.connect "postgresql:///app"
---@param described? string|pglocks.description without it the PG* environment
---@return pglocks.connection
function pglocks.connect(described)
  local keywords, options = describe(described, "connection")
  local conn = opening.connect(keywords, options)
  if options.on_lost then scheduled.watch(conn) end
  return conn
end

--- Finds out, by two connections that it opens and closes, what locks at an address can be trusted
--- with. Raises connect, too_many_connections.
---
---     print(pglocks.selftest "postgresql:///app")
---@param described? string|pglocks.description as for `connect`; what it says of `pooled` makes no difference
---@return pglocks.trust
function pglocks.selftest(described)
  local keywords, options = describe(described, "connection")
  return (require "pglocks.selftest"(keywords, options))
end

--- Many owners on few connections: with the lock calls of a connection, but each lock is an owner of its
--- own. It opens connections when it needs them.
---
---     local locker = pglocks.locker { conninfo = "postgresql:///app", scheduler = "cqueues" }
---@param described? string|pglocks.description
---@return pglocks.locker
function pglocks.locker(described)
  local keywords, options = describe(described, "locker")
  local wrong = locker.unsuited(options)
  if wrong then core.raise_argument(1, wrong) end
  return locker.new(keywords, options)
end

local databases = {} -- by name: { keywords, options }
local owners = {} -- by name: a connection that all callers share, a locker or a pool

-- Keywords and options of what setup has named.
local function database(name)
  local described = databases[name]
  if not described and name == "default" then
    described = { opening.describe(nil, default_scheduler, "database") }
  end
  if not described then
    core.raise_argument(2, ("option 'using': unknown database '%s'"):format(name))
  end
  return described[1], described[2]
end

-- The owner of a module-level lock. In a plain program that is one connection for each name,
-- opened on first use, and anew after it was lost: holding nothing then. With a scheduler it is a
-- locker; or a pool, which lends a connection to each lock. What is wrong with the arguments is raised before
-- anything is opened for them. Nil: the lock's own timeout was too short to connect.
local function owner(name, check, key, options)
  local found = owners[name]
  if found and found:alive() then return found end
  local keywords, own = database(name)
  check(key, options)
  if own.scheduler and (own.dedicated or locker.unsuited(own)) then
    found = pool.new(keywords, own, own.scheduler)
  elseif own.scheduler then
    found = locker.new(keywords, own)
  else
    local timeout = options and options.timeout
    found = opening.connect(keywords, own, timeout ~= 0 and timeout or nil)
    if not found then return nil end
  end
  owners[name] = found
  return found
end

-- The database that options name, and the options that are the connection's.
local function split(options)
  if type(options) ~= "table" or options.using == nil then return "default", options end
  local name, rest = options.using, {}
  if type(name) ~= "string" then
    core.raise_argument(2, ("option 'using': name of a database expected, got %s")
      :format(type(name)))
  end
  for option, value in pairs(options) do
    if option ~= "using" then rest[option] = value end
  end
  return name, rest
end

-- check: core.check or core.check_all.
local function choose(check, key, options)
  local name, rest = split(options)
  local before, began = owners[name], core.now()
  local found = owner(name, check, key, rest)
  -- Connecting counts against the lock's timeout.
  return found, found == before and rest or pool.remaining(rest, core.now() - began)
end

-- Locks as a connection does, on the one that `using` names.
local program = {}

local function connected(conn, options)
  if conn then return conn end
  core.raise("timeout", ("no connection within %.7g s"):format(options.timeout))
end

function program:lock(key, options) -- luacheck: no self
  local conn, rest = choose(core.check, key, options)
  return through(connected(conn, options):lock(key, rest))
end

function program:lock_all(keys, options) -- luacheck: no self
  local conn, rest = choose(core.check_all, keys, options)
  return through(connected(conn, options):lock_all(keys, rest))
end

function program:try_lock(key, options) -- luacheck: no self
  local conn, rest = choose(core.check, key, options)
  if not conn then return nil, "timeout" end
  return through(conn:try_lock(key, rest))
end

function program:try_lock_all(keys, options) -- luacheck: no self
  local conn, rest = choose(core.check_all, keys, options)
  if not conn then return nil, "timeout" end
  return through(conn:try_lock_all(keys, rest))
end

--- Names databases and sets defaults for the whole program. Called again, it starts afresh.
---
---     pglocks.setup { databases = { default = "postgresql:///app", reports = "postgresql:///dw" } }
---@param settings string|pglocks.settings conninfo of the default database, or all there is to set
function pglocks.setup(settings)
  if type(settings) == "string" then settings = { databases = { default = settings } } end
  if type(settings) ~= "table" then
    core.raise_argument(1, ("conninfo string or table expected, got %s"):format(type(settings)))
  end
  for name in pairs(settings) do
    if name ~= "databases" and name ~= "hash" and name ~= "namespace" and name ~= "scheduler" then
      core.raise_argument(1, ("unknown key '%s'"):format(tostring(name)))
    end
  end
  local scheduler, wrong = scheduled.default(), nil
  if settings.scheduler ~= nil then scheduler, wrong = scheduled.choose(settings.scheduler) end
  if wrong then core.raise_argument(1, "scheduler: " .. wrong) end
  local described = {}
  if settings.databases ~= nil and type(settings.databases) ~= "table" then
    core.raise_argument(1, "databases: table of descriptions by name expected")
  end
  for name, description in pairs(settings.databases or {}) do
    if type(name) ~= "string" then
      core.raise_argument(1, "databases: names as strings expected")
    end
    local keywords, options = opening.describe(description, scheduler, "database")
    if not keywords then
      core.raise_argument(1, ("databases.%s: %s"):format(name, options))
    end
    described[name] = { keywords, options }
  end
  core.key_defaults { hash = settings.hash, namespace = settings.namespace }
  databases, owners, default_scheduler = described, {}, scheduler
end

--- A key as PostgreSQL sees it: comparable, with classid, objid and objsubid as in pg_locks.
---
---     print(pglocks.key "some lock")
---@param key pglocks.locked
---@param options? pglocks.hashing
---@return pglocks.key
pglocks.key = core.key

-- ---- module-level locks -----------------------------------------------------------------

--- Waits for a lock on the database that `using` names. Raises unless it holds the lock: what
--- `connect` and `conn:lock` raise.
---
---     local lock <close> = pglocks.lock("invoice 42", { timeout = 5 })
---@param key pglocks.locked
---@param options? pglocks.program_options
---@return pglocks.lock
function pglocks.lock(key, options)
  return through(program:lock(key, options))
end

--- Takes a lock if it is free, or becomes so within `timeout` seconds. Raises what `lock` raises,
--- but for timeout.
---
---     local lock <close>, why = pglocks.try_lock "nightly"
---@param key pglocks.locked
---@param options? pglocks.program_options
---@return pglocks.lock|nil lock
---@return nil|"busy"|"timeout" why
function pglocks.try_lock(key, options)
  return through(program:try_lock(key, options))
end

--- Calls `fn(lock, ...)` while holding the lock. Raises what `lock`, `fn` and `release` raise.
---
---     pglocks.with_lock("invoice 42", { timeout = 5 }, function(lock) pay() end)
---@param key pglocks.locked
---@param ... any [options,] fn, and what to call it with
---@return any ... what fn returned
function pglocks.with_lock(key, ...) return through(with(program, "lock", key, ...)) end

--- Calls `fn(lock, ...)` if the lock is to be had, as `try_lock` says. Raises what `try_lock`,
--- `fn` and `release` raise.
---
---     local ran, result = pglocks.try_with_lock("nightly", function(lock) return import() end)
---@param key pglocks.locked
---@param ... any [options,] fn, and what to call it with
---@return boolean ran
---@return any ... what fn returned; or "busy" or "timeout"
function pglocks.try_with_lock(key, ...)
  return through(try_with(program, "try_lock", key, ...))
end

--- Waits for all of the locks, on the database that `using` names, as `conn:lock_all` does. Raises
--- what `connect` and `conn:lock_all` raise.
---
---     local lock <close> = pglocks.lock_all({ "account 7", "account 42" }, { timeout = 5 })
---@param keys pglocks.locked[]
---@param options? pglocks.program_options
---@return pglocks.lock
function pglocks.lock_all(keys, options)
  return through(program:lock_all(keys, options))
end

--- Takes all of the locks or none, as `conn:try_lock_all` does. Raises what `lock_all` raises, but
--- for timeout.
---
---     local lock <close>, why = pglocks.try_lock_all { "account 7", "account 42" }
---@param keys pglocks.locked[]
---@param options? pglocks.program_options
---@return pglocks.lock|nil lock
---@return nil|"busy"|"timeout" why
function pglocks.try_lock_all(keys, options)
  return through(program:try_lock_all(keys, options))
end

--- Calls `fn(lock, ...)` while holding all of the locks. Raises what `lock_all`, `fn` and `release`
--- raise.
---
---     pglocks.with_lock_all({ "account 7", "account 42" }, function() transfer() end)
---@param keys pglocks.locked[]
---@param ... any [options,] fn, and what to call it with
---@return any ... what fn returned
function pglocks.with_lock_all(keys, ...) return through(with(program, "lock_all", keys, ...)) end

--- Calls `fn(lock, ...)` if all of the locks are to be had, as `try_lock_all` says. Raises what
--- `try_lock_all`, `fn` and `release` raise.
---
---     local ran = pglocks.try_with_lock_all({ "account 7", "account 42" }, function() transfer() end)
---@param keys pglocks.locked[]
---@param ... any [options,] fn, and what to call it with
---@return boolean ran
---@return any ... what fn returned; or "busy" or "timeout"
function pglocks.try_with_lock_all(keys, ...)
  return through(try_with(program, "try_lock_all", keys, ...))
end

--- A function that runs `fn` with its arguments while holding the lock, and raises what
--- `with_lock` raises.
---
---     local import = pglocks.wrap("import", { timeout = 60 }, function(path) return load(path) end)
---@param key pglocks.locked
---@param options? pglocks.program_options may be left out: wrap(key, fn)
---@param fn function
---@return function
function pglocks.wrap(key, options, fn)
  if fn == nil and callable(options) then options, fn = nil, options end
  check_function(options == nil and fn == nil and 2 or 3, fn)
  local _, rest = split(options)
  core.check(key, rest)
  local function without_lock(_, ...) return fn(...) end
  return function(...) return through(with(program, "lock", key, options, without_lock, ...)) end
end

--- django-pglocks' form: with `wait = false` it returns at once with a lock object whose
--- `acquired` tells; otherwise it waits, as `lock` does. Raises what `lock` raises.
---
---     local lock <close> = pglocks.advisory_lock("some lock", { wait = false })
---@param lock_id pglocks.locked
---@param options? pglocks.advisory_options
---@return pglocks.lock
function pglocks.advisory_lock(lock_id, options)
  local wait, rest
  if type(options) == "table" then
    wait, rest = options.wait, {}
    for option, value in pairs(options) do
      if option ~= "wait" then rest[option] = value end
    end
    if wait ~= nil and type(wait) ~= "boolean" then
      core.raise_argument(2, ("option 'wait': boolean expected, got %s"):format(type(wait)))
    elseif wait == false and rest.timeout ~= nil then
      core.raise_argument(2, "option 'timeout' waits, and wait = false does not")
    end
  else
    rest = options
  end
  if wait ~= false then return through(program:lock(lock_id, rest)) end
  local found, own = choose(core.check, lock_id, rest)
  if found.attempt then return through(found:attempt(lock_id, own)) end
  return through(core.attempt(found, lock_id, own))
end

-- ---- a leader ---------------------------------------------------------------------------

-- Keywords and options of a description; without one, of the database of that name.
local function find(description, name)
  if description == nil then return database(name) end
  local keywords, options = opening.describe(description, default_scheduler, "connection")
  if not keywords then core.raise_argument(2, "option 'database': " .. options) end
  return keywords, options
end

--- Calls `fn(term, ...)` in one process of all that call it with this key, and in another one when
--- that has died. A term that is lost ends with the function, and this process stands again, as it
--- does after a failure that may pass. Raises what `fn` and the callbacks raise, and what only a
--- person can mend.
---
---     pglocks.lead("scheduler", function(term) repeat work() until not term:sleep(60) end)
---@param key pglocks.locked
---@param ... any [options,] fn, and what to call it with; see pglocks.leading
---@return any ... what fn returned as the leader; or nil and "stopped"
function pglocks.lead(key, ...)
  local options, fn, count = body(...)
  local lead = require "pglocks.lead"
  return through(lead(pglocks.connect, find, key, options, fn, select(count + 1, ...)))
end

return pglocks
