-- link.lua: a connection that many owners share. A coroutine of its own drives it, which outlives them all:
-- it sends what has come in meanwhile as one command, tries and releases of many at a time, and tells each
-- owner what became of his.

local core = require "pglocks.core"
local opening = require "pglocks.connect"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

local unpack = table.unpack or rawget(_G, "unpack")

local MOST_AT_ONCE = 1000 -- keys in one command
local WEAK_VALUES = { __mode = "v" }

---@class pglocks.link
---@field conn pglocks.connection|nil  nil while it is being opened, and when that has failed
---@field over boolean  lost, closed, or not to be opened
---@field held integer  keys that it holds; its owner counts them
---@field doing integer  tries and jobs that are not done
---@field waiting boolean  it stands in the server's queue, or is about to
---@field releases table<string, { err: pglocks.error|nil }>  by key: of whoever still waits for its confirmation
local Link = {}
Link.__index = Link

--- A link that is opened when it gets something to do. owner: on_open(link), on_done(link) when it has done
--- something, on_over(link, err), which is nil of one that was closed, on_lost(err, locks) and on_end(link, lock).
local function new(owner, keywords, options)
  return setmetatable({
    owner = owner, keywords = keywords, options = options, scheduler = options.scheduler,
    held = 0, doing = 0, waiting = false, over = false, driven = false,
    tries = {}, jobs = {}, releases = setmetatable({}, WEAK_VALUES),
  }, Link)
end

-- ---- its end ----------------------------------------------------------------------------

-- What nobody will do any more.
function Link:drop()
  local tries, jobs, err = self.tries, self.jobs, self.why
  self.tries, self.jobs, self.doing = {}, {}, 0
  for _, request in ipairs(tries) do request.done(request, self, nil, err, false) end
  for _, job in ipairs(jobs) do job(nil, err) end
end

-- Called from any coroutine that notices the loss of the connection: so it never waits.
function Link:finish(err)
  if self.over then return end
  self.over, self.why = true, err or select(2, pcall(core.raise, "closed", "this locker is closed"))
  self.owner:on_over(self, err)
  self:drop()
end

-- Also of a release that failed, whose error has a key: a loss, which is told before, has none.
function Link:lose(conn, err, locks)
  if err.key then
    local release = self.releases[tostring(err.key)]
    if release then release.err = err end
  elseif not core.connection.alive(conn) then
    self:finish(err)
  end
  self.owner:on_lost(err, locks)
end

--- Ends it, without waiting.
function Link:close()
  if self.conn then getmetatable(self.conn).__close(self.conn) end
  self:finish()
end

-- ---- driving ----------------------------------------------------------------------------

function Link:open()
  local ok, conn = pcall(opening.connect, self.keywords, self.options)
  if not ok then return self:finish(conn) end
  if self.over then return getmetatable(conn).__close(conn) end
  self.conn, scheduled.shared_by[conn] = conn, self.owner
  core.configure(conn, {
    deferred = true,
    on_lost = function(_, err, locks) self:lose(conn, err, locks) end,
    on_end = function(_, lock) self.owner:on_end(self, lock) end,
  })
  if self.scheduler.keep then self.scheduler.keep(conn) end
  if self.options.on_lost then scheduled.watch(conn) end
  self.owner:on_open(self)
end

-- Only now something else may begin: until all requests have been told, nobody knows what it holds.
function Link:done(count)
  self.doing = self.over and 0 or self.doing - count
  self.owner:on_done(self)
end

-- Those of one mode, in their order.
function Link:next_tries()
  local first = self.tries[1]
  if not first then return nil end
  local now, later, locks = {}, {}, {}
  for _, request in ipairs(self.tries) do
    if request.shared == first.shared and #now < MOST_AT_ONCE then
      now[#now + 1] = request
      locks[#locks + 1] = request.lock
    else
      later[#later + 1] = request
    end
  end
  self.tries = later
  return now, locks
end

function Link:try(requests, locks)
  local ok, got, err = pcall(scheduled.try_each, self.conn, locks)
  if not ok then got, err = nil, got end
  for _, request in ipairs(requests) do request.done(request, self, got, err, true) end
  self:done(#requests)
  if got then core.let_go(got) end -- of what nobody wants any more
  for place = #requests, 1, -1 do requests[place], locks[place] = nil, nil end -- this stack may keep the lists
end

-- False: it is to be closed, because nobody needs it.
function Link:rest()
  if self.held > 0 or self.waiting then
    self.idle_since = nil
  else
    self.idle_since = self.idle_since or core.now()
  end
  return self.scheduler.rest(self.conn, self.idle_since and core.now() - self.idle_since)
end

-- Until there is nothing to do; or, where a scheduler keeps the connection, until it is closed.
function Link:drive()
  if not self.conn then self:open() end
  while not self.over do
    local requests, locks = self:next_tries()
    local job = table.remove(self.jobs, 1)
    if requests then self:try(requests, locks) end
    if job then
      job(self.conn)
      self:done(1)
    end
    core.send_late(self.conn)
    core.connection.alive(self.conn) -- reads what has come, and tells of the loss
    if not requests and not job and not self.tries[1] and not self.jobs[1] then
      if not self.scheduler.rest then break end
      if not self:rest() then self:close() end
    end
  end
end

local function drive(link)
  local ok, err = pcall(link.drive, link)
  link.driven = false
  if link.conn and link.scheduler.leave then link.scheduler.leave(link.conn) end
  if ok then return end
  link:close()
  error(err, 0)
end

function Link:wake()
  local scheduler = self.scheduler
  if self.over then -- as the end of what was collected meanwhile has found
    self:drop()
  elseif not self.driven then
    self.driven = true
    local ok, err = pcall(scheduled.spawn, scheduler, function() drive(self) end)
    if not ok then self:finish(err) end
  elseif scheduler.rouse and self.conn then
    scheduler.rouse(self.conn)
  end
end

-- ---- what a link does -------------------------------------------------------------------

--- Tries a key. request: { lock = a closed one, shared =, done = function(request, link, got, err, sent) },
--- where `got` is a lock that holds it, perhaps, for others to join.
function Link:ask(request)
  self.doing = self.doing + 1
  self.tries[#self.tries + 1] = request
  self:wake()
end

local function add_counted(link, job)
  link.jobs[#link.jobs + 1] = job
  link:wake()
end

--- Has the driving coroutine call job(conn), or job(nil, err) when the link is over before.
function Link:add_job(job)
  self.doing = self.doing + 1
  add_counted(self, job)
end

local function pack(...) return { n = select("#", ...), ... } end

--- Has the driving coroutine call fn(conn, ...), and returns what that returned, or raises.
function Link:call(fn, ...)
  self.doing = self.doing + 1 -- first: what is collected meanwhile might have it wait
  local scheduler, arguments = self.scheduler, pack(...)
  local results, token
  add_counted(self, function(conn, err)
    results = conn and pack(pcall(fn, conn, unpack(arguments, 1, arguments.n))) or { false, err }
    if token then scheduler.wake(token) end
  end)
  while not results do
    token = scheduler.token()
    scheduler.park()
  end
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2, results.n)
end

--- What was written without waiting is to be on its way.
function Link:flush()
  if self.scheduler.rouse then self.scheduler.rouse(self.conn) end
end

--- Ends the wait that it is in.
function Link:cancel()
  if self.conn then core.connection.cancel(self.conn) end
  if self.conn and self.scheduler.rouse then self.scheduler.rouse(self.conn) end
end

--- It holds nothing, and has nothing to do.
function Link:is_idle()
  return self.conn ~= nil and self.held == 0 and self.doing == 0 and not self.waiting
end

--- Looks for its loss, without a round trip.
function Link:is_alive()
  if self.conn and not self.over then core.connection.alive(self.conn) end
  return not self.over
end

return { new = new }
