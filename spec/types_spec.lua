-- What is documented must be what is registered, and the other way round.

local core = require "pglocks.core"
local pglocks = require "pglocks"
local support = require "spec.support"

local read = support.read

-- The functions of a file in order: { name =, parameters =, comment = the lines right above it }.
local function documented(path, pattern)
  local found, comment = {}, {}
  for line in read(path):gmatch "([^\n]*)\n" do
    local name = line:match(pattern)
    if name then
      local parameters = line:match "^function [%w_.:]+%((.-)%)" or ""
      found[#found + 1] = { name = name, parameters = parameters, comment = table.concat(comment, "\n") }
    end
    if line:find "^%-%-%-" then comment[#comment + 1] = line else comment = {} end
  end
  return found
end

local function names(documents)
  local list = {}
  for i, document in ipairs(documents) do list[i] = document.name end
  table.sort(list)
  return list
end

local function functions(table_of)
  local list = {}
  for name, value in pairs(table_of) do
    if type(value) == "function" then list[#list + 1] = name end
  end
  table.sort(list)
  return list
end

--- What the pattern finds in a text, sorted, with others that are `there` already.
local function matches(text, pattern, there)
  local list = there or {}
  for match in assert(text):gmatch(pattern) do list[#list + 1] = match end
  table.sort(list)
  return list
end

local TYPES = "lua/pglocks/types.lua"

describe("types.lua", function()
  local interfaces = {
    { "connection", core.connection, "^function connection:([%w_]+)" },
    { "lock", core.lock, "^function lock:([%w_]+)" },
    { "start", core.start, "^function start%.([%w_]+)" },
    { "core", core, "^function core%.([%w_]+)" },
  }
  for _, interface in ipairs(interfaces) do
    local name, registered, pattern = interface[1], interface[2], interface[3]

    it("has exactly the registered functions of " .. name, function()
      assert.same(functions(registered), names(documented(TYPES, pattern)))
    end)

    it("documents every parameter of " .. name, function()
      for _, document in ipairs(documented(TYPES, pattern)) do
        for parameter in document.parameters:gmatch "[%w_.]+" do
          assert.is_truthy(document.comment:find("---@param " .. parameter:gsub("%.", "%%.") .. "%?? "),
            name .. "." .. document.name .. ": no @param " .. parameter)
        end
      end
    end)
  end

  it("shows a line that uses each public method, and what it returns or raises", function()
    for i = 1, 2 do
      for _, document in ipairs(documented(TYPES, interfaces[i][3])) do
        local method = ":" .. document.name
        assert.is_truthy(document.comment:find("\n%-%-%-     [^\n]*" .. method), "no usage of " .. method)
        assert.is_truthy(document.comment:find "@return" or document.comment:find "Raises", method)
      end
    end
  end)

  it("is Lua that every runtime can parse", function() assert(loadfile(TYPES)) end)

  it("names the codes of the core, and no other", function()
    local registered = matches(read "src/module.c":match "} codes%[%] = {(.-)\n};", '{[A-Z_]+, "([a-z_]+)"')
    assert.is_true(#registered > 10)
    assert.same(registered, matches(read(TYPES):match "@alias pglocks.code\n(.-)\n\n", '%-%-%-| "([a-z_]+)"'))
  end)

  it("names the schemes of the core, and no other, and so does the README", function()
    local registered = matches(read "src/scheme.c":match "schemes%[%] = {(.-)\n};", '{"([^"]+)", TAKES')
    assert.is_true(#registered > 20)
    assert.same(registered, matches(read(TYPES):match "@alias pglocks.hash\n(.-)\n\n", '%-%-%-| "([^"]+)"'))
    assert.same(registered, matches(read "README.md":match "| system | `hash` |(.-)\n\n",
      '\n| [^|]*| `"([^"]+)"` |', { "sha256" }))
  end)

  it("has the fields of connections, locks and keys", function()
    local fields = {}
    local class
    for line in read(TYPES):gmatch "[^\n]+" do
      class = line:match "^%-%-%-@class pglocks%.([%w_]+)" or class
      local field = line:match "^%-%-%-@field ([%w_]+)"
      if field then fields[class .. "." .. field] = true end
    end
    local files = { connection = "connection", lock = "lock", key = "key" }
    for file, of in pairs(files) do
      local index = assert(read("src/" .. file .. ".c"):match("\nstatic int " .. of .. "_index.-\n}\n"))
      for field in index:gmatch 'strcmp%(field, "([%w_]+)"%)' do
        assert.is_true(fields[of .. "." .. field], "no @field " .. of .. "." .. field)
        fields[of .. "." .. field] = nil
      end
      for field in pairs(fields) do
        assert.is_nil(field:match("^" .. of .. "%."), "no such field: " .. field)
      end
    end
  end)
end)

describe("the description of a connection in types.lua", function()
  it("has the options that connect.lua knows", function()
    local options = assert(read "lua/pglocks/connect.lua":match "\nlocal OPTIONS = {\n(.-)\n}\n")
    assert.same(matches("\n" .. options, "\n  ([%w_]+) = ", { "conninfo" }),
      matches(read(TYPES):match "@class pglocks.description\n(.-)\n\n", "%-%-%-@field ([%w_]+)"))
  end)
end)

describe("a scheduler in types.lua", function()
  it("has the functions that scheduled.lua demands, and an optional spawn", function()
    assert.same(
      matches(read "lua/pglocks/scheduled.lua":match "\nlocal FUNCTIONS = { (.-) }\n", '"([a-z]+)"', { "spawn?" }),
      matches(read(TYPES):match "@class pglocks.scheduler\n(.-)\n\n", "%-%-%-@field ([%w_]+%??) fun%("))
  end)
end)

describe("init.lua", function()
  local INIT = "lua/pglocks/init.lua"
  local comments = {}
  for _, pattern in ipairs { "^function pglocks%.([%w_]+)", "^pglocks%.([%w_]+) = " } do
    for _, document in ipairs(documented(INIT, pattern)) do
      comments[document.name] = document.comment
    end
  end

  for _, name in ipairs(functions(pglocks)) do
    it("documents pglocks." .. name, function()
      local comment = assert(comments[name], "not defined where this spec looks for it")
      assert.is_truthy(comment:find "%-%-%- %a", "no description")
      assert.is_truthy(comment:find "%-%-%-@", "no annotation")
    end)
  end
end)
