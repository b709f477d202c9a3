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

--- Serves until the end of the input. commands: by name, a function of its argument that returns how many
--- pairs it has made, and what else is to be in the answer. server_pid is that of the server's process.
function worker.obey(server_pid, commands)
  print(("ready %d"):format(server_pid))
  io.stdout:flush()
  for line in io.lines() do
    local command, argument = line:match "^(%l+) (%d+)$"
    local began, cpu = now(), os.clock()
    local count, more = commands[command](tonumber(argument))
    print(("%d %.6f %.6f%s"):format(count, now() - began, os.clock() - cpu, more and " " .. more or ""))
    io.stdout:flush()
  end
end

--- The same with pairs of one's own; finish(), where it is given, waits for what they have left under way.
function worker.serve(server_pid, pair, finish)
  local function done(count)
    if finish then finish() end
    return count
  end
  worker.obey(server_pid, {
    run = function(milliseconds)
      local deadline, count = now() + milliseconds / 1000, 0
      repeat
        for _ = 1, 10 do pair() end
        count = count + 10
      until now() >= deadline
      return done(count)
    end,
    count = function(count)
      for _ = 1, count do pair() end
      return done(count)
    end,
  })
end

return worker
