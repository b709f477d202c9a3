-- A client that spec/faults/partition_spec.lua starts in another namespace, and cuts off. It brings
-- itself into one phase, and says what it then knows, a line each:
--   what, seconds of core.now(), value

local phase, scenario, conninfo, folder = ...
local pglocks = require "pglocks"
local core = require "pglocks.core"
local sleep = require "system".sleep

io.stdout:setvbuf "line"

local function say(what, value)
  print(("%s\t%.4f\t%s"):format(what, core.now(), tostring(value)))
end

-- The spec tells by files, which no partition keeps away.
local function told(what)
  local file = io.open(("%s/%s.%s"):format(folder, scenario, what))
  return file ~= nil and file:close()
end

local function wait_for(what)
  while not told(what) do sleep(0.005) end
end

local losses = 0
local described = {
  conninfo = conninfo,
  application_name = scenario .. " " .. phase,
  on_lost = function() losses = losses + 1 end,
}

local function result(what, ok, value)
  if ok then return say(what, not not value) end
  say(what, value.code)
  say("message", value)
  say("free_by", value.free_by)
end

local key = scenario .. " " .. phase
local phases = {}

local function connect_and_lock()
  local ok, conn = pcall(pglocks.connect, described)
  result("connected", ok, conn)
  if ok then say("released", conn:lock(key):release()) end
end

-- Its first packet meets the partition.
function phases.connecting()
  described.connect_timeout = scenario == "blip" and 20 or nil
  say "ready"
  wait_for "cut"
  connect_and_lock()
end

-- The server has accepted it, and says nothing yet.
function phases.handshake()
  described.connect_timeout = scenario == "blip" and 20 or 10
  say "ready"
  connect_and_lock()
end

function phases.waiting(options)
  local conn = pglocks.connect(described)
  say "ready"
  if options then wait_for "go" end
  local ok, lock = pcall(conn.lock, conn, key, options)
  result("waited", ok, lock)
  if ok then
    while lock:held() and not told "healed" do sleep(0.005) end
    say("held", lock:held())
    result("released", pcall(lock.release, lock))
  end
end

-- Its lock is granted during the partition: soon, or when the client has long gone.
function phases.granted() phases.waiting() end

function phases.late() phases.waiting() end

-- Its time is over during the partition.
function phases.timed() phases.waiting { timeout = 5 } end

function phases.holding()
  local conn = pglocks.connect(described)
  local lock = conn:lock(key)
  say "ready"
  while lock:held() and not told "healed" do sleep(0.005) end
  say("held", lock:held())
  if lock:held() then return result("checked", pcall(lock.check, lock)) end
  result("released", pcall(lock.release, lock))
  say("again", select(2, lock:release()))
  say("losses", losses)
  say("locks", #conn:locks())
end

-- In an event loop somebody watches.
function phases.watched()
  local cqueues = require "cqueues"
  local loop, over = cqueues.new(), false
  described.scheduler = "cqueues"
  described.on_lost = function(_, err, locks)
    say("told", err.code)
    say("locks", #locks)
    over = true
  end
  loop:wrap(function()
    local conn = pglocks.connect(described)
    local lock = conn:lock(key)
    say "ready"
    while not over and not told "healed" do cqueues.sleep(0.02) end
    say("held", lock:held())
    conn:close()
  end)
  assert(loop:loop())
end

function phases.releasing()
  local conn = pglocks.connect(described)
  local lock = conn:lock(key)
  say "ready"
  wait_for "cut"
  say "releases"
  result("released", pcall(lock.release, lock))
  say("held", lock:held())
  say("again", select(2, lock:release()))
end

function phases.idle()
  local conn = pglocks.connect(described)
  conn:lock(key):release()
  say "ready"
  while conn:alive() and not told "healed" do sleep(0.005) end
  say("alive", conn:alive())
  wait_for "healed"
  result("locked", pcall(conn.try_lock, conn, key))
end

-- The same of the module's own functions. Who holds nothing learns of a loss at the next lock.
function phases.module()
  pglocks.setup { databases = { default = described } }
  pglocks.lock(key):release()
  say "ready"
  if scenario ~= "blip" then
    wait_for "lost"
    result("meanwhile", pcall(pglocks.try_lock, key))
  end
  wait_for "healed"
  local ok, lock = pcall(pglocks.lock, key)
  result("locked", ok, lock)
  if ok then say("checked", lock:check()) say("released", lock:release()) end
end

phases[phase]()
say "end"
