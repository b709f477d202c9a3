-- examples/openresty/nginx.conf: started as it is, but for where it finds things and its port.

local support = require "spec.support"
local server = require "spec.nginx.server"

local shell, wait_until = support.shell, support.wait_until

local ROOT = assert(io.popen "pwd"):read "*l"
local KEEPS_TEMPORARY_FILES = ""
for _, kind in ipairs { "client_body", "proxy", "fastcgi", "uwsgi", "scgi" } do
  KEEPS_TEMPORARY_FILES = ("%s%s_temp_path %s; "):format(KEEPS_TEMPORARY_FILES, kind, kind)
end
local FINDS_PGLOCKS = ([[
  lua_package_path "%s/lua/?.lua;%s/lua/?/init.lua;;";
  lua_package_cpath "%s/build/%sjit/?.so;;";
]]):format(ROOT, ROOT, ROOT, os.getenv "PGLOCKS_BUILD_OF_NGINX" or "")

-- Each of them must be there.
local function substituted(text, replacements)
  for _, pair in ipairs(replacements) do
    local from, to = text:find(pair[1], 1, true)
    assert(from, "the example does not say: " .. pair[1])
    text = text:sub(1, from - 1) .. pair[2] .. text:sub(to + 1)
  end
  return text
end

-- Workers may have to be root to reach the server's socket.
local function start()
  local prefix = shell "mktemp -d /tmp/pglocks-nginx.XXXXXX":match "%S+"
  local port = server.free_port()
  local is_root = shell "id -u":match "%d+" == "0"
  local file = assert(io.open(prefix .. "/nginx.conf", "w"))
  file:write((substituted(support.read "examples/openresty/nginx.conf", {
    { "# load_module /usr/lib/nginx/modules/ndk", "load_module /usr/lib/nginx/modules/ndk" },
    { "# load_module /usr/lib/nginx/modules/ngx", "load_module /usr/lib/nginx/modules/ngx" },
    { "daemon off;", is_root and "user root;" or "" },
    { "error_log stderr notice;", "error_log error.log notice;" },
    { "\nhttp {\n", "\nhttp {\n access_log off; " .. KEEPS_TEMPORARY_FILES .. FINDS_PGLOCKS },
    { '"postgresql:///app"', ("%q"):format(support.conninfo) },
    { "ngx.timer.every(60,", "ngx.timer.every(0.2," },
    { "listen 127.0.0.1:8080", "listen 127.0.0.1:" .. port },
  })))
  file:close()
  local nginx = setmetatable({ port = port, prefix = prefix }, server)
  nginx:command ""
  wait_until("nginx to start", function()
    local pid = io.open(prefix .. "/nginx.pid")
    nginx.pid = pid and tonumber(pid:read "*l")
    if pid then pid:close() end
    return nginx.pid
  end)
  return nginx
end

describe("examples/openresty/nginx.conf", function()
  if not server.available() then
    it("runs", function() pending "libnginx-mod-http-lua is not installed" end)
    return
  end

  local nginx

  setup(function() nginx = start() end)
  teardown(function() nginx:stop() end)

  local conn

  before_each(function() conn = support.connect() end)
  after_each(function()
    conn:close()
    assert.equal("", nginx:errors())
  end)

  local function waiting()
    return #support.observe "SELECT 1 AS one FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
  end

  local function times_tidied()
    local _, count = support.read(nginx.prefix .. "/error.log"):gsub("tidying up", "")
    return count
  end

  it("has requests for one invoice take turns", function()
    local requests = {}
    local seconds = support.timed(function()
      for i = 1, 4 do requests[i] = nginx:begin "/invoice/42" end
      for i = 1, 4 do assert.equal("paid\n", requests[i].body()) end
    end)
    assert.is_true(seconds >= 0.4, "only " .. seconds)
  end)

  it("has them wait for a lock that is held elsewhere", function()
    local lock = conn:lock "invoice 42"
    local request = nginx:begin "/invoice/42"
    wait_until("the request to wait", function() return waiting() == 1 end)
    assert.equal("paid\n", (nginx:get "/invoice/43"))
    lock:release()
    assert.equal("paid\n", request.body())
  end)

  it("answers 503 when that takes too long", function()
    local lock = conn:lock "invoice 42"
    local seconds, _, status = support.timed(nginx.get, nginx, "/invoice/42")
    assert.equal(503, status)
    assert.is_true(seconds >= 5, "only " .. seconds)
    lock:release()
  end)

  it("answers 409 while an export is on, and nothing else", function()
    local lock = conn:lock "export"
    assert.same({ "busy\n", 409 }, { nginx:get "/export" })
    lock:release()
    assert.same({ "exported\n", 200 }, { nginx:get "/export" })
  end)

  it("tidies up in one worker at a time, and in none while another machine does", function()
    wait_until("a worker to tidy up", function() return times_tidied() > 0 end)
    local lock = conn:lock "tidy up"
    local before = times_tidied()
    support.sleep(1)
    assert.equal(before, times_tidied())
    lock:release()
    wait_until("a worker to tidy up", function() return times_tidied() > before end)
  end)
end)
