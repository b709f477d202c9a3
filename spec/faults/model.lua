--- A model of advisory locks: is this history, of many sessions, one that such locks allow?
---
--- A history is a text with a line for each event, "SECONDS OWNER EVENT ...". The seconds are those
--- of one monotonic clock, and an owner is a session, by a name that no other session ever has. A
--- *section* is what an owner does between taking a lock and letting it go; N counts the sections
--- of an owner, and "OWNER#N" names one everywhere.
---
---   open PID                    the session is there: dated when it was asked for
---   invoke N KEY MODE           a call will now ask for the lock; MODE: exclusive, shared
---   grant N KEY MODE            it has returned, and says that it got the lock
---   fail N KEY MODE CODE        it has returned without the lock, or raised this error code
---   read N KEY COUNT SECTION    the counter, and who wrote it, as read before it is incremented
---   met N KEY SECTION           this other section was found inside, or has written the counter
---   confirm N KEY MODE          the server confirmed the lock: dated when it was asked
---   release N KEY MODE          the lock will now be let go
---   free N KEY MODE             the call that did so has returned, and the server has done it
---   seen LOCKS | LOCKS          what the connection says that it holds, and what pg_locks says
---   lost                        the connection says that its session is gone
---   interrupted                 Ctrl-C met the process: the sections end somewhere
---   close                       the session was closed
---   error ...                   something that must not happen
---
--- Many owners may be on one session, each with one lock: such an owner is called "pidPID.OWNER" after the
--- session's backend, and ends with whoever ends that, "strike pidPID". What they all leave behind, another
--- owner is asked for, who has the tries and waits of theirs that failed.
---
--- Whoever strikes notes it before he does:
---
---   strike TARGET KIND          the end of the session TARGET, of all sessions of the process
---                               TARGET (its sessions are called TARGET.N), or of all there are, "*"
---   recovered                   that struck down the server, which is there again
---   counter KEY COUNT SECTION   at the end of everything
---
--- What must hold. PostgreSQL gives no fencing: the server frees the locks of a session that is
--- terminated at once, while its client is still inside and has yet to notice. So
---
--- 1. A session is *certain* of a lock from `grant` to `release`; where it was struck, at most until
---    the strike, or until the last lock or release of it that the server confirmed, if that is
---    later. Where certain times of two owners on one key overlap, both are shared.
--- 2. A section is *confirmed* when the server confirmed its lock, or released it, after the last
---    thing done inside: the lock was there all the while. This needs no clock: of two confirmed
---    sections on one key, by two owners, of which one at least is exclusive, neither met the other;
---    and no two exclusive ones have read the same state of the counter, which would be a lost
---    increment. A section that was not confirmed may have spoilt a counter, but only its session's
---    end explains that.
--- 3. What a session holds by this history, what its connection says, and what pg_locks says are
---    one, after whatever outcome.
--- 4. No session is lost or interrupted that was not struck so; and one that was not struck was asked, as its last
---    act, for what it had left behind: nothing.

local model = {}

-- How many words follow the event; -1: any number.
local EVENTS = {
  open = 1, invoke = 3, grant = 3, fail = 4, read = 4, met = 3, confirm = 3, release = 3, free = 3,
  seen = -1, lost = 0, interrupted = 0, close = 0, error = -1, strike = 2, recovered = 0, counter = 3,
}
local MODES = { exclusive = true, shared = true }
local OUTCOMES = { busy = true, timeout = true, interrupted = true, deadlock = true, lost = true }

local function parse_line(line)
  local time, owner, event, rest = line:match "^(%d+%.?%d*) (%S+) (%l+) ?(.*)$"
  local count = EVENTS[event]
  if not count then return nil end
  local words = {}
  for word in rest:gmatch "%S+" do words[#words + 1] = word end
  if count >= 0 and #words ~= count then return nil end
  return { time = tonumber(time), owner = owner, event = event, words = words, line = line, rest = rest }
end

--- Adds the events of a text to the list. `cut`: its last line may have been cut short, by a
--- kill -9 of the writer. True; or nil and what is wrong.
function model.parse(text, events, cut)
  for line, newline in text:gmatch "([^\n]+)(\n?)" do
    local event = parse_line(line)
    if newline == "" and cut then break end
    if not event or newline == "" then return nil, "not a line of a history: " .. line end
    events[#events + 1] = event
    event.order = #events
  end
  return true
end

local function in_order(a, b)
  if a.time ~= b.time then return a.time < b.time end
  return a.order < b.order
end

local function hits(target, owner)
  if target == owner or owner:sub(1, #target + 1) == target .. "." then return true end
  local among = owner:match "^pid%d+%.(.*)$"
  return among ~= nil and hits(target, among)
end

local function conflict(a, b)
  return a.key == b.key and a.owner ~= b.owner and (a.mode == "exclusive" or b.mode == "exclusive")
end

-- ---- what is known when everything is over ----------------------------------------------

-- Which sections were confirmed; and of every owner, since when it was struck and until when it is
-- certain to have been alive.
local function survey(events)
  local owners, confirmed, released = {}, {}, {}
  for _, e in ipairs(events) do
    local owner = owners[e.owner]
    if e.event == "open" then
      owners[e.owner] = { opened = e.time, proven = 0 }
    elseif owner and (e.event == "confirm" or e.event == "free") then
      local section = e.owner .. "#" .. e.words[1]
      local at = e.event == "free" and released[section] or e.time
      owner.proven = math.max(owner.proven, at)
      confirmed[section] = true
    elseif e.event == "release" then
      released[e.owner .. "#" .. e.words[1]] = e.time
    end
  end
  for i, e in ipairs(events) do
    local target, until_when = e.words[1], math.huge
    if e.event == "strike" then
      if target == "*" then -- nobody outlives it who came before the server was there again
        for j = i + 1, #events do
          if events[j].event == "recovered" then until_when = events[j].time break end
        end
      end
      for name, owner in pairs(owners) do
        if (target == "*" or hits(target, name)) and owner.opened <= until_when then
          owner.struck = math.min(owner.struck or math.huge, e.time)
          owner.interrupt = owner.interrupt or e.words[2] == "interrupt" and e.time
        end
      end
    end
  end
  local doubts = {}
  for name, owner in pairs(owners) do
    owner.certain = owner.struck and math.max(owner.struck, owner.proven) or math.huge
    if owner.struck then doubts[#doubts + 1] = { owner = name, time = owner.certain } end
  end
  table.sort(doubts, function(a, b) return a.time < b.time end)
  return owners, confirmed, doubts
end

-- ---- the history, event by event --------------------------------------------------------

local function list(names)
  local sorted = {}
  for name in pairs(names) do sorted[#sorted + 1] = name end
  table.sort(sorted)
  return #sorted > 0 and table.concat(sorted, ", ") or "nothing"
end

-- The increments of one key that are in its counter, from the last one back.
local function chain(key, last, wrote)
  local length = 0
  while last ~= "nobody" do
    local read = wrote[last .. " " .. key]
    if not read then return nil, last end
    length, last = length + 1, read.words[4]
  end
  return length
end

--- Sorts the events. What there was, counted by name; or nil, what is wrong, and the event at which
--- that shows.
function model.check(events)
  table.sort(events, in_order)
  local owners, confirmed, doubts = survey(events)
  local sections, inside = {}, {} -- by name; those that are certain, by key
  local read_by, wrote = {}, {}
  local counts = { readers_at_most = 0 }
  local next_doubt = 1
  local has_struck = false -- anybody any session

  local function count(what) counts[what] = (counts[what] or 0) + 1 end
  local function wrong(e, why, other)
    return nil, why .. ":\n  " .. (other and other.line .. "\n  " or "") .. e.line, e
  end

  local function holdings(owner)
    local names = {}
    for section in pairs(owner.held) do names[section.mode .. " " .. section.key] = true end
    return list(names)
  end

  local function leave(section)
    if inside[section.key] then inside[section.key][section] = nil end
    owners[section.owner].held[section] = nil
  end

  local function enter(e, section)
    local those = inside[section.key] or {}
    inside[section.key] = those
    local readers = {}
    for other in pairs(those) do
      if conflict(section, other) then return wrong(e, "both are inside", other.granted) end
      readers[other.owner] = true
    end
    those[section] = true
    readers[section.owner] = true
    local n = 0
    for _ in pairs(readers) do n = n + 1 end
    if section.mode == "shared" then counts.readers_at_most = math.max(counts.readers_at_most, n) end
    return true
  end

  local meetings = {} -- of a section with another one, which may not have begun yet by the clock
  local step = {}

  function step.open(_, owner)
    owner.held = {}
    count "sessions"
    return true
  end

  function step.invoke(e, _, section)
    local n, key, mode = e.words[1], e.words[2], e.words[3]
    if section then return wrong(e, "not a new section", section.invoked) end
    if not MODES[mode] then return wrong(e, "no such mode") end
    sections[e.owner .. "#" .. n] = { name = e.owner .. "#" .. n, owner = e.owner, key = key,
      mode = mode, state = "invoked", invoked = e }
    count "rounds"
    return true
  end

  function step.grant(e, owner, section)
    if section.state ~= "invoked" then return wrong(e, "nobody asked for it", section.invoked) end
    section.state, section.granted = "held", e
    owner.held[section] = true
    count "grants"
    if e.time > owner.certain then return true end
    return enter(e, section)
  end

  function step.fail(e, _, section)
    if section.state ~= "invoked" then return wrong(e, "nobody asked for it", section.invoked) end
    if not OUTCOMES[e.words[4]] then return wrong(e, "no such outcome") end
    if e.words[4] == "lost" and not has_struck then return wrong(e, "lost, and nobody struck") end
    section.state = "failed"
    count(e.words[4])
    return true
  end

  function step.read(e, _, section)
    local key, record = section.key, e.words[4]
    local earlier = read_by[key .. " " .. record]
    wrote[section.name .. " " .. key] = e
    count "increments"
    if confirmed[section.name] then
      if earlier then
        return wrong(e, "both were confirmed, and have incremented the same count", earlier)
      end
      read_by[key .. " " .. record] = e
    end
    return true
  end

  function step.met(e, _, section)
    meetings[#meetings + 1] = { e, section, e.words[3] }
    return true
  end

  function step.confirm(e, _, section)
    if section.state ~= "held" then return wrong(e, "it is not held", section.invoked) end
    return true
  end

  function step.release(e, _, section)
    if section.state ~= "held" then return wrong(e, "it is not held", section.invoked) end
    section.state = "released"
    leave(section)
    return true
  end

  function step.free(e, _, section)
    if section.state ~= "released" then return wrong(e, "it was not let go", section.invoked) end
    return true
  end

  function step.seen(e, owner)
    local client, server = e.rest:match "^(.+) | (.+)$"
    if not client or client ~= server then return wrong(e, "the connection and the server disagree") end
    if not owner.interrupted then
      local expected = holdings(owner)
      if server ~= expected then return wrong(e, "by this history it holds " .. expected) end
    end
    return true
  end

  local function over(owner)
    for section in pairs(owner.held) do leave(section) end
    owner.over = true
  end

  function step.lost(e, owner)
    if not (owner.struck and owner.struck <= e.time) then return wrong(e, "lost, and nobody struck it") end
    over(owner)
    count "lost"
    return true
  end

  function step.interrupted(e, owner)
    if not (owner.interrupt and owner.interrupt <= e.time) then return wrong(e, "nobody interrupted it") end
    owner.interrupted = true
    return true
  end

  function step.close(e, owner)
    if not owner.interrupted and holdings(owner) ~= "nothing" then
      return wrong(e, "it still holds " .. holdings(owner))
    end
    if not owner.interrupted and not e.owner:find "^pid" and owner.last.event ~= "seen" then
      return wrong(e, "it was not asked for what it leaves behind", owner.last)
    end
    over(owner)
    return true
  end

  function step.error(e) return wrong(e, "an error") end

  local function chaos(e)
    if e.event == "strike" then
      has_struck = has_struck or e.words[2] == "terminate" or e.words[2] == "crash"
      count(e.words[2])
    elseif e.event == "counter" then
      local key, n, last = e.words[1], tonumber(e.words[2]), e.words[3]
      local length, unknown = chain(key, last, wrote)
      if not length then return wrong(e, "nobody known has written this: " .. unknown) end
      if length ~= n then return wrong(e, ("it is the work of %d increments"):format(length)) end
      counts.counted = (counts.counted or 0) + n
    end
    return true
  end

  local WHOLE = { open = true, seen = true, lost = true, interrupted = true, close = true, error = true }

  for _, e in ipairs(events) do
    while doubts[next_doubt] and doubts[next_doubt].time < e.time do
      local held = owners[doubts[next_doubt].owner].held
      for section in pairs(held or {}) do
        if inside[section.key] then inside[section.key][section] = nil end
      end
      next_doubt = next_doubt + 1
    end
    local ok, why, at
    if e.event == "strike" or e.event == "recovered" or e.event == "counter" then
      ok, why, at = chaos(e)
    else
      local owner = owners[e.owner]
      if e.event == "error" then return step.error(e) end
      if not owner or (e.event ~= "open" and not owner.held) then
        return wrong(e, "there is no such session")
      end
      if owner.over then return wrong(e, "it has ended", owner.last) end
      local section = not WHOLE[e.event] and sections[e.owner .. "#" .. e.words[1]] or nil
      if not WHOLE[e.event] and e.event ~= "invoke" then
        if not section or section.key ~= e.words[2] then return wrong(e, "there is no such section") end
        local has_mode = e.event ~= "read" and e.event ~= "met"
        if has_mode and section.mode ~= e.words[3] then return wrong(e, "in another mode", section.invoked) end
      end
      ok, why, at = step[e.event](e, owner, section)
      owner.last = e
    end
    if not ok then return nil, why, at end
  end

  for _, meeting in ipairs(meetings) do
    local e, section, other = meeting[1], meeting[2], sections[meeting[3]]
    if other and conflict(section, other) and confirmed[section.name] and confirmed[other.name] then
      return wrong(e, "they met, and both were confirmed", other.granted)
    end
  end
  for _, owner in pairs(owners) do
    if not owner.over and not owner.struck then return wrong(owner.last, "it did not end") end
    if not owner.over then count "cut_short" end
  end
  return counts
end

return model
