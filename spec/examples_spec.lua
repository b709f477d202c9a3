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
end)
