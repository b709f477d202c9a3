-- examples/: each program runs as a user would start it, in a process of its own.

local support = require "spec.support"

local TAKES_TURNS = {
  "reads 0", "writes 1", "reads 1", "writes 2", "reads 2", "writes 3", "the ticker went on",
}

describe("examples", function()
  after_each(support.finish)

  for _, name in ipairs { "cqueues", "luv" } do
    it(name .. ".lua takes turns, and its ticker goes on", function()
      local printed, status = support.run_program("examples/" .. name .. ".lua")
      assert.same(TAKES_TURNS, printed)
      assert.equal(0, status)
    end)
  end

  it("leader.lua leads, in one process after the other", function()
    local pipe = assert(io.popen(("for i in 1 2; do %s %s examples/leader.lua & done 2>&1; wait"):format(
      support.environment(), os.getenv "PGLOCKS_TEST_LUA" or "lua")))
    local printed, term = {}, { "is elected" }
    for turn = 1, 5 do term[#term + 1] = "turn " .. turn .. " of term 1" end
    term[#term + 1] = "has led"
    for line in pipe:lines() do printed[#printed + 1] = line end
    pipe:close()
    local expected = {}
    for i = 1, 2 * #term do expected[i] = term[(i - 1) % #term + 1] end
    -- Between its lock's end and its last line another one may have been elected.
    table.sort(printed)
    table.sort(expected)
    assert.same(expected, printed)
  end)
end)
