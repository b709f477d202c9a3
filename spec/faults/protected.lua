--- What the workers of the stress do with a lock: the work that it protects, which shows when two do it at
--- once, and the ways to take it.

local lfs = require "lfs"
local support = require "spec.support"

local protected = {}

local random = math.random

-- ---- what is protected ------------------------------------------------------------------

-- A rename replaces it as a whole: what a process that was killed, or that no longer holds the
-- lock, leaves there is old or new, but never half.
local function write_counter(place, key, count, section)
  local name = ("%s/new.%s"):format(place.folder, place.process)
  local file = assert(io.open(name, "w"))
  file:write(("%d %s"):format(count, section))
  file:close()
  assert(os.rename(name, place.folder .. "/counter." .. key))
end

local function read_counter(place, key)
  local count, section = support.read(place.folder .. "/counter." .. key):match "^(%d+) (%S+)$"
  return tonumber(count), section
end

-- Who else is inside? Everybody leaves a mark first, so that of two the later one sees the other.
local function look_around(place, note, n, key, mine)
  for name in lfs.dir(place.folder .. "/inside." .. key) do
    if name:sub(1, 1) ~= "." and name ~= mine then note("met", n, key, name) end
  end
end

local function pause(sleep)
  local long = random(8)
  if long == 1 then sleep(random() * 0.004) elseif long < 5 then sleep(0) end
end

--- The mark of a section that is inside, a file.
function protected.mark(place, owner, n, key)
  return ("%s/inside.%s/%s#%d"):format(place.folder, key, owner, n)
end

--- The part that must be alone, or among readers, as section `n` of an owner. place: { folder =, process = }
function protected.work(place, sleep, note, owner, n, key, shared)
  local section, mark = owner .. "#" .. n, protected.mark(place, owner, n, key)
  assert(io.open(mark, "w")):close()
  look_around(place, note, n, key, section)
  local count, record = read_counter(place, key)
  pause(sleep)
  if not shared then
    note("read", n, key, count, record)
    write_counter(place, key, count + 1, section)
    record = section
  end
  pause(sleep)
  local _, last = read_counter(place, key)
  if last ~= record then note("met", n, key, last) end
  assert(os.remove(mark))
end

-- ---- ways to lock -----------------------------------------------------------------------

-- Each calls fn(lock) while holding it. Returns true, or "busy" or "timeout"; raises.
protected.forms = {}
local forms = protected.forms

function forms.lock(conn, key, options, fn)
  local lock = conn:lock(key, options)
  fn(lock)
  assert(lock:release() == true)
  assert(not lock:held())
  return true
end

function forms.try_lock(conn, key, options, fn)
  local lock, why = conn:try_lock(key, options)
  if not lock then return why end
  fn(lock)
  assert(lock:release() == true)
  return true
end

function forms.with_lock(conn, key, options, fn)
  return conn:with_lock(key, options, function(lock)
    fn(lock)
    return true
  end)
end

function forms.try_with_lock(conn, key, options, fn)
  local ran, why = conn:try_with_lock(key, options, fn)
  return ran or why
end

local SCOPE = [[
  local conn, key, options, fn = ...
  local lock <close> = conn:lock(key, options)
  fn(lock)
  return true
]]
-- LuaJIT cannot parse it: there a scope's end is called by hand.
forms.scope = _VERSION >= "Lua 5.4" and assert(load(SCOPE)) or function(conn, key, options, fn)
  local lock = conn:lock(key, options)
  local ok, err = pcall(fn, lock)
  getmetatable(lock).__close(lock)
  if not ok then error(err, 0) end
  return true
end

protected.FORMS = { "lock", "try_lock", "with_lock", "try_with_lock", "scope" }

return protected
