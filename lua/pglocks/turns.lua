-- turns.lua: whose turn it is, of many owners on few links.
--
-- For each key that somebody here holds or wants there is an entry, with a queue of those who wait. The
-- server sees one who holds or wants the key, for all of them: a link. A release hands the key to the next
-- in the queue, but only so many times, or so long, that others need not wait for ever; then the key goes
-- back to the server, and the next here has to ask for it behind them.
--
-- A free key is taken with a try, on a link that may hold many. What another session holds is waited for
-- on a link that holds nothing: a link that holds locks never waits, and one is always left for tries.

local core = require "pglocks.core"
local link = require "pglocks.link"
local run = require "pglocks.scope"

core.own_source(debug.getinfo(1, "S").source)

-- Seconds.
local REPLY_TIMEOUT = 10 -- of one who does not wait, where the description does not say
local LOOKS = 1 -- between two looks of one who waits
local LOOKS_OF_LIVING = 5 -- where somebody else looks whether he lives
local LEFT_ALONE = 4 -- times so long without a look: his coroutine has ended, or this process was busy
local GRACE = 0.1 -- at the end of a timeout, for what the server says itself
local FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.25 -- between two tries, without a link that could wait
local NO_OTHER = 1 -- after a link could not be opened, until another one is tried
local ATTEMPT = 0.001 -- of an upgrade, on a link that others need

local MOST_IDLE = 1000 -- entries of keys that nobody holds or wants, beside as many as there are others
local CROWD = 16 -- tries on one link that are better sent together than on two

---@class pglocks.turns
local Turns = {}
Turns.__index = Turns

--- settings: max_connections, locks_per_connection, handovers, handover_time; deadlocks: are they looked for?
---@param keywords table<string, string>
---@param options table
---@param settings table
---@param on_lost fun(err: pglocks.error, locks: table[])|nil
local function new(keywords, options, settings, on_lost)
  return setmetatable({
    keywords = keywords, options = options, settings = settings, scheduler = options.scheduler,
    tell_loss = on_lost,
    entries = {}, -- by the string of their key
    known = 0, -- entries
    sweeps_at = MOST_IDLE,
    links = {}, -- that are open, or are being opened
    starved = {}, -- entries that no link is free to wait for
    spare = {}, -- tables for an entry's owners, empty
    no_other_until = 0,
    -- Owners are coroutines, by number: what these leave behind is released when it is collected, and nobody
    -- who looks for a deadlock may keep it alive.
    numbers = setmetatable({}, { __mode = "k" }), -- by coroutine, or by request and coroutine
    owners = 0,
    locks_of = {}, -- how many, by owner
    wanted_by = setmetatable({}, { __mode = "v" }), -- ticket by owner
  }, Turns)
end

-- What a coroutine waits by, and what a link is asked with: { entry =, lock = a closed one, shared =, once = it
-- only tries, began =, deadline =, owner =, contended = somebody else had it, living = the life of its request, or
-- nil, left_at = when it counts as left alone, previous =, next = in the queue, outcome = nil; true: granted;
-- "taken": and its coroutine knows; "busy", "timeout", "deadlock" or an error object }. No more than 16 fields: these
-- are half as large.
local Ticket = {}
Ticket.__index = Ticket

-- What is known of a key: { turns =, id =, first =, last = tickets of the queue, state =, link =, shared =,
-- holders =, owners =, since =, handed =, closing =, changes =, probe = what a link was asked, waits_on =
-- the link that waits }
-- State: nil, nobody has asked; "asked", a link tries it; "waiting", a link stands in the server's queue for
-- it; "starved", none is free to do so; "held", by the link, in the mode `shared`, for so many holders,
-- since then, and handed on so many times; owners: how many of them are each owner's. closing: nobody joins
-- the holders any more, because others wait for it elsewhere. changes: nor does anybody until then, by attempt of a
-- holder to change its mode; or nil.
-- A key comes again: so its entry stays for a while when nobody holds or wants it any more.

local function sweep(turns)
  local busy = 0
  for id, entry in pairs(turns.entries) do
    if entry.state or entry.first then busy = busy + 1 else turns.entries[id] = nil end
  end
  turns.known, turns.sweeps_at = busy, 2 * busy + MOST_IDLE
end

local function entry_of(turns, id)
  local entry = turns.entries[id]
  if not entry then
    if turns.known >= turns.sweeps_at then sweep(turns) end
    turns.known = turns.known + 1
    entry = { -- with room for all that it will know
      turns = turns, id = id, first = nil, last = nil, holders = 0, state = nil, link = nil, shared = nil,
      owners = nil, since = nil, handed = nil, closing = false, changes = nil, probe = nil, waits_on = nil,
    }
    turns.entries[id] = entry
  end
  return entry
end

-- Before anything is begun that is waited for: raises where nobody can wait.
local function enter(turns)
  if turns.scheduler.enter then turns.scheduler.enter() end
end

local function remove(list, item)
  for place = 1, #list do
    if list[place] == item then
      table.remove(list, place)
      return true
    end
  end
  return false
end

-- ---- queues -----------------------------------------------------------------------------

local function tell(ticket, outcome)
  ticket.outcome = outcome
  if ticket.token then ticket.entry.turns.scheduler.wake(ticket.token) end
end

-- Who queues: for ticket in following, entry do ... end
local function following(entry, ticket)
  if ticket then return ticket.next end
  return entry.first
end

local function is_queued(ticket) return ticket.previous ~= nil or ticket.entry.first == ticket end

-- Before another one, or as the last.
local function line_up(entry, ticket, before)
  local previous = entry.last
  if before then previous = before.previous end
  ticket.previous, ticket.next = previous, before
  if previous then previous.next = ticket else entry.first = ticket end
  if before then before.previous = ticket else entry.last = ticket end
end

local function step_out(entry, ticket)
  local previous, after = ticket.previous, ticket.next
  if previous then previous.next = after else entry.first = after end
  if after then after.previous = previous else entry.last = previous end
  ticket.previous, ticket.next = nil, nil
end

-- The first who may still be there. One who was left out wrongly finds that when he looks, and comes back.
local function first_of(entry)
  local first = entry.first
  while first and first.left_at and first.left_at < core.now() do
    step_out(entry, first)
    first = entry.first
  end
  return first
end

local function come_back(ticket)
  local entry = entry_of(ticket.entry.turns, ticket.entry.id)
  local before = entry.first
  while before and before.began < ticket.began do before = before.next end
  line_up(entry, ticket, before)
  ticket.entry = entry
end

local function finish(entry, ticket, outcome)
  step_out(entry, ticket)
  tell(ticket, outcome)
end

local function end_where(entry, applies, outcome)
  local ticket = entry.first
  while ticket do
    local after = ticket.next
    if applies(ticket) then finish(entry, ticket, outcome) end
    ticket = after
  end
end

-- Of all who only try.
local function end_tries(entry)
  end_where(entry, function(ticket) return ticket.once end, "busy")
end

local function end_late(entry)
  local now = core.now()
  end_where(entry, function(ticket) return ticket.deadline <= now end, "timeout")
end

-- An error object of his own.
local function own_error(ticket, err)
  if type(err) ~= "table" then return err end
  local own = setmetatable({}, getmetatable(err))
  for name, value in pairs(err) do own[name] = value end
  own.key = ticket.lock.key
  return own
end

local function refuse_first(entry, err)
  local ticket = entry.first
  finish(entry, ticket, own_error(ticket, err))
end

local function refuse_all(entry, err)
  while entry.first do refuse_first(entry, err) end
end

-- ---- holding ----------------------------------------------------------------------------

local function add(counts, owner, n)
  local count = (counts[owner] or 0) + n
  counts[owner] = count ~= 0 and count or nil
end

-- One more lock on what the link holds. False: it does not hold that any more.
local function grant(turns, entry, ticket)
  local waited = ticket.contended and core.now() - ticket.began or 0
  if not core.join(entry.link.conn, ticket.lock, waited, ticket.owner) then return false end
  entry.holders = entry.holders + 1
  add(entry.owners, ticket.owner, 1)
  add(turns.locks_of, ticket.owner, 1)
  if ticket.living then
    ticket.living.things[ticket.lock], ticket.living.has_locks = true, true
  end
  return true
end

-- May the key stay in this process, or has somebody else waited long enough?
local function may_stay(turns, entry)
  local settings = turns.settings
  return entry.handed < settings.handovers and core.now() - entry.since < settings.handover_time
end

-- It is held no longer, as far as we are concerned.
local function part(turns, entry)
  local owners = entry.owners
  for owner, count in pairs(owners) do
    add(turns.locks_of, owner, -count)
    owners[owner] = nil
  end
  turns.spare[#turns.spare + 1] = owners
  entry.link.held = entry.link.held - 1
  entry.state, entry.link, entry.holders, entry.owners, entry.probe = nil, nil, 0, nil, nil
end

-- Was it let go behind our back: by something else in the session, or without the memory to tell us?
local function look_at(turns, entry, lock)
  local key = lock.key
  local is_alive = entry.state == "held" and entry.link:is_alive()
  -- Meanwhile the last lock on it may have been collected.
  if not is_alive or entry.state ~= "held" or core.holds(entry.link.conn, key) then return end
  part(turns, entry)
  turns:advance(entry)
end

-- Does nobody join the holders?
local function is_closed(entry)
  if entry.closing or not entry.changes then return entry.closing end
  local now = core.now()
  for _, ends in pairs(entry.changes) do
    if now < ends then return true end
  end
  return false
end

-- To the first in the queue; and to those behind him, who can hold it at the same time.
local function hand_on(turns, entry)
  local ticket = first_of(entry)
  while ticket and ticket.shared == entry.shared and (entry.shared or entry.holders == 0) and
    not is_closed(entry) do
    if not grant(turns, entry, ticket) then return part(turns, entry) end
    finish(entry, ticket, true)
    ticket = first_of(entry)
  end
end

-- A link may hold the key, for those at the head of the queue. False: it does not, or nobody is there.
local function take(turns, entry, on, shared)
  entry.owners = table.remove(turns.spare) or {}
  entry.state, entry.link, entry.shared = "held", on, shared
  entry.since, entry.handed, entry.holders, entry.closing, entry.changes = core.now(), 0, 0, false, nil
  on.held = on.held + 1
  hand_on(turns, entry)
  if entry.state and entry.holders == 0 then part(turns, entry) end
  return entry.state ~= nil
end

-- ---- links ------------------------------------------------------------------------------

function Turns:open_link()
  local one = link.new(self, self.keywords, self.options)
  self.links[#self.links + 1] = one
  return one
end

-- Is there one for tries, open or not yet?
function Turns:has_free_link()
  for _, one in ipairs(self.links) do
    if not one.waiting then return true end
  end
  return false
end

-- Where all wait there always is room: one was left for tries, and that was lost.
function Turns:may_open()
  if not self:has_free_link() then return true end
  return #self.links < self.settings.max_connections and core.now() > self.no_other_until
end

-- What find(turns, about) returns, or a new link when that is false and there may be one. The loss of a
-- link that nobody drives shows here: then it is in the list no longer.
function Turns:choose(find, about)
  local found
  repeat found = find(self, about) until not found or found.driven or found:is_alive()
  return found or not self.closed and self:may_open() and self:open_link() or nil
end

local function find_for(turns, lock)
  local links, most = turns.links, turns.settings.locks_per_connection
  local best, least, roomy, free
  for _, one in ipairs(links) do
    if not one.waiting then
      local load = one.held + one.doing
      if lock and one.conn and core.leaves(one.conn, lock) then return one end
      if load < most then
        roomy = roomy or one
        free = free or one.conn and one.doing == 0 and one
      end
      if not best or load < least then best, least = one, load end
    end
  end
  -- What comes while one tries need not wait for two answers: for the next there is another one. But many go
  -- faster together.
  if roomy and roomy.doing >= CROWD then return roomy end
  if roomy and roomy.conn and not free and not links[2] then turns:open_link():wake() end
  return free or roomy or not turns:may_open() and best
end

-- For a try: the one that is about to let go of that key; or the first that has room, so that the others
-- stay free to wait, and rather one that has nothing to do.
function Turns:choose_for(lock) return self:choose(find_for, lock) end

-- One that may wait: it holds nothing, and another one is left for tries. Nil: there is none.
function Turns:choose_idle()
  local others
  local found = self:choose(function()
    local idle
    others = 0
    for _, one in ipairs(self.links) do
      if not one.waiting then
        others = others + 1
        if one:is_idle() then idle = one end -- the last: tries go to the first
      end
    end
    return others > 1 and idle
  end)
  return others > 0 and found or nil
end

-- One for tries, other than `on`. Nil: there is none.
function Turns:choose_other(on)
  return self:choose(function()
    for _, one in ipairs(self.links) do
      if one ~= on and not one.waiting then return one end
    end
  end)
end

function Turns:on_open() self:feed() end

function Turns:on_done() self:feed() end

function Turns:on_over(on, err)
  local lost = {}
  remove(self.links, on)
  if err and not on.conn then self.no_other_until = core.now() + NO_OTHER end
  for _, entry in pairs(self.entries) do
    if entry.state == "held" and entry.link == on then
      part(self, entry)
      lost[#lost + 1] = entry
    end
  end
  for _, entry in ipairs(lost) do self:advance(entry) end
  self:feed()
end

function Turns:on_lost(err, locks)
  if self.tell_loss and (#locks > 0 or err.key) then self.tell_loss(err, locks) end
end

-- ---- deadlocks --------------------------------------------------------------------------

-- Does a holder of the key wait for `me`? Those in its queue wait for nothing but the holders.
local function leads_to(turns, me, entry, seen)
  if seen[entry] or not entry.owners then return false end
  seen[entry] = true
  for owner in pairs(entry.owners) do
    local wanted = turns.wanted_by[owner]
    if owner == me or (wanted and not wanted.outcome and leads_to(turns, me, wanted.entry, seen)) then
      return true
    end
  end
  return false
end

local function is_deadlock(turns, ticket)
  return turns.settings.deadlocks and turns.locks_of[ticket.owner] and leads_to(turns, ticket.owner, ticket.entry, {})
end

-- ---- asking the server ------------------------------------------------------------------

-- The link that was asked is over. sent: it had sent that; nobody knows more than the error.
local function failed(turns, entry, ticket, on, err, sent)
  if sent then
    if entry.first == ticket then refuse_first(entry, err) end
  elseif not on.conn and not turns:has_free_link() then
    refuse_all(entry, err) -- nobody can ask the server for any of them
  end
  turns:advance(entry)
end

-- A link has tried the key, for one ticket, and for all who can hold it with him.
function Ticket:done(on, got, err, sent)
  local entry = self.entry
  local turns, first = entry.turns, first_of(entry)
  entry.state = nil
  if first and first.shared == self.shared then
    if got and take(turns, entry, on, self.shared) then return end
    if not err then -- it is somebody else's
      end_tries(entry)
      for one in following, entry do one.contended = true end
      if first_of(entry) then return turns:wait_at_server(entry) end
    end
  end
  if err then return failed(turns, entry, self, on, err, sent) end
  turns:advance(entry)
end

-- What is to be done about a key that no link holds, or is asked for.
function Turns:advance(entry)
  if entry.state or self.closed then return end
  local ticket = first_of(entry)
  if not ticket then return end
  entry.state = "asked"
  local on = self:choose_for(ticket.lock)
  if on then on:ask(ticket) else entry.state = nil end -- closed meanwhile
end

-- Others wait for a key that is shared here: who comes later has to stand behind them.
local function close(turns, entry)
  entry.closing = true
  end_tries(entry)
  end_where(entry, function(ticket) return is_deadlock(turns, ticket) end, "deadlock")
end

-- Do others wait for a key that is shared here? If another session cannot share it now.
local function probed(request, on, got)
  local entry = request.entry
  local turns = entry.turns
  if entry.probe ~= request then return end
  entry.probe = nil
  if entry.state ~= "held" then return end
  if got and core.holds(on.conn, request.lock.key) then
    entry.since, entry.handed = core.now(), 0
    entry.closing = false
    hand_on(turns, entry)
    if entry.state == "held" and is_closed(entry) then end_tries(entry) end
    turns:advance(entry)
  else
    close(turns, entry)
  end
end

local function probe(turns, entry, lock)
  if entry.probe then return end
  local request = { entry = entry, lock = lock, shared = true, done = probed }
  local on = turns:choose_other(entry.link)
  if not on then return close(turns, entry) end
  entry.probe = request
  on:ask(request)
end

-- ---- waiting at the server --------------------------------------------------------------

-- For so long as anybody in the queue waits; which is looked at anew when that time is over.
local function wait_for(conn, entry, ticket)
  local latest = 0
  for one in following, entry do latest = math.max(latest, one.deadline) end
  return core.scheduled.connection.try_lock(conn, ticket.lock.key, {
    shared = ticket.shared, timeout = math.max(0.001, latest - core.now()),
  })
end

local function wait_on(turns, entry, on, conn, err)
  local ticket, ok, got = first_of(entry), true, nil
  if conn and ticket then
    entry.shared = ticket.shared
    ok, got = pcall(wait_for, conn, entry, ticket)
    if not ok then err = got end
  end
  local cancelled = on.cancelled
  on.waiting, on.cancelled, entry.state, entry.waits_on = false, false, nil, nil
  if ok and got then
    local first = first_of(entry)
    local taken = first and first.shared == ticket.shared and take(turns, entry, on, ticket.shared)
    core.let_go(got)
    if not taken then turns:advance(entry) end
  elseif err and not cancelled then
    failed(turns, entry, ticket, on, err, conn ~= nil)
  else
    end_late(entry)
    turns:advance(entry)
  end
end

local function wait_by(turns, entry, on)
  local first = entry.first
  entry.state, entry.waits_on, entry.shared, on.waiting = "waiting", on, first and first.shared, true
  on:add_job(function(conn, err) wait_on(turns, entry, on, conn, err) end)
end

function Turns:wait_at_server(entry)
  local on = not self.starved[1] and self:choose_idle()
  if on then return wait_by(self, entry, on) end
  entry.state = "starved"
  self.starved[#self.starved + 1] = entry
  self:poll()
end

-- A link may have come free to wait.
function Turns:feed()
  while self.starved[1] do
    local entry = self.starved[1]
    local on = entry.state == "starved" and self:choose_idle()
    if entry.state == "starved" and not on then return end
    remove(self.starved, entry)
    if on then wait_by(self, entry, on) end
  end
end

-- Tries what nobody can wait for.
function Turns:poll()
  if self.polls then return end
  self.polls = true
  local function try_starved()
    local pause = FIRST_PAUSE
    while self.starved[1] do
      self.scheduler.sleep(pause * (0.5 + core.now() * 1e5 % 1))
      pause = math.min(pause * 2, LONGEST_PAUSE)
      local starved = self.starved
      self.starved = {}
      for _, entry in ipairs(starved) do
        if entry.state == "starved" then
          entry.state = nil
          end_late(entry)
          self:advance(entry)
        end
      end
    end
    self.polls = false
  end
  local ok, runs = pcall(self.scheduler.spawn, try_starved)
  if not ok then
    self.polls = false -- who waits has it begun again
  elseif runs == false then
    try_starved()
  end
end

-- ---- the end of locks -------------------------------------------------------------------

-- Does the key stay in this process when the last of its holders goes?
local function may_hand_on(turns, entry)
  local ticket = first_of(entry)
  return ticket and ticket.shared == entry.shared and not is_closed(entry) and may_stay(turns, entry)
end

-- One of the holders goes; with the last one the link lets go of the key, and this returns true. id, owner: as
-- core.identity tells.
local function let_go(turns, on, lock, id, owner)
  local entry = turns.entries[id]
  if not entry or entry.state ~= "held" or entry.link ~= on then return end
  if owner then
    add(entry.owners, owner, -1)
    add(turns.locks_of, owner, -1)
  end
  entry.holders = entry.holders - 1
  if entry.holders == 0 and may_hand_on(turns, entry) then
    entry.handed = entry.handed + 1
    hand_on(turns, entry)
  end
  core.let_go(lock, on.driven)
  if entry.holders > 0 then return end
  if entry.link then part(turns, entry) end
  on:flush()
  turns:advance(entry) -- which may have it again before this returns
  return true
end

--- The scope of a lock ends, which has joined what the link holds. Never waits.
function Turns:on_end(on, lock)
  let_go(self, on, lock, core.identity(lock))
  self:feed()
end

-- A release is to be confirmed: nobody may have the link wait before it has asked. Raises where it cannot wait for
-- the server, and would have to.
local function announce(turns, entry, lock)
  if entry.holders == 1 and not may_hand_on(turns, entry) then enter(turns) end
  local on, release = entry.link, { err = nil }
  on.doing = on.doing + 1
  on.releases[tostring(lock.key)] = release
  return release
end

-- Waits until the server has confirmed what the link has let go.
local function confirm(on, release)
  on:call(function(conn)
    on.doing = on.doing - 1 -- the announcement's
    core.scheduled.connection.ping(conn)
  end)
  if release.err then error(release.err, 0) end
end

-- In the place of a connection's release.
function Turns:release(lock)
  local id, owner = core.standing(lock)
  if not id then return nil, "not held" end
  local entry, can_wait = self.entries[id], self.scheduler.can_wait
  local on = entry and entry.link
  local asks = on and self.options.release == "confirmed" and (not can_wait or can_wait())
  local release = asks and announce(self, entry, lock)
  local has_let_go
  if on and owner then
    has_let_go = let_go(self, on, lock, id, owner)
  else
    core.let_go(lock) -- one that has not joined
  end
  if not release then
    self:feed()
  elseif on.over or not has_let_go then
    on:done(1)
  else
    confirm(on, release)
  end
  return true
end

-- ---- acquiring --------------------------------------------------------------------------

-- living: a request's, or nil. nginx has the requests that come after one another use one coroutine.
function Turns:owner(living)
  local numbers, co = self.numbers, coroutine.running() or self
  if living then
    numbers[living] = numbers[living] or setmetatable({}, { __mode = "k" })
    numbers = numbers[living]
  end
  if not numbers[co] then
    self.owners = self.owners + 1
    numbers[co] = self.owners
  end
  return numbers[co]
end

-- The call is over, or the coroutine has ended while it waited.
function Ticket:__close()
  local entry = self.entry
  local turns = entry.turns
  if turns.wanted_by[self.owner] == self then turns.wanted_by[self.owner] = nil end
  if self.living then self.living.things[self] = nil end
  if self.outcome == true then
    getmetatable(self.lock).__close(self.lock)
  elseif not self.outcome and is_queued(self) then
    step_out(entry, self)
    self.outcome = "timeout"
    local first = first_of(entry)
    if entry.state == "waiting" and (not first or first.shared ~= entry.shared) then -- in a mode of nobody's
      entry.waits_on.cancelled = true
      entry.waits_on:cancel()
    else
      if entry.state == "held" then hand_on(turns, entry) end
      turns:advance(entry)
    end
  end
end

local function wait(ticket)
  local turns = ticket.entry.turns
  local scheduler = turns.scheduler
  while not ticket.outcome do
    if turns.closed then
      if is_queued(ticket) then step_out(ticket.entry, ticket) end
      ticket.outcome = own_error(ticket, turns.closed)
      break
    end
    if not is_queued(ticket) then come_back(ticket) end -- he was left out
    local now, entry = core.now(), ticket.entry
    local left = ticket.deadline - now
    if entry.state == "waiting" or entry.state == "asked" then left = left + GRACE end
    if left <= 0 then break end
    turns:advance(entry)
    if entry.state == "starved" then turns:poll() end
    if entry.state == "held" and entry.changes and not is_closed(entry) then
      entry.changes = nil -- whoever wanted to change has ended
      hand_on(turns, entry)
    end
    if entry.closing and entry.state == "held" and ticket.shared and entry.first == ticket then
      probe(turns, entry, ticket.lock) -- they may have given up
    end
    if not ticket.outcome then
      local looks = ticket.living and LOOKS_OF_LIVING or LOOKS
      ticket.left_at, ticket.token = now + LEFT_ALONE * looks, scheduler.token()
      scheduler.park(math.min(left, looks))
    end
    if not ticket.outcome then look_at(turns, entry, ticket.lock) end
  end
end

local function leave(ticket)
  local is_granted = ticket.outcome == true
  if is_granted then ticket.outcome = "taken" end
  Ticket.__close(ticket)
  if is_granted and not core.identity(ticket.lock) then -- it was lost since, or its locker closed
    core.standing(ticket.lock)
    core.raise("closed", "this locker was closed")
  end
  -- Where LuaJIT still finds the ticket, in the stack of a coroutine that sleeps, it keeps no lock from collection.
  if is_granted then ticket.lock = nil end
  return is_granted or ticket.outcome
end

-- May one who only tries share what comes next? If nobody stands before him who would have to let go first.
local function may_share(entry, shared)
  if not shared or entry.state ~= "asked" and not entry.probe then return false end
  for ticket in following, entry do
    if not ticket.shared then return false end
  end
  return true
end

--- Waits for its turn.
---@param lock pglocks.lock a closed one
---@param id string  of its key
---@param shared boolean
---@param timeout number  seconds; 0: it only tries
---@return true|"busy"|"timeout"|"deadlock"|pglocks.error outcome  true: the lock is held
function Turns:acquire(lock, id, shared, timeout)
  local now, living = core.now(), self.scheduler.living and self.scheduler.living()
  local owner, entry = self:owner(living), entry_of(self, id)
  look_at(self, entry, lock)
  if self.entries[id] ~= entry then entry = entry_of(self, id) end
  local ticket = setmetatable({
    entry = entry, lock = lock, shared = shared, began = now, once = timeout == 0,
    deadline = now + (timeout > 0 and timeout or self.options.reply_timeout or REPLY_TIMEOUT), owner = owner,
    living = living, contended = nil, outcome = nil, left_at = nil, token = nil, previous = nil, next = nil,
  }, Ticket)
  local joins = entry.state == "held" and shared and entry.shared and not entry.first and not is_closed(entry)
  if joins then
    if may_stay(self, entry) and grant(self, entry, ticket) then
      entry.handed = entry.handed + 1
      return true
    end
  elseif ticket.once and entry.state and not may_share(entry, shared) then
    return "busy"
  elseif entry.state and is_deadlock(self, ticket) then
    return "deadlock"
  end
  -- What was collected since may have been the last lock on the key.
  if self.entries[id] ~= entry then entry = entry_of(self, id) end
  ticket.entry, ticket.contended = entry, entry.state ~= nil
  line_up(entry, ticket)
  self.wanted_by[owner] = ticket
  if ticket.living then ticket.living.things[ticket] = true end
  if joins and entry.state == "held" then probe(self, entry, lock) end -- its answer may be there at once
  self:advance(entry)
  if ticket.outcome then return leave(ticket) end
  return run(ticket, leave, wait, ticket)
end

-- ---- held locks -------------------------------------------------------------------------

-- What the link's coroutine is to do something about. Raises where nobody can wait for that.
local function entry_held_by(turns, lock)
  enter(turns)
  local id = core.standing(lock)
  if not id then core.raise("not_held", "this lock is not held") end
  return turns.entries[id]
end

local function call(turns, lock, fn, ...) return entry_held_by(turns, lock).link:call(fn, ...) end

-- In the place of a connection's check, which is check(lock, ...).
function Turns:check(lock, check, ...)
  local entry = self.entries[core.identity(lock) or ""]
  local ok, err = pcall(call, self, lock, function(_, ...) return check(lock, ...) end, ...)
  if entry then look_at(self, entry, lock) end
  if not ok then error(err, 0) end
  return true
end

--- Draws a token for a lock that was just got.
function Turns:draw(lock)
  call(self, lock, function(conn)
    -- Who asked may have ended since; and without the key this would wait for it.
    if not core.standing(lock) then core.raise("not_held", "this lock is not held") end
    local other = core.scheduled.connection.lock(conn, lock.key, { shared = lock.shared, token = true })
    core.exchange(lock, other)
    core.let_go(other)
  end)
end

--- Changes the mode of a lock: by change(timeout, may), again and again, because nobody may wait on its link.
function Turns:change(lock, timeout, change)
  local entry, deadline, pause = entry_held_by(self, lock), core.now() + timeout, FIRST_PAUSE
  local me = {}
  local function is_alone() return entry.state == "held" and entry.holders == 1 end

  local function try()
    entry_held_by(self, lock)
    -- Nobody joins it meanwhile; but whose coroutine has ended keeps nobody out for long.
    entry.changes = entry.changes or {}
    entry.changes[me] = math.min(deadline, core.now() + LEFT_ALONE * LOOKS)
    return is_alone() and call(self, lock, function()
      local done = change(ATTEMPT, is_alone)
      if done then entry.shared = lock.shared end
      return done
    end)
  end

  local ok, changed = pcall(try)
  while ok and not changed and core.now() < deadline do
    self.scheduler.sleep(math.min(pause, deadline - core.now()))
    pause = math.min(pause * 2, LONGEST_PAUSE)
    ok, changed = pcall(try)
  end
  if entry.changes then entry.changes[me] = nil end
  if entry.state == "held" then hand_on(self, entry) end
  self:advance(entry)
  if not ok then error(changed, 0) end
  return changed or nil
end

-- ---- all of them ------------------------------------------------------------------------

--- A link to ask something by.
function Turns:any_link()
  return self:choose_for(nil) or core.raise("closed", "this locker was closed")
end

--- A closed lock that was not to be had, for its methods.
function Turns:bind(lock)
  for _, one in ipairs(self.links) do
    if one.conn then
      core.bind(one.conn, lock)
      return lock
    end
  end
  core.raise("lost", "the connection was lost meanwhile")
end

--- What they hold: as conn:locks(), of all links.
function Turns:locks()
  local locks = {}
  for _, one in ipairs(self.links) do
    for _, lock in ipairs(one.conn and one.conn:locks() or {}) do locks[#locks + 1] = lock end
  end
  return locks
end

--- Nobody waits any more, and no link is open. waits: until the server has heard of it.
function Turns:close(waits)
  local links, err = self.links, select(2, pcall(core.raise, "closed", "this locker was closed"))
  self.links, self.starved, self.closed = {}, {}, err
  for _, entry in pairs(self.entries) do refuse_all(entry, err) end
  for _, one in ipairs(links) do
    if one.waiting then
      one.cancelled = true
      one:cancel()
    end
    if waits and not one.over then pcall(one.call, one, core.scheduled.connection.close) end
    one:close() -- also where nobody could wait
  end
end

return { new = new }
