--- What bench/nginx runs inside nginx: for each way to take a lock the same few requests.

-- luacheck: std ngx_lua

local cosocket = require "cosocket"
local core = require "pglocks.core"
local pglocks = require "pglocks"

local app = { ways = {} }

-- By name: pairs(next_key, count) takes and lets go of locks of keys that nobody else has, and
-- hold(key, body) calls body with the lock.
local ways = app.ways

-- ---- the ways ---------------------------------------------------------------------------

local function add_pglocks(name)
  local options = { using = name }
  ways[name] = {
    pairs = function(next_key, count)
      for _ = 1, count do
        local lock = pglocks.lock(next_key(), options)
        lock:release()
      end
    end,

    hold = function(key, body)
      local lock = pglocks.lock(key, options)
      body()
      lock:release()
    end,
  }
end

-- `connect()` returns what has query(sql) and keep().
local function add_client(name, connect)
  local function query(client, call, key)
    local value, err = client:query(("SELECT pg_advisory_%s(%d)"):format(call, key))
    if value == nil then error(err, 0) end
  end

  ways[name] = {
    pairs = function(next_key, count)
      local client = assert(connect())
      for _ = 1, count do
        local key = next_key()
        query(client, "lock", key)
        query(client, "unlock", key)
      end
      client:keep()
    end,

    hold = function(key, body)
      local client = assert(connect())
      query(client, "lock", key)
      body()
      query(client, "unlock", key)
      client:keep()
    end,
  }
end

local function add_pgmoon(settings)
  local ok, pgmoon = pcall(require, "pgmoon")
  if not ok then return end
  local function query(self, sql) return self.pgmoon:query(sql) end
  local function keep(self) return self.pgmoon:keepalive(60000, settings.pool_size) end
  add_client("pgmoon", function()
    local client = pgmoon.new {
      host = settings.path and "unix:" .. settings.path or settings.host,
      port = settings.port,
      user = settings.user,
      database = settings.database,
      socket_type = "nginx",
      pool = "pgmoon",
      pool_size = settings.pool_size,
    }
    local connected, err = client:connect()
    if not connected then return nil, err end
    return { pgmoon = client, query = query, keep = keep }
  end)
end

-- The server's queue of connections to a Unix socket may be full for a moment.
local FULL, SHORTLY = "resource temporarily unavailable", 0.01

--- settings: conninfo; path, or host and port; user, database; pool_size
function app.setup(settings)
  local databases = { locker = { conninfo = settings.conninfo, timeout = 60 } }
  add_pglocks "locker"
  for _, release in ipairs { "confirmed", "deferred" } do -- with a connection for each lock
    databases[release] = {
      conninfo = settings.conninfo,
      dedicated = true,
      release = release,
      pool_size = tonumber(settings.pool_size),
      timeout = 60, -- hundreds are opened at once
    }
    add_pglocks(release)
  end
  databases.blocking = { conninfo = settings.conninfo, scheduler = "blocking" }
  add_pglocks "blocking"
  pglocks.setup { databases = databases }

  settings.pool = "cosocket"
  add_client("cosocket", function()
    local client, err
    repeat
      if err then ngx.sleep(SHORTLY) end
      client, err = cosocket.connect(settings)
    until err ~= FULL
    return client, err
  end)
  add_pgmoon(settings)
end

-- ---- requests ---------------------------------------------------------------------------

local function answer(text)
  ngx.header.content_length = #text
  ngx.print(text)
end

local last_key = 1000

local function next_key()
  last_key = last_key + 1
  return last_key
end

function app.pid() answer(tostring(ngx.worker.pid())) end

function app.ping() answer "pong" end

function app.pairs(name, count)
  ways[name].pairs(next_key, count)
  answer "done"
end

--- The clock and how many keys were used, for what lasts longer than a measurement.
function app.count() answer(("%.6f %d"):format(core.now(), last_key)) end

-- Long enough for the other request to be in the queue of the lock.
local HELD = 0.002
local released_at
local samples = {}

-- Two clients ask for this again and again.
function app.hand_over(name)
  ways[name].hold(1, function()
    if released_at then samples[#samples + 1] = core.now() - released_at end
    ngx.sleep(HELD)
    released_at = core.now()
  end)
  answer "done"
end

--- The seconds of the hand-overs since the last call, one a line.
function app.samples()
  answer(table.concat(samples, "\n"))
  samples, released_at = {}, nil
end

local begun = 0

function app.wait(name)
  begun = begun + 1
  ways[name].hold(1, function() end)
  answer "done"
end

--- How many requests have begun to wait.
function app.begun() answer(tostring(begun)) end

-- Long enough for the observer to be in the queue of the lock.
local LIVED = 0.03
local died_at = 0

function app.die(name, how)
  ways[name].hold(2, function()
    ngx.sleep(how == "abort" and 10 or LIVED)
    died_at = core.now()
    if how == "exit" then
      ngx.exit(503)
    elseif how == "error" then
      error "died"
    end
  end)
end

--- When the last request died by itself, on the clock that all processes share.
function app.died() answer(("%.6f"):format(died_at)) end

return app
