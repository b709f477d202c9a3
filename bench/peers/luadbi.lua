--- LuaDBI, whose statements are prepared: each of them once, and not fetched from, as the lock's
--- answer says nothing.

local worker = require "bench.peers.worker"
local DBI = worker.library("luadbi", "DBI")
worker.library("luadbi-postgresql", "dbd.postgresql")

local dbh = assert(DBI.Connect("PostgreSQL", (...))) -- for libpq a conninfo may be the name
dbh:autocommit(true)

local lock = assert(dbh:prepare "SELECT pg_advisory_lock(?)")
local unlock = assert(dbh:prepare "SELECT pg_advisory_unlock(?)")
local pid = assert(dbh:prepare "SELECT pg_backend_pid()")
assert(pid:execute())

worker.serve(pid:fetch()[1], function()
  assert(lock:execute(4242))
  assert(unlock:execute(4242))
end)
