-- Is there a spec for every fault in every phase? Their names say: "row 8, holding".

local cells = require "spec.faults.cells"
local support = require "spec.support"

-- Every spec that this runtime can load, by name; none is run.
local function names()
  local not_ours = support.is_jit and "-path spec/lua54 -prune -o" or ""
  return support.shell(("%s tools/busted.lua --list $(find spec %s -name '*_spec.lua' -print)"):format(
    os.getenv "PGLOCKS_TEST_LUA" or "lua", not_ours))
end

describe("the table of faults", function()
  it("has a spec for each cell, and there is none for another", function()
    local listed, expected, missing = names(), {}, {}
    for _, row in ipairs(cells.rows) do
      for phase in row[3]:gmatch "%a+" do
        local name = ("row %s, %s"):format(row[1], phase)
        expected[name] = true
        if not listed:find(name, 1, true) then missing[#missing + 1] = name end
      end
    end
    assert.same({}, missing)
    for name in listed:gmatch "row %w+, %a+" do assert.is_true(expected[name], name) end
  end)

  it("names the specs of each guarantee", function()
    local listed, missing = names(), {}
    for _, guarantee in ipairs(cells.guarantees) do
      for i = 2, #guarantee do
        local is_there = listed:find(guarantee[i], 1, true)
        if not is_there then missing[#missing + 1] = guarantee[i] end
      end
    end
    assert.same({}, missing)
  end)
end)
