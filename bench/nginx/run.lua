--- make bench-nginx: locks inside nginx, pglocks (through a locker; with a connection for each lock, released
--- confirmed and deferred; blocking) beside the least that could do the same (a cosocket
--- and two statements), and beside pgmoon where that is installed.
---
---     SHORT=1          one short round: it shows that all runs, and measures little
---     ONLY=pairs       one part: pairs, network, hand-over, death, waiting
---     PLACEMENT=cross  nginx's worker on one CPU, all else on another; `same`: all on one, `free`:
---                      where the kernel likes. Figures of one placement say nothing about another.

local core = require "pglocks.core"
local numbers = require "bench.numbers"
local pglocks = require "pglocks"

local percentile, whole = numbers.percentile, numbers.whole

local SHORT = (os.getenv "SHORT" or "") ~= ""
local ONLY = os.getenv "ONLY" or ""
local SECONDS = SHORT and 0.1 or 0.5 -- of each measurement
local ROUNDS = SHORT and 1 or 6
local POOL_SIZE = 150 -- for 128 clients, and connections whose release is under way
local DELAY = 500 -- microseconds

local MODULES = "/usr/lib/nginx/modules"

-- ---- other processes --------------------------------------------------------------------

local function shell(command)
  local pipe = assert(io.popen(command .. " 2>&1"))
  local said = pipe:read "*a"
  pipe:close()
  return said
end

local ROOT = shell "pwd":match "[^\n]+"
-- Hundreds of connections at once may take longer than libpq's usual patience for one.
local PATIENT = " connect_timeout=60"
local CONNINFO = assert(os.getenv "PGLOCKS_TEST_CONNINFO", "no server: say `make bench-nginx`") .. PATIENT

local cpus = tonumber(shell "nproc") or 1
local placement = os.getenv "PLACEMENT" or "cross"
if not shell "command -v taskset":find "%S" or placement == "cross" and cpus < 2 then placement = "free" end
local elsewhere = ({ cross = "taskset -c 1 ", same = "taskset -c 0 ", free = "" })[placement]
local with_worker = placement == "free" and "" or "taskset -c 0 "

-- With a pid, to end it by. In our process group, so that it ends with us at the latest.
local function begin(command)
  local pipe = assert(io.popen("echo $$; exec " .. command))
  local process = { pid = tonumber(pipe:read "*l") }
  function process.line() return pipe:read "*l" end
  function process.stop()
    shell("kill " .. process.pid)
    pipe:read "*a"
    pipe:close()
  end
  return process
end

local observer = pglocks.connect(CONNINFO)

local function sleep(seconds) observer:query("SELECT pg_sleep($1)", seconds) end

local function comes(condition, seconds)
  local deadline = core.now() + seconds
  while not condition() do
    if core.now() > deadline then return false end
    sleep(0.002)
  end
  return true
end

local function wait_until(what, condition)
  if not comes(condition, 120) then error("waited in vain for " .. what, 0) end
end

local function count_locks(key, granted)
  return observer:query([[SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory'
    AND objid = $1 AND granted = $2]], key, granted)[1].n
end

local function count_sessions()
  return observer:query("SELECT count(*) AS n FROM pg_stat_activity WHERE backend_type = 'client backend'")[1].n
end

-- ---- PostgreSQL -------------------------------------------------------------------------

local function keyword(name, default)
  return CONNINFO:match("%f[%w]" .. name .. "=(%S+)") or default
end

local function socket_path()
  local host = keyword("host", "")
  return host:sub(1, 1) == "/" and ("%s/.s.PGSQL.%s"):format(host, keyword("port", "5432")) or nil
end

local function server_settings()
  return {
    conninfo = CONNINFO,
    path = socket_path(),
    host = keyword "host",
    port = tonumber(keyword("port", "5432")),
    user = keyword("user", "postgres"),
    database = keyword("dbname", "postgres"),
    pool_size = POOL_SIZE,
  }
end

-- Backends begun from now on run where the postmaster does. A server that is not ours stays as it is.
local function place_server()
  local folder = os.getenv "PGLOCKS_TEST_DATA"
  local file = folder and placement ~= "free" and io.open(folder .. "/postmaster.pid")
  if not file then return end
  local pid = file:read "*n"
  file:close()
  shell(("taskset -cp %d %d"):format(placement == "cross" and 1 or 0, pid))
end

-- Starts the server again with room for more; false where it is not ours to start. A backend looks
-- for deadlocks after a second in a queue, which of a thousand takes PostgreSQL most of a minute: not
-- what is measured here.
local function restart_server(connections)
  local folder, bindir = os.getenv "PGLOCKS_TEST_DATA", os.getenv "PGLOCKS_TEST_BINDIR"
  if not folder or not bindir then return false end
  observer:close()
  local options = ("-c max_connections=%d -c deadlock_timeout=10min"):format(connections)
  local said = shell(("cd %s && %s %s/pg_ctl -D %s -l %s -s -w -m fast -o '%s' restart </dev/null"):format(folder,
    os.getenv "PGLOCKS_TEST_AS_SERVER" or "", bindir, folder, os.getenv "PGLOCKS_TEST_LOG", options))
  if said:find "%S" then print(said) end
  observer = pglocks.connect(CONNINFO)
  place_server()
  return true
end

-- ---- nginx ------------------------------------------------------------------------------

local CONF = [[
load_module %s/ndk_http_module.so;
load_module %s/ngx_http_lua_module.so;
%s
worker_processes 1;
worker_rlimit_nofile %s;
daemon off;
pid nginx.pid;
error_log error.log error;
events { worker_connections 8192; }
http {
  access_log off;
  keepalive_requests 1000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  lua_package_path "%s;;";
  lua_package_cpath "%s/build/jit/?.so;;";
  lua_socket_log_errors off;
  lua_check_client_abort on;
  init_by_lua_block { require "app".setup { %s } }
  server {
    listen 127.0.0.1:%d backlog=4096;
    %s
  }
}
]]

local PACKAGE_PATH = table.concat({
  ROOT .. "/bench/nginx/?.lua", ROOT .. "/lua/?.lua", ROOT .. "/lua/?/init.lua",
  "/usr/share/lua/5.1/?.lua", "/usr/share/lua/5.1/?/init.lua",
}, ";")

local WAYS = { "cosocket", "locker", "confirmed", "deferred", "blocking" }

local function locations()
  local list = {}
  local function add(path, code)
    list[#list + 1] = ("location = /%s { content_by_lua_block { require \"app\".%s } }"):format(path, code)
  end
  for _, name in ipairs(WAYS) do
    add("pairs/" .. name, ("pairs(%q, 1)"):format(name))
    add("pairs100/" .. name, ("pairs(%q, 100)"):format(name))
    add("hand-over/" .. name, ("hand_over(%q)"):format(name))
    add("wait/" .. name, ("wait(%q)"):format(name))
    for _, how in ipairs { "exit", "error", "abort" } do
      add(("die/%s/%s"):format(name, how), ("die(%q, %q)"):format(name, how))
    end
  end
  for _, name in ipairs { "pid", "ping", "begun", "count", "samples", "died" } do add(name, name .. "()") end
  return table.concat(list, "\n    ")
end

local Nginx = {}
Nginx.__index = Nginx

local function start_nginx(settings)
  local self = setmetatable({ port = 20000 + math.random(12000) }, Nginx)
  self.prefix = shell "mktemp -d /tmp/pglocks-bench.XXXXXX":match "%S+"
  local given = {}
  for name, value in pairs(settings) do given[#given + 1] = ("%s = %q"):format(name, value) end
  local conf = CONF:format(MODULES, MODULES, shell "id -u":match "%d+" == "0" and "user root;" or "",
    shell "ulimit -Hn":match "%d+" or 4096, PACKAGE_PATH, ROOT, table.concat(given, ", "), self.port, locations())
  local file = assert(io.open(self.prefix .. "/nginx.conf", "w"))
  file:write(conf)
  file:close()
  self.process = begin(("%snginx -p %s -c nginx.conf -e error.log 2>&1"):format(with_worker, self.prefix))
  for _ = 1, 200 do
    self.worker = tonumber(self:get "pid")
    if self.worker then return self end
    sleep(0.02)
  end
  error("nginx does not start: " .. shell(("cat %s/error.log"):format(self.prefix)), 0)
end

function Nginx:get(path)
  return shell(("curl -s -m 30 http://127.0.0.1:%d/%s"):format(self.port, path))
end

function Nginx:load_command(path, clients, seconds, options)
  return ("%s%s/build/bench/load %s %d /%s %d %g"):format(elsewhere, ROOT, options or "", self.port, path,
    clients, seconds)
end

local function parse_load(line)
  local result = {}
  for name, value in (line or ""):gmatch "([%w_]+) (%S+)" do result[name] = tonumber(value) end
  assert(result.rate, "the load generator failed: " .. tostring(line))
  return result
end

function Nginx:load(path, clients, seconds, options)
  return parse_load(shell(self:load_command(path, clients, seconds, options)):match "rate [^\n]*")
end

-- Nanoseconds that its worker has had a CPU.
function Nginx:cpu()
  local file = assert(io.open(("/proc/%d/schedstat"):format(self.worker)))
  local spent = file:read "*n"
  file:close()
  return spent
end

function Nginx:stop()
  self.process.stop()
  local errors = shell(("grep -h '^[0-9]' %s/error.log | grep -v 'died$' | head -n 3"):format(self.prefix))
  if errors:find "%S" then print("  nginx says: " .. errors) end
  shell("rm -rf " .. self.prefix)
end

local function with_nginx(settings, fn)
  local nginx = start_nginx(settings)
  local ok, err = pcall(fn, nginx)
  nginx:stop()
  if not ok then error(err, 0) end
end

-- ---- parts ------------------------------------------------------------------------------

local function measure_pairs(nginx, clients)
  local function measure(name, seconds)
    local before = nginx:cpu()
    local result = nginx:load("pairs/" .. name, clients, seconds or SECONDS)
    result.cpu = (nginx:cpu() - before) / result.answered
    return result
  end
  for _, name in ipairs(WAYS) do
    local before
    repeat -- until a pool has all the connections that it will need
      before = count_sessions()
      measure(name, SHORT and 0.1 or 0.3)
    until count_sessions() == before
  end
  return numbers.rounds(WAYS, ROUNDS, measure)
end

-- A request lasts so long that counting whole ones says little: the worker counts keys. While it is
-- blocked it cannot be asked, but then there is only one request at a time.
local function measure_loops(nginx, clients)
  return numbers.rounds(WAYS, ROUNDS, function(name)
    if name == "blocking" then
      local before = nginx:cpu()
      local result = nginx:load("pairs100/" .. name, clients, SECONDS)
      result.rate, result.cpu = result.rate * 100, (nginx:cpu() - before) / (result.answered * 100)
      return result
    end
    local function look()
      local at, keys = nginx:get "count":match "(%S+) (%S+)"
      return tonumber(at), tonumber(keys), nginx:cpu()
    end
    local running = begin(nginx:load_command("pairs100/" .. name, clients, SECONDS + 0.2))
    sleep(0.1)
    local began, first, cpu = look()
    sleep(SECONDS)
    local ended, last, cpu_then = look()
    local result = parse_load(running.line())
    running.stop()
    result.rate, result.cpu = (last - first) / (ended - began), (cpu_then - cpu) / (last - first)
    return result
  end)
end

local HEAD = { "", "pairs/s", "ratio", "min..max", "p50 us", "p99 us", "worker us/pair", "ratio", "failed" }

local function print_pairs(title, results)
  local rows = { HEAD }
  for _, name in ipairs(WAYS) do
    local own, base = results[name], results.cosocket
    local rates = numbers.list(own, "rate")
    local ratio, spread = numbers.ratio(numbers.list(own, "rate"), numbers.list(base, "rate"))
    local failed = 0
    for _, result in ipairs(own) do failed = failed + result.failed end
    rows[#rows + 1] = {
      name,
      whole(numbers.median(rates)),
      ("%.2f"):format(ratio),
      spread,
      whole(numbers.median(numbers.list(own, "p50_us"))),
      whole(numbers.median(numbers.list(own, "p99_us"))),
      ("%.1f"):format(numbers.median(numbers.list(own, "cpu", 1e-3))),
      ("%.2f"):format((numbers.ratio(numbers.list(own, "cpu"), numbers.list(base, "cpu")))),
      whole(failed),
    }
  end
  numbers.print_table(title, rows)
end

local parts = {}

function parts.pairs()
  with_nginx(server_settings(), function(nginx)
    for _, clients in ipairs(SHORT and { 1, 16 } or { 1, 16, 128 }) do
      print_pairs(("One pair a request, %d client%s, %s"):format(clients, clients > 1 and "s" or "",
        socket_path() and "Unix socket" or "TCP"), measure_pairs(nginx, clients))
    end
    print_pairs("100 pairs a request, 16 clients (the cosocket stays the request's, pglocks takes from its pool)",
      measure_loops(nginx, 16))
  end)
end

function parts.network()
  local target = socket_path() or keyword("port", "5432")
  local proxy = begin(("%s%s/build/bench/delay %d %s"):format(elsewhere, ROOT, DELAY, target))
  local settings = server_settings()
  settings.path, settings.host, settings.port = nil, "127.0.0.1", tonumber(proxy.line())
  settings.conninfo = ("host=127.0.0.1 port=%d dbname=%s user=%s sslmode=disable%s"):format(settings.port,
    settings.database, settings.user, PATIENT)
  with_nginx(settings, function(nginx)
    for _, clients in ipairs { 2, 16 } do -- with few the CPUs idle, and only round trips count
      print_pairs(("One pair a request, %d clients, a network of %.1f ms each way"):format(clients, DELAY / 1000),
        measure_pairs(nginx, clients))
    end
  end)
  proxy.stop()
end

-- Where one request waits for another of the same worker, blocking would wait for ever.
local function those_that_yield()
  local names = {}
  for _, name in ipairs(WAYS) do
    if name ~= "blocking" then names[#names + 1] = name end
  end
  return names
end

parts["hand-over"] = function()
  local names = those_that_yield()
  with_nginx(server_settings(), function(nginx)
    local found = numbers.rounds(names, SHORT and 1 or 4, function(name)
      nginx:get "samples"
      nginx:load("hand-over/" .. name, 2, SECONDS)
      local list = {}
      for seconds in nginx:get "samples":gmatch "%S+" do list[#list + 1] = tonumber(seconds) * 1e6 end
      return list
    end)
    local rows = { { "", "hand-overs", "p50 us", "ratio", "min..max", "p99 us" } }
    local medians = {}
    for _, name in ipairs(names) do
      medians[name] = {}
      for round, list in ipairs(found[name]) do medians[name][round] = percentile(list, 0.5) end
    end
    for _, name in ipairs(names) do
      local all = {}
      for _, list in ipairs(found[name]) do
        for _, sample in ipairs(list) do all[#all + 1] = sample end
      end
      local ratio, spread = numbers.ratio(medians[name], medians.cosocket)
      rows[#rows + 1] = { name, whole(#all), whole(percentile(all, 0.5)), ("%.2f"):format(ratio), spread,
        whole(percentile(all, 0.99)) }
    end
    numbers.print_table("Hand-over: from the release in one request to the return of lock in another", rows)
  end)
end

-- Seconds from the death of a request until another session has its lock; nil if that was not in
-- the queue yet.
local function time_of_death(nginx, name, how)
  local path = ("die/%s/%s"):format(name, how)
  local request = begin(how == "abort" and nginx:load_command(path, 1, 0.06, "-a")
    or ("curl -s -o /dev/null -m 30 http://127.0.0.1:%d/%s"):format(nginx.port, path))
  if not comes(function() return count_locks(2, true) > 0 end, 0.5) then -- or it was over before we saw it
    request.stop()
    return nil
  end
  local began = core.now()
  local lock = observer:lock(2, { timeout = 20 })
  local freed = core.now()
  lock:release()
  local died = how == "abort" and parse_load(request.line()).ended_at or tonumber(nginx:get "died")
  request.stop()
  return began < died and freed - died or nil
end

function parts.death()
  local wanted = SHORT and 2 or 50
  local rows = { { "", "", "samples", "p50 ms", "max ms" } }
  with_nginx(server_settings(), function(nginx)
    for _, how in ipairs { "exit", "error", "abort" } do
      local found, ways = {}, { "cosocket", "locker", "deferred" }
      for attempt = 1, 2 * wanted do
        for place = 1, #ways do
          local name = ways[(attempt + place) % #ways + 1]
          found[name] = found[name] or {}
          if #found[name] < wanted then
            found[name][#found[name] + 1] = time_of_death(nginx, name, how)
          end
        end
      end
      for _, name in ipairs(ways) do
        local list = found[name]
        rows[#rows + 1] = { name, how, whole(#list), ("%.2f"):format(percentile(list, 0.5) * 1000),
          ("%.2f"):format(percentile(list, 1) * 1000) }
      end
    end
  end)
  numbers.print_table("From the death of a request that holds a lock to its grant to a waiting session", rows)
end

local function measure_waiting(name, waiting)
  local settings, row = server_settings(), nil
  settings.pool_size = waiting + 20
  local window = SHORT and 0.7 or 2
  with_nginx(settings, function(nginx)
    local lock = observer:lock(1)
    local began, clients = core.now(), nil
    if waiting > 0 then
      clients = begin(nginx:load_command("wait/" .. name, waiting, 180, "-a"))
      wait_until("requests to wait", function()
        sleep(0.05)
        return tonumber((nginx:get "begun")) >= waiting and count_locks(1, false) >= (name == "locker" and 1 or waiting)
      end)
    end
    local gathered = core.now() - began
    sleep(1.5) -- with the usual deadlock_timeout the last of them look for deadlocks after a second
    local before = nginx:cpu()
    sleep(window)
    local idle = (nginx:cpu() - before) / (window * 1e9)
    local ping = nginx:load("ping", 1, window, "-p 5")
    lock:release()
    if clients then clients.stop() end
    row = { waiting > 0 and name or "", whole(waiting), ("%.1f"):format(gathered), ("%.2f %%"):format(idle * 100),
      whole(ping.p50_us), whole(ping.p99_us) }
  end)
  wait_until("the queue to go", function()
    sleep(0.05)
    return count_locks(1, true) + count_locks(1, false) == 0
  end)
  return row
end

function parts.waiting()
  local rows = { { "", "waiting", "gathered in s", "worker CPU", "/ping p50 us", "p99 us" } }
  local sizes = SHORT and { 50 } or { 200, 1000 }
  local note = ""
  if not SHORT and not restart_server(1100) then
    sizes = { 100 }
    note = "\n  fewer than usual: this PostgreSQL is not ours to give more connections"
  end
  rows[2] = measure_waiting("deferred", 0)
  for _, waiting in ipairs(sizes) do
    for _, name in ipairs { "cosocket", "locker", "deferred" } do
      rows[#rows + 1] = measure_waiting(name, waiting)
    end
  end
  numbers.print_table("Other requests while many wait for one lock" .. note, rows)
end

-- ---- all --------------------------------------------------------------------------------

math.randomseed(os.time())
do
  local file = io.open(MODULES .. "/ngx_http_lua_module.so")
  if not file then
    print "There is no nginx with ngx_lua here: nothing to measure."
    return
  end
  file:close()
end

place_server()
print(("%s; placement: %s; a ratio is to the cosocket in the same round, the median of %d rounds")
  :format(shell "nginx -v":match "nginx/%S+", placement, ROUNDS))
print "min..max: of those ratios, which is how noisy this machine was"
if shell "luajit -e 'print(package.searchpath([[pgmoon]], package.path))'":find "^[./]" then
  WAYS[#WAYS + 1] = "pgmoon"
else
  print "pgmoon is not installed: left out"
end

for _, name in ipairs { "pairs", "network", "hand-over", "death", "waiting" } do
  if ONLY == "" or ONLY == name then parts[name]() end
end
observer:close()
