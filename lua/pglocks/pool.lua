-- pool.lua: a connection for each module-level lock, so that the coroutines of one process exclude
-- each other. A connection goes back when its lock has been let go.

local core = require "pglocks.core"
local opening = require "pglocks.connect"
local run = require "pglocks.scope"
local scheduled = require "pglocks.scheduled"

core.own_source(debug.getinfo(1, "S").source)

local SIZE = 10
local PATIENCE = 10 -- seconds that a call waits for a connection, where `timeout` does not say
local LONGEST_OPENING = 60 -- seconds; of a coroutine that ended meanwhile nothing else is heard

-- Seconds after which a coroutine in the queue looks for connections that nobody has given back:
-- their lock was collected, or the coroutine ended while it waited. And for its own turn, should
-- the one before it have ended.
local FIRST_LOOKS, OTHERS_LOOK = 0.05, 1

local REPLY_TIMEOUT = 10

-- The states of a connection that is not free.
local LENT, RETURNING = "lent", "returning"

local DEFERRED, CONFIRMED = { deferred = true }, { deferred = false }

local Pool = {}
Pool.__index = Pool

--- A pool of connections to what `describe` has read. It has the calls that take a lock.
---@param keywords table<string, string>
---@param options table
---@param scheduler pglocks.scheduler
local function new(keywords, options, scheduler)
  local pool = setmetatable({
    keywords = keywords,
    options = options,
    scheduler = scheduler,
    free = {}, -- a stack
    lent = {}, -- the state by connection
    openings = {}, -- of each its latest end
    queue = {}, -- tickets of the coroutines that wait for a connection
  }, Pool)
  function pool.on_free(conn) pool:give_back(conn) end
  function pool.on_returned(conn) pool:returned(conn) end
  if scheduler.can_collect and options.release ~= "confirmed" then
    function pool.before_release(conn)
      core.configure(conn, scheduler.can_collect() and DEFERRED or CONFIRMED)
    end
  end
  return pool
end

-- As the connection that a plain program has in this place: a pool is never lost.
function Pool:alive() return self.scheduler ~= nil end

-- ---- connections ------------------------------------------------------------------------

function Pool:wake_first()
  local queue = self.queue
  while queue[1] and queue[1].looks_at + 4 * OTHERS_LOOK < core.now() do table.remove(queue, 1) end
  if queue[1] then self.scheduler.wake(queue[1].token) end
end

-- Without waiting, because this may be called at the end of a scope.
function Pool:is_alive(conn)
  local is_gone = self.scheduler.is_gone
  return core.connection.alive(conn) and not (is_gone and is_gone(conn))
end

function Pool:returned(conn)
  self.lent[conn] = nil
  if self:is_alive(conn) then self.free[#self.free + 1] = conn end
  self:wake_first()
end

function Pool:give_back(conn)
  if self.lent[conn] ~= LENT then return end
  local detach = self.scheduler.detach
  if not self:is_alive(conn) then
    self:returned(conn)
  elseif core.is_free(conn) then
    self.lent[conn] = RETURNING
    if detach then
      detach(conn, self.options.reply_timeout or REPLY_TIMEOUT, self.on_returned)
    else
      self:returned(conn)
    end
  end
end

function Pool:reclaim()
  for conn in pairs(self.lent) do self:give_back(conn) end
  for one, latest in pairs(self.openings) do
    if latest < core.now() then self.openings[one] = nil end
  end
end

local Opening = {}

function Opening:__close()
  if not self.pool.openings[self] then return end
  self.pool.openings[self] = nil
  if not self.pool.lent[self.conn] then self.pool:wake_first() end
end

local function opened(self, conn)
  local pool = self.pool
  if not conn then return Opening.__close(self) end -- no time was left for it
  self.conn, pool.lent[conn] = conn, LENT
  core.configure(conn, { on_free = pool.on_free })
  scheduled.before_release[conn] = pool.before_release
  Opening.__close(self)
  return conn
end

function Pool:open(lock_deadline)
  local one = setmetatable({ pool = self, conn = false }, Opening)
  self.openings[one] = core.now() + LONGEST_OPENING
  local limit = lock_deadline and math.max(0.001, lock_deadline - core.now())
  return run(one, opened, opening.connect, self.keywords, self.options, limit)
end

local function count(set)
  local n = 0
  for _ in pairs(set) do n = n + 1 end
  return n
end

-- One that is free, or a new one; nil if there are enough, or no time is left for it.
function Pool:find(lock_deadline)
  while #self.free > 0 do
    local conn = table.remove(self.free)
    local attach = self.scheduler.attach
    if self:is_alive(conn) then
      self.lent[conn] = RETURNING
      if not attach or attach(conn) then
        self.lent[conn] = LENT
        return conn
      end
      self.lent[conn] = nil
    end
  end
  if count(self.lent) + count(self.openings) < (self.options.pool_size or SIZE) then
    return self:open(lock_deadline)
  end
end

-- ---- the queue --------------------------------------------------------------------------

local Ticket = {}

function Ticket:__close()
  local queue = self.pool.queue
  for place, ticket in ipairs(queue) do
    if ticket == self then
      table.remove(queue, place)
      break
    end
  end
  if #self.pool.free > 0 then self.pool:wake_first() end
end

local function queue_up(ticket, deadline, lock_deadline)
  local pool = ticket.pool
  local queue, scheduler = pool.queue, pool.scheduler
  queue[#queue + 1] = ticket
  while true do
    local left = deadline - core.now()
    if left <= 0 then return nil end
    ticket.looks_at, ticket.token = core.now(), scheduler.token()
    scheduler.park(math.min(left, queue[1] == ticket and FIRST_LOOKS or OTHERS_LOOK))
    pool:reclaim()
    local conn = pool:find(lock_deadline)
    if conn then return conn end
  end
end

local function leave(ticket, conn)
  Ticket.__close(ticket)
  return conn
end

-- A connection that only the caller has; nil when none came free until `deadline`. `lock_deadline`:
-- the same where that is the lock's, which connecting counts against, too.
function Pool:take(deadline, lock_deadline)
  if self.scheduler.enter then self.scheduler.enter() end
  local conn = not self.queue[1] and self:find(lock_deadline)
  if conn then return conn end
  local ticket = setmetatable({ pool = self }, Ticket)
  return run(ticket, leave, queue_up, ticket, deadline, lock_deadline)
end

-- ---- locks ------------------------------------------------------------------------------

local Loan = {}

function Loan:__close() self.pool:give_back(self.conn) end

-- Of a lock that was taken the connection is not free: it stays lent.
local function end_loan(loan, ...)
  Loan.__close(loan)
  return ...
end

local function through(...) return ... end

--- The options, with what is left of their timeout.
local function remaining(options, spent)
  if not options or not options.timeout or options.timeout == 0 or spent < 0.001 then
    return options
  end
  local rest = {}
  for name, value in pairs(options) do rest[name] = value end
  rest.timeout = math.max(0.001, options.timeout - spent)
  return rest
end

-- Calls method(conn, key, options). When it has taken no lock, the connection goes back; else the
-- lock's end gives it back.
local function with_connection(self, check, method, key, options, on_timeout)
  check(key, options)
  local began = core.now()
  local patience, timeout = self.options.timeout or PATIENCE, options and options.timeout
  if timeout and timeout > 0 and timeout < patience then patience = timeout end
  local deadline = began + patience
  local conn = self:take(deadline, patience == timeout and deadline or nil)
  if conn then
    options = remaining(options, core.now() - began)
    return run(setmetatable({ pool = self, conn = conn }, Loan), end_loan, method, conn, key,
      options)
  elseif patience == timeout then
    return on_timeout(timeout)
  end
  core.raise("too_many_connections", ("all %d connections of the pool were in use for %g s")
    :format(self.options.pool_size or SIZE, patience))
end

local function raise_timeout(timeout)
  core.raise("timeout", ("no connection of the pool came free within %.7g s"):format(timeout))
end

local function return_timeout() return nil, "timeout" end

local methods = core.scheduled.connection

function Pool:lock(key, options)
  return through(with_connection(self, core.check, methods.lock, key, options, raise_timeout))
end

function Pool:try_lock(key, options)
  return through(with_connection(self, core.check, methods.try_lock, key, options, return_timeout))
end

function Pool:lock_all(keys, options)
  return through(with_connection(self, core.check_all, methods.lock_all, keys, options,
    raise_timeout))
end

function Pool:try_lock_all(keys, options)
  return through(with_connection(self, core.check_all, methods.try_lock_all, keys, options,
    return_timeout))
end

function Pool:attempt(key, options)
  return through(with_connection(self, core.check, scheduled.attempt, key, options, raise_timeout))
end

return { new = new, remaining = remaining }
