--- Worker programs of the benchmarks: they are started, pinned to a CPU, and asked for pairs of lock
--- and unlock.
---
--- A worker is called with a CONNINFO and a VARIANT, connects, and says
---
---     ready PID          of the server's process that serves it; 0: these are many
---
--- Then it reads lines, and does pairs on the key 4242:
---
---     run MILLISECONDS   until that long has passed
---     count N            exactly N
---
--- It waits for what it has deferred, and answers with a line: pairs, seconds, seconds of CPU time (its
--- own, of user and system), and perhaps numbers of its own. It ends with its standard input. If it
--- cannot work, it says why on its standard error, and does not get ready.

local uv = require "luv"
local numbers = require "bench.numbers"

local workers = {}

--- What a shell command prints.
function workers.shell(command)
  local pipe = assert(io.popen(command .. " 2>&1"))
  local said = pipe:read "*a"
  pipe:close()
  return said
end

function workers.has(program)
  return workers.shell("command -v " .. program):find "%S" ~= nil
end

local Worker = {}
Worker.__index = Worker

-- ---- starting and stopping --------------------------------------------------------------

-- candidate: { name =, command = { program, argument... }, variant = }
local function start(candidate, conninfo)
  local self = setmetatable({ name = candidate.name, said = "", complaint = "" }, Worker)
  local stdout, stderr = uv.new_pipe(false), uv.new_pipe(false)
  self.stdin = uv.new_pipe(false)
  local arguments = { table.unpack(candidate.command, 2) }
  table.move({ conninfo, candidate.variant }, 1, 2, #arguments + 1, arguments)
  self.process, self.pid = uv.spawn(candidate.command[1], {
    args = arguments,
    stdio = { self.stdin, stdout, stderr },
  }, function() end)
  self.handles = { self.stdin, stdout, stderr, self.process }
  if not self.process then
    self.complaint = candidate.command[1] .. " is not installed"
    return self
  end
  stdout:read_start(function(_, chunk)
    if chunk then self.said = self.said .. chunk else self.ended = true end
  end)
  stderr:read_start(function(_, chunk) self.complaint = self.complaint .. (chunk or "") end)
  return self
end

-- The next line that it prints, or nil: it has ended.
function Worker:line()
  while true do
    local line, rest = self.said:match "^([^\n]*)\n(.*)$"
    if line then
      self.said = rest
      return line
    end
    if self.ended then return nil end
    uv.run "once"
  end
end

local function stop(worker)
  if worker.process then
    worker.stdin:shutdown()
    while worker:line() do end
  end
  for _, handle in ipairs(worker.handles) do handle:close() end
end

function workers.stop(crew)
  for _, worker in ipairs(crew) do stop(worker) end
  uv.run() -- what luv has not closed when the program ends, it closes twice
end

--- Starts those that can work here. Returns them, and a list of lines about the others.
function workers.start(candidates, conninfo)
  local started, crew, missing = {}, {}, {}
  for place, candidate in ipairs(candidates) do
    started[place] = start(candidate, candidate.conninfo or conninfo)
  end
  for _, worker in ipairs(started) do
    local line = worker.process and worker:line()
    worker.server_pid = line and tonumber(line:match "^ready (%d+)$")
    if worker.server_pid then
      crew[#crew + 1] = worker
    else
      missing[#missing + 1] = ("%s: %s"):format(worker.name, worker.complaint:match "([^\n]*)%s*$")
      stop(worker)
    end
  end
  return crew, missing
end

-- ---- placement --------------------------------------------------------------------------

--- Of all its threads. False where that is not possible.
function workers.pin(pid, cpu)
  return workers.shell(("taskset -acp %d %d"):format(cpu, pid)):find "new affinity" ~= nil
end

local PLACES = { same = { 0, 0 }, other = { 1, 1 }, cross = { 0, 1 } }

--- Has the server begin its processes on this CPU, from now on; on any of them, without one.
function workers.place_server(server_pid, cpu)
  local postmaster = workers.shell("ps -o ppid= -p " .. server_pid):match "%d+"
  local cpus = cpu or ("0-%d"):format(tonumber(workers.shell "nproc --all") - 1)
  return workers.shell(("taskset -cp %s %s"):format(cpus, postmaster)):find "new affinity" ~= nil
end

--- Workers and their processes of the server: "same", all on one CPU; "cross", these on another one;
--- "other": all on that. False where that is not possible: figures say little then.
function workers.place(crew, placement)
  local placed = true
  for _, worker in ipairs(crew) do
    placed = workers.pin(worker.pid, PLACES[placement][1]) and placed
    if worker.server_pid > 0 then placed = workers.pin(worker.server_pid, PLACES[placement][2]) and placed end
  end
  return placed
end

-- ---- asking -----------------------------------------------------------------------------

function Worker:tell(command) self.stdin:write(command .. "\n") end

--- The answer to what it was told: { pairs =, seconds =, rate = pairs a second, cpu = seconds a pair }, and
--- as a list what else it says.
function Worker:answer()
  local line = self:line()
  local count, seconds, cpu, more = (line or ""):match "^(%d+) (%S+) (%S+)(.*)$"
  if not count then error(("%s has failed: %s"):format(self.name, line or self.complaint), 0) end
  local answer = { pairs = count + 0, seconds = seconds + 0, rate = count / seconds, cpu = cpu / count }
  for number in more:gmatch "%S+" do answer[#answer + 1] = tonumber(number) end
  return answer
end

function Worker:ask(command)
  self:tell(command)
  return self:answer()
end

--- All of a crew at once. Returns their answers.
function workers.ask_all(crew, command)
  local answers = {}
  for _, worker in ipairs(crew) do worker:tell(command) end
  for place, worker in ipairs(crew) do answers[place] = worker:answer() end
  return answers
end

--- One after the other, in rounds. Returns by the worker's name { rate = list, cpu = list }, by round.
--- command: a line, or a function that has one for a worker.
function workers.measure(crew, command, rounds)
  local function ask(worker)
    return worker:ask(type(command) == "function" and command(worker) or command)
  end
  if rounds > 1 then numbers.rounds(crew, 1, ask) end -- to warm up
  local measured = {}
  for worker, answers in pairs(numbers.rounds(crew, rounds, ask)) do
    measured[worker.name] = { rate = numbers.list(answers, "rate"), cpu = numbers.list(answers, "cpu") }
  end
  return measured
end

-- ---- counting ---------------------------------------------------------------------------

local function read(path)
  local file = assert(io.open(path))
  local text = file:read "*a"
  file:close()
  return text
end

local FOUND = "build/bench/callgrind.out"

-- Instructions by the file of the program that they are in. In callgrind's format a cost is a line that
-- begins with a number or a relative one, except after `calls=`, where it is that of what was called.
local function instructions()
  local names, found, object, called = {}, { total = 0 }, nil, false
  for line in read(FOUND):gmatch "[^\n]+" do
    local number, name = line:match "^c?ob=(%b()) ?(.*)"
    if number then
      if name ~= "" then names[number] = name:match "[^/]*$" end
      if line:sub(1, 1) == "o" then object = names[number] end
    elseif line:find "^calls=" then
      called = true
    elseif line:find "^[%d*+-]" then
      local cost = not called and tonumber(line:match "^%S+ (%d+)")
      if cost then
        found[object] = (found[object] or 0) + cost
        found.total = found.total + cost
      end
      called = false
    end
  end
  os.remove(FOUND)
  return found
end

local TOOLS = {
  strace = {
    under = "strace -f -c",
    total = function(said) return { total = tonumber(said:match "100%.00 +%S+ +%S+ +(%d+)[ %d]* total") } end,
    least = 200,
    most = 1200,
  },
  valgrind = {
    under = "valgrind --tool=callgrind --callgrind-out-file=" .. FOUND,
    total = instructions,
    least = 500,
    most = 1500,
  },
}

local function count_all(tool, candidate, conninfo, pairs_wanted)
  -- tools/lua is a shell script, and puts it before the interpreter.
  local form = candidate.command[1] == "tools/lua" and "PGLOCKS_UNDER='%s' %s '%s' %s" or "%s %s '%s' %s"
  local program = table.concat(candidate.command, " ")
  local command = form:format(tool.under, program, conninfo, candidate.variant or "")
  local said = workers.shell(("echo count %d | { %s 2>&1 >/dev/null; }"):format(pairs_wanted, command))
  return tool.total(said)
end

--- What a pair takes, as `total`: system calls (`strace`) or instructions of the client (`valgrind`), these
--- also by the file that they are in. It is the difference of two runs, so that the start does not count.
--- nil where the tool is missing.
function workers.count(name, candidate, conninfo)
  local tool, each = TOOLS[name], {}
  if not workers.has(name) then return nil end
  local least = count_all(tool, candidate, conninfo, tool.least)
  for where, most in pairs(count_all(tool, candidate, conninfo, tool.most)) do
    local one = (most - (least[where] or 0)) / (tool.most - tool.least)
    each[where] = math.floor(one * 10 + 0.5) / 10 -- the allocator's calls now and then are none of a pair
  end
  return each
end

-- ---- processes --------------------------------------------------------------------------

--- Seconds that a process has had a CPU.
function workers.cpu(pid)
  return tonumber(read(("/proc/%d/schedstat"):format(pid)):match "%d+") / 1e9
end

--- Bytes that only this process has, and has written to.
function workers.private(pid)
  return tonumber(read(("/proc/%s/smaps_rollup"):format(pid)):match "Private_Dirty: +(%d+) kB") * 1024
end

return workers
