-- demo.lua: several processes fight for one lock, and only one at a time gets in. Run `make demo`.
--
-- Every worker is a process of its own, with a connection of its own. Read `take_turns` first: it
-- is all that a program has to do.

local pglocks = require "pglocks"

local NAME = "pglocks demo"
local TURNS, TURN = 2, 0.25 -- for each worker; seconds
local LANES = { anna = 1, ben = 2, carla = 3, dora = 4 }
local LANE_WIDTH = 13

local function connect(application_name)
  return pglocks.connect {
    conninfo = os.getenv "PGLOCKS_TEST_CONNINFO", -- without it: PGHOST, PGDATABASE, ...
    application_name = application_name,
  }
end

-- ---- what is printed --------------------------------------------------------------------

-- All processes share the terminal and, for the time column, the server's clock.
local function clock(conn)
  return tonumber(conn:query("SELECT extract(epoch FROM clock_timestamp())::text AS t")[1].t)
end

local function say(conn, began, lane, text)
  local indent = lane and (" "):rep((lane - 1) * LANE_WIDTH) or ""
  io.stdout:write(("%6.2f s  %s%s\n"):format(clock(conn) - began, indent, text))
end

-- ---- the workers ------------------------------------------------------------------------

local function pause(conn, seconds) conn:query("SELECT pg_sleep($1)", seconds) end

local function read_number(path)
  local file <close> = assert(io.open(path))
  return file:read "n"
end

local function write_number(path, number)
  local file <close> = assert(io.open(path, "w"))
  file:write(number)
end

-- Counts its turns in a file, which goes wrong as soon as two do it at once.
local function take_turns(conn, tell, counter)
  for _ = 1, TURNS do
    tell "waits"
    local lock <close> = conn:lock(NAME) -- waits here until the lock is ours, and ours alone

    tell "HOLDS  <<<"
    local number = read_number(counter)
    pause(conn, TURN)
    write_number(counter, number + 1)
    tell "done"
  end -- released here: at the end of the scope, however it ends
end

-- Takes the lock and never lets it go.
local function hang(conn, tell)
  local lock <close> = conn:lock(NAME)
  tell "HOLDS  <<<"
  io.read() -- nothing is ever written; the end of the main process would end this too
end

local function take_one_turn(conn, tell)
  tell "waits"
  local lock <close> = conn:lock(NAME)
  tell(("HOLDS  <<<  after %.2f s"):format(lock.waited))
end

local TASKS = { take_turns = take_turns, hang = hang, take_one_turn = take_one_turn }

local function work(task, name, began, counter, pid)
  -- The main process finds us, and our pid, by this name.
  local conn <close> = connect(("demo %s %s"):format(name, pid))
  local function tell(text) say(conn, tonumber(began), LANES[name], text) end
  TASKS[task](conn, tell, counter)
end

-- ---- the main process -------------------------------------------------------------------

local function quote(text) return "'" .. text:gsub("'", [['\'']]) .. "'" end

-- Processes whose end is waited for when the scope ends, in the order in which they were started:
-- the end of our side of the pipe ends one that hangs, and so frees the next.
local function new_crew()
  return setmetatable({}, {
    __close = function(crew) for _, worker in ipairs(crew) do worker:close() end end,
  })
end

-- Starts this file again.
local function start(crew, task, name, began, counter)
  local interpreter = 0
  while arg[interpreter - 1] do interpreter = interpreter - 1 end
  local command = { "exec", quote(arg[interpreter]), quote(arg[0]), task, name,
    ("%.6f"):format(began), quote(counter), "$$" } -- the shell's pid, which exec keeps
  crew[#crew + 1] = assert(io.popen(table.concat(command, " "), "w"))
end

-- Who holds the demo's lock (granted) or waits for it, as PostgreSQL sees it.
local function demo_locks(conn, granted)
  local key = pglocks.key(NAME)
  return conn:query([[SELECT application_name AS name FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND datname = current_database() AND granted = $1
      AND classid = $2 AND objid = $3 AND objsubid = $4 AND application_name LIKE 'demo %']],
    granted, key.classid, key.objid, key.objsubid)
end

local function wait_until(conn, what, condition)
  local deadline = clock(conn) + 5
  while not condition() do
    if clock(conn) > deadline then error("waited in vain for " .. what) end
    pause(conn, 0.001)
  end
end

local function wait_for_waiters(conn, count)
  wait_until(conn, count .. " to wait", function() return #demo_locks(conn, false) == count end)
end

local function show_turns(conn, began, counter)
  local crew <close> = new_crew()
  local gate <close> = conn:lock(NAME)
  say(conn, began, nil, "The main process holds the lock until all four wait for it.")
  for i, name in ipairs { "anna", "ben", "carla", "dora" } do
    start(crew, "take_turns", name, began, counter)
    wait_for_waiters(conn, i)
  end
  say(conn, began, nil, "It lets go. One HOLDS at a time, first come first served:")
end

local function show_crash(conn, began, counter)
  say(conn, began, nil, "Now ben takes the lock, hangs and is killed, while carla waits.")
  local crew <close> = new_crew()
  start(crew, "hang", "ben", began, counter)
  wait_until(conn, "ben to hold", function() return #demo_locks(conn, true) == 1 end)
  start(crew, "take_one_turn", "carla", began, counter)
  wait_for_waiters(conn, 1)
  pause(conn, 0.5)

  local pid = demo_locks(conn, true)[1].name:match "%d+$"
  say(conn, began, LANES.ben, "kill -9")
  local killed = clock(conn)
  assert(os.execute("kill -9 " .. pid))
  wait_for_waiters(conn, 0)
  return (clock(conn) - killed) * 1000
end

local function main()
  local counter <const> = os.tmpname()
  local remove <close> = setmetatable({}, { __close = function() os.remove(counter) end })
  write_number(counter, 0)
  local conn <close> = connect "main process of the demo"
  local began = clock(conn)

  print("Four processes and one lock on the name \"" .. NAME .. "\".\n")
  print("    time  " .. ("%-13s%-13s%-13s%s"):format("anna", "ben", "carla", "dora"))
  show_turns(conn, began, counter)
  local counted = read_number(counter)
  local ms = show_crash(conn, began, counter)

  print(([[

What this showed
  - %d turns, never two at once: each read a number from a file, took %.2f s over it and wrote back
    one more; the file says %d.
  - A holder that crashes keeps nobody waiting: carla had the lock %.0f ms after kill -9 of ben.
Next: README.md, which begins with the lines that a program needs.]])
    :format(4 * TURNS, TURN, counted, ms))
  assert(counted == 4 * TURNS, "two processes were in at once")
end

io.stdout:setvbuf "line" -- one write for each line
local ok, err = xpcall(arg[1] and work or main, function(err)
  return tostring(err):find "interrupted!" and "interrupted" or debug.traceback(tostring(err))
end, ...)
if not ok then
  if not (arg[1] and err == "interrupted") then io.stderr:write(err, "\n") end
  os.exit(1, true)
end
