--- pgmoon outside of nginx, where the user has put it: it is found by LUA_PATH. It uses
--- luaposix for Unix sockets, which it has since version 1.17, and LuaSocket for TCP.

local worker = require "bench.peers.worker"
local pgmoon = worker.library("pgmoon", "pgmoon")

local parameters = {}
for keyword, value in (...):gmatch "(%w+)=(%S+)" do parameters[keyword] = value end

local config = {
  host = parameters.host,
  port = parameters.port,
  user = parameters.user,
  database = parameters.dbname,
}
local folder = parameters.host:match "^/.*"
if folder then
  worker.library("luaposix", "posix.sys.socket")
  config.socket_path = ("%s/.s.PGSQL.%s"):format(folder, parameters.port)
else
  worker.library("luasocket", "socket")
  config.socket_type = "luasocket"
end

local pg = pgmoon.new(config)
if folder and pg.sock_type ~= "luaposix" then -- an older one, which does not know socket_path
  io.stderr:write "pgmoon 1.17 is not installed\n"
  os.exit(3)
end
assert(pg:connect())

-- The simple protocol: pgmoon sends an integer as a parameter of type numeric, which no lock takes.
worker.serve(assert(pg:query "SELECT pg_backend_pid() AS pid")[1].pid, function()
  assert(pg:query "SELECT pg_advisory_lock(4242)")
  assert(pg:query "SELECT pg_advisory_unlock(4242)")
end)
