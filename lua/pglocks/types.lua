---@meta pglocks.core
-- types.lua: the types of the C core for language servers. Never loaded by a program.
--
-- spec/types_spec.lua checks that what stands here is what the core registers.
-- luacheck: ignore 212 241 431

---@alias pglocks.code
---| "aborted_transaction"  # a statement had failed: nothing works before the ROLLBACK
---| "busy_connection"      # another call on this connection has not ended
---| "closed"               # the connection was closed by the program
---| "connect"              # no connection could be made
---| "deadlock"             # the server chose this waiter to end a deadlock
---| "forked"               # the connection belongs to the parent process
---| "interrupted"          # the server cancelled the statement (57014)
---| "lost"                 # the session is gone, and every lock of it
---| "not_held"             # the lock is not held
---| "permission"           # the role may not do that
---| "pooled"               # a connection pooler answered
---| "server"               # any other error of the server
---| "standby"              # a hot standby answered
---| "timeout"              # the lock was not to be had in time
---| "too_many_connections" # the server has no connection left, or the pool
---| "too_many_locks"       # the server's lock table is full
---| "unknown"              # no answer: the outcome is undecided, the connection closed

--- What fails while running raises this table. `tostring` gives it in one line.
---@class pglocks.error
---@field code pglocks.code
---@field message string  one line, without the server's hints; may change in any version
---@field sqlstate? string  five characters, where the server gave them
---@field key? pglocks.key  of the lock that the call was about
---@field hint? string  what to do about it
---@field free_by? integer  of "unknown": seconds after which the server has freed the lock

--- What PostgreSQL locks. Keys compare with == < <=; `tostring` gives "42" or "(7, 42)".
---@class pglocks.key
---@field classid integer  as pg_locks shows it: the high half of a 64-bit key, the first of a pair
---@field objid integer  the low half, or the second of a pair
---@field objsubid 1|2  1: a 64-bit key, 2: a pair
---@field value integer|integer[]|ffi.cdata*|string  what a call takes for the same key; past 2^53 LuaJIT has
--- it as int64_t, and without ffi as a string of digits

--- An integer of 64 bits, a pair of integers of 32 bits, a name of any bytes, or a key object.
---@alias pglocks.locked integer|integer[]|string|pglocks.key

--- How a name becomes a key: as in another system, or by a function, which must always return the same.
---@alias pglocks.hash
---| "sha256"               # the default
---| "atlas"                # Go
---| "distributedlock"      # .NET: DistributedLock.Postgres, with allowHashing
---| "django-pglock"        # Python
---| "django-pglocks"       # Python
---| "flyway"               # Java; namespace: the schema, name: the table
---| "fnv1a64"
---| "golang-migrate"       # Go; name: schema, table and database, joined by NUL
---| "good_job"             # Ruby; namespace: the table, name: the id
---| "goose"                # Go; name: "goose"
---| "hashtext"             # SQL: hashtext(name)
---| "hashtextextended"     # SQL: hashtextextended(name, seed); namespace: the seed
---| "heroku-pg_lock"       # Ruby
---| "laravel"              # PHP: laravel-database-advisory-lock
---| "npm-advisory-lock"    # Node
---| "npm-pg-advisory-lock" # Node: 2.0; namespace: one, or a list
---| "pals"                 # Python; namespace: app_name
---| "py-postgresql-lock"   # Python
---| "rails"                # Ruby; name: the database
---| "river"                # Go; namespace: AdvisoryLockPrefix, 32 bits
---| "sqlalchemy-dlock"     # Python
---| "sqlx"                 # Rust: PgAdvisoryLock::new
---| "sqlx-migrate"         # Rust; name: the database
---| "symfony"              # PHP
---| "with_advisory_lock"   # Ruby; namespace: WITH_ADVISORY_LOCK_PREFIX
---| fun(name: string, namespace?: string|integer|string[]): pglocks.locked

---@class pglocks.hashing
---@field hash? pglocks.hash  for names only
---@field namespace? string|integer|string[]  goes into the hash; for names only. With "sha256" a string

---@class pglocks.options: pglocks.hashing
---@field shared? boolean  many may hold it at once, but none together with an exclusive holder
---@field timeout? number  seconds, at least 0; 0 tries once
---@field scope? "session"|"transaction"  "transaction": the lock ends with the open transaction, or with one
--- that it begins, which `release()` commits and any other end rolls back. Behind a pooler of transactions
--- the default
---@field token? boolean  draws a fencing token; session scope alone, and no open transaction
---@field strategy? "queue"|"notify"|"poll"  how to wait: in the server's queue, the default; or by tries, with
--- no snapshot held between them, on a notification or after a pause
---@field slots? integer  1 to 1000: a semaphore, of which so many have a slot each; exclusive, session scope
---@field comment? string|boolean  an SQL comment that shows an administrator who locks what, and where

--- Of the functions of `require "pglocks"`.
---@class pglocks.program_options: pglocks.options
---@field using? string  name of a database given to `setup`; "default" without it

---@class pglocks.advisory_options: pglocks.program_options
---@field wait? boolean  false: try once, and return a lock object in any case

--- Of `lead`.
---@class pglocks.leading: pglocks.options
---@field database? string|pglocks.description  what `connect` takes
---@field using? string  instead: name of a database given to `setup`; "default" without either
---@field interval? number  seconds from one try to the next, at most (1)
---@field timeout? number  seconds that one try waits in the server's queue; without it not at all
---@field on_elected? fun(term: pglocks.term)  called before the function
---@field on_lost? fun(term: pglocks.term, err: pglocks.error)  called once when a term turns out to be lost
---@field on_retry? fun(err: pglocks.error, seconds: number)  called before the pause after a failure
---@field stop? fun(): boolean?  true: no other term is begun, and the one that goes on has to end

---@class pglocks.settings: pglocks.hashing
---@field databases? table<string, string|pglocks.description>
---@field scheduler? pglocks.waits  of every connection that does not name its own

--- What a connection holds, as it counts itself.
---@class pglocks.held
---@field key pglocks.key
---@field name? string  nil where the key was not made from one
---@field mode "exclusive"|"shared"
---@field scope "session"|"transaction"
---@field count integer  locks of this connection on the key, in this mode; of the transaction's scope, so
--- many as were taken

--- A lock of any session, as the server sees it.
---@class pglocks.listed
---@field key pglocks.key
---@field name? string  where a connection of this process holds the key, or waits for it, by that name
---@field mode "exclusive"|"shared"
---@field granted boolean  false: it is waited for
---@field pid? integer  `backend_pid` of the session; nil: a prepared transaction holds it
---@field application? string  the session's application_name
---@field client? string  its address and port; nil on a Unix socket, or where the role may not see it
---@field since? number  of one that waits, on PostgreSQL 14 and newer: the server's time when it began to,
--- in seconds since the epoch
---@field blocked_by? integer[]  of one that waits: the sessions that it waits for, which hold the lock or
--- are before it in the queue; 0 is a prepared transaction

--- Which locks `all_locks` lists: those for which all of it is true.
---@class pglocks.filter: pglocks.hashing
---@field key? pglocks.locked  with `hash` and `namespace` beside it, as for `lock`
---@field pid? integer
---@field granted? boolean  false: those that are waited for

---@alias pglocks.body fun(lock: pglocks.lock, ...: any): ...

---@alias pglocks.on_lost fun(conn: pglocks.connection|pglocks.locker, err: pglocks.error, locks: pglocks.held[])

--- A connection: a conninfo string or URI, or a table of these and of libpq's keywords. Without
--- one, the PG* environment.
---@class pglocks.description
---@field conninfo? string
---@field timeout? number  seconds for connecting, over all hosts; each has `connect_timeout`, or 5
---@field reply_timeout? number  seconds for answers that need no waiting (10)
---@field on_lost? pglocks.on_lost  called once when the session was lost: in the next call, or
--- without one where the scheduler has `spawn`
---@field release? "confirmed"|"deferred"  "deferred": the end of a lock is sent, not waited for; the
--- default with a scheduler
---@field scheduler? pglocks.waits  who waits for the connection; without it that of `setup`
---@field dedicated? boolean  of setup's databases, under a scheduler: true, each module-level lock has a
--- connection of its own, and does not go through a locker
---@field pool_size? integer  of setup's databases and of lockers: connections at most for locks that have one
--- of their own (10)
---@field max_connections? integer  of those, too: connections at most that owners share (10)
---@field locks_per_connection? integer  how many locks one holds until another one is opened (100)
---@field handovers? integer  how often a key is handed on inside the process, while others wait for it (128)
---@field handover_time? number  seconds for which it is, at most (0.002)
---@field lease? number  seconds of silence after which the server ends the session (PostgreSQL 14)
---@field allow_standby? boolean
---@field pooled? "session"|"transaction"  what a connection pooler in between pools. "transaction": locks
--- are of the transaction's scope
---@field [string] string|number  libpq's keywords

---@alias pglocks.address
---| "direct"
---| "session pooling"
---| "transaction pooling"
---| "statement pooling"
---| "standby"
---| "several servers"     # that do not know each other's locks
---| "no locks"            # they do nothing there, or are refused

--- What `selftest` has found at an address. `tostring` gives the message.
---@class pglocks.trust
---@field kind pglocks.address
---@field session boolean  locks of the session exclude others here
---@field transaction boolean  locks of the transaction do
---@field pooled? "session"|"transaction"  the value for the option of a description; nil: none
---@field message string  a sentence or two: what it is, and what to do
---@field server_version integer  150004 is 15.4

-- ---- schedulers -------------------------------------------------------------------------

--- "blocking" stops the whole process; all others wait in the calling coroutine.
---@alias pglocks.waits "cqueues"|"luv"|"nginx"|"blocking"|pglocks.scheduler

--- An event loop, as pglocks sees it. All functions but `now`, `token`, `wake` and `spawn` may
--- suspend the calling coroutine.
---@class pglocks.scheduler
---@field wait fun(fd: integer, events: "r"|"w"|"rw", seconds?: number)  returns when the descriptor is
--- ready or the time is over. Nothing of it may stay registered then: it may be closed next
---@field sleep fun(seconds: number)
---@field now fun(): number  seconds of a clock that only goes forward
---@field token fun(): any  stands for the calling coroutine's next `park`
---@field park fun(seconds?: number): boolean?  true: woken; anything else: the time is over
---@field wake fun(token: any)  from anywhere, before or after the `park`; never runs the coroutine
--- itself before it returns, and does nothing when it comes too late or twice
---@field spawn? fun(fn: function): boolean?  runs `fn` in a new coroutine; false: there is nobody to run
--- it. Without `spawn` on_lost is told in the next call only, and there are no lockers

-- ---- connections ------------------------------------------------------------------------

--- A session on a server. Locks on one connection do not exclude each other; those of different
--- connections do. Closed at the end of a scope where it is declared `<close>`.
---@class pglocks.connection
---@field backend_pid integer  of the server process, as in pg_stat_activity
---@field server_version integer  150004 is 15.4
---@field is_pooled boolean
local connection = {}

--- Waits for a lock, for ever or `timeout` seconds. Never returns without holding it.
--- Raises timeout, deadlock, lost, interrupted, unknown, too_many_locks, aborted_transaction,
--- closed, busy_connection, forked, server; and an argument error for a wrong key or option.
---
---     local lock <close> = conn:lock("invoice 42", { timeout = 5 })
---@param key pglocks.locked
---@param options? pglocks.options
---@return pglocks.lock
function connection:lock(key, options) end

--- Takes a lock if it is free, or becomes so within `timeout` seconds (0 without it).
--- Raises what `lock` raises, but for timeout.
---
---     local lock <close>, why = conn:try_lock "nightly"
---@param key pglocks.locked
---@param options? pglocks.options
---@return pglocks.lock|nil lock
---@return nil|"busy"|"timeout" why  "timeout" after a wait
function connection:try_lock(key, options) end

--- Waits for all of the locks, in one statement, for ever or `timeout` seconds in all. It has all of
--- them when it returns, and none but those held before when it raises. 64-bit keys are locked in
--- ascending order, then pairs, each once. Raises what `lock` raises.
---
---     local lock <close> = conn:lock_all({ "account 7", "account 42" }, { timeout = 5 })
---@param keys pglocks.locked[]  at least one
---@param options? pglocks.options
---@return pglocks.lock  one for all of them
function connection:lock_all(keys, options) end

--- Takes all of the locks if they are free, or become so within `timeout` seconds in all (0 without
--- it); otherwise none. Raises what `lock_all` raises, but for timeout.
---
---     local lock <close>, why = conn:try_lock_all { "account 7", "account 42" }
---@param keys pglocks.locked[]  at least one
---@param options? pglocks.options
---@return pglocks.lock|nil lock
---@return nil|"busy"|"timeout" why  "timeout" after a wait
function connection:try_lock_all(keys, options) end

--- Calls `fn(lock, ...)` while holding the lock, and releases it before it returns or rethrows.
--- Raises what `lock`, `fn` and `release` raise; never calls `fn` without the lock.
---
---     local total = conn:with_lock("invoice 42", { timeout = 5 }, function(lock) return add_up() end)
---@param key pglocks.locked
---@param options? pglocks.options  may be left out: with_lock(key, fn, ...)
---@param fn pglocks.body
---@param ... any
---@return any ...  what fn returned
---@overload fun(self: pglocks.connection, key: pglocks.locked, fn: pglocks.body, ...: any): ...
function connection:with_lock(key, options, fn, ...) end

--- Calls `fn(lock, ...)` if the lock is to be had, as `try_lock` says.
--- Raises what `try_lock`, `fn` and `release` raise.
---
---     local ran, result = conn:try_with_lock("nightly", function(lock) return import() end)
---@param key pglocks.locked
---@param options? pglocks.options  may be left out: try_with_lock(key, fn, ...)
---@param fn pglocks.body
---@param ... any
---@return boolean ran
---@return any ...  what fn returned; or "busy" or "timeout"
---@overload fun(self: pglocks.connection, key: pglocks.locked, fn: pglocks.body, ...: any): boolean, ...
function connection:try_with_lock(key, options, fn, ...) end

--- `with_lock` on all of the locks. Raises what `lock_all`, `fn` and `release` raise.
---
---     conn:with_lock_all({ "account 7", "account 42" }, function() transfer() end)
---@param keys pglocks.locked[]  at least one
---@param options? pglocks.options  may be left out: with_lock_all(keys, fn, ...)
---@param fn pglocks.body
---@param ... any
---@return any ...  what fn returned
---@overload fun(self: pglocks.connection, keys: pglocks.locked[], fn: pglocks.body, ...: any): ...
function connection:with_lock_all(keys, options, fn, ...) end

--- `try_with_lock` on all of the locks. Raises what `try_lock_all`, `fn` and `release` raise.
---
---     local ran = conn:try_with_lock_all({ "account 7", "account 42" }, function() transfer() end)
---@param keys pglocks.locked[]  at least one
---@param options? pglocks.options  may be left out: try_with_lock_all(keys, fn, ...)
---@param fn pglocks.body
---@param ... any
---@return boolean ran
---@return any ...  what fn returned; or "busy" or "timeout"
---@overload fun(self: pglocks.connection, keys: pglocks.locked[], fn: pglocks.body, ...: any): boolean, ...
function connection:try_with_lock_all(keys, options, fn, ...) end

--- Calls `fn(conn, ...)` inside a transaction: COMMIT when it returns, ROLLBACK when it raises.
--- Raises what `fn` raises, aborted_transaction where a statement had failed, and server where a
--- transaction is open already. Locks of the session's scope do not end with it.
---
---     conn:transaction(function(c) c:query("UPDATE account SET paid = true WHERE id = $1", 42) end)
---@param fn fun(conn: pglocks.connection, ...: any): ...
---@param ... any
---@return any ...  what fn returned
function connection:transaction(fn, ...) end

--- Runs one statement; `...` are up to 64 values for $1, $2 and so on. Raises as `lock` does, and
--- permission and server. One that starts COPY raises and closes the connection.
---
---     local rows = conn:query("SELECT id, total FROM invoice WHERE id = $1", 42)
---@param sql string
---@param ... nil|boolean|number|string
---@return table<string, boolean|integer|string>[] rows  by column name; NULL is nil, numeric and
--- all other types are strings, as is a bigint past 2^53 on LuaJIT
function connection:query(sql, ...) end

--- What this connection holds, in no order; nothing once its session is lost. Never asks the server.
---
---     for _, held in ipairs(conn:locks()) do print(held.key, held.mode, held.count) end
---@return pglocks.held[]
function connection:locks() end

--- Every advisory lock of the database that the connection is in, those too that are waited for. By
--- key; of one key what is granted comes first, then what waits, in the order in which it began to.
--- Raises lost, interrupted, unknown without an answer within `reply_timeout`, aborted_transaction,
--- closed, busy_connection, forked, server; and an argument error for a wrong filter.
---
---     for _, one in ipairs(conn:all_locks { granted = false }) do print(one.pid, one.name or one.key) end
---@param filter? pglocks.filter
---@return pglocks.listed[]
function connection:all_locks(filter) end

--- False once the session is known to be gone. Looks at the socket, without a round trip.
---
---     if not conn:alive() then conn = pglocks.connect "postgresql:///app" end
---@return boolean
function connection:alive() end

--- A round trip. Raises unknown, and closes the connection, without an answer in time; lost,
--- closed, busy_connection, forked.
---
---     conn:ping(2)
---@param timeout? number  seconds; without it the connection's `reply_timeout`
---@return true
function connection:ping(timeout) end

--- Ends the wait that another coroutine is in on this connection, under a scheduler; that call
--- raises interrupted, and the connection stays usable. Never raises.
---
---     conn:cancel()
---@return boolean waiting  false: there was none
function connection:cancel() end

--- Releases all locks and closes; when it returns, they are free. A second time does nothing.
--- Raises busy_connection.
---
---     conn:close()
function connection:close() end

-- ---- locks ------------------------------------------------------------------------------

--- Released when its scope ends, where it is declared `<close>`, and at the latest when collected.
---@class pglocks.lock
---@field acquired boolean  false only for what `advisory_lock` with `wait = false` did not get
---@field shared boolean
---@field key? pglocks.key  nil for one of `lock_all`
---@field keys pglocks.key[]  in the order in which they were locked; one for one of `lock`
---@field name? string  where the key was made from one
---@field scope "session"|"transaction"
---@field slot? integer  of a semaphore, from 1
---@field token? integer|string  with the option `token`: greater than that of every hold of the key before
--- it; past 2^53 LuaJIT has it as a string of digits
---@field waited? number  seconds
local lock = {}

--- Lets go. With `release = "deferred"`, the default with a scheduler, true means that the request
--- was sent. Of the transaction's scope the lock that began the transaction commits it, and waits for the
--- answer unless `release = "deferred"` was asked for; any other is held until it ends.
--- Raises lost, not_held if the server no longer knew the lock, unknown, busy_connection, forked; and of a
--- COMMIT aborted_transaction, server.
---
---     lock:release()
---@return true|nil  nil: it was not held
---@return nil|"not held"|"held until the transaction ends"
function lock:release() end

--- False once it is known that the lock is no longer held. Without a round trip: a loss that has
--- not reached this machine yet is not seen. Never raises.
---
---     while lock:held() and work_left() do work() end
---@return boolean
function lock:held() end

--- Asks the server, for the moment before a step that cannot be undone.
--- Raises lost unless the server confirms the lock; not_held after a release, unknown without an
--- answer in time, aborted_transaction, busy_connection, forked.
---
---     lock:check(2)
---@param timeout? number  seconds; without it the connection's `reply_timeout`
---@return true
function lock:check(timeout) end

--- From shared to exclusive, if no other holder is there, or goes within `timeout` seconds. Two who hold it
--- shared and wait for each other would wait for ever: so it is a millisecond by default.
--- Raises what `lock` raises; it is still shared then.
---
---     if not lock:upgrade() then return "somebody reads" end
---@param options? { timeout: number }
---@return true|nil  nil: it is still shared
---@return nil|"busy"
function lock:upgrade(options) end

--- From exclusive to shared, without letting go in between. Raises what `lock` raises, and server for a lock
--- of the transaction's scope.
---
---     lock:downgrade()
---@return true
function lock:downgrade() end

-- ---- pglocks.core -----------------------------------------------------------------------

---@class pglocks.configured
---@field reply_timeout? number  seconds
---@field deferred? boolean  releases are sent, and their answers read later
---@field scheduled? boolean  the methods are those of `core.scheduled`; the end of a scope only sends
---@field commits_deferred? boolean  the COMMIT of a lock's transaction, too
---@field lease? number  seconds, for the transactions that locks begin behind a pooler
---@field pooled? "session"|"transaction"
---@field backend_pid? integer  of the server process behind a pooler
---@field on_lost? pglocks.on_lost
---@field on_free? fun(conn: pglocks.connection)  called when a lock has been let go
---@field on_end? fun(conn: pglocks.connection, lock: pglocks.lock)  called when the scope of a joined lock ends

--- Methods that replace the blocking ones on a connection with `scheduled`. Filled by scheduled.lua.
---@class pglocks.scheduled
---@field connection table<string, function>
---@field lock table<string, function>

--- What a coroutine holds while it drives an operation. Closed, or collected, before the operation
--- has come to its end, it takes the connection with it.
---@class pglocks.waiter

--- Keeps a file descriptor open until it is closed or collected.
---@class pglocks.watch

--- Internal to pglocks: it may change in any version.
---@class pglocks.core
---@field connection pglocks.connection  the methods of connections
---@field lock pglocks.lock  the methods of locks
---@field start pglocks.start
---@field scheduled pglocks.scheduled
local core = {}

--- Seconds of a clock that only goes forward. Never raises.
---@return number
function core.now() end

--- Stops the process for so long, or until a signal comes.
---@param seconds number
function core.sleep(seconds) end

--- The numeric addresses of a host, best first; nil: it has none, or is the folder of a Unix socket.
---@param host string
---@return string[]|nil
function core.addresses(host) end

--- Does a message about connecting say that nobody was there, or answered? There may be somebody soon.
---@param message string
---@return boolean
function core.is_transient(message) end

--- Marks a Lua source as pglocks' own: argument errors then name the line that called it.
---@param source string  as debug.getinfo names it
function core.own_source(source) end

--- Raises an error object.
---@param code pglocks.code  any other becomes "server"
---@param message string
---@param key? pglocks.key  that it is about
function core.raise(code, message, key) end

--- Raises an argument error on the line that called pglocks.
---@param argument integer  counted without the connection
---@param expected string
function core.raise_argument(argument, expected) end

--- A key as PostgreSQL sees it. Raises an argument error.
---@param key pglocks.locked
---@param options? pglocks.hashing
---@return pglocks.key
function core.key(key, options) end

--- The `key` of a table, with the `hash` and `namespace` that stand there, too. Raises an argument error.
---@param options table
---@return pglocks.key|nil
function core.key_among(options) end

--- The key that pg_locks shows so.
---@param classid integer
---@param objid integer
---@param objsubid integer
---@return pglocks.key
function core.key_shown(classid, objid, objsubid) end

--- The names of the keys that a connection holds or waits for, by `tostring(key)`; nothing where it is
--- not open, or collected.
---@param conn pglocks.connection
---@return table<string, string>|nil names
---@return integer|nil backend_pid
function core.names(conn) end

--- The scheme and the namespace of every later call that does not say its own; without them, as
--- at the start. Raises an argument error.
---@param options? pglocks.hashing
function core.key_defaults(options) end

--- What libpq knows of a connection string, or, without one, all its keywords with their defaults.
--- Raises for what is no string; nil for what cannot be parsed.
---@param conninfo? string
---@return table<string, string|false>|nil
function core.conninfo(conninfo) end

--- Raises what `conn:lock(key, options)` would raise about its arguments.
---
---     core.check(key, options)
---@param key pglocks.locked
---@param options? pglocks.options
function core.check(key, options) end

--- Raises what `conn:lock_all(keys, options)` would raise about its arguments.
---@param keys pglocks.locked[]
---@param options? pglocks.options
function core.check_all(keys, options) end

--- Sets what only pglocks' own files set on a connection.
---@param conn pglocks.connection
---@param settings pglocks.configured
function core.configure(conn, settings) end

--- Is a transaction open, as the server last said?
---@param conn pglocks.connection
---@return boolean
function core.in_transaction(conn) end

--- Is nothing held, waited for or open on a connection?
---@param conn pglocks.connection
---@return boolean
function core.is_free(conn) end

--- Is no operation under way on a connection?
---@param conn pglocks.connection
---@return boolean
function core.is_idle(conn) end

--- Ends the transaction, if one is open, without waiting for the answer. A connection on which an
--- operation is under way is closed instead.
---@param conn pglocks.connection
function core.rollback(conn) end

--- Begins a transaction; raises what `query` raises.
---@param conn pglocks.connection
---@return true
function core.begin(conn) end

--- Commits. Raises aborted_transaction where a statement had failed: it was rolled back then; and unknown
--- where the session was lost meanwhile.
---@param conn pglocks.connection
---@return true
function core.commit(conn) end

--- What stands between a connection and its server.
---@param conn pglocks.connection
---@return nil|"session"|"transaction"
function core.pooling(conn) end

--- Does the connection hold a key in session scope, in any mode?
---@param conn pglocks.connection
---@param key pglocks.key
---@return boolean
function core.holds(conn, key) end

--- What acquires with the options `slots` and `strategy`: `fn(conn, method, key, options)`.
---@param fn function
function core.patiently(fn) end

--- Lets a lock go as its collection would: only sends.
---@param lock pglocks.lock
---@param late? boolean  of many in a row, most may wait for the next command, or for `send_late`
function core.let_go(lock, late) end

--- Sends what was let go and has not been sent.
---@param conn pglocks.connection
function core.send_late(conn) end

--- Two locks of one connection on the same keys give each other what they hold, and their modes.
---@param lock pglocks.lock
---@param other pglocks.lock
---@return boolean  false: one of them is not held, and nothing was done
function core.exchange(lock, other) end

--- How many forks this process descends from: it differs in a child.
---@return integer
function core.forks() end

--- A lock on no connection yet, for `core.join`. Raises what `conn:lock` would raise about its arguments.
---@param key pglocks.locked
---@param options? pglocks.options
---@return pglocks.lock lock
---@return string id  of its key: the same for the same key
---@return boolean shared
---@return number|nil timeout
---@return boolean token  is one asked for?
---@return boolean apart  do the options ask for what takes a connection of its own?
function core.closed_lock(key, options) end

--- A closed lock becomes one more on what the connection holds of its key, in its mode.
---@param conn pglocks.connection
---@param lock pglocks.lock
---@param waited number  seconds
---@param owner? integer  whom it is for; not 0
---@return boolean  false: it holds nothing of that
function core.join(conn, lock, waited, owner) end

--- A closed lock that was not to be had becomes one of the connection, for its methods.
---@param conn pglocks.connection
---@param lock pglocks.lock
function core.bind(conn, lock) end

--- The string of a lock's key, and whom it was joined for; nil where it is not held. Raises lost, once, and
--- forked.
---@param lock pglocks.lock
---@return string|nil id
---@return integer|nil owner
function core.standing(lock) end

--- The string of a lock's key, and whom it was joined for; nil where it is known not to be held. Never raises.
---@param lock pglocks.lock
---@return string|nil id
---@return integer|nil owner
function core.identity(lock) end

--- Is a release of a closed lock's key under way on a connection?
---@param conn pglocks.connection
---@param lock pglocks.lock
---@return boolean
function core.leaves(conn, lock) end

--- Sets fields of a lock, and how its end is announced: with the marker of another key, however soon it
--- comes; false: not at all. internal: it is not listed as held.
---@param lock pglocks.lock
---@param notes { waited?: number, slot?: integer, announces?: pglocks.key|false, internal?: boolean }
function core.annotate(lock, notes) end

--- What those hold, shared, who wait for a key with strategy = "notify". Its number names their channel.
---@param key pglocks.key
---@return pglocks.key
function core.marker(key) end

--- Has the end of a lock heard from now on.
---@param conn pglocks.connection
---@param marker pglocks.key
function core.listen(conn, marker) end

--- No longer. Without waiting.
---@param conn pglocks.connection
---@param marker pglocks.key
function core.unlisten(conn, marker) end

--- Waits until a notification comes, or the seconds are over.
---@param conn pglocks.connection
---@param seconds number
---@return boolean  one has come since the last call
function core.hear(conn, seconds) end

--- A key as messages show it.
---@param given pglocks.locked
---@param key pglocks.key
---@return string
function core.describe(given, key) end

--- The connection that a lock was taken on.
---@param lock pglocks.lock
---@return pglocks.connection
function core.connection_of(lock) end

--- As `connection:query`, with a time limit, and the command tag. Raises the same, and unknown.
---@param conn pglocks.connection
---@param seconds number|nil  nil: reply_timeout; less than 0: no limit
---@param sql string
---@param ... nil|boolean|number|string
---@return table[] rows
---@return string tag  "SELECT 1"
function core.execute(conn, seconds, sql, ...) end

--- As `connection:try_lock`, but returns a lock object in either case: `acquired` tells.
---@param conn pglocks.connection
---@param key pglocks.locked
---@param options? pglocks.options
---@return pglocks.lock
function core.attempt(conn, key, options) end

--- Drives the operation of a connection to its end, blocking. Raises nothing but argument errors.
---@param conn pglocks.connection
function core.run(conn) end

--- Does what can be done without waiting.
---@param conn pglocks.connection
---@return nil|"r"|"w"|"rw" direction  nothing: the operation is done
---@return integer|nil fd
---@return number|nil seconds  left; infinite: no deadline
function core.step(conn) end

--- What the operation that is done returns, or raises.
---@param conn pglocks.connection
---@return any ...
function core.finish(conn) end

--- Made before an operation is begun, so that nothing can go wrong between its begin and `await`.
---@return pglocks.waiter
function core.waiter() end

--- Makes the operation under way on a connection the waiter's. A waiter is used once.
---@param waiter pglocks.waiter
---@param conn pglocks.connection
function core.await(waiter, conn) end

--- For a coroutine that looks for the loss of a connection.
---@param conn pglocks.connection
---@return pglocks.watch|nil descriptor  nil: there is none to be had
---@return integer|nil fd  readable whenever `connection:alive` has something to look at, and for good
--- once the connection is closed
function core.watch(conn) end

--- Where libpq connects to without a host.
---@return string folder  of Unix sockets
function core.default_host() end

--- The password that libpq finds, in its environment or its password file.
---@param keywords table<string, string>  `host`, `port`, `dbname`, `user`, `passfile` and `service`
---@return string|nil password
function core.password(keywords) end

--- Sets on a socket that libpq does not see what libpq would set for these keywords.
---@param fd integer
---@param keywords table<string, string>
function core.keep_alive(fd, keywords) end

--- What libpq wants to send on a connection whose bytes the caller carries.
---@param conn pglocks.connection
---@return string|nil bytes  at most 16 KiB; nil: nothing now
function core.take(conn) end

--- Hands libpq what came from the server.
---@param conn pglocks.connection
---@param bytes? string  nil: there will be no more
---@param broken? boolean  because the network failed
---@return integer count  of the bytes that libpq had room for; `core.step` makes more
function core.give(conn, bytes, broken) end

--- Is an answer of the server still to come?
---@param conn pglocks.connection
---@return boolean
function core.awaits(conn) end

-- ---- pglocks.core.start -----------------------------------------------------------------

--- The same operations, begun and not waited for: drive them with `core.step`, then
--- `core.finish`. Each raises for wrong arguments and on a connection that is not free.
---@class pglocks.start
local start = {}

--- `core.finish` returns true, or nil and the error.
---@param keywords table<string, string>  of libpq
---@param seconds number
---@param pumped? boolean  the caller carries the bytes, with `core.take` and `core.give`
---@return pglocks.connection
function start.connect(keywords, seconds, pumped) end

---@param conn pglocks.connection
function start.close(conn) end

---@param conn pglocks.connection
function start.begin(conn) end

---@param conn pglocks.connection
function start.commit(conn) end

---@param conn pglocks.connection
---@param marker pglocks.key
function start.listen(conn, marker) end

---@param conn pglocks.connection
---@param seconds number
function start.hear(conn, seconds) end

---@param conn pglocks.connection
---@param key pglocks.locked
---@param options? pglocks.options
---@return boolean patient  true: nothing was begun, it is for the function of `core.patiently`
function start.lock(conn, key, options) end

---@param conn pglocks.connection
---@param key pglocks.locked
---@param options? pglocks.options
---@return boolean patient  true: nothing was begun, it is for the function of `core.patiently`
function start.try_lock(conn, key, options) end

---@param conn pglocks.connection
---@param keys pglocks.locked[]
---@param options? pglocks.options
---@return boolean patient  true: nothing was begun, it is for the function of `core.patiently`
function start.lock_all(conn, keys, options) end

---@param conn pglocks.connection
---@param keys pglocks.locked[]
---@param options? pglocks.options
---@return boolean patient  true: nothing was begun, it is for the function of `core.patiently`
function start.try_lock_all(conn, keys, options) end

---@param conn pglocks.connection
---@param key pglocks.locked
---@param options? pglocks.options
---@return boolean patient  true: nothing was begun, it is for the function of `core.patiently`
function start.attempt(conn, key, options) end

--- Tries the keys of closed locks, all of one mode, each for itself. `core.finish` returns one lock on those
--- that were got, for others to join, and the error where the statement failed.
---@param conn pglocks.connection
---@param locks pglocks.lock[]
function start.try_each(conn, locks) end

---@param lock pglocks.lock
---@return pglocks.connection  the one to drive
function start.release(lock) end

---@param lock pglocks.lock
---@param timeout? number  seconds; without it the connection's `reply_timeout`
---@return pglocks.connection  the one to drive
function start.check(lock, timeout) end

---@param conn pglocks.connection
---@param sql string
---@param ... nil|boolean|number|string
function start.query(conn, sql, ...) end

---@param conn pglocks.connection
---@param seconds number|nil  nil: reply_timeout; less than 0: no limit
---@param sql string
---@param ... nil|boolean|number|string
function start.execute(conn, seconds, sql, ...) end

---@param conn pglocks.connection
---@param timeout? number  seconds; without it the connection's `reply_timeout`
function start.ping(conn, timeout) end

return core
