-- README.md: every block of code runs as it is printed, each in a process of its own, with the
-- databases `app` and `dw`. A comment `--> text` says what the line prints. Blocks with <close> run
-- on Lua 5.4 alone, all others on both runtimes.

local support = require "spec.support"
local pglocks = require "pglocks"

local core = support.core

local read = support.read

local README = read "README.md"

-- The fenced blocks of one language: { line = of the first line of code, text = }.
local function blocks(language)
  local found, block, number = {}, nil, 0
  for line in README:gmatch "([^\n]*)\n" do
    number = number + 1
    local fence = line:match "^```(%w*)"
    if fence and block then
      block.text = table.concat(block, "\n") .. "\n"
      if block.language == language then found[#found + 1] = block end
      block = nil
    elseif fence then
      block = { language = fence, line = number + 1 }
    elseif block then
      block[#block + 1] = line
    end
  end
  assert(not block, "README.md: a block of code without an end")
  return found
end

local function spaced(text) return (text:gsub("%s+", " "):gsub(" $", "")) end

local function promised(text)
  local lines = {}
  for line in text:gmatch "[^\n]+" do lines[#lines + 1] = line:match "%-%->%s+(.*)$" end
  for i, line in ipairs(lines) do lines[i] = spaced(line) end
  return lines
end

-- ---- Lua --------------------------------------------------------------------------------

-- What it prints, and its exit status.
local function run(block)
  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write(("\n"):rep(block.line - 1), block.text) -- an error then names the line of README.md
  file:close()
  local lines, status = support.run_program(path)
  os.remove(path)
  for i, line in ipairs(lines) do lines[i] = spaced(line) end
  return lines, status
end

describe("README.md's Lua", function()
  local created = {}

  setup(function()
    support.with_fsync() -- for the tokens; the server of a reader has it anyway
    for _, name in ipairs { "app", "dw" } do
      if #support.observe("SELECT 1 AS one FROM pg_database WHERE datname = $1", name) == 0 then
        support.observe("CREATE DATABASE " .. name)
        created[#created + 1] = name
      end
    end
  end)

  teardown(function()
    for _, name in ipairs(created) do support.observe("DROP DATABASE " .. name .. " WITH (FORCE)") end
    support.without_fsync()
  end)

  for _, block in ipairs(blocks "lua") do
    if not (support.is_jit and block.text:find("<close>", 1, true)) then
      it("runs as printed on line " .. block.line, function()
        local printed, status = run(block)
        assert.equal(0, status, table.concat(printed, "\n"))
        local expected = promised(block.text)
        if #expected > 0 then assert.same(expected, printed) end
      end)
    end
  end

  it("has blocks for both runtimes", function()
    local with, without = 0, 0
    for _, block in ipairs(blocks "lua") do
      if block.text:find("<close>", 1, true) then with = with + 1 else without = without + 1 end
    end
    assert.is_true(with >= 3)
    assert.is_true(without >= 3)
  end)
end)

-- ---- SQL --------------------------------------------------------------------------------

describe("README.md's SQL", function()
  for _, block in ipairs(blocks "sql") do
    it("runs as printed on line " .. block.line, function()
      local rows = support.observe((block.text:gsub(";?%s*%-%->[^\n]*", "")))
      for i, expected in ipairs(promised(block.text)) do
        local _, value = next(rows[i])
        assert.equal(expected, tostring(value))
      end
    end)
  end
end)

-- ---- shell ------------------------------------------------------------------------------

-- How each kind of line is checked: by what the Makefile and tools/ do themselves.
local commands = {
  ["^make "] = function(line)
    assert.is_truthy(read "Makefile":find("\n" .. line:match "^make (%w+)$" .. ":"), "no such target")
  end,

  ["^sudo apt%-get install "] = function(line)
    local known = read "tools/install-deps"
    for package in line:match "install (.*)$":gmatch "%S+" do
      local name = package:gsub("%p", "%%%0")
      assert.is_truthy(known:find('[ "|]' .. name .. '[ "|]'), package .. " is not in tools/install-deps")
    end
  end,

  ["^sudo luarocks "] = function(line)
    local recipe = read "Makefile":match "\nrock:\n(.-)\n\n" .. read "tools/try-rock"
    local arguments, rockspec = line:match "^sudo luarocks (.*) (%S+%.rockspec)$"
    assert(rockspec, "no rockspec at the end")
    assert(io.open(rockspec)):close()
    assert.is_truthy(arguments:find "%f[%w]make%f[%W]")
    assert.is_truthy(arguments:find "%-%-lua%-version=5%.[14] ")
    for variable in arguments:gmatch "%f[%w_]([%u_]+)=" do
      assert.is_truthy(recipe:find(variable .. "=", 1, true), variable .. " is not what `make rock` sets")
    end
    assert.is_truthy(arguments:find("PQ_INCDIR=$(pg_config --includedir)", 1, true))
  end,
}

describe("README.md's shell", function()
  for _, block in ipairs(blocks "sh") do
    for i, line in ipairs(block) do
      it("can be trusted on line " .. block.line + i - 1, function()
        for pattern, check in pairs(commands) do
          if line:find(pattern) then return check(line) end
        end
        error("how is this line to be checked? " .. line)
      end)
    end
  end
end)

-- ---- nginx -------------------------------------------------------------------------------

describe("README.md's nginx.conf", function()
  for _, block in ipairs(blocks "nginx") do
    it("is a part of the example on line " .. block.line, function()
      assert.is_truthy(read "examples/openresty/nginx.conf":find(block.text, 1, true))
    end)
  end
end)

-- ---- the text ---------------------------------------------------------------------------

local function each_function(table_of, name_format)
  local names = {}
  for name, value in pairs(table_of) do
    if type(value) == "function" then names[#names + 1] = name_format:format(name) end
  end
  table.sort(names)
  return ipairs(names)
end

describe("README.md", function()
  it("has every public function and method", function()
    for _, interface in ipairs {
      { pglocks, "`pglocks.%s(" }, { core.connection, "`conn:%s(" }, { core.lock, "`lock:%s(" } } do
      for _, call in each_function(interface[1], interface[2]) do
        assert.is_truthy(README:find(call, 1, true), call .. " is missing")
      end
    end
  end)

  it("has every option of a connection", function()
    local options = assert(read "lua/pglocks/connect.lua":match "\nlocal OPTIONS = {\n(.-)\n}\n")
    for line in options:gmatch "[^\n]+" do
      local option = line:match "^  ([%w_]+) = "
      if option then assert.is_truthy(README:find("\n| `" .. option .. "` |", 1, true), option) end
    end
  end)

  it("has every option of a leader, and every member of a term", function()
    local source = read "lua/pglocks/lead.lua"
    local options, found = assert(source:match "\nlocal OPTIONS = {\n(.-)\n}\n"), 0
    for option in ("\n" .. options):gmatch "\n  ([%w_]+) = " do
      found = found + 1
      assert.is_truthy(README:find("\n| `" .. option .. "` |", 1, true), option)
    end
    assert.is_true(found > 5)
    for method in source:gmatch "\nfunction Term:(%l[%w_]*)" do
      assert.is_truthy(README:find("\n| `term:" .. method .. "(", 1, true), method)
    end
  end)

  it("has every function of a scheduler, and no other", function()
    local known, listed = { "spawn" }, {}
    local functions = assert(read "lua/pglocks/scheduled.lua":match "\nlocal FUNCTIONS = { (.-) }\n")
    for name in functions:gmatch '"([a-z]+)"' do known[#known + 1] = name end
    local rows = assert(README:match "\n| function | |\n[^\n]*\n(.-)\n\n")
    for name in ("\n" .. rows):gmatch "\n| `([a-z]+)%(" do listed[#listed + 1] = name end
    table.sort(known)
    table.sort(listed)
    assert.same(known, listed)
  end)

  it("has every code of an error, and no other", function()
    local known, listed = {}, {}
    for code in assert(read "src/module.c":match "} codes%[%] = {(.-)\n};"):gmatch '{[A-Z_]+, "([a-z_]+)"' do
      known[#known + 1] = code
    end
    local codes = assert(README:match "\n| code | when | and then |\n[^\n]*\n(.-)\n\n")
    for code in ("\n" .. codes):gmatch "\n| `([a-z_]+)` |" do listed[#listed + 1] = code end
    table.sort(known)
    table.sort(listed)
    assert.same(known, listed)
  end)

  it("points only at files and headings that exist", function()
    local headings = {}
    for heading in README:gmatch "\n#+ ([^\n]+)" do
      headings[heading:lower():gsub("[^%w%s_-]", ""):gsub("%s", "-")] = true
    end
    for target in README:gmatch "%]%(([^)]+)%)" do
      if target:sub(1, 1) == "#" then
        assert.is_true(headings[target:sub(2)], "no heading for " .. target)
      elseif not target:find "^https?:" then
        assert(io.open(target)):close()
      end
    end
  end)
end)
