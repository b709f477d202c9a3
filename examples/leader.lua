-- leader.lua: one process leads for a second, all others wait for their turn. Which database is what
-- libpq's environment says; start it several times at once:
--
--     for i in 1 2 3; do PGHOST=/run/postgresql PGDATABASE=app lua examples/leader.lua & done; wait
--
-- Kill the leader, however rudely, or end its session with pg_terminate_backend: the next one leads.

local pglocks = require "pglocks"

local TURNS, TURN = 5, 0.2 -- seconds each

io.stdout:setvbuf "line"

local function lead(term)
  for turn = 1, TURNS do
    if not term:is_leader() then return end -- it stands again, and begins anew
    print("turn " .. turn .. " of term " .. term.number)
    term:sleep(TURN)
  end
  return "has led"
end

print(pglocks.lead("example leader", {
  interval = 0.2,
  on_elected = function() print "is elected" end,
  on_lost = function(_, err) print("is no leader any more: " .. tostring(err)) end,
  on_retry = function(err, seconds) print(("tries again in %.1f s: %s"):format(seconds, tostring(err))) end,
}, lead))
