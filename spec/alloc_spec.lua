-- Whatever allocates in Lua may collect garbage, and so run finalizers: those of our own locks, and
-- those of the program, which may use the very connection that a call of ours is busy with. Each
-- test is a process of its own, because what went wrong here was a crash.

local support = require "spec.support"

local PRELUDE = [[
  local pglocks
  local conninfo = os.getenv "PGLOCKS_TEST_CONNINFO"
  -- Calls fn when what it returns is collected.
  local function when_collected(fn)
    if not newproxy then return setmetatable({}, { __gc = fn }) end
    local proxy = newproxy(true)
    getmetatable(proxy).__gc = fn
    return proxy
  end
]]

local LOADED = PRELUDE .. [[ pglocks = require "pglocks" local conn = pglocks.connect(conninfo) ]]

-- What the script prints; a crash cuts it short.
local function output_of(script, ...)
  local process = support.spawn(script, ...)
  local lines = {}
  for line in process.lines do lines[#lines + 1] = line end
  process.close()
  return table.concat(lines, "\n")
end

describe("a collection in the middle of a call", function()
  after_each(support.finish)

  it("does not crash conn:locks() by releasing what it lists", function()
    assert.equal("survived", output_of(LOADED .. [[
      for i = 1, tonumber((...)) do
        conn:lock("dropped " .. i % 50) -- and its lock is garbage
        for _ = 1, i % 7 do
          for _, held in ipairs(conn:locks()) do assert(held.key and held.count > 0) end
        end
        if i % 20 == 0 then conn:ping() end
      end
      print "survived"
    ]], math.ceil(6000 / support.slow)))
  end)

  it("does not mix up or crash a query by making another one", function()
    assert.equal("0 mixed up", output_of(LOADED .. [[
      local ended = false
      local function ask_again()
        if ended then return end
        pcall(conn.query, conn, "SELECT 1")
        when_collected(ask_again)
      end
      when_collected(ask_again)
      local bad = 0
      for _ = 1, tonumber((...)) do
        local rows = conn:query "SELECT i, repeat('x', 200) || i AS t FROM generate_series(1, 500) i"
        if #rows ~= 500 or rows[500].i ~= 500 then bad = bad + 1 end
      end
      ended = true
      print(bad .. " mixed up")
    ]], math.ceil(100 / support.slow)))
  end)

  it("makes a lock raise `closed` by closing its connection", function()
    assert.equal("closed", output_of(LOADED .. [[
      local name = ("x"):rep(3000000) -- its copy in the lock makes the collector work
      when_collected(function() conn:close() end)
      local ok, result
      for _ = 1, 500 do
        ok, result = pcall(conn.lock, conn, name)
        if not ok then break end
        result:release()
        result = nil
      end
      print(type(result) == "table" and result.code or result)
    ]]))
  end)

  it("may be the last one, when LuaJIT has unloaded the library already", function()
    assert.equal("survived", output_of(PRELUDE .. [[
      local conn
      -- Older than the library, and so collected after it.
      oldest = when_collected(function()
        pcall(conn.alive, conn)
        io.write "survived\n"
      end)
      pglocks = require "pglocks"
      conn = pglocks.connect(conninfo)
    ]]))
  end)
end)

-- spec/alloc/alloc.c lets every allocation of some thirty steps fail, one after the other; with a
-- stride, only some of those from the 12th on of each step.
local function failing_allocations(under, which, stride)
  local pipe = assert(io.popen(("%s build/%s/alloc %s spec/alloc/scenario.lua %d 2>&1"):format(
    under, support.is_jit and "jit" or "5.4", which, stride)))
  local output = pipe:read "*a"
  pipe:close()
  local failed, wrong = output:match "(%d+) allocations failed in .* (%d+) wrong\n$"
  assert(tonumber(failed or 0) > 100 and wrong == "0", output)
  assert.equal(1, select(2, output:gsub("\n", "\n")), output) -- and no word of valgrind
end

local function stride(usual, slow, long)
  if support.size >= 5 then return long end
  return support.slow > 1 and slow or usual
end

describe("an allocation that fails", function()
  after_each(support.finish)

  it("in Lua leaves every lock as its object says, and no session behind (row 22, connecting;"
    .. " row 22, waiting; row 22, holding; row 22, releasing)", function()
    failing_allocations(os.getenv "PGLOCKS_UNDER" or "", "lua", stride(8, 60, 1))
  end)

  -- Sanitizers and valgrind have a malloc of their own.
  if not os.getenv "PGLOCKS_UNDER" then
    it("in libpq leaves every lock as its object says, or gives up the session", function()
      failing_allocations("LD_PRELOAD=build/failing_malloc.so", "malloc", stride(150, 150, 5))
    end)
  end
end)
