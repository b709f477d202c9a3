-- Networks that stop: in all directions or in one, for good or for a while, in silence or with an
-- RST. Clients in every phase of their lives are cut off at one time, each of them a process. They
-- say what they knew and when; from the server's side, through its Unix socket, the spec sees what
-- became of their locks. All that happens once, in `setup`, and the tests compare. The times are
-- core.now()'s, which is one clock for all processes of a machine.

local network = require "spec.faults.network"
local support = require "spec.support"
local pglocks = require "pglocks"

local now = support.core.now
local unavailable = network.unavailable()

-- Seconds, as the library has them; KEEPALIVE is keepalives_idle. By T_CLIENT a client knows that
-- it is cut off, and by T_SERVER the server frees its lock, with a little more for a busy machine.
local T_CLIENT, T_SERVER, FREE_BY = 11 + 2, 30 + 2, "60"
local REPLY_TIMEOUT, HOST_TIMEOUT, KEEPALIVE = 10, 5, 2
local AT_ONCE = 3

-- Seconds of this spec.
local BLIP = 6
local RESET = 0.5 -- when, after it began to refuse packets

-- ---- the experiment ---------------------------------------------------------------------

-- With and without TLS: one experiment for each runtime takes long enough.
local TLS = support.is_jit and " sslmode=require" or ""

local BOTH_WAYS = { "to_server", "to_client" }
local PHASES = { "connecting", "handshake", "waiting", "granted", "holding", "watched", "releasing",
  "idle", "module" }

-- In this order, because a blip begins first.
local SCENARIOS = {
  { name = "blip", begin = function(link) link:cut(BOTH_WAYS) end },
  { name = "full", begin = function(link) link:cut(BOTH_WAYS) end, more = { "timed", "late" } },
  { name = "to_server", begin = function(link) link:cut { "to_server" } end, more = { "timed" } },
  { name = "to_client", begin = function(link) link:cut { "to_client" } end, more = { "timed" } },
  { name = "far", begin = function(link) link:cut { "to_server" } end, phases = { "granted" } },
  { name = "reset", begin = function(link) link:reject() end },
  { name = "down", begin = function(link) link:down() end, more = { "timed" } },
}

-- In these the client is in the server's queue, and gets the lock so many seconds after the cut, or
-- never.
local QUEUES = { waiting = false, timed = false, granted = 3, late = 12 }

local LOOK = [[SELECT a.application_name AS name, count(*) FILTER (WHERE l.granted) AS held,
    count(*) FILTER (WHERE NOT l.granted) AS waiting
  FROM pg_stat_get_activity(NULL) a
    LEFT JOIN pg_locks l ON l.pid = a.pid AND l.locktype = 'advisory'
  WHERE a.application_name LIKE '% %' GROUP BY a.pid, a.application_name]]

-- Adds to each client's history what the server shows of it: "held", "waiting", "open" or "gone";
-- since `from` for certain, and still at `to`.
local function look(eyes, clients)
  local before, states = now(), {}
  for _, row in ipairs(eyes:query(LOOK)) do
    states[row.name] = row.held > 0 and "held" or row.waiting > 0 and "waiting" or "open"
  end
  local after = now()
  for name, client in pairs(clients) do
    local last, state = client.history[#client.history], states[name] or "gone"
    if not last or last.state ~= state then
      client.history[#client.history + 1] = { state = state, from = after, to = before }
    else
      last.to = before
    end
  end
  return states
end

-- Reads what a client says, to its end or as far as this word.
local function listen(client, awaited)
  for line in client.process.lines do
    local word, at, value = line:match "^([%w_]+)\t([%d.]+)\t(.*)$"
    if not word then error(line, 0) end
    client.said[word] = { at = tonumber(at), is = value }
    if word == awaited then return end
  end
  if awaited then error("a client ended before it was " .. awaited, 0) end
end

local function experiment(net)
  local function connect() return pglocks.connect(net.conninfo) end
  local eyes, holder, gate = connect(), connect(), connect()
  if TLS ~= "" then
    support.with_tls(net.folder .. "/data", function(sql) return eyes:query(sql) end)
  end
  local clients, locks, events = {}, {}, {}

  local function tell(scenario, what)
    assert(io.open(("%s/%s.%s"):format(net.folder, scenario.name, what), "w")):close()
  end

  local function start(scenario, phase)
    local name = scenario.name .. " " .. phase
    if QUEUES[phase] ~= nil then locks[name] = holder:lock(name) end
    clients[name] = { scenario = scenario, phase = phase, said = {}, history = {},
      process = scenario.link:spawn("spec/faults/partition_client.lua", phase, scenario.name,
        scenario.link.conninfo .. TLS, net.folder) }
  end

  local function wait_until_queued(which)
    support.wait_until("clients to queue", function()
      local states = look(eyes, clients)
      for name in pairs(locks) do
        if (clients[name].phase == "timed") == (which == "timed") and states[name] ~= "waiting" then
          return false
        end
      end
      return true
    end)
  end

  local function later(at, fn)
    events[#events + 1] = { at = at, fn = fn }
    table.sort(events, function(a, b) return a.at < b.at end)
  end

  local function heal(scenario)
    scenario.link:heal()
    tell(scenario, "healed")
  end

  local function begin(scenario)
    scenario.begin(scenario.link)
    scenario.cut = now()
    tell(scenario, "cut")
    for phase, seconds in pairs(QUEUES) do
      local lock = locks[scenario.name .. " " .. phase]
      if lock and seconds then later(scenario.cut + seconds, function() lock:release() end) end
    end
    later(scenario.cut + T_CLIENT, function() tell(scenario, "lost") end)
  end

  for _, scenario in ipairs(SCENARIOS) do
    scenario.link = net:link()
    if scenario.name == "far" then scenario.link:set_retransmission(0.32) end
    for _, phase in ipairs(scenario.phases or PHASES) do
      if phase ~= "handshake" then start(scenario, phase) end
    end
    for _, phase in ipairs(scenario.more or {}) do start(scenario, phase) end
  end
  for _, client in pairs(clients) do listen(client, "ready") end
  wait_until_queued()
  local rival = connect()
  support.begin(rival, "lock", "blip waiting")

  -- While the server's roles cannot be looked up, whoever connects is accepted and hears nothing.
  gate:query "BEGIN"
  gate:query "LOCK TABLE pg_catalog.pg_authid IN ACCESS EXCLUSIVE MODE"
  local handshakes = 0
  for _, scenario in ipairs(SCENARIOS) do
    if not scenario.phases then
      start(scenario, "handshake")
      handshakes = handshakes + 1
    end
  end
  support.wait_until("connections to be accepted", function()
    return #eyes:query [[SELECT pid FROM pg_locks
      WHERE NOT granted AND relation = 'pg_authid'::regclass]] == handshakes
  end)

  -- The next packet of one of them would have been a keepalive: nothing is worse.
  local blip = SCENARIOS[1]
  support.wait_until("a long silence", function() return blip.link:silence() > 0.9 * KEEPALIVE end)
  begin(blip)
  later(blip.cut + BLIP, function() heal(blip) end)
  later(blip.cut + BLIP + 1, function() locks["blip waiting"]:release() end)

  for _, scenario in ipairs(SCENARIOS) do tell(scenario, "go") end
  wait_until_queued "timed"
  for _, scenario in ipairs(SCENARIOS) do
    if scenario ~= blip then begin(scenario) end
    if scenario.name == "reset" then
      later(scenario.cut + RESET, function() scenario.impossible = scenario.link:reset() end)
    end
  end
  gate:query "COMMIT"

  local deadline = now() + 100
  local function is_over(states)
    if now() > deadline then return true end
    for _, state in pairs(states) do
      if state ~= "open" then return false end
    end
    return not events[1]
  end
  repeat
    while events[1] and now() >= events[1].at do table.remove(events, 1).fn() end
    support.sleep(0.02)
  until is_over(look(eyes, clients))

  for _, scenario in ipairs(SCENARIOS) do
    if scenario ~= blip then heal(scenario) end
  end
  for _, client in pairs(clients) do
    listen(client)
    client.process.close()
  end
  look(eyes, clients)
  support.complete(rival)
  return clients
end

-- ---- what came of it --------------------------------------------------------------------

local clients -- by scenario and phase

-- All there is to know of a client, in seconds since the cut.
local function tale(client)
  local cut, lines = client.scenario.cut, {}
  for word, said in pairs(client.said) do
    lines[#lines + 1] = { said.at - cut, ("it says %s: %s"):format(word, said.is) }
  end
  for _, seen in ipairs(client.history) do
    lines[#lines + 1] = { seen.from - cut,
      ("the server shows it %s, until %.3f"):format(seen.state, seen.to - cut) }
  end
  table.sort(lines, function(a, b) return a[1] < b[1] end)
  for i, line in ipairs(lines) do lines[i] = ("%8.3f  %s"):format(line[1], line[2]) end
  return ("\n%s, %s:\n%s"):format(client.scenario.name, client.phase, table.concat(lines, "\n"))
end

-- It must say this, within so many seconds of the cut. Returns when it did.
local function says(client, word, value, seconds)
  local said = client.said[word] or { at = math.huge, is = "nothing" }
  local at = said.at - client.scenario.cut
  if said.is ~= value or at > (seconds or math.huge) then
    error(("%s: %s expected%s%s"):format(word, value,
      seconds and (" within %g s"):format(seconds) or "", tale(client)), 2)
  end
  return at
end

-- The server must show it "held" or "waiting", but not later than that. Returns when it still did.
local function ends(client, state, seconds)
  local cut, still, over = client.scenario.cut, nil, math.huge
  for i, seen in ipairs(client.history) do
    local next_seen = client.history[i + 1]
    if seen.state == state then
      still, over = seen.to - cut, next_seen and next_seen.from - cut or math.huge
    end
  end
  if not still or over > seconds then
    error(("%s for %g s at most expected%s"):format(state, seconds, tale(client)), 2)
  end
  return still
end

local function is_never(client, state)
  for _, seen in ipairs(client.history) do
    if seen.state == state then
      error(("never %s expected%s"):format(state, tale(client)), 2)
    end
  end
end

-- ---- the tests --------------------------------------------------------------------------

describe("a network that stops", function()
  local net

  setup(function()
    if unavailable then return end
    net = network.start()
    clients = experiment(net)
  end)

  teardown(function()
    if net then net:stop() end
  end)

  -- The check gets the clients of the scenario, by phase.
  local function cell(row, phase, what, name, check)
    local function in_phase(_, key) return clients[name .. " " .. key] end
    it(("row %d, %s: %s"):format(row, phase, what), function()
      local why_not = unavailable or clients[name .. " granted"].scenario.impossible
      if why_not then return pending(why_not) end
      check(setmetatable({}, { __index = in_phase }))
    end)
  end

  -- The client knew of its loss before the server freed the lock. `tells`: the RST arrives with
  -- which its kernel gives the connection up. Then both happen in one moment, and the client, which
  -- asks all the time, needs another one until it is its turn to run.
  local function knows_first(client, knew, still, tells)
    if knew >= still + (tells and 0.25 or 0) then
      error(("the client knew %.3f s too late%s"):format(knew - still, tale(client)), 2)
    end
  end

  -- Who waits holds nothing, and the server looks every 5 s whether its connection is dead. Before
  -- PostgreSQL 14 it does not: then the place is kept until the grant.
  local function leaves_the_queue(client, by)
    local looks = tonumber(support.observe("SHOW server_version_num")[1].server_version_num) >= 140000
    if looks then ends(client, "waiting", by + 5) end
  end

  -- What a silence comes to. `hears`: what the server sends arrives, and so may a lock.
  local function silence(row, name, where, hears, tells)
    cell(row, "connecting", where .. ": refused when its time is over", name, function(of)
      says(of.connecting, "connected", "connect", HOST_TIMEOUT + AT_ONCE)
      says(of.handshake, "connected", "connect", 10 + AT_ONCE)
      for _, client in ipairs { of.connecting, of.handshake } do
        says(client, "free_by", "nil")
        is_never(client, "held")
      end
    end)

    cell(row, "waiting", where .. ": unknown within 11 s, and it leaves the queue", name,
      function(of)
        says(of.waiting, "waited", "unknown", T_CLIENT)
        says(of.waiting, "free_by", FREE_BY)
        is_never(of.waiting, "held")
        leaves_the_queue(of.waiting, T_SERVER)
      end)

    cell(row, "waiting", where .. ": unknown, if the time is over meanwhile", name, function(of)
      says(of.timed, "waited", "unknown", 5 + REPLY_TIMEOUT + AT_ONCE)
      says(of.timed, "free_by", FREE_BY)
      is_never(of.timed, "held")
    end)

    if hears then
      cell(row, "waiting", where .. ": granted, lost within 11 s, before the server frees the lock",
        name, function(of)
          says(of.granted, "waited", "true", QUEUES.granted + AT_ONCE)
          local still = ends(of.granted, "held", QUEUES.granted + T_SERVER)
          knows_first(of.granted, says(of.granted, "held", "false"), still)
          says(of.granted, "held", "false", QUEUES.granted + T_CLIENT)
          says(of.granted, "released", "lost")
        end)
    else
      cell(row, "waiting", where .. ": granted unheard, unknown, and the server frees the lock",
        name, function(of)
          says(of.granted, "waited", "unknown", T_CLIENT)
          says(of.granted, "free_by", FREE_BY)
          ends(of.granted, "held", QUEUES.granted + T_SERVER)
        end)
    end

    cell(row, "holding", where .. ": lost within 11 s, before the server frees the lock", name,
      function(of)
        local knew = says(of.holding, "held", "false", T_CLIENT)
        knows_first(of.holding, knew, ends(of.holding, "held", T_SERVER), tells)
        says(of.holding, "released", "lost")
        says(of.holding, "again", "not held")
        says(of.holding, "losses", "1")
        says(of.holding, "locks", "0")
      end)

    cell(row, "holding", where .. ": a scheduler tells on_lost, before the server frees the lock",
      name, function(of)
        local knew = says(of.watched, "told", "lost", T_CLIENT)
        knows_first(of.watched, knew, ends(of.watched, "held", T_SERVER), tells)
        says(of.watched, "locks", "1")
        says(of.watched, "held", "false")
      end)

    cell(row, "releasing", where .. ": unknown within 10 s, and the server frees the lock", name,
      function(of)
        local began = says(of.releasing, "releases", "nil")
        says(of.releasing, "released", "unknown", began + REPLY_TIMEOUT + AT_ONCE)
        says(of.releasing, "free_by", FREE_BY)
        says(of.releasing, "held", "false")
        says(of.releasing, "again", "not held")
        ends(of.releasing, "held", T_SERVER)
      end)

    cell(row, "idle", where .. ": lost, and the module's functions connect anew", name, function(of)
      says(of.idle, "alive", "false", T_CLIENT)
      says(of.idle, "locked", "lost")
      says(of.module, "meanwhile", "connect", T_CLIENT + HOST_TIMEOUT + AT_ONCE)
      says(of.module, "locked", "true")
      says(of.module, "checked", "true")
      says(of.module, "released", "true")
    end)
  end

  silence(4, "full", "nothing arrives")

  cell(4, "waiting", "nothing arrives: granted to a client long gone, free by when it said", "full",
    function(of)
      local at = says(of.late, "waited", "unknown", T_CLIENT)
      ends(of.late, "held", at + tonumber(of.late.said.free_by.is) + 2)
    end)

  silence(5, "to_server", "nothing arrives at the server", true)

  cell(5, "waiting", "nothing arrives at a server far away: granted, lost before it frees the lock",
    "far", function(of)
      says(of.granted, "waited", "true", QUEUES.granted + AT_ONCE)
      local still = ends(of.granted, "held", QUEUES.granted + T_SERVER)
      knows_first(of.granted, says(of.granted, "held", "false"), still)
    end)

  silence(5, "to_client", "nothing arrives at the client", false, true)

  -- TCP tries again at intervals that double: at the latest when as long again has passed.
  local AGAIN = 2 * BLIP + AT_ONCE

  cell(6, "connecting", "6 s of nothing: connected, if there is time", "blip", function(of)
    for _, client in ipairs { of.connecting, of.handshake } do
      says(client, "connected", "true", AGAIN)
      says(client, "released", "true")
    end
  end)

  cell(6, "waiting", "6 s of nothing: it keeps its place in the queue", "blip", function(of)
    says(of.waiting, "waited", "true", AGAIN)
    says(of.waiting, "held", "true")
    says(of.waiting, "released", "true")
  end)

  cell(6, "waiting", "6 s of nothing: granted meanwhile, it holds the lock", "blip", function(of)
    says(of.granted, "waited", "true", AGAIN)
    says(of.granted, "held", "true")
    says(of.granted, "released", "true")
  end)

  cell(6, "holding", "6 s of nothing: it holds the lock all the time", "blip", function(of)
    says(of.holding, "held", "true")
    says(of.holding, "checked", "true", AGAIN)
    assert.equal("held", of.holding.history[1].state)
    local ended = of.holding.history[2]
    assert(ended.from - of.holding.scenario.cut > BLIP, tale(of.holding))
    says(of.watched, "held", "true")
    assert.is_nil(of.watched.said.told)
  end)

  cell(6, "releasing", "6 s of nothing: released", "blip", function(of)
    says(of.releasing, "released", "true", AGAIN)
    says(of.releasing, "again", "not held")
  end)

  cell(6, "idle", "6 s of nothing: nothing has happened", "blip", function(of)
    says(of.idle, "alive", "true")
    says(of.idle, "locked", "true", AGAIN)
    says(of.module, "locked", "true", AGAIN)
    for _, client in ipairs { of.idle, of.module } do -- on the same connection
      assert.equal("open", client.history[1].state)
      assert(client.history[1].to - client.scenario.cut > BLIP - AT_ONCE, tale(client))
      for _, seen in ipairs(client.history) do
        assert(seen.state ~= "gone" or seen.from > client.said.locked.at, tale(client))
      end
    end
  end)

  cell(7, "connecting", "an RST: refused when its time is over", "reset", function(of)
    says(of.connecting, "connected", "connect", HOST_TIMEOUT + AT_ONCE)
    says(of.handshake, "connected", "connect", 2 * HOST_TIMEOUT + AT_ONCE)
  end)

  cell(7, "waiting", "an RST: raises at once, and leaves the queue", "reset", function(of)
    local said = of.waiting.said.waited
    says(of.waiting, "waited", said and said.is == "lost" and said.is or "unknown", RESET + AT_ONCE)
    is_never(of.waiting, "held")
    leaves_the_queue(of.waiting, RESET + AT_ONCE)
  end)

  cell(7, "holding", "an RST: lost at once", "reset", function(of)
    says(of.holding, "held", "false", RESET + AT_ONCE)
    says(of.holding, "released", "lost")
    says(of.holding, "losses", "1")
    ends(of.holding, "held", RESET + AT_ONCE)
    says(of.watched, "told", "lost", RESET + AT_ONCE)
  end)

  cell(7, "releasing", "an RST: unknown at once", "reset", function(of)
    says(of.releasing, "released", "unknown", AT_ONCE)
    says(of.releasing, "free_by", FREE_BY)
    says(of.releasing, "again", "not held")
    ends(of.releasing, "held", RESET + AT_ONCE)
  end)

  cell(7, "idle", "an RST: lost, and the module's functions connect anew", "reset", function(of)
    says(of.idle, "alive", "false", RESET + AT_ONCE)
    says(of.idle, "locked", "lost")
    says(of.module, "meanwhile", "connect")
    says(of.module, "locked", "true")
    says(of.module, "checked", "true")
    says(of.module, "released", "true")
  end)

  -- No RST comes of that: for connections that are there it is a silence like others.
  silence(7, "down", "the link is down")
end)
