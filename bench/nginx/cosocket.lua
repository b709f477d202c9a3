--- The yardstick of bench/nginx: the least that talks to PostgreSQL from nginx, as a program that
--- wants advisory locks and nothing else might have it. A cosocket, the simple query protocol, trust
--- authentication, and the first column of the first row.

-- luacheck: std ngx_lua

local tcp = ngx.socket.tcp
local byte, char, sub, find = string.byte, string.char, string.sub, string.find
local floor = math.floor

local TIMEOUT, KEEPALIVE = 60000, 60000 -- milliseconds

-- Kinds of messages.
local AUTHENTICATION, DATA_ROW, ERROR, READY = ("RDEZ"):byte(1, 4)

local Connection = {}
Connection.__index = Connection

local function int32(n)
  return char(floor(n / 16777216) % 256, floor(n / 65536) % 256, floor(n / 256) % 256, n % 256)
end

local function to_int32(bytes, at)
  local a, b, c, d = byte(bytes, at, at + 3)
  return ((a * 256 + b) * 256 + c) * 256 + d
end

local function error_field(body, code)
  local _, at = find("\0" .. body, "\0" .. code, 1, true)
  return at and sub(body, at, find(body, "\0", at, true) - 1)
end

local function first_column(body)
  if byte(body, 1) == 0 and byte(body, 2) == 0 then return nil end
  local size = to_int32(body, 3)
  return size < 4294967295 and sub(body, 7, 6 + size) or nil -- else NULL
end

-- Reads up to ReadyForQuery: the value, an error, and whether the connection is lost by it.
local function read_answer(socket)
  local value, failure
  while true do
    local header, err = socket:receive(5)
    if not header then return nil, err, true end
    local kind, length, body = byte(header), to_int32(header, 2) - 4, ""
    if length > 0 then
      body, err = socket:receive(length)
      if not body then return nil, err, true end
    end
    if kind == READY then
      return value, failure
    elseif kind == DATA_ROW then
      value = value or first_column(body)
    elseif kind == ERROR then
      failure = error_field(body, "M") or "error without a message"
      if error_field(body, "V") == "FATAL" then return nil, failure, true end
    elseif kind == AUTHENTICATION and to_int32(body, 1) ~= 0 then
      return nil, "the server asks for a password", true
    end
  end
end

local function finish(self, value, err, lost)
  if lost then self.socket:close() end
  return value, err
end

local cosocket = {}

--- options: path (of a Unix socket), or host and port; user, database, pool, pool_size
function cosocket.connect(options)
  local socket = tcp()
  socket:settimeout(TIMEOUT)
  local keep = { pool = options.pool, pool_size = options.pool_size }
  local ok, err
  if options.path then
    ok, err = socket:connect("unix:" .. options.path, keep)
  else
    ok, err = socket:connect(options.host, options.port, keep)
  end
  if not ok then return nil, err end
  local self = setmetatable({ socket = socket }, Connection)
  if socket:getreusedtimes() > 0 then return self end
  local startup = ("\0\3\0\0user\0%s\0database\0%s\0\0"):format(options.user, options.database)
  ok, err = socket:send(int32(#startup + 4) .. startup)
  if not ok then return finish(self, nil, err, true) end
  local _, failure, lost = read_answer(socket)
  if failure then return finish(self, nil, failure, lost) end
  return self
end

function Connection:query(sql)
  local sent, err = self.socket:send("Q" .. int32(#sql + 5) .. sql .. "\0")
  if not sent then return finish(self, nil, err, true) end
  return finish(self, read_answer(self.socket))
end

function Connection:keep() return self.socket:setkeepalive(KEEPALIVE) end

return cosocket
