local pglocks = require "pglocks"
local support = require "spec.support"

local key = pglocks.key

--- Calls of these have a name in messages, which what pcall calls itself has not.
local function make(...)
  local made = key(...)
  return made
end
local function setup(...) pglocks.setup(...) end

--- A number as LuaJIT alone can write it ("42LL"); the text is no Lua for others.
local function cdata(text) return load("return " .. text)() end

local assert_raises = support.assert_raises

local function hex(bytes)
  return (bytes:gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

--- The first 8 bytes of a digest that the server makes of `bytes`, as a signed number.
local function server_key(digest, bytes)
  local sql = ("SELECT ('x' || left(encode(%s(decode($1, 'hex')), 'hex'), 16))::bit(64)::bigint::text AS key")
    :format(digest)
  return support.observe(sql, hex(bytes))[1].key
end

local function big_endian(n)
  local bytes = {}
  for i = 8, 1, -1 do
    bytes[i] = string.char(n % 256)
    n = math.floor(n / 256)
  end
  return table.concat(bytes)
end

describe("a number as a key", function()
  local NOT_EXACT = "bad argument #1 to 'key' (number has no exact representation as a 64-bit integer)"

  it("is taken as it is when it is whole", function()
    for _, case in ipairs {
      { 0, "0" }, { -0.0, "0" }, { 1, "1" }, { -1, "-1" }, { 42.0, "42" },
      { 2 ^ 31 - 1, "2147483647" }, { -2 ^ 31, "-2147483648" }, { 2 ^ 31, "2147483648" },
      { 2 ^ 32 - 1, "4294967295" }, { 2 ^ 32, "4294967296" }, { -2 ^ 32, "-4294967296" },
      { 2 ^ 53, "9007199254740992" }, { -2 ^ 53, "-9007199254740992" },
    } do
      assert.equal(case[2], tostring(key(case[1])))
    end
  end)

  for _, case in ipairs {
    { "1.5", 1.5 }, { "0.1", 0.1 }, { "a denormal", 5e-324 }, { "NaN", 0 / 0 }, { "infinity", math.huge },
    { "minus infinity", -math.huge }, { "2^63", 2 ^ 63 }, { "below -2^63", -2 ^ 63 - 2 ^ 11 },
    { "1e300", 1e300 },
  } do
    it("is refused when it is " .. case[1], function() assert_raises(NOT_EXACT, make, case[2]) end)
  end

  if support.is_jit then
    it("is refused past 2^53 on LuaJIT, where the program may have meant another one", function()
      for _, n in ipairs { 2 ^ 53 + 2, -2 ^ 53 - 2, 2 ^ 62, -2 ^ 63 } do
        assert_raises(NOT_EXACT, make, n)
      end
    end)

    it("may be a 64-bit integer of LuaJIT", function()
      for text, expected in pairs {
        ["42LL"] = "42", ["42ULL"] = "42", ["-1LL"] = "-1", ["0LL"] = "0",
        ["9007199254740993LL"] = "9007199254740993",
        ["9223372036854775807LL"] = "9223372036854775807",
        ["9223372036854775807ULL"] = "9223372036854775807",
        ["-9223372036854775807LL - 1LL"] = "-9223372036854775808",
      } do
        assert.equal(expected, tostring(key(cdata(text))))
      end
      assert.equal("(7, -42)", tostring(key { cdata "7LL", cdata "-42LL" }))
    end)

    it("is refused as an unsigned 64-bit integer past 2^63", function()
      assert_raises(NOT_EXACT, make, cdata "9223372036854775808ULL")
      assert_raises(NOT_EXACT, make, cdata "0xffffffffffffffffULL")
      assert_raises("[2] is out of range", make, { 1, cdata "2147483648LL" })
      assert_raises("[1] is no exact integer", make, { cdata "0xffffffffffffffffULL", 1 })
    end)

    it("is no other cdata", function()
      local ffi = require "ffi"
      for _, value in ipairs {
        ffi.new("int32_t", 42), ffi.new("int64_t[1]", 42), ffi.new("double", 42), ffi.new("complex", 42, 0),
        ffi.new("struct { int64_t n; }", 42), ffi.cast("void *", 42), ffi.typeof "int64_t", ffi.new "void *",
      } do
        assert_raises("bad argument #1 to 'key' (integer, pair of integers or string expected, got cdata)",
          make, value)
      end
    end)
  else
    it("is taken up to the limits of 64 bits", function()
      assert.equal("9223372036854775807", tostring(key(math.maxinteger)))
      assert.equal("-9223372036854775808", tostring(key(math.mininteger)))
      assert.equal("-9223372036854775808", tostring(key(-2 ^ 63)))
      assert.equal("9007199254740993", tostring(key(math.tointeger(2 ^ 53) + 1)))
    end)
  end

  it("is not what looks like one: the string 42 is a name", function()
    assert.not_equal(key(42), key "42")
    assert.equal(server_key("sha256", "42"), tostring(key "42"))
  end)
end)

describe("a pair as a key", function()
  it("has two signed 32-bit integers", function()
    for expected, pair in pairs {
      ["(7, 42)"] = { 7, 42 }, ["(0, 0)"] = { 0, -0.0 }, ["(-1, 1)"] = { -1.0, 1 },
      ["(2147483647, -2147483648)"] = { 2 ^ 31 - 1, -2 ^ 31 },
      ["(-2147483648, 2147483647)"] = { -2 ^ 31, 2 ^ 31 - 1 },
    } do
      assert.equal(expected, tostring(key(pair)))
    end
  end)

  local ANOTHER_TABLE = "a pair of 32-bit integers expected, got another table"
  for _, case in ipairs {
    { "is empty", {}, ANOTHER_TABLE },
    { "has one value", { 1 }, ANOTHER_TABLE },
    { "has only a second value", { nil, 2 }, ANOTHER_TABLE },
    { "has three values", { 1, 2, 3 }, ANOTHER_TABLE },
    { "has a gap", { 1, nil, 3 }, ANOTHER_TABLE },
    { "has another field", { 1, 2, shared = true }, ANOTHER_TABLE },
    { "has other fields alone", { a = 1, b = 2 }, ANOTHER_TABLE },
    { "has its values by a metatable", setmetatable({}, { __index = { 1, 2 } }), ANOTHER_TABLE },
    { "has a string", { "1", 2 }, "[1] is string" },
    { "has a boolean", { 1, true }, "[2] is boolean" },
    { "has a table", { { 1 }, 2 }, "[1] is table" },
    { "has a key", { key(1), 2 }, "[1] is userdata" },
    { "has a fraction", { 1, 1.5 }, "[2] is no exact integer" },
    { "has NaN", { 0 / 0, 1 }, "[1] is no exact integer" },
    { "has an infinite number", { 1, math.huge }, "[2] is no exact integer" },
    { "has a number past 32 bits", { 2 ^ 31, 0 }, "[1] is out of range" },
    { "has an unsigned number", { 0, 2 ^ 32 - 1 }, "[2] is out of range" },
    { "has a number below 32 bits", { 0, -2 ^ 31 - 1 }, "[2] is out of range" },
  } do
    it("is refused when it " .. case[1], function()
      assert_raises("bad argument #1 to 'key'", make, case[2])
      assert_raises(case[3], make, case[2])
    end)
  end
end)

describe("a key of any other type", function()
  for _, case in ipairs {
    { "nil", nil }, { "boolean", true }, { "function", print }, { "thread", coroutine.create(print) },
    { "userdata", io.stdout },
  } do
    it("is refused: " .. case[1], function()
      assert_raises(("bad argument #1 to 'key' (integer, pair of integers or string expected, got %s)")
        :format(case[1]), make, case[2])
    end)
  end

  it("may be a key, which stays the same", function()
    for _, value in ipairs { 42, -1, "invoice 42" } do
      assert.equal(key(value), key(key(value)))
    end
    assert.equal(key { 7, 42 }, key(key { 7, 42 }))
    assert_raises("option 'hash' is for names only", make, key(1), { hash = "sha256" })
  end)
end)

describe("a name as a key", function()
  it("is hashed with SHA-256 unless told otherwise", function()
    for _, name in ipairs { "", "some lock", "invoice 42", "naïve-日本", ("x"):rep(1000) } do
      assert.equal(key(name, { hash = "sha256" }), key(name))
      assert.equal(server_key("sha256", name), tostring(key(name)))
    end
  end)

  it("may be any bytes: all of them count", function()
    local every_byte = {}
    for i = 0, 255 do every_byte[i + 1] = string.char(i) end
    local strange = {
      "\0", "a\0", "a\0b", "a", "\255\254", "\192\128", "\237\160\128", "nai\204\136ve", "na\195\175ve",
      table.concat(every_byte), ("m"):rep(2 ^ 20), ("m"):rep(2 ^ 20 - 1) .. "n",
    }
    local seen = {}
    for _, name in ipairs(strange) do
      local shown = tostring(key(name))
      assert.equal(server_key("sha256", name), shown)
      assert.is_nil(seen[shown])
      seen[shown] = true
    end
  end)

  it("counts to its last byte with django-pglocks too", function()
    local options = { hash = "django-pglocks" }
    assert.not_equal(key("a", options), key("a\0", options))
    assert.not_equal(key("a\0b", options), key("a\0c", options))
  end)

  it("is refused with a hash that does not exist", function()
    assert_raises("option 'hash': unknown scheme 'sha256'", make, "a", { hash = "sha256\0" })
    for _, scheme in ipairs { "", "SHA256", "md5", "crc32" } do
      assert_raises(("bad argument #2 to 'key' (option 'hash': unknown scheme '%s')"):format(scheme),
        make, "a", { hash = scheme })
    end
  end)
end)

describe("a namespace", function()
  it("makes keys that stay the same for ever", function()
    for _, case in ipairs {
      { "", "", "1978216912141001549" },
      { "app", "", "-9039037842895071371" },
      { "app", "some lock", "-9161197360350546587" },
      { "tenant-a", "invoice 42", "5265704219173816051" },
      { "naïve-日本", "a\0b", "-1432783813547629817" },
      { ("n"):rep(1000), ("x"):rep(1000), "-1965586852712520994" },
    } do
      local namespace, name, expected = case[1], case[2], case[3]
      assert.equal(expected, tostring(key(name, { namespace = namespace })))
      assert.equal(expected, server_key("sha512", big_endian(#namespace) .. namespace .. name))
    end
  end)

  it("is told apart from the name, and from every bare name", function()
    local seen = {}
    local function add(made)
      assert.is_nil(seen[tostring(made)])
      seen[tostring(made)] = true
    end
    for cut = 0, 6 do
      local whole = "abcdef"
      add(key(whole:sub(cut + 1), { namespace = whole:sub(1, cut) }))
    end
    add(key("\0b", { namespace = "a" }))
    add(key("b", { namespace = "a\0" }))
    for _, name in ipairs { "abcdef", "", "a\0b", big_endian(3) .. "abcdef" } do add(key(name)) end
  end)

  it("is a string", function()
    for _, namespace in ipairs { 7, { "app" } } do
      assert_raises("bad argument #2 to 'key' (hash 'sha256' takes a string as its namespace)",
        make, "a", { namespace = namespace })
    end
  end)
end)

describe("the options of a key", function()
  it("are refused with a number, to which they mean nothing", function()
    for option, value in pairs { hash = "sha256", namespace = "app" } do
      for _, number in ipairs { 42, { 7, 42 }, support.is_jit and cdata "42LL" or nil } do
        assert_raises(("bad argument #2 to 'key' (option '%s' is for names only)"):format(option),
          make, number, { [option] = value })
      end
    end
  end)

  it("are refused when they are unknown or of a wrong type", function()
    for expected, options in pairs {
      ["unknown option 'hsah'"] = { hsah = "sha256" },
      ["unknown option 'shared'"] = { shared = true },
      ["unknown option"] = { "sha256" },
      ["option 'hash': name of a scheme or function expected, got number"] = { hash = 256 },
      ["option 'hash': name of a scheme or function expected, got boolean"] = { hash = false },
      ["option 'namespace': string, integer or list of strings expected, got boolean"] = { namespace = true },
      ["option 'namespace': string, integer or list of strings expected, got number"] = { namespace = 1.5 },
      ["option 'namespace': string, integer or list of strings expected, got table"] = { namespace = {} },
      ["option 'namespace': list of strings expected, [2] is number"] = { namespace = { "a", 7 } },
      ["table of options expected, got string"] = "sha256",
      ["table of options expected, got boolean"] = false,
    } do
      assert_raises("bad argument #2 to 'key'", make, "a", options)
      assert_raises(expected, make, "a", options)
    end
  end)
end)

describe("the defaults of setup", function()
  after_each(function() pglocks.setup {} end)

  it("make one hash the default for names", function()
    pglocks.setup { hash = "django-pglocks" }
    assert.equal("-205618829", tostring(key "some lock"))
    assert.equal("-5006958056254205714", tostring(key("some lock", { hash = "sha256" })))
    pglocks.setup {}
    assert.equal("-5006958056254205714", tostring(key "some lock"))
  end)

  it("make one namespace the default for names", function()
    local expected = key("some lock", { namespace = "a\0b" })
    pglocks.setup { namespace = "a\0b" }
    collectgarbage()
    assert.equal(expected, key "some lock")
    assert.equal(key("some lock", { namespace = "a\0b" }), key "some lock")
    assert.not_equal(expected, key("some lock", { namespace = "a" }))
  end)

  it("do not touch numbers", function()
    for _, settings in ipairs { { hash = "django-pglocks" }, { namespace = "app" } } do
      pglocks.setup(settings)
      assert.equal("42", tostring(key(42)))
      assert.equal("(7, 42)", tostring(key { 7, 42 }))
      assert.equal("42", tostring(key(key(42))))
    end
  end)

  it("are refused when hash and namespace do not go together, and change nothing then", function()
    pglocks.setup { namespace = "app" }
    local before = key "some lock"
    assert_raises("bad argument #1 to 'setup' (hash 'django-pglocks' takes no namespace)",
      setup, { hash = "django-pglocks", namespace = "app" })
    assert_raises("bad argument #1 to 'setup'", setup, { hash = "md5" })
    assert_raises("bad argument #1 to 'setup' (hash 'sha256' takes a string as its namespace)",
      setup, { namespace = 7 })
    assert_raises("bad argument #1 to 'setup' (hash 'river' takes a 32-bit integer as its namespace)",
      setup, { hash = "river", namespace = "app" })
    assert.equal(before, key "some lock")
  end)

  it("name the call that does not go with them", function()
    pglocks.setup { namespace = "app" }
    assert_raises("bad argument #2 to 'key' (hash 'django-pglocks' takes no namespace)",
      make, "a", { hash = "django-pglocks" })
    pglocks.setup { hash = "django-pglocks" }
    assert_raises("bad argument #2 to 'key' (hash 'django-pglocks' takes no namespace)",
      make, "a", { namespace = "app" })
    assert.equal(key("a", { hash = "sha256", namespace = "app" }),
      key("a", { namespace = "app", hash = "sha256" }))
  end)
end)

describe("a key", function()
  after_each(support.finish)

  it("has the numbers that pg_locks shows when it is taken", function()
    local keys = {
      0, 1, -1, 2 ^ 31, 2 ^ 32 - 1, 2 ^ 32, -2 ^ 31, -2 ^ 32, 2 ^ 53, -2 ^ 53, "some lock", "", "a\0b",
      { 0, 0 }, { 7, 42 }, { -1, -1 }, { 2 ^ 31 - 1, -2 ^ 31 }, { -2 ^ 31, 2 ^ 31 - 1 },
      key("some lock", { hash = "django-pglocks" }), key("some lock", { namespace = "app" }),
      support.is_jit and cdata "-9223372036854775807LL - 1LL" or math.mininteger,
      support.is_jit and cdata "9223372036854775807LL" or math.maxinteger,
    }
    local conn = support.connect()
    for _, value in ipairs(keys) do
      local made, lock = key(value), conn:lock(value)
      assert.equal(made, lock.key)
      assert.same({ { pid = conn.backend_pid, mode = "ExclusiveLock", granted = true,
        classid = made.classid, objid = made.objid, objsubid = made.objsubid } },
        support.pg_locks(conn.backend_pid))
      lock:release()
    end
  end)

  it("is the same lock as PostgreSQL's own functions take", function()
    local a, b = support.connect(), support.connect()
    for call, value in pairs {
      ["pg_advisory_lock(-205618829)"] = key("some lock", { hash = "django-pglocks" }),
      ["pg_advisory_lock(9007199254740992)"] = 2 ^ 53,
      ["pg_advisory_lock(7, -42)"] = { 7, -42 },
    } do
      b:query("SELECT " .. call)
      assert.same({ nil, "busy" }, { a:try_lock(value) })
      b:query("SELECT " .. call:gsub("lock", "unlock"))
      assert.is_true(a:lock(value):release())
    end
  end)

  it("has integers for its numbers", function()
    local made = key { -1, 42 }
    assert.same({ 4294967295, 42, 2 }, { made.classid, made.objid, made.objsubid })
    assert.equal("4294967295", tostring(made.classid))
    assert.same({ 0, 42, 1 }, { key(42).classid, key(42).objid, key(42).objsubid })
    assert.is_nil(made.other)
    assert.is_false(pcall(function() made.objid = 43 end))
  end)

  it("has the value that a call takes for the same key", function()
    for _, value in ipairs { 0, 42, -1, 2 ^ 53, -2 ^ 53, { 7, -42 }, { -2 ^ 31, 2 ^ 31 - 1 } } do
      assert.same(value, key(value).value)
    end
    for _, name in ipairs { "some lock", "invoice 42", "naïve-日本" } do
      local made = key(name)
      assert.equal(made, key(made.value))
      assert.equal(tostring(made), (tostring(made.value):gsub("LL$", "")))
      assert.equal(support.is_jit and "cdata" or "number", type(made.value))
    end
    assert.not_equal(key(42).value, key { 0, 42 }.value)
  end)

  for text, value in pairs {
    ["9007199254740993"] = support.is_jit and "9007199254740993LL" or "9007199254740993",
    ["-9007199254740993"] = support.is_jit and "-9007199254740993LL" or "-9007199254740993",
    ["9223372036854775807"] = support.is_jit and "9223372036854775807LL" or "9223372036854775807",
    ["-9223372036854775808"] = support.is_jit and "-9223372036854775807LL - 1LL" or "-9223372036854775807 - 1",
  } do
    it("keeps all digits of " .. text, function()
      local made = key(cdata(value))
      assert.equal(text, tostring(made))
      assert.is_true(made.value == cdata(value))
      assert.equal(made, key(made.value))
    end)
  end

  if support.is_jit then
    it("has a string of digits for its value where there is no ffi", function()
      local process = support.spawn [[
        package.loaded.ffi, package.preload.ffi = nil, nil
        local key = require "pglocks".key
        for _, name in ipairs { "some lock", "invoice 42" } do
          print(type(key(name).value), key(name).value, key(name))
        end
        print(type(key(2 ^ 53).value), key(2 ^ 53))
      ]]
      local lines = {}
      for line in process.lines do lines[#lines + 1] = line end
      process.close()
      assert.same({ "string\t-5006958056254205714\t-5006958056254205714",
        "string\t-8336654015406136946\t-8336654015406136946", "number\t9007199254740992" }, lines)
    end)
  end

  it("equals keys of the same lock and nothing else", function()
    assert.is_true(key(42) == key(42.0))
    assert.is_true(key "some lock" == key(key "some lock"))
    assert.is_true(key("some lock", { hash = "django-pglocks" }) == key(-205618829))
    assert.is_false(key(42) == key { 0, 42 })
    assert.is_false(key(42) == key(43))
    assert.is_false(key(42) == 42)
    assert.is_false(key(42) == "42")
    assert.is_false(key(42) == io.stdout)
  end)

  it("is ordered as many are locked: 64-bit keys ascending, then pairs", function()
    local sorted = {
      key(-2 ^ 53), key(-2 ^ 32), key(-2), key(-1), key(0), key(1), key(2 ^ 31), key(2 ^ 32), key(2 ^ 53),
      key { -2 ^ 31, 0 }, key { -1, 1 }, key { 0, -1 }, key { 0, 0 }, key { 0, 1 }, key { 1, -2 ^ 31 },
      key { 1, 2 ^ 31 - 1 }, key { 2 ^ 31 - 1, 0 },
    }
    for i, a in ipairs(sorted) do
      for j, b in ipairs(sorted) do
        assert.equal(i < j, a < b)
        assert.equal(i <= j, a <= b)
        assert.equal(i == j, a == b)
      end
    end
    assert.is_false(pcall(function() return key(1) < 2 end))
  end)
end)
