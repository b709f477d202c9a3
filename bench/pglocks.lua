--- pglocks as a worker of the benchmarks, on both runtimes:
---
---     pglocks.lua CONNINFO VARIANT[:N]
---
--- bench/workers.lua says what is read and answered.

local pglocks = require "pglocks"
local worker = require "bench.peers.worker"

local KEY = 4242

local conninfo, variant, size = arg[1], arg[2]:match "^([%w_]+):?(%d*)$"
size = tonumber(size)

local conn = pglocks.connect {
  conninfo = conninfo,
  release = variant:find "deferred" and "deferred" or "confirmed",
}

-- A scope as the runtime has it, with a new lock object each time. LuaJIT cannot parse <close>.
local function scope(call)
  local form = rawget(_G, "jit") and "conn:%s:release()" or "local lock <close> = conn:%s"
  return assert(load("local conn = ... return function() " .. form:format(call) .. " end"))(conn)
end

local variants = {}

function variants.confirmed() return scope "lock(4242)" end

function variants.shared() return scope "lock(4242, { shared = true })" end

function variants.timeout() return scope "lock(4242, { timeout = 5 })" end

function variants.try_lock() return scope "try_lock(4242)" end

function variants.name() return scope 'lock "invoice 42"' end

function variants.deferred()
  return scope "lock(4242)", function() conn:ping() end -- its answer comes after those of the releases
end

-- A scope that ends without release() would roll back.
function variants.transaction()
  local options = { scope = "transaction" }
  return function() conn:lock(KEY, options):release() end
end

function variants.transaction_deferred()
  return variants.transaction(), function() conn:ping() end
end

function variants.with_lock()
  return function() conn:with_lock(KEY, function() end) end
end

--- Beside N that are held already, of its own: all workers hold theirs at the same time.
function variants.held()
  local held = {}
  for n = 1, size do held[n] = conn:lock(conn.backend_pid * 1000000 + n) end
  local pair = scope "lock(4242)"
  return function() return pair(held) end
end

--- A pair is N locks and their releases.
function variants.each()
  local locks = {}
  return function()
    for n = 1, size do locks[n] = conn:lock(n) end
    for n = 1, size do locks[n]:release() end
  end
end

--- The same in one call each.
function variants.all()
  local keys = {}
  for n = 1, size do keys[n] = n end
  return function() conn:lock_all(keys):release() end
end

worker.serve(conn.backend_pid, variants[variant]())
