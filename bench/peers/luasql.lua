--- LuaSQL, which has no parameters: the key is a part of the statement.

local worker = require "bench.peers.worker"
local luasql = worker.library("luasql", "luasql.postgres")

local conn = assert(luasql.postgres():connect((...)))

local pid = assert(conn:execute "SELECT pg_backend_pid()")
local server_pid = tonumber(pid:fetch())
pid:close()

worker.serve(server_pid, function()
  assert(conn:execute "SELECT pg_advisory_lock(4242)"):close()
  assert(conn:execute "SELECT pg_advisory_unlock(4242)"):close()
end)
