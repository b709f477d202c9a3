--- What the specs share: a server to talk to, ways to look at it, and other processes.
--- Nothing here sleeps and hopes: `wait_until` polls something that can be observed.

local pglocks = require "pglocks"

local support = {}

--- A factor for patience where everything is slower (valgrind, sanitizers).
support.slow = tonumber(os.getenv "PGLOCKS_TEST_SLOW") or 1

--- A factor for how much a test does that could always do more. `make long` says 5.
support.size = (tonumber(os.getenv "PGLOCKS_TEST_SIZE") or 1) / support.slow
support.conninfo = assert(os.getenv "PGLOCKS_TEST_CONNINFO",
  "no server: run the specs with `make test`")
support.is_jit = rawget(_G, "jit") ~= nil
support.core = require "pglocks.core"

-- ---- connections ------------------------------------------------------------------------

local open = {}

--- A connection that the end of the test closes.
function support.connect(options)
  local described = { conninfo = support.conninfo }
  for name, value in pairs(options or {}) do described[name] = value end
  local conn = pglocks.connect(described)
  open[#open + 1] = conn
  return conn
end

local observer

--- The specs' own eyes: a connection that takes no locks.
function support.observe(sql, ...)
  if not observer or not observer:alive() then observer = pglocks.connect(support.conninfo) end
  return observer:query(sql, ...)
end

--- Rows of pg_locks: the advisory locks of the backend `pid`, or all of them.
function support.pg_locks(pid)
  return support.observe([[SELECT pid, mode, granted, classid, objid, objsubid FROM pg_locks
    WHERE locktype = 'advisory' AND ($1::int IS NULL OR pid = $1) ORDER BY pid, objid, mode]], pid)
end

--- Closes what `connect` opened, and looks for locks that nobody holds any more. Say
--- `after_each(support.finish)` in every spec that locks.
function support.finish()
  collectgarbage()
  for _, conn in ipairs(open) do
    if not conn:cancel() then conn:close() end
  end
  open = {}
  collectgarbage()
  support.wait_until("no lock to be left behind", function() return #support.pg_locks() == 0 end)
end

-- ---- waiting ----------------------------------------------------------------------------

local sleeper

--- Seconds; for polling and for letting a timeout pass, never for hoping.
function support.sleep(seconds)
  if not sleeper then sleeper = require "system".sleep end
  sleeper(seconds)
end

--- Polls until `condition` is true; fails after `seconds` (10).
function support.wait_until(what, condition, seconds)
  local deadline = support.core.now() + (seconds or 10) * support.slow
  repeat
    local result = condition()
    if result then return result end
    support.sleep(0.005)
  until support.core.now() > deadline
  error("waited in vain for " .. what, 2)
end

--- The same in a coroutine of a loop (spec/loops.lua), which must go on meanwhile.
function support.wait_in(loop, what, condition)
  local deadline = support.core.now() + 15 * support.slow
  while not condition() do
    if support.core.now() > deadline then error("waited in vain for " .. what, 2) end
    loop.sleep(0.002)
  end
end

--- Does the backend `pid` sleep in the queue of an advisory lock?
function support.is_waiting(pid)
  local locks = support.observe([[SELECT 1 AS one FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE pid = $1 AND locktype = 'advisory' AND NOT granted AND wait_event_type = 'Lock']], pid)
  return #locks > 0
end

--- Until it does.
function support.wait_until_waiting(pid)
  support.wait_until("backend " .. pid .. " to wait for a lock", function()
    return support.is_waiting(pid)
  end)
end

--- How long a call took, in seconds, before what it returned.
function support.timed(fn, ...)
  local began = support.core.now()
  local function after(...) return support.core.now() - began, ... end
  return after(fn(...))
end

-- ---- steps ------------------------------------------------------------------------------

--- Begins an operation and does not wait: support.begin(conn, "lock", key, options). The
--- request has been sent when this returns. `support.complete(conn)` waits and returns, or raises,
--- what the blocking call would.
function support.begin(conn, operation, ...)
  support.core.start[operation](conn, ...)
end

function support.complete(conn)
  support.core.run(conn)
  return support.core.finish(conn)
end

-- ---- processes and signals --------------------------------------------------------------

--- Why backends cannot be signalled; nil: they can.
--- `if support.cannot_signal then return pending(support.cannot_signal) end`
support.cannot_signal = not os.getenv "PGLOCKS_TEST_DATA" and "this server's processes cannot be signalled" or nil

--- support.signal("STOP", pid)
function support.signal(name, pid)
  local result = os.execute(("kill -s %s %d"):format(name, pid))
  assert(result == true or result == 0, "kill failed")
end

--- Has a process ended? Whose child it is may take a second or two to hear of it.
function support.has_ended(pid)
  local file = io.open(("/proc/%d/stat"):format(pid))
  local status = file and file:read "*a" or ""
  if file then file:close() end
  return status == "" or status:find("%) Z") ~= nil
end

--- What a command of the shell prints, also to stderr.
function support.shell(command)
  local pipe = assert(io.popen("{ " .. command .. "; } 2>&1"))
  local said = pipe:read "*a"
  pipe:close()
  return said
end

local function quote(text) return "'" .. tostring(text):gsub("'", [['\'']]) .. "'" end

--- The words of a shell that put a program where it finds the server, as libpq's programs do.
function support.environment()
  local variables = { host = "PGHOST", hostaddr = "PGHOSTADDR", port = "PGPORT", user = "PGUSER",
    password = "PGPASSWORD", dbname = "PGDATABASE" }
  local words = { "env" }
  for keyword, value in pairs(support.core.conninfo(support.conninfo)) do
    if variables[keyword] then words[#words + 1] = variables[keyword] .. "=" .. quote(value) end
  end
  return table.concat(words, " ")
end

--- Runs a program of a user's, a Lua file, with this runtime: the lines that it prints, stderr
--- included, and its exit status.
function support.run_program(path)
  local pipe = assert(io.popen(table.concat({
    support.environment(), os.getenv "PGLOCKS_TEST_LUA" or "lua", quote(path), "2>&1; echo $?" }, " ")))
  local lines = {}
  for line in pipe:lines() do lines[#lines + 1] = line end
  pipe:close()
  return lines, tonumber(table.remove(lines))
end

--- Starts `script` (Lua source; `...` are the arguments, strings) in another process with this
--- runtime. The result has `pid`, `lines` (an iterator over what it prints, stderr included) and
--- `close()`, which waits for its end.
function support.spawn(script, ...) return support.spawn_with("", script, ...) end

--- The same, with words of the shell before the interpreter: "env A=b".
function support.spawn_with(words, script, ...)
  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write(script)
  file:close()
  local command = { "echo $$; exec", words, os.getenv "PGLOCKS_TEST_LUA" or "lua", path }
  for i = 1, select("#", ...) do command[#command + 1] = quote((select(i, ...))) end
  local pipe = assert(io.popen(table.concat(command, " ") .. " 2>&1"))
  local process = { pid = assert(tonumber(pipe:read "*l")), lines = pipe:lines() }
  function process.close()
    pipe:close()
    os.remove(path)
  end
  return process
end

-- ---- errors -----------------------------------------------------------------------------

--- What a call raises; it must raise.
function support.raised(...)
  local ok, err = pcall(...)
  assert(not ok, "an error was expected")
  return err
end

--- A call must raise something that says this.
function support.assert_raises(expected, ...)
  local message = tostring(support.raised(...))
  if not message:find(expected, 1, true) then
    error(("%q expected in %q"):format(expected, message), 2)
  end
end

--- The error object that a call raises, whose code must be this.
function support.assert_code(code, ...)
  local err = support.raised(...)
  local got = type(err) == "table" and err.code or err
  if got ~= code then error(("error code '%s' expected, got '%s'"):format(code, tostring(got)), 2) end
  return err
end

-- ---- files ------------------------------------------------------------------------------

--- A whole file.
function support.read(path)
  local file = assert(io.open(path))
  local text = file:read "*a"
  file:close()
  return text
end

-- ---- settings of the server -------------------------------------------------------------

local function switch(query, setting, value)
  query(("ALTER SYSTEM SET %s = %s"):format(setting, value))
  query "SELECT pg_reload_conf()"
  support.wait_until(setting .. " to be " .. value, function()
    return query(("SHOW %s"):format(setting))[1][setting] == value
  end)
end

local had_fsync

--- Has the server of the specs write to its disk, for fencing tokens, until support.without_fsync().
--- For connections that are opened then.
function support.with_fsync()
  had_fsync = support.observe("SHOW fsync")[1].fsync == "on"
  if not had_fsync then switch(support.observe, "fsync", "on") end
end

function support.without_fsync()
  if not had_fsync then switch(support.observe, "fsync", "off") end
end

-- ---- TLS --------------------------------------------------------------------------------

-- It is off in the server of the specs, where elsewhere it would only take time.
local function switch_tls(query, value) switch(query, "ssl", value) end

--- Has a server speak TLS: that of the specs, until support.without_tls(), or another one of theirs,
--- by the folder of its data and a function for queries. Its certificate's file, for the name
--- db.example. Only of a server of our own: there is a PGLOCKS_TEST_DATA.
function support.with_tls(folder, query)
  folder = folder or os.getenv "PGLOCKS_TEST_DATA"
  local said = support.shell(("cd %s && umask 077 && %s openssl req -x509 -newkey rsa:2048 -nodes -days 2"
    .. " -subj /CN=db.example -addext subjectAltName=DNS:db.example -keyout server.key -out server.crt")
    :format(folder, os.getenv "PGLOCKS_TEST_AS_SERVER" or ""))
  assert(io.open(folder .. "/server.crt"), said):close()
  switch_tls(query or support.observe, "on")
  return folder .. "/server.crt"
end

function support.without_tls() switch_tls(support.observe, "off") end

-- ---- the server's log -------------------------------------------------------------------

--- Returns a function that gives what the server has logged since; nil where it cannot be read.
function support.log()
  local path = os.getenv "PGLOCKS_TEST_LOG"
  local file = path and io.open(path)
  if not file then return nil end
  file:seek "end"
  return function() return file:read "*a" end
end

return support
