--- Who is measured: the yardstick in C, pglocks on both runtimes, and other libraries.

local candidates = {}

local COMMANDS = {
  ["C"] = { "build/bench/c" },
  ["Lua 5.4"] = { "tools/lua", "5.4", "bench/pglocks.lua" },
  ["LuaJIT"] = { "tools/lua", "jit", "bench/pglocks.lua" },
}

--- "Lua 5.4 confirmed": who, and a variant of that worker.
function candidates.of(name)
  local who, variant = name:match "^(.+) (%S+)$"
  return { name = name, command = COMMANDS[who], variant = variant }
end

--- bench/owners.lua on a runtime, with a variant of that.
function candidates.owners(runtime, variant)
  local tool, version = COMMANDS[runtime][1], COMMANDS[runtime][2]
  return { name = runtime .. " " .. variant, command = { tool, version, "bench/owners.lua" }, variant = variant }
end

--- The same of several names.
function candidates.all(...)
  local list = {}
  for place, name in ipairs { ... } do list[place] = candidates.of(name) end
  return list
end

candidates.runtimes = { "Lua 5.4", "LuaJIT" }

local VARIANTS = { "confirmed", "with_lock", "try_lock", "shared", "name", "timeout", "deferred", "transaction",
  "transaction_deferred" }

candidates.pairs = candidates.all("C text", "C binary", "C pipeline", "C deferred", "C transaction")
for _, runtime in ipairs(candidates.runtimes) do
  for _, variant in ipairs(VARIANTS) do
    table.insert(candidates.pairs, candidates.of(runtime .. " " .. variant))
  end
end

candidates.peers = {
  { name = "luasql", command = { "lua5.4", "bench/peers/luasql.lua" } },
  { name = "luadbi", command = { "lua5.4", "bench/peers/luadbi.lua" } },
  { name = "pgmoon", command = { "luajit", "bench/peers/pgmoon.lua" } },
  { name = "psycopg2", command = { "/usr/bin/python3", "bench/peers/psycopg2.py" } },
  { name = "django-pglocks", command = { "/usr/bin/python3", "bench/peers/django_pglocks.py" } },
  { name = "ruby-pg", command = { "ruby", "bench/peers/ruby_pg.rb" } },
  { name = "with_advisory_lock", command = { "ruby", "bench/peers/with_advisory_lock.rb" } },
}

--- Its server is started only where it is measured, and is its CONNINFO. Its locks expire.
candidates.redis = { name = "redis", command = { "build/bench/redis" } }

return candidates
