--- An nginx of the specs' own: its own prefix, a loopback port, stopped by its pid. HTTP is spoken
--- with curl.
---
---     local nginx = server.start { http = "...", locations = { ["/lock"] = "Lua code" } }
---     nginx:get "/lock"

local socket = require "cqueues.socket"
local support = require "spec.support"

local shell = support.shell

local server = {}
server.__index = server

local ROOT = assert(io.popen "pwd"):read "*l"
local MODULES = "/usr/lib/nginx/modules"

local CONF = [[
load_module %s/ndk_http_module.so;
load_module %s/ngx_http_lua_module.so;
%s
worker_processes %d;
daemon on;
pid nginx.pid;
error_log error.log info;
env PGLOCKS_TEST_CONNINFO;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  lua_package_path "%s/lua/?.lua;%s/lua/?/init.lua;/usr/share/lua/5.1/?.lua;/usr/share/lua/5.1/?/init.lua;;";
  lua_package_cpath "%s/build/%sjit/?.so;;";
  lua_socket_log_errors off;
  lua_check_client_abort on;
  %s
  server {
    listen 127.0.0.1:%d%s;
    %s
  }
}
]]

--- Is there an nginx with ngx_lua? It loads the build for LuaJIT, whatever runs the specs.
function server.available()
  local file = io.open(MODULES .. "/ngx_http_lua_module.so")
  if file then file:close() end
  return file ~= nil
end

--- A port of the loopback interface that the kernel has found free.
function server.free_port()
  local listener = socket.listen("127.0.0.1", 0)
  assert(listener:listen())
  local _, _, port = listener:localname()
  listener:close()
  return port
end

--- settings: http (directives), locations ({ ["/path"] = Lua code of its content, or directives in
--- a table }), workers (2), reuseport (all workers get connections)
function server.start(settings)
  local self = setmetatable({ port = server.free_port() }, server)
  self.prefix = shell "mktemp -d /tmp/pglocks-nginx.XXXXXX":match "%S+"
  local locations = {}
  for path, code in pairs(settings.locations) do
    locations[#locations + 1] = ("location %s { %s }"):format(path,
      type(code) == "table" and code[1] or ("content_by_lua_block {\n%s\n}"):format(code))
  end
  local is_root = shell "id -u":match "%d+" == "0"
  local conf = CONF:format(MODULES, MODULES, is_root and "user root;" or "", settings.workers or 2, ROOT, ROOT, ROOT,
    os.getenv "PGLOCKS_BUILD_OF_NGINX" or "", settings.http or "", self.port,
    settings.reuseport and " reuseport" or "", table.concat(locations, "\n"))
  local file = assert(io.open(self.prefix .. "/nginx.conf", "w"))
  file:write(conf)
  file:close()
  self:command ""
  local ok, err = pcall(support.wait_until, "nginx to start", function()
    local pid = io.open(self.prefix .. "/nginx.pid")
    self.pid = pid and tonumber(pid:read "*l")
    if pid then pid:close() end
    return self.pid
  end)
  if not ok then error(err .. ": " .. support.read(self.prefix .. "/error.log")) end
  return self
end

function server:command(arguments)
  local said = shell(("nginx -p %s -c nginx.conf -e error.log %s"):format(self.prefix, arguments))
  assert(not said:find("emerg", 1, true), said)
end

function server:url(path) return ("http://127.0.0.1:%d%s"):format(self.port, path) end

--- The body and the status of a GET.
function server:get(path)
  local said = shell(("curl -s -m 30 -w '\n%%{http_code}' '%s'"):format(self:url(path)))
  local body, status = said:match "^(.*)\n(%d+)$"
  return body, tonumber(status)
end

--- Sends the GETs of a pattern of curl's, such as "/x?[1-100]", so many at a time. Returns how often
--- each status came.
function server:get_many(paths, at_a_time)
  local statuses = {}
  local said = shell(("curl -Z --parallel-max %d -s --no-progress-meter -m 60 -o /dev/null -w '%%{http_code}\n' '%s'")
    :format(at_a_time, self:url(paths)))
  for status in said:gmatch "%d+" do statuses[status] = (statuses[status] or 0) + 1 end
  return statuses
end

--- Begins a GET in another process: { pid =, body() = waits for its end }.
function server:begin(path)
  local pipe = assert(io.popen(("echo $$; exec curl -s -N -m 60 '%s' 2>&1"):format(self:url(path))))
  local request = { pid = tonumber(pipe:read "*l") }
  function request.line() return pipe:read "*l" end
  function request.body()
    local body = pipe:read "*a"
    pipe:close()
    return body
  end
  return request
end

--- The pids of its workers.
function server:workers()
  local pids = {}
  for pid in shell(("ps -o pid=,args= --ppid %d | grep 'worker process' | grep -v 'shutting down'")
    :format(self.pid)):gmatch "(%d+) nginx" do
    pids[#pids + 1] = tonumber(pid)
  end
  return pids
end

--- What it has logged at [error] or above.
function server:errors()
  local errors = {}
  for line in io.lines(self.prefix .. "/error.log") do
    if line:find "%[error%]" or line:find "%[crit%]" or line:find "%[alert%]" or line:find "%[emerg%]" then
      errors[#errors + 1] = line
    end
  end
  return table.concat(errors, "\n")
end

function server:stop()
  pcall(support.signal, "TERM", self.pid)
  support.wait_until("nginx to stop", function() return support.has_ended(self.pid) end)
  shell("rm -rf " .. self.prefix)
end

return server
