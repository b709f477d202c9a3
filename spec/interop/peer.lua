--- Programs in other languages, spoken to in lines: each command is answered by one.
---
---     local python = peer.start "exec python3 spec/interop/peer.py"
---     python:ask "pid"
---     peer.finish() -- of every test: ends them all

local uv = require "luv"
local support = require "spec.support"

local peer = {}
peer.__index = peer

local started = {}

--- Runs a command of the shell, where it finds the server.
function peer.start(command)
  local self = setmetatable({ said = "", stdin = uv.new_pipe(false), stdout = uv.new_pipe(false) }, peer)
  self.process = uv.spawn("sh", {
    args = { "-c", support.environment() .. " sh -c '" .. command .. "' 2>&1" },
    stdio = { self.stdin, self.stdout },
  }, function() self.ended = true end)
  self.stdout:read_start(function(_, data) self.said = self.said .. (data or "") end)
  started[#started + 1] = self
  return self
end

--- Says a line: words, between tabs.
function peer:say(...)
  uv.run "nowait"
  assert(not self.ended, self.said) -- else the write would end us, too
  self.stdin:write(table.concat({ ... }, "\t") .. "\n")
end

--- The next line that it says.
function peer:answer()
  local line
  support.wait_until("an answer", function()
    uv.run "nowait"
    line = self.said:match "^([^\n]*)\n"
    return line or self.ended
  end)
  if not line then error("it ended: " .. self.said, 2) end
  self.said = self.said:sub(#line + 2)
  return line
end

function peer:ask(...)
  self:say(...)
  return self:answer()
end

function peer.finish()
  for _, self in ipairs(started) do
    self.stdin:close()
    support.wait_until("a program to end", function()
      uv.run "nowait"
      return self.ended
    end)
    self.stdout:close()
    self.process:close()
  end
  uv.run "nowait"
  started = {}
end

return peer
