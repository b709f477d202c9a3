--- What the peers in Lua share: the other library is loaded, and pairs of lock and unlock are made
--- when the standard input asks for them.
---
---     run MILLISECONDS   pairs until that long has passed
---     count N            exactly N pairs
---
--- Each is answered with a line: pairs, seconds, seconds of CPU time.

local worker = {}

--- The module of a library, which may not be there: then the peer says so and ends.
function worker.library(name, module)
  local found, library = pcall(require, module)
  if found then return library end
  if not library:find("module '" .. module .. "' not found", 1, true) then error(library, 0) end
  io.stderr:write(name, " is not installed\n")
  os.exit(3)
end

local uv = worker.library("lua-luv", "luv") -- for a monotonic clock, which Lua does not have

local function now() return uv.hrtime() / 1e9 end

local COMMANDS = {}

function COMMANDS.run(pair, milliseconds)
  local finish, count = now() + milliseconds / 1000, 0
  repeat
    for _ = 1, 10 do pair() end
    count = count + 10
  until now() >= finish
  return count
end

function COMMANDS.count(pair, count)
  for _ = 1, count do pair() end
  return count
end

--- Serves until the end of the input. server_pid is that of the server's process; finish(), where it
--- is given, waits for what pairs have left under way.
function worker.serve(server_pid, pair, finish)
  print(("ready %d"):format(server_pid))
  io.stdout:flush()
  for line in io.lines() do
    local command, argument = line:match "^(%l+) (%d+)$"
    local began, cpu = now(), os.clock()
    local count = COMMANDS[command](pair, tonumber(argument))
    if finish then finish() end
    print(("%d %.6f %.6f"):format(count, now() - began, os.clock() - cpu))
    io.stdout:flush()
  end
end

return worker
