--- PostgreSQL servers of a spec's own, to be stopped and promoted, while the one that all specs
--- share goes on. Their folders are beside its data: what a spec that died has left running there,
--- tools/with-postgres stops.
---
---     local primary = server.make()
---     local standby = primary:standby()
---     primary:stop "immediate"
---     standby:promote()
---     server.finish() -- of every test: leaves none of them

local pglocks = require "pglocks"
local support = require "spec.support"

local server = {}
server.__index = server

local BINDIR, DATA = os.getenv "PGLOCKS_TEST_BINDIR", os.getenv "PGLOCKS_TEST_DATA"
local HOME = DATA and DATA:match "^(.+)/"
local PORT = 5432 -- the name of a socket in the server's folder, and nothing else

-- A large part of the time would go into the folders: so they are small, and initdb runs once.
local CONF = [[
listen_addresses = ''
port = %d
shared_buffers = 1MB
wal_keep_size = 64MB
fsync = off
jit = off
log_line_prefix = '%%m [%%p] '
]]

--- Why servers cannot be made; nil: they can.
--- `if server.cannot_make then return pending(server.cannot_make) end`
server.cannot_make = not (BINDIR and DATA) and "there are no programs of a server to start one with" or nil

--- A command as the servers' user, in a folder that is open to it: what it prints.
function server.shell(command, ...)
  local said = support.shell(("cd %s && %s %s </dev/null && echo done"):format(HOME,
    os.getenv "PGLOCKS_TEST_AS_SERVER" or "", command:format(...)))
  return said:match "^(.-)%s*done\n$" or error(said, 2)
end

local function append(path, text)
  local file = assert(io.open(path, "a"))
  assert(file:write(text))
  file:close()
end

--- A folder of the servers' user, with a short path because of the sockets in it.
function server.folder()
  return server.shell("mktemp -d %s/s.XXXXXX", HOME)
end

local template

local function make_template()
  if template then return end
  template = server.folder()
  server.shell("%s/initdb -D %s -A trust -E UTF8 --locale=C -U postgres -N --wal-segsize=1", BINDIR, template)
  append(template .. "/postgresql.conf", CONF:format(PORT))
end

local made = {}

-- Every one begins as a copy of the same folder, so that one can follow another.
local function new(conf)
  make_template()
  local folder = server.folder()
  server.shell("cp -R %s/. %s", template, folder)
  append(folder .. "/postgresql.conf", ("unix_socket_directories = '%s'\n%s"):format(folder, conf))
  local self = setmetatable({
    host = folder, port = PORT,
    conninfo = ("host=%s port=%d dbname=postgres user=postgres"):format(folder, PORT),
  }, server)
  made[#made + 1] = self
  return self
end

function server:pg_ctl(arguments)
  local ok, said = pcall(server.shell, "%s/pg_ctl -D %s -s -w -t 60 %s", BINDIR, self.host, arguments)
  if not ok then error(said .. support.shell("tail -n 20 " .. self.host .. "/log"), 3) end
end

--- A primary that runs. `conf`: lines for its postgresql.conf.
function server.make(conf)
  local self = new(conf or "")
  self:start()
  return self
end

--- A hot standby that follows this server.
function server:standby()
  local standby = new(("primary_conninfo = 'host=%s port=%d user=postgres'\n"):format(self.host, PORT))
  server.shell("touch %s/standby.signal", standby.host)
  standby:start()
  support.wait_until("the standby to follow", function()
    return #self:query "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'" > 0
  end)
  return standby
end

function server:start()
  self:pg_ctl(("-l %s/log start"):format(self.host))
end

-- Of its postmaster: 0 while that has not said, nil when it has ended.
local function pid_of(self)
  local file = io.open(self.host .. "/postmaster.pid")
  if not file then return nil end
  local pid = file:read "*n"
  file:close()
  return pid or 0
end

--- Or starts, or stops.
function server:is_running() return pid_of(self) ~= nil end

--- Starts it unless it runs already, or is about to.
function server:ensure()
  support.wait_until("the server", function()
    if not self:is_running() then self:begin_start() end
    local ok, conn = pcall(pglocks.connect, { conninfo = self.conninfo, allow_standby = true, timeout = 0.5 })
    if ok then conn:close() end
    return ok
  end, 20)
end

--- Begins what pg_ctl else waits for: "-m fast stop".
function server:begin(arguments) self:pg_ctl("-W " .. arguments) end

--- When it has ended, if it is about to.
function server:begin_start()
  support.wait_until("the server to end", function() return not self:is_running() end)
  self:begin(("-l %s/log start"):format(self.host))
  support.wait_until("the server to begin", function() return (pid_of(self) or 0) > 0 end)
end

--- mode: "smart", "fast" (without one) or "immediate"
function server:stop(mode)
  self:pg_ctl("-m " .. (mode or "fast") .. " stop")
end

--- Returns when it takes writes.
function server:promote()
  self:pg_ctl "promote"
end

--- Rows, on a connection that takes no locks.
function server:query(sql, ...)
  if not self.observer or not self.observer:alive() then
    self.observer = pglocks.connect { conninfo = self.conninfo, allow_standby = true }
  end
  return self.observer:query(sql, ...)
end

--- Stops what runs of the servers that were made, and removes them.
function server.finish()
  for _, self in ipairs(made) do
    if self.observer then self.observer:close() end
    if self:is_running() then pcall(self.stop, self, "immediate") end -- it may be stopping already
    support.wait_until("the server to stop", function() return not self:is_running() end)
    support.shell("rm -rf " .. self.host)
  end
  made = {}
end

return server
